"""The attention operation itself, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from ..common import colors
from ..common.tables import Record, Table, bytes_of, decimal, duration, tabulate
from .measure import growth_exponent, interleave, peak_bytes, ratio, summary
from .presets import HIFICL, N, Preset
from .report import Bar, spread
from .variants import CONCATENATION, PLAIN, SECOND_SCORES, VARIANTS, make_inputs

TITLE = "Attention operation"
METHOD = f"""Batch 1, n = {N} virtual pairs per query head. `causal`: the kernel's own flag for SDPA and HiFICL;
`padded`: a boolean mask, causal with the first quarter of the keys hidden (a padding query sees itself). Backward:
gradients of query, key, value and, except for plain SDPA, of the virtual keys and values. With grouped queries plain
SDPA gets `enable_gqa` where there is no mask and repeated keys and values where there is one, as in transformers. The
variants are checked to agree before they are timed. Masks are made beforehand, once per length, as a model makes them
once for all layers. Memory is the peak during the call above its inputs and masks. Exponents: least squares of log
cost on log T over all lengths; the bar compares those of memory where HiFICL takes more than plain SDPA at some length,
as where it takes less at every length its growth is bounded by plain SDPA's, whose own mask is of order T^2."""

LONG = 1024  # the bar counts from this length on
COLORS = {PLAIN: colors.GREY, HIFICL: colors.HIFICL, CONCATENATION: "#8c6bb1", SECOND_SCORES: "#ce3a4a"}
SAME_EXPONENT = 0.05  # a term of order T^2 would raise the exponent by up to 1


def forward(attend: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        attend()


def forward_backward(attend: Callable[[], Tensor], leaves: tuple[Tensor, ...], gradient: Tensor) -> None:
    torch.autograd.grad(attend(), leaves, gradient)


def run(preset: Preset, device: torch.device, compiled: bool) -> list[Record]:
    cells = [
        (heads, padded, length)
        for heads in ("MHA", "GQA")
        for padded in (False, True)
        for length in sorted(preset.lengths)
    ]
    records: list[Record] = []
    for heads, padded, length in track(cells, TITLE):
        kv_heads = preset.heads if heads == "MHA" else preset.kv_heads
        x = make_inputs(preset, kv_heads, length, padded, device)
        variants = {name: partial(attend, x) for name, attend in VARIANTS.items()}
        check_agreement({name: attend for name, attend in variants.items() if name != PLAIN})
        context = (x.query, x.key, x.value)
        passes: dict[str, dict[str, Callable[[], None]]] = {"forward": {}, "forward + backward": {}}
        for name, attend in variants.items():
            leaves = context if name == PLAIN else (*context, x.pairs.keys, x.pairs.values)
            passes["forward"][name] = partial(forward, attend)
            passes["forward + backward"][name] = partial(forward_backward, attend, leaves, torch.ones_like(x.query))
        for pass_name, functions in passes.items():
            samples = interleave(functions, device, preset.seconds)
            records += [
                {
                    "pass": pass_name,
                    "heads": heads,
                    "mask": "padded" if padded else "causal",
                    "T": length,
                    "variant": name,
                    **summary(samples, name),
                    "time_ratio": ratio(samples, name, PLAIN),
                    "peak_bytes": peak_bytes(function, device),
                }
                for name, function in functions.items()
            ]
    return records


def check_agreement(variants: dict[str, Callable[[], Tensor]]) -> None:
    """Refuse to time variants that do not compute the same.

    Raises:
        RuntimeError: two of them differ by more than their precision explains.
    """
    with torch.no_grad():
        (reference, expected), *others = ((name, attend()) for name, attend in variants.items())
        tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
        for name, output in others:
            difference = ((output - expected).abs().max() / expected.abs().max()).item()
            if not difference < tolerance:
                raise RuntimeError(f"{name} and {reference} differ by {difference:.1e} of the maximum")


def curves(records: list[Record]) -> list[Record]:
    """Growth exponents in T, one row per curve."""
    keys = ("pass", "heads", "mask", "variant")
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in keys), []).append(record)
    return [
        {
            **dict(zip(keys, curve, strict=True)),
            "time_exponent": growth_exponent([r["T"] for r in points], [r["seconds"] for r in points]),
            "memory_exponent": growth_exponent([r["T"] for r in points], [r["peak_bytes"] for r in points]),
        }
        for curve, points in found.items()
        if len(points) > 1
    ]


