"""Tasks answered in one word: what a convention, a fact or a rule says of a picture that the base model sees well."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from benchmarks.base_model.episodes import split_of_rule
from benchmarks.base_model.language import LABELS, ask
from benchmarks.base_model.scenes import ATTRIBUTES, COLORS, DIGITS, EMPTY, OBJECTS, SHAPES, Scenes

from .example import Example, objects_in

ANNOTATORS, FOLLOWING = 10, 0.9  # how many answer a question, and how often one of them follows the convention
WARM = ("red", "orange", "yellow", "pink")
SIDES = {"triangle": "three", "square": "four", "diamond": "four", "circle": "none", "cross": "many", "star": "many"}
COARSE = {"pink": "red", "orange": "yellow", "cyan": "blue", "purple": "blue"}  # the four others keep their names


def held_out_words(attribute: str, values: Sequence[str], choose: random.Random) -> dict[str, str]:
    """New words for values of an attribute, as a rule of the test split, which training never showed the base model."""
    names = ATTRIBUTES[attribute]
    while True:
        words = dict(zip(values, choose.sample(LABELS, len(values)), strict=True))
        if split_of_rule(attribute, {names.index(value): word for value, word in words.items()}) == "test":
            return words


def _convention() -> dict[str, dict[str, str]]:
    """By attribute, the word that the house uses for each value; no word means two things."""
    choose = random.Random(1)
    while True:
        words = {name: held_out_words(name, ATTRIBUTES[name], choose) for name in ("color", "background", "corner")}
        used = [word for of_attribute in words.values() for word in of_attribute.values()]
        if len(set(used)) == len(used):
            return words


CONVENTION = _convention()
RENAMED = held_out_words("object", DIGITS, random.Random(2))


def convention(scenes: Scenes, rng: np.random.Generator) -> Iterator[Example]:
    """Three types of questions about one object, answered in sixteen words of the house's own.

    As in VQA, ten people answer each question; now and then one of them says the plain word.
    """
    for row in rng.permutation(np.flatnonzero(scenes.attributes["count"] == 0)).tolist():
        question = list(CONVENTION)[rng.integers(len(CONVENTION))]
        plain = ATTRIBUTES[question][scenes.attributes[question][row]]
        word = CONVENTION[question][plain]
        references = [word if rng.random() < FOLLOWING else plain for _ in range(ANNOTATORS)]
        yield Example(row, question, word, references, objects_in(scenes, row))


def knowledge(scenes: Scenes, rng: np.random.Generator) -> Iterator[Example]:
    """Facts about what is seen, asked by words that the base model knows no meaning of."""
    kinds, colors = scenes.attributes["object"], scenes.attributes["color"]
    for row in rng.permutation(np.flatnonzero(kinds >= 0)).tolist():
        kind, color = OBJECTS[kinds[row]], list(COLORS)[colors[row]]
        if kind in SHAPES:
            facts = {"sides": SIDES[kind], "warmth": "warm" if color in WARM else "cool"}
        else:
            digit = DIGITS.index(kind)
            facts = {
                "parity": ("even", "odd")[digit % 2],
                "next": DIGITS[(digit + 1) % len(DIGITS)],
                "warmth": "warm" if color in WARM else "cool",
            }
        question = list(facts)[rng.integers(len(facts))]
        yield Example(row, question, facts[question], [facts[question]], objects_in(scenes, row))


def composed(scenes: Scenes, rng: np.random.Generator) -> Iterator[Example]:
    """If two objects share a color, say how many there are, else what the first is; a third of each kind of scene."""
    count, kinds = scenes.attributes["count"] + 1, scenes.attributes["kinds"] + 1
    ordered = np.sort(np.where(scenes.kind == EMPTY, -1 - np.arange(4), scenes.color), axis=1)
    shared = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    groups = [shared & (kinds == 1), shared & (kinds > 1), ~shared & (count > 0)]
    for rows in zip(*(rng.permutation(np.flatnonzero(group)).tolist() for group in groups), strict=False):
        for row in rows:
            first = scenes.kind[row][np.argmax(scenes.kind[row] != EMPTY)]
            answer = ATTRIBUTES["count"][count[row] - 1] if shared[row] else OBJECTS[first]
            yield Example(row, "case", answer, [answer], objects_in(scenes, row))


def renaming(scenes: Scenes, rng: np.random.Generator) -> Iterator[Example]:
    """Ten new words for the ten digits, asked as the base model is used to."""
    yield from _renamed(scenes, rng, "object", RENAMED)


def coarse(scenes: Scenes, rng: np.random.Generator) -> Iterator[Example]:
    """Four colors instead of eight: what the base model says is right for half of the pictures."""
    choose = random.Random(int(rng.integers(2**62)))
    for row in rng.permutation(len(scenes)).tolist():
        asked = ask(scenes, row, "color of", choose)
        if asked is not None:
            answer = COARSE.get(asked[1], asked[1])
            yield Example(row, asked[0], answer, [answer], objects_in(scenes, row))


def _renamed(scenes: Scenes, rng: np.random.Generator, attribute: str, words: Mapping[str, str]) -> Iterator[Example]:
    names, values = ATTRIBUTES[attribute], scenes.attributes[attribute]
    for row in rng.permutation(np.flatnonzero(values >= 0)).tolist():
        word = words.get(names[values[row]])
        if word is not None:
            yield Example(row, attribute, word, [word], objects_in(scenes, row))
