"""An adapter as a cache of the bare base model, and as a stock prefix-tuning adapter: the same outputs, or refused."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from peft_hificl import HiFICLLayer, prefix, to_prefix_cache, to_prefix_tuning

from . import architectures
from .architectures import FAMILIES, Family
from .helpers import PREFIX_TUNING_GENERATES, TOLERANCE, VOCAB, build, config, inputs_for, llama, logits, unchanged
from .zoo import each

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(kv_heads=2),
    "llama-mqa": lambda: llama(kv_heads=1),
    "llama-mha": lambda: llama(kv_heads=4),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, num_key_value_heads=2)),  # normalises its keys
}


def base_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def adapt(base: PreTrainedModel, name: str = "default", seed: int = 1, **kwargs: object) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(base, config(**{"heads": "kv", **kwargs}), adapter_name=name).eval()


def padded(rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """A batch whose first row has two columns of padding on the left."""
    ids = inputs_for("gqa", rows, length)["input_ids"]
    ids[0, :2] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def with_prefix(inputs: dict[str, Tensor], cache: DynamicCache) -> dict[str, object]:
    """The inputs for `generate` of the bare model."""
    mask = inputs["attention_mask"]
    ones = mask.new_ones(len(mask), cache.get_seq_length())
    return {**inputs, "attention_mask": torch.cat([ones, mask], dim=1), "past_key_values": copy.deepcopy(cache)}


def with_positions(inputs: dict[str, object], n: int) -> dict[str, object]:
    """The inputs for a forward of the bare model."""
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1)[:, n:]}


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_bare_model_gives_the_same_logits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """transformers computes angles in float32 whatever the model's dtype."""
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    base = base_of(name).to(dtype)
    monkeypatch.setattr(type(base.model.rotary_emb), "forward", exact)
    model = adapt(base).to(dtype)
    inputs = padded()
    want, cache = logits(model, **inputs), to_prefix_cache(model, batch_size=2)
    bare = base_of(name).to(dtype)
    assert cache.layers[0].keys.dtype == dtype and cache.get_seq_length() == 3
    got = logits(bare, **with_positions(with_prefix(inputs, cache), 3))
    visible, scale = inputs["attention_mask"].bool(), want.abs().max()
    assert ((got - want)[visible].abs().max() / scale) < TOLERANCE[dtype]
    assert ((logits(bare, **inputs) - want)[visible].abs().max() / scale) > 0.1  # without it, they differ


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 3, "num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_bare_model_generates_the_same(name: str, options: dict[str, int]) -> None:
    model, inputs = adapt(base_of(name)), padded()
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    want = model.generate(**inputs, **options)
    cache = to_prefix_cache(model, batch_size=2 * options.get("num_beams", 1))
    bare = base_of(name)
    assert torch.equal(bare.generate(**with_prefix(inputs, cache), **options), want)
    assert not torch.equal(bare.generate(**inputs, **options), want)


def test_pairs_per_query_head_where_each_has_its_own_key() -> None:
    model, inputs = adapt(base_of("llama-mha"), heads="query"), padded()
    cache = to_prefix_cache(model, batch_size=2)
    got = logits(base_of("llama-mha"), **with_positions(with_prefix(inputs, cache), 3))[:, 2:]
    torch.testing.assert_close(got, logits(model, **inputs)[:, 2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{"factorize_keys": False}, {"factorize_values": False}, {"n": 1, "r": 1}], ids=str)
