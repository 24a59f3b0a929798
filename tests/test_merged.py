"""The kernels' path against the definition, when it is taken, and that no change of a frozen adapter is missed."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache

from peft_hificl import Scoring, VirtualPairs, select_rows, virtual_attention
from peft_hificl.ops import calls, merged
from peft_hificl.ops.kernels import KERNELS, Call

from . import oracle
from .helpers import (
    GROUPS,
    MASKS,
    TOLERANCE,
    adapted,
    config,
    hificl_layers,
    inputs_for,
    logits,
    mask_of,
    pairs_for,
    tensors,
)

SHAPES = {"decode": (1, 9), "chunk": (3, 8)}  # new tokens, keys with those of the cache
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


def pairs_of(x: dict[str, Tensor], **kwargs: object) -> VirtualPairs:
    return VirtualPairs(x["virtual_keys"], x["virtual_values"], **kwargs)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-3))


def check(inputs: dict[str, Tensor], dtype: torch.dtype, **options: object) -> None:
    """Forward and all gradients, by a kernel in `dtype`, against the definition in float64."""
    want_in = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    causal = {**options}
    if causal.pop("is_causal", False):
        causal["mask"] = mask_of("causal", inputs["query"].shape[2], inputs["query"].shape[2], 1)
    want, _ = oracle.hificl(**want_in, scaling=0.3, **causal)
    x = {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}
    options = {k: v.to(dtype) if k == "bias" else v for k, v in options.items()}
    args = (x["query"], x["key"], x["value"], pairs_of(x))
    assert merged.attention_path(*args, Scoring(0.3, **options)).kernel == "flash"
    got = merged.attention(*args, Scoring(0.3, **options))
    assert got.dtype == dtype and relative_error(got, want) < TOLERANCE[dtype]
    direction = torch.randn_like(want)
    grads_want = torch.autograd.grad(want, list(want_in.values()), direction)
    grads_got = torch.autograd.grad(got, list(x.values()), direction.to(dtype))
    for name, a, b in zip(inputs, grads_got, grads_want, strict=True):
        assert a.shape == b.shape and relative_error(a, b) < TOLERANCE[dtype], name
    with torch.no_grad():
        torch.testing.assert_close(merged.attention(*args, Scoring(0.3, **options)), got)


@DTYPES
@pytest.mark.parametrize("mask", [*MASKS, "is_causal"])
@pytest.mark.parametrize("groups", GROUPS)
def test_masks_and_groups(groups: str, mask: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, kv = GROUPS[groups]
    options = {"is_causal": True} if mask == "is_causal" else {"mask": mask_of(mask, 5, 5, heads)}
    check(tensors(heads, kv, 5, 5, 6, 6, 3), dtype, **options)


@DTYPES
@pytest.mark.parametrize(
    "case", ["decode", "chunk", "smaller-values", "larger-values", "bias", "bias+mask", "one-pair"]
)
@pytest.mark.parametrize("groups", GROUPS)
def test_variants(groups: str, case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    heads, kv = GROUPS[groups]
    length, size = SHAPES.get(case, (4, 4))
    e = {"smaller-values": 4, "larger-values": 10}.get(case, 6)
    options: dict[str, object] = {"mask": mask_of("causal", length, size, heads)}
    if "bias" in case:
        options["bias"] = torch.randn(1, heads, length, size, dtype=torch.float64)
    if case == "bias":
        options["mask"] = None
    check(tensors(heads, kv, length, size, 6, e, 1 if case == "one-pair" else 3), dtype, **options)


@pytest.mark.parametrize(
    ("batch", "heads", "kv", "length", "size", "d", "e"),
    [
        (3, 4, 2, 5, 7, 6, 3), (2, 4, 2, 5, 7, 6, 4), (2, 4, 2, 3, 7, 6, 3), (4, 2, 1, 5, 7, 4, 3),
        (2, 4, 4, 5, 7, 4, 3), (2, 4, 2, 5, 6, 6, 3), (3, 4, 2, 5, 7, 3, 6), (2, 4, 4, 5, 7, 3, 4),
    ],
)  # fmt: skip
def test_a_value_dimension_is_nothing_else(
    batch: int, heads: int, kv: int, length: int, size: int, d: int, e: int
) -> None:
    """Each time it, or the dimension of the keys, is as large as another one of the call."""
    torch.manual_seed(1)
    check(tensors(heads, kv, length, size, d, e, 2, batch), torch.float64)


@pytest.mark.parametrize("length", [65, 300])
def test_more_queries_and_keys_than_a_kernels_block(length: int) -> None:
    torch.manual_seed(2)
    x = {k: v.requires_grad_() for k, v in tensors(4, 2, length, length, 16, 16, 8).items()}
    args = (x["query"], x["key"], x["value"], pairs_of(x))
    want, _ = virtual_attention(*args, Scoring(0.3, is_causal=True))
    got = merged.attention(*args, Scoring(0.3, is_causal=True))
    direction = torch.randn_like(want)
    assert relative_error(got, want) < 1e-10
    for a, b in zip(*(torch.autograd.grad(o, list(x.values()), direction) for o in (got, want)), strict=True):
        assert relative_error(a, b) < 1e-10


def test_pairs_per_row_per_key_value_head_and_with_log_weights() -> None:
    torch.manual_seed(3)
    x = tensors(4, 2, 3, 3, 6, 6, 3)
    keys, values = torch.randn(2, 2, 2, 3, 6, dtype=torch.float64)  # (B, G, n, d)
    log_weights = torch.tensor([[0.0, 1.5, -torch.inf], [-torch.inf] * 3], dtype=torch.float64)[:, None]  # row 1: none
    for pairs in (VirtualPairs(keys, values), VirtualPairs(keys, values, log_weights)):
        args = (x["query"], x["key"], x["value"], pairs)
        assert merged.attention_path(*args, Scoring(0.3)).kernel
        torch.testing.assert_close(
            merged.attention(*args, Scoring(0.3)), virtual_attention(*args, Scoring(0.3))[0], rtol=0, atol=1e-12
        )
    bare = torch.nn.functional.scaled_dot_product_attention(*args[:3], scale=0.3, enable_gqa=True)
    torch.testing.assert_close(merged.attention(*args, Scoring(0.3))[1], bare[1])


@pytest.mark.parametrize("mask", ["bool", "minimum", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_sees_nothing_sees_the_pairs(mask: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x = {k: v.to(dtype).requires_grad_() for k, v in tensors(4, 2, 4, 4, 8, 8, 3).items()}
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    visible[:2] = False
    additive = torch.finfo(dtype).min if mask == "minimum" else -torch.inf
    lowest = calls._additive(torch.tensor([False]), None, dtype).float()
    assert lowest < -6e4 and torch.isfinite(lowest * 1.4427)  # CUDA's kernels multiply by log2(e) in float32
    given = visible if mask == "bool" else torch.where(visible, 0.0, additive).to(dtype)
    out = merged.attention(x["query"], x["key"], x["value"], pairs_of(x), Scoring(0.3, mask=given))
    out.float().square().sum().backward()
    assert torch.isfinite(out).all() and all(torch.isfinite(t.grad).all() for t in x.values())
    weights = (x["query"].float() @ x["virtual_keys"].float().mT * 0.3).softmax(-1)
    alone = (weights @ x["virtual_values"].float())[:, :, :2]
    torch.testing.assert_close(out[:, :, :2].float(), alone, rtol=1e-2, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype) -> None:
    """Scores beyond the range of fp16; a float32 adapter gets float32 gradients."""
    torch.manual_seed(5)
    x = {k: v.to(dtype) for k, v in tensors(4, 2, 6, 6, 64, 64, 3).items()}
    x = {k: v * 64 if k in ("query", "key", "virtual_keys") else v for k, v in x.items()}
    x = {k: (v.float() if k.startswith("virtual") else v).requires_grad_() for k, v in x.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in x.items()}
    want, _ = oracle.hificl(**exact, scaling=2e-5)
    got = merged.attention(x["query"], x["key"], x["value"], pairs_of(x), Scoring(2e-5))
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x[k].double() for k in ("query", "key", "value")), scale=2e-5, enable_gqa=True
    )
    assert got.dtype == dtype and relative_error(plain, want) > 0.1
    assert relative_error(got, want) < 2 * torch.finfo(dtype).eps
    direction = torch.randn_like(want)
    grads_want = torch.autograd.grad(want, list(exact.values()), direction)
    grads_got = torch.autograd.grad(got, list(x.values()), direction.to(dtype))
    for name, a, b in zip(x, grads_got, grads_want, strict=True):
        assert a.dtype == x[name].dtype and relative_error(a, b) < 8 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("alpha_one", [False, True])
@pytest.mark.parametrize("within", [(-11.0, -10.0), (-12.0, 2.0), (4.0, 8.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_does_not_round_what_the_log_weights_of_a_head_share(
    dtype: torch.dtype, within: tuple[float, float], alpha_one: bool
) -> None:
    """Output and gradients are as near to the formula as without log-weights; a row without pairs has none."""
    torch.manual_seed(0)
    shapes = [(2, 4, 64, 64), (2, 2, 64, 64), (2, 2, 64, 64), (2, 4, 8, 64), (2, 4, 8, 64)]
    rounded = [torch.randn(shape).to(dtype) for shape in shapes]
    log_weights = torch.empty(2, 4, 8).uniform_(*within)
    log_weights[0, 0, 5:], log_weights[1] = -torch.inf, -torch.inf

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in rounded]
        weights = log_weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        pairs = VirtualPairs(inputs[3], inputs[4], weights, scale_self_attention=not alpha_one)
        output = function(*inputs[:3], pairs, Scoring(0.125, is_causal=True))
        return [output, *torch.autograd.grad(output.to(weights.dtype).square().sum(), [*inputs, weights])]

    exact = run(lambda *arguments: virtual_attention(*arguments)[0], torch.float64)
    found = run(merged.attention, dtype)
    for got, want in zip(found, exact, strict=True):
        assert relative_error(got, want) < torch.finfo(dtype).eps
    for gradient in found[4:]:
        assert not gradient[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_log_weights_may_be_more_exact_than_the_log_sum_exp(dtype: torch.dtype) -> None:
    """Those of an adapter in float64 give what the same in float32 give."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 5, 8).to(dtype).requires_grad_().unbind()
    keys, values = torch.randn(2, 1, 4, 3, 8).unbind()
    found = []
    for logs in (torch.float32, torch.float64):
        weights = torch.linspace(-9, 2, 12).reshape(1, 4, 3).to(logs).requires_grad_()
        output = merged.attention(query, key, value, VirtualPairs(keys, values, weights), Scoring(0.3))
        found.append([output, *torch.autograd.grad(output.float().square().sum(), [query, weights])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, check_dtype=False)


@pytest.mark.parametrize("way", ["training", "inference", "decoding", "merge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_merged_in_float32(dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over one key of value 1 and one pair of value -1 a kernel is exact, so that only the merge can round."""
    torch.manual_seed(10)
    length = 1 if way == "decoding" else 64
    x = {name: tensor.to(dtype) for name, tensor in tensors(4, 2, length, 1, 8, 8, 1).items()}
    x |= {"value": torch.ones_like(x["value"]), "virtual_values": -torch.ones_like(x["virtual_values"])}
    want, alpha = oracle.hificl(**{name: tensor.double() for name, tensor in x.items()}, scaling=0.3)
    torch.testing.assert_close(want, (2 * alpha - 1)[..., None].expand_as(want))
    monkeypatch.setitem(KERNELS["cpu"], "flash", KERNELS["cpu"]["flash"]._replace(groups=way != "decoding"))
    if way == "merge":
        scores = x["query"].float() @ x["key"].float().repeat_interleave(2, 1).mT * 0.3
        got = merged.add_pairs(torch.ones_like(x["query"]), scores[..., 0], x["query"], pairs_of(x), Scoring(0.3))
    else:
        if way == "training":
            x["virtual_keys"].requires_grad_()
        args = (x["query"], x["key"], x["value"], pairs_of(x))
        assert merged.attention_path(*args, Scoring(0.3)).kernel
        got = merged.attention(*args, Scoring(0.3)).detach()
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps / 2 * want.abs() + 1e-6).all()


@pytest.mark.parametrize("which", ["query", "key", "value", "virtual_keys", "virtual_values", "log_weights"])
def test_the_gradient_of_each_alone(which: str) -> None:
    torch.manual_seed(11)
    x = {**tensors(4, 2, 3, 5, 6, 6, 3), "log_weights": torch.randn(2, 4, 3, dtype=torch.float64)}
    gradients = []
    for attend in (oracle.hificl, merged.attention):
        y = {name: tensor.clone().requires_grad_(name == which) for name, tensor in x.items()}
        if attend is merged.attention:
            pairs = pairs_of(y, log_weights=y["log_weights"])
            args = (y["query"], y["key"], y["value"], pairs)
            assert merged.attention_path(*args, Scoring(0.3)).kernel == "flash"
            out = attend(*args, Scoring(0.3))
        else:
            out, _ = attend(**y, scaling=0.3)
        gradients.append((out, *torch.autograd.grad(out.cos().sum(), y[which])))
    for got, want in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("log_weights", ["none", "per-head", "per-row", "shared"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("alpha_one", [False, True], ids=["", "alpha-1"])
def test_merging_with_attention_from_elsewhere(alpha_one: bool, sinks: bool, log_weights: str) -> None:
    """As with flex_attention, by its output and LSE: values and every gradient, those of log-weights too."""
    torch.manual_seed(12)
    x = tensors(4, 2, 3, 5, 6, 6, 3)
    shape = {"per-head": (1, 4, 3), "per-row": (2, 4, 3), "shared": (1, 1, 3)}.get(log_weights)
    if shape is not None:
        x["log_weights"] = torch.randn(shape, dtype=torch.float64)
        x["log_weights"][..., 1] = -torch.inf  # a pair that is not there
    if sinks:
        x["sinks"] = torch.randn(4, dtype=torch.float64)
    y, z = ({name: tensor.clone().requires_grad_() for name, tensor in x.items()} for _ in range(2))
    weights = None if shape is None else y["log_weights"].expand(-1, 4, -1)
    want, _ = oracle.hificl(**{**y, "log_weights": weights}, scaling=0.3, alpha_one=alpha_one)
    key, value = (z[name].repeat_interleave(2, dim=1) for name in ("key", "value"))
    scores = z["query"] @ key.mT * 0.3
    pairs = pairs_of(z, log_weights=z.get("log_weights"))._replace(scale_self_attention=not alpha_one)
    scoring = Scoring(0.3, sinks=z.get("sinks"))
    got = merged.add_pairs(scores.softmax(-1) @ value, scores.logsumexp(-1), z["query"], pairs, scoring)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(o.cos().sum(), list(i.values())) for o, i in ((got, z), (want, y)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(), rtol=0, atol=1e-12)  # of exp(-inf) the oracle knows none


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merging_leaves_a_row_without_pairs_alone(dtype: torch.dtype) -> None:
    """What adapter_names hands down for "__base__": pairs of log-weight -inf."""
    torch.manual_seed(13)
    output, query = torch.randn(2, 2, 4, 3, 8).to(dtype)
    lse = torch.randn(2, 4, 3, dtype=torch.promote_types(dtype, torch.float32))
    lse[:, :, 0] = -torch.inf  # a query that sees nothing
    output[:, :, 0] = 0
    keys, values = torch.randn(2, 1, 4, 2, 8).to(dtype)
    pairs = select_rows([VirtualPairs(keys, values), None], [1, 0])
    got = merged.add_pairs(output, lse, query, pairs, Scoring(0.3))
    assert torch.equal(got[0], output[0]) and torch.isfinite(got).all()
    alone = (query[1:, :, :1].double() @ keys.double().mT * 0.3).softmax(-1) @ values.double()
    torch.testing.assert_close(got[1:, :, :1].double(), alone, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_merging_half_precision_scores_in_float32() -> None:
    """Beyond the range of fp16, and apart by less than bf16's steps."""
    torch.manual_seed(5)
    for dtype in (torch.bfloat16, torch.float16):
        x = {k: v.to(dtype) for k, v in tensors(4, 4, 6, 6, 64, 64, 3).items()}
        x = {k: v * 64 if k in ("query", "key", "virtual_keys") else v for k, v in x.items()}
        exact = {k: v.double() for k, v in x.items()}
        scores = exact["query"] @ exact["key"].mT * 2e-5
        output = (scores.softmax(-1) @ exact["value"]).to(dtype)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got = merged.add_pairs(output, scores.logsumexp(-1).float(), x["query"], pairs_of(x), Scoring(2e-5))
            want, _ = oracle.hificl(**exact, scaling=2e-5)
            assert got.dtype == dtype and (got.double() - want).abs().max() < torch.finfo(dtype).eps


def test_autocast_is_that_of_pytorchs_own_attention() -> None:
    q, k, v = torch.randn(3, 1, 4, 5, 8)
    pairs = VirtualPairs(torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        got = merged.attention(q, k, v, pairs, Scoring(0.3))
        assert got.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert merged.attention(q.double(), k.double(), v.double(), pairs, Scoring(0.3)).dtype == torch.float64
    torch.testing.assert_close(got.float(), merged.attention(q, k, v, pairs, Scoring(0.3)), rtol=0.05, atol=0.05)


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every-second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "of-a-projection": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("which", ["query", "key", "value", "virtual_keys", "virtual_values", "grad"])
@pytest.mark.parametrize("layout", STRANGE)
def test_any_memory_layout(layout: str, which: str) -> None:
    torch.manual_seed(6)
    x = {k: v.requires_grad_() for k, v in tensors(4, 2, 5, 5, 8, 8, 3).items()}
    y = {**x, which: STRANGE[layout](x.get(which, x["query"]))}
    grad = STRANGE[layout](torch.randn(2, 4, 5, 8, dtype=torch.float64))
    results = []
    for attend in (merged.attention, lambda *a, **k: virtual_attention(*a, **k)[0]):
        out = attend(y["query"], y["key"], y["value"], pairs_of(y), Scoring(0.3))
        results.append([out, *torch.autograd.grad(out, list(x.values()), grad if which == "grad" else grad + 0)])
        with torch.no_grad():
            for length in (1, 5):
                q = y["query"][:, :, :length]
                results[-1].append(attend(q, y["key"], y["value"], pairs_of(y), Scoring(0.3)))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("mask", ["none", "bool", "per-head"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "repeats"])
def test_decoding_without_gradients(grouped: bool, groups: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a kernel that would repeat the cache for each head of a group, the heads become queries."""
    torch.manual_seed(7)
    monkeypatch.setitem(KERNELS["cpu"], "flash", KERNELS["cpu"]["flash"]._replace(groups=grouped))
    heads, kv = GROUPS[groups]
    x = tensors(heads, kv, 1, 9, 6, 6, 3)
    visible = {"none": None, "bool": torch.arange(9)[None, None, None] > torch.tensor([0, 3])[:, None, None, None]}
    given = visible.get(mask, torch.randn(2, heads, 1, 9, dtype=torch.float64))
    args = (x["query"], x["key"], x["value"], pairs_of(x))
    want, _ = oracle.hificl(**x, scaling=0.3, mask=given)
    torch.testing.assert_close(merged.attention(*args, Scoring(0.3, mask=given)), want, rtol=0, atol=1e-12)


def test_heads_become_queries_where_a_cache_would_be_repeated_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """While decoding without gradients, and where the kernel knows no groups: by the shapes that it is given."""
    flash = KERNELS["cpu"]["flash"]
    shapes: list[tuple[torch.Size, torch.Size]] = []

    def recorded(call: Call) -> object:
        shapes.append((call.query.shape, call.key.shape))
        return flash.forward(call)

    def folded(heads: int, kv: int, length: int, grouped: bool, trained: str | None = None, batch: int = 2) -> bool:
        monkeypatch.setitem(KERNELS["cpu"], "flash", flash._replace(forward=recorded, groups=grouped))
        shapes.clear()
        x = tensors(heads, kv, length, 4, 6, 6, 3, batch)
        if trained:
            x[trained].requires_grad_()
        merged.attention(x["query"], x["key"], x["value"], pairs_of(x), Scoring(0.3))
        (context, keys), (virtual, pairs) = shapes
        assert keys == (batch, kv, 4, 6) and virtual == (batch, heads, length, 6) and pairs == (batch, heads, 3, 6)
        assert context in ((batch, heads, length, 6), (batch, kv, heads // kv * length, 6))
        return context[1] != heads

    assert folded(4, 2, 1, grouped=False) and folded(4, 1, 1, grouped=False) and folded(4, 2, 1, grouped=False, batch=4)
    assert not folded(4, 2, 1, grouped=True) and not folded(4, 4, 1, grouped=False)
    assert not folded(4, 2, 3, grouped=False) and not folded(4, 2, 1, grouped=False, trained="virtual_keys")
    with torch.no_grad():
        assert folded(4, 2, 1, grouped=False, trained="virtual_keys")


def test_masks_are_kept_as_they_came() -> None:
    """Nothing of size T x T is saved for the backward beside what the caller holds anyway."""
    q, k, v = (t.clone().requires_grad_() for t in (Q, K, V))
    for given in (torch.ones(5, 5, dtype=torch.bool).tril(), torch.zeros(1, 1, 5, 5)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            merged.attention(q, k, v, PAIRS, Scoring(0.3, mask=given))
        squares = [t for t in saved if t.shape[-2:] == (5, 5)]
        assert len(squares) == 1 and squares[0].data_ptr() == given.data_ptr()


# -- which path ------------------------------------------------------------------------------------------------------

Q, K, V = torch.randn(3, 1, 4, 5, 8)
PAIRS = VirtualPairs(torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8))
TRAINED = "a mask or bias that is trained"
FALLBACKS: dict[str, tuple[dict[str, object], str]] = {
    "dropout": ({"dropout": 0.5}, "attention dropout"),
    "softcap": ({"softcap": 2.0}, "soft-capped scores"),
    "trained-bias": ({"bias": torch.zeros(1, 4, 5, 5, requires_grad=True)}, TRAINED),
    "trained-mask": ({"mask": torch.zeros(1, 4, 5, 5, requires_grad=True)}, TRAINED),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_no_kernel_computes_takes_the_formula_and_says_so(case: str, caplog: pytest.LogCaptureFixture) -> None:
    options, reason = FALLBACKS[case]
    path = merged.attention_path(Q, K, V, PAIRS, Scoring(0.3, **options))
    assert path == (None, reason)
    with caplog.at_level(logging.DEBUG, logger="peft_hificl"):
        torch.manual_seed(0)
        got = merged.attention(Q, K, V, PAIRS, Scoring(0.3, **options))
    assert reason in caplog.text
    torch.manual_seed(0)
    torch.testing.assert_close(got, virtual_attention(Q, K, V, PAIRS, Scoring(0.3, **options))[0])


def test_other_fallbacks() -> None:
    def why(*args: object, **options: object) -> str:
        path = merged.attention_path(*args, Scoring(0.3, **options))
        assert path.kernel is None
        assert torch.isfinite(merged.attention(*args, Scoring(0.3, **options))).all()
        return path.reason

    for which in range(3):
        mixed = [t.double() if i == which else t for i, t in enumerate((Q, K, V))]
        assert why(*mixed, PAIRS) == "query, key and value of different dtypes"
        with torch.autocast("cpu", torch.bfloat16):  # which casts all but a query in float64
            mixed = [t.half() if i == which else t for i, t in enumerate((Q, K, V))]
            assert merged.attention_path(*mixed, PAIRS, Scoring(0.3)).kernel == "flash"
    assert why(Q, K[:, :, :0], V[:, :, :0], PAIRS) == "no keys"
    more = torch.randn(2, 1, 8, 5, 8)
    path = merged.attention_path(Q, *more, PAIRS, Scoring(0.3))
    assert path == (None, "4 query heads for 8 key/value heads")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert why(Q, K, V, PAIRS) == "flash attention is switched off"
    path = merged.attention_path(*(t.to("meta") for t in (Q, K, V)), PAIRS, Scoring(0.3))
    assert path == (None, "no kernel for the device meta")


def test_a_kernel_must_take_the_virtual_pairs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are attended to by a call of their own: never causal, and with a mask where there are log-weights."""
    asked: list[Call] = []

    def takes_no_mask(call: Call) -> str | None:
        asked.append(call)
        return "it takes no mask" if call.mask is not None else None

    flash = KERNELS["cpu"]["flash"]
    monkeypatch.setitem(KERNELS, "cpu", {"maskless": flash._replace(limits=takes_no_mask), "any": flash})
    weighted = PAIRS._replace(log_weights=torch.randn(1, 4, 2))
    bias, mask = torch.randn(1, 4, 5, 5), torch.ones(5, 5, dtype=torch.bool).tril()
    for pairs, options, kernel in (
        (PAIRS, {"is_causal": True}, "maskless"),
        (weighted, {"is_causal": True}, "maskless"),
        (PAIRS, {"bias": bias}, "any"),
        (PAIRS, {"mask": mask}, "any"),
        (weighted, {"mask": mask, "bias": bias}, "any"),
    ):
        asked.clear()
        assert merged.attention_path(Q, K, V, pairs, Scoring(0.3, **options)).kernel == kernel
        context, virtual = asked[0], asked[1] if len(asked) > 1 else None
        assert context.is_causal == options.get("is_causal", False) and context.scaling == 0.3
        assert all(torch.equal(*both) for both in zip(context[:3], (Q, K, V), strict=True))
        if virtual is not None:  # the very call that it is to compute
            assert not virtual.is_causal and torch.equal(virtual.key, pairs.keys.expand_as(virtual.key))
            assert torch.equal(virtual.query, Q) and torch.equal(virtual.value, pairs.values.expand_as(virtual.value))
            weights = None if virtual.mask is None else virtual.mask[:, :, 0]
            assert weights is pairs.log_weights or torch.equal(weights, pairs.log_weights)
        want = virtual_attention(Q, K, V, pairs, Scoring(0.3, **options))[0]
        torch.testing.assert_close(merged.attention(Q, K, V, pairs, Scoring(0.3, **options)), want)
    both = {"one": flash._replace(limits=lambda call: "too odd"), "two": flash._replace(limits=takes_no_mask)}
    monkeypatch.setitem(KERNELS, "cpu", both)
    assert merged.attention_path(Q, K, V, weighted, Scoring(0.3)) == (None, "too odd; it takes no mask")
    assert merged.attention_path(Q, K, V, PAIRS, Scoring(0.3)) == ("two", "it takes these inputs")
    want = virtual_attention(Q, K, V, weighted, Scoring(0.3))[0]
    assert torch.equal(merged.attention(Q, K, V, weighted, Scoring(0.3)), want)


def test_torch_func_transforms_take_the_formula() -> None:
    paths = set()

    def loss(query: Tensor) -> Tensor:
        paths.add(merged.attention_path(query, K, V, PAIRS, Scoring(0.3)))
        return merged.attention(query, K, V, PAIRS, Scoring(0.3)).sum()

    query = Q.clone().requires_grad_()
    want = torch.autograd.grad(loss(query), query)[0]
    assert paths == {("flash", "it takes these inputs")}
    torch.testing.assert_close(torch.func.grad(loss)(Q), want)
    assert paths == {("flash", "it takes these inputs"), (None, "a torch.func transform")}
    rows = torch.func.vmap(lambda q: merged.attention(q[None], K, V, PAIRS, Scoring(0.3))[0])(Q.expand(3, -1, -1, -1))
    torch.testing.assert_close(rows, merged.attention(Q, K, V, PAIRS, Scoring(0.3)).expand(3, -1, -1, -1))


def test_the_first_layer_of_a_frozen_model_skips_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient is asked of its queries, keys and values: only the backward over the n pairs runs."""
    kernel, sizes = KERNELS["cpu"]["flash"], []

    def counted(call: Call, *args: object) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append(call.key.shape[2])
        return kernel.backward(call, *args)

    monkeypatch.setitem(KERNELS["cpu"], "flash", kernel._replace(backward=counted))
    keys = torch.randn(1, 4, 2, 8, requires_grad=True)
    merged.attention(Q, K, V, PAIRS._replace(keys=keys), Scoring(0.3)).sum().backward()
    assert sizes == [2]
    want = torch.autograd.grad(virtual_attention(Q, K, V, PAIRS._replace(keys=keys), Scoring(0.3))[0].sum(), keys)[0]
    torch.testing.assert_close(keys.grad, want, rtol=1e-5, atol=1e-6)


# -- CUDA kernels, as far as they can be checked without one: signatures, shapes and dtypes on the meta device ---------


@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_cuda_kernels_are_called_as_they_want(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS["cuda"][name]
    monkeypatch.setitem(KERNELS, "meta", {name: kernel._replace(limits=lambda call: None)})
    options = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    query, key, value = (torch.empty(2, heads, 20, 64, **options) for heads in (8, 2, 2))
    keys, values = (torch.empty(1, 8, 3, 64, device="meta", requires_grad=True) for _ in range(2))
    mask = None if name == "flash" else torch.ones(2, 1, 20, 20, dtype=torch.bool, device="meta")
    out = merged.attention(query, key, value, VirtualPairs(keys, values), Scoring(0.3, mask=mask))
    assert out.shape == query.shape and out.dtype == query.dtype
    out.sum().backward()
    for tensor in (query, key, value, keys, values):
        assert tensor.grad.shape == tensor.shape and tensor.grad.dtype == tensor.dtype


def test_cuda_kernels_know_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_hificl.ops.kernels._capability", lambda device: (8, 6))
    q = torch.empty(1, 4, 6, 64, dtype=torch.bfloat16, device="meta")
    call = Call(q, q, q, None, True, 0.3)
    flash, efficient = (KERNELS["cuda"][name].limits for name in ("flash", "efficient"))
    assert flash(call) is None and efficient(call) is None
    assert "mask" in flash(call._replace(mask=q)) and efficient(call._replace(mask=q)) is None
    wide = torch.empty(1, 4, 6, 256, dtype=torch.bfloat16, device="meta")
    assert "no backward" in flash(Call(wide, wide, wide, None, False, 0.3))
    odd = torch.empty(1, 4, 6, 60, dtype=torch.bfloat16, device="meta")
    assert "multiple of 8" in flash(Call(odd, odd, odd, None, False, 0.3))
    assert "16 bytes" in efficient(Call(odd, odd, odd, None, False, 0.3))
    full = q.float()
    assert "float16 or bfloat16" in flash(Call(full, full, full, None, False, 0.3))
    assert efficient(Call(full, full, full, None, False, 0.3)) is None
    assert "float64" in efficient(Call(q.double(), q.double(), q.double(), None, False, 0.3))
    assert "square" in flash(call._replace(key=q[:, :, :3], value=q[:, :, :3]))


# -- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="static"), pytest.param(True, id="dynamic", marks=pytest.mark.slow)]
)
def test_training_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = adapted("gqa").train()
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (9, 12):
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            inputs = inputs_for("gqa", length=length)
            run(**inputs, labels=inputs["input_ids"]).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_trains_and_decodes(mode: str) -> None:
    torch._dynamo.reset()
    model, inputs = adapted("gqa"), inputs_for("gqa")
    want = logits(model, **inputs)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, mode=mode)
    torch.testing.assert_close(logits(compiled, **inputs), want, rtol=1e-4, atol=1e-4)
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        step = {"input_ids": inputs["input_ids"][:, :1], "use_cache": True}
        got = compiled(**step, past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(got, model(**step, past_key_values=cache).logits, rtol=1e-4, atol=1e-4)


def test_exports() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    exported = torch.export.export(model.get_base_model(), (), {**inputs, "use_cache": False}, strict=False)
    got = exported.module()(**inputs, use_cache=False)
    torch.testing.assert_close(got.logits, logits(model, **inputs), rtol=1e-5, atol=1e-5)


# -- no pairs of an earlier step -------------------------------------------------------------------------------------


def frozen() -> PeftModel:
    model = adapted("gqa", name="a")
    torch.manual_seed(2)
    model.add_adapter("b", config())
    return model.requires_grad_(False)


@torch.no_grad()
def step(model: PeftModel) -> Tensor:
    """A step of decoding: one query, after a cache that changes with nothing but the model's dtype."""
    dtype = next(model.parameters()).dtype
    cache = DynamicCache()
    for layer in range(2):
        generator = torch.Generator().manual_seed(layer)
        cache.update(*(torch.randn(1, 2, 3, 16, generator=generator).to(dtype) for _ in range(2)), layer)
    return model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True).logits


def optimizer_step(model: PeftModel, **kwargs: object) -> None:
    model.set_adapter("a")
    inputs = inputs_for("gqa")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **kwargs).step()
    model.requires_grad_(False)


def assigned(model: PeftModel) -> None:
    state = {name: torch.randn_like(p) if "hificl_" in name else p for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


@torch.no_grad()
def edited(model: PeftModel) -> None:
    hificl_layers(model)[1].hificl_K_A["a"].weight.mul_(2)


def swapped_data(model: PeftModel) -> None:
    for parameter in hificl_layers(model)[0].parameters():
        parameter.data = torch.randn_like(parameter)


def scaled_data(model: PeftModel) -> None:
    for layer in hificl_layers(model):
        layer.hificl_V_A["a"].weight.data.mul_(3)


def edited_by_numpy(model: PeftModel) -> None:
    hificl_layers(model)[0].hificl_K_A["a"].weight.numpy(force=True)[:] *= 2


def copied_storage(model: PeftModel) -> None:
    weight = hificl_layers(model)[0].hificl_V_B["a"].weight
    weight.untyped_storage().copy_(torch.randn_like(weight).untyped_storage())


def loaded(model: PeftModel) -> None:
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="b"), adapter_name="a")


CHANGES: dict[str, Callable[[PeftModel], object]] = {
    "optimizer": optimizer_step,
    "fused-optimizer": lambda model: optimizer_step(model, fused=True),  # does not count versions up
    "load_state_dict": loaded,
    "load_state_dict-assign": assigned,
    "in-place": edited,
    "new-data": swapped_data,
    "data": scaled_data,
    "numpy": edited_by_numpy,
    "storage": copied_storage,
    "switch": lambda model: model.set_adapter("b", inference_mode=True),
    "union": lambda model: model.base_model.set_adapter(["a", "b"], inference_mode=True),
    "dtype": lambda model: model.double(),
    "delete": lambda model: model.delete_adapter("a"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_frozen_adapter_is_seen(change: str) -> None:
    model = frozen()
    before = step(model)
    assert torch.equal(step(model), before)
    CHANGES[change](model)
    got = step(model)
    assert torch.equal(got, step(copy.deepcopy(model)))
    if change != "dtype":
        assert not torch.equal(got, before)


def test_transforms_and_fake_tensors_leave_nothing_behind() -> None:
    model = frozen()
    want = step(model)
    layer = hificl_layers(model)[0]
    parameters = {name: p for name, p in model.named_parameters() if "hificl_K_A.a" in name}
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    inputs = inputs_for("gqa")
    with torch.no_grad():
        both = torch.vmap(lambda p: torch.func.functional_call(model, p, (), inputs).logits)(stacked)
    torch.testing.assert_close(both[0], logits(model, **inputs), rtol=1e-4, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert type(pairs_for(layer).keys) is Tensor
    assert torch.equal(step(model), want)


def test_modes_and_copies_give_the_same_pairs() -> None:
    model = frozen()
    with torch.inference_mode():
        want = step(model)
    hidden = torch.randn(1, 4, 1, 16, requires_grad=True)
    pairs = pairs_for(hificl_layers(model)[0])
    assert not pairs.keys.is_inference()
    merged.attention(hidden, hidden, hidden, pairs, Scoring(0.25)).sum().backward()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(frozen()))):
        assert torch.equal(step(clone), want)


# -- what cannot be seen in the values on a CPU ------------------------------------------------------------------------


class OnCuda(Tensor):
    """A tensor that says it is on CUDA."""

    is_cuda = True


@pytest.mark.parametrize(("dtype", "word"), [(torch.float32, 4), (torch.bfloat16, 8)], ids=["fp32", "bf16"])
def test_cuda_kernels_read_words_of_16_bytes(dtype: torch.dtype, word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of what they are given begins with one; what is so already is not copied."""
    plain = torch.arange(4096.0).to(dtype)
    flat = plain.as_subclass(OnCuda)
    shape, strides = (2, 3, 4, 2 * word), (128 * word, 32 * word, 8 * word, 1)
    aligned = flat.as_strided(shape, strides, 2 * word)
    assert calls.aligned(aligned) is aligned
    offsets = [flat.as_strided(shape, strides, offset) for offset in (1, word // 2, word + 1)]
    rows = [
        flat.as_strided(shape, [s + (word // 2 if i == place else 0) for i, s in enumerate(strides)], word)
        for place in range(3)
    ]
    for strange in (*offsets, *rows, flat.as_strided(shape, (*strides[:3], 2), word)):
        got = calls.aligned(strange)
        assert torch.equal(got, strange) and got.is_contiguous() and got.storage_offset() == 0
    of_the_cpu = plain[1:].as_strided(shape, strides)
    assert calls.aligned(of_the_cpu) is of_the_cpu  # whose kernels read from anywhere
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # it does not trace storage_offset()
    assert calls.aligned(offsets[0]) is offsets[0]


def test_recorders_are_told_apart() -> None:
    x = (Q, K, V, *PAIRS[:2])
    paths = []

    def path_of(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> merged.Path:
        return merged.attention_path(query, key, value, VirtualPairs(keys, values), Scoring(0.3))

    class Recorded(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            paths.append(path_of(*x))
            return x[0] + 0

    torch.export.export(Recorded(), x)
    torch.jit.trace(Recorded(), x, check_trace=False)
    make_fx(Recorded())(*x)
    exported, *traced = paths
    assert exported == (None, "an export") and traced == [(None, "a trace")] * 2
    others = lambda graph, inputs: graph.forward
    for backend, known in ((lookup_backend("eager"), True), (others, False)):
        # DistributedDataParallel has the compiler of its splitter called, which calls the other one.
        for compiler in (backend, DDPOptimizer(2**20, backend).compile_fn):
            torch._dynamo.reset()
            path = torch._dynamo.optimize(compiler, nopython=True)(path_of)(*x)
            if known:
                assert path == ("flash", "it takes these inputs") == path_of(*x)
            else:
                assert path.kernel is None and "not one of inductor, cudagraphs, eager, aot_eager" in path.reason


@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "repeats"])
def test_one_causal_query_sees_one_key(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query t sees the keys 0..t, however many there are."""
    torch.manual_seed(14)
    monkeypatch.setitem(KERNELS["cpu"], "flash", KERNELS["cpu"]["flash"]._replace(groups=grouped))
    x = tensors(4, 2, 1, 9, 6, 6, 3)
    got = merged.attention(x["query"], x["key"], x["value"], pairs_of(x), Scoring(0.3, is_causal=True))
    want, _ = oracle.hificl(**{**x, "key": x["key"][:, :, :1], "value": x["value"][:, :, :1]}, scaling=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("d", "e"), [(3, 6), (6, 3)], ids=["smaller-keys", "smaller-values"])
@pytest.mark.parametrize(("batch", "n"), [(2, 6), (6, 2)], ids=["pairs", "rows"])
def test_as_many_pairs_or_rows_as_the_larger_head_dimension(batch: int, n: int, d: int, e: int) -> None:
    torch.manual_seed(15)
    x = tensors(2, 1, 2, 3, d, e, n, batch)
    own = VirtualPairs(*(x[name].repeat(batch, 1, 1, 1) for name in ("virtual_keys", "virtual_values")))
    args = (x["query"], x["key"], x["value"], own)
    assert merged.attention_path(*args, Scoring(0.3)).kernel == "flash"
    want, _ = virtual_attention(*args, Scoring(0.3))
    torch.testing.assert_close(merged.attention(*args, Scoring(0.3)), want, rtol=0, atol=1e-12)


# -- log-weights, sinks and alpha = 1 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha_one", [False, True], ids=["", "alpha-1"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("weights", ["none", "per-head", "per-row", "shared"])
@pytest.mark.parametrize("groups", GROUPS)
def test_weighted_pairs_beside_sinks(
    groups: str, weights: str, sinks: bool, alpha_one: bool, dtype: torch.dtype
) -> None:
    """Values and all gradients, those of log-weights and sinks too, by kernels against the definition in float64."""
    torch.manual_seed(16)
    heads, kv = GROUPS[groups]
    x = tensors(heads, kv, 3, 4, 6, 4, 3)
    shape = {"per-head": (1, heads, 3), "per-row": (2, heads, 3), "shared": (1, 1, 3)}.get(weights)
    extra = {} if shape is None else {"log_weights": torch.randn(shape, dtype=torch.float64)}
    extra |= {"sinks": torch.randn(heads, dtype=torch.float64)} if sinks else {}
    results = []
    for of_oracle, kind in ((True, torch.float64), (False, dtype)):
        y = {name: t.to(dtype).to(kind).requires_grad_() for name, t in {**x, **extra}.items()}
        mask = mask_of("padded", 3, 4, heads)
        if of_oracle:
            each = {name: t.expand(-1, heads, -1) if name == "log_weights" else t for name, t in y.items()}
            out, _ = oracle.hificl(**each, scaling=0.3, mask=mask, alpha_one=alpha_one)
        else:
            pairs = pairs_of(y, log_weights=y.get("log_weights"))._replace(scale_self_attention=not alpha_one)
            args = (y["query"], y["key"], y["value"], pairs, Scoring(0.3, mask=mask, sinks=y.get("sinks")))
            assert merged.attention_path(*args).kernel == "flash"
            out = merged.attention(*args)
            assert out.dtype == dtype
            with torch.no_grad():
                torch.testing.assert_close(merged.attention(*args), out)
        direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
        direction[1, :, :1] = 0  # queries that see no key at all: softmax over nothing is not defined
        out = out.double() * (direction != 0)
        results.append((out, *torch.autograd.grad((out * direction).sum(), list(y.values()))))
    tolerance = TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps)
    for name, want, got in zip(("output", *x, *extra), *results, strict=True):
        assert relative_error(got, want) < tolerance, name


@pytest.mark.parametrize("which", ["query", "virtual_keys", "log_weights", "sinks"])
def test_second_derivatives_are_refused(which: str) -> None:
    """The LSE that the backward takes is no function of the inputs to autograd: it would be a constant."""
    torch.manual_seed(17)
    x = tensors(4, 2, 3, 4, 6, 6, 3)
    x |= {"log_weights": torch.randn(1, 4, 3, dtype=torch.float64), "sinks": torch.randn(4, dtype=torch.float64)}
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    pairs = pairs_of(x, log_weights=x["log_weights"])
    out = merged.attention(x["query"], x["key"], x["value"], pairs, Scoring(0.3, sinks=x["sinks"]))
    (gradient,) = torch.autograd.grad(out.square().sum(), x[which], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("alpha_one", [False, True], ids=["", "alpha-1"])
def test_nothing_is_saved_twice(alpha_one: bool) -> None:
    x = {name: tensor.requires_grad_() for name, tensor in tensors(4, 2, 3, 4, 6, 6, 3).items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        merged.attention(
            x["query"], x["key"], x["value"], pairs_of(x, scale_self_attention=not alpha_one), Scoring(0.3)
        )
    assert len(saved) == len({t.data_ptr() for t in saved}) == len(x) + (4 if alpha_one else 2)


@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_each_dtype_compiles_whole(dtype: torch.dtype, gradients: bool) -> None:
    """Queries, keys and values as projections leave them: heads behind tokens."""
    torch.manual_seed(0)
    x = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in tensors(4, 2, 5, 5, 8, 8, 3).items()}
    x = {name: t.to(dtype).requires_grad_(gradients) for name, t in x.items()}

    def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return merged.attention(query, key, value, VirtualPairs(keys, values), Scoring(0.3, is_causal=True))

    torch._dynamo.reset()
    want, got = (f(*x.values()) for f in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)))
    torch.testing.assert_close(got, want)
    if gradients:
        for a, b in zip(*(torch.autograd.grad(out.sum(), list(x.values())) for out in (got, want)), strict=True):
            torch.testing.assert_close(a, b)
