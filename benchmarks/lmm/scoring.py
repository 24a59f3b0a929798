"""What answers are worth, by the metrics of the quality benchmark, which are modules of `evaluate` in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.tables import Record
from ..quality import metrics
from . import captions
from .answers import cut, normalise, stem
from .samples import TASKS, Sample, stems

MAIN = {"vqav2": "vqa_accuracy", "okvqa": "vqa_accuracy", "coco": "cider"}  # the metric that a task is known by


def score(task: str, samples: Sequence[Sample], said: Sequence[str], folder: Path | None) -> Record:
    """The metrics of a task, of one answer for each sample.

    Args:
        task: one of `TASKS`.
        samples, said: what people and the model said.
        folder: of the task's official files, for OK-VQA's stems and CHAIR's objects; None: data come from a hub.
    """
    texts = [cut(text) for text in said]
    if TASKS[task].captions:
        return _captions(samples, texts, folder)
    of_people = [[normalise(answer) for answer in sample.answers] for sample in samples]
    texts = [normalise(text) for text in texts]
    record: Record = {}
    if task == "okvqa":
        known = {normalise(raw): stemmed for raw, stemmed in stems(folder).items()} if folder else {}
        texts = [normalise(stem(text, known)) for text in texts]
        record["stems"] = len(known)
    return record | _compute("vqa_accuracy", texts, of_people)


def _captions(samples: Sequence[Sample], texts: list[str], folder: Path | None) -> Record:
    words = captions.tokenise(texts)
    of_people = captions.group({str(place): sample.answers for place, sample in enumerate(samples)})
    record: Record = {"tokenizer": captions.tokenizer()} | _compute("cider", words, list(of_people.values()))
    try:
        objects = captions.Objects(folder) if folder else None
    except FileNotFoundError as error:
        return record | {"chair": f"not computed: {error}"}
    if objects is None:
        return record | {"chair": "not computed: a hub's data have no objects"}
    true = [objects.of(int(sample.name), sample.answers) for sample in samples]
    mentions = [objects.mentions(text) for text in texts]
    if not any(true):
        return record | {"chair": "not computed: none of the pictures has an object"}
    return record | _compute("chair", mentions, true)


def _compute(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> Record:
    found: Record = metrics.load(name).compute(predictions=predictions, references=references)
    return found
