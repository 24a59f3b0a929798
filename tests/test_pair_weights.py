"""`pair_weights=True`: a trained log-weight per pair and query head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_hificl import HiFICLConfig, VirtualPairs, concatenate_pairs
from peft_hificl.ops import merged

from . import oracle
from .helpers import adapted, build, config, hificl_layers, inputs_for, logits, pairs_for, train
from .zoo import recorded_attention


def weighted(kind: str, **kwargs: object) -> PeftModel:
    return adapted(kind, pair_weights=True, **kwargs)


def weights_of(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    return [layer.hificl_W[name].weight for layer in hificl_layers(model)]


def test_it_adds_a_parameter_per_pair_and_head() -> None:
    plain, more = (
        HiFICLConfig(n=8, r=8, pair_weights=pair_weights).parameter_shapes(32, 128, 128)
        for pair_weights in (False, True)
    )
    assert more == {**plain, "hificl_W": (32, 8)}
    numbers = [sum(torch.Size(shape).numel() for shape in shapes.values()) for shapes in (plain, more)]
    assert numbers[1] / numbers[0] == pytest.approx(1.0037, abs=1e-4)


@pytest.mark.parametrize("init_weights", [True, "unit_keys"])
def test_it_starts_as_the_paper_does(kind: str, init_weights: bool | str) -> None:
    model = weighted(kind, init_weights=init_weights)
    assert not any(weight.any() for weight in weights_of(model))
    want = logits(adapted(kind, init_weights=init_weights), **inputs_for(kind))
    torch.testing.assert_close(logits(model, **inputs_for(kind)), want, rtol=1e-5, atol=1e-5)


def oracle_of(call, pairs: VirtualPairs) -> Tensor:
    tensors = (call.query, call.key, call.value, pairs.keys, pairs.values)
    mask = torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool).tril()[None, None]
    scaling = call.query.shape[-1] ** -0.5 if call.options.get("scaling") is None else call.options["scaling"]
    return oracle.hificl(*tensors, scaling=scaling, mask=mask, log_weights=pairs.log_weights)[0].transpose(1, 2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_every_call_is_the_definition(implementation: str) -> None:
    model = weighted("gqa")
    model.get_base_model().set_attn_implementation(implementation)
    with torch.no_grad(), recorded_attention() as calls:
        model(**inputs_for("gqa"))
    for call in calls:
        pairs = pairs_for(call.module.virtual_pairs, len(call.query))
        assert pairs.log_weights.shape == (1, 4, 3) and pairs.log_weights.any()
        torch.testing.assert_close(call.output, oracle_of(call, pairs), rtol=1e-4, atol=1e-5)


def test_their_gradients_are_those_of_the_formula() -> None:
    model, inputs = weighted("gqa"), inputs_for("gqa")
    gradients = {}
    for implementation in ("eager", "sdpa"):  # the formula, differentiated by autograd; kernels
        model.get_base_model().set_attn_implementation(implementation)
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients[implementation] = [weight.grad.clone() for weight in weights_of(model)]
    for want, got in zip(*gradients.values(), strict=True):
        assert want.abs().min() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_they_train_and_reload(kind: str, tmp_path: Path) -> None:
    model = weighted(kind, init_weights=True)
    train(model, kind)
    assert all(weight.any() for weight in weights_of(model))
    model.save_pretrained(tmp_path)
    assert sum(key.endswith(".hificl_W") for key in load_file(tmp_path / "adapter_model.safetensors")) == 2
    want = logits(model, **inputs_for(kind))
    assert torch.equal(logits(PeftModel.from_pretrained(build(kind), tmp_path), **inputs_for(kind)), want)
    base = build(kind)
    base.load_adapter(tmp_path)  # transformers' own
    assert torch.equal(logits(base, **inputs_for(kind)), want)


def test_a_file_without_them_is_not_loaded_as_if_it_had(tmp_path: Path) -> None:
    adapted("gqa").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The adapter file lacks '.*hificl_W'"):
        PeftModel.from_pretrained(build("gqa"), tmp_path, config=config(pair_weights=True))
    weighted("gqa").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The adapter file has unexpected '.*hificl_W'"):
        PeftModel.from_pretrained(build("gqa"), tmp_path, config=config())


def test_rows_and_unions() -> None:
    model = weighted("gqa", name="a")
    torch.manual_seed(5)
    model.add_adapter("b", config(n=2))
    inputs = inputs_for("gqa")
    mixed = model(**inputs, adapter_names=["a", "b"]).logits
    alone = []
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        alone.append(logits(model, input_ids=inputs["input_ids"][row : row + 1])[0])
    torch.testing.assert_close(mixed, torch.stack(alone), rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["a", "b"])
    union = pairs_for(hificl_layers(model)[0])
    model.set_adapter("a")
    of_a = pairs_for(hificl_layers(model)[0])
    model.set_adapter("b")
    of_b = pairs_for(hificl_layers(model)[0])
    assert of_b.log_weights is None
    for got, want in zip(union[:3], concatenate_pairs([of_a, of_b])[:3], strict=True):
        assert torch.equal(got, want)
    assert torch.equal(union.log_weights, torch.cat([of_a.log_weights, torch.zeros(1, 4, 2)], dim=-1))


@pytest.mark.parametrize("options", [{}, {"scale_self_attention": False}, {"skip_first_token": True}], ids=str)
def test_training_compiles_whole_on_the_kernels(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = weighted("gqa", **options)
    inputs = inputs_for("gqa")
    inputs["labels"] = inputs["input_ids"]
    model(**inputs).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    monkeypatch.setattr(merged, "virtual_attention", lambda *args: pytest.fail("the formula"))
    torch._dynamo.reset()
    torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6, msg=name)
