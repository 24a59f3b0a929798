"""HiFICL by attention kernels: one call for the context, one for the virtual pairs, and a merge of the two outputs.

With the output and the log-sum-exp (LSE) of attention over the context, ``O_SA`` and ``L_SA``, and over the virtual
pairs, ``O_D`` and ``L_D``,

    L     = log(exp L_SA + exp L_D)
    alpha = exp(L_SA - L) = sigmoid(L_SA - L_D)
    out   = alpha * O_SA + (1 - alpha) * O_D         or, with alpha = 1,    O_SA + (1 - alpha) * O_D

is exactly the formula of `formula`, with ``Z_SA = exp L_SA`` and ``Z_D = exp L_D``.  Sinks are joined to the context
first: their values are zero, so ``L_SA`` becomes ``log(exp L_SA + exp sink)`` and ``O_SA`` shrinks by the difference.
No score matrix is formed, and the kernel computes the context as it would without an adapter.

The backward of a kernel computes ``P = exp(score - L)`` and ``delta = rowsum(grad * O)`` from the LSE and the output
that it is given.  Given the *merged* LSE and output, it returns the exact gradients of its part.  With alpha = 1, the
context is given ``L_SA`` and ``O_SA + alpha (1 - alpha) O_D``, and the pairs ``L`` and ``(1 - alpha) O_D``: the share
``1 - alpha`` depends on both LSEs, and these outputs make ``delta`` include its gradient.
"""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .calls import Inputs, Path, Virtual, aligned, autocast, context_call, kernels_of, plan, unpacked, virtual_call
from .formula import Scoring, VirtualPairs, grouped_matmul, sees_one_key, virtual_attention
from .kernels import Call, Kernel, State

logger = logging.getLogger(__name__)


def attention(
    query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """The output of `formula.virtual_attention`, computed in the fastest way that is exact.

    Arguments, shapes and errors are those of `formula.virtual_attention`; `attention_path` tells how a call is
    computed.  Under autocast the inputs are cast first, as PyTorch does for `scaled_dot_product_attention`.  A
    `Packing` in the place of the mask has its package compute the context, or is made a mask where that cannot.

    With a `group` of ranks, each has the queries and the context of some tokens of every row, and all have the same
    pairs (see `ring`); the output is that of the rank's own queries.

    Raises:
        ValueError: no kernel takes a call with a `group`.

    Returns:
        ``(B, H, T, e)`` in the dtype of the inputs.  For half-precision inputs, scores, LSE and merge are float32, and
        the virtual pairs are rounded to the dtype of the inputs, and so are the differences of their log-weights from
        the largest one of the head.

    Source: arXiv 2603.12760, section 3, written in terms of log-sum-exps; exact.
    """
    query, key, value = autocast(query, key, value)
    path, inputs, virtual = plan(query, key, value, pairs, scoring, group)
    if inputs is None or virtual is None:
        if group is not None:
            raise ValueError(f"Attention over keys that {group.size()} ranks share cannot be computed: {path.reason}.")
        if not torch.compiler.is_compiling():
            logger.debug("HiFICL runs with the score matrix in memory: %s", path.reason)
        return virtual_attention(query, key, value, pairs, unpacked(query, key, scoring))[0]

    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:7]):
        output: Tensor = _Differentiable.apply(*inputs)
    else:
        output = _run(inputs, context_call(inputs), virtual).output
    return output if query.shape[-1] == value.shape[-1] else output[..., : value.shape[-1]]


def attention_path(query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring) -> Path:
    """How `attention` computes a call with these arguments, and why.

    >>> q, k, v = torch.randn(3, 1, 4, 5, 8)
    >>> pairs = VirtualPairs(torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8))
    >>> attention_path(q, k, v, pairs, Scoring(scaling=0.3)).kernel
    'flash'
    >>> attention_path(q, k, v, pairs, Scoring(scaling=0.3, dropout=0.1))
    Path(kernel=None, reason='attention dropout')
    """
    return plan(*autocast(query, key, value), pairs, scoring)[0]


def _first_tokens(inputs: Inputs) -> Tensor | None:
    """The queries that the pairs are hidden from, broadcastable to (B, H, T); None if there are none."""
    if not inputs.skip_first_token:
        return None
    if inputs.packing is not None:
        return inputs.packing.sees_one_key(inputs.query, inputs.key)
    size = inputs.key.shape[2]
    if inputs.group is not None:
        if inputs.group.rank() > 0:  # a row begins on the first rank
            return None
        size *= inputs.group.size()
    scoring = Scoring(inputs.scaling, inputs.mask, inputs.is_causal)
    return sees_one_key(inputs.query.shape[2], size, scoring, inputs.query.device)


def _hidden(lse: Tensor, first: Tensor | None) -> Tensor:
    """The LSE (B, H, T) of pairs that some queries do not see.  Finite, so that no difference of two is NaN."""
    return lse if first is None else lse.masked_fill(first, torch.finfo(lse.dtype).min / 2)


