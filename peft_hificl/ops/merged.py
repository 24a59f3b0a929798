"""HiFICL by attention kernels: one call for the context, one for the virtual pairs, and a merge of the two outputs.

With the output and the log-sum-exp (LSE) of attention over the context, ``O_SA`` and ``L_SA``, and over the virtual
pairs, ``O_D`` and ``L_D``,

    L     = log(exp L_SA + exp L_D)
    alpha = exp(L_SA - L) = sigmoid(L_SA - L_D)
    out   = alpha * O_SA + (1 - alpha) * O_D

is exactly the formula of `formula`, with ``Z_SA = exp L_SA`` and ``Z_D = exp L_D``.  No score matrix is formed, and the
kernel computes the context as it would without an adapter.  The backward gives the *merged* output and LSE to the
kernel's own backward, which then returns the exact gradients of its part (see `kernels`).
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formula import Scoring, VirtualPairs, grouped_matmul, virtual_attention
from .kernels import KERNELS, Call, Kernel, State

logger = logging.getLogger(__name__)


class Path(NamedTuple):
    """How a call is computed, and why: by the kernel of this name or, if None, by `formula.virtual_attention`."""

    kernel: str | None
    reason: str


class _Inputs(NamedTuple):
    """The inputs of a call that a kernel computes.

    The first five may require gradients; the first eight are tensors (or None), which autograd saves.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    bias: Tensor | None
    log_weights: Tensor | None
    is_causal: bool
    scaling: float
    kernel: str


def attention(query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring) -> Tensor:
    """The output of `formula.virtual_attention`, computed in the fastest way that is exact.

    Arguments, shapes and errors are those of `formula.virtual_attention`; `attention_path` tells how a call is
    computed.  Under autocast the inputs are cast first, as PyTorch does for `scaled_dot_product_attention`.

    Returns:
        ``(B, H, T, e)`` in the dtype of the inputs.  For half-precision inputs, scores, LSE and merge are float32, and
        the virtual pairs are rounded to the dtype of the inputs.

    Source: arXiv 2603.12760, section 3, written in terms of log-sum-exps; exact.
    """
    query, key, value = autocast(query, key, value)
    path, inputs, virtual = _plan(query, key, value, pairs, scoring)
    if inputs is None or virtual is None:
        if not torch.compiler.is_compiling():
            logger.debug("HiFICL runs with the score matrix in memory: %s", path.reason)
        return virtual_attention(query, key, value, pairs, scoring)[0]

    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs[:5]):
        output: Tensor = _Differentiable.apply(*inputs)
    else:
        kernel, context = KERNELS[query.device.type][inputs.kernel], _context_call(inputs)
        repeats = not kernel.groups and query.shape[1] != key.shape[1]
        decodes = repeats and query.shape[2] == 1 and not scoring.is_causal
        output = _decode(kernel, context, virtual) if decodes else _run(kernel, context, virtual).output
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


def needs_formula(pairs: VirtualPairs, scoring: Scoring) -> str | None:
    """Why the result cannot be computed from a kernel's output and log-sum-exp of the context; None if it can."""
    if scoring.dropout:
        return "attention dropout"
    if scoring.softcap is not None:
        return "soft-capped scores"
    if scoring.sinks is not None:
        return "attention sinks"
    if not pairs.scale_self_attention:
        return "scale_self_attention=False (alpha = 1)"
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
    query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring
) -> tuple[Path, _Inputs | None, Call | None]:
    """The path and, if a kernel is used, its inputs and the call over the virtual pairs."""
    reason = needs_formula(pairs, scoring)
    if reason is None:
        if any(t is not None and t.requires_grad for t in (scoring.mask, scoring.bias, pairs.log_weights)):
            reason = "a mask, bias or log-weight that is trained"
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
    _, mask, is_causal, bias, *_ = scoring
    inputs = _Inputs(
        query, key, value, pairs.keys, pairs.values, mask, bias, pairs.log_weights, is_causal, scoring.scaling, ""
    )  # fmt: skip
    # For the limits, it only matters whether there is a mask: it is converted later, if a kernel is found.
    context = Call(query, key, value, bias if mask is None else mask, is_causal, scoring.scaling)
    with torch.no_grad():
        virtual = _virtual_call(inputs)
    reasons = []
    for name, kernel in KERNELS.get(query.device.type, {}).items():
        limit = kernel.limits(context) or kernel.limits(virtual)
        if limit is None:
            return Path(name, "it takes these inputs"), inputs._replace(kernel=name), virtual
        reasons.append(limit)
    return Path(None, "; ".join(reasons) or f"no kernel for the device {query.device.type}"), None, None


def _context_call(inputs: _Inputs) -> Call:
    """Attention of the queries over the context."""
    mask = _additive(inputs.mask, inputs.bias, inputs.query.dtype)
    return Call(inputs.query, inputs.key, inputs.value, mask, inputs.is_causal, inputs.scaling)


