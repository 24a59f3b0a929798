"""The strength of an adapter: `set_scale`, `scale_layer`, `unscale_layer`, `rescale_adapter_scale`."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale as pefts_rescale
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from peft_hificl import rescale_adapter_scale

from . import oracle
from .helpers import GROUPS, adapted, build, config, hificl_layers, inputs_for, llama, logits, pairs_for
from .zoo import recorded_attention

BAD = [-0.5, math.nan, math.inf, -math.inf]


def set_scale(model: nn.Module, **strengths: float) -> None:
    for layer in hificl_layers(model):
        for name, strength in strengths.items():
            layer.set_scale(name, strength)


def with_two(**kwargs: object) -> PeftModel:
    """Adapters "a" (n = 3) and "b" (n = 5, with log-weights); "a" is active."""
    model = adapted("gqa", name="a", **kwargs)
    torch.manual_seed(2)
    model.add_adapter("b", config(n=5, pair_weights=True, **kwargs))
    return model


# -- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("pair_weights", [False, True], ids=["", "pair_weights"])
@pytest.mark.parametrize("heads", list(GROUPS))
def test_every_call_counts_each_pair_as_often_as_its_strength(
    heads: str, pair_weights: bool, implementation: str
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(kv_heads=GROUPS[heads][1]).eval(), config(pair_weights=pair_weights))
    model.get_base_model().set_attn_implementation(implementation)
    own = [pairs_for(layer) for layer in hificl_layers(model)]
    set_scale(model, default=0.3)
    with torch.no_grad(), recorded_attention() as calls:
        model(**inputs_for("gqa"))
    for call, pairs in zip(calls, own, strict=True):
        weights = torch.zeros(1, 4, 3) if pairs.log_weights is None else pairs.log_weights
        want, _ = oracle.hificl(
            call.query, call.key, call.value, pairs.keys, pairs.values, scaling=call.query.shape[-1] ** -0.5,
            mask=torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool).tril()[None, None],
            log_weights=weights + math.log(0.3),
        )  # fmt: skip
        torch.testing.assert_close(call.output, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_three_times_the_strength_is_the_adapter_three_times() -> None:
    """A union of three copies, which uses no log-weights."""
    model, inputs = adapted("gqa", name="a"), inputs_for("gqa")
    for name in "bc":
        model.add_adapter(name, config())
        for layer in hificl_layers(model):
            keys, values = (tensor[0] for tensor in pairs_for(layer)[:2])
            layer.set_pairs(name, keys, values)
    set_scale(model, a=3)
    want = logits(model, **inputs)
    set_scale(model, a=1)
    model.base_model.set_adapter(["a", "b", "c"])
    torch.testing.assert_close(logits(model, **inputs), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_flow_through_the_strength(implementation: str) -> None:
    """Those of three copies of an adapter, of which each gets a third."""
    inputs = inputs_for("gqa")
    inputs["labels"] = inputs["input_ids"]
    model = adapted("gqa", name="a", factorize_keys=False, factorize_values=False)
    model.get_base_model().set_attn_implementation(implementation)
    set_scale(model, a=2)
    model(**inputs).loss.backward()
    parameters = [(layer.hificl_K, layer.hificl_V) for layer in hificl_layers(model)]
    got = [kind["a"].weight.grad.clone() for kinds in parameters for kind in kinds]
    model.zero_grad()
    set_scale(model, a=1)
    model.add_adapter("b", config(factorize_keys=False, factorize_values=False))
    for kinds in parameters:
        for kind in kinds:
            kind["b"].weight.data.copy_(kind["a"].weight.data)
    model.base_model.set_adapter(["a", "b"])
    model(**inputs).loss.backward()
    want = [kind["a"].weight.grad + kind["b"].weight.grad for kinds in parameters for kind in kinds]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


# -- 1 and 0 ----------------------------------------------------------------------------------------------------------


def test_strength_one_adds_nothing() -> None:
    model = adapted("gqa")
    want = logits(model, **inputs_for("gqa"))
    set_scale(model, default=0.5)
    assert pairs_for(hificl_layers(model)[0]).log_weights is not None
    set_scale(model, default=1)
    assert pairs_for(hificl_layers(model)[0]).log_weights is None
    assert torch.equal(logits(model, **inputs_for("gqa")), want)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_strength_zero_is_the_base_model_bit_for_bit(kind: str, implementation: str) -> None:
    base = build(kind)
    base.set_attn_implementation(implementation)
    want = logits(base, **inputs_for(kind))
    model = get_peft_model(base, config()).eval()
    set_scale(model, default=0)
    assert torch.equal(logits(model, **inputs_for(kind)), want)
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs_for(kind)), want)


def test_strength_zero_takes_no_gradient_and_is_not_reported() -> None:
    model = adapted("gqa", name="a")
    model.add_adapter("b", config())
    model.base_model.set_adapter(["a", "b"])
    set_scale(model, a=0)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model(**inputs_for("gqa"), labels=inputs_for("gqa")["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".b." in name), name


# -- PEFT's names and meanings ----------------------------------------------------------------------------------------


def strengths_after(model: PeftModel, layers: list[nn.Module], initial: float) -> list[dict[str, float]]:
    """The strengths after each of some calls, as multiples of the initial one."""
    found = []

    def note() -> None:
        found.append({name: scaling / initial for name, scaling in layers[0].scaling.items()})
        assert all(layer.scaling == layers[0].scaling for layer in layers)

    for call in (
        lambda layer: layer.set_scale("a", 0.5),
        lambda layer: layer.set_scale("a", 0.25),  # of the initial one, not of the present one
        lambda layer: layer.set_scale("unknown", 3),
        lambda layer: layer.set_scale("b", 4),
        lambda layer: layer.scale_layer(3),  # of "a" alone, which is active
        lambda layer: layer.scale_layer(1),
        lambda layer: layer.unscale_layer(2),
        lambda layer: layer.unscale_layer(),
    ):
        for layer in layers:
            call(layer)
        note()
    model.base_model.set_adapter(["a", "b"])
    for layer in layers:
        layer.scale_layer(2)
    note()
    for layer in layers:
        layer.unscale_layer(None)
    note()
    return found


def test_the_methods_mean_what_they_mean_in_loras_layers() -> None:
    model = with_two()
    lora = get_peft_model(build("gqa"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]), adapter_name="a")
    lora.add_adapter("b", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    of_lora = [module for module in lora.modules() if hasattr(module, "scaling") and hasattr(module, "lora_A")]
    assert strengths_after(model, hificl_layers(model), 1) == strengths_after(lora, of_lora, 2)


@pytest.mark.parametrize("strength", BAD)
def test_strengths_that_cannot_be(strength: float) -> None:
    model = with_two()
    layer = hificl_layers(model)[0]
    layer.set_scale("a", 0.5)
    before = dict(layer.scaling)
    reason = r"finite number of at least 0, found .*softmax, which cannot be negative\. 0 is the base model"
    for call in (lambda: layer.set_scale("a", strength), lambda: layer.set_scale("unknown", strength)):
        with pytest.raises(ValueError, match=reason):
            call()
    for call in (layer.scale_layer, layer.unscale_layer):
        with pytest.raises(ValueError, match=reason):
            call(strength)
    with pytest.raises(ValueError, match=reason), rescale_adapter_scale(model, strength):
        pytest.fail("entered")
    assert layer.scaling == before


def test_what_is_no_number_and_what_leaves_the_range() -> None:
    model = with_two()
    layer = hificl_layers(model)[0]
    with pytest.raises(TypeError, match="must be a number, found str: '0.5'"):
        layer.set_scale("a", "0.5")
    with pytest.raises(TypeError, match="must be a number"), rescale_adapter_scale(model, None):
        pytest.fail("entered")
    with pytest.raises(ValueError, match="cannot be divided by 0: unscale_layer()"):
        layer.unscale_layer(0)
    model.base_model.set_adapter(["a", "b"])
    set_scale(model, b=1e300)
    with pytest.raises(ValueError, match="finite number"):
        layer.scale_layer(1e10)
    with pytest.raises(ValueError, match="finite number"), rescale_adapter_scale(model, 1e10):
        pytest.fail("entered")
    assert [found.scaling for found in hificl_layers(model)] == [{"a": 1.0, "b": 1e300}] * 2


def test_rescaling_for_a_while() -> None:
    model, inputs = with_two(), inputs_for("gqa")
    set_scale(model, b=2)
    model.base_model.set_adapter(["a", "b"])
    whole = logits(model, **inputs)
    set_scale(model, a=0.25, b=0.5)
    want = logits(model, **inputs)
    set_scale(model, a=1, b=2)
    with rescale_adapter_scale(model, 0.5), rescale_adapter_scale(model, 0.5):
        assert hificl_layers(model)[1].scaling == {"a": 0.25, "b": 0.5}
        assert torch.equal(logits(model, **inputs), want)
    assert torch.equal(logits(model, **inputs), whole)
    with pytest.raises(KeyError), rescale_adapter_scale(model, 0.5):
        model.delete_adapter("b")
        model.add_adapter("c", config())
        raise KeyError
    assert [layer.scaling for layer in hificl_layers(model)] == [{"a": 1.0, "c": 1.0}] * 2


def test_rescaling_without_pairs() -> None:
    lora = get_peft_model(build("gqa"), LoraConfig(target_modules=["q_proj"]))
    for model in (build("gqa"), lora):
        with pytest.raises(ValueError, match="has no HiFICL adapters"), rescale_adapter_scale(model, 0.5):
            pytest.fail("entered")
    with pytest.raises(ValueError, match="LoraLayer"), pefts_rescale(adapted("gqa"), 0.5):
        pytest.fail("PEFT's own does it now")


# -- several adapters, rows -------------------------------------------------------------------------------------------


def test_each_adapter_of_a_union_has_its_own() -> None:
    model = with_two()
    model.base_model.set_adapter(["a", "b"])
    layer = hificl_layers(model)[0]
    own = layer.hificl_W["b"].weight
    set_scale(model, a=0.5)
    weights = pairs_for(layer).log_weights
    torch.testing.assert_close(weights, torch.cat([torch.full((1, 4, 3), math.log(0.5)), own[None]], dim=-1))
    set_scale(model, a=0, b=2)
    torch.testing.assert_close(pairs_for(layer).log_weights, own[None] + math.log(2))
    set_scale(model, b=0)
    assert pairs_for(layer) is None and not layer.is_active


@pytest.mark.parametrize("strengths", [(0.3, 2), (0, 2), (0.3, 0), (0, 0)], ids=str)
def test_each_row_has_the_strength_of_its_adapter(strengths: tuple[float, float]) -> None:
    model, inputs = with_two(), inputs_for("gqa", rows=4)
    set_scale(model, a=strengths[0], b=strengths[1])
    names = ["b", "__base__", "a", "b"]
    got = logits(model, **inputs, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            want = logits(build("gqa"), **one)
        else:
            model.set_adapter(name)
            want = logits(model, **one)
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-5)


def test_generate_with_different_sizes_strengths_and_none() -> None:
    """Greedily, each row as alone; every layer is called as often as for one adapter."""
    model = with_two()
    torch.manual_seed(3)
    model.add_adapter("c", config(n=1, r=4, factorize_values=False))
    set_scale(model, a=4, b=0.25)
    ids = inputs_for("gqa", rows=5)["input_ids"]
    names = ["a", "__base__", "b", "c", "a"]
    options = {"max_new_tokens": 6, "do_sample": False}
    model.set_adapter("c")
    counts = []
    for extra in ({"adapter_names": names}, {}):
        before = hificl_layers(model)[0].calls
        mixed = model.generate(input_ids=ids, **options, **extra)
        counts.append(hificl_layers(model)[0].calls - before)
        if extra:
            got = mixed
    assert counts[0] == counts[1] == 6
    for row, name in enumerate(names):
        if name == "__base__":
            want = build("gqa").generate(input_ids=ids[row : row + 1], **options)
        else:
            model.set_adapter(name)
            want = model.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(got[row], want[0]), name


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_compiled_code_is_traced_once_more_at_most(implementation: str) -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    model.get_base_model().set_attn_implementation(implementation)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
    logits(compiled, **inputs)
    assert counter.frame_count == 1
    frames = []
    for strength in (0.5, 3, 0, 1, 0.2):
        set_scale(model, default=strength)
        torch.testing.assert_close(logits(compiled, **inputs), logits(model, **inputs), rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames == [2] * 5  # once, when a strength was set for the first time
    with rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(logits(compiled, **inputs), logits(model, **inputs), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


def test_a_strength_that_was_set_before_compiling_never_traces_again() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    set_scale(model, default=1)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
    for strength in (1, 0, 0.5):
        set_scale(model, default=strength)
        torch.testing.assert_close(logits(compiled, **inputs), logits(model, **inputs), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_training_compiles_with_a_strength() -> None:
    model, inputs = with_two(), inputs_for("gqa")
    model.base_model.set_adapter(["a", "b"])
    set_scale(model, a=0.3, b=3)
    inputs["labels"] = inputs["input_ids"]
    model(**inputs).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6, msg=name)


def test_an_exported_graph_has_the_strength() -> None:
    model, inputs = adapted("gqa").get_base_model(), inputs_for("gqa")
    for strength in (0.3, 0):
        set_scale(model, default=strength)
        with torch.no_grad():
            program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
        got = program.module()(**inputs, use_cache=False)
        torch.testing.assert_close(got.logits, logits(model, **inputs), rtol=1e-4, atol=1e-5)


# -- what else holds an adapter ---------------------------------------------------------------------------------------


def test_it_is_no_part_of_what_is_saved(tmp_path: Path) -> None:
    model = adapted("gqa")
    want, whole = get_peft_model_state_dict(model).keys(), model.state_dict().keys()
    parameters, buffers = list(model.named_parameters()), list(model.named_buffers())
    loaded = logits(model, **inputs_for("gqa"))
    set_scale(model, default=0.5)
    assert get_peft_model_state_dict(model).keys() == want and model.state_dict().keys() == whole
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in parameters]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in buffers]
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == want
    again = PeftModel.from_pretrained(build("gqa"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again, **inputs_for("gqa")), loaded)
    set_scale(again, default=0.5)
    assert torch.equal(logits(again, **inputs_for("gqa")), logits(model, **inputs_for("gqa")))


def test_a_copy_has_its_own_strength() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    set_scale(model, default=0.5)
    want = logits(model, **inputs)
    other = copy.deepcopy(model)
    set_scale(other, default=0)
    assert torch.equal(logits(model, **inputs), want)
    counter = CompileCounter()
    torch._dynamo.reset()
    torch.testing.assert_close(logits(torch.compile(model.get_base_model(), backend=counter), **inputs), want)


def test_a_name_that_is_used_again_begins_at_one() -> None:
    model = with_two()
    set_scale(model, b=0.5)
    model.delete_adapter("b")
    assert all("b" not in layer.scaling and "b" not in layer.log_scaling for layer in hificl_layers(model))
    model.add_adapter("b", config())
    assert all(layer.scaling["b"] == 1 for layer in hificl_layers(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama().to(dtype).eval(), config(), autocast_adapter_dtype=False)
    set_scale(model, default=0.3)
    pairs = pairs_for(hificl_layers(model)[0])
    assert pairs.log_weights.dtype == pairs.keys.dtype == dtype
    want = torch.full((1, 1, 3), math.log(0.3), dtype=dtype)
    assert torch.equal(pairs.log_weights, want)
    assert logits(model, **inputs_for("gqa")).isfinite().all()


def test_set_in_inference_mode_it_can_be_changed_and_trained_outside() -> None:
    model, inputs = with_two(), inputs_for("gqa")
    with torch.inference_mode():
        set_scale(model, a=0.5, b=0.5)
    set_scale(model, b=0.25)
    model.set_adapter("b")
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="aot_eager")
    compiled(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradient: Tensor = hificl_layers(model)[0].hificl_W["b"].weight.grad
    assert gradient.any()
