"""Result files that a killed process leaves whole, or whole but for their last line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .tables import Record


def write(path: Path, content: Any) -> None:
    """A JSON file: all of it or, where the process is killed, what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def append(path: Path, record: Record) -> None:
    """One more line of a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(record).encode() + b"\n")


def lines(path: Path) -> tuple[list[bytes], bytes]:
    """The lines of a file and what follows the last of them: nothing, or a line that a killed process began."""
    *whole, torn = path.read_bytes().split(b"\n")
    return whole, torn


def drop_torn_line(path: Path) -> bool:
    """Make a file end with a whole line again; True where there was something to drop."""
    _, torn = lines(path)
    os.truncate(path, path.stat().st_size - len(torn))
    return bool(torn)
