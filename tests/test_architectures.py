"""Every architecture of the zoo: targets, exactness, generation, saving, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from peft_hificl import HiFICLConfig, HiFICLLayer

from . import architectures
from .architectures import FAMILIES, IMPLEMENTATIONS, REFUSED, Family, Refused
from .zoo import Call, each, generate, recorded_attention, run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def quiet_and_eager() -> Iterator[None]:
    """Silence transformers, and let flex_attention run as written: compiling it takes half a minute."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    torch.compiler.set_stance("force_eager")
    with torch.no_grad():
        yield
    torch.compiler.set_stance("default")
    transformers.logging.set_verbosity(verbosity)


# -- the oracle -------------------------------------------------------------------------------------------------------


def oracle(call: Call, adapted: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention over ``[K_D ; K]``, ``[V_D ; V]`` in float64, with every key of every head written out.

    Returns:
        The output ``(B, T, H, e)``, and where a query sees any key of the context ``(B, T, H)``.
    """
    layer, options = call.module.virtual_pairs, call.options
    query, key, value = (t.double() for t in (call.query, call.key, call.value))
    batch, heads, length, dim = query.shape
    key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    scaling = dim**-0.5 if options.get("scaling") is None else options["scaling"]

    def scores(keys: Tensor) -> Tensor:
        result = query @ keys.mT * scaling
        cap = options.get("softcap")
        return result if cap is None else cap * torch.tanh(result / cap)

    context = scores(key)  # (B, H, T, S)
    if options.get("position_bias") is not None:
        context = context + options["position_bias"].double()
    context = context + additive_mask(call)
    visible = (context > torch.finfo(torch.float32).min / 2).any(-1).transpose(1, 2)

    columns, values = [context], [value]
    if adapted:
        K_D = layer.hificl_K_A["default"].weight.double() @ layer.hificl_K_B["default"].weight.double()
        V_D = layer.hificl_V_A["default"].weight.double() @ layer.hificl_V_B["default"].weight.double()
        columns, values = [scores(K_D.expand(batch, -1, -1, -1)), *columns], [V_D.expand(batch, -1, -1, -1), *values]
    if options.get("s_aux") is not None:
        columns.append(options["s_aux"].double().reshape(1, -1, 1, 1).expand(batch, heads, length, 1))
        values.append(torch.zeros_like(value[:, :, :1]))
    output = torch.cat(columns, dim=-1).softmax(-1) @ torch.cat(values, dim=2)
    return output.transpose(1, 2), visible


def additive_mask(call: Call) -> Tensor:
    """What transformers' own attention functions would add to the scores for the mask that they are given."""
    mask, length, size = call.mask, call.query.shape[2], call.key.shape[2]
    if mask is None:
        is_causal = call.options.get("is_causal")
        if is_causal is None:
            is_causal = getattr(call.module, "is_causal", True)
        sdpa = call.module.virtual_pairs.base_config._attn_implementation == "sdpa"
        mask = torch.ones(length, size, dtype=torch.bool)
        if sdpa and is_causal and length > 1:  # sdpa alone reads "no mask" so
            mask = mask.tril()
    elif not isinstance(mask, Tensor):  # a BlockMask of flex_attention
        batch = call.query.shape[0]
        rows = torch.meshgrid(*map(torch.arange, (batch, 1, length, size)), indexing="ij")
        mask = mask.mask_mod(*rows).expand(batch, 1, length, size)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    return mask[..., :size].double()


# -- the tests --------------------------------------------------------------------------------------------------------


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Up to float32 rounding, which scales with the largest number."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def adapted_modules(model: nn.Module) -> list[str]:
    return [n.removesuffix(".virtual_pairs") for n, m in model.named_modules() if isinstance(m, HiFICLLayer)]


@each(FAMILIES)
def test_default_targets_are_the_expected_ones(family: Family) -> None:
    model = architectures.build(family)
    architectures.adapt(model)
    assert sorted(adapted_modules(model)) == sorted(architectures.expand(family.targets))


@each(FAMILIES)
def test_every_attention_equals_the_oracle(family: Family) -> None:
    base = architectures.build(family)
    inputs = architectures.forward_inputs(family, base)
    plain = run(base, inputs)
    model = architectures.adapt(base)
    modules = {base.get_submodule(name) for name in architectures.expand(family.targets)}
    reference = None
    for implementation in IMPLEMENTATIONS:
        if not architectures.offers(base, implementation) or implementation in family.quirks:
            continue
        with recorded_attention() as calls:
            logits = run(model, inputs)
        assert {call.module for call in calls} == modules
        assert {m.virtual_pairs.base_config._attn_implementation for m in modules} == {implementation}
        for call in calls:
            expected, _ = oracle(call, adapted=True)
            assert_close(call.output, expected)
        assert not torch.allclose(logits, plain, rtol=0, atol=1e-5)
        reference = logits if reference is None else reference
        assert_close(logits, reference)

        # The oracle itself, without virtual pairs, against the attention function of the model.
        if implementation != "flex_attention":
            with recorded_attention() as calls, model.disable_adapter():
                run(model, inputs)
            assert {call.module for call in calls} == modules
            for call in calls:
                expected, visible = oracle(call, adapted=False)
                assert_close(call.output[visible], expected[visible])


@each(tuple(f for f in FAMILIES if f.generates))
def test_generates_the_same_with_and_without_a_cache(family: Family) -> None:
    model = architectures.adapt(architectures.build(family))
    inputs = family.inputs()
    cached, uncached = (generate(model, inputs, use_cache=use_cache) for use_cache in (True, False))
    with model.disable_adapter():
        plain, plain_uncached = (generate(model, inputs, use_cache=use_cache) for use_cache in (True, False))
    assert not torch.equal(cached.logits, plain.logits)
    if "uncached" in family.quirks:
        assert plain.queries == plain_uncached.queries, "the base model does it after all"
        pytest.skip(family.quirks["uncached"])
    assert cached.queries < uncached.queries
    if "padding" in family.quirks:
        assert not plain.agrees_with(plain_uncached), "the base model does it after all"
    assert cached.agrees_with(uncached, first_row=1 if "padding" in family.quirks else 0)


@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
def test_prompt_without_a_mask_into_a_static_cache(name: str) -> None:
    """sdpa gets no mask then, and keys that are longer than the prompt."""
    family = next(f for f in FAMILIES if f.name == name)
    model = architectures.adapt(architectures.build(family))
    ids = family.inputs()["input_ids"][1:]
    inputs = {"decoder_input_ids" if model.config.is_encoder_decoder else "input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["input_ids"] = ids
    with recorded_attention() as calls:
        static = generate(model, inputs, cache_implementation="static", disable_compile=True)
    assert calls[0].mask is None and calls[0].key.shape[2] > calls[0].query.shape[2] > 1
    assert static.agrees_with(generate(model, inputs))


@each(FAMILIES)
def test_saved_and_loaded_is_bit_equal(family: Family, tmp_path: Any) -> None:
    base = architectures.build(family)
    inputs = architectures.forward_inputs(family, base)
    model = architectures.adapt(base)
    model.save_pretrained(tmp_path)
    expected = run(model, inputs)
    loaded = PeftModel.from_pretrained(architectures.build(family), tmp_path)
    assert adapted_modules(loaded.base_model.model) == adapted_modules(base)
    assert torch.equal(run(loaded, inputs), expected)
    assert HiFICLConfig.from_pretrained(tmp_path).target_modules, "the reload would have to search"


@each(FAMILIES)
def test_disabled_is_bit_equal_to_the_base_model(family: Family) -> None:
    base = architectures.build(family)
    inputs = architectures.forward_inputs(family, base)
    expected = run(base, inputs)
    model = architectures.adapt(base)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), expected)
    assert not torch.equal(run(model, inputs), expected)
    assert torch.equal(run(model.unload(), inputs), expected)