def _virtual_call(inputs: _Inputs) -> Call:
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
    log_weights = None if inputs.log_weights is None else inputs.log_weights[:, :, None]  # (B or 1, H or 1, 1, n)
    return Call(query, keys, values, _additive(log_weights, None, query.dtype), False, inputs.scaling)


class _Run(NamedTuple):
    """The results of the two kernel calls."""

    output: Tensor  # of the attention over both, (B, H, T, d)
    lses: tuple[Tensor, Tensor]  # of the context and of the virtual pairs
    states: tuple[State, State]  # what the two backwards need besides


def _run(kernel: Kernel, context: Call, virtual: Call) -> _Run:
    """Attention over the context and over the virtual pairs, weighted by alpha."""
    context_output, context_lse, context_state = kernel.forward(context)
    virtual_output, virtual_lse, virtual_state = kernel.forward(virtual)
    alpha = torch.sigmoid(context_lse - virtual_lse)
    if alpha.shape[2] != context_output.shape[2]:
        alpha = alpha[:, :, : context_output.shape[2]]  # some kernels pad their LSE
    output = _weighted(context_output, virtual_output, alpha)
    return _Run(output, (context_lse, virtual_lse), (context_state, virtual_state))


def _decode(kernel: Kernel, context: Call, virtual: Call) -> Tensor:
    """`_run` for one query per row: the heads of a group become queries, so that keys and values are not repeated."""
    batch, heads, _, dim = context.query.shape
    groups = context.key.shape[1]
    query, mask = context.query.reshape(batch, groups, heads // groups, dim), context.mask
    if mask is not None:
        mask = mask.expand(batch, heads, 1, -1).reshape(batch, groups, heads // groups, -1)
    context_output, context_lse, _ = kernel.forward(context._replace(query=query, mask=mask))
    virtual_output, virtual_lse, _ = kernel.forward(virtual)
    context_lse = context_lse[:, :, : heads // groups].reshape(batch, heads, 1)
    alpha = torch.sigmoid(context_lse - virtual_lse[:, :, :1])
    return _weighted(context_output.reshape(batch, heads, 1, dim), virtual_output, alpha)


def _weighted(context: Tensor, virtual: Tensor, alpha: Tensor) -> Tensor:
    """alpha * context + (1 - alpha) * virtual, in the memory of `virtual` where the dtypes allow it."""
    alpha = alpha.unsqueeze(-1)
    if alpha.dtype == context.dtype:
        return virtual.lerp_(context, alpha)  # in place, as a kernel's output is used nowhere else
    return torch.lerp(virtual.to(alpha.dtype), context.to(alpha.dtype), alpha).to(context.dtype)


def add_pairs(output: Tensor, lse: Tensor, query: Tensor, pairs: VirtualPairs, scaling: float) -> Tensor:
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
    virtual = grouped_matmul(query.to(dtype) * scaling, pairs.keys.to(dtype).mT)  # (B, H, T, n)
    if pairs.log_weights is not None:
        # Finite instead of -inf, as a row without pairs would become NaN.
        virtual = virtual + pairs.log_weights.to(dtype).clamp_min(torch.finfo(dtype).min / 2)[:, :, None]
    mixed = grouped_matmul(virtual.softmax(dim=-1), pairs.values.to(dtype))
    alpha = torch.sigmoid(lse.to(dtype) - virtual.logsumexp(dim=-1))[..., None]
    return torch.lerp(mixed, output.to(dtype), alpha).to(output.dtype)


class _Differentiable(torch.autograd.Function):
    """`_run` with the gradients of query, key, value and virtual pairs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs = _Inputs(*arguments)
        kernel = KERNELS[inputs.query.device.type][inputs.kernel]
        output, lses, states = _run(kernel, _context_call(inputs), _virtual_call(inputs))
        # Save the masks unconverted, as all layers share them; the backward converts them again.
        ctx.save_for_backward(*inputs[:8], output, torch.logaddexp(*lses), *states[0], *states[1])
        ctx.options = inputs[8:]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, (output, lse), state = _Inputs(*saved[:8], *ctx.options), saved[8:10], saved[10:]
        backward = KERNELS[inputs.query.device.type][inputs.kernel].backward
        grad, half = _aligned(grad), len(state) // 2
        grad_query, grad_keys, grad_values = backward(_virtual_call(inputs), grad, output, lse, state[half:])
        grad_key = grad_value = None
        if any(ctx.needs_input_grad[:3]):  # not in the first layer of a frozen model
            context_query, grad_key, grad_value = backward(_context_call(inputs), grad, output, lse, state[:half])
            grad_query += context_query
        grad_keys, grad_values = (
            g[..., : like.shape[-1]].to(like.dtype).sum_to_size(like.shape)
            for g, like in ((grad_keys, inputs.keys), (grad_values, inputs.values))
        )
        return grad_query, grad_key, grad_value, grad_keys, grad_values, *[None] * 6


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