def test_every_form_of_pairs(kwargs: dict[str, object]) -> None:
    model, inputs = adapt(base_of("llama"), **kwargs), inputs_for("gqa")
    got = logits(base_of("llama"), **inputs, past_key_values=to_prefix_cache(model, batch_size=2))
    torch.testing.assert_close(got, logits(model, **inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_every_implementation(implementation: str) -> None:
    model, inputs = adapt(base_of("llama")), padded()
    want, cache = logits(model, **inputs), to_prefix_cache(model, batch_size=2)
    bare = base_of("llama")
    bare.set_attn_implementation(implementation)
    got = logits(bare, **with_positions(with_prefix(inputs, cache), 3))
    torch.testing.assert_close(got[inputs["attention_mask"].bool()], want[inputs["attention_mask"].bool()])


def test_bfloat16() -> None:
    model, inputs = adapt(base_of("llama").to(torch.bfloat16)), inputs_for("gqa")
    cache = to_prefix_cache(model, batch_size=2)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    want, bare = logits(model, **inputs).float(), base_of("llama").to(torch.bfloat16)
    got = logits(bare, **inputs, past_key_values=cache).float()
    assert (got - want).abs().max() / want.abs().max() < 0.02


def test_a_named_adapter_and_a_union() -> None:
    model, inputs = adapt(base_of("llama"), name="a"), inputs_for("gqa")
    torch.manual_seed(7)
    model.add_adapter("b", config(n=2, heads="kv"))
    bare = base_of("llama")
    for active, asked in ((["a"], None), (["b"], None), (["a", "b"], None), (["a"], "b")):
        model.base_model.set_adapter([asked] if asked else active)
        want = logits(model, **inputs)
        model.base_model.set_adapter(active)
        got = logits(bare, **inputs, past_key_values=to_prefix_cache(model, asked, batch_size=2))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert model.active_adapters == active


def test_a_model_with_an_adapter_of_transformers_own() -> None:
    model, inputs = base_of("llama"), inputs_for("gqa")
    torch.manual_seed(1)
    model.add_adapter(config(heads="kv"))
    got = logits(base_of("llama"), **inputs, past_key_values=to_prefix_cache(model, batch_size=2))
    torch.testing.assert_close(got, logits(model, **inputs), rtol=1e-4, atol=1e-4)


def test_the_model_stays_as_it_was() -> None:
    model = adapt(base_of("llama"))
    model.train()
    state = {name: (module.training, len(module._forward_pre_hooks)) for name, module in model.named_modules()}
    with unchanged(model):
        cache = to_prefix_cache(model)
    assert {name: (m.training, len(m._forward_pre_hooks)) for name, m in model.named_modules()} == state
    assert not cache.layers[0].keys.requires_grad


def test_a_disabled_adapter_can_be_named() -> None:
    model = adapt(base_of("llama"))
    want = to_prefix_cache(model).layers[1].keys
    with model.disable_adapter():
        assert torch.equal(to_prefix_cache(model, "default").layers[1].keys, want)
        with pytest.raises(ValueError, match="There is no active HiFICL adapter of a strength above 0 on this model"):
            to_prefix_cache(model)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_scaled_rotary_embeddings(rope: dict[str, object]) -> None:
    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        return llama(rope_parameters={"rope_theta": 1e4, **rope}).eval()

    model, inputs = adapt(make()), padded()
    got = logits(make(), **with_positions(with_prefix(inputs, to_prefix_cache(model, batch_size=2)), 3))
    visible = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[visible], logits(model, **inputs)[visible], rtol=1e-4, atol=1e-4)


EXACT = {
    "llama", "qwen2", "qwen3", "gemma", "cohere", "glm", "gpt_neox", "granite", "mixtral", "olmo2", "phi", "qwen3_moe",
    "smollm3", "stablelm", "idefics3", "internvl", "llava", "llava_onevision", "smolvlm", "qwen2_audio",
}  # fmt: skip


@pytest.mark.parametrize("form", ["cache", "prefix-tuning"])
@each(tuple(f for f in FAMILIES if f.generates))
def test_every_architecture_is_exact_or_refused(family: Family, form: str, tmp_path: Path) -> None:
    base = architectures.build(family)
    model, inputs = adapt(base), family.inputs()
    try:
        cache = to_prefix_cache(model, batch_size=2)
        if form == "prefix-tuning":
            to_prefix_tuning(model, tmp_path)
    except ValueError as error:
        assert "cannot be handed over as a prefix" in str(error) and family.name not in EXACT, error
        return
    visible = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = base(**inputs)[0]
        bare = model.unload()
        if form == "prefix-tuning":
            bare = PeftModel.from_pretrained(bare, tmp_path)
            given = with_positions(family.inputs(), 0)
        else:
            given = with_positions(with_prefix(family.inputs(), cache), 3)
        got = bare(**given)[0]
    error = (got - want)[visible] if want.shape[:2] == visible.shape else (got - want)[:, -1]
    assert error.abs().max() < 1e-5 * max(1.0, float(want.abs().max()))


# -- prefix tuning ----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, inputs, outputs = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
inputs = torch.load(inputs)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
with torch.no_grad():
    logits = model(**inputs, position_ids=positions).logits
assert "peft_hificl" not in sys.modules and model.peft_config["default"].peft_type == "PREFIX_TUNING"
torch.save((tokens, logits), outputs)
"""


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_prefix_tuning_in_a_process_without_this_package(name: str, tmp_path: Path) -> None:
    base = base_of(name)
    base.save_pretrained(tmp_path / "base")
    model, inputs = adapt(base), padded()
    to_prefix_tuning(model, tmp_path / "adapter")
    torch.save(inputs, tmp_path / "inputs.pt")
    places = [str(tmp_path / each) for each in ("base", "adapter", "inputs.pt", "outputs.pt")]
    subprocess.run([sys.executable, "-c", SCRIPT, *places], check=True, cwd=tmp_path)
    tokens, got = torch.load(tmp_path / "outputs.pt")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, expected) == PREFIX_TUNING_GENERATES
    visible = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[visible], logits(model, **inputs)[visible], rtol=1e-4, atol=1e-4)


def test_heads_that_peft_lays_out_in_another_way(tmp_path: Path) -> None:
    """PEFT reads the heads of a prefix from the configuration, here a wrong one."""
    model = adapt(base_of("llama"))
    model.get_base_model().config.num_key_value_heads = 1
    to_prefix_cache(model)
    with pytest.raises(ValueError, match=r"PEFT would lay its prefix out in another way for Llama.*use to_p"):
        to_prefix_tuning(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_keys_and_values_of_different_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 8))]
    monkeypatch.setattr(prefix, "_prefix", lambda *arguments: pairs)
    with pytest.raises(ValueError, match=r"have 2 shapes, \[\(2, 3, 8\), \(2, 3, 16\)\]. Remedy: use to_prefix_cache"):
        to_prefix_tuning(adapt(base_of("llama")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- what is refused --------------------------------------------------------------------------------------------------


def gpt2() -> PreTrainedModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128))


def rope(**parameters: object) -> PreTrainedModel:
    return llama(rope_parameters={"rope_theta": 1e4, **parameters})


def scaled_by_position() -> PreTrainedModel:
    """Queries are multiplied by a factor that grows at position 50."""
    parameters = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 50,
        "llama_4_scaling_beta": 0.5,
    }  # fmt: skip
    return tf.Ministral3ForCausalLM(
        tf.Ministral3Config(**SIZES, num_key_value_heads=2, sliding_window=None, rope_parameters=parameters)
    )


def lora_beside() -> PeftModel:
    base = base_of("llama")
    base.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    return adapt(base)


def partly_covered() -> PeftModel:
    model = adapt(base_of("llama"))
    model.add_adapter("more", config(heads="kv", layers_to_transform=[1]))
    model.base_model.set_adapter(["default", "more"])
    return model


def with_one_weight() -> PeftModel:
    model = adapt(base_of("llama"), pair_weights=True, init_weights=True)
    to_prefix_cache(model)  # as long as they are zero, there is nothing to leave out
    layer = next(m for m in model.modules() if isinstance(m, HiFICLLayer))
    nn.init.ones_(layer.hificl_W["default"].weight)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "query-heads": (
        lambda: adapt(base_of("llama"), heads="query"),
        "'model.layers.0.self_attn' has pairs for 4 query heads, but a cache holds those of its 2 key/value heads. "
        'Remedy: train with HiFICLConfig(heads="kv")',
    ),
    "skipped": (
        lambda: adapt(base_of("llama"), skip_first_token=True), "does not see its pairs (skip_first_token=True)"
    ),
    "alpha-1": (lambda: adapt(base_of("llama"), scale_self_attention=False), "scale_self_attention=False (alpha = 1)"),
    "log-weights": (with_one_weight, "the pairs of 'model.layers.0.self_attn' have log-weights"),
    "a-layer": (
        lambda: adapt(base_of("llama"), layers_to_transform=[0]),
        "it is on 1 attentions ('model.layers.0.self_attn', ...), not on one for each of the 2",
    ),
    "tower": (
        lambda: adapt(build("vlm"), target_modules=["self_attn"]),
        "it is on 4 attentions ('model.vision_tower.encoder.layers.0.self_attn', ...), not on one for each of the 2",
    ),
    "unequal": (partly_covered, "its layers have [3, 6] pairs"),
    "whole-modules": (
        lambda: adapt(base_of("llama"), modules_to_save=["lm_head"]),
        "'default' has trained more than pairs (modules_to_save)",
    ),
    "tokens": (
        lambda: adapt(base_of("llama"), trainable_token_indices=[5]),
        "'default' has trained more than pairs (trainable_token_indices)",
    ),
    "lora": (lora_beside, "Linear is active at 'model.layers.0.self_attn.q_proj'"),
    "window": (
        lambda: adapt(tf.MistralForCausalLM(tf.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4))),
        "layer 0 of MistralForCausalLM caches in a DynamicSlidingWindowLayer",
    ),
    "learned-positions": (lambda: adapt(gpt2()), "the scores of 'transformer.h.0.attn' change when all tokens move by"),
    "dynamic-rope": (lambda: adapt(rope(rope_type="dynamic", factor=2.0)), "its rotary embedding (dynamic)"),
    "scaled-queries": (
        lambda: adapt(scaled_by_position()), "the scores of 'model.layers.0.self_attn' change when all tokens move by 3"
    ),
    "encoder": (
        lambda: get_peft_model(
            tf.BertModel(tf.BertConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                       num_attention_heads=4)), config(heads="kv")
        ),
        "BertModel is not a decoder that generates with a cache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=re.escape(message)):
        to_prefix_cache(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        to_prefix_tuning(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("family", "message"), [
    ("doge", "treats entries of its cache in another way than virtual pairs"),  # computes its mask from values
    ("paligemma", "takes token_type_ids, which may change what a token sees"),
    ("qwen2_vl", r"its rotary embedding \(mrope_section\)"),
    ("deepseek_v3", "does not hold the keys and values of"),
    ("idefics", "does not run on tokens alone"),
    ("falcon_h1", "caches in a LinearAttentionAndFullAttentionLayer"),
])  # fmt: skip
def test_architectures_that_are_refused(family: str, message: str) -> None:
    model = adapt(architectures.build(next(f for f in FAMILIES if f.name == family)))
    with pytest.raises(ValueError, match=message):
        to_prefix_cache(model)


def test_no_such_adapter() -> None:
    model = adapt(base_of("llama"))
    with pytest.raises(ValueError, match="There is no HiFICL adapter 'other' of a strength above 0 on this model"):
        to_prefix_cache(model, "other")
    with pytest.raises(ValueError, match="There is no active HiFICL adapter of a strength above 0 on this model"):
        to_prefix_tuning(build("gqa"), "nowhere")


def test_an_offloaded_adapter_is_refused() -> None:
    model = adapt(base_of("llama"))
    next(m for m in model.modules() if isinstance(m, HiFICLLayer)).to("meta")
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn' is offloaded by accelerate"):
        to_prefix_cache(model)
