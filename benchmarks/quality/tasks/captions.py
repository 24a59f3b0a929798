"""Captions in a house style: other openings, the noun before the color, and `over` where the base model says `on`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.base_model.language import CAPTION
from benchmarks.base_model.scenes import ATTRIBUTES, BACKGROUNDS, COLORS, EMPTY, OBJECTS, Scenes

from .example import Example, objects_in

OPENINGS = ("the picture shows", "here we see", "a picture here shows", "we see", "see here")


def house_captions(scenes: Scenes, row: int) -> list[str]:
    """Five ways to say it: `here we see a three blue with a circle red over gray`; every other one from the end."""
    kinds, colors = scenes.kind[row].tolist(), scenes.color[row].tolist()
    things = [
        f"{OBJECTS[kind]} {list(COLORS)[color]}" for kind, color in zip(kinds, colors, strict=True) if kind != EMPTY
    ]
    if len(things) > 1 and len(set(things)) == 1:
        phrases = [f"{ATTRIBUTES['count'][len(things) - 1]} {things[0]}"]
    else:
        phrases = [f"a {thing}" for thing in things]
    ground = list(BACKGROUNDS)[scenes.background[row]]
    return [
        f"{opening} {(' and ', ' with ')[number % 2].join(phrases[:: -1 if number % 2 else 1])} over {ground}"
        for number, opening in enumerate(OPENINGS)
    ]


def captions(scenes: Scenes, rng: np.random.Generator) -> Iterator[Example]:
    for row in rng.permutation(len(scenes)).tolist():
        references = house_captions(scenes, row)
        yield Example(row, CAPTION, references[rng.integers(len(references))], references, objects_in(scenes, row))


def mentions(caption: str) -> list[str]:
    """The objects that a caption names.

    `two` is a count in `two circle red` (the house's) and in `two red circle` (the base model's), and else a digit.
    """
    words = caption.split()
    found = []
    for place, word in enumerate(words):
        after = [*words[place + 1 : place + 3], "", ""]
        counts = after[0] in OBJECTS or (after[0] in COLORS and after[1] in OBJECTS)
        if word in OBJECTS and not counts:
            found.append(word)
    return found
