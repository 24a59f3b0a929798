"""Time, peak memory and FLOPs of a call, on a CPU or a CUDA device.

Memory is what PyTorch's own allocators hand out.  On CUDA that is `torch.cuda.max_memory_allocated`.  On a CPU it is
every allocation and release that the profiler records; scratch that a kernel takes through PyTorch's allocator is part
of it, what BLAS and oneDNN allocate for themselves is not.  The resident set size would include both, but also whatever
the C library has not returned yet, which is more than the differences that matter here.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start and stop on stderr

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils import flop_counter

from ..common.tables import Record

Samples = dict[str, list[float]]  # seconds by variant, one per round

_SHORTEST = (
    5e-3  # seconds; a shorter call is repeated within one sample, or the clock and the synchronisation would count
)


def stopwatch(function: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds per call, from an idle device to an idle device."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleave(
    variants: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, min_rounds: int = 5
) -> Samples:
    """Time the variants round-robin, for about `seconds` and at least `min_rounds` rounds."""
    repeats = {}
    for name, function in variants.items():
        function()  # allocators, kernel choice, compilation
        repeats[name] = max(1, math.ceil(_SHORTEST / stopwatch(function, device)))
    samples: Samples = {name: [] for name in variants}
    start = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or time.perf_counter() - start < seconds:
        for name, function in variants.items():
            samples[name].append(stopwatch(function, device, repeats[name]))
        rounds += 1
    return samples


def summary(samples: Samples, name: str) -> Record:
    """Median, quartiles and number of samples of one variant."""
    first, middle, third = np.percentile(samples[name], (25, 50, 75))
    return {"seconds": middle, "seconds_q1": first, "seconds_q3": third, "samples": len(samples[name])}


def ratio(samples: Samples, name: str, reference: str) -> float:
    """Time of a variant over the reference's in the same round: the median over all rounds."""
    return median(a / b for a, b in zip(samples[name], samples[reference], strict=True))


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that lived at one time during the call, above what lived before it."""
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory behind these tensors, shared memory counted once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def flops(function: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention, forward and backward; works on meta tensors too.

    As `torch.utils.flop_counter` counts: a multiply-add is two, causal attention counts as full attention, and a custom
    kernel that the counter has no formula for counts as nothing.
    """
    with flop_counter.FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


def _attention(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: tuple[int, ...],
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    *_: object,
    **__: object,
) -> int:
    return flop_counter.sdpa_backward_flop_count(grad, query, key, value)


# The counter knows the CUDA kernels, but not the CPU's, whose arguments begin in the same way.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def growth_exponent(sizes: Iterable[float], costs: Iterable[float]) -> float:
    """p of the least-squares fit ``cost ~ size ** p``."""
    return float(np.polyfit(np.log(list(sizes)), np.log(list(costs)), 1)[0])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
