"""Tasks made by script from packages: questions and answers as text, split by the word that is asked about.

`make` writes them into the cache; nothing of the packages' data is in this repository.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..common import files
from . import sources

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = 400, 100, 300  # the most of each; of a source with fewer words, two, one and two fifths
ITEMS = TRAIN + VALIDATION + TEST
GENERAL = "general"  # sentences that no task is about, to see what training makes a model forget

Sample = tuple[str, str]  # a question and its answer


class Item(NamedTuple):
    """A sample and the word that it is about: all samples about a word are in one split."""

    word: str
    question: str
    answer: str


KINDS = {  # WordNet's files of nouns
    5: "animal", 6: "thing", 8: "body", 12: "feeling", 13: "food", 15: "place", 18: "person", 20: "plant",
}  # fmt: skip
LANGUAGES = {
    "cs": "Czech", "de": "German", "es": "Spanish", "fi": "Finnish", "fr": "French", "hu": "Hungarian", "it": "Italian",
    "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "sv": "Swedish", "tr": "Turkish",
}  # fmt: skip
OF_EACH_MESSAGE = 3
VERBS = ("appear", "arrive", "change", "fall", "grow", "leave", "move", "remain", "stop", "wait")
SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class Noun(NamedTuple):
    word: str
    tagged: int  # senses of it that WordNet's tagged texts have
    kind: int  # the file of its first sense


class WordNet:
    """What the tasks need of WordNet's files: words by how common they are, the kinds of nouns, example sentences."""

    def __init__(self, packages: Path) -> None:
        found = sources.read(packages, sources.WORDNET, ending="")
        self._files = {
            Path(name).name: content.decode().splitlines()
            for name, content in found.items()
            if "/wordnet-3.0/" in name and Path(name).name.startswith(("index.", "data."))
        }

    def index(self, part: str) -> list[tuple[str, int, str]]:
        """Word, number of tagged senses, offset of its first sense; words of letters alone, the most common first."""
        entries = []
        for line in self._files[f"index.{part}"]:
            if line.startswith(" "):  # the licence
                continue
            word, _, _, pointers, *rest = line.split()
            _, tagged, first, *_ = rest[int(pointers) :]
            if word.isalpha() and len(word) > 2:
                entries.append((word, int(tagged), first))
        return sorted(entries, key=lambda entry: (-entry[1], entry[0]))

    def nouns(self) -> list[Noun]:
        kinds = {line[:8]: int(line[9:11]) for line in self._files["data.noun"] if not line.startswith(" ")}
        return [Noun(word, tagged, kinds[first]) for word, tagged, first in self.index("noun")]

    def words(self) -> set[str]:
        return {word for part in ("noun", "verb", "adj", "adv") for word, _, _ in self.index(part)}

    def sentences(self) -> list[str]:
        """Examples that are sentences: no fragments, no definitions."""
        examples = {
            example
            for part in ("noun", "verb", "adj", "adv")
            for line in self._files[f"data.{part}"]
            for example in re.findall(r'"([^"]+)"', line)
            if 60 <= len(example) <= 120 and example[0].isalpha() and example[-1].isalpha()
        }
        return sorted(f"{example[0].upper()}{example[1:]}." for example in examples)


def past(packages: Path) -> list[Item]:
    from lemminflect import getInflection

    verbs = [(word, getInflection(word, "VBD")) for word, _, _ in WordNet(packages).index("verb")[:1500]]
    known = [(word, forms[0]) for word, forms in verbs if forms and forms[0] != word and forms[0].isalpha()]
    return [Item(word, word, form) for word, form in known[:ITEMS]]


def plural(packages: Path) -> list[Item]:
    return [Item(word, word, plural) for word, plural, _ in _plurals(packages)[:ITEMS]]


def sentence(packages: Path) -> list[Item]:
    """A sentence about one and the same about many: an answer of several words."""
    choose = random.Random(0)
    countable = [noun for noun in _plurals(packages) if noun[-1] in (5, 6, 18, 20)]  # animals, things, people, plants
    return [
        Item(word, f"The {word} {(verb := choose.choice(VERBS))}s.", f"The {plural} {verb}.")
        for word, plural, _ in countable[:ITEMS]
    ]


def _plurals(packages: Path) -> list[tuple[str, str, int]]:
    from lemminflect import getInflection

    nouns = [(noun, getInflection(noun.word, "NNS")) for noun in WordNet(packages).nouns()[:4000]]
    return [(noun.word, forms[0], noun.kind) for noun, forms in nouns if forms and forms[0] != noun.word]


