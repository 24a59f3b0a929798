"""The maths against its definition: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_hificl import Scoring, VirtualPairs, concatenate_pairs, select_rows, virtual_attention

from . import oracle
from .helpers import GROUPS, MASKS, TOLERANCE, mask_of, tensors


def check(inputs: dict[str, Tensor], dtype: torch.dtype, alpha_one: bool = False, **options: object) -> None:
    """Forward and all gradients, the package in `dtype` against the definition in float64."""
    want_in = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    of_oracle = {k: v for k, v in options.items() if k != "is_causal"}
    if options.get("is_causal"):  # query t sees the keys 0..t of those that the mask leaves
        first = torch.ones(inputs["query"].shape[2], inputs["key"].shape[2], dtype=torch.bool).tril()
        of_oracle["mask"] = first[None, None] if options.get("mask") is None else options["mask"] & first
    want, alpha = oracle.hificl(**want_in, scaling=0.3, alpha_one=alpha_one, **of_oracle)
    got_in = {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}
    pairs = VirtualPairs(got_in["virtual_keys"], got_in["virtual_values"], scale_self_attention=not alpha_one)
    got, weights = virtual_attention(got_in["query"], got_in["key"], got_in["value"], pairs, Scoring(0.3, **options))
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
    "case",
    [
        "decode", "chunk", "value-dim", "softcap", "bias", "sinks", "alpha-1", "alpha-1-sinks", "one-pair",
        "is-causal", "is-causal-chunk", "is-causal-masked",
    ],
)  # fmt: skip
@pytest.mark.parametrize("groups", GROUPS)
def test_variants(groups: str, case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    heads, kv = GROUPS[groups]
    length, size, e, n = 4, 4, 6, 3
    options: dict[str, object] = {}
    if case == "decode":
        length, size = 1, 9
    if "chunk" in case:  # several new tokens on a cache
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
    if "is-causal" in case:
        seen = (torch.rand(2, 1, length, size) < 0.7) | torch.eye(length, size, dtype=torch.bool)
        options |= {"mask": seen if "masked" in case else None, "is_causal": True}
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
        x["query"],
        x["key"],
        x["value"],
        VirtualPairs(x["virtual_keys"], x["virtual_values"]),
        Scoring(0.3, mask=causal),
    )
    keys = torch.cat([x["virtual_keys"].expand(2, -1, -1, -1), x["key"]], dim=2)
    values = torch.cat([x["virtual_values"].expand(2, -1, -1, -1), x["value"]], dim=2)
    visible = torch.cat([torch.ones(1, 1, 5, 3, dtype=torch.bool), causal], dim=-1)
    want = torch.nn.functional.scaled_dot_product_attention(x["query"], keys, values, attn_mask=visible, scale=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha_one", [False, True], ids=["alpha", "alpha-1"])
@pytest.mark.parametrize("weighted", ["none", "first", "second", "both"])
@pytest.mark.parametrize("per_row", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_several_sets_share_one_softmax(per_row: tuple[int, int], weighted: str, alpha_one: bool) -> None:
    """Each may hold the pairs of all rows or of each, and weights of its own or none."""
    torch.manual_seed(3)
    x = tensors(4, 2, 3, 3, 6, 6, 1)
    sets, weights = [], []
    for place, (rows, n) in enumerate(zip(per_row, (3, 2), strict=True)):
        keys, values = torch.randn(2, rows, 4, n, 6, dtype=torch.float64)
        own = torch.randn(rows, 4, n, dtype=torch.float64) if weighted in (("first", "second")[place], "both") else None
        sets.append(VirtualPairs(keys, values, own, not alpha_one))
        weights.append(torch.zeros(rows, 4, n, dtype=torch.float64) if own is None else own)
    union = concatenate_pairs(sets)
    assert (union.log_weights is None) == (weighted == "none")
    got, _ = virtual_attention(x["query"], x["key"], x["value"], union, Scoring(0.3))
    for row in (0, 1):
        one = [x[name][row : row + 1] for name in ("query", "key", "value")]
        both = [
            torch.cat([t[row if len(t) > 1 else 0][None] for t in parts], dim=2)
            for parts in ([pairs.keys for pairs in sets], [pairs.values for pairs in sets], weights)
        ]
        want, _ = oracle.hificl(*one, *both[:2], scaling=0.3, log_weights=both[2], alpha_one=alpha_one)
        torch.testing.assert_close(got[row : row + 1], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", ["keys", "values", "log_weights"])
def test_what_differs_per_row_may_be_one_of_a_set_alone(which: str) -> None:
    torch.manual_seed(3)
    x = tensors(4, 2, 3, 3, 6, 6, 2)
    shared = VirtualPairs(x["virtual_keys"], x["virtual_values"], torch.zeros(1, 1, 2, dtype=torch.float64))
    of_rows = {"keys": (2, 4, 2, 6), "values": (2, 4, 2, 6), "log_weights": (2, 4, 2)}
    mixed = shared._replace(**{which: torch.randn(of_rows[which], dtype=torch.float64)})
    got, _ = virtual_attention(x["query"], x["key"], x["value"], concatenate_pairs([shared, mixed]), Scoring(0.3))
    for row in (0, 1):
        row_of = [t[row if len(t) > 1 else 0][None] for t in (mixed.keys, mixed.values, mixed.log_weights)]
        want, _ = oracle.hificl(
            *(x[name][row : row + 1] for name in ("query", "key", "value")),
            torch.cat([shared.keys, row_of[0]], 2), torch.cat([shared.values, row_of[1]], 2), scaling=0.3,
            log_weights=torch.cat([shared.log_weights.expand(1, 4, 2), row_of[2].expand(1, 4, 2)], 2),
        )  # fmt: skip
        torch.testing.assert_close(got[row : row + 1], want, rtol=0, atol=1e-12)


def test_log_weights_count_a_pair_that_often() -> None:
    torch.manual_seed(4)
    x = tensors(4, 2, 3, 3, 6, 6, 3)
    log_weights = torch.tensor([0.0, 1.5, float("-inf")], dtype=torch.float64).expand(1, 4, 3)
    pairs = VirtualPairs(x["virtual_keys"], x["virtual_values"], log_weights)
    got, _ = virtual_attention(x["query"], x["key"], x["value"], pairs, Scoring(0.3))
    want, _ = oracle.hificl(**x, scaling=0.3, log_weights=log_weights)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert concatenate_pairs([pairs]) is pairs
    plain = VirtualPairs(x["virtual_keys"][:, :, 2:], x["virtual_values"][:, :, 2:])
    union = concatenate_pairs([pairs, plain])  # the third pair counts again, once
    assert union.log_weights is not None and union.log_weights.shape == (1, 4, 4)
    assert union.log_weights[0, 0].tolist() == [0.0, 1.5, float("-inf"), 0.0]
    # One per query head, of pairs that the heads of a group share: alone, in a union and chosen for a row.
    shared = pairs._replace(
        keys=pairs.keys[:, ::2], values=pairs.values[:, ::2], log_weights=torch.randn_like(log_weights)
    )
    expanded = [t.repeat_interleave(2, dim=1) for t in shared[:2]]
    want, _ = oracle.hificl(x["query"], x["key"], x["value"], *expanded, scaling=0.3, log_weights=shared.log_weights)
    nothing = shared._replace(log_weights=torch.full((1, 1, 3), -torch.inf, dtype=torch.float64))
    for same in (shared, concatenate_pairs([shared, nothing]), select_rows([shared, nothing], [0, 0])):
        got, _ = virtual_attention(x["query"], x["key"], x["value"], same, Scoring(0.3))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_pairs_per_row_and_per_key_value_head() -> None:
    torch.manual_seed(5)
    x = tensors(4, 2, 3, 3, 6, 6, 3)
    keys, values = torch.randn(2, 2, 2, 3, 6, dtype=torch.float64)  # (B, G, n, d): per row, shared in a group
    got, _ = virtual_attention(x["query"], x["key"], x["value"], VirtualPairs(keys, values), Scoring(0.3))
    expanded = [t.repeat_interleave(2, dim=1) for t in (keys, values)]
    want, _ = oracle.hificl(x["query"], x["key"], x["value"], *expanded, scaling=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha_one", [False, True], ids=["alpha", "alpha-1"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "log-weights"])
def test_select_rows_gives_each_row_its_own_set(weighted: bool, alpha_one: bool) -> None:
    torch.manual_seed(6)
    x, y = tensors(4, 2, 3, 3, 6, 6, 3, batch=1), tensors(4, 2, 3, 3, 6, 6, 1)
    log_weights = torch.randn(1, 4, 1, dtype=torch.float64) if weighted else None
    sets = [
        VirtualPairs(x["virtual_keys"], x["virtual_values"], None, not alpha_one),
        None,
        VirtualPairs(y["virtual_keys"], y["virtual_values"], log_weights, not alpha_one),
    ]
    one = x["query"], x["key"], x["value"]
    pairs = select_rows(sets, [2, 1, 0, 2])
    assert pairs is not None and pairs.keys.shape == (4, 4, 3, 6)
    got, _ = virtual_attention(*(t.expand(4, -1, -1, -1) for t in one), pairs, Scoring(0.3))
    long, _ = oracle.hificl(**x, scaling=0.3, alpha_one=alpha_one)
    short, _ = oracle.hificl(
        *one, y["virtual_keys"], y["virtual_values"], scaling=0.3, log_weights=log_weights, alpha_one=alpha_one
    )
    bare = torch.nn.functional.scaled_dot_product_attention(*one, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, torch.cat([short, bare, long, short]), rtol=0, atol=1e-12)
    got, _ = virtual_attention(
        *(t.expand(2, -1, -1, -1) for t in one), select_rows([None, sets[0]], [1, 0]), Scoring(0.3)
    )
    torch.testing.assert_close(got, torch.cat([long, bare]), rtol=0, atol=1e-12)
    assert select_rows([None], [0, 0]) is None


def test_sets_that_disagree_about_alpha_are_refused() -> None:
    keys = torch.zeros(1, 2, 1, 4)
    sets = [VirtualPairs(keys, keys), VirtualPairs(keys, keys, scale_self_attention=False)]
    with pytest.raises(ValueError, match="scale_self_attention"):
        concatenate_pairs(sets)
    with pytest.raises(ValueError, match="scale_self_attention"):
        select_rows(sets, [0, 1])


def test_the_widest_dtype_computes_and_the_values_own_is_returned() -> None:
    torch.manual_seed(10)
    x = {name: tensor * 8 for name, tensor in tensors(4, 2, 3, 3, 6, 6, 3).items()}  # scores of some 100
    x |= {name: x[name].float().double() for name in ("query", "key", "value")}
    q, k, v = (x[name].float() for name in ("query", "key", "value"))
    want, alpha = oracle.hificl(**x, scaling=0.3)
    got, weights = virtual_attention(q, k, v, VirtualPairs(x["virtual_keys"], x["virtual_values"]), Scoring(0.3))
    torch.testing.assert_close(weights.sum(-1), alpha, rtol=0, atol=1e-12)
    assert torch.equal(got, want.float())
    narrow = VirtualPairs(x["virtual_keys"].half(), x["virtual_values"].half())
    got, weights = virtual_attention(q, k, v.half(), narrow, Scoring(0.3))
    assert (got.dtype, weights.dtype) == (torch.float16, torch.float32)


def test_devices_without_autocast_or_values() -> None:
    x = {name: tensor.to("meta") for name, tensor in tensors(4, 2, 3, 5, 6, 7, 3).items()}
    pairs = VirtualPairs(x["virtual_keys"], x["virtual_values"])
    got, weights = virtual_attention(x["query"], x["key"], x["value"], pairs, Scoring(0.3, is_causal=True))
    assert got.shape == (2, 4, 3, 7) and weights.shape == (2, 4, 3, 5) and got.is_meta and weights.is_meta


@pytest.mark.parametrize("alpha_one", [False, True], ids=["alpha", "alpha-1"])
@pytest.mark.parametrize("mask_kind", ["bool", "minimum", "-inf", "wider-minimum"])
def test_a_row_that_sees_nothing_stays_finite(mask_kind: str, alpha_one: bool) -> None:
    torch.manual_seed(6)
    q, k, v = torch.randn(3, 1, 2, 4, 8).requires_grad_()
    pairs = VirtualPairs(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8, requires_grad=True), None, not alpha_one)
    visible = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(-1)  # the first query sees nothing
    lowest = {
        "minimum": torch.tensor(torch.finfo(torch.float32).min),
        "-inf": torch.tensor(-torch.inf),
        "wider-minimum": torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64),
    }
    mask = visible if mask_kind == "bool" else torch.where(visible, 0.0, lowest[mask_kind])
    out, weights = virtual_attention(q, k, v, pairs, Scoring(0.3, mask=mask))
    gradients = torch.autograd.grad(out.sum(), [q, k, v, pairs.values])
    assert all(torch.isfinite(t).all() for t in (out, weights, *gradients))
    virtual = (q[:, :, :1] @ pairs.keys.mT * 0.3).softmax(-1) @ pairs.values  # all that the first query sees
    if alpha_one:  # as transformers' eager attention: the mean of what is masked
        virtual = virtual + v.mean(dim=2, keepdim=True)
    torch.testing.assert_close(out[:, :, :1], virtual, rtol=1e-5, atol=1e-6)
    want, _ = oracle.hificl(
        *(t.double() for t in (q[:, :, 1:], k, v, pairs.keys, pairs.values)), scaling=0.3, mask=visible[:, :, 1:],
        alpha_one=alpha_one,
    )  # fmt: skip
    torch.testing.assert_close(out[:, :, 1:].double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_mixes_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    x = tensors(4, 2, 6, 6, 8, 8, 3)
    halves = {k: v.to(dtype) for k, v in x.items() if not k.startswith("virtual")}
    pairs = VirtualPairs(x["virtual_keys"].float(), x["virtual_values"].float())
    got, _ = virtual_attention(**halves, pairs=pairs, scoring=Scoring(0.3, mask=mask_of("causal", 6, 6, 4)))
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
        got, weights = virtual_attention(x["query"], x["key"], x["value"], pairs, Scoring(2e-5))
    want, alpha = oracle.hificl(**{name: tensor.double() for name, tensor in x.items()}, scaling=2e-5)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(weights.sum(-1).double(), alpha, rtol=1e-5, atol=1e-6)


def test_dropout_drops_virtual_and_context_weights_alike() -> None:
    """Each weight is dropped, or counts 1 / (1 - p) times; the values are unit vectors, which show every weight."""
    torch.manual_seed(8)
    q, k = torch.randn(2, 1, 2, 64, 8)
    zero, unit = torch.zeros(1, 2, 64, 64), torch.eye(64).expand(1, 2, 64, 64)
    keys = torch.randn(1, 2, 64, 8)
    scores = torch.cat([q @ k.mT, q @ keys.mT], dim=-1) * 0.3
    kept = scores.softmax(-1) / 0.75
    for scale in (True, False):
        context = kept[..., :64] if scale else scores[..., :64].softmax(-1) / 0.75
        for values, of_pairs, want in ((unit, zero, context), (zero, unit, kept[..., 64:])):
            pairs = VirtualPairs(keys, of_pairs, None, scale)
            got, weights = virtual_attention(q, k, values, pairs, Scoring(0.3, dropout=0.25))
            assert 0.2 < (got == 0).float().mean() < 0.3
            torch.testing.assert_close(got, torch.where(got == 0, 0.0, want), rtol=1e-5, atol=1e-7)
            if values is unit:
                assert torch.equal(weights, got)


def test_key_value_heads_are_never_expanded() -> None:
    """For the backward, keys and values are kept with the heads that they came with."""
    x = tensors(4, 2, 2, 7, 6, 5, 3)
    q, k, v = (x[name].requires_grad_() for name in ("query", "key", "value"))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        virtual_attention(q, k, v, VirtualPairs(x["virtual_keys"], x["virtual_values"]), Scoring(0.3))
    cached = [t for t in saved if set(t.shape[-2:]) in ({7, 6}, {7, 5})]
    assert len(cached) == 2 and {t.numel() for t in cached} == {k.numel(), v.numel()}


class Attention(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return virtual_attention(query, key, value, VirtualPairs(keys, values), Scoring(0.3))[0]


@pytest.mark.parametrize("groups", GROUPS)
def test_it_exports_for_any_number_of_queries_and_keys(groups: str) -> None:
    torch.manual_seed(11)
    heads, kv = GROUPS[groups]
    queries, keys = torch.export.Dim("queries", min=2), torch.export.Dim("keys", min=2)
    shapes = {2: queries}, {2: keys}, {2: keys}, None, None
    example = tuple(tensors(heads, kv, 7, 6, 4, 5, 2, batch=4).values())
    exported = torch.export.export(Attention(), example, dynamic_shapes=shapes).module()
    inputs = tuple(tensors(heads, kv, 3, 9, 4, 5, 2, batch=4).values())
    torch.testing.assert_close(exported(*inputs), Attention()(*inputs), rtol=0, atol=1e-12)
