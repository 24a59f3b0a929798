"""Small models, inputs and adapters that the tests share, built offline from configuration classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
import transformers as tf
from datasets import Dataset
from packaging.version import Version
from peft import (
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from peft_hificl import (
    HiFICLConfig,
    HiFICLLayer,
    VirtualPairs,
)

VOCAB = 99
IMAGE = 98  # the id that stands for one image patch


def llama(kv_heads: int = 2, layers: int = 2, vocab_size: int = VOCAB, **kwargs: object) -> tf.PreTrainedModel:
    config = tf.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=128, initializer_range=0.2,
        pad_token_id=0, bos_token_id=None, eos_token_id=None, **kwargs,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def llava() -> tf.PreTrainedModel:
    vision = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = tf.Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "gqa": llama,
    "mha": lambda: llama(kv_heads=4),
    "vlm": llava,
}


def build(kind: str) -> tf.PreTrainedModel:
    """The same model, with the same weights, at every call."""
    torch.manual_seed(0)
    return BUILDERS[kind]().eval()


def inputs_for(kind: str, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB - 2, (rows, length), generator=generator)
    if kind != "vlm":
        return {"input_ids": ids}
    ids[:, 1:5] = IMAGE  # 4 patches
    return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}


@torch.no_grad()
def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


def config(**kwargs: object) -> HiFICLConfig:
    """All factors random, so that every adapter has an effect; no task type: one config for all three models."""
    return HiFICLConfig(**{"n": 3, "r": 2, "init_weights": False, **kwargs})


def adapted(kind: str, seed: int = 1, name: str = "default", **kwargs: object) -> PeftModel:
    model = build(kind)
    torch.manual_seed(seed)
    return get_peft_model(model, config(**kwargs), adapter_name=name).eval()


def hificl_layers(model: nn.Module) -> list[HiFICLLayer]:
    return [m for m in model.modules() if isinstance(m, HiFICLLayer)]


def pairs_for(layer: HiFICLLayer, rows: int = 1) -> VirtualPairs:
    """What a layer gives an attention call over so many rows."""
    return layer(*[torch.empty(rows, 0)] * 3)


def train(model: nn.Module, kind: str, steps: int = 2) -> list[float]:
    inputs = inputs_for(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Structure, parameters, configuration objects, trainability and output are the same afterwards."""

    def state() -> tuple[object, ...]:
        return (
            [(name, type(m), id(getattr(m, "config", None))) for name, m in model.named_modules()],
            [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
            sorted(getattr(model, "peft_config", {})),
        )

    before, output = state(), logits(model, **inputs_for("gqa"))
    yield
    assert state() == before
    assert torch.equal(logits(model, **inputs_for("gqa")), output)


def picture_data(rows: int = 16) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 90, (rows, 9), generator=generator)
    ids[:, 1:5] = IMAGE
    labels = ids.clone()
    labels[:, :7] = -100  # the answer alone
    pictures = torch.randn(rows, 3, 8, 8, generator=generator)
    data = Dataset.from_dict({"input_ids": ids, "labels": labels, "pixel_values": pictures})
    return data.with_format("torch")


def trainer(folder: Path, model: PeftModel, **kwargs: object) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=5e-3, lr_scheduler_type="cosine",
        warmup_steps=1, weight_decay=1e-3, max_grad_norm=1.0, logging_steps=1, report_to=[], seed=0,
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        **{"save_strategy": "no", "num_train_epochs": 2, **kwargs},
    )  # fmt: skip
    return Trainer(model, args, train_dataset=picture_data(), eval_dataset=picture_data(8))


def fresh() -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(build("vlm"), HiFICLConfig(n=4, r=4))


def adapter_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "hificl_" in name}


GROUPS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
MASKS = ("none", "causal", "padded", "window", "additive", "per-head")
# PEFT 0.21 hands `generate` a prefix by the cache's name of before transformers 5.24, where it is lost.
PREFIX_TUNING_GENERATES = Version(tf.__version__) < Version("5.24") or Version(peft.__version__) >= Version("0.22")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def tensors(
    heads: int, groups: int, length: int, size: int, d: int, e: int, n: int, batch: int = 2
) -> dict[str, Tensor]:
    return {
        "query": torch.randn(batch, heads, length, d, dtype=torch.float64),
        "key": torch.randn(batch, groups, size, d, dtype=torch.float64),
        "value": torch.randn(batch, groups, size, e, dtype=torch.float64),
        "virtual_keys": torch.randn(1, heads, n, d, dtype=torch.float64),
        "virtual_values": torch.randn(1, heads, n, e, dtype=torch.float64),
    }


def mask_of(kind: str, length: int, size: int, heads: int, batch: int = 2) -> Tensor | None:
    causal = torch.ones(length, size, dtype=torch.bool).tril(size - length)[None, None]
    if kind == "none":
        return None
    if kind == "causal":
        return causal
    if kind == "padded":  # left padding: row 1 misses its first keys; its first queries see nothing at all
        mask = causal.repeat(batch, 1, 1, 1)
        mask[1, ..., : size // 2] = False
        return mask
    if kind == "window":
        return causal & ~causal.tril(size - length - 2)
    if kind == "additive":
        return torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    return torch.randn(batch, heads, length, size, dtype=torch.float64)  # additive, one per head


def gpt_oss() -> tf.PreTrainedModel:  # attention sinks, sliding and full layers
    return tf.GptOssForCausalLM(
        tf.GptOssConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=4,
            initializer_range=0.2, pad_token_id=0, attn_implementation="eager",
        )
    )  # fmt: skip


def gemma2() -> tf.PreTrainedModel:  # soft-cap, sliding and full layers, head_dim != hidden / heads
    return tf.Gemma2ForCausalLM(
        tf.Gemma2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=16, attn_logit_softcapping=0.5, sliding_window=4, initializer_range=0.2,
            pad_token_id=0, attn_implementation="eager",
        )
    )  # fmt: skip


def changed(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Change the first V_A of a stored adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "V_A" in key)
    tensors[key] = change(tensors[key])
    save_file(tensors, path)


def of_each_query(output: Tensor, sinks: Tensor, direction: Tensor) -> Tensor:
    """(B T, H), what each query adds to the gradient of the sinks."""
    rows, _, length, _ = output.shape
    one = torch.eye(rows * length, dtype=output.dtype).view(-1, rows, 1, length, 1)
    (terms,) = torch.autograd.grad(output, sinks, one * direction, retain_graph=True, is_grads_batched=True)
    return terms
