"""A table of PyTorch's attention kernels that return their log-sum-exp, with forward, backward and limits of each.

`scaled_dot_product_attention` does not return the log-sum-exp (LSE) of the scores, so its kernels are called here by
their own names.  A kernel's backward computes ``P = exp(score - LSE)`` and ``delta = rowsum(grad_output * output)``
from the LSE and the output that it is given.  If these belong to an attention over *more* keys, the backward returns
the exact gradients of its own part of that attention, which is what `merged` relies on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten

State = tuple[Tensor, ...]
Gradients = tuple[Tensor, Tensor, Tensor]


class Call(NamedTuple):
    """``softmax(scaling q K^T + mask) V`` for queries (B, H, T, d), keys (B, G, S, d) and values (B, G, S, d)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None  # added to the scores; broadcastable to (B, H, T, S)
    is_causal: bool  # query t sees the keys 0..t
    scaling: float


class Kernel(NamedTuple):
    """One attention kernel.

    Attributes:
        forward: computes the output (B, H, T, d), its LSE (B, H, T) and the state, which is what the backward needs
            besides.
        backward: computes the gradients of query, key and value from the gradient of an output, that output, its LSE
            and the state.
        limits: says why the kernel cannot compute a call; None if it can.
        groups: whether it accepts fewer key/value heads than query heads; if not, they are repeated for it.
    """

    forward: Callable[[Call], tuple[Tensor, Tensor, State]]
    backward: Callable[[Call, Tensor, Tensor, Tensor, State], Gradients]
    limits: Callable[[Call], str | None]
    groups: bool = True


# -- CPU: takes everything but different head dimensions -------------------------------------------------------------


def _cpu_forward(call: Call) -> tuple[Tensor, Tensor, State]:
    query, key, value, mask, is_causal, scaling = call
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scaling
    )
    return output, lse, ()


def _cpu_backward(call: Call, grad: Tensor, output: Tensor, lse: Tensor, state: State) -> Gradients:
    query, key, value, mask, is_causal, scaling = call
    gradients: Gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, lse, 0.0, is_causal, attn_mask=mask, scale=scaling
    )
    return gradients


def _cpu_limits(call: Call) -> str | None:
    # The same as torch.backends.cuda.flash_sdp_enabled(), which torch.compile cannot trace.
    return None if torch._C._get_flash_sdp_enabled() else "flash attention is switched off"


# -- CUDA: cuDNN's, takes a mask and grouped key/value heads; what PyTorch prefers on Hopper and Blackwell -----------


def _cudnn_forward(call: Call) -> tuple[Tensor, Tensor, State]:
    query, key, value, _, is_causal, scaling = call
    result = aten._scaled_dot_product_cudnn_attention(
        query, key, value, _whole_mask(call), True, 0.0, is_causal, False, scale=scaling
    )
    output, lse, _, _, _, _, seed, offset, _ = result
    return output, lse.squeeze(-1), (seed, offset)


def _cudnn_backward(call: Call, grad: Tensor, output: Tensor, lse: Tensor, state: State) -> Gradients:
    query, key, value, _, is_causal, scaling = call
    # PyTorch keeps cuDNN's plans by the layouts of query, key, value and mask alone: a plan that was made for another
    # layout of the output or of its gradient would read them wrongly.
    like = torch.empty_like(query)
    grad, output = (t if t.stride() == like.stride() else torch.empty_like(query).copy_(t) for t in (grad, output))
    gradients: Gradients = aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, output, lse.unsqueeze(-1).contiguous(), *state, _whole_mask(call), None, None,
        query.shape[2], key.shape[2], 0.0, is_causal, scale=scaling,
    )  # fmt: skip
    return gradients


def _cudnn_limits(call: Call) -> str | None:
    length, size, dim = call.query.shape[2], call.key.shape[2], call.query.shape[3]
    if length == 1 or size < 64:
        # It plans anew for each shape, which a growing cache would ask for in each step.
        return "cuDNN's attention is not worth its plan for one query or for fewer than 64 keys"
    obstacles = {
        "cuDNN's attention is switched off": not torch._C._get_cudnn_sdp_enabled(),
        "cuDNN's attention is not what PyTorch prefers on this device": not _prefers_cudnn(call.query.device),
        "cuDNN's attention wants float16 or bfloat16": call.query.dtype not in (torch.float16, torch.bfloat16),
        "cuDNN's attention wants a head dimension up to 128 that is a multiple of 8": dim > 128 or dim % 8 != 0,
        "cuDNN's attention wants causal attention to be square": call.is_causal and length != size,
        "cuDNN's attention is not deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def _whole_mask(call: Call) -> Tensor | None:
    """The mask with all its dimensions, whose last is contiguous."""
    mask = call.mask
    if mask is None:
        return None
    size = call.key.shape[2]
    mask = mask.expand(*mask.shape[:-1], size)
    return (mask if mask.stride(-1) == 1 else mask.contiguous()).expand(*call.query.shape[:3], size)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prefers_cudnn(device: torch.device) -> bool:
    """Whether PyTorch's own attention tries cuDNN's kernel first on a device, whatever the version of CUDA."""
    return _capability(device) in ((9, 0), (10, 0), (10, 3)) and (torch.backends.cudnn.version() or 0) > 91500


# -- CUDA: flash, takes grouped key/value heads, but no mask ---------------------------------------------------------


def _flash_forward(call: Call) -> tuple[Tensor, Tensor, State]:
    query, key, value, _, is_causal, scaling = call
    result = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scaling)
    output, lse, _, _, _, _, seed, offset, _ = result
    return output, lse, (seed, offset)


