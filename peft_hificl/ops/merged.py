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

from .formula import HIDDEN, Scoring, VirtualPairs, grouped_matmul, sees_one_key, virtual_attention
from .kernels import KERNELS, Call, Kernel, State
from .packages import Packing
from .ring import ring_of

logger = logging.getLogger(__name__)


class Path(NamedTuple):
    """How a call is computed, and why: by the kernel of this name or, if None, by `formula.virtual_attention`."""

    kernel: str | None
    reason: str


class _Inputs(NamedTuple):
    """The inputs of a call that kernels compute.

    The first seven may require gradients; the first nine are tensors (or None), which autograd saves.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    log_weights: Tensor | None
    sinks: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    is_causal: bool
    scaling: float
    scale_self_attention: bool
    skip_first_token: bool
    packing: Packing | None  # in the place of a mask, for the kernel of a package
    kernels: tuple[str, str]  # of the context and of the virtual pairs
    group: torch.distributed.ProcessGroup | None  # of the ranks that share the context


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
    path, inputs, virtual = _plan(query, key, value, pairs, scoring, group)
    if inputs is None or virtual is None:
        if group is not None:
            raise ValueError(f"Attention over keys that {group.size()} ranks share cannot be computed: {path.reason}.")
        if not torch.compiler.is_compiling():
            logger.debug("HiFICL runs with the score matrix in memory: %s", path.reason)
        return virtual_attention(query, key, value, pairs, _unpacked(query, key, scoring))[0]

    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:7]):
        output: Tensor = _Differentiable.apply(*inputs)
    else:
        output = _run(inputs, _context_call(inputs), virtual).output
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
    return _plan(*autocast(query, key, value), pairs, scoring)[0]


def needs_formula(scoring: Scoring) -> str | None:
    """Why the result cannot be computed from a kernel's output and log-sum-exp of the context; None if it can."""
    if scoring.dropout:
        return "attention dropout"
    if scoring.softcap is not None:
        return "soft-capped scores"
    return recorder()


_PROXIES = torch._C._TorchDispatchModeKey.PROXY  # on under make_fx and the tracers built on it


def recorder() -> str | None:
    """What is tracing this call in order to replace its operations by others; None if nothing is.

    A replacement of a kernel has the same output, but not the same log-sum-exp: torch's own decomposition of the CPU
    kernel returns attention weights in its place, and translators for other runtimes return zeros.
    """
    if torch.compiler.is_exporting():
        return "an export"
    if torch.compiler.is_compiling():
        return None if _compiles_kernels() else f"a torch.compile backend that is not one of {', '.join(_BACKENDS)}"
    if torch._C._is_tracing() or torch._C._get_dispatch_mode(_PROXIES) is not None:
        return "a trace"
    return None


# Backends of torch.compile that leave kernels as they are if they are called by name.
_BACKENDS = ("inductor", "cudagraphs", "eager", "aot_eager", "aot_eager_decomp_partition")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _compiles_kernels() -> bool:
    """Whether torch.compile traces for one of `_BACKENDS`."""
    try:
        output = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output
        backend: Any = torch._dynamo.eval_frame.innermost_backend(output.compiler_fn)  # type: ignore[arg-type]
        # Under DistributedDataParallel, it is wrapped by a splitter of graphs.
        backend = getattr(getattr(backend, "__self__", None), "backend_compile_fn", backend)
        if isinstance(backend, torch._TorchCompileInductorWrapper):
            return True
        known = [torch._dynamo.backends.registry.lookup_backend(name) for name in _BACKENDS]
        return getattr(backend, "compiler_fn", backend) in known
    except AttributeError:  # another thread is compiling, or torch has renamed its internals
        return False


