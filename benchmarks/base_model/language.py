"""Words, and everything that is said about a scene as it stands: direct questions with their answers, and captions.

A question is a few words; the prompt puts the picture before it and a question mark behind it, and every answer ends
with the end token: `<image> color of three ? red <eos>`.
"""

from __future__ import annotations

import random

from .scenes import ATTRIBUTES, BACKGROUNDS, COLORS, EMPTY, GRID, OBJECTS, Scenes

PAD, UNKNOWN, END, IMAGE, MARK = "<pad>", "<unk>", "<eos>", "<image>", "?"
NOTHING = "nothing"

# What a rule calls a class.  Half are nonsense; half are plain words, of which the base learns nothing but to say them,
# so that tasks made later can use them with a meaning of their own.
NONSENSE = (
    "blick dax wug toma fep zorp kiki bouba lorp mip nuk gax tiv sarn plim quon "
    "dro vek hask jup yent obri culd razz snib thop warg ixle melk pruv gond fizzet"
)
PLAIN = (
    "odd even warm cool many few none both a the picture shows here we see with "
    "over under near far alpha beta gamma delta good bad true false first last up down"
)
LABELS = tuple(f"{NONSENSE} {PLAIN}".split())

# Each asks for something that only the demonstrations tell.  The base learns no more of them than that, so that tasks
# made later can ask by a word of their own.
HIDDEN = ("what", "parity", "next", "warmth", "sides", "case", "code", "group")
CAPTION = "caption"
NEIGHBORS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
QUESTION_TYPES = (*ATTRIBUTES, "color of", "corner of", "which is", "next to", "is there")
QUESTION_WEIGHTS = [1 if name in ATTRIBUTES else 3 for name in QUESTION_TYPES]  # about one object among several: harder

_values = [word for values in ATTRIBUTES.values() for word in values]
_other = [HIDDEN[0], CAPTION, *ATTRIBUTES, *NEIGHBORS, "of", "which", "is", "there", "yes", "no", NOTHING, "and", "on"]
VOCABULARY = tuple(dict.fromkeys([PAD, UNKNOWN, END, IMAGE, MARK, *_other, *_values, *LABELS, *HIDDEN]))
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}


def caption(scenes: Scenes, row: int) -> str:
    """`two red circle on black`, or `red circle and blue three on gray` in reading order."""
    things = [
        f"{list(COLORS)[color]} {OBJECTS[kind]}"
        for kind, color in zip(scenes.kind[row].tolist(), scenes.color[row].tolist(), strict=True)
        if kind != EMPTY
    ]
    if len(set(things)) == 1:
        things = [f"{ATTRIBUTES['count'][len(things) - 1]} {things[0]}"]
    return f"{' and '.join(things)} on {list(BACKGROUNDS)[scenes.background[row]]}"


def ask(scenes: Scenes, row: int, kind_of_question: str, choose: random.Random) -> tuple[str, str] | None:
    """A question of this type and its answer, or None where it makes no sense for the scene."""
    if kind_of_question in ATTRIBUTES:
        value = int(scenes.attributes[kind_of_question][row])
        return None if value < 0 else (kind_of_question, ATTRIBUTES[kind_of_question][value])

    kinds, colors = scenes.kind[row].tolist(), scenes.color[row].tolist()
    places = [place for place, kind in enumerate(kinds) if kind != EMPTY]
    place = choose.choice(places)
    name, color = OBJECTS[kinds[place]], list(COLORS)[colors[place]]
    alone = kinds.count(kinds[place]) == 1
    if kind_of_question == "color of":
        return f"color of {name}", color
    if kind_of_question == "corner of":
        return (f"corner of {name}", ATTRIBUTES["corner"][place]) if alone else None
    if kind_of_question == "which is":
        of_color = {kinds[other] for other in places if colors[other] == colors[place]}
        return (f"which is {color}", name) if len(of_color) == 1 else None
    if kind_of_question == "next to":
        if not alone or len(places) == 1:
            return None
        side, (down, right) = choose.choice(list(NEIGHBORS.items()))
        y, x = place // GRID + down, place % GRID + right
        there = kinds[y * GRID + x] if 0 <= y < GRID and 0 <= x < GRID else EMPTY
        return f"{side} of {name}", NOTHING if there == EMPTY else OBJECTS[there]
    words = [OBJECTS[kinds[i]] for i in places] + [list(COLORS)[colors[i]] for i in places]
    if choose.random() < 0.5:
        return f"is there {choose.choice(words)}", "yes"
    absent = choose.choice([word for word in choose.choice((OBJECTS, tuple(COLORS))) if word not in words])
    return f"is there {absent}", "no"


def any_question(scenes: Scenes, row: int, choose: random.Random) -> tuple[str, str]:
    while True:
        answered = ask(scenes, row, choose.choices(QUESTION_TYPES, QUESTION_WEIGHTS)[0], choose)
        if answered is not None:
            return answered
