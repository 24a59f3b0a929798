"""The adapter inside real models: implementations, masks, caches, generation, compilation, threads."""

from __future__ import annotations

import contextlib
import functools
import types

import pytest
import torch
import transformers as tf
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers import AttentionInterface

from peft_hificl import HiFICLConfig, backends, interface, support

from . import oracle
from .helpers import VOCAB, adapted, build, config, gemma2, gpt_oss, hificl_layers, inputs_for, llama, logits, pairs_for


def t5() -> tf.PreTrainedModel:  # position bias
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
            initializer_factor=1.0,
        )
    )  # fmt: skip


def deepseek() -> tf.PreTrainedModel:  # value head dim != key head dim
    return tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
            topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8,
            first_k_dense_replace=2, initializer_range=0.2, pad_token_id=0,
        )
    )  # fmt: skip


ODD = {"sinks": gpt_oss, "softcap": gemma2, "position-bias": t5, "value-dim": deepseek, "mqa": lambda: llama(1)}


@pytest.mark.parametrize("case", ODD)
def test_every_call_inside_a_model_equals_the_definition(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model hands to its attention, recomputed head by head from the formula, in float64."""
    torch.manual_seed(0)
    base = ODD[case]().eval()
    if case == "position-bias" and support.why_unsupported(base.decoder.block[0].layer[0].SelfAttention):
        pytest.skip("T5 does not dispatch in this transformers")
    model = get_peft_model(base, config())
    calls = 0

    def recorded(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: object):
        nonlocal calls
        calls += 1
        output, weights = interface.hificl_attention_forward(module, q, k, v, mask, **kwargs)
        if mask is None and q.shape[2] > 1 and getattr(module, "is_causal", True):
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None]
        pairs = pairs_for(module.virtual_pairs, len(q))
        scaling = kwargs["scaling"]
        want, alpha = oracle.hificl(
            *(t.double() for t in (q, k, v, pairs.keys, pairs.values)),
            scaling=q.shape[-1] ** -0.5 if scaling is None else scaling,
            mask=mask if mask is None or mask.dtype == torch.bool else mask.double(),
            bias=kwargs.get("position_bias"), softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"),
        )  # fmt: skip
        torch.testing.assert_close(output.double(), want.transpose(1, 2), rtol=1e-4, atol=1e-5)
        if kwargs.get("s_aux") is None and weights is not None:
            torch.testing.assert_close(weights.sum(-1).double(), alpha, rtol=1e-4, atol=1e-5)
        return output, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "hificl", recorded)
    inputs = inputs_for("gqa", length=7)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if case == "position-bias":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    else:
        inputs["attention_mask"][1, :2] = 0
    with torch.no_grad():
        model(**inputs)
        assert calls == 2
        model.generate(**inputs_for("gqa"), max_new_tokens=3, do_sample=False, pad_token_id=0)  # queries of length 1
    assert calls == 2 + 2 * 3


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_implementations_agree_and_switch_live(kind: str, padded: bool) -> None:
    model, inputs = adapted(kind), inputs_for(kind)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    start = 0
    if padded and kind != "vlm":
        start = 3
        inputs["attention_mask"][:, :start] = 0
    want = logits(model, **inputs)[:, start:]
    for implementation in ("eager", "flex_attention", "sdpa"):
        model.get_base_model().set_attn_implementation(implementation)
        torch.testing.assert_close(logits(model, **inputs)[:, start:], want, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, **inputs)[:, start:], want)


def test_the_implementation_is_never_the_base_models_business() -> None:
    base = build("gqa")
    model = get_peft_model(base, config())
    assert base.config._attn_implementation == "sdpa"
    assert base.model.layers[0].self_attn.config._attn_implementation == "hificl"
    assert "hificl" not in base.config.to_json_string()
    model.unload()
    assert base.model.layers[0].self_attn.config is base.config


def test_a_later_change_of_the_configuration_is_not_seen() -> None:
    """The implementation apart, which is looked up in the model's own."""
    base = build("gqa")
    attention = base.model.layers[0].self_attn
    assert attention.config is base.config
    get_peft_model(base, config())
    base.config.hidden_size += 1
    assert attention.config.hidden_size == base.config.hidden_size - 1


def test_an_unsupported_implementation_is_refused() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*cannot be loaded"):
        interface.hificl_attention_forward(
            model.base_model.model.model.layers[0].self_attn, *torch.randn(3, 1, 4, 5, 16), None
        )
    base = build("gqa")
    want = logits(base, **inputs)
    base.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises((TypeError, ValueError), match="flash_attention_2.*cannot be loaded"):
        get_peft_model(base, config())
    base.config._attn_implementation_internal = "sdpa"
    assert torch.equal(logits(base, **inputs), want)


def test_an_unknown_cache_is_refused() -> None:
    module = adapted("mha").get_base_model().model.layers[0].self_attn
    with pytest.raises(ValueError, match="does not know the cache.*LlamaAttention.*object"):
        interface.hificl_attention_forward(module, *torch.randn(3, 1, 4, 5, 16), None, cache=object())


def test_row_by_row_adapters_need_a_peft_model() -> None:
    """transformers' own add_adapter has nobody to hand the names to each row: never the active adapter in silence."""
    model, inputs = build("gqa"), inputs_for("gqa")
    model.add_adapter(config(), "a")
    with pytest.raises(ValueError, match="adapter_names needs a PeftModel"):
        model(**inputs, adapter_names=["a", "__base__"])


def test_a_forward_that_was_replaced_is_refused() -> None:
    """On the instance, or on the class after HiFICL has read it: it might not come by the adapter."""
    base = build("gqa")
    module = base.model.layers[1].self_attn
    module.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn.*forward has been replaced"):
        get_peft_model(base, config())
    with pytest.raises(TypeError, match=r"'model\.layers\.1\.self_attn'.*forward has been replaced"):
        get_peft_model(base, config(target_modules=["self_attn"]))
    for choice in ({"exclude_modules": ["layers.1.self_attn"]}, {"layers_to_transform": [0]}):  # left out on purpose
        assert get_peft_model(base, config(**choice)).unload() is base
    add_hook_to_module(module, ModelHook())
    module._old_forward = types.MethodType(type(module).forward, module)
    assert "forward has been replaced" not in str(support.why_unsupported(module))  # accelerate's own
    module.forward = types.MethodType(lambda self, hidden_states, **kwargs: (hidden_states, None), module)
    assert "forward has been replaced" in str(support.why_unsupported(module))
    original = type(module).forward

    def ignores_it(self: nn.Module, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        return hidden_states, None

    with pytest.MonkeyPatch.context() as patch:
        for replacement in (ignores_it, functools.wraps(original)(ignores_it)):
            get_peft_model(build("gqa"), config())
            patch.setattr(type(module), "forward", replacement)
            with pytest.raises(ValueError, match="LlamaAttention"):
                get_peft_model(build("gqa"), config())
            patch.undo()
    get_peft_model(build("gqa"), config())


def test_without_adapters_the_module_runs_as_the_base_models() -> None:
    """Whatever its implementation is then, and with every argument that it was given."""
    model = build("gqa")
    model.add_adapter(config(), "a")
    module = model.model.layers[0].self_attn
    query, key, value = torch.randn(3, 1, 4, 5, 16)
    model.delete_adapter("a")
    got, _ = interface.hificl_attention_forward(module, query, key, value, None, is_causal=False)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(got, want.transpose(1, 2))
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "flash_attention_2", lambda *args, **kwargs: ("flash", None))
        assert interface.hificl_attention_forward(module, query, key, value, None) == ("flash", None)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_a_cache_longer_than_what_is_visible(implementation: str) -> None:
    """A static cache hands over more keys than queries; what transformers' own function ignores is ignored here."""
    model = adapted("gqa")
    model.get_base_model().set_attn_implementation(implementation)
    module = model.get_base_model().model.layers[0].self_attn
    query, key, value = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    bias = torch.randn(1, 4, 3, 5)
    pairs = pairs_for(module.virtual_pairs)
    if implementation == "sdpa":  # causal from the first key on, as sdpa's is_causal
        mask, visible = None, torch.ones(3, 5, dtype=torch.bool).tril()
    else:  # a mask for a longer cache than this one
        mask, visible = torch.zeros(1, 1, 3, 9), None
        mask[..., 5:] = -1.0
    got, _ = interface.hificl_attention_forward(module, query, key, value, mask, position_bias=bias)
    want, _ = oracle.hificl(query, key, value, pairs.keys, pairs.values, scaling=0.25, mask=visible, bias=bias)
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 2), (6, 3)], ids=["grouped", "repeated"])
def test_flex_attention_merges_by_its_log_sum_exp(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA. The kernel runs uncompiled here; for the gradients, which it lacks on a CPU, a stand-in does."""
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=heads[0],
            num_key_value_heads=heads[1], head_dim=16, initializer_range=0.2, pad_token_id=0,
        )
    )  # fmt: skip
    torch.manual_seed(1)
    model, inputs = get_peft_model(base, config()).eval(), inputs_for("gqa")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :3] = 0
    real = inputs["attention_mask"].bool()
    calls = 0

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        out = model(**inputs).logits[real]
        out.square().mean().backward()
        return out, [p.grad for p in model.parameters() if p.requires_grad]

    def eager_kernel(*args: Tensor, training: bool, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return flex_attention(*args, **kwargs)

    def stand_in(query: Tensor, key: Tensor, value: Tensor, training: bool, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        block_mask = kwargs["block_mask"]
        visible = create_mask(block_mask.mask_mod, len(query), 1, query.shape[2], key.shape[2], device="cpu")
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores = (query @ key.mT * kwargs["scale"]).masked_fill(~visible, -1e30)
        return scores.softmax(-1) @ value, types.SimpleNamespace(lse=scores.logsumexp(-1))

    want, gradients = step()  # sdpa
    model.get_base_model().set_attn_implementation("flex_attention")
    monkeypatch.setattr(backends, "_FLEX_GIVES_LSE", {"cpu"})
    monkeypatch.setattr(backends, "compile_friendly_flex_attention", eager_kernel)
    torch.testing.assert_close(logits(model, **inputs)[real], want, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(backends, "compile_friendly_flex_attention", stand_in)
    got, others = step()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(others, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert calls == 4
    names = ["__base__", "default"]  # a row without pairs has none of their weight
    got = logits(model.eval(), **inputs, adapter_names=names)
    assert calls == 6
    model.get_base_model().set_attn_implementation("sdpa")
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            want = logits(model, **alone)[0]
        torch.testing.assert_close(got[row][real[row]], want[real[row]], rtol=1e-4, atol=1e-4)


def test_flex_attention_under_autocast_gets_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings leave queries and keys in float32; torch's own cast of them gives wrong numbers on CUDA."""
    seen = []

    def kernel(*args: Tensor, training: bool, **kwargs: object) -> object:
        seen.append({t.dtype for t in args})
        return flex_attention(*args, **kwargs)

    model, inputs = adapted("gqa"), inputs_for("gqa")
    want = logits(model, **inputs)
    model.get_base_model().set_attn_implementation("flex_attention")
    monkeypatch.setattr(backends, "_FLEX_GIVES_LSE", {"cpu"})
    monkeypatch.setattr(backends, "compile_friendly_flex_attention", kernel)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, **inputs)
    assert seen == [{torch.bfloat16}] * 2
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)


