"""The two tasks, and what a model answers on their test pictures; all of it is the quality benchmark's."""

from __future__ import annotations

import numpy as np
from datasets import DatasetDict
from torch import nn
from transformers import LlavaForConditionalGeneration

from ..quality import training
from ..quality.encoding import Split, answers, encode
from ..quality.methods.teacher import draw_demonstrations
from ..quality.tasks import TASKS, load_task

CHOSEN = ("knowledge", "captions")
SAMPLES, QUERIES, SHOTS = 256, 200, 8

Splits = dict[str, Split]


def load(task: str, base: LlavaForConditionalGeneration, seed: int, queries: int) -> Splits:
    """Training samples of a seed, and the first test pictures."""
    examples = load_task(task)
    chosen = training.samples(len(examples["train"]), SAMPLES, seed)
    parts = DatasetDict(train=examples["train"].select(chosen), test=examples["test"].select(range(queries)))
    return {split: encode(part, base) for split, part in parts.items()}


def ask(model: nn.Module, task: str, splits: Splits) -> list[str]:
    """What the model generates, greedily, for each test picture with its question."""
    return answers(model, splits, _queries(splits), TASKS[task].max_new_tokens)


def ask_behind_demonstrations(model: nn.Module, task: str, splits: Splits, seed: int) -> list[str]:
    """The same with eight training samples in each prompt, drawn anew for each."""
    queries, rng = _queries(splits), np.random.default_rng([seed, SHOTS])
    shown = draw_demonstrations(range(len(splits["train"].prompts)), [None] * len(queries), SHOTS, rng)
    return answers(model, splits, queries, TASKS[task].max_new_tokens, shown)


def _queries(splits: Splits) -> list[tuple[str, int]]:
    return [("test", row) for row in range(len(splits["test"].prompts))]
