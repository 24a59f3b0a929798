"""Stand-ins for PyTorch's attention kernels on CUDA: the same signatures on any device, the definition within.

They take their arguments by the names of the real operators' schemas and insist on what the real ones need, but do not
check: masks in rows of a multiple of 16, a contiguous LSE or one padded to 32, an output as their forward lays it out,
no dropout.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_hificl.ops import kernels
from peft_hificl.ops.kernels import KERNELS

NAMES = ("flash", "efficient", "cudnn")


def take_the_place_of_the_cpus(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """From now on, calls on the CPU are computed by the stand-ins of these kernels; each takes every call."""
    monkeypatch.setattr(kernels, "aten", Aten())
    here = {name: KERNELS["cuda"][name]._replace(limits=lambda call: None) for name in names}
    monkeypatch.setitem(KERNELS, "cpu", here)


def bound(name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, object]:
    """Arguments by the names in the operator's schema."""
    schema = getattr(torch.ops.aten, name).default._schema
    by_position = [argument for argument in schema.arguments if not argument.kwarg_only]
    assert len(args) <= len(by_position)
    values = {argument.name: value for argument, value in zip(by_position, args, strict=False)}
    assert not values.keys() & kwargs.keys() and kwargs.keys() <= {argument.name for argument in schema.arguments}
    values |= kwargs
    for argument in schema.arguments:
        if argument.name not in values:
            assert argument.has_default_value(), argument.name
            values[argument.name] = argument.default_value
    assert values["dropout_p"] == 0.0 and values["scale"] is not None
    return values