def test_dropout_is_the_modules_business() -> None:
    module = adapted("mha").get_base_model().model.layers[0].self_attn
    args = torch.randn(3, 1, 4, 5, 16)
    plain = interface.hificl_attention_forward(module, *args, None)[0]
    assert torch.equal(interface.hificl_attention_forward(module, *args, None, dropout=0.5)[0], plain)
    module.train()
    assert not torch.equal(interface.hificl_attention_forward(module, *args, None, dropout=0.5)[0], plain)


def test_a_4_bit_base_gives_its_compute_dtype() -> None:
    """bitsandbytes keeps 4-bit weights as uint8, or in another dtype than it computes in."""

    class Linear4bit(nn.Linear):
        compute_dtype = torch.bfloat16

        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__(32, 64, bias=False)
            self.weight = nn.Parameter(torch.zeros(1024, 1, dtype=dtype), requires_grad=False)

    for stored in (torch.uint8, torch.float16):
        base = build("gqa")
        for layer in base.model.layers:
            layer.self_attn.q_proj = Linear4bit(stored)
        model = get_peft_model(base, config(), autocast_adapter_dtype=False)
        assert {p.dtype for layer in hificl_layers(model) for p in layer.parameters()} == {torch.bfloat16}


def test_the_name_hificl_without_an_adapter_is_refused() -> None:
    base = build("gqa")
    base.set_attn_implementation("hificl")
    with pytest.raises(ValueError, match="no HiFICL adapter"):
        base(**inputs_for("gqa"))


