"""What a run leaves behind: JSON, a Markdown report with the bars that have to be reached, and a picture per part."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure
from rich.console import Console

from ..common import colors, files
from ..common.environment import command, environment
from ..common.tables import NOT_MEASURED, Record, Table, duration
from .presets import HIFICL, LORA, PREFIX

COLORS = {HIFICL: colors.HIFICL, LORA: colors.LORA, PREFIX: colors.PREFIX}
_COMPARE = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Bar:
    """A figure that has to be reached; `measured` is None where the run did not measure it."""

    what: str
    sense: str
    bound: float
    measured: float | None
    where: str | None = None

    def row(self) -> tuple[str, ...]:
        bound = f"{self.sense} {self.bound:.2f}"
        if self.measured is None:
            return self.what, bound, NOT_MEASURED, "", ""
        reached = "yes" if _COMPARE[self.sense](self.measured, self.bound) else "NO"
        return self.what, bound, f"{self.measured:.3f}", reached, self.where or ""


class Part(Protocol):
    """The module of a part, as the report sees it."""

    TITLE: str
    METHOD: str

    def tables(self, records: list[Record]) -> list[Table]: ...
    def bars(self, records: list[Record]) -> list[Bar]: ...
    def draw(self, records: list[Record], figure: Figure) -> None: ...


def save(folder: Path, name: str, settings: Mapping[str, object], records: list[Record], seconds: float) -> None:
    """Write the results of one part with everything that they depend on."""
    result = {
        "part": name,
        "command": command(),
        "settings": settings,
        **environment(),
        "seconds": seconds,
        "records": records,
    }
    files.write(folder / f"{name}.json", result)


def write(folder: Path, parts: Mapping[str, Part], console: Console) -> None:
    """Make the report from the parts' JSON files in the folder; what is missing is said to be missing."""
    results = {name: json.loads(path.read_text()) for name in parts if (path := folder / f"{name}.json").exists()}
    records = {name: results[name]["records"] if name in results else [] for name in parts}

    bars = [
        (*bar.row(), _sizes(results[name]) if bar.measured is not None else "")
        for name, part in parts.items()
        for bar in part.bars(records[name])
    ]
    must_reach = Table("Must reach", ("what", "bar", "measured", "reached", "where", "sizes"), bars)
    console.print(must_reach.rich())
    lines = [
        "# What HiFICL costs",
        "",
        "Written by `python -m benchmarks.speed`; ratios are within one run, variants interleaved.",
    ]
    lines += ["", *must_reach.markdown(), "", "## Runs", "", *_runs(results).markdown()]
    for name, part in parts.items():
        lines += ["", f"## {part.TITLE}", "", part.METHOD]
        if name not in results:
            lines += ["", f"{NOT_MEASURED.capitalize()}."]
            continue
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        part.draw(records[name], figure)
        figure.savefig(folder / f"{name}.png", dpi=110)
        lines += ["", f"![{part.TITLE}]({name}.png)"]
        for table in part.tables(records[name]):
            lines += ["", *table.markdown()]
    (folder / "speed.md").write_text("\n".join(lines) + "\n")


def _sizes(result: Record) -> str:
    return f"{result['settings']['preset']} on {result['settings']['device']}"


def _runs(results: Mapping[str, Record]) -> Table:
    rows = []
    for name, result in results.items():
        machine = ", ".join(f"{key} {value}" for key, value in result["hardware"].items())
        libraries = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
        rows.append((name, f"`{result['command']}`", machine, libraries, duration(result["seconds"])))
    return Table("Commands and machines", ("part", "command", "machine", "versions", "took"), rows)


def spread(record: Record) -> str:
    """The quartiles of a record's time, and how many samples they are of."""
    return f"{duration(record['seconds_q1'])} - {duration(record['seconds_q3'])} of {record['samples']}"
