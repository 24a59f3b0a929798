"""What a task says of one picture."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.base_model.scenes import EMPTY, OBJECTS, Scenes


@dataclass(frozen=True)
class Example:
    row: int  # of the scenes
    question: str
    answer: str  # the one that is trained
    references: list[str]  # the ones that a metric compares with
    objects: list[str]  # what is in the picture


def objects_in(scenes: Scenes, row: int) -> list[str]:
    return sorted({OBJECTS[kind] for kind in scenes.kind[row].tolist() if kind != EMPTY})