def scores(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    s = query @ key.mT * scale
    if mask is not None:
        s = s + mask
    return s.masked_fill(~torch.ones_like(s, dtype=torch.bool).tril(), -torch.inf) if is_causal else s


def gradients(p: Tensor, grad: Tensor, output: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float):
    """From the probabilities; the chain rule, written out."""
    delta = (grad * output).sum(-1, keepdim=True)
    ds = p * (grad @ value.mT - delta)
    return ds @ key * scale, ds.mT @ query * scale, p.mT @ grad


def rng(key: Tensor) -> tuple[Tensor, Tensor]:
    """What the forward over these keys hands to its own backward."""
    return torch.tensor(11 * key.shape[2]), torch.tensor(key.shape[2] + 33)


class Aten:
    """In the place of `torch.ops.aten`."""

    def _scaled_dot_product_flash_attention(self, *args: object, **kwargs: object) -> tuple[object, ...]:
        x = bound("_scaled_dot_product_flash_attention", args, kwargs)
        assert x["return_debug_mask"] is False
        query = x["query"]
        key, value = (x[name].repeat_interleave(query.shape[1] // x[name].shape[1], 1) for name in ("key", "value"))
        s = scores(query, key, None, x["is_causal"], x["scale"])
        return (
            s.softmax(-1) @ value,
            s.logsumexp(-1),
            None,
            None,
            query.shape[2],
            key.shape[2],
            *rng(key),
            torch.empty(0),
        )

    def _scaled_dot_product_flash_attention_backward(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        x = bound("_scaled_dot_product_flash_attention_backward", args, kwargs)
        query, heads = x["query"], x["key"].shape[1]
        assert (x["cum_seq_q"], x["cum_seq_k"]) == (None, None)
        assert (x["max_q"], x["max_k"]) == (query.shape[2], x["key"].shape[2])
        assert (int(x["philox_seed"]), int(x["philox_offset"])) == tuple(map(int, rng(x["key"])))
        assert x["logsumexp"].is_contiguous()  # the kernel does not ask
        key, value = (x[name].repeat_interleave(query.shape[1] // heads, 1) for name in ("key", "value"))
        p = torch.exp(scores(query, key, None, x["is_causal"], x["scale"]) - x["logsumexp"][..., None])
        of_query, *others = gradients(p, x["grad_out"], x["out"], query, key, value, x["scale"])
        return of_query, *(g.reshape(len(g), heads, -1, *g.shape[2:]).sum(2) for g in others)

    def _scaled_dot_product_cudnn_attention(self, *args: object, **kwargs: object) -> tuple[object, ...]:
        x = bound("_scaled_dot_product_cudnn_attention", args, kwargs)
        assert x["return_debug_mask"] is False and x["compute_log_sumexp"] is True
        query, mask = x["query"], x["attn_bias"]
        key, value = (x[name].repeat_interleave(query.shape[1] // x[name].shape[1], 1) for name in ("key", "value"))
        assert mask is None or (mask.shape == (*query.shape[:3], key.shape[2]) and mask.stride(-1) == 1)
        s = scores(query, key, mask, x["is_causal"], x["scale"])
        lse = s.logsumexp(-1, keepdim=True)
        return s.softmax(-1) @ value, lse, None, None, query.shape[2], key.shape[2], *rng(key), None

    def _scaled_dot_product_cudnn_attention_backward(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        x = bound("_scaled_dot_product_cudnn_attention_backward", args, kwargs)
        query, heads = x["query"], x["key"].shape[1]
        assert (x["cum_seq_q"], x["cum_seq_k"]) == (None, None)
        assert (x["max_q"], x["max_k"]) == (query.shape[2], x["key"].shape[2])
        assert (int(x["philox_seed"]), int(x["philox_offset"])) == tuple(map(int, rng(x["key"])))
        assert x["logsumexp"].shape == (*query.shape[:3], 1) and x["logsumexp"].is_contiguous()
        layout = torch.empty_like(query).stride()
        assert x["out"].stride() == x["grad_out"].stride() == layout  # else a plan for another layout may read them
        key, value = (x[name].repeat_interleave(query.shape[1] // heads, 1) for name in ("key", "value"))
        p = torch.exp(scores(query, key, x["attn_bias"], x["is_causal"], x["scale"]) - x["logsumexp"])
        of_query, *others = gradients(p, x["grad_out"], x["out"], query, key, value, x["scale"])
        return of_query, *(g.reshape(len(g), heads, -1, *g.shape[2:]).sum(2) for g in others)

    def _scaled_dot_product_efficient_attention(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        x = bound("_scaled_dot_product_efficient_attention", args, kwargs)
        query, key, value = self._checked(x)
        assert x["compute_log_sumexp"] is True
        s = scores(query, key, x["attn_bias"], x["is_causal"], x["scale"])
        lse = torch.nn.functional.pad(s.logsumexp(-1), (0, -query.shape[2] % 32), value=torch.inf)
        return s.softmax(-1) @ value, lse, *rng(key)

    def _scaled_dot_product_efficient_attention_backward(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        x = bound("_scaled_dot_product_efficient_attention_backward", args, kwargs)
        query, key, value = self._checked(x)
        assert (int(x["philox_seed"]), int(x["philox_offset"])) == tuple(map(int, rng(x["key"])))
        assert (
            x["logsumexp"].shape[2] % 32 == 0
            and x["logsumexp"].stride(2) == 1
            and x["grad_input_mask"] == [True, True, True, False]
        )
        assert x["out"].transpose(1, 2).is_contiguous()  # the kernel does not ask
        lse = x["logsumexp"][:, :, : query.shape[2], None]
        assert torch.isposinf(x["logsumexp"][:, :, query.shape[2] :]).all()
        p = torch.exp(scores(query, key, x["attn_bias"], x["is_causal"], x["scale"]) - lse)
        return *gradients(p, x["grad_out_"], x["out"], query, key, value, x["scale"]), torch.empty(0)

    @staticmethod
    def _checked(x: dict[str, object]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, mask = x["query"], x["key"], x["value"], x["attn_bias"]
        assert key.shape[1] == value.shape[1] == query.shape[1]
        if mask is not None:
            assert mask.shape == (*query.shape[:3], key.shape[2]) and mask.stride(-1) == 1
            assert all(stride % 16 == 0 for stride in mask.stride()[:-1])
        return query, key, value
