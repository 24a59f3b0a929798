"""`balance_factors`: the same products and outputs from factors that share the singular values alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from peft_hificl import HiFICLLayer, balance_factors

from .helpers import adapted, hificl_layers, inputs_for, logits, train


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


def test_errors_change_nothing() -> None:
    model = adapted("gqa")
    with pytest.raises(ValueError, match="There is no HiFICL adapter 'other' on this model"):
        balance_factors(model, "other")
    layers = hificl_layers(model)
    before = factors_of(layers[0], "K")[0].detach().clone()
    layers[1].to("meta")
    with pytest.raises(ValueError, match="layers.1.self_attn' is offloaded: balance it before"):
        balance_factors(model)
    assert torch.equal(factors_of(layers[0], "K")[0], before)