@each(tuple(f for f in FAMILIES if f.media != "text"))
def test_the_image_or_sound_is_seen(family: Family) -> None:
    """Else the table would claim a check with an image that took part in nothing."""
    model = architectures.build(family)
    inputs = architectures.forward_inputs(family, model)
    other = {k: v.roll(1, 0) if v.is_floating_point() else v for k, v in inputs.items()}
    assert not torch.allclose(run(model, inputs), run(model, other), atol=1e-5)


@each(tuple(f for f in FAMILIES if "flex_attention" in f.quirks))
def test_flex_attention_is_broken_in_the_base_model(family: Family) -> None:
    model = architectures.build(family)
    inputs = architectures.forward_inputs(family, model)
    expected = run(model, inputs)
    assert architectures.offers(model, "flex_attention")
    with suppress(IndexError, RuntimeError, ValueError):
        assert not torch.allclose(run(model, inputs)[1], expected[1], atol=1e-4)  # row 1 has no padding


@each(REFUSED)
def test_refused_with_the_reason(family: Refused) -> None:
    model = architectures.build(family)
    inputs = architectures.forward_inputs(family, model)
    keys, expected = list(model.state_dict()), run(model, inputs)
    configs = [getattr(m, "config", None) for m in model.modules()]
    with pytest.raises(ValueError) as error:
        architectures.adapt(model)
    assert family.reason in str(error.value)
    assert list(model.state_dict()) == keys
    assert all(getattr(m, "config", None) is c for m, c in zip(model.modules(), configs, strict=True))
    assert torch.equal(run(model, inputs), expected)


def test_the_document_is_up_to_date() -> None:
    written = architectures.DOCUMENT.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}" not in written:
        pytest.skip(f"the document was written with another transformers than {transformers.__version__}")
    assert written == architectures.document(), "run: python -m tests.architectures"


def test_the_zoo_is_as_large_as_promised() -> None:
    kinds = [f.kind for f in FAMILIES]
    assert len(FAMILIES) - kinds.count(architectures.VISION_LANGUAGE) >= 40
    assert kinds.count(architectures.VISION_LANGUAGE) >= 12
    assert len({(f.name, f.model) for f in FAMILIES}) == len(FAMILIES)
