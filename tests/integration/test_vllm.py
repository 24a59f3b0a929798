"""The vLLM plugin: its answers against transformers with the same adapter, on vLLM's engine for CPUs.

FlashAttention needs a GPU: there, a stand-in of the kernel computes the definition, and takes the real one's arguments.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shlex
import socket
import string
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_hificl import HiFICLConfig, VirtualPairs
from peft_hificl.names import MODULE

from .. import oracle
from ..helpers import byte_tokenizer

vllm = pytest.importorskip("vllm")
plugin = pytest.importorskip("peft_hificl_vllm")
pytestmark = pytest.mark.integration

from peft_hificl_vllm import adapter as adapters
from peft_hificl_vllm import cpu, flash, loader
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum

if not current_platform.is_cpu():
    pytest.skip("these tests run vLLM's engine for CPUs", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PROMPTS = [[1, 2, 3, 4, 5], [7 * i % 90 + 2 for i in range(70)], [9], [3, 9, 9]]
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = {"sliding_window": 16}
# By vLLM's name of an architecture, the configuration of a small model of it.
CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "CohereForCausalLM": lambda: tf.CohereConfig(**SIZES),
    "Ernie4_5ForCausalLM": lambda: tf.Ernie4_5Config(**SIZES, head_dim=32),
    "GPT2LMHeadModel": lambda: tf.GPT2Config(
        vocab_size=96, n_embd=128, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2, eos_token_id=None
    ),
    "Gemma3ForCausalLM": lambda: tf.Gemma3TextConfig(**SIZES, head_dim=32, query_pre_attn_scalar=32, **WINDOW),
    "GemmaForCausalLM": lambda: tf.GemmaConfig(**SIZES, head_dim=32),
    "Glm4ForCausalLM": lambda: tf.Glm4Config(**SIZES, head_dim=32),
    "GraniteForCausalLM": lambda: tf.GraniteConfig(**SIZES, attention_multiplier=0.1),
    "LlamaForCausalLM": lambda: tf.LlamaConfig(**SIZES),
    "MistralForCausalLM": lambda: tf.MistralConfig(**SIZES, head_dim=32, **WINDOW),
    "MixtralForCausalLM": lambda: tf.MixtralConfig(**SIZES, head_dim=32, num_local_experts=4),
    "NemotronForCausalLM": lambda: tf.NemotronConfig(**SIZES, head_dim=32),
    "OPTForCausalLM": lambda: tf.OPTConfig(
        vocab_size=96, hidden_size=128, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, init_std=0.2,
        max_position_embeddings=512, word_embed_proj_dim=128, bos_token_id=None, eos_token_id=None,
    ),
    "Phi3ForCausalLM": lambda: tf.Phi3Config(**SIZES),
    "Qwen2ForCausalLM": lambda: tf.Qwen2Config(**SIZES),
    "Qwen2MoeForCausalLM": lambda: tf.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=32),
    "Qwen3ForCausalLM": lambda: tf.Qwen3Config(**SIZES, head_dim=32),
    "Qwen3MoeForCausalLM": lambda: tf.Qwen3MoeConfig(**SIZES, head_dim=32, **EXPERTS),
    "StableLmForCausalLM": lambda: tf.StableLmConfig(**SIZES),
}  # fmt: skip
# Half of the engine's 32 tokens a step, so that prompts are read in pieces, beside the next token of others.
ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 4,
    "max_num_batched_tokens": 32, "block_size": 32, "attention_backend": "CUSTOM", "load_format": "hificl",
}  # fmt: skip


def save(folder: Path, base: tf.PreTrainedConfig, auto: Any = tf.AutoModelForCausalLM, **options: Any) -> PeftModel:
    """A random base model and a random adapter, saved; what transformers loads of them."""
    torch.manual_seed(0)
    model = auto.from_config(base)
    model.save_pretrained(folder / "base")
    config = HiFICLConfig(task_type="CAUSAL_LM", **{"n": 4, "r": 3, "init_weights": False} | options)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "hificl_W" in name or "hificl_V." in name:  # zero at the start
                parameter.normal_()
    adapted.save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(
        auto.from_pretrained(folder / "base", dtype=torch.float32), folder / "adapter"
    ).eval()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LLM]]:
    """Starts vLLM with the adapter of `tmp_path`."""
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    engines: list[LLM] = []

    def run(**options: Any) -> LLM:
        extra = {"adapter": str(tmp_path / "adapter")}
        engines.append(LLM(str(tmp_path / "base"), **{**ENGINE, "model_loader_extra_config": extra, **options}))
        return engines[-1]

    yield run
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def check(llm: LLM, adapted: PeftModel, prompts: list[list[int]] = PROMPTS) -> list[int]:
    """Compare greedy tokens and the log-probabilities of prompts; how many tokens of each were cached."""
    sampling = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=1, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    effect = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        want = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert list(output.outputs[0].token_ids) == want[0, len(prompt) :].tolist()
        with torch.no_grad():
            wanted = adapted(ids).logits[0].log_softmax(-1)
            with adapted.disable_adapter():
                effect = max(effect, (adapted(ids).logits[0].log_softmax(-1) - wanted).abs().max().item())
        found = [output.prompt_logprobs[i][token].logprob for i, token in enumerate(prompt) if i]
        torch.testing.assert_close(torch.tensor(found), wanted[range(len(found)), prompt[1:]], atol=1e-4, rtol=1e-4)
    assert effect > 0.1  # the adapter is not idle
    return [output.num_cached_tokens for output in outputs]


# -- the engine -------------------------------------------------------------------------------------------------------


def test_every_architecture_that_is_let_through_is_compared() -> None:
    assert {*CONFIGS, *VISION} == set(loader.ARCHITECTURES)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_architectures(architecture: str, tmp_path: Path, start: Callable[..., LLM]) -> None:
    adapted = save(tmp_path, CONFIGS[architecture]())
    llm = start()
    assert llm.llm_engine.model_config.architecture == architecture
    check(llm, adapted)


def save_llava(folder: Path) -> tuple[PeftModel, Any, str]:
    """A model, its processor, and how a prompt holds an image."""
    size = {"height": 56, "width": 56}  # that of the picture, as programs resize in different ways
    vision = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision, image_size=56, patch_size=28),
        text_config=tf.Qwen2Config(**{**SIZES, "vocab_size": 257}),
        image_token_index=256,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    adapted = save(folder, config, tf.AutoModelForImageTextToText)
    file = folder / "base" / "model.safetensors"
    # vLLM 0.32 expects the names that transformers had before 5.
    named = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in load_file(file).items()}
    save_file(named, file, {"format": "pt"})
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessorPil(size=size, crop_size=size), byte_tokenizer(additional_special_tokens=["<image>"]),
        patch_size=28, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return adapted, processor, "<image>"


def save_qwen_vl(folder: Path, config: Any, processor: Any, vision: dict[str, Any]) -> tuple[PeftModel, Any, str]:
    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = byte_tokenizer(additional_special_tokens=names)
    begin, end, image, video = words.convert_tokens_to_ids(names)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    base = config(
        text_config={**SIZES, "vocab_size": 260, "rope_parameters": rope},
        vision_config={"depth": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
        image_token_id=image, video_token_id=video, vision_start_token_id=begin, vision_end_token_id=end,
        tie_word_embeddings=False,
    )  # fmt: skip
    images = tf.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    adapted = save(folder, base, tf.AutoModelForImageTextToText)
    return adapted, processor(images, words, tf.Qwen2VLVideoProcessor()), "".join((names[0], names[2], names[1]))


VISION: dict[str, Callable[[Path], tuple[PeftModel, Any, str]]] = {
    "LlavaForConditionalGeneration": save_llava,
    "Qwen2VLForConditionalGeneration": lambda folder: save_qwen_vl(
        folder, tf.Qwen2VLConfig, tf.Qwen2VLProcessor,
        {"embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
    ),
    "Qwen2_5_VLForConditionalGeneration": lambda folder: save_qwen_vl(
        folder, tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLProcessor,
        {
            "hidden_size": 64, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128,
            "fullatt_block_indexes": [1], "window_size": 112,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", VISION)
def test_images(architecture: str, tmp_path: Path, start: Callable[..., LLM]) -> None:
    """Modules have other names in vLLM there."""
    pytest.importorskip("torchvision")
    adapted, processor, placeholder = VISION[architecture](tmp_path)
    processor.save_pretrained(tmp_path / "base")
    llm = start(skip_tokenizer_init=False, limit_mm_per_prompt={"image": 1, "video": 0}, max_num_batched_tokens=256)
    assert llm.llm_engine.model_config.architecture == architecture
    image, prompt = Image.effect_noise((56, 56), 80).convert("RGB"), f"What is it? {placeholder} Say."
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=1)
    request = {"prompt": prompt, "multi_modal_data": {"image": image}}
    (output,) = llm.generate([request], sampling, use_tqdm=False)

    inputs = processor(text=prompt, images=image, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert output.prompt_token_ids == ids
    want = adapted.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(output.outputs[0].token_ids) == want[0, len(ids) :].tolist()
    with torch.no_grad():
        wanted = adapted(**inputs).logits[0].log_softmax(-1)
        with adapted.disable_adapter():
            assert (adapted(**inputs).logits[0].log_softmax(-1) - wanted).abs().max() > 0.1
    found = [output.prompt_logprobs[i][token].logprob for i, token in enumerate(ids) if i]
    torch.testing.assert_close(torch.tensor(found), wanted[range(len(found)), ids[1:]], atol=1e-4, rtol=1e-4)


FORMS: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
    "heads of the cache": {"heads": "kv"},
    "weights, no first token": {"pair_weights": True, "skip_first_token": True},
    "weights of the cache's heads": {"pair_weights": True, "heads": "kv"},
    "alpha = 1": {"scale_self_attention": False, "skip_first_token": True},
    "whole keys and values": {"factorize_keys": False, "factorize_values": False},
    "one layer": {"layers_to_transform": [1]},
    "paper's start": {"init_weights": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, tmp_path: Path, start: Callable[..., LLM]) -> None:
    options = dict(FORMS[form])
    kv_heads = options.pop("kv_heads", 2)
    adapted = save(tmp_path, tf.LlamaConfig(**{**SIZES, "num_key_value_heads": kv_heads}), **options)
    check(start(), adapted)


def test_prefixes_are_cached_and_weights_reloaded(
    tmp_path: Path, start: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = save(tmp_path, tf.LlamaConfig(**SIZES), skip_first_token=True)
    llm = start(enable_prefix_caching=True)
    long = PROMPTS[1]
    check(llm, adapted, [long])
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1, detokenize=False, ignore_eos=True)
    prompts = [[*long, 5], [*long[:40], 7], [8, *long]]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [64, 32, 0]
    for prompt, output in zip(prompts, outputs, strict=True):
        want = adapted.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert list(output.outputs[0].token_ids) == want[0, len(prompt) :].tolist()
    llm.collective_rpc("reload_weights")
    check(llm, adapted)


def test_half_precision(tmp_path: Path, start: Callable[..., LLM]) -> None:
    """Pairs stay float32 beside a bfloat16 model, as in PEFT; the answers differ by what bfloat16 rounds."""
    exact = save(tmp_path, tf.LlamaConfig(**{**SIZES, "initializer_range": 0.05}))
    llm = start(dtype="bfloat16")
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": PROMPTS[1]}], sampling, use_tqdm=False)
    found = torch.tensor([output.prompt_logprobs[i][token].logprob for i, token in enumerate(PROMPTS[1]) if i])

    def of(model: nn.Module) -> Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[1]])).logits[0].float()
        return logits.log_softmax(-1)[range(len(found)), PROMPTS[1][1:]]

    rounded = of(exact.bfloat16())
    wanted = of(exact.float())
    assert (found - wanted).norm() < 2 * (rounded - wanted).norm() + 1e-3


def test_without_an_adapter(tmp_path: Path, start: Callable[..., LLM]) -> None:
    """The plugin is there, but not asked for: vLLM's own attention."""
    adapted = save(tmp_path, tf.LlamaConfig(**SIZES))
    llm = start(load_format="auto", model_loader_extra_config={})
    sampling = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with adapted.disable_adapter():
            want = adapted.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert list(output.outputs[0].token_ids) == want[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_tensor_parallel(tmp_path: Path, start: Callable[..., LLM]) -> None:
    """Two ranks; with a single key/value head, both have it."""
    adapted = save(tmp_path, tf.LlamaConfig(**{**SIZES, "num_key_value_heads": 1}), pair_weights=True)
    check(start(tensor_parallel_size=2), adapted)


# -- the page ---------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "guides" / "vllm.md").read_text()


def save_with_words(folder: Path) -> PeftModel:
    adapted = save(folder, tf.LlamaConfig(**{**SIZES, "vocab_size": 256}))
    byte_tokenizer().save_pretrained(folder / "base")
    return adapted


def test_the_pages_comparison(tmp_path: Path, start: Callable[..., LLM], capsys: pytest.CaptureFixture[str]) -> None:
    save_with_words(tmp_path)
    (code,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"BASE": str(tmp_path / "base"), "ADAPTER": str(tmp_path / "adapter")}
    exec(compile(code, "vllm.md", "exec"), names)
    names["llm"].llm_engine.engine_core.shutdown()
    difference = re.fullmatch(r"tensor\((.*)\)", capsys.readouterr().out.strip().splitlines()[-1])
    assert difference is not None and float(difference[1]) < 1e-4


def test_the_pages_options() -> None:
    """vLLM reads them as the page writes them."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = [found for found in re.findall(r"^\| `(--[^`]+)`", PAGE, re.MULTILINE) if "unverified" in found]
    arguments = shlex.split(f"--load-format hificl --model-loader-extra-config.adapter some/folder {' '.join(options)}")
    found = parser.parse_args(arguments).model_loader_extra_config
    assert found == {"adapter": "some/folder", "unverified": True}


@pytest.mark.slow
def test_the_pages_server(tmp_path: Path) -> None:
    """Compiled, in three processes."""
    adapted = save_with_words(tmp_path)
    (line,) = re.findall(r"^python -m vllm.*$", PAGE, re.MULTILINE)
    command = string.Template(line).substitute(BASE=tmp_path / "base", ADAPTER=tmp_path / "adapter")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    arguments = [*shlex.split(command)[1:], "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    address = f"http://127.0.0.1:{port}"
    prompt = "Question: what?"
    question = {"model": str(tmp_path / "base"), "prompt": prompt, "max_tokens": 8, "temperature": 0}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, *arguments], stdout=log, stderr=log, cwd=tmp_path, env={**os.environ, **variables}
        )
        try:
            for _ in range(150):
                assert server.poll() is None, (tmp_path / "log").read_text()
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                    break
                time.sleep(2)
            request = urllib.request.Request(
                f"{address}/v1/completions", json.dumps({**question, "ignore_eos": True}).encode(),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=60) as response:
                found = json.load(response)["choices"][0]["text"]
        finally:
            server.terminate()
            server.wait()
    words = byte_tokenizer()
    ids = words(prompt, return_tensors="pt")["input_ids"]
    want = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found == words.decode(want[0, ids.shape[1] :])


# -- what is refused ---------------------------------------------------------------------------------------------------


def engine_config(folder: Path, **options: Any) -> Any:
    arguments = {**ENGINE, "model_loader_extra_config": {"adapter": str(folder / "adapter")}, **options}
    return EngineArgs(str(folder / "base"), **arguments).create_engine_config()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'.*--kv-cache-dtype auto"),
    ({"enable_lora": True}, "lora_config.*merge"),
    ({"model_loader_extra_config": {}}, "needs the folder of an adapter, found None"),
    ({"model_loader_extra_config": {"adapter": "x", "unverified": "false"}}, "true or false, found 'false'"),
    (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        r"KV connector \(kv_transfer_config\)",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_settings(options: dict[str, Any], message: str, tmp_path: Path, start: Callable[..., LLM]) -> None:
    save(tmp_path, tf.LlamaConfig(**SIZES))
    with pytest.raises(Exception, match=f"(?s){message}"):
        start(**options)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("parallel_config", "pipeline_parallel_size", 2),
        ("parallel_config", "decode_context_parallel_size", 2),
        ("parallel_config", "prefill_context_parallel_size", 2),
        ("attention_config", "use_non_causal", True),
        ("model_config", "runner_type", "pooling"),
    ],
)
def test_refused_configurations(part: str, name: str, value: object, tmp_path: Path) -> None:
    save(tmp_path, tf.LlamaConfig(**SIZES))
    config = engine_config(tmp_path)
    loader.check_engine(config)
    setattr(getattr(config, part), name, value)
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        loader.check_engine(config)


def test_speculative_decoding(tmp_path: Path) -> None:
    save(tmp_path, tf.LlamaConfig(**SIZES))
    config = engine_config(tmp_path)
    config.speculative_config = SimpleNamespace(method="ngram")  # its engine imports what vLLM's next one trips over
    with pytest.raises(ValueError, match="speculative_config"):
        loader.check_engine(config)


def test_refused_versions_and_batch_invariance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, tf.LlamaConfig(**SIZES))
    config = engine_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(vllm, "__version__", "0.31.2")
        with pytest.raises(ValueError, match=r"vllm 0\.31\.2.*0\.32, 0\.33"):
            loader.check_engine(config)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT"):
        loader.check_engine(config)


def test_architectures_that_were_not_compared(tmp_path: Path, start: Callable[..., LLM]) -> None:
    """Refused, unless "unverified" is set; what the backend cannot compute is refused all the same."""
    save(tmp_path, tf.Gemma2Config(**SIZES, head_dim=32))
    with pytest.raises(ValueError, match=r"(?s)'Gemma2ForCausalLM'.*LlamaForCausalLM.*unverified"):
        start()
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn'.*logits_soft_cap=50.0"):
        start(model_loader_extra_config={"adapter": str(tmp_path / "adapter"), "unverified": True})


def test_an_adapter_of_another_base_model(tmp_path: Path, start: Callable[..., LLM]) -> None:
    for name, size in {"num_hidden_layers": 3, "num_attention_heads": 2}.items():
        save(tmp_path / name, tf.LlamaConfig(**{**SIZES, name: size}))
    save(tmp_path, tf.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=r"of 'model.layers.2.self_attn', where vLLM's model has 0 attention layers"):
        start(model_loader_extra_config={"adapter": str(tmp_path / "num_hidden_layers" / "adapter")})
    with pytest.raises(ValueError, match=r"'hificl_K_A' of the adapter file, on 'model.layers.0.self_attn', has shape"):
        start(model_loader_extra_config={"adapter": str(tmp_path / "num_attention_heads" / "adapter")})


@pytest.mark.parametrize("targets", [None, ["self_attn"]])
def test_incomplete_files(targets: list[str] | None, tmp_path: Path, start: Callable[..., LLM]) -> None:
    save(tmp_path, tf.LlamaConfig(**SIZES), target_modules=targets)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({key: tensor for key, tensor in whole.items() if "layers.1." not in key}, file)
    with pytest.raises(ValueError, match=r"of 'model.layers.1.self_attn' too, by its target_modules"):
        start()
    save_file({key: tensor for key, tensor in whole.items() if "V_B" not in key or "layers.0" in key}, file)
    with pytest.raises(ValueError, match=r"lacks 'hificl_V_B'.*'model.layers.1.self_attn'"):
        start()
    save_file({}, file)
    with pytest.raises(ValueError, match="holds no tensors"):
        start()


def test_adapters_that_are_not_pairs_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def saved(config: Any) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        get_peft_model(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), config).save_pretrained(folder)
        return folder

    with pytest.raises(ValueError, match="peft_type=.*LORA.*not HIFICL.*--enable-lora"):
        adapters.read(saved(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])))
    more = {"modules_to_save": ["lm_head"]}
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\]"):
        adapters.read(saved(HiFICLConfig(task_type="CAUSAL_LM", **more)))
    with pytest.raises(ValueError, match=r"trainable_token_indices=\[3\]"):
        adapters.read(saved(HiFICLConfig(task_type="CAUSAL_LM", trainable_token_indices=[3])))
    with pytest.raises(ValueError, match="adapter_config.json"):
        adapters.read(tmp_path)


def attention_layer(**attributes: Any) -> Any:
    """A layer of vLLM that can be adapted, but for these attributes; those of "impl_" are its implementation's."""
    impl = {"logits_soft_cap": 0, "alibi_slopes": None}
    impl |= {k.removeprefix("impl_"): v for k, v in attributes.items() if k.startswith("impl_")}
    layer = loader.Attention.__new__(loader.Attention)
    nn.Module.__init__(layer)
    plain = {
        "attn_backend": cpu.HiFICLCPUBackend, "attn_type": "decoder", "kv_cache_dtype": "auto", "has_sink": False,
        "use_mm_prefix": False, "head_size": 32, "head_size_v": 32, "impl": SimpleNamespace(**impl),
    }  # fmt: skip
    vars(layer).update(plain | {k: v for k, v in attributes.items() if not k.startswith("impl_")})
    return layer


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"attn_backend": CPUAttentionBackend}, "CPUAttentionBackend, not HiFICL's.*--attention-backend CUSTOM"),
        ({"attn_backend": type("Chunked", (cpu.HiFICLCPUBackend,), {})}, "Chunked, not HiFICL's"),
        ({"attn_type": "encoder_only"}, "attn_type='encoder_only'"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype='fp8_e5m2'.*--kv-cache-dtype auto"),
        ({"impl_logits_soft_cap": 30.0}, "logits_soft_cap=30.0"),
        ({"impl_alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"has_sink": True}, "attention sinks"),
        ({"use_mm_prefix": True}, "bidirectional attention of images"),
        ({"head_size_v": 16}, "head_size_v=16, head_size=32"),
        ({"impl_fa4_hd256": True}, "FlashAttention 4"),
    ],
)  # fmt: skip
def test_refused_layers(attributes: dict[str, Any], message: str) -> None:
    assert loader.why_unsupported(attention_layer()) is None
    reason = loader.why_unsupported(attention_layer(**attributes))
    assert reason is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(reason)


def test_refused_kinds_of_layers_and_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    class Latent(loader.Attention):
        pass

    layer = attention_layer()
    layer.__class__ = Latent
    assert "Latent, not vLLM's Attention" in str(loader.why_unsupported(layer))
    monkeypatch.setattr(loader, "backend_path", lambda: None)
    assert "no backend for" in str(loader.why_unsupported(attention_layer()))


def test_nothing_is_attached_after_an_error() -> None:
    layer = attention_layer(num_heads=4, num_kv_heads=2)
    model = nn.ModuleDict({"a": nn.ModuleDict({"attn": layer})})
    pairs = adapters.Adapter(HiFICLConfig(n=2, r=2), {"a": {}, "b": {}})
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            get_total_num_kv_heads=lambda: 2, hf_text_config=SimpleNamespace(num_hidden_layers=2)
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "get_tensor_model_parallel_rank", lambda: 0)
        patch.setattr(loader, "get_tensor_model_parallel_world_size", lambda: 1)
        patch.setattr(loader, "pairs_on", lambda *_: VirtualPairs(torch.ones(1, 4, 2, 32), torch.ones(1, 4, 2, 32)))
        with pytest.raises(ValueError, match="of 'b', where vLLM's model has 0"):
            loader.attach(model, pairs, config)
        assert not hasattr(layer, MODULE)
        layer.kv_sharing_target_layer_name = "other"
        with pytest.raises(ValueError, match=r"'a.attn' uses another layer's cache"):
            loader.attach(model, pairs, config)