def test_output_attentions_keeps_meaning_and_shape() -> None:
    """The weight with which each context value enters the output: rows sum to alpha, the rest is the virtual pairs'."""
    base, inputs = build("gqa"), inputs_for("gqa")
    base.set_attn_implementation("eager")
    with torch.no_grad():
        plain = base(**inputs, output_attentions=True).attentions
        model = get_peft_model(base, config()).eval()
        got = model(**inputs, output_attentions=True).attentions
    assert [a.shape for a in got] == [a.shape for a in plain]
    for weights in got:
        alpha = weights.sum(-1)
        assert (alpha > 0).all() and (alpha < 1).all() and not weights.triu(1).any()
    # In the first layer the queries and keys are the base model's: the same weights, scaled by alpha.
    torch.testing.assert_close(got[0] / got[0].sum(-1, keepdim=True), plain[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_weights_have_the_dtype_of_the_base_models(dtype: torch.dtype) -> None:
    """Computed in float32, and by a float32 adapter; who multiplies them with hidden states must not be surprised."""
    base, inputs = build("gqa").to(dtype), inputs_for("gqa")
    base.set_attn_implementation("eager")
    with torch.no_grad():
        plain = base(**inputs, output_attentions=True)
        model = get_peft_model(base, config()).eval()
        got = model(**inputs, output_attentions=True)
    assert {w.dtype for w in got.attentions} == {w.dtype for w in plain.attentions} == {dtype}
    assert got.logits.dtype == plain.logits.dtype == dtype


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_a_scaling_left_out_is_that_of_the_keys_dimension(implementation: str) -> None:
    """As in `scaled_dot_product_attention`; here keys have 16 dimensions and values 12."""
    torch.manual_seed(0)
    model = get_peft_model(deepseek().eval(), config())
    model.get_base_model().set_attn_implementation(implementation)
    module = model.get_base_model().model.layers[0].self_attn
    query, key, value = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 12)
    pairs = pairs_for(module.virtual_pairs, 2)
    assert pairs.keys.shape[-1] == 16 and pairs.values.shape[-1] == 12
    for scaling in (None, 0.7):
        got, _ = interface.hificl_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=False)
        want, _ = oracle.hificl(query, key, value, pairs.keys, pairs.values, scaling=scaling or 16**-0.5)
        torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


