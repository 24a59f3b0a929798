"""Prompts of several pictures: direct questions, captions, and rules that only the demonstrations tell.

Every answer of an episode but the first of its class is trained, so one episode teaches every number of shots.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .language import CAPTION, END, HIDDEN, IMAGE, LABELS, MARK, PAD, TOKEN, any_question, caption
from .scenes import ATTRIBUTES, GRID, SPLITS, Scenes

IMAGE_TOKENS = GRID * GRID
RULE_ATTRIBUTES = tuple(name for name in ATTRIBUTES if name != "kinds")  # kinds says too much of count to be hidden


@dataclass(frozen=True)
class Block:
    """A question about a picture and its answer; without a picture, it is about the last one before."""

    scene: int | None
    question: str
    answer: str
    known: bool = True  # whether the answer can be known: it is trained
    means: str = ""  # what an answer that must be looked up among the demonstrations stands for

    def text(self, *, answered: bool = True) -> str:
        """The block as the processor takes it."""
        words = [IMAGE] * (self.scene is not None) + [self.question, MARK] + [self.answer, END] * answered
        return " ".join(words)


Episode = list[Block]


def split_of_rule(attribute: str, words: Mapping[int, str]) -> str:
    """The split that a rule (the words that values of an attribute are renamed to) belongs to: the one hold-out filter.

    Whole rules are held out.  Holding out pairs of a value and a word would teach "never this pair".
    """
    name = " ".join([attribute, *(f"{value}={words[value]}" for value in sorted(words))])
    return ("test", "validation", *["train"] * 8)[zlib.crc32(name.encode()) % 10]


class Episodes:
    """Draws episodes of a split: its scenes, and its rules alone."""

    def __init__(self, scenes: Scenes, split: str, seed: int | Sequence[int]) -> None:
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}, only {', '.join(SPLITS)}")
        self.scenes, self.split = scenes, split
        self.rng = np.random.default_rng(seed)
        self.choose = random.Random(int(self.rng.integers(2**62)))

    def rule(self, classes: int, attribute: str | None = None) -> tuple[str, dict[int, str]]:
        """An attribute and new words for as many of its values as there are classes, or for all it has."""
        while True:
            name = attribute or self.choose.choice([a for a in RULE_ATTRIBUTES if len(ATTRIBUTES[a]) >= classes])
            values = self.choose.sample(range(len(ATTRIBUTES[name])), classes)
            words = dict(zip(values, self.choose.sample(LABELS, classes), strict=True))
            if split_of_rule(name, words) == self.split:
                return name, words

    def rename(self, pictures: int, classes: int, *, hidden: bool = False, attribute: str | None = None) -> Episode:
        attribute, words = self.rule(classes, attribute)
        values = self.rng.choice(np.array(list(words)), pictures)
        question = self.choose.choice(HIDDEN) if hidden else attribute
        seen: set[int] = set()
        episode = []
        for row, value in zip(self.scenes.draw_with(attribute, values, self.rng), values.tolist(), strict=True):
            episode.append(Block(row, question, words[value], known=value in seen, means=ATTRIBUTES[attribute][value]))
            seen.add(value)
        return episode

    def choice(self, pictures: int) -> Episode:
        """Which attribute is asked for is hidden; its values have their own names."""
        attribute = self.choose.choice(RULE_ATTRIBUTES)
        question, names = self.choose.choice(HIDDEN), ATTRIBUTES[attribute]
        values = self.rng.integers(len(names), size=pictures)
        rows = self.scenes.draw_with(attribute, values, self.rng)
        return [
            Block(row, question, names[value], known=place > 0)
            for place, (row, value) in enumerate(zip(rows, values.tolist(), strict=True))
        ]

    def direct(self, pictures: int, questions: int = 2) -> Episode:
        episode = []
        for row in self.rng.integers(len(self.scenes), size=pictures).tolist():
            for number in range(questions):
                episode.append(Block(None if number else row, *any_question(self.scenes, row, self.choose)))
        return episode

    def captions(self, pictures: int) -> Episode:
        rows = self.rng.integers(len(self.scenes), size=pictures).tolist()
        return [Block(row, CAPTION, caption(self.scenes, row)) for row in rows]


@dataclass(frozen=True)
class Batch:
    """Episodes as the model takes them, one a row, padded on the right."""

    scenes: list[int]
    input_ids: torch.Tensor  # (B, T)
    weights: torch.Tensor  # (B, T): what predicting this token counts
    queries: torch.Tensor  # (B, T): at the question marks of rules, the token of what the answer stands for, else 0
    labels: torch.Tensor  # (B, T): the same at the answers of rules
    meanings: torch.Tensor  # (B, T): the same at both, where the model is told it

    @property
    def matches(self) -> torch.Tensor:
        """(B, T, T): where a question mark finds the answer, at the same class's label in a demonstration before."""
        same = (self.queries[:, :, None] == self.labels[:, None, :]) & (self.queries[:, :, None] > 0)
        return same & torch.ones_like(same[0]).tril()


END_WEIGHT = 0.2  # the end token is soon known and would drown the answers


def collate(episodes: Sequence[Episode], length: int | None = None, *, tell_hidden: bool = False) -> Batch:
    """Token ids without the processor, which gives the same ones; whole blocks beyond `length` are left out.

    What labels stand for is told where the question names the attribute; with `tell_hidden` also where it does not,
    from the second demonstration of a class on.
    """
    scenes: list[int] = []
    rows = []
    for episode in episodes:
        ids: list[int] = []
        weights: list[float] = []
        queries: list[int] = []
        labels: list[int] = []
        meanings: list[int] = []
        for block in episode:
            prompt = [TOKEN[IMAGE]] * (IMAGE_TOKENS * (block.scene is not None))
            prompt += [TOKEN[word] for word in block.question.split()]
            answer = [TOKEN[word] for word in block.answer.split()]
            if length is not None and len(ids) + len(prompt) + len(answer) + 2 > length:
                break
            if block.scene is not None:
                scenes.append(block.scene)
            ids += [*prompt, TOKEN[MARK], *answer, TOKEN[END]]
            weights += [0.0] * (len(prompt) + 1) + [float(block.known)] * len(answer) + [END_WEIGHT]
            meant = TOKEN[block.means] if block.means else 0
            told = meant * (block.question not in HIDDEN or (tell_hidden and block.known))
            queries += [0] * len(prompt) + [meant] + [0] * (len(answer) + 1)
            labels += [0] * (len(prompt) + 1) + [meant] * len(answer) + [0]
            meanings += [0] * len(prompt) + [told] * (len(answer) + 1) + [0]
        rows.append((ids, weights, queries, labels, meanings))
    width = max(len(row[0]) for row in rows)
    fill = (TOKEN[PAD], 0.0, 0, 0, 0)
    columns = [[row[i] + [fill[i]] * (width - len(row[i])) for row in rows] for i in range(5)]
    return Batch(scenes, *(torch.tensor(column) for column in columns))