def _flash_backward(call: Call, grad: Tensor, output: Tensor, lse: Tensor, state: State) -> Gradients:
    query, key, value, _, is_causal, scaling = call
    # The kernel reads the LSE as if it were contiguous, whatever its strides.
    gradients: Gradients = aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, output, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, is_causal,
        *state, scale=scaling,
    )  # fmt: skip
    return gradients


def _flash_limits(call: Call) -> str | None:
    # Checks what torch.backends.cuda.can_use_flash_attention() does, which torch.compile cannot trace.
    dim, capability = call.query.shape[3], _capability(call.query.device)
    obstacles = {
        "flash attention is switched off": not torch._C._get_flash_sdp_enabled(),
        "flash attention takes no mask": call.mask is not None,
        "flash attention wants float16 or bfloat16": call.query.dtype not in (torch.float16, torch.bfloat16),
        "flash attention wants a head dimension up to 256 that is a multiple of 8": dim > 256 or dim % 8 != 0,
        "flash attention has no backward for this head dimension on this device": dim > 192
        and capability not in ((8, 0), (9, 0), (10, 0)),
        "flash attention wants a device of capability 8.0": capability < (8, 0),
        "flash attention wants causal attention to be square": call.is_causal
        and call.query.shape[2] != call.key.shape[2],
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


# -- CUDA: memory-efficient, takes a mask -----------------------------------------------------------------------------


def _efficient_forward(call: Call) -> tuple[Tensor, Tensor, State]:
    query, key, value, mask = _layout(call)
    output, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, 0.0, call.is_causal, scale=call.scaling
    )
    return output, lse[:, :, : query.shape[2]], (seed, offset)


def _efficient_backward(call: Call, grad: Tensor, output: Tensor, lse: Tensor, state: State) -> Gradients:
    query, key, value, mask = _layout(call)
    # As the forward gives them: in half precision, the kernel does not look at the layout of the output.
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    grad_query, grad_key, grad_value, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, mask, output, lse, *state, 0.0, [True, True, True, False], call.is_causal,
        scale=call.scaling,
    )  # fmt: skip
    groups = call.key.shape[1]
    if groups != call.query.shape[1]:
        grad_key, grad_value = (g.unflatten(1, (groups, -1)).sum(2) for g in (grad_key, grad_value))
    return grad_query, grad_key, grad_value


def _efficient_limits(call: Call) -> str | None:
    dtype, dim = call.query.dtype, call.query.shape[3]
    obstacles = {
        "memory-efficient attention is switched off": not torch._C._get_mem_efficient_sdp_enabled(),
        "memory-efficient attention does not take float64": dtype == torch.float64,
        "memory-efficient attention wants rows of a multiple of 16 bytes": dim * dtype.itemsize % 16 != 0,
        "memory-efficient attention has no bfloat16 on this device": dtype == torch.bfloat16
        and _capability(call.query.device) < (8, 0),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def _layout(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value and mask in the layout of this kernel, which does not support grouped heads."""
    query, key, value, mask, _, _ = call
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if mask is not None:  # each row must start at a multiple of 16 elements
        size = key.shape[2]
        mask = mask.expand(*mask.shape[:-1], size)
        if size % 16 or mask.stride(-1) != 1:
            mask = torch.nn.functional.pad(mask, (0, -size % 16)).contiguous()[..., :size]
        mask = mask.expand(*query.shape[:3], size)
    return query, key, value, mask


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# Tried in this order.
KERNELS: dict[str, dict[str, Kernel]] = {
    "cpu": {"flash": Kernel(_cpu_forward, _cpu_backward, _cpu_limits)},
    "cuda": {
        "cudnn": Kernel(_cudnn_forward, _cudnn_backward, _cudnn_limits),
        "flash": Kernel(_flash_forward, _flash_backward, _flash_limits),
        "efficient": Kernel(_efficient_forward, _efficient_backward, _efficient_limits, groups=False),
    },
}
