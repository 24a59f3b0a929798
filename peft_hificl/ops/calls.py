"""Which kernels compute an attention call with virtual pairs, if any can, and what they are called with.

A call becomes two of `kernels.Call`, one over the context and one over the virtual pairs, whose results `merged` puts
together.  Here is decided whether it may: kernels cannot compute every call, and whoever traces a call may put
something else in their place.  And here dtypes, head dimensions, memory layouts and masks become those of kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formula import HIDDEN, Scoring, VirtualPairs
from .kernels import KERNELS, Call, Kernel
from .packages import Packing
from .ring import ring_of


class Path(NamedTuple):
    """How a call is computed, and why: by the kernel of this name or, if None, by `formula.virtual_attention`."""

    kernel: str | None
    reason: str


class Inputs(NamedTuple):
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


class Virtual(NamedTuple):
    """A kernel call over the virtual pairs, and what was taken from the log-weights of each head for it.

    Attributes:
        call: its LSE lacks `top`.
        top: (B or 1, H or 1, 1), or None: nothing.
    """

    call: Call
    top: Tensor | None


def plan(
    query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Path, Inputs | None, Virtual | None]:  # fmt: skip
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
    query, key, value = aligned(query), aligned(key), aligned(value)
    inputs = Inputs(
        query, key, value, pairs.keys, pairs.values, pairs.log_weights, scoring.sinks, mask, scoring.bias,
        scoring.is_causal, scoring.scaling, pairs.scale_self_attention,
        pairs.skip_first_token, packing, ("", ""), group,
    )  # fmt: skip
    # For the limits, it only matters whether there is a mask: it is converted later, if a kernel is found.
    context = Call(query, key, value, scoring.bias if mask is None else mask, scoring.is_causal, scoring.scaling)
    if packing is not None and packing.limits(context) is not None:
        return plan(query, key, value, pairs, unpacked(query, key, scoring))
    with torch.no_grad():
        virtual = virtual_call(inputs)
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


def unpacked(query: Tensor, key: Tensor, scoring: Scoring) -> Scoring:
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


def kernels_of(inputs: Inputs) -> tuple[Kernel, Kernel]:
    """That of the context and that of the virtual pairs."""
    (context, virtual), device = inputs.kernels, inputs.query.device
    return _for_context(device, inputs.packing, inputs.group)[context], KERNELS[device.type][virtual]


def context_call(inputs: Inputs) -> Call:
    """Attention of the queries over the context."""
    mask = _additive(inputs.mask, inputs.bias, inputs.query.dtype)
    return Call(inputs.query, inputs.key, inputs.value, mask, inputs.is_causal, inputs.scaling)


def virtual_call(inputs: Inputs) -> Virtual:
    """Attention of the queries over the virtual pairs, all of which are visible."""
    query, keys, values = inputs.query, inputs.keys, inputs.values
    batch, _, _, dim = query.shape
    # Each step is skipped if it would change nothing, since even that costs time in every decode step.
    if keys.dtype != query.dtype:
        keys, values = keys.to(query.dtype), values.to(query.dtype)
    if keys.shape[-1] != dim or values.shape[-1] != dim:
        keys, values = _padded(keys, dim), _padded(values, dim)
    keys, values = aligned(keys), aligned(values)
    if keys.shape[0] != batch:
        keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
    log_weights, top = inputs.log_weights, _top(inputs)
    if log_weights is not None:
        log_weights = (log_weights if top is None else log_weights - top)[:, :, None]  # (B or 1, H or 1, 1, n)
    return Virtual(Call(query, keys, values, _additive(log_weights, None, query.dtype), False, inputs.scaling), top)


def _top(inputs: Inputs) -> Tensor | None:
    """What is taken from the log-weights of each head, and added to their LSE: the largest, (B or 1, H or 1, 1).

    A kernel rounds them to the dtype of the query, in half precision by up to 0.03 between 8 and 16.  What is left of
    the heaviest pairs is near zero, where rounding hardly matters.  None: nothing is rounded, so nothing is taken.
    """
    weights = inputs.log_weights
    if weights is None or torch.finfo(weights.dtype).eps >= torch.finfo(inputs.query.dtype).eps:
        return None
    # Finite, for a row without pairs; in the dtype of the LSE.
    return weights.amax(dim=-1, keepdim=True).clamp_min(HIDDEN).float()


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


def aligned(tensor: Tensor) -> Tensor:
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
