"""Answers to questions, as the evaluation of VQA v2 compares them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

# Facts of the evaluation of VQA v2: each loses one apostrophe, and what is left of it is spelled with it again.
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_CUTS = re.compile(r"\n|Question|Answer|Image|Short")


def cut(text: str) -> str:
    """An answer without what a model says after it, as the authors cut it: for all methods alike.

    >>> cut(" a red bus Question: What next?")
    'a red bus'
    """
    return _CUTS.split(text.strip(), maxsplit=1)[0].strip()


@functools.cache
def spellings() -> dict[str, str]:
    """Words that have lost an apostrophe, and what they stand for."""
    found = {}
    for word in _WITH_APOSTROPHES.split():
        for place, symbol in enumerate(word):
            if symbol == "'":
                found[word[:place] + word[place + 1 :]] = word
    found["somebody'd"] = "somebodyd"  # the wrong way round in the official table
    return found


def normalise(answer: str) -> str:
    """An answer in the spelling in which the evaluation of VQA v2 compares it.

    Marks go where they touch a blank, and everywhere in an answer with a number such as 1,000; else they become blanks.
    Full stops go but in decimals.  Then lower case, digits for small numbers, no articles, apostrophes put back.

    >>> normalise("The dogs aren't  two-colored.")
    "dogs aren't 2 colored"
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    whole, number = text, _NUMBER_WITH_COMMA.search(text)
    for mark in _MARKS:
        apart = f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if apart or number else " ")
    words = [_DIGITS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split()]
    return " ".join(spellings().get(word, word) for word in words if word not in ("a", "an", "the"))


def stem(answer: str, stems: Mapping[str, str]) -> str:
    """An answer as OK-VQA's annotations have it: stemmed as a whole where people gave it, else word by word."""
    if answer in stems:
        return stems[answer]
    return " ".join(stems.get(word, word) for word in answer.split())