# -- generation ------------------------------------------------------------------------------------------------------

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def test_greedy_with_cache_equals_without(kind: str) -> None:
    model, inputs = adapted(kind), inputs_for(kind)
    cached = model.generate(**inputs, **GREEDY)
    assert torch.equal(cached, model.generate(**inputs, **GREEDY, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(**inputs, **GREEDY))


def test_logits_step_by_step_equal_the_full_forward(kind: str) -> None:
    model, inputs = adapted(kind), inputs_for(kind)
    ids = inputs.pop("input_ids")
    full = logits(model, input_ids=ids, **inputs)
    with torch.no_grad():
        out = model(input_ids=ids[:, :5], **inputs, use_cache=True)
        steps = [out.logits]
        for t in range(5, ids.shape[1]):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        assert out.past_key_values.get_seq_length() == ids.shape[1]  # virtual pairs occupy no position
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)


def test_static_cache_beams_and_assisted_decoding() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa", rows=1)
    want = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), want)
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=build("gqa")), want)
    beams = {**GREEDY, "num_beams": 3}
    assert torch.equal(model.generate(**inputs, **beams), model.generate(**inputs, **beams, use_cache=False))


def test_left_padded_batch_equals_each_row_alone() -> None:
    model = adapted("gqa")
    short, long = inputs_for("gqa", rows=1, length=4)["input_ids"], inputs_for("gqa", rows=1, length=9)["input_ids"]
    ids = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    got = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, 9:]
    for row, alone in enumerate((short, long)):
        want = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **GREEDY)
        assert torch.equal(got[row], want[0, alone.shape[1] :])