def _plan(
    query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Path, _Inputs | None, _Virtual | None]:  # fmt: skip
    """The path and, if kernels are used, their inputs and the call over the virtual pairs."""
    packing = scoring.mask if isinstance(scoring.mask, Packing) else None
    mask = None if packing is not None else scoring.mask
    reason = needs_formula(scoring)
    if reason is None:
        if any(t is not None and t.requires_grad for t in (mask, scoring.bias)):
            reason = "a mask or bias that is trained"
        elif torch._C._are_functorch_transforms_active():
            reason = "a torch.func transform"
        elif not query.dtype == key.dtype == value.dtype:
            reason = "query, key and value of different dtypes"
        elif key.shape[2] == 0:
            reason = "no keys"
        elif query.shape[1] % key.shape[1]:  # the CPU's kernel would divide by zero, the formula raises
            reason = f"{query.shape[1]} query heads for {key.shape[1]} key/value heads"
    if reason is not None:
        return Path(None, reason), None, None
    if query.shape[-1] != value.shape[-1]:
        # Kernels need equal head dimensions.  Padding by zeros does not change the scores; `attention` cuts the output.
        dim = max(query.shape[-1], value.shape[-1])
        query, key, value = _padded(query, dim), _padded(key, dim), _padded(value, dim)
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    inputs = _Inputs(
        query, key, value, pairs.keys, pairs.values, pairs.log_weights, scoring.sinks, mask, scoring.bias,
        scoring.is_causal, scoring.scaling, pairs.scale_self_attention,
        pairs.skip_first_token, packing, ("", ""), group,
    )  # fmt: skip
    # For the limits, it only matters whether there is a mask: it is converted later, if a kernel is found.
    context = Call(query, key, value, scoring.bias if mask is None else mask, scoring.is_causal, scoring.scaling)
    if packing is not None and packing.limits(context) is not None:
        return _plan(query, key, value, pairs, _unpacked(query, key, scoring))
    with torch.no_grad():
        virtual = _virtual_call(inputs)
    kernels = KERNELS.get(query.device.type, {})
    chosen = []
    for call, table in ((context, _for_context(query.device, packing, group)), (virtual.call, kernels)):
        reasons = []
        for name, kernel in table.items():
            reason = kernel.limits(call)
            if reason is None:
                chosen.append(name)
                break
            reasons.append(reason)
        else:
            return Path(None, "; ".join(reasons) or f"no kernel for the device {query.device.type}"), None, None
    return Path(chosen[0], "it takes these inputs"), inputs._replace(kernels=(chosen[0], chosen[1])), virtual


def _unpacked(query: Tensor, key: Tensor, scoring: Scoring) -> Scoring:
    """A scoring whose mask is one: what a `Packing` says, as a boolean mask."""
    if not isinstance(scoring.mask, Packing):
        return scoring
    return scoring._replace(mask=scoring.mask.mask(query, key))


def _for_context(
    device: torch.device, packing: Packing | None, group: torch.distributed.ProcessGroup | None
) -> dict[str, Kernel]:
    """The kernels that may compute the context, by name."""
    if packing is not None:
        return {packing.package.name: packing.kernel}
    table = KERNELS.get(device.type, {})
    return table if group is None else {name: ring_of(kernel, group) for name, kernel in table.items()}


def _kernels(inputs: _Inputs) -> tuple[Kernel, Kernel]:
    """That of the context and that of the virtual pairs."""
    (context, virtual), device = inputs.kernels, inputs.query.device
    return _for_context(device, inputs.packing, inputs.group)[context], KERNELS[device.type][virtual]


def _context_call(inputs: _Inputs) -> Call:
    """Attention of the queries over the context."""
    mask = _additive(inputs.mask, inputs.bias, inputs.query.dtype)
    return Call(inputs.query, inputs.key, inputs.value, mask, inputs.is_causal, inputs.scaling)


class _Virtual(NamedTuple):
    """A kernel call over the virtual pairs, and what was taken from the log-weights of each head for it.

    Attributes:
        call: its LSE lacks `top`.
        top: (B or 1, H or 1, 1), or None: nothing.
    """

    call: Call
    top: Tensor | None


