"""Pictures of what was recorded, as matplotlib figures; nothing is shown and no global state of pyplot is used.

Needs matplotlib, which the extra ``inspection`` installs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .kinds import Kinds
from .recording import Column, Record, Records

COLORS = "Blues"


def heatmap(records: Records, kinds: Kinds | None = None) -> Figure:
    """The mass of the pairs by layer and head, one panel for each kind of token.

    Args:
        records: what was recorded.
        kinds: as `token_kinds` returns them.  None: the first token of each row, and all others.

    Raises:
        ValueError: nothing was recorded, or the kinds are of another batch.
    """
    found = records.by_kind(kinds)
    layers = len(records)
    figure = Figure(figsize=(1.2 + 2.4 * len(found), 1.6 + 0.16 * max(layers, 8)), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (kind, masses) in zip(panels, found.items(), strict=True):
        image = axes.imshow(masses.numpy(), vmin=0, vmax=1, cmap=COLORS, aspect="auto")
        axes.set(title="first token" if kind == "first" else f"{kind} tokens", xlabel="head")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("adapted layer")
    figure.colorbar(image, ax=panels, label="share of the attention that the pairs take")
    return figure


def sequence(record: Record, row: int = 0, head: int | None = None, tokens: Sequence[str] | None = None) -> Figure:
    """Beta over one sequence: a line of the picture for each pair, a column for each token.

    Args:
        record: what was recorded of one attention module.
        row: the row of the batch.
        head: a query head.  None: the mean over heads, whose pairs have nothing in common but their number.
        tokens: the words below the columns.

    Raises:
        ValueError: a row or head that was not recorded, or another number of tokens.
    """
    beta, columns = _chosen(record, row, head)  # (T, n)
    length = len(beta)
    if tokens is not None and len(tokens) != length:
        raise ValueError(f"{len(tokens)} tokens for {length} that were recorded: give one word for each.")
    figure = Figure(figsize=(1.8 + 0.22 * max(length, 12), 1.4 + 0.25 * len(columns)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(beta.T.numpy(), vmin=0, cmap=COLORS, aspect="auto")
    axes.set(title=_title(record, head), xlabel="token", ylabel="pair")
    axes.set_yticks(range(len(columns)), [_name(column, columns) for column in columns])
    if tokens is not None:
        axes.set_xticks(range(length), [_printable(token) for token in tokens], rotation=90)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="beta")
    return figure


def picture(
    record: Record,
    image: Any,
    kinds: Kinds,
    row: int = 0,
    head: int | None = None,
    grid: tuple[int, int] | None = None,
) -> Figure:
    """Beta of the patches of a picture, drawn over it: a panel for each pair.

    Args:
        record: what was recorded of one attention module.
        image: the picture, as matplotlib's `imshow` takes it (a PIL image, an array).
        kinds: as `token_kinds` returns them; the tokens of kind "image" are the patches, row by row.
        row: the row of the batch.
        head: a query head.  None: the mean over heads.
        grid: rows and columns of the patches.  None: as many rows as columns.

    Raises:
        ValueError: a row or head that was not recorded, or image tokens that do not form the grid.
    """
    beta, columns = _chosen(record, row, head)
    places = [place for place, kind in enumerate(kinds[row]) if kind == "image"]
    if grid is None:
        grid = (math.isqrt(len(places)),) * 2
    if not places or grid[0] * grid[1] != len(places):
        raise ValueError(f"Row {row} has {len(places)} image tokens, which are no grid of {grid[0]} x {grid[1]}.")
    patches = beta[places].T.reshape(len(columns), *grid)
    width = min(4, len(columns))
    height = math.ceil(len(columns) / width)
    figure = Figure(figsize=(1 + 2 * width, 0.6 + 2.2 * height), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, patch, column in zip(panels, patches, columns, strict=False):
        axes.imshow(image, extent=(0, grid[1], grid[0], 0))
        shown = axes.imshow(
            patch.numpy(), extent=(0, grid[1], grid[0], 0), alpha=0.6, vmin=0, vmax=float(patches.max()), cmap="viridis"
        )
        axes.set_title(f"pair {_name(column, columns)}", fontsize=10)
    figure.suptitle(_title(record, head))
    figure.colorbar(shown, ax=list(panels), label="beta")
    return figure


def _chosen(record: Record, row: int, head: int | None) -> tuple[Tensor, list[Column]]:
    """Beta (T, n) of one row, of a head or the mean over heads; and the pairs of its columns."""
    weights = record.weights
    rows, heads = weights.beta.shape[:2]
    if not 0 <= row < rows or not (head is None or 0 <= head < heads):
        raise ValueError(
            f"row={row}, head={head} of {record.name!r}, of which {rows} rows and {heads} heads were recorded."
        )
    beta = weights.beta[row].mean(dim=0) if head is None else weights.beta[row, head]
    real = [i for i, column in enumerate(weights.columns[row]) if column is not None]
    if not real:
        raise ValueError(f"Row {row} of {record.name!r} saw no virtual pairs: its adapter is '__base__'.")
    return beta[:, torch.tensor(real)], [column for column in weights.columns[row] if column is not None]


def _title(record: Record, head: int | None) -> str:
    return f"{record.name}, {'mean over heads' if head is None else f'head {head}'}"


def _name(column: Column, columns: list[Column]) -> str:
    several = len({other.adapter for other in columns}) > 1
    return f"{column.adapter} {column.pair}" if several else str(column.pair)


def _printable(token: str) -> str:
    """A word whose line breaks can be seen, and that matplotlib does not take for a formula."""
    return token.replace("\n", "\\n").replace("$", r"\$")