# -- training --------------------------------------------------------------------------------------------------------


def gradients(model: PeftModel, kind: str) -> dict[str, Tensor]:
    model.zero_grad()
    inputs = inputs_for(kind)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, reentrant: bool) -> None:
    model = adapted(kind).train()
    want = gradients(model, kind)
    assert len(want) == 8 and all(g.any() for g in want.values())
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients(model, kind)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_base_with_float32_adapter(kind: str, dtype: torch.dtype) -> None:
    base = build(kind).to(dtype)
    torch.manual_seed(1)
    model = get_peft_model(base, config())
    adapter = {name: p for name, p in model.named_parameters() if "hificl_" in name}
    assert all(p.dtype == torch.float32 for p in adapter.values())
    assert all(p.dtype == dtype for name, p in model.named_parameters() if name not in adapter)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_for(kind).items()}
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    assert out.logits.dtype == dtype and all(torch.isfinite(p.grad).all() for p in adapter.values())
    without = get_peft_model(build(kind).to(dtype), config(), autocast_adapter_dtype=False)
    assert all(p.dtype == dtype for name, p in without.named_parameters())
    without(**inputs)


def test_autocast_and_moving_the_model() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    want = logits(model, **inputs)
    pairs = pairs_for(hificl_layers(model)[0], 2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model, **inputs).float(), want, rtol=0.2, atol=0.5)
        assert torch.equal(pairs_for(hificl_layers(model)[0], 2).keys, pairs.keys)
    model.double()
    torch.testing.assert_close(logits(model, **inputs), want.double(), rtol=1e-4, atol=1e-4)
    model.add_adapter("late", config(), autocast_adapter_dtype=False)
    assert hificl_layers(model)[0].hificl_K_A["late"].weight.dtype == torch.float64


def test_dropout_is_part_of_training_only() -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(attention_dropout=0.5).eval(), config())
    inputs = inputs_for("gqa")
    assert torch.equal(logits(model.eval(), **inputs), logits(model, **inputs))
    model.train()
    assert not torch.equal(logits(model, **inputs), logits(model, **inputs))


# -- compilation and threads -----------------------------------------------------------------------------------------


def compiles_whole(kind: str) -> bool:
    """Whether this torch can trace the base model of this transformers without a break; the adapter adds none."""
    base, inputs = build(kind), inputs_for(kind)
    logits(base, **inputs)
    try:
        logits(torch.compile(base, backend="eager", fullgraph=True), **inputs)
    except torch._dynamo.exc.TorchDynamoException:
        return False
    return True


