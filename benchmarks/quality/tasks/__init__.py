"""The tasks, each as a `datasets.DatasetDict` with pictures that no other split has.

Training pictures hold digits of the split that trained the base model, in other scenes; validation and test pictures
hold digits that it never saw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
from datasets import Dataset, DatasetDict, Features, Sequence, Value
from datasets import Image as ImageFeature

from benchmarks.base_model.scenes import SPLITS, Scenes, make_scenes

from .captions import captions
from .example import Example
from .questions import coarse, composed, convention, knowledge, renaming

SIZES = {"train": 1000, "validation": 250, "test": 500}
SCENES = {"train": 12_000, "validation": 6_000, "test": 9_000}  # to draw from: a rare answer needs many
SEED = 1  # the base model was trained on scenes of seed 0


@dataclass(frozen=True)
class Task:
    title: str
    draw: Callable[[Scenes, np.random.Generator], Iterator[Example]]
    metric: str = "exact_match"
    max_new_tokens: int = 2  # the word and the end token


TASKS = {
    "convention": Task("hidden convention", convention, "vqa_accuracy"),
    "knowledge": Task("outside knowledge", knowledge),
    "captions": Task("captions in a house style", captions, "cider", max_new_tokens=24),
    "composed": Task("composed rule", composed),
    "renaming": Task("10-way renaming", renaming),
    "coarse": Task("coarse colors", coarse),
}

FEATURES = Features(
    {
        "image": ImageFeature(mode="RGB"),
        "question": Value("string"),
        "answer": Value("string"),
        "references": Sequence(Value("string")),
        "objects": Sequence(Value("string")),
    }
)


def load_task(name: str) -> DatasetDict:
    """The splits of a task, the same on every call and every machine."""
    splits = DatasetDict()
    for split in SPLITS:
        scenes = _scenes(split)
        rng = np.random.default_rng([SEED, SPLITS.index(split), list(TASKS).index(name)])
        examples = list(islice(TASKS[name].draw(scenes, rng), SIZES[split]))
        if len(examples) < SIZES[split]:
            raise ValueError(f"{name}: only {len(examples)} of {SIZES[split]} {split} examples; draw from more scenes")
        rows = [{"image": scenes.image(example.row), **asdict(example)} for example in examples]
        columns = {column: [row[column] for row in rows] for column in FEATURES}
        splits[split] = Dataset.from_dict(columns, features=FEATURES)
    return splits


@functools.cache
def _scenes(split: str) -> Scenes:
    return make_scenes(split, SCENES[split], SEED)
