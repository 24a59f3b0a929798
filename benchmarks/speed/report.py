"""What a run leaves behind: JSON, a Markdown report with the issue's bars, and a picture per part."""

from __future__ import annotations

import json
import operator
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as RichTable

from .measure import Record
from .presets import HIFICL, LORA, PREFIX

NOT_MEASURED = "not measured"
COLORS = {HIFICL: "#1f6fb4", LORA: "#e08a1e", PREFIX: "#6aa84f"}  # whatever is not an adapter is grey
GREY = "#9a9a9a"
_COMPARE = {"<=": operator.le, ">=": operator.ge}


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


def tabulate(title: str, records: Iterable[Record], columns: Mapping[str, str | Callable[[Record], object]]) -> Table:
    """One row per record; a column shows a field of the record, or what a function makes of it."""
    rows = [[show(record) if callable(show) else record[show] for show in columns.values()] for record in records]
    return Table(title, list(columns), rows)


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
        "command": shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]),
        "settings": settings,
        "hardware": hardware(),
        "versions": versions(),
        "seconds": seconds,
        "records": records,
    }
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1))


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
    console.print(_rich(must_reach))
    lines = [
        "# What HiFICL costs",
        "",
        "Written by `python -m benchmarks.speed`; ratios are within one run, variants interleaved.",
    ]
    lines += ["", *_markdown(must_reach), "", "## Runs", "", *_markdown(_runs(results))]
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
            lines += ["", *_markdown(table)]
    (folder / "speed.md").write_text("\n".join(lines) + "\n")


def _sizes(result: Mapping) -> str:
    return f"{result['settings']['preset']} on {result['settings']['device']}"


def _runs(results: Mapping[str, Mapping]) -> Table:
    rows = []
    for name, result in results.items():
        machine = ", ".join(f"{key} {value}" for key, value in result["hardware"].items())
        libraries = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
        rows.append((name, f"`{result['command']}`", machine, libraries, duration(result["seconds"])))
    return Table("Commands and machines", ("part", "command", "machine", "versions", "took"), rows)


def _markdown(table: Table) -> list[str]:
    header = "| " + " | ".join(table.columns) + " |"
    rows = ["| " + " | ".join(map(str, row)) + " |" for row in table.rows]
    return [f"**{table.title}**", "", header, "|" + "---|" * len(table.columns), *rows]


def _rich(table: Table) -> RichTable:
    shown = RichTable(*table.columns, title=table.title)
    for row in table.rows:
        shown.add_row(*map(str, row))
    return shown


# -- the machine ------------------------------------------------------------------------------------------------------


def hardware() -> dict[str, object]:
    found: dict[str, object] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu GiB": round(properties.total_memory / 2**30), "cuda": torch.version.cuda}
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    packages = ("peft-hificl", "peft", "torch", "transformers")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


# -- numbers as text ---------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def spread(record: Record) -> str:
    """The quartiles of a record's time, and how many samples they are of."""
    return f"{duration(record['seconds_q1'])} - {duration(record['seconds_q3'])} of {record['samples']}"


def bytes_of(size: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size:.0f} B"


def decimal(number: float) -> str:
    return f"{number:.2f}"


def count(number: float) -> str:
    return f"{number:,.0f}"


def scientific(number: float) -> str:
    return f"{number:.3e}"
