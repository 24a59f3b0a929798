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
from torch.nn.utils.rnn import pad_sequence

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
        parts: list[list[Tensor]] = []
        targets, owner, number = list[int](), list[int](), 0
        for rows in blocks:
            first = _shared(rows)
            tokens, places = list(rows[0].ids[:first] if rows else ()), list(range(first))
            numbers, asked = [SHARED] * first, [0] * first
            for row in rows:
                last = len(row.ids) - 1
                tokens += row.ids[first:last]
                places += range(first, last)
                numbers += [number] * (last - first)
                asked += [0] * (row.start - 1 - first) + [1] * (last + 1 - row.start)
                targets += row.ids[row.start :]
                owner += [number] * (last + 1 - row.start)
                number += 1
            parts.append([torch.tensor(of, dtype=torch.long) for of in (tokens, places, numbers, asked)])
        ids, positions, row_of, said = (
            pad_sequence(list(of), batch_first=True, padding_value=padding)
            for of, padding in zip(zip(*parts, strict=True), (0, 0, -1, 0), strict=True)
        )
        seen = (row_of[:, :, None] == row_of[:, None]) | (row_of == SHARED)[:, None]  # (K, N, N)
        return cls(
            ids.to(device), positions.to(device), seen.tril()[:, None].to(device), said.bool().to(device),
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