# -- the attention of one layer ---------------------------------------------------------------------------------------


def test_registered() -> None:
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "hificl"]
    assert entry.value == "peft_hificl_vllm:register"
    plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is cpu.HiFICLCPUBackend
    assert AttentionBackendEnum.CPU_ATTN.get_class() is cpu.HiFICLCPUBackend  # the only one that a CPU takes
    assert flash.HiFICLFlashBackend.get_name() in AttentionBackendEnum.__members__  # vLLM looks it up
    assert flash.HiFICLFlashBackend.get_impl_cls() is flash.HiFICLFlashImpl


def test_docstrings() -> None:
    assert doctest.testmod(flash) == (0, 1)


def standin(window: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """FlashAttention's definition, a loop per request, head and token; its arguments are those of the real function."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "vllm_flash_attn", "flash_attn_interface.py").read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    (real,) = [node for node in functions if node.name == "flash_attn_varlen_func"]
    known = {argument.arg for argument in real.args.args}

    def call(**given: Any) -> tuple[Tensor, Tensor]:
        assert set(given) <= known
        assert given["causal"] is True and given["return_softmax_lse"] is True
        assert given["window_size"] == ([window - 1, 0] if window else [-1, -1])
        q, starts = given["q"], given["cu_seqlens_q"].tolist()
        out, lse = given["out"], torch.empty(q.shape[1], q.shape[0])
        for request, size in enumerate(given["seqused_k"].tolist()):
            blocks = given["block_table"][request]
            keys, values = (given[name][blocks].flatten(0, 1)[:size] for name in "kv")  # (S, G, d)
            groups = q.shape[1] // keys.shape[1]
            for token in range(starts[request], starts[request + 1]):
                last = size - (starts[request + 1] - token)
                seen = slice(max(last - window + 1, 0) if window else 0, last + 1)
                for head in range(q.shape[1]):
                    scores = given["softmax_scale"] * keys[seen, head // groups] @ q[token, head]
                    lse[head, token] = scores.logsumexp(0)
                    out[token, head] = scores.softmax(0) @ values[seen, head // groups]
        return out, lse

    return call


CASES: dict[str, dict[str, Any]] = {
    "mha": {"groups": 4},
    "gqa": {},
    "mqa": {"groups": 1},
    "a window": {"window": 4},
    "no first token": {"skip_first_token": True},
    "weights": {"weights": True, "skip_first_token": True},
    "alpha = 1": {"scale_self_attention": False, "weights": True},
    "pairs of the cache's heads": {"pair_heads": 2, "weights": True},
}


@pytest.mark.parametrize("kind", ["cpu", "flash"])
@pytest.mark.parametrize("case", CASES)
def test_attention_of_a_batch(kind: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts, pieces of prompts and next tokens in one batch, on scattered blocks, against the definition."""
    options = {"groups": 2, "window": 0, "weights": False, "pair_heads": 4, **CASES[case]}
    groups, window, heads, dim, size = options["groups"], options["window"], 4, 8, 4
    torch.manual_seed(0)
    lengths, new = [5, 11, 6, 1], [5, 4, 1, 1]  # tokens of each request, and how many of them are in this batch
    pairs = VirtualPairs(
        torch.randn(1, options["pair_heads"], 3, dim), torch.randn(1, options["pair_heads"], 3, dim),
        torch.randn(1, heads, 3) if options["weights"] else None,
        options.get("scale_self_attention", True), options.get("skip_first_token", False),
    )  # fmt: skip
    keys, values = ([torch.randn(length, groups, dim) for length in lengths] for _ in range(2))
    query = torch.randn(sum(new) + 2, heads, dim)  # the last two are padding
    cache = torch.full((12, groups, size, 2 * dim), 9.0)
    table = torch.randperm(12).reshape(4, 3)
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    common: dict[str, Any] = {
        "num_actual_tokens": sum(new), "max_query_len": max(new), "query_start_loc": starts,
        "max_seq_len": max(lengths), "seq_lens": torch.tensor(lengths, dtype=torch.int32), "block_table": table,
        "slot_mapping": torch.zeros(sum(new), dtype=torch.long), "scheduler_metadata": None,
    }  # fmt: skip
    layer = nn.Module()
    setattr(layer, MODULE, adapters.Pairs(pairs))
    save(tmp_path, tf.LlamaConfig(**SIZES))
    kinds: dict[str, Any] = {
        "cpu": (cpu.HiFICLCPUImpl, CPUAttentionMetadata), "flash": (flash.HiFICLFlashImpl, FlashAttentionMetadata),
    }  # fmt: skip
    implementation, metadata = kinds[kind]
    with set_current_vllm_config(engine_config(tmp_path)):
        impl = implementation(heads, dim, dim**-0.5, groups, None, window or None, "auto")
    for request, length in enumerate(lengths):
        slots = table[request, torch.arange(length) // size] * size + torch.arange(length) % size
        if kind == "cpu":
            padding = torch.tensor([-1])
            slots = torch.cat([slots, padding])
            filled = [torch.cat([each[request], torch.randn(2, groups, dim)]) for each in (keys, values)]
            impl.do_kv_cache_update(layer, *filled, cache, slots)
        else:
            cache[slots // size, :, slots % size] = torch.cat([keys[request], values[request]], dim=-1)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", standin(window), raising=False)
    monkeypatch.setattr(flash, "_TOKENS", 3)  # several parts
    output = torch.full_like(query, 7.0)
    impl.forward(layer, query, None, None, cache, metadata(**common), output)

    for request, length in enumerate(lengths):
        begin, count = int(starts[request]), new[request]
        position = torch.arange(length - count, length)[:, None]
        distance = position - torch.arange(length)
        visible = (distance >= 0) & (distance < (window or math.inf))
        wanted, _ = oracle.hificl(
            query[begin : begin + count].transpose(0, 1)[None].double(),
            *(each[request].transpose(0, 1)[None].double() for each in (keys, values)),
            *(t.repeat_interleave(heads // t.shape[1], dim=1).double() for t in pairs[:2]),
            dim**-0.5,
            mask=visible[None, None],
            log_weights=None if pairs.log_weights is None else pairs.log_weights.double(),
            alpha_one=not pairs.scale_self_attention,
            skip_first_token=pairs.skip_first_token,
        )
        found = output[begin : begin + count].transpose(0, 1)[None].double()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (output[sum(new) :] == 7).all()


@pytest.mark.parametrize("kind", ["cpu", "flash"])
def test_batches_that_are_not_causal(kind: str, tmp_path: Path) -> None:
    save(tmp_path, tf.LlamaConfig(**SIZES))
    layer = nn.Module()
    setattr(layer, MODULE, adapters.Pairs(VirtualPairs(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8))))
    implementation: Any = {"cpu": cpu.HiFICLCPUImpl, "flash": flash.HiFICLFlashImpl}[kind]
    with set_current_vllm_config(engine_config(tmp_path)):
        impl = implementation(4, 8, 1.0, 4, None, None, "auto")
    batch: Any = SimpleNamespace(causal=False, dynamic_causal=None, mm_prefix_query_range_tensor=None)
    with pytest.raises(ValueError, match="causal batches"):
        impl.forward(layer, None, None, None, None, batch, None)
