"""Captions as words, and the objects that they mention."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

SYNONYMS = "synonyms.txt"
INSTANCES = ("instances_train2014.json", "instances_val2014.json")
_ANIMAL, _VEHICLE = ("baby", "adult"), ("passenger",)  # qualifiers that would pass for a person
_VEHICLES = ("jet", "train")
_INSTEAD = {"bow tie": "tie", "toilet seat": "toilet"}  # what these name is the second, not what their words name
_NOTHING = ("home plate",)  # no object of COCO


def tokenizer() -> str:
    """Which one `tokenise` uses: the Penn Treebank's, which needs Java, or plain words."""
    return "PTB" if shutil.which("java") else "words, as there is no Java"


def tokenise(captions: Sequence[str]) -> list[str]:
    """Captions in lower case, words apart, without marks: by the tokenizer of COCO's caption evaluation.

    Without Java, whatever is no letter, digit, apostrophe or hyphen parts words; figures are then only near to others'.
    """
    if shutil.which("java"):
        # A caption of no words at all would shift the lines that come back.
        numbered = {number: [{"caption": text.strip() or "."}] for number, text in enumerate(captions)}
        found = PTBTokenizer().tokenize(numbered)
        return [found[number][0] for number in numbered]
    return [" ".join(re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower())) for text in captions]


class Objects:
    """COCO's objects and the words for them, as CHAIR reads captions (Rohrbach et al. 2018).

    Differences from the authors' script: nouns become singular by `lemminflect`, not by `pattern`, and double words are
    all names of several words in the list of synonyms, not a list of their own.

    Args:
        folder: holds CHAIR's ``synonyms.txt`` (a line for each object: its name, then other words for it, comma between
            them) and COCO's ``instances_train2014.json`` and ``instances_val2014.json``.

    Raises:
        FileNotFoundError: one of them is missing.
    """

    def __init__(self, folder: Path) -> None:
        missing = [name for name in (SYNONYMS, *INSTANCES) if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"There is no {', '.join(missing)} in {folder}, which CHAIR needs.")
        lines = [
            line.split(",") for line in (folder / SYNONYMS).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        self._name = {word.strip(): words[0].strip() for words in lines for word in words}
        self._of_image: dict[int, set[str]] = {}
        animals = {"animal", "cub"}
        for file in INSTANCES:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            category = {entry["id"]: entry for entry in content["categories"]}
            animals |= {entry["name"] for entry in category.values() if entry.get("supercategory") == "animal"}
            for entry in content["annotations"]:
                name = category[entry["category_id"]]["name"]
                self._of_image.setdefault(entry["image_id"], set()).add(self._name.get(name, name))
        self._phrases = {word: word for word in self._name if " " in word} | _INSTEAD | dict.fromkeys(_NOTHING, "")
        self._phrases |= {f"{age} {animal}": animal for age in _ANIMAL for animal in animals}
        self._phrases |= {f"{kind} {vehicle}": vehicle for kind in _VEHICLE for vehicle in _VEHICLES}

    def mentions(self, caption: str) -> list[str]:
        """The objects that a caption names, repeats included."""
        words, found = [_singular(word) for word in re.findall(r"[a-z0-9'-]+", caption.lower())], list[str]()
        while words:
            length = next((n for n in (3, 2) if " ".join(words[:n]) in self._phrases), 1)
            phrase = " ".join(words[:length])
            found.append(self._phrases.get(phrase, phrase))
            words = words[length:]
        chair = "toilet" not in found  # else a seat is the toilet's
        return [self._name[word] for word in found if word in self._name and (chair or word != "seat")]

    def of(self, image: int, captions: Iterable[str]) -> list[str]:
        """The objects of a picture: those that are marked in it, and those that people's captions name."""
        said = {name for caption in captions for name in self.mentions(caption)}
        return sorted(self._of_image.get(image, set()) | said)


def _singular(word: str) -> str:
    from lemminflect import getLemma

    return str(getLemma(word, "NOUN")[0])


def group(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """`tokenise` for several captions of each picture, in one call."""
    flat = iter(tokenise([text for of in captions.values() for text in of]))
    return {name: [next(flat) for _ in of] for name, of in captions.items()}
