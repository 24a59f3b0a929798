"""The picture of the README: a head with its virtual columns, and scores by number of samples.

``python -m docs.figures.head`` draws ``docs/figures/head.png``; the scores are those of ``benchmarks/results/quality``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from benchmarks.quality.frame import load
from benchmarks.quality.statistics import interval

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "quality"
VIRTUAL, TOKENS, GAP, CELL = 4, 8, 0.5, 0.9
BLUE, GREY = "#2171b5", "#595959"
SIZES = (16, 64, 256, 1000)
METHODS = {
    "lora-8": ("LoRA r = 8, 43,008 parameters", "#e08214", "^"),
    "hificl": ("HiFICL n = 8, r = 8, 15,360", BLUE, "o"),
    "prefix-demos": ("prefix tuning from demonstrations, 15,360", "#5aa655", "s"),
}


def draw_head(axes: Axes) -> None:
    """Attention weights of one head: every query sees all virtual columns, and those of the context up to itself."""
    scores = np.random.default_rng(0).normal(size=(TOKENS, VIRTUAL + TOKENS))
    scores[:, VIRTUAL:][np.triu_indices(TOKENS, k=1)] = -np.inf
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    for (row, column), weight in np.ndenumerate(weights):
        x, color = (column, BLUE) if column < VIRTUAL else (column + GAP, GREY)
        axes.add_patch(Rectangle((x, row), CELL, CELL, edgecolor="#cccccc", facecolor="white"))
        if weight:
            axes.add_patch(Rectangle((x, row), CELL, CELL, color=color, alpha=0.15 + 0.85 * weight / weights.max()))
    context = VIRTUAL + GAP
    spans = (
        (0, VIRTUAL, BLUE, "learned, of rank r\n$K_D = K_A K_B$\n$V_D = V_A V_B$", r"weight $1-\alpha$"),
        (context, TOKENS, GREY, "the prompt's own keys\nand values (frozen model)", r"weight $\alpha$"),
    )
    for start, width, color, above, below in spans:
        end = start + width - (1 - CELL)
        axes.text((start + end) / 2, -0.45, above, color=color, ha="center", va="bottom", linespacing=1.4)
        axes.plot([start, start, end, end], [TOKENS + 0.1, TOKENS + 0.3, TOKENS + 0.3, TOKENS + 0.1], color=color)
        axes.text((start + end) / 2, TOKENS + 0.5, below, color=color, ha="center", va="top")
    axes.text(-0.35, TOKENS / 2, "queries of the prompt", color=GREY, rotation=90, ha="right", va="center")
    axes.set_title("One attention head: one softmax per row", fontsize=11, pad=10)
    axes.set(xlim=(-1, context + TOKENS), ylim=(TOKENS + 1.5, -2.6), aspect="equal")
    axes.set_axis_off()


def draw_scores(axes: Axes) -> None:
    results = load(RESULTS)
    for method, (label, color, marker) in METHODS.items():
        points = [interval(results.means(method, size)) for size in SIZES]
        means, halves = [100 * point.mean for point in points], [100 * point.half for point in points]
        axes.errorbar(SIZES, means, halves, label=label, color=color, marker=marker, capsize=3)
    prompting = 100 * interval(results.means("icl-8", SIZES[-1])).mean
    axes.axhline(prompting, label="8 demonstrations in the prompt", color=GREY, linestyle="--")
    axes.set_xscale("log")
    axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="training samples", ylabel="test score, mean over six tasks, %", ylim=(0, 100))
    axes.set_title("Five seeds, 95 % intervals", fontsize=11, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=10)


def draw(path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    head, scores = figure.subplots(1, 2, width_ratios=(1, 1.05))
    draw_head(head)
    draw_scores(scores)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else HERE / "head.png")