def kind(packages: Path) -> list[Item]:
    nouns = [noun for noun in WordNet(packages).nouns() if noun.tagged]
    each = [[noun.word for noun in nouns if noun.kind == number][: ITEMS // len(KINDS)] for number in KINDS]
    return [Item(word, word, name) for words, name in zip(each, KINDS.values(), strict=True) for word in words]


def valence(packages: Path) -> list[Item]:
    """Words that most people find clearly pleasant or unpleasant, in their base form."""
    known = WordNet(packages).words()
    ((_, lexicon),) = sources.read(packages, sources.VALENCE, ending="vader_lexicon.txt").items()
    rated = [line.split("\t")[:2] for line in lexicon.decode().splitlines()]
    classes: dict[str, list[str]] = {"positive": [], "negative": []}
    for word, mean in rated:
        if word in known and abs(float(mean)) >= 1.5:
            classes["positive" if float(mean) > 0 else "negative"].append(word)
    choose = random.Random(0)
    return [Item(word, word, name) for name, words in classes.items() for word in choose.sample(words, ITEMS // 2)]


def demonym(packages: Path) -> list[Item]:
    countries = [json.loads(content) for content in sources.read(packages, sources.COUNTRIES, ending=".json").values()]
    pairs = {country.get("name", ""): country.get("demonym") or "" for country in countries}
    return [Item(name, name, word) for name, word in sorted(pairs.items()) if name and re.fullmatch(r"\w[\w -]*", word)]


def language(packages: Path) -> list[Item]:
    """The messages of a web framework, each in a few of the languages."""
    found = sources.read(packages, sources.MESSAGES, ending=".po")
    choose, messages = random.Random(0), dict[str, dict[str, str]]()
    for name, content in sorted(found.items()):
        _, _, path = name.rpartition("/locale/")
        if (of := path.partition("/")[0]) in LANGUAGES:
            for english, text in re.findall(r'^msgid "(.+)"\nmsgstr "(.+)"$', content.decode(), re.MULTILINE):
                if text != english and text.count(" ") >= 2 and not re.search(r"[%{}<\\]", text):
                    messages.setdefault(english, {})[of] = text
    items = []
    for english, translations in sorted(messages.items()):
        for code in choose.sample(sorted(translations), min(OF_EACH_MESSAGE, len(translations))):
            items.append(Item(english, translations[code], LANGUAGES[code]))
    return items


def number(packages: Path) -> list[Item]:
    """Numbers in words: an answer of several words, which needs no source."""
    return [Item(str(value), str(value), in_words(value)) for value in range(101, 1000) if value % 100]


def in_words(value: int) -> str:
    """
    >>> in_words(742)
    'seven hundred forty-two'
    """
    hundreds, rest = divmod(value, 100)
    tens, ones = divmod(rest, 10)
    below = SMALL[rest] if rest < 20 else f"{TENS[tens]}-{SMALL[ones]}" if ones else TENS[tens]
    return f"{SMALL[hundreds]} hundred {below}" if hundreds else below


TASKS: dict[str, Callable[[Path], list[Item]]] = {
    "past": past,
    "plural": plural,
    "kind": kind,
    "valence": valence,
    "demonym": demonym,
    "language": language,
    "sentence": sentence,
    "number": number,
}


def split(items: Iterable[Item]) -> dict[str, list[Sample]]:
    """Shuffled by a fixed seed and cut between words; of two samples with the same question the first is kept."""
    words, asked = dict[str, list[Sample]](), set[str]()
    for item in items:
        if item.question not in asked:
            asked.add(item.question)
            words.setdefault(item.word, []).append((item.question, item.answer))
    shuffled = list(words.values())
    random.Random(0).shuffle(shuffled)
    sizes = {"test": min(TEST, len(asked) * 2 // 5), "validation": min(VALIDATION, len(asked) // 5), "train": TRAIN}
    splits = {}
    for name, size in sizes.items():
        splits[name] = list[Sample]()
        while shuffled and len(splits[name]) + len(shuffled[-1]) <= size:
            splits[name] += shuffled.pop()
    return splits


def make(packages: Path, folder: Path) -> None:
    """Write every task, and the general sentences, as a JSON file each."""
    for name, task in TASKS.items():
        files.write(folder / f"{name}.json", split(task(packages)))
    files.write(folder / f"{GENERAL}.json", random.Random(0).sample(WordNet(packages).sentences(), 64))


def load_task(folder: Path, name: str) -> dict[str, list[Sample]]:
    """The samples of a task by split.

    Raises:
        FileNotFoundError: the tasks have not been prepared.
    """
    splits = json.loads(_text(folder, name))
    return {of: [(question, answer) for question, answer in splits[of]] for of in SPLITS}


def load_general(folder: Path) -> list[str]:
    """Sentences that no task is about."""
    return list(json.loads(_text(folder, GENERAL)))


def _text(folder: Path, name: str) -> str:
    path = folder / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}: run `python -m benchmarks.real_base prepare`.")
    return path.read_text(encoding="utf-8")
