"""Tables, for a report in Markdown and for a terminal, and the numbers in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.table

Record = dict[str, Any]  # one row of results, as JSON has it

NOT_MEASURED = "not measured"


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> list[str]:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return [f"**{self.title}**", "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)]

    def rich(self) -> rich.table.Table:
        shown = rich.table.Table(*self.columns, title=self.title)
        for row in self.rows:
            shown.add_row(*map(str, row))
        return shown


def tabulate(title: str, records: Iterable[Record], columns: Mapping[str, str | Callable[[Record], object]]) -> Table:
    """One row per record; a column shows a field of the record, or what a function makes of it."""
    rows = [
        [record[show] if isinstance(show, str) else show(record) for show in columns.values()] for record in records
    ]
    return Table(title, list(columns), rows)


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


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
