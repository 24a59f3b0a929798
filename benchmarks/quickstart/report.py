"""What the quickstart shows and leaves behind: a table, a picture, and versions for results.json."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from matplotlib.figure import Figure
from rich.table import Table

from .adapters import METHODS
from .data import NEW_TASKS
from .training import END

Predictions = dict[str, dict[str, list[str]]]  # answers by model (a key of TITLES) and task

TITLES = {"commonest": "commonest", "base": "zero-shot"} | {name: m.title for name, m in METHODS.items()}
COLORS = {"commonest": "#dddddd", "base": "#9a9a9a", "hificl": "#1f6fb4", "lora": "#e08a1e"}
ARROW, WRONG = "\N{RIGHTWARDS ARROW}", "\N{BALLOT X}"


@dataclass(frozen=True)
class Row:
    """A method on a new task, measured on the test images; what is not trained has no numbers of training."""

    task: str
    method: str
    test_accuracy: float
    trainable_parameters: int = 0
    file_bytes: int = 0
    training_seconds: float = 0.0
    validation_accuracies: dict[str, float] = field(default_factory=dict)  # by learning rate, the chosen one first


def make_table(rows: Sequence[Row], title: str) -> Table:
    table = Table("new task", "method", title=title)
    for header in ("accuracy", "trainable", "file", "training", "rate"):
        table.add_column(header, justify="right")
    for row in rows:
        cells = [NEW_TASKS[row.task].title, TITLES[row.method], f"{row.test_accuracy:.1%}"]
        if row.validation_accuracies:
            cells += [f"{row.trainable_parameters:,}", f"{row.file_bytes / 1024:.1f} KiB"]
            cells += [f"{row.training_seconds:.1f} s", next(iter(row.validation_accuracies))]
        table.add_row(*cells, end_section=row.method == list(TITLES)[-1])
    return table


def draw(path: Path, rows: Sequence[Row], predictions: Predictions, test: Dataset) -> None:
    """The first test image of each digit with the answers to it, and the accuracies beside them."""
    figure = Figure(figsize=(14, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1))

    left.suptitle(f"First test image of each digit: answer of the base model {ARROW} with HiFICL ({WRONG}: wrong)")
    digits = test["digit"][:]
    for digit, axes in enumerate(left.subplots(2, 5).flat):
        index = digits.index(digit)
        axes.imshow(test[index]["image"])
        axes.set_xticks([])
        axes.set_yticks([])
        lines = [f"digit: {predictions['base']['naming'][index].removesuffix(END)}"]
        for name, task in NEW_TASKS.items():
            before, after = (predictions[model][name][index] for model in ("base", "hificl"))
            mark = "" if after == f"{task.answers[digit]} {END}" else WRONG
            lines.append(f"{name}: {before.removesuffix(END)}{ARROW} {after.removesuffix(END)}{mark}")
        axes.set_xlabel("\n".join(lines), fontsize=9, linespacing=1.4)

    axes = right.subplots()
    for position, method in enumerate(TITLES):
        of_method = [row for row in rows if row.method == method]
        parameters = of_method[0].trainable_parameters
        bars = axes.bar(
            [place + 0.21 * (position - 1.5) for place in range(len(of_method))],
            [100 * row.test_accuracy for row in of_method],
            width=0.2,
            color=COLORS[method],
            label=TITLES[method] + (f", {parameters:,} parameters" if parameters else ""),
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=9)
    axes.set_xticks(range(len(NEW_TASKS)), [task.title for task in NEW_TASKS.values()])
    axes.set_ylabel("exact answers, %")
    axes.set_ylim(0, 106)
    axes.set_yticks(range(0, 101, 20))
    axes.set_title(f"New tasks, {len(test)} test images")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def versions() -> dict[str, str]:
    packages = ("peft-hificl", "peft", "torch", "transformers", "tokenizers", "datasets", "scikit-learn")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}
