"""What the quickstart shows and leaves behind: a table, an example and a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ..common import colors
from ..quality.tasks import TASKS
from .asking import CHOSEN, SHOTS, Splits

Predictions = dict[str, dict[str, list[str]]]  # answers by method (a key of TITLES) and task

TITLES = {"zero-shot": "zero-shot", "icl": f"{SHOTS}-shot", "hificl": "HiFICL", "lora": "LoRA"}
COLORS = {"zero-shot": "#cccccc", "icl": "#8a8a8a", "hificl": colors.HIFICL, "lora": colors.LORA}
PICTURES = 4  # of each task
RIGHT, WRONG = "#2a7a2a", "#b02a2a"
METRICS = {"knowledge": "exact answers", "captions": "CIDEr over a right one's"}
TITLE = "{}: the first test pictures"


@dataclass(frozen=True)
class Row:
    """A method on a task; what is not trained has no numbers of training."""

    task: str
    method: str
    test: Mapping[str, float]  # `score`, and for captions the other metrics
    trainable_parameters: int = 0
    file_bytes: int = 0
    training_seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Exact answers; any of the five captions is one."""
        return self.test.get("exact_match", self.test["score"])


def make_table(rows: Sequence[Row], title: str) -> Table:
    table = Table("task", "method", title=title)
    for header in ("exact", "CIDEr*", "trainable", "file", "training"):
        table.add_column(header, justify="right")
    for row in rows:
        cells = [row.task, TITLES[row.method], f"{row.accuracy:.1%}"]
        cells.append(f"{row.test['score']:.1%}" if "cider" in row.test else "")
        if row.trainable_parameters:
            cells += [f"{row.trainable_parameters:,}", f"{row.file_bytes / 1024:.1f} KiB"]
            cells.append(f"{row.training_seconds:.1f} s")
        table.add_row(*cells, end_section=row.method == list(TITLES)[-1])
    table.caption = "* as a share of the CIDEr of right captions: their score"
    return table


def caption_example(predictions: Predictions, splits: Splits, row: int = 0) -> Table:
    """What is said of one picture, which is the first of the captions in quickstart.png."""
    table = Table(title="A test picture's caption", show_header=False)
    for method, title in TITLES.items():
        table.add_row(title, predictions[method]["captions"][row])
    table.add_row("a reference", nearest(predictions["hificl"]["captions"][row], splits["test"].examples[row]))
    return table


def nearest(answer: str, example: Mapping[str, Any]) -> str:
    """Of the references the one that is most like the answer."""
    return max(example["references"], key=lambda said: SequenceMatcher(None, said.split(), answer.split()).ratio())


def draw(path: Path, rows: Sequence[Row], predictions: Predictions, splits: Mapping[str, Splits]) -> None:
    """Test pictures of both tasks with what is said of them, and the scores beside them."""
    figure = Figure(figsize=(14.5, 7.2))
    left = figure.add_gridspec(len(CHOSEN), PICTURES, left=0.01, right=0.66, top=0.91, bottom=0.2, hspace=0.75)
    for place, task in enumerate(CHOSEN):
        for row in range(PICTURES):
            example = splits[task]["test"].examples[row]
            axes = figure.add_subplot(left[place, row])
            _show(
                axes, example, {"base": predictions["zero-shot"][task][row], "HiFICL": predictions["hificl"][task][row]}
            )
        height = left[place, 0].get_position(figure).y1 + 0.045
        figure.text(0.335, height, TITLE.format(TASKS[task].title), ha="center", fontsize=12)
    right = figure.add_gridspec(1, 1, left=0.73, right=0.99, top=0.91, bottom=0.24)
    _bars(figure.add_subplot(right[0]), rows, len(splits[CHOSEN[0]]["test"].prompts))
    figure.savefig(path, dpi=120)


def _show(axes: Axes, example: Mapping[str, Any], said: Mapping[str, str]) -> None:
    axes.imshow(example["image"])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"{example['question']} ?", fontsize=10)
    lines = [
        (line, RIGHT if answer in example["references"] else WRONG)
        for name, answer in said.items()
        for line in _wrap(f"{name}: {answer}")
    ]
    lines += [(line, "black") for line in _wrap(f"reference: {nearest(said['HiFICL'], example)}")]
    for place, (line, color) in enumerate(lines):
        axes.annotate(line, (0, 0), (0, -14 - 13 * place), "axes fraction", "offset points", color=color, fontsize=9)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 32, subsequent_indent="    ")


def _bars(axes: Axes, rows: Sequence[Row], queries: int) -> None:
    for position, method in enumerate(TITLES):
        of_method = [row for row in rows if row.method == method]
        parameters = of_method[0].trainable_parameters
        bars = axes.bar(
            [place + 0.21 * (position - 1.5) for place in range(len(of_method))],
            [100 * row.test["score"] for row in of_method],
            width=0.2,
            color=COLORS[method],
            label=TITLES[method] + (f", {parameters:,} parameters" if parameters else ""),
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=9)
    axes.set_xticks(range(len(CHOSEN)), [f"{TASKS[task].title}\n{of}" for task, of in METRICS.items()], fontsize=9)
    axes.set_ylabel("score, %")
    axes.set_ylim(0, 100)
    axes.set_title(f"The first {queries} test pictures, one seed", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=1, frameon=False, fontsize=9)