def test_compiles_whole_and_does_not_recompile_when_weights_are_swapped(kind: str) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    if not compiles_whole(kind):
        pytest.skip("the base model does not compile whole")
    model, other, inputs = adapted(kind), adapted(kind, seed=2), inputs_for(kind)
    want = [logits(m, **inputs) for m in (model, other)]
    counter = CompileCounter()
    compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
    torch.testing.assert_close(logits(compiled, **inputs), want[0], rtol=1e-5, atol=1e-5)
    frames = counter.frame_count
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    torch.testing.assert_close(logits(compiled, **inputs), want[1], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == frames


def test_switching_by_name_traces_once_per_adapter() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, inputs = adapted("gqa", name="a"), inputs_for("gqa")
    model.add_adapter("b", config())
    model.requires_grad_(False)
    counter = CompileCounter()
    compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
    for name in ("a", "b", "a", "b"):
        model.set_adapter(name, inference_mode=True)
        torch.testing.assert_close(logits(compiled, **inputs), logits(model, **inputs), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


def test_a_compiled_model_sees_an_adapter_that_comes_and_goes() -> None:
    torch._dynamo.reset()
    base, inputs = build("gqa"), inputs_for("gqa")
    bare = logits(base, **inputs)
    compiled = torch.compile(base, backend="eager", fullgraph=True)
    logits(compiled, **inputs)
    torch.manual_seed(1)
    model = get_peft_model(base, config()).eval()
    want = logits(model, **inputs)
    assert not torch.equal(want, bare)
    torch.testing.assert_close(logits(compiled, **inputs), want, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(compiled, **inputs), bare, rtol=1e-5, atol=1e-5)
    torch.manual_seed(2)
    model.add_adapter("b", config())
    model.set_adapter("b")
    torch.testing.assert_close(logits(compiled, **inputs), logits(model, **inputs), rtol=1e-5, atol=1e-5)
    model.unload()
    torch.testing.assert_close(logits(compiled, **inputs), bare, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_equals_eager(kind: str) -> None:
    torch._dynamo.reset()
    if not compiles_whole(kind):
        pytest.skip("the base model does not compile whole")
    model, inputs = adapted(kind), inputs_for(kind)
    want = logits(model, **inputs)
    compiled = torch.compile(model.get_base_model(), fullgraph=True)
    torch.testing.assert_close(logits(compiled, **inputs), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_a_switch_in_every_mode_of_inductor(mode: str) -> None:
    """The first switch to each adapter compiles a graph, a later one none, nor other weights in the same adapter."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    torch._dynamo.reset()
    model, inputs = adapted("gqa", name="a"), inputs_for("gqa")
    model.add_adapter("b", config())
    model.requires_grad_(False)
    compiled = torch.compile(model.get_base_model(), mode=mode, fullgraph=True)
    graphs = []
    for name in ("a", "b", "a", "b", "a"):
        model.set_adapter(name, inference_mode=True)
        if len(graphs) == 4:
            other = get_peft_model_state_dict(adapted("gqa", seed=3, name="a"), adapter_name="a")
            set_peft_model_state_dict(model, other, adapter_name="a")
        torch.testing.assert_close(logits(compiled, **inputs), logits(model, **inputs), rtol=1e-4, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert [count - graphs[0] for count in graphs] == [0, 1, 1, 1, 1]


def test_meta_base_counts_parameters() -> None:
    with torch.device("meta"):
        base = llama()
    model = get_peft_model(base, HiFICLConfig(n=8, r=8))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 2 * 2 * 4 * 8 * (8 + 16)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_heads_that_do_not_divide_are_an_error_too(implementation: str) -> None:
    """A configuration that states too few query heads: the CPU's kernel, asked for it, ends the process."""
    base = tf.Qwen2ForCausalLM(
        tf.Qwen2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=32, attn_implementation=implementation,
        )
    ).eval()  # fmt: skip
    with pytest.raises(RuntimeError):
        base(**inputs_for("gqa"))
    with pytest.raises(ValueError, match=r"attends with HeadShape\(heads=2, .*groups=32\), but its .* groups=2\)"):
        get_peft_model(base, config())(**inputs_for("gqa"))
