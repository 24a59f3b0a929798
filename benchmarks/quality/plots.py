"""The pictures of the report; bars, bands and whiskers are 95 % intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from ..common.colors import GREY, HIFICL, LORA, PREFIX
from ..common.tables import NOT_MEASURED
from .frame import METHODS, PAIRS, RANKS, SHOTS, TASKS, Results
from .plan import FULL, HARD_TASKS, SIZES
from .statistics import Interval, interval

PALE = "#7fb3e0"
LINES = {  # color, marker
    "lora-8": ("#f2bb73", "v"),
    "lora-16": (LORA, "^"),
    "prefix": (PREFIX, "s"),
    "prefix-demos": ("#9ccf8f", "s"),
    "ia3": ("#8c6bb1", "D"),
    "live": ("#c994c7", "P"),
    "mimic": ("#ce3a4a", "X"),
    "hificl-n16": ("#12406e", "h"),
    "hificl": (HIFICL, "o"),
}
PREFIXES = {"cartridge": ("#3f7f93", "<"), "cartridge-demos": ("#3f7f93", ">")}
LEVELS = {"zero-shot": ":", "icl-8": "--"}

Score = Callable[[str, int], pd.Series]


def save(found: Results, folder: Path) -> dict[str, str]:
    """Draw every picture; returns titles by file name."""
    drawn: dict[str, tuple[str, tuple[float, float], Callable[[Results, Figure], None]]] = {
        "samples.png": ("Test score by number of training samples", (14, 7), draw_samples),
        "parameters.png": (
            f"Test score by trainable parameters, {FULL} samples, mean of {', '.join(TASKS[t] for t in HARD_TASKS)}",
            (10, 5.5),
            draw_parameters,
        ),
        "shots.png": ("Test score of prompting by number of demonstrations", (14, 7), draw_shots),
    }
    for name, (title, size, draw) in drawn.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(found, figure)
        figure.suptitle(title)
        figure.savefig(folder / name, dpi=110)
    return {name: title for name, (title, *_) in drawn.items()}


def draw_samples(found: Results, figure: Figure) -> None:
    for axes, score in _panels(found, figure):
        for method, (color, marker) in LINES.items():
            points = {samples: interval(score(method, samples)) for samples in SIZES}
            _line(axes, points, METHODS[method], color, marker, strong=method == "hificl")
        for method, style in LEVELS.items():
            _level(axes, interval(score(method, FULL)), METHODS[method], GREY, style)
        axes.set_xscale("log")
        axes.set_xticks(SIZES, list(map(str, SIZES)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("training samples")
        _finish(axes)
    _legend(figure)


def draw_shots(found: Results, figure: Figure) -> None:
    for axes, score in _panels(found, figure):
        shown = {place: interval(score(method, FULL)) for place, method in enumerate(SHOTS.values())}
        _whiskers(axes, shown, "prompting", GREY, "o", strong=True)
        _level(axes, interval(score("hificl", FULL)), f"HiFICL, {FULL} samples", HIFICL, "-")
        axes.set_xticks(range(len(SHOTS)), list(map(str, SHOTS)))
        axes.set_xlabel("demonstrations")
        _finish(axes)
    _legend(figure)


def draw_parameters(found: Results, figure: Figure) -> None:
    axes = figure.subplots()
    for variants, name, color in ((RANKS, "r", HIFICL), (PAIRS, "n", PALE)):
        by_number = {number: point for number, method in variants.items() if (point := _with_parameters(found, method))}
        _whiskers(axes, dict(by_number.values()), f"HiFICL by {name}", color, "o", strong=name == "r")
        for end, side in ((min, "right"), (max, "left")):
            if by_number:  # the label of the least stands to the left of its point, that of the most to the right
                x, score = by_number[end(by_number)]
                away = -8 if end is min else 8
                axes.annotate(
                    f"{name} = {end(by_number)}", (x, 100 * score.mean), (away, 0), textcoords="offset points",
                    ha=side, va="center", color=color,
                )  # fmt: skip
    for method, (color, marker) in (LINES | PREFIXES).items():
        if method == "hificl-n16":  # on the curve of n
            continue
        if point := _with_parameters(found, method):
            strong = method == "hificl"
            label = "HiFICL, r = 8, n = 8" if strong else METHODS[method]
            _whiskers(axes, dict([point]), label, color, "*" if strong else marker, strong)
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    _finish(axes)
    _legend(figure)


def _with_parameters(found: Results, method: str) -> tuple[int, Interval] | None:
    numbers, score = found.parameters(method), interval(found.means(method, FULL, tasks=HARD_TASKS))
    return (numbers[-1], score) if score and any(numbers) else None


def _panels(found: Results, figure: Figure) -> list[tuple[Axes, Score]]:
    """One per task and one for their mean, with the scores that belong in it; the eighth place is for the legend."""
    grid = list(figure.subplots(2, 4).flat)
    grid[-1].set_axis_off()

    def of(task: str) -> Score:
        return lambda method, samples: found.scores(method, task, samples)

    by_panel: list[tuple[str, Score]] = [(title, of(task)) for task, title in TASKS.items()]
    by_panel.append(("mean over tasks", found.means))
    panels = []
    for axes, (title, score) in zip(grid, by_panel, strict=False):
        axes.set_title(title, fontsize=10)
        panels.append((axes, score))
    return panels


def _whiskers(
    axes: Axes, points: Mapping[int, Interval | None], label: str, color: str, marker: str, strong: bool = False
) -> None:
    measured = sorted((x, point) for x, point in points.items() if point)
    if not measured:
        return
    line, *_ = axes.errorbar(
        [x for x, _ in measured],
        [100 * point.mean for _, point in measured],
        [100 * (point.half or 0) for _, point in measured],
        label=label,
        color=color,
        marker=marker,
        markersize=14 if marker == "*" else 6,
        linestyle="-" if len(points) > 1 else "none",
        linewidth=2 if strong else 1.1,
        elinewidth=1,
        capsize=2,
        zorder=3 if strong else 2,
    )
    line.set(markeredgecolor="white", markeredgewidth=0.6)  # given above, the caps would be white, too


def _line(
    axes: Axes, points: Mapping[int, Interval | None], label: str, color: str, marker: str, strong: bool = False
) -> None:
    """A line in the band of its intervals; a single point has whiskers."""
    measured = {x: point for x, point in sorted(points.items()) if point}
    if len(measured) > 1:
        low, high = ([100 * (p.mean + sign * (p.half or 0)) for p in measured.values()] for sign in (-1, 1))
        axes.fill_between(list(measured), low, high, color=color, alpha=0.15, linewidth=0)
        measured = {x: replace(point, half=None) for x, point in measured.items()}
    _whiskers(axes, measured, label, color, marker, strong)


def _level(axes: Axes, at: Interval | None, label: str, color: str, style: str) -> None:
    if at is None:
        return
    axes.axhline(100 * at.mean, label=label, color=color, linestyle=style, linewidth=1.5, zorder=1)
    if at.half:
        axes.axhspan(100 * (at.mean - at.half), 100 * (at.mean + at.half), color=color, alpha=0.12, linewidth=0)


def _finish(axes: Axes) -> None:
    place = axes.get_subplotspec()
    if place is None or place.is_first_col():
        axes.set_ylabel("test score, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_minor_formatter(NullFormatter())
    if not axes.has_data():
        axes.set_yticks([])
        axes.text(0.5, 0.5, NOT_MEASURED, transform=axes.transAxes, ha="center", color=GREY)


def _legend(figure: Figure) -> None:
    """One for all panels, of whatever any of them shows."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if not entries:
        return
    if len(figure.axes) > 1:
        figure.axes[-1].legend(list(entries.values()), list(entries), frameon=False, loc="center")
    else:
        figure.legend(list(entries.values()), list(entries), frameon=False, loc="outside right center", fontsize=9)