def _virtual_call(inputs: _Inputs) -> _Virtual:
    """Attention of the queries over the virtual pairs, all of which are visible."""
    query, keys, values = inputs.query, inputs.keys, inputs.values
    batch, _, _, dim = query.shape
    # Each step is skipped if it would change nothing, since even that costs time in every decode step.
    if keys.dtype != query.dtype:
        keys, values = keys.to(query.dtype), values.to(query.dtype)
    if keys.shape[-1] != dim or values.shape[-1] != dim:
        keys, values = _padded(keys, dim), _padded(values, dim)
    keys, values = _aligned(keys), _aligned(values)
    if keys.shape[0] != batch:
        keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
    log_weights, top = inputs.log_weights, _top(inputs)
    if log_weights is not None:
        log_weights = (log_weights if top is None else log_weights - top)[:, :, None]  # (B or 1, H or 1, 1, n)
    return _Virtual(Call(query, keys, values, _additive(log_weights, None, query.dtype), False, inputs.scaling), top)


def _top(inputs: _Inputs) -> Tensor | None:
    """What is taken from the log-weights of each head, and added to their LSE: the largest, (B or 1, H or 1, 1).

    A kernel rounds them to the dtype of the query, in half precision by up to 0.03 between 8 and 16.  What is left of
    the heaviest pairs is near zero, where rounding hardly matters.  None: nothing is rounded, so nothing is taken.
    """
    weights = inputs.log_weights
    if weights is None or torch.finfo(weights.dtype).eps >= torch.finfo(inputs.query.dtype).eps:
        return None
    # Finite, for a row without pairs; in the dtype of the LSE.
    return weights.amax(dim=-1, keepdim=True).clamp_min(HIDDEN).float()


def _first_tokens(inputs: _Inputs) -> Tensor | None:
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


def _run(inputs: _Inputs, context: Call, virtual: _Virtual, for_backward: bool = False) -> _Run:
    """Attention over the context and over the virtual pairs, merged; what a backward needs is made only for one."""
    kernels = _kernels(inputs)
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
        inputs = _Inputs(*arguments)
        output, seen, states = _run(inputs, _context_call(inputs), _virtual_call(inputs), for_backward=True)
        # The masks as they came, shared by all layers; converted again in the backward.
        parts = [*seen, *states]
        ctx.save_for_backward(*inputs[:9], *(tensor for part in parts for tensor in part))
        ctx.options, ctx.sizes = inputs[9:], [len(part) for part in parts]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = _Inputs(*islice(saved, 9), *ctx.options)
        *seen, context_state, virtual_state = (tuple(islice(saved, size)) for size in ctx.sizes)
        context, virtual = _Seen(*seen[0]), _Seen(*seen[-1])
        kernels = _kernels(inputs)
        grad, (call, top), first = _aligned(grad), _virtual_call(inputs), _first_tokens(inputs)
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
            more, of_key, of_value = kernels[0].backward(_context_call(inputs), grad, *context, context_state)
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


def _additive(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Mask and bias as one tensor of four dimensions that is added to the scores."""
    if mask is None and bias is None:
        return None
    # Finite, as kernels return an LSE of 0 instead of -inf for a row of nothing but -inf.  Half of the minimum, as some
    # kernels multiply scores by log2(e) in float32, which would overflow; float16's minimum is far from that.
    minimum = torch.finfo(dtype).min / (1 if dtype == torch.float16 else 2)
    if mask is not None and mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        total = torch.where(mask, zero if bias is None else bias.to(dtype), minimum)
    else:
        total = sum(t.to(dtype) for t in (mask, bias) if t is not None)  # type: ignore[assignment]
        total = total.clamp_min(minimum)
    return total[(None,) * (4 - total.dim())]


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that kernels can read: they assume, unchecked, that its last dimension is contiguous.

    CUDA's also assume that every row begins at a multiple of 16 bytes.
    """
    if tensor.stride(-1) != 1:
        return tensor.contiguous()
    if not torch.compiler.is_compiling() and tensor.is_cuda:  # torch.compile does not trace storage_offset()
        word = 16 // tensor.itemsize
        # A view of a flat buffer may begin anywhere, and after a misaligned read the process cannot use CUDA any more.
        if any(place % word for place in (tensor.storage_offset(), *tensor.stride()[:-1])):
            return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _padded(tensor: Tensor, dim: int) -> Tensor:
    missing = dim - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cast that PyTorch's autocast makes before its own attention."""
    device = query.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return query, key, value
    if query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)
