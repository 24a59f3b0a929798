"""The maths against its definition: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_hificl import VirtualPairs, concatenate_pairs, select_rows, virtual_attention

from . import oracle

GROUPS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
MASKS = ("none", "causal", "padded", "window", "additive", "per-head")
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


def check(inputs: dict[str, Tensor], dtype: torch.dtype, alpha_one: bool = False, **options: object) -> None:
    """Forward and all gradients, the package in `dtype` against the definition in float64."""
    want_in = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    want, alpha = oracle.hificl(**want_in, scaling=0.3, alpha_one=alpha_one, **options)
    got_in = {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}
    pairs = VirtualPairs(got_in["virtual_keys"], got_in["virtual_values"], scale_self_attention=not alpha_one)
    got, weights = virtual_attention(got_in["query"], got_in["key"], got_in["value"], pairs, scaling=0.3, **options)
    assert got.dtype == dtype

    def same(name: str, a: Tensor, b: Tensor) -> None:
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-3)
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"

    same("output", got, want)
    if not alpha_one and options.get("sinks") is None:
        same("alpha", weights.sum(-1), alpha)
    direction = torch.randn_like(want)
    grads_want = torch.autograd.grad(want, list(want_in.values()), direction)
    grads_got = torch.autograd.grad(got, list(got_in.values()), direction.to(dtype))
    for name, a, b in zip(inputs, grads_got, grads_want, strict=True):
        same(f"gradient of {name}", a, b)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", GROUPS)
def test_masks_and_groups(groups: str, mask: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, kv = GROUPS[groups]
    check(tensors(heads, kv, 5, 5, 6, 6, 3), dtype, mask=mask_of(mask, 5, 5, heads))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "case", ["decode", "chunk", "value-dim", "softcap", "bias", "sinks", "alpha-1", "alpha-1-sinks", "one-pair"]
)
@pytest.mark.parametrize("groups", GROUPS)
def test_variants(groups: str, case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    heads, kv = GROUPS[groups]
    length, size, e, n = 4, 4, 6, 3
    options: dict[str, object] = {}
    if case == "decode":
        length, size = 1, 9
    if case == "chunk":  # several new tokens on a cache
        length, size = 3, 8
    if case == "value-dim":
        e = 10
    if case == "one-pair":
        n = 1
    if case == "softcap":
        options["softcap"] = 0.7
    if case == "bias":
        options["bias"] = torch.randn(1, heads, length, size, dtype=torch.float64)
    if "sinks" in case:
        options["sinks"] = torch.randn(heads, dtype=torch.float64)
    options["mask"] = mask_of("causal", length, size, heads)
    check(tensors(heads, kv, length, size, 6, e, n), dtype, alpha_one="alpha-1" in case, **options)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    length=st.integers(1, 4),
    past=st.integers(0, 4),
    d=st.integers(1, 5),
    e=st.integers(1, 5),
    n=st.integers(1, 4),
    mask=st.sampled_from(["none", "causal"]),
    alpha_one=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(batch, groups, per_group, length, past, d, e, n, mask, alpha_one, seed) -> None:
    torch.manual_seed(seed)
    heads = groups * per_group
    inputs = tensors(heads, groups, length, length + past, d, e, n, batch)
    check(inputs, torch.float64, alpha_one, mask=mask_of(mask, length, length + past, heads, batch))


def test_it_is_softmax_attention_over_the_concatenation() -> None:
    torch.manual_seed(2)
    x = tensors(4, 4, 5, 5, 6, 6, 3)
    causal = mask_of("causal", 5, 5, 4)
    got, _ = virtual_attention(
        x["query"], x["key"], x["value"], VirtualPairs(x["virtual_keys"], x["virtual_values"]), scaling=0.3, mask=causal
    )
    keys = torch.cat([x["virtual_keys"].expand(2, -1, -1, -1), x["key"]], dim=2)
    values = torch.cat([x["virtual_values"].expand(2, -1, -1, -1), x["value"]], dim=2)
    visible = torch.cat([torch.ones(1, 1, 5, 3, dtype=torch.bool), causal], dim=-1)
    want = torch.nn.functional.scaled_dot_product_attention(x["query"], keys, values, attn_mask=visible, scale=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_several_sets_share_one_softmax() -> None:
    torch.manual_seed(3)
    x, y = tensors(4, 2, 3, 3, 6, 6, 3), tensors(4, 2, 3, 3, 6, 6, 2)
    union = concatenate_pairs([VirtualPairs(z["virtual_keys"], z["virtual_values"]) for z in (x, y)])
    got, _ = virtual_attention(x["query"], x["key"], x["value"], union, scaling=0.3)
    both = [torch.cat([x[name], y[name]], dim=2) for name in ("virtual_keys", "virtual_values")]
    want, _ = oracle.hificl(x["query"], x["key"], x["value"], *both, scaling=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_log_weights_count_a_pair_that_often() -> None:
    torch.manual_seed(4)
    x = tensors(4, 2, 3, 3, 6, 6, 3)
    log_weights = torch.tensor([0.0, 1.5, float("-inf")], dtype=torch.float64).expand(1, 4, 3)
    pairs = VirtualPairs(x["virtual_keys"], x["virtual_values"], log_weights)
    got, _ = virtual_attention(x["query"], x["key"], x["value"], pairs, scaling=0.3)
    want, _ = oracle.hificl(**x, scaling=0.3, log_weights=log_weights)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    plain = VirtualPairs(x["virtual_keys"][:, :, 2:], x["virtual_values"][:, :, 2:])
    union = concatenate_pairs([pairs, plain])  # the third pair counts again, once
    assert union.log_weights is not None and union.log_weights.shape == (1, 4, 4)
    assert union.log_weights[0, 0].tolist() == [0.0, 1.5, float("-inf"), 0.0]


def test_pairs_per_row_and_per_key_value_head() -> None:
    torch.manual_seed(5)
    x = tensors(4, 2, 3, 3, 6, 6, 3)
    keys, values = torch.randn(2, 2, 2, 3, 6, dtype=torch.float64)  # (B, G, n, d): per row, shared in a group
    got, _ = virtual_attention(x["query"], x["key"], x["value"], VirtualPairs(keys, values), scaling=0.3)
    expanded = [t.repeat_interleave(2, dim=1) for t in (keys, values)]
    want, _ = oracle.hificl(x["query"], x["key"], x["value"], *expanded, scaling=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_select_rows_gives_each_row_its_own_set() -> None:
    torch.manual_seed(6)
    x, y = tensors(4, 2, 3, 3, 6, 6, 3), tensors(4, 2, 3, 3, 6, 6, 1)
    sets = [
        VirtualPairs(x["virtual_keys"], x["virtual_values"]),
        None,
        VirtualPairs(y["virtual_keys"], y["virtual_values"]),
    ]
    q, k, v = (torch.randn_like(x[name][:1]).repeat(3, 1, 1, 1) for name in ("query", "key", "value"))
    got, _ = virtual_attention(q, k, v, select_rows(sets, [2, 1, 0]), scaling=0.3)
    one = q[:1], k[:1], v[:1]
    torch.testing.assert_close(got[:1], virtual_attention(*one, sets[2], scaling=0.3)[0])
    bare = torch.nn.functional.scaled_dot_product_attention(*one, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got[1:2], bare)
    torch.testing.assert_close(got[2:], virtual_attention(*one, sets[0], scaling=0.3)[0])
    assert select_rows([None], [0, 0]) is None


def test_sets_that_disagree_about_alpha_are_refused() -> None:
    keys = torch.zeros(1, 2, 1, 4)
    sets = [VirtualPairs(keys, keys), VirtualPairs(keys, keys, scale_self_attention=False)]
    with pytest.raises(ValueError, match="scale_self_attention"):
        concatenate_pairs(sets)
    with pytest.raises(ValueError, match="scale_self_attention"):
        select_rows(sets, [0, 1])


@pytest.mark.parametrize("alpha_one", [False, True], ids=["alpha", "alpha-1"])
@pytest.mark.parametrize("mask_kind", ["bool", "additive"])
def test_a_row_that_sees_nothing_stays_finite(mask_kind: str, alpha_one: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    pairs = VirtualPairs(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8, requires_grad=True), None, not alpha_one)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    if mask_kind == "additive":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    out, _ = virtual_attention(q, k, v, pairs, scaling=0.3, mask=mask)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(pairs.values.grad).all()
    if not alpha_one:  # only the virtual pairs are seen
        scores = (q @ pairs.keys.transpose(-1, -2) * 0.3).softmax(-1)
        torch.testing.assert_close(out, scores @ pairs.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_mixes_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    x = tensors(4, 2, 6, 6, 8, 8, 3)
    halves = {k: v.to(dtype) for k, v in x.items() if not k.startswith("virtual")}
    pairs = VirtualPairs(x["virtual_keys"].float(), x["virtual_values"].float())
    got, _ = virtual_attention(**halves, pairs=pairs, scaling=0.3, mask=mask_of("causal", 6, 6, 4))
    exact = {**x, **{k: v.double() for k, v in halves.items()}}
    want, _ = oracle.hificl(**exact, scaling=0.3, mask=mask_of("causal", 6, 6, 4))
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_float32(dtype: torch.dtype, autocast: bool) -> None:
    """Scores beyond the range of fp16, and differences between them finer than bf16's steps."""
    torch.manual_seed(9)
    x = {name: tensor.to(dtype) for name, tensor in tensors(4, 2, 6, 6, 64, 64, 3).items()}
    x["query"], x["key"] = x["query"] * 64, x["key"] * 64
    x["virtual_keys"] = x["virtual_keys"] * 64
    assert (x["query"].float() @ x["key"].float().repeat_interleave(2, 1).mT).max() > torch.finfo(torch.float16).max
    pairs = VirtualPairs(x["virtual_keys"], x["virtual_values"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, weights = virtual_attention(x["query"], x["key"], x["value"], pairs, scaling=2e-5)
    want, alpha = oracle.hificl(**{name: tensor.double() for name, tensor in x.items()}, scaling=2e-5)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(weights.sum(-1).double(), alpha, rtol=1e-5, atol=1e-6)


def test_dropout_drops_virtual_and_context_weights_alike() -> None:
    torch.manual_seed(8)
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    pairs = VirtualPairs(torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8))
    _, weights = virtual_attention(q, k, v, pairs, scaling=0.3, dropout=0.5)
    assert 0.4 < (weights == 0).float().mean() < 0.6
    mean = torch.stack([virtual_attention(q, k, v, pairs, scaling=0.3, dropout=0.5)[0] for _ in range(400)]).mean(0)
    want, _ = virtual_attention(q, k, v, pairs, scaling=0.3)
    assert (mean - want).abs().max() < 0.1
