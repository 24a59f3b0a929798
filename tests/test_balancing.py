"""`balance_factors`: the same products and outputs from factors that share the singular values alike."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peft_hificl import HiFICLLayer, balance_factors, initialize_from_demonstrations

from .helpers import adapted, config, hificl_layers, inputs_for, logits, train


def factors_of(layer: HiFICLLayer, kind: str, name: str = "default") -> tuple[Tensor, Tensor]:
    return getattr(layer, f"hificl_{kind}_A")[name].weight, getattr(layer, f"hificl_{kind}_B")[name].weight


@pytest.mark.parametrize("changes", [{}, {"heads": "kv"}, {"pair_weights": True}, {"n": 3, "r": 5}, {"n": 5, "r": 2}])
def test_products_stay_and_factors_share_the_singular_values(changes: dict) -> None:
    model = adapted("gqa", **changes).double()
    before = copy.deepcopy(model)
    balance_factors(model)
    for new, old in zip(hificl_layers(model), hificl_layers(before), strict=True):
        for kind in "KV":
            (left, right), (old_left, old_right) = factors_of(new, kind), factors_of(old, kind)
            torch.testing.assert_close(left @ right, old_left @ old_right, atol=1e-12, rtol=1e-10)
            number = min(left.shape[1:])
            values = torch.linalg.svdvals(left @ right)[:, :number]
            torch.testing.assert_close(torch.linalg.svdvals(right)[:, :number], values.sqrt())
            gram = left[..., :number].mT @ left[..., :number]
            torch.testing.assert_close(gram, torch.diag_embed(values), atol=1e-10, rtol=0)
            assert (left - old_left).abs().max() > 0.01
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), logits(before, **inputs_for("gqa")))


def test_a_direction_without_size_can_still_be_learned() -> None:
    """Of r = 5 and n = 3, two columns of A meet rows of zeros; training moves these rows."""
    model = adapted("gqa", n=3, r=5)
    balance_factors(model)
    layer = hificl_layers(model)[0]
    left, right = factors_of(layer, "K")
    assert not right[:, 3:].any() and left[..., 3:].abs().min() > 0
    train(model, "gqa", steps=2)
    assert right[:, 3:].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_that_are_alike_leave_a_direction_that_can_be_learned(dtype: torch.dtype) -> None:
    model = adapted("gqa", n=4, r=4).to(dtype)
    initialize_from_demonstrations(model, {"input_ids": inputs_for("gqa", rows=1)["input_ids"]}, tokens=[2, 2, 5, 5])
    before = logits(model, **inputs_for("gqa")).float()
    balance_factors(model)
    for layer in hificl_layers(model):
        for kind in "KV":
            left, right = factors_of(layer, kind)
            assert right[:, :2].norm(dim=2).min() > 0 and not right[:, 2:].any()
            lengths = left.norm(dim=1)  # (H, r)
            assert (lengths[:, 2:] / lengths[:, :1]).aminmax().min > 0.2
            assert (lengths[:, 2:] / lengths[:, :1]).aminmax().max < 5
    torch.testing.assert_close(
        logits(model, **inputs_for("gqa")).float(), before, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0
    )


def test_nothing_is_drawn_where_every_direction_has_a_size() -> None:
    model = adapted("gqa")
    state = torch.get_rng_state()
    balance_factors(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_does_not_round_the_product() -> None:
    model = adapted("gqa")
    before = logits(model, **inputs_for("gqa"))
    with torch.autocast("cpu", torch.bfloat16):
        balance_factors(model)
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), before, atol=1e-5, rtol=1e-5)


def test_what_has_no_product_stays_as_it_is() -> None:
    """Balanced, two factors of zero would never learn: V_B of the paper's start is zero, and V_A is not."""
    model = adapted("gqa", init_weights=True)
    layer = hificl_layers(model)[0]
    left, right = (factor.detach().clone() for factor in factors_of(layer, "V"))
    keys = factors_of(layer, "K")[0].detach().clone()
    assert left.any() and not right.any()
    balance_factors(model)
    torch.testing.assert_close(factors_of(layer, "V"), (left, right), rtol=0, atol=0)
    assert not torch.equal(factors_of(layer, "K")[0], keys)


def test_what_is_learned_whole_stays_as_it_is() -> None:
    model = adapted("gqa", factorize_keys=False)
    layer = hificl_layers(model)[0]
    whole, left = layer.hificl_K["default"].weight.detach().clone(), factors_of(layer, "V")[0].detach().clone()
    balance_factors(model)
    assert torch.equal(layer.hificl_K["default"].weight, whole)
    assert not torch.equal(factors_of(layer, "V")[0], left)


def test_in_half_precision_the_product_is_that_of_half_precision() -> None:
    model = adapted("gqa").to(torch.bfloat16)
    layer = hificl_layers(model)[0]
    before = [left.float() @ right.float() for left, right in (factors_of(layer, kind) for kind in "KV")]
    balance_factors(model)
    for kind, old in zip("KV", before, strict=True):
        left, right = factors_of(layer, kind)
        assert left.dtype == torch.bfloat16
        assert (left.float() @ right.float() - old).norm() < 0.01 * old.norm()


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda weight: weight.to("meta"), "shape .4, 3, 2. on meta: the adapter is offloaded or sharded"),
        (lambda weight: weight.flatten(), "shape .24,. on cpu: the adapter is offloaded or sharded"),  # FSDP1
        (lambda weight: weight * float("nan"), "has weights that are not finite"),
    ],
)
def test_errors_change_nothing(break_it: Callable[[Tensor], Tensor], error: str) -> None:
    model = adapted("gqa")
    layers = hificl_layers(model)
    before = factors_of(layers[0], "K")[0].detach().clone()
    factor = layers[1].hificl_V_A["default"]
    factor.weight = torch.nn.Parameter(break_it(factor.weight.detach()))
    with pytest.raises(ValueError, match=f"hificl_V of 'model.layers.1.self_attn' .*{error}"):
        balance_factors(model)
    assert torch.equal(factors_of(layers[0], "K")[0], before)


def test_parameters_that_are_sharded_are_refused() -> None:
    """FSDP2's are DTensors, which have a mesh of devices, and the shape of the whole."""
    model = adapted("gqa")
    hificl_layers(model)[1].hificl_K_B["default"].weight.device_mesh = object()
    with pytest.raises(ValueError, match="the adapter is offloaded or sharded. Balance it before"):
        balance_factors(model)


def test_one_adapter_at_a_time() -> None:
    model = adapted("gqa")
    with pytest.raises(ValueError, match="There is no HiFICL adapter 'other' on this model"):
        balance_factors(model, "other")
    model.add_adapter("other", config())
    before = factors_of(hificl_layers(model)[0], "K")[0].detach().clone()
    with pytest.raises(ValueError, match=r"has \['default'\] as active HiFICL adapters: activate 'other' alone"):
        balance_factors(model, "other")
    model.set_adapter("other")
    balance_factors(model)
    assert torch.equal(factors_of(hificl_layers(model)[0], "K")[0], before)  # of the other one
