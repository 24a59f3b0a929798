"""The tasks' own files, or a hub's, as questions about pictures with the answers of people."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from PIL import Image

SHUFFLE = 3407  # the seed by which the authors shuffle
BUFFER = 10_000  # of a stream that is shuffled
ANSWERS = ("answers", "sentences_raw", "captions", "sentences", "caption")  # columns of a hub's data that hold answers
NAMES = ("question_id", "cocoid", "image_id", "imgid", "id")
FIELDS = ("answer", "raw", "caption")  # of an answer that is a record

Splits = dict[str, list["Sample"]]


@dataclass(frozen=True)
class Sample:
    """A picture, a question about it or none, and what people said."""

    name: str
    image: Path | Image.Image
    question: str
    answers: tuple[str, ...]

    @property
    def target(self) -> str:
        """What is trained on: the first annotator's answer, the first caption."""
        return self.answers[0]

    @property
    def picture(self) -> Image.Image:
        image = Image.open(self.image) if isinstance(self.image, Path) else self.image
        return image.convert("RGB")


@dataclass(frozen=True)
class Task:
    """A task's instruction, which is the same in training and evaluation, and its files by split."""

    instruction: str
    questions: Mapping[str, str]  # of COCO captions the one file of all splits
    annotations: Mapping[str, str]
    captions: bool = False


TASKS = {
    "vqav2": Task(
        "Answer the question with a single word or phrase.",
        {split: f"v2_OpenEnded_mscoco_{split}2014_questions.json" for split in ("train", "val")},
        {split: f"v2_mscoco_{split}2014_annotations.json" for split in ("train", "val")},
    ),
    "okvqa": Task(
        "Answer the question with a single word or phrase.",
        {split: f"OpenEnded_mscoco_{split}2014_questions.json" for split in ("train", "val")},
        {split: f"mscoco_{split}2014_annotations.json" for split in ("train", "val")},
    ),
    "coco": Task(
        "Describe the picture in one sentence.", {}, dict.fromkeys(("train", "val"), "dataset_coco.json"), captions=True
    ),
}  # fmt: skip


def read(task: str, folder: Path, split: str) -> list[Sample]:
    """The samples of a split, in the files' order.

    Args:
        task: one of `TASKS`.
        folder: holds the official files under their own names, and the pictures in ``train2014`` and ``val2014``.
        split: ``train`` or ``val``.

    Raises:
        FileNotFoundError: a file or a picture is missing.
        ValueError: a question without annotations, or a split without samples.
    """
    of = TASKS[task]
    if of.captions:
        found = _captions(folder, _json(folder, of.annotations[split]), split)
    else:
        questions, annotations = (_json(folder, files[split]) for files in (of.questions, of.annotations))
        found = _questions(folder / f"{split}2014", questions["questions"], annotations["annotations"], split)
    if not found:
        raise ValueError(f"{folder / of.annotations[split]} has no sample of the split {split!r}.")
    missing = next(
        (sample.image for sample in found if isinstance(sample.image, Path) and not sample.image.exists()), 0
    )
    if missing:
        raise FileNotFoundError(f"There is no picture {missing}: put COCO's pictures of 2014 into {folder}.")
    return found


def _json(folder: Path, name: str) -> Any:
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}: put the task's official files into {folder}, or give --hub.")
    return json.loads(path.read_text(encoding="utf-8"))


def _questions(images: Path, questions: list[Any], annotations: list[Any], split: str) -> list[Sample]:
    answers = {entry["question_id"]: tuple(said["answer"] for said in entry["answers"]) for entry in annotations}
    without = [entry["question_id"] for entry in questions if not answers.get(entry["question_id"])]
    if without:
        raise ValueError(
            f"{len(without)} questions of {split}, such as {without[0]}, have no answers in its annotations."
        )
    return [
        Sample(
            str(entry["question_id"]), images / f"COCO_{split}2014_{entry['image_id']:012d}.jpg", entry["question"],
            answers[entry["question_id"]],
        )
        for entry in questions
    ]  # fmt: skip


def _captions(folder: Path, content: Any, split: str) -> list[Sample]:
    return [
        Sample(
            str(entry["cocoid"]), folder / entry["filepath"] / entry["filename"], "",
            tuple(sentence["raw"].strip() for sentence in entry["sentences"]),
        )
        for entry in content["images"]
        if entry["split"] == split
    ]  # fmt: skip


def stems(folder: Path) -> dict[str, str]:
    """OK-VQA's stemmer as far as its annotations show it: what each raw answer became, by the raw answer.

    Raises:
        FileNotFoundError: an annotation file is missing.
    """
    files = [_json(folder, name) for name in TASKS["okvqa"].annotations.values()]
    said = [answer for file in files for entry in file["annotations"] for answer in entry["answers"]]
    return {answer["raw_answer"]: answer["answer"] for answer in said if "raw_answer" in answer}


def stream(hub: str, split: str, number: int, seed: int) -> list[Sample]:
    """The first samples of a hub's data set, or of a local folder in its format, shuffled through a buffer.

    Raises:
        ValueError: there is no column of pictures or answers, or there are no rows.
    """
    rows = load_dataset(hub, split=split, streaming=True).shuffle(seed=seed, buffer_size=BUFFER).take(number)
    found = [_row(place, row) for place, row in enumerate(rows)]
    if not found:
        raise ValueError(f"The split {split!r} of {hub} has no rows.")
    return found


def _row(place: int, row: Mapping[str, Any]) -> Sample:
    column = next((name for name in ANSWERS if row.get(name)), None)
    if column is None or "image" not in row:
        raise ValueError(f"No column of pictures or of answers: image and one of {ANSWERS} wanted, found {list(row)}.")
    said = row[column] if isinstance(row[column], list) else [row[column]]
    answers = tuple(next(a[f] for f in FIELDS if f in a) if isinstance(a, Mapping) else str(a) for a in said)
    name = next((str(row[name]) for name in NAMES if name in row), str(place))
    return Sample(name, row["image"], row.get("question") or "", answers)


def split_training(found: Iterable[Sample], validation: int, number: int, seed: int) -> Splits:
    """Validation samples, the same for every seed, and training samples, none of them about a picture of validation.

    Raises:
        ValueError: too few are left to train on.
    """
    shuffled = _shuffled(found, SHUFFLE)
    held, rest = shuffled[:validation], shuffled[validation:]
    seen = {_key(sample) for sample in held}
    rest = _shuffled([sample for sample in rest if _key(sample) not in seen], seed)
    if len(rest) < number:
        raise ValueError(
            f"{len(shuffled)} training samples, of which {validation} are for validation, leave {len(rest)} about "
            f"other pictures, and {number} are to be trained on: ask for fewer with --samples or --validation-samples."
        )
    return {"validation": held, "train": rest[:number]}


def first(found: Iterable[Sample], number: int) -> list[Sample]:
    """The first samples after the authors' shuffling."""
    return _shuffled(found, SHUFFLE)[:number]


def _shuffled(found: Iterable[Sample], seed: int) -> list[Sample]:
    shuffled = list(found)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _key(sample: Sample) -> object:
    """What two samples about one picture share: its file, or its pixels, as a hub's rows each hold a picture anew."""
    if isinstance(sample.image, Path):
        return sample.image
    return sample.image.size, hashlib.sha256(sample.picture.tobytes()).digest()


def draw(pool: Sequence[Sample], shots: int, query: Sample, seed: int) -> list[Sample]:
    """Demonstrations for one query: drawn anew for each, and the same for each method and process."""
    return random.Random(f"{seed} {query.name}").sample(list(pool), shots)
