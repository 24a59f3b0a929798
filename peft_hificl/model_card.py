"""The model card of a saved adapter: its usage section, and the metadata by which the Hub knows an adapter."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import RepoCard
from safetensors import SafetensorError, safe_open

CARD = "README.md"
MARK = "<!-- peft-hificl:"
TAG = "hificl"
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def update(save_directory: str) -> None:
    """Add to the card of an adapter that was just saved how to load it.

    The card is in the adapter's folder or, if the adapter has a name, in the folder above.  PEFT's own card does not
    say that loading needs `import peft_hificl`.  A README that is not a PEFT card, or not UTF-8, is left alone.
    """
    folder = Path(save_directory)
    for path in (folder / CARD, folder.parent / CARD):
        if path.is_file():
            try:
                card = path.read_bytes().decode()
            except UnicodeDecodeError:
                return
            if "library_name: peft" in card or MARK in card:
                _replace(path, _with_usage(_with_tag(card), _stored_adapters(path.parent)))
            return


def _with_card_kept(save: Callable[[RepoCard, Path | str], None]) -> Callable[[RepoCard, Path | str], None]:
    """Wrap `RepoCard.save`, so that a card written after the adapters were saved has their usage and metadata too.

    transformers' `push_to_hub`, `Trainer.create_model_card` and trl's trainers write such cards, and so does PEFT when
    an adapter is saved again.
    """

    @functools.wraps(save)
    def save_card(card: RepoCard, filepath: Path | str) -> None:
        path = Path(filepath)
        if path.name == CARD:
            adapters = _stored_adapters(path.parent)
            before = path.read_bytes() if path.is_file() else b""
            if adapters or MARK.encode() in before:
                text = _with_metadata(str(card), before.decode(errors="replace"), adapters)
                _replace(path, _with_usage(_with_tag(text) if adapters else text, adapters))
                return
        save(card, filepath)

    save_card.keeps_hificl_usage = True  # type: ignore[attr-defined]
    return save_card


def _stored_adapters(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations of the HiFICL adapters that a card in this folder describes, by their path from there."""
    found = {}
    for path in sorted([*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json")]):
        if path.parent != folder and (path.parent / CARD).exists():
            continue  # it has a card of its own: a checkpoint of a Trainer
        try:
            config = json.loads(path.read_bytes())
        except ValueError:
            continue
        if isinstance(config, dict) and config.get("peft_type") == "HIFICL" and {"n", "r"} <= config.keys():
            found["." if path.parent == folder else path.parent.name] = config | {"parameters": _count(path.parent)}
    return found


def _count(folder: Path) -> int | None:
    """How many numbers are stored of an adapter; None: they have not been saved, or cannot be read."""
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _with_metadata(card: str, before: str, adapters: dict[str, dict[str, Any]]) -> str:
    """The card, if its writer did not know of PEFT, with the metadata of the card before it where it has none itself.

    transformers' `push_to_hub` puts a card of a whole model, or the one that is on the Hub, in the place of the card
    that PEFT has just written.  A base model that is a local folder is left out: the Hub refuses such a card.
    """
    new, old = _parsed(card), _parsed(before)
    if new is None or new.data.get("library_name") == "peft":
        return card
    known = {} if old is None else old.data.to_dict()
    if "." not in adapters and known.get("library_name") != "peft":
        return card
    base = known.pop("base_model", None) or next((c.get("base_model_name_or_path") for c in adapters.values()), None)
    if isinstance(base, list) or (isinstance(base, str) and _is_id(base)):
        known["base_model"] = base
    tags = [tag for tag in _tags(known) if not tag.startswith("base_model:") or _is_id(tag.rpartition(":")[2])]
    new.data["tags"] = list(dict.fromkeys([*_tags(new.data), *tags]))
    new.data["library_name"] = "peft"
    for key, value in known.items():
        if new.data.get(key) is None:
            new.data[key] = value
    return str(new)


def _with_tag(card: str) -> str:
    parsed = _parsed(card)
    if parsed is None or TAG in _tags(parsed.data):
        return card
    parsed.data["tags"] = [*_tags(parsed.data), TAG]
    return str(parsed)


def _parsed(card: str) -> RepoCard | None:
    """A card, unless it has no metadata, or none that can be read."""
    if not card.lstrip().startswith("---"):
        return None
    try:
        parsed = RepoCard(card)
    except (TypeError, ValueError, yaml.YAMLError):  # TypeError: a key that is no text
        return None
    return parsed if parsed.data.to_dict() else None


def _tags(data: Any) -> list[str]:
    tags = data.get("tags") or []
    return [str(tag) for tag in (tags if isinstance(tags, list) else [tags])]


def _is_id(name: str) -> bool:
    """Whether this can be the id of a model on the Hub, and not a folder."""
    return bool(re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name)) and not os.path.exists(name)


def _with_usage(card: str, adapters: dict[str, dict[str, Any]]) -> str:
    """The card with a usage section for each adapter, in place of its old section or at the end."""
    newline = "\r\n" if "\r\n" in card else "\n"
    for adapter, config in adapters.items():
        begin, end = (f"{MARK} {edge} of the usage of {adapter} -->" for edge in ("begin", "end"))
        section = f"{begin}\n{_usage(config, adapter)}{end}".replace("\n", newline)
        before, found, rest = card.partition(begin)
        if found:
            card = f"{before}{section}{rest.partition(end)[2]}"
        else:
            card = f"{card.rstrip()}{newline}{newline}{section}{newline}"
    return card


def _replace(path: Path, text: str) -> None:
    """Replace a file in one step: nobody reads half of the text, even if this process is stopped."""
    path = path.resolve()  # if it is a link, replace its target
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(text.encode())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _usage(config: dict[str, Any], adapter: str) -> str:
    named = adapter != "."
    heading = f"## How to use the HiFICL adapter {adapter}" if named else "## How to use this HiFICL adapter"
    base_class, origin = _AUTO_CLASSES.get(str(config.get("task_type")), "AutoModel"), config.get("auto_mapping")
    if isinstance(origin, dict) and str(origin.get("parent_library")).startswith("transformers."):
        base_class = origin["base_model_class"]
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        base = "the base model: a folder or its id on the Hub"
    elif os.path.isdir(base):
        base = os.path.abspath(base)  # the snippet runs in the adapter's folder
    head = "key/value" if config.get("heads") == "kv" else "attention"
    subfolder = f", subfolder={adapter!r}" if named else ""
    count = "" if config["parameters"] is None else f", {config['parameters']:,} parameters"
    return f"""{heading}

{config.get("n", 8)} virtual key-value pairs per {head} head, rank {config.get("r", 8)}{count} ([HiFICL](https://arxiv.org/abs/2603.12760)).

```bash
pip install peft-hificl
```

```python
import peft_hificl  # registers HiFICL with PEFT; without it, loading fails with KeyError: 'HIFICL'
from peft import PeftModel
from transformers import {base_class}

base = {base_class}.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "."{subfolder})  # ".": this folder, or its id on the Hub
```
"""


def keep_usage() -> None:
    """Install the wrapper of `RepoCard.save`, through which every library writes its cards."""
    if not getattr(RepoCard.save, "keeps_hificl_usage", False):
        RepoCard.save = _with_card_kept(RepoCard.save)  # type: ignore[method-assign, assignment]
