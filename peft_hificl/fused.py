"""HiFICL at the cost of attention: the backend's own kernel, run on the context and on the virtual pairs, and merged.

With the output and the log-sum-exp (LSE) of attention over the context, ``O_SA`` and ``L_SA``, and over the virtual
pairs, ``O_D`` and ``L_D``,

    L     = log(exp L_SA + exp L_D)
    alpha = exp(L_SA - L) = sigmoid(L_SA - L_D)
    out   = alpha * O_SA + (1 - alpha) * O_D

is the formula of `functional`, exactly: ``Z_SA = exp L_SA`` and ``Z_D = exp L_D``.  Nothing of size T x S is formed,
no key is copied, no mask is added.  The backward hands the *merged* output and LSE to the kernel's own backward, which
then returns the exact gradients of its share (see `kernels`).
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional
from .functional import VirtualPairs
from .kernels import KERNELS, Call, State

logger = logging.getLogger(__name__)


class Path(NamedTuple):
    """How a call is computed: by a kernel, or (None) by the formula itself, with the score matrix in memory."""

    kernel: str | None
    reason: str


def attention(
    query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, *, scaling: float, **options: Any
) -> Tensor:
    """The output of `functional.virtual_attention`, by the fastest way that is exact.

    Arguments, shapes and errors are those of `functional.virtual_attention`; `attention_path` tells which way a call
    takes.  Under autocast the inputs are cast first, as PyTorch does for `scaled_dot_product_attention`.

    Returns:
        ``(B, H, T, e)`` in the dtype of the inputs.  For half-precision inputs, scores, LSE and merge are float32, and
        the virtual pairs are rounded to the dtype of the inputs.

    Source: arXiv 2603.12760, section 3, written in terms of log-sum-exps; exact.
    """
    query, key, value = _autocast(query, key, value)
    path, calls = _plan(query, key, value, pairs, scaling, **options)
    if calls is None or path.kernel is None:
        if not torch.compiler.is_compiling():
            logger.debug("HiFICL runs with the score matrix in memory: %s", path.reason)
        return functional.virtual_attention(query, key, value, pairs, scaling=scaling, **options)[0]

    context, virtual = calls
    tensors = (context.query, context.key, context.value, pairs.keys, pairs.values)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        output: Tensor = _Merged.apply(*tensors, context.mask, virtual.mask, path.kernel, context.is_causal, scaling)
    else:
        output = _merge(path.kernel, context, virtual)[0]
    return output if query.shape[-1] == value.shape[-1] else output[..., : value.shape[-1]]


def attention_path(
    query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, *, scaling: float, **options: Any
) -> Path:
    """Which way `attention` takes for these arguments, and why.

    >>> q, k, v = torch.randn(3, 1, 4, 5, 8)
    >>> pairs = VirtualPairs(torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8))
    >>> attention_path(q, k, v, pairs, scaling=0.3).kernel
    'flash'
    >>> attention_path(q, k, v, pairs, scaling=0.3, dropout=0.1)
    Path(kernel=None, reason='attention dropout')
    """
    query, key, value = _autocast(query, key, value)
    return _plan(query, key, value, pairs, scaling, **options)[0]


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: VirtualPairs,
    scaling: float,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Path, tuple[Call, Call] | None]:
    """The path, and for a kernel its two calls, over the context and over the virtual pairs."""
    reason = None
    if dropout:
        reason = "attention dropout"
    elif softcap is not None:
        reason = "soft-capped scores"
    elif sinks is not None:
        reason = "attention sinks"
    elif not pairs.scale_self_attention:
        reason = "scale_self_attention=False (alpha = 1)"
    elif any(t is not None and t.requires_grad for t in (mask, bias, pairs.log_weights)):
        reason = "a mask, bias or log-weight that is trained"
    elif torch._C._are_functorch_transforms_active():
        reason = "a torch.func transform"
    elif not query.dtype == key.dtype == value.dtype:
        reason = "query, key and value of different dtypes"
    elif key.shape[2] == 0:
        reason = "no keys"
    if reason is not None:
        return Path(None, reason), None
    if query.shape[-1] != value.shape[-1]:
        # Kernels want one head dimension: zeros change neither the scores nor, cut off again, the output.
        dim = max(query.shape[-1], value.shape[-1])
        query, key, value = _padded(query, dim), _padded(key, dim), _padded(value, dim)
    context = Call(query, key, value, _additive(mask, bias, query.dtype), is_causal, scaling)
    log_weights = None if pairs.log_weights is None else pairs.log_weights[:, :, None]  # (B or 1, H or 1, 1, n)
    virtual = _virtual_call(context, pairs.keys, pairs.values, _additive(log_weights, None, query.dtype))
    reasons = []
    for name, kernel in KERNELS.get(query.device.type, {}).items():
        limit = kernel.limits(context) or kernel.limits(virtual)
        if limit is None:
            return Path(name, "it takes these inputs"), (context, virtual)
        reasons.append(limit)
    return Path(None, "; ".join(reasons) or f"no kernel for the device {query.device.type}"), None


def _virtual_call(context: Call, keys: Tensor, values: Tensor, mask: Tensor | None) -> Call:
    """Attention of the same queries over the virtual pairs, which every row and every query sees."""
    query = context.query
    rows, _, _, dim = query.shape
    # Asked for one by one: while decoding, an operation that changes nothing costs as much as one that does.
    if keys.dtype != query.dtype:
        keys, values = keys.to(query.dtype), values.to(query.dtype)
    if keys.shape[-1] != dim or values.shape[-1] != dim:
        keys, values = _padded(keys, dim), _padded(values, dim)
    if keys.shape[0] != rows:
        keys, values = keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
    return Call(query, keys, values, mask, False, context.scaling)


def _merge(kernel: str, context: Call, virtual: Call) -> tuple[Tensor, tuple[Tensor, Tensor], State, State]:
    """The output of the attention over both, the LSE of each, and what the two backwards need."""
    forward = KERNELS[context.query.device.type][kernel].forward
    context_output, context_lse, context_state = forward(context)
    virtual_output, virtual_lse, virtual_state = forward(virtual)
    alpha = torch.sigmoid(context_lse - virtual_lse).unsqueeze(-1)  # (B, H, T, 1)
    if alpha.shape[2] != context_output.shape[2]:
        alpha = alpha[:, :, : context_output.shape[2]]  # some kernels pad their LSE
    if alpha.dtype == context_output.dtype:
        output = torch.lerp(virtual_output, context_output, alpha)
    else:
        output = torch.lerp(virtual_output.to(alpha.dtype), context_output.to(alpha.dtype), alpha)
        output = output.to(context_output.dtype)
    return output, (context_lse, virtual_lse), context_state, virtual_state


def merge(output: Tensor, lse: Tensor, query: Tensor, pairs: VirtualPairs, *, scaling: float) -> Tensor:
    """Mix virtual pairs into attention that was computed elsewhere, given its output and its log-sum-exp.

    Args:
        output: ``(B, H, T, e)``, attention over the context.
        lse: ``(B, H, T)``, its LSE, through which gradients flow.
        query: ``(B, H, T, d)``.
        pairs: the virtual pairs; ``scale_self_attention`` must be True.
        scaling: factor of every score.

    Returns:
        ``(B, H, T, e)`` in the dtype of `output`; differentiable in everything that is differentiable.
    """
    dtype = torch.promote_types(lse.dtype, torch.float32)
    virtual = functional.grouped_matmul(query.to(dtype) * scaling, pairs.keys.to(dtype).mT)  # (B, H, T, n)
    if pairs.log_weights is not None:
        virtual = virtual + pairs.log_weights.to(dtype)[:, :, None]
    mixed = functional.grouped_matmul(virtual.softmax(dim=-1), pairs.values.to(dtype))
    alpha = torch.sigmoid(lse.to(dtype) - virtual.logsumexp(dim=-1))[..., None]
    return torch.lerp(mixed, output.to(dtype), alpha).to(output.dtype)


class _Merged(torch.autograd.Function):
    """`_merge` with the gradients of query, key, value and virtual pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        virtual_keys: Tensor,
        virtual_values: Tensor,
        mask: Tensor | None,
        virtual_mask: Tensor | None,
        kernel: str,
        is_causal: bool,
        scaling: float,
    ) -> Tensor:
        context = Call(query, key, value, mask, is_causal, scaling)
        virtual = _virtual_call(context, virtual_keys, virtual_values, virtual_mask)
        output, lses, context_state, virtual_state = _merge(kernel, context, virtual)
        lse = torch.logaddexp(*lses)
        ctx.save_for_backward(
            query, key, value, virtual_keys, virtual_values, mask, virtual_mask, output, lse, *context_state,
            *virtual_state,
        )  # fmt: skip
        ctx.options = kernel, is_causal, scaling
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, virtual_keys, virtual_values, mask, virtual_mask, output, lse, *state = ctx.saved_tensors
        kernel, is_causal, scaling = ctx.options
        backward = KERNELS[query.device.type][kernel].backward
        half = len(state) // 2
        context = Call(query, key, value, mask, is_causal, scaling)
        virtual = _virtual_call(context, virtual_keys, virtual_values, virtual_mask)
        grad_query, grad_keys, grad_values = backward(virtual, grad, output, lse, tuple(state[half:]))
        grad_key = grad_value = None
        if any(ctx.needs_input_grad[:3]):  # not in the first layer of a frozen model
            context_query, grad_key, grad_value = backward(context, grad, output, lse, tuple(state[:half]))
            grad_query = grad_query + context_query
        grad_keys, grad_values = (
            g[..., : like.shape[-1]].to(like.dtype).sum_to_size(like.shape)
            for g, like in ((grad_keys, virtual_keys), (grad_values, virtual_values))
        )
        return grad_query, grad_key, grad_value, grad_keys, grad_values, None, None, None, None, None


def _additive(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Mask and bias as one tensor of four dimensions that is added to the scores."""
    if mask is None and bias is None:
        return None
    # The finite minimum, not -inf: of a row that sees nothing, a kernel returns the LSE 0 instead of -inf.
    minimum = torch.finfo(dtype).min
    if mask is not None and mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        total = torch.where(mask, zero if bias is None else bias.to(dtype), minimum)
    else:
        total = sum(t.to(dtype) for t in (mask, bias) if t is not None)  # type: ignore[assignment]
        total = total.clamp_min(minimum)
    return total[(None,) * (4 - total.dim())]


def _padded(tensor: Tensor, dim: int) -> Tensor:
    missing = dim - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cast that PyTorch's autocast makes before its own attention."""
    device = query.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return query, key, value
    if query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)
