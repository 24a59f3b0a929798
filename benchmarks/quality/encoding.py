"""Prompts as tensors: one question, or a question behind demonstrations; and what a model answers.

Zero-shot, k-shot and adapted prompts have one template, `<image> question ? answer <eos>`, and one decoding, greedy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.base_model.episodes import Block
from benchmarks.base_model.language import END, MARK, PAD, TOKEN, VOCABULARY
from benchmarks.base_model.model import load_base
from benchmarks.base_model.scenes import SPLITS

from .tasks import load_task

CHECKPOINT = Path(__file__).parents[1] / "base_model" / "checkpoint"
IGNORED = -100
BATCH_TOKENS = 16_384  # of one call to generate

Row = tuple[str, int]  # a split, and an example of it
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """The examples of a split as the processor gives them."""

    prompts: list[list[int]]  # token ids up to the question mark
    answers: list[list[int]]  # token ids, the end token among them
    pixels: Tensor  # (N, 3, 32, 32)
    features: Tensor  # (N, 4, D): what the frozen tower and projector make of them, the same for every method
    examples: Dataset


@functools.cache
def encoded_task(name: str) -> dict[str, Split]:
    """A task as the shipped base model reads it, made once per process."""
    _, base = load_base(CHECKPOINT)
    splits = load_task(name)
    return {split: encode(splits[split], base) for split in SPLITS}


@torch.no_grad()
def encode(examples: Dataset, base: LlavaForConditionalGeneration) -> Split:
    processor = _processor()
    blocks = [Block(0, *pair) for pair in zip(examples["question"], examples["answer"], strict=True)]
    texts, images = [block.text() for block in blocks], [[image] for image in examples["image"]]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    ids = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    cuts = [row.index(TOKEN[MARK]) + 1 for row in ids]
    features = torch.stack(list(base.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output))
    return Split(
        prompts=[row[:cut] for row, cut in zip(ids, cuts, strict=True)],
        answers=[row[cut:] for row, cut in zip(ids, cuts, strict=True)],
        pixels=inputs["pixel_values"],
        features=features,
        examples=examples,
    )


@functools.cache
def _processor() -> Any:
    return load_base(CHECKPOINT)[0]


def demonstrated(splits: dict[str, Split], rows: Sequence[Row]) -> list[int]:
    """Token ids of demonstrations, question and answer each, behind one another."""
    return [token for split, row in rows for token in (*splits[split].prompts[row], *splits[split].answers[row])]


def collate(splits: dict[str, Split], queries: Sequence[Row], shown: Sequence[Sequence[Row]] | None = None) -> Inputs:
    """Queries with their answers, padded on the right; labels are the answer and the end token of the query alone.

    Args:
        queries: one a row.
        shown: the demonstrations before each query; none if left out.

    Returns:
        What the model takes, with the images as the tower and projector have already seen them.
    """
    shown = shown or [()] * len(queries)
    rows = []
    for (split, row), before in zip(queries, shown, strict=True):
        context = demonstrated(splits, before) + splits[split].prompts[row]
        answer = splits[split].answers[row]
        rows.append((context + answer, [IGNORED] * len(context) + answer))
    width = max(len(ids) for ids, _ in rows)
    pad = TOKEN[PAD]
    features = [
        splits[s].features[r] for query, before in zip(queries, shown, strict=True) for s, r in (*before, query)
    ]
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
    }


@torch.no_grad()
def answers(
    model: Any,
    splits: dict[str, Split],
    queries: Sequence[Row],
    max_new_tokens: int,
    shown: Sequence[Sequence[Row]] | None = None,
) -> list[str]:
    """What the model generates, greedily, for each query; an answer that does not end keeps a mark of it.

    The pictures themselves go in, as at a user's.
    """
    shown = shown or [()] * len(queries)
    prompts = [
        demonstrated(splits, before) + splits[split].prompts[row]
        for (split, row), before in zip(queries, shown, strict=True)
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    said: list[str] = [""] * len(prompts)
    size = max(1, BATCH_TOKENS // (len(prompts[order[-1]]) + max_new_tokens))
    for part in (order[i : i + size] for i in range(0, len(order), size)):
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[TOKEN[PAD]] * (width - len(prompts[i])) + prompts[i] for i in part])
        pixels = [splits[s].pixels[r] for i in part for s, r in (*shown[i], queries[i])]
        sequences = model.generate(
            input_ids=ids,
            attention_mask=(ids != TOKEN[PAD]).long(),
            pixel_values=torch.stack(pixels),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        for i, row in zip(part, sequences[:, width:].tolist(), strict=True):
            words = [VOCABULARY[token] for token in row]
            said[i] = " ".join(words[: words.index(END)]) if END in words else " ".join([*words, "..."])
    return said
