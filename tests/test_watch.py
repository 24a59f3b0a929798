"""An adapter that has no effect, or gets no gradient, is reported: once, and never without need."""

from __future__ import annotations

import copy
import gc
import types
import warnings
import weakref
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from peft_hificl import HiFICLConfig, HiFICLLayer

from .architectures import FAMILIES, Family, adapt, build, forward_inputs
from .helpers import inputs_for, llama
from .zoo import each

IDS = inputs_for("gqa")["input_ids"]
NO_EFFECT, NO_GRADIENT = "had no effect", "no gradient has reached"


def adapted(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(llama(), HiFICLConfig(n=3, r=2, init_weights=False, **kwargs))


def reports(model: nn.Module, backward: bool = False, **inputs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model(**({"input_ids": IDS, "labels": IDS if backward else None} | inputs))
        if backward:
            output.loss.backward()
    return [text for w in caught if NO_EFFECT in (text := str(w.message)) or NO_GRADIENT in text]


# -- effect -----------------------------------------------------------------------------------------------------------


def other_forward(self: nn.Module, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    return self.o_proj(self.q_proj(hidden_states)), None


def replaced_on_the_instance(model: Any) -> None:
    attention = model.get_base_model().model.layers[1].self_attn
    attention.forward = types.MethodType(other_forward, attention)


def replaced_module_around_it(model: Any) -> None:
    layer = model.get_base_model().model.layers[1]
    layer.forward = types.MethodType(lambda self, hidden_states, **kwargs: self.mlp(hidden_states), layer)


@pytest.mark.parametrize("replace", [replaced_on_the_instance, replaced_module_around_it])
def test_a_forward_that_is_replaced_after_attaching_is_reported_once(replace: Any) -> None:
    model = adapted()
    assert reports(model) == []
    replace(model)
    (report,) = reports(model)
    assert "layers.1.self_attn" in report and "1 attention module(s)" in report
    assert reports(model) == []


def test_replaced_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setattr(type(model.get_base_model().model.layers[0].self_attn), "forward", other_forward)
    (report,) = reports(model)
    assert "2 attention module(s)" in report


def test_an_adapter_that_is_to_have_no_effect_is_not_reported() -> None:
    model = adapted()
    replaced_on_the_instance(model)
    with model.disable_adapter():
        assert reports(model) == []
    model = adapted(layers_to_transform=[0])
    replaced_on_the_instance(model)  # of a layer without an adapter
    assert reports(model) == []


def test_a_copy_watches_itself() -> None:
    model = adapted()
    clone = copy.deepcopy(model)
    replaced_on_the_instance(clone)
    assert reports(model) == [] and len(reports(clone)) == 1


@each(tuple(f for f in FAMILIES))
def test_no_family_is_reported_in_forward_and_generate(family: Family) -> None:
    model = adapt(build(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", f".*{NO_EFFECT}")
        with torch.no_grad():
            model(**forward_inputs(family, model.get_base_model()))
            if family.generates:
                model.generate(**family.inputs(), max_new_tokens=2, min_new_tokens=2)


def test_towers_that_have_nothing_to_see_are_not_reported() -> None:
    from .helpers import build as build_kind

    model = get_peft_model(build_kind("vlm"), HiFICLConfig(target_modules=r".*self_attn", init_weights=False))
    assert any("vision" in name for name, m in model.named_modules() if isinstance(m, HiFICLLayer))
    assert reports(model) == []
    assert reports(model, **inputs_for("vlm")) == []


# -- gradient ---------------------------------------------------------------------------------------------------------


class ForInference(nn.Linear):
    """As kernels that quantise activations: its result requires a gradient, and the input never gets one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.detach()) + self.bias * 0


def block_gradients(model: Any, layers: list[int]) -> None:
    for index in layers:
        attention = model.get_base_model().model.layers[index].self_attn
        linear = attention.o_proj
        blocking = ForInference(linear.in_features, linear.out_features)
        blocking.load_state_dict({"weight": linear.weight, "bias": torch.zeros(linear.out_features)})
        attention.o_proj = blocking.requires_grad_(True)


def test_an_adapter_without_a_gradient_is_reported_once() -> None:
    model = adapted()
    block_gradients(model, [0, 1])
    (report,) = reports(model, backward=True)
    assert "2 of 2" in report and "layers.0.self_attn" in report
    assert reports(model, backward=True) == []
    assert all(p.grad is None for n, p in model.named_parameters() if "hificl_" in n)


def test_some_of_the_layers_without_a_gradient() -> None:
    model = adapted()
    block_gradients(model, [1])
    (report,) = reports(model, backward=True)
    assert "1 of 2" in report and "layers.1.self_attn" in report


def test_a_second_adapter_is_watched_too() -> None:
    model = adapted()
    assert reports(model, backward=True) == []
    model.add_adapter("b", HiFICLConfig(n=3, r=2, init_weights=False))
    model.set_adapter("b")
    block_gradients(model, [0, 1])
    assert len(reports(model, backward=True)) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_training_with_gradient_checkpointing_is_not_reported(use_reentrant: bool) -> None:
    model = adapted().train()
    model.enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for _ in range(2):
        assert reports(model, backward=True) == []
    assert all(p.grad is not None for n, p in model.named_parameters() if "hificl_" in n)


def test_forwards_without_a_backward_and_several_before_one() -> None:
    model = adapted()
    assert reports(model) == []  # evaluated, with gradients enabled
    model.add_adapter("b", HiFICLConfig(n=3, r=2, init_weights=False))
    model.set_adapter("b")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{NO_GRADIENT}")
        first, second = (model(input_ids=IDS, labels=IDS).loss for _ in range(2))
        (first + second).backward()
        (model(input_ids=IDS).logits.sum() + model(input_ids=IDS).logits.sum()).backward()


def test_a_checkpointed_model_as_a_whole() -> None:
    model = adapted()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{NO_GRADIENT}")
        checkpoint(lambda ids: model(input_ids=ids).logits, IDS, use_reentrant=False).sum().backward()


def test_gradients_of_inputs_alone() -> None:
    """A backward that does not come to the pairs tells nothing of them."""
    model = adapted()
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{NO_GRADIENT}")
        torch.autograd.grad(model(inputs_embeds=embeds).logits.sum(), embeds)
        model(inputs_embeds=embeds).logits.sum().backward(inputs=[embeds])


def test_layers_that_are_taken_out_are_not_missed() -> None:
    """As for the stages of a pipeline."""
    model = adapted()
    decoder = model.get_base_model().model
    decoder.layers[1] = PipelineIdentityLayer()
    assert reports(model, backward=True) == []
    decoder.layers = decoder.layers[:1]
    assert reports(model, backward=True) == []


@pytest.mark.parametrize(
    "form", [lambda output: output.loss, lambda output: (output.loss, output.logits), lambda o: [o]]
)
def test_models_that_return_something_else(form: Any) -> None:
    """A loss alone, a tuple, or what the watch knows nothing of."""
    model = adapted()
    base = model.get_base_model()
    forward = type(base).forward
    base.forward = types.MethodType(lambda self, **kwargs: form(forward(self, **kwargs)), base)
    block_gradients(model, [0, 1])
    output = model(input_ids=IDS, labels=IDS)
    loss = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output[0].loss
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss.backward()
    assert len([w for w in caught if NO_GRADIENT in str(w.message)]) == (not isinstance(output, list))


def test_compiled_models_are_not_reported() -> None:
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager")
    assert reports(compiled, backward=True) == []
    model = adapted()
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager")
    assert reports(model, backward=True) == []


def test_a_layer_that_dynamo_traces_is_not_watched() -> None:
    layer = next(m for m in adapted().modules() if isinstance(m, HiFICLLayer))
    call = [torch.empty(1, 0)] * 3
    want = layer(*call)
    layer.awaits_gradient.clear()
    calls = layer.calls
    torch._dynamo.reset()
    got = torch.compile(layer, backend="eager", fullgraph=True)(*call)
    assert torch.equal(got.keys, want.keys) and torch.equal(got.values, want.values) and got.keys.requires_grad
    assert (layer.awaits_gradient, layer.calls) == (set(), calls)


def test_an_adapter_that_has_had_a_gradient_is_not_watched_again() -> None:
    model = adapted()
    layer = next(m for m in model.modules() if isinstance(m, HiFICLLayer))
    assert layer.had_gradient == {"default": False}
    assert reports(model, backward=True) == []
    assert layer.had_gradient == {"default": True}
    block_gradients(model, [0, 1])
    assert reports(model, backward=True) == [] and not layer.awaits_gradient


def test_an_adapter_may_be_deleted_before_its_backward() -> None:
    model = adapted()
    model.add_adapter("b", HiFICLConfig(n=3, r=2))
    loss = model(input_ids=IDS, labels=IDS).loss
    model.delete_adapter("default")
    loss.backward()
    layers = [m for m in model.modules() if isinstance(m, HiFICLLayer)]
    assert all(layer.had_gradient == {"b": False} and not layer.awaits_gradient for layer in layers)


def test_a_forward_without_a_backward_keeps_nothing() -> None:
    """No cycle of a hook and what it hangs on, which would keep the activations until Python looks for cycles."""
    model, seen = adapted().train(), []
    for layer in model.modules():
        if isinstance(layer, HiFICLLayer):  # whose attention saves the query for its backward
            layer.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    gc.collect()
    gc.disable()
    try:
        model(input_ids=IDS)
        assert seen and not any(query() is not None for query in seen)
    finally:
        gc.enable()
