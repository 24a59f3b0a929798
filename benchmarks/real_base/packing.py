"""Rows side by side in one sequence, so that hardly a token is padding and none is computed twice.

The rows of a task are 8 to 19 tokens long in the mean, the longest up to twice as long, and all begin with ``Q:``.
Padded to a rectangle, eight of them have 1.4 to 1.9 times as many tokens, and a CPU's time is about their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .encoding import Answered, Row, answers_of


@dataclass(frozen=True)
class Packed:
    """Blocks of rows, each block one sequence of N tokens: what all its rows begin with, and the rest of each.

    A token sees what its row would show it, and has the position that it has in its row: every logit is that of the row
    alone, to rounding.  The last token of a row is left out, as nothing is asked behind it.
    """

    ids: Tensor  # (K, N)
    positions: Tensor  # (K, N)
    mask: Tensor  # (K, 1, N, N), True where a token is seen
    said: Tensor  # (K, N), bool: the token after this one has to be said
    targets: Tensor  # (M), these tokens, row after row
    owner: Tensor  # (M), the rows that they belong to, counted through all blocks

    @classmethod
    def of(cls, blocks: Sequence[Sequence[Row]], device: torch.device) -> Packed:
        assert all(row.start > 0 for block in blocks for row in block)  # the first token of a row is asked of nothing
        shared = [_shared(block) for block in blocks]
        lengths = [
            first + sum(len(row.ids) - 1 - first for row in block) for first, block in zip(shared, blocks, strict=True)
        ]
        shape = len(blocks), max(lengths)
        ids, positions = torch.zeros(2, *shape, dtype=torch.long)
        row_of = torch.full(shape, -1)  # -1: padding
        said = torch.zeros(shape, dtype=torch.bool)
        targets, owner, number = list[int](), list[int](), 0
        for block, (first, rows) in enumerate(zip(shared, blocks, strict=True)):
            if rows:
                ids[block, :first] = torch.tensor(rows[0].ids[:first], dtype=torch.long)
                positions[block, :first] = torch.arange(first)
                row_of[block, :first] = SHARED
            place = first
            for row in rows:
                end = place + len(row.ids) - 1 - first
                ids[block, place:end] = torch.tensor(row.ids[first:-1])
                positions[block, place:end] = torch.arange(first, len(row.ids) - 1)
                row_of[block, place:end] = number
                said[block, place + row.start - 1 - first : end] = True
                targets += row.ids[row.start :]
                owner += [number] * (len(row.ids) - row.start)
                place, number = end, number + 1
        seen = (row_of[:, :, None] == row_of[:, None]) | (row_of == SHARED)[:, None]  # (K, N, N)
        mask = seen & torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
        return cls(
            ids.to(device), positions.to(device), mask[:, None].to(device), said.to(device),
            torch.tensor(targets, device=device), torch.tensor(owner, device=device),
        )  # fmt: skip

    def logits(self, model: nn.Module) -> Tensor:
        """(M, V), the logits of the tokens that have to be said.

        Raises:
            ValueError: an implementation of attention that would add the mask to the scores as it is.
        """
        config: Any = next(module.config for module in model.modules() if hasattr(module, "config"))
        if (found := config._attn_implementation) != "sdpa":
            raise ValueError(f"Rows side by side need attn_implementation='sdpa', found {found!r}.")
        logits: Tensor = model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            logits_to_keep=self.said,
            use_cache=False,
        ).logits
        return logits

    def answered(self, model: nn.Module, rows: int) -> Answered:
        """How a model answers each of the rows."""
        return answers_of(self.logits(model), self.targets, self.owner, rows)


SHARED = -2  # in the place of a row's number


def _shared(block: Sequence[Row]) -> int:
    """How many tokens all rows begin with, of those after which nothing is said."""
    if not block:
        return 0
    most = min(row.start for row in block) - 1
    return next((n for n in range(most) if len({row.ids[n] for row in block}) > 1), most)