class _Seen(NamedTuple):
    """What the backward of a kernel is handed: an output (B, H, T, d) and an LSE (B, H, T)."""

    output: Tensor
    lse: Tensor


class _Run(NamedTuple):
    """What two kernel calls give.

    Attributes:
        output: the attention over both, (B, H, T, d).
        seen: what the two backwards are handed, of the context and of the virtual pairs; one pair if it is the same.
        states: what they need besides.
    """

    output: Tensor
    seen: tuple[_Seen, ...] = ()
    states: tuple[State, ...] = ()


def _run(inputs: Inputs, context: Call, virtual: Virtual, for_backward: bool = False) -> _Run:
    """Attention over the context and over the virtual pairs, merged; what a backward needs is made only for one."""
    kernels = kernels_of(inputs)
    one_query = context.query.shape[2] == 1 and not context.is_causal
    if one_query and not for_backward and not kernels[0].groups and context.key.shape[1] != context.query.shape[1]:
        context_output, context_lse, context_state = _folded(kernels[0], context)
    else:
        context_output, context_lse, context_state = kernels[0].forward(context)
    virtual_output, own_lse, virtual_state = kernels[1].forward(virtual.call)
    own_lse = own_lse if virtual.top is None else own_lse + virtual.top
    first = _first_tokens(inputs)
    virtual_lse = _hidden(own_lse, first)
    if inputs.sinks is not None:
        lse = torch.logaddexp(context_lse, inputs.sinks.to(context_lse.dtype).reshape(1, -1, 1))
        context_output, context_lse = _times(torch.exp(context_lse - lse), context_output), lse
    states, dtype = (context_state, virtual_state), virtual_output.dtype
    if inputs.scale_self_attention:
        output = _lerp(virtual_output, context_output, torch.sigmoid(context_lse - virtual_lse))
        if not for_backward:
            return _Run(output)
        seen = _Seen(output, torch.logaddexp(context_lse, virtual_lse))
        return _Run(output, (seen,) if first is None else (seen, _of_pairs(seen, own_lse, first)), states)
    share = torch.sigmoid(virtual_lse - context_lse)  # 1 - alpha
    written = _times(share, virtual_output)
    output = (context_output + written).to(dtype)
    if not for_backward:
        return _Run(output)
    of_context = _Seen((context_output + _times(1 - share, written)).to(dtype), context_lse)
    of_virtual = _Seen(written.to(dtype), torch.logaddexp(context_lse, virtual_lse))
    return _Run(output, (of_context, _of_pairs(of_virtual, own_lse, first)), states)


def _of_pairs(seen: _Seen, own_lse: Tensor, first: Tensor | None) -> _Seen:
    """What the backward of the pairs is handed: for queries that do not see them, their own LSE.

    The gradient of these queries is zero there, but ``exp(score - L)`` could be infinite with another LSE.
    """
    return seen if first is None else seen._replace(lse=torch.where(first, own_lse, seen.lse))


