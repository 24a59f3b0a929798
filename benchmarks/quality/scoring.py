"""How good answers are, by the metric of their task."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from datasets import Dataset
from torch import nn

from . import metrics
from .encoding import Row, Split, answers
from .tasks import TASKS
from .tasks.captions import mentions


def measure(
    model: nn.Module,
    task: str,
    splits: dict[str, Split],
    split: str,
    shown: Sequence[Sequence[Row]] | None = None,
) -> dict[str, float]:
    """Let the model answer a split, each query behind its demonstrations if there are any."""
    queries = [(split, row) for row in range(len(splits[split].prompts))]
    said = answers(model, splits, queries, TASKS[task].max_new_tokens, shown)
    return score(task, said, splits[split].examples)


def score(task: str, said: list[str], examples: Dataset) -> dict[str, float]:
    """``score`` in [0, 1] and, for captions, what else is measured of them.

    A caption's score is its CIDEr as a share of the CIDEr that a true caption has (one of the five, against all five).
    """
    metric, references = TASKS[task].metric, list(examples["references"])
    found = metrics.load(metric).compute(predictions=said, references=references)
    if metric != "cider":
        return {"score": found[metric]}
    true = [of_one[0] for of_one in references]
    found |= metrics.load("exact_match").compute(predictions=said, references=references)
    named = [mentions(caption) for caption in said]
    found |= metrics.load("chair").compute(predictions=named, references=list(examples["objects"]))
    return {"score": found["cider"] / _true_cider(tuple(true), tuple(map(tuple, references))), **found}


@functools.lru_cache(maxsize=4)
def _true_cider(true: tuple[str, ...], references: tuple[tuple[str, ...], ...]) -> float:
    found = metrics.load("cider").compute(predictions=list(true), references=[list(of_one) for of_one in references])
    return float(found["cider"])