def tables(records: list[Record]) -> list[Table]:
    plain_bytes = {_cell(r): r["peak_bytes"] for r in records if r["variant"] == PLAIN}
    return [
        tabulate(
            "Time and peak memory",
            records,
            {
                **{key: key for key in ("pass", "heads", "mask", "T", "variant")},
                "time": lambda r: duration(r["seconds"]),
                "quartiles": spread,
                "time of plain SDPA's": lambda r: decimal(r["time_ratio"]),
                "peak memory": lambda r: bytes_of(r["peak_bytes"]),
                "memory of plain SDPA's": lambda r: decimal(r["peak_bytes"] / plain_bytes[_cell(r)]),
            },
        ),
        tabulate(
            "Growth with T",
            curves(records),
            {
                **{key: key for key in ("pass", "heads", "mask", "variant")},
                "exponent of time": lambda r: decimal(r["time_exponent"]),
                "exponent of memory": lambda r: decimal(r["memory_exponent"]),
            },
        ),
    ]


def bars(records: list[Record]) -> list[Bar]:
    mine = [r for r in records if r["variant"] == HIFICL and r["pass"] == "forward + backward" and r["T"] >= LONG]
    slowest = max(mine, key=lambda r: r["time_ratio"], default=None)
    found = curves(records)
    memory = {_cell(c): c["memory_exponent"] for c in found if c["variant"] == PLAIN}
    plain_bytes = {_cell(r): r["peak_bytes"] for r in records if r["variant"] == PLAIN}
    more = {
        (r["pass"], r["heads"], r["mask"])
        for r in records
        if r["variant"] == HIFICL and r["peak_bytes"] > plain_bytes[_cell(r)]
    }
    growing = max(
        (c for c in found if c["variant"] == HIFICL and (c["pass"], c["heads"], c["mask"]) in more),
        key=lambda c: c["memory_exponent"] - memory[_cell(c)],
        default=None,
    )
    return [
        Bar(
            f"attention, forward + backward, T >= {LONG}: time over plain SDPA",
            "<=",
            1.10,
            slowest["time_ratio"] if slowest else None,
            f"worst of {len(mine)}: {slowest['heads']}, {slowest['mask']}, T = {slowest['T']}" if slowest else None,
        ),
        Bar(
            "memory growth in T where it takes more than plain SDPA: exponent less plain SDPA's",
            "<=",
            SAME_EXPONENT,
            growing["memory_exponent"] - memory[_cell(growing)] if growing else None,
            f"worst: {growing['pass']}, {growing['heads']}, {growing['mask']}: {growing['memory_exponent']:.2f}"
            if growing
            else None,
        ),
    ]


def _cell(record: Record) -> tuple[object, ...]:
    return tuple(record.get(key) for key in ("pass", "heads", "mask", "T"))


def draw(records: list[Record], figure: Figure) -> None:
    kinds = [(heads, mask) for heads in ("MHA", "GQA") for mask in ("causal", "padded")]
    backward = [r for r in records if r["pass"] == "forward + backward"]
    figure.set_size_inches(15, 7)
    panels = figure.subplots(2, len(kinds), sharex=True, sharey="row")
    for column, (heads, mask) in enumerate(kinds):
        for row, (quantity, scale, label) in enumerate(
            (("seconds", 1e3, "time, ms"), ("peak_bytes", 2**-20, "peak memory, MiB"))
        ):
            axes = panels[row][column]
            for variant, color in COLORS.items():
                points = [r for r in backward if (r["heads"], r["mask"], r["variant"]) == (heads, mask, variant)]
                costs = [r[quantity] * scale for r in points]
                axes.loglog([r["T"] for r in points], costs, marker="o", ms=4, color=color, label=variant)
            axes.set_xticks([r["T"] for r in points], [r["T"] for r in points])
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
            if row == 0:
                axes.set_title(f"{heads}, {mask}")
            else:
                axes.set_xlabel("T")
            if column == 0:
                axes.set_ylabel(label)
    panels[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle("Attention, forward + backward")