def _folded(kernel: Kernel, call: Call) -> tuple[Tensor, Tensor, State]:
    """One query a row: the heads of a group become queries, so that the cache is not repeated for them."""
    batch, heads, _, dim = call.query.shape
    groups = call.key.shape[1]
    query, mask = call.query.reshape(batch, groups, heads // groups, dim), call.mask
    if mask is not None:
        mask = mask.expand(batch, heads, 1, -1).reshape(batch, groups, heads // groups, -1)
    output, lse, _ = kernel.forward(call._replace(query=query, mask=mask))
    return output.reshape(batch, heads, 1, dim), lse.reshape(batch, heads, 1), ()


def _times(factor: Tensor, output: Tensor) -> Tensor:
    """A factor (B, H, T) times an output (B, H, T, d), in the dtype of the factor: it is not rounded before a sum.

    The output comes first, and so the product has its layout in memory.
    """
    return output * factor.unsqueeze(-1)


def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """(1 - weight) * start + weight * end; it may be written over `start`, which nobody else holds."""
    weight = weight.unsqueeze(-1)
    if weight.dtype == start.dtype:
        return start.lerp_(end, weight)
    if start.is_cuda and not torch.compiler.is_compiling():
        # lerp takes one dtype; these two take each value as it is and round the sum once, with one float32 tensor for
        # three.  On a CPU mixed dtypes are slow, and torch.compile fuses the other way by itself.
        return torch.addcmul(weight * end, 1 - weight, start, out=start)
    return torch.lerp(start.to(weight.dtype), end.to(weight.dtype), weight).to(start.dtype)


def add_pairs(
    output: Tensor, lse: Tensor, query: Tensor, pairs: VirtualPairs, scoring: Scoring, first: Tensor | None = None
) -> Tensor:
    """Mix virtual pairs into attention that was computed elsewhere, given its output and its log-sum-exp.

    Args:
        output: ``(B, H, T, e)``, attention over the context without sinks.
        lse: ``(B, H, T)``, its LSE, through which gradients flow.
        query: ``(B, H, T, d)``.
        pairs: the virtual pairs.
        scoring: scaling and sinks; neither dropout nor a soft-cap.
        first: broadcastable to ``(B, H, T)``, True for queries that do not see the pairs.

    Returns:
        ``(B, H, T, e)`` in the dtype of `output`; differentiable in everything that is differentiable.
    """
    dtype = torch.promote_types(lse.dtype, torch.float32)
    scores = grouped_matmul(query.to(dtype) * scoring.scaling, pairs.keys.to(dtype).mT)  # (B, H, T, n)
    if pairs.log_weights is not None:
        # Finite, not -inf: a row without pairs must not become NaN.
        scores = scores + pairs.log_weights.to(dtype).clamp_min(torch.finfo(dtype).min / 2)[:, :, None]
    virtual = grouped_matmul(scores.softmax(dim=-1), pairs.values.to(dtype))
    context, lse = output.to(dtype), lse.to(dtype)
    if scoring.sinks is not None:
        with_sinks = torch.logaddexp(lse, scoring.sinks.to(dtype).reshape(1, -1, 1))
        context, lse = _times(torch.exp(lse - with_sinks), context), with_sinks
    share = torch.sigmoid(_hidden(scores.logsumexp(dim=-1), first) - lse)[..., None]  # 1 - alpha
    mixed = torch.lerp(context, virtual, share) if pairs.scale_self_attention else context + share * virtual
    return mixed.to(output.dtype)


class _Differentiable(torch.autograd.Function):
    """`_run` with the gradients of query, key, value, virtual pairs, their log-weights and sinks."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs = Inputs(*arguments)
        output, seen, states = _run(inputs, context_call(inputs), virtual_call(inputs), for_backward=True)
        # The masks as they came, shared by all layers; converted again in the backward.
        parts = [*seen, *states]
        ctx.save_for_backward(*inputs[:9], *(tensor for part in parts for tensor in part))
        ctx.options, ctx.sizes = inputs[9:], [len(part) for part in parts]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = Inputs(*islice(saved, 9), *ctx.options)
        *seen, context_state, virtual_state = (tuple(islice(saved, size)) for size in ctx.sizes)
        context, virtual = _Seen(*seen[0]), _Seen(*seen[-1])
        kernels = kernels_of(inputs)
        grad, (call, top), first = aligned(grad), virtual_call(inputs), _first_tokens(inputs)
        if top is not None:
            virtual = virtual._replace(lse=virtual.lse - top)
        of_pairs = grad if first is None else grad.masked_fill(first[..., None], 0)
        of_query, of_keys, of_values = kernels[1].backward(call, of_pairs, *virtual, virtual_state)
        of_keys, of_values = (
            g[..., : like.shape[-1]].to(like.dtype).sum_to_size(like.shape)
            for g, like in ((of_keys, inputs.keys), (of_values, inputs.values))
        )
        of_key = of_value = of_log_weights = of_sinks = None
        if any(ctx.needs_input_grad[:3]):  # not in the first layer of a frozen model
            more, of_key, of_value = kernels[0].backward(context_call(inputs), grad, *context, context_state)
            of_query = of_query + more
        if inputs.log_weights is not None and ctx.needs_input_grad[5]:
            of_log_weights = _summed(_score_gradient(call, of_pairs, virtual).sum(2), inputs.log_weights)
        if inputs.sinks is not None and ctx.needs_input_grad[6]:
            weight = torch.exp(inputs.sinks.to(context.lse.dtype).reshape(1, -1, 1) - context.lse)  # (B, H, T)
            of_sinks = _summed(-(weight * _delta(grad, context)).sum((0, 2)), inputs.sinks)
        return of_query, of_key, of_value, of_keys, of_values, of_log_weights, of_sinks, *[None] * 9


def _score_gradient(call: Call, grad: Tensor, seen: _Seen) -> Tensor:
    """The gradient of the scores (B, H, T, n) of a few keys: what kernels form within and keep to themselves."""
    dtype = torch.promote_types(seen.lse.dtype, torch.float32)
    scores = grouped_matmul(call.query.to(dtype) * call.scaling, call.key.to(dtype).mT)
    if call.mask is not None:
        scores = scores + call.mask.to(dtype)
    weights = torch.exp(scores - seen.lse.to(dtype)[..., None])
    return weights * (grouped_matmul(grad.to(dtype), call.value.to(dtype).mT) - _delta(grad, seen)[..., None])


def _delta(grad: Tensor, seen: _Seen) -> Tensor:
    """``rowsum(grad * output)``, (B, H, T)."""
    return (grad.to(seen.lse.dtype) * seen.output.to(seen.lse.dtype)).sum(-1)


def _summed(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of a tensor that was broadcast."""
    return gradient.sum_to_size(like.shape).to(like.dtype)
