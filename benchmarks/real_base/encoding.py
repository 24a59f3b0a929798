"""Samples as tensors, a model's logits at their answers, and what is measured of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ..common.tables import Record
from .tasks import Sample

BATCH = 25  # rows of a forward pass that measures


@dataclass(frozen=True)
class Row:
    """Token ids of a text, and the place where what a model has to say begins."""

    ids: list[int]
    start: int


def encode(tokenizer: Any, samples: Sequence[Sample]) -> list[Row]:
    """Question and answer, ``Q: ...`` and ``A: ...`` on two lines; the line's end is the end of the answer.

    The end-of-text token would not do: it is the tokenizer's padding, too.
    """
    rows = []
    for question, answer in samples:
        prompt = tokenizer(f"Q: {question}\nA:")["input_ids"]
        rows.append(Row(prompt + tokenizer(f" {answer}\n")["input_ids"], len(prompt)))
    return rows


def encode_text(tokenizer: Any, texts: Sequence[str]) -> list[Row]:
    """Whole texts; of the first token nothing is asked."""
    return [Row(tokenizer(text)["input_ids"], 1) for text in texts]


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, where causal attention needs no mask, and which tokens have to be said."""

    ids: Tensor  # (B, T)
    said: Tensor  # (B, T - 1), bool: the token after this one has to be said

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Batch:
        width = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        said = torch.zeros(len(rows), width - 1, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            said[number, row.start - 1 : len(row.ids) - 1] = True
        return cls(ids.to(device), said.to(device))

    @property
    def targets(self) -> Tensor:
        """(N), the tokens that have to be said, row after row."""
        return self.ids[:, 1:][self.said]

    def logits(self, model: nn.Module, cache: Any = None) -> Tensor:
        """(N, V), the logits of these tokens alone, behind what a cache holds."""
        kept = torch.nn.functional.pad(self.said, (0, 1))
        logits: Tensor = model(input_ids=self.ids, past_key_values=cache, logits_to_keep=kept).logits
        return logits


def loss_of(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    batch = Batch.of(rows, next(model.parameters()).device)
    return cross_entropy(batch.logits(model), batch.targets)


@torch.no_grad()
def measure(model: nn.Module, rows: Sequence[Row], shown: Sequence[Row] = ()) -> Record:
    """``score``, the share of answers that greedy decoding gets right to the last token, and the mean loss of a token.

    One forward pass tells both: a greedy answer is right just if each token is the likeliest after those before it.

    Args:
        rows: the queries.
        shown: demonstrations, which are read once and stand before every query.
    """
    device = next(model.parameters()).device
    cache = None
    if shown:
        ids = torch.tensor([[token for row in shown for token in row.ids]], device=device)
        cache = model(input_ids=ids, use_cache=True).past_key_values
    right, loss, tokens = torch.zeros(3, device=device, dtype=torch.float64)
    for number in range(0, len(rows), BATCH):
        part = rows[number : number + BATCH]
        batch, before = Batch.of(part, device), copy.deepcopy(cache)
        if before is not None:
            before.batch_repeat_interleave(len(part))
        found = answered(model, batch, before)
        right, loss, tokens = right + found.right.sum(), loss + found.loss.sum(), tokens + found.tokens.sum()
    return {"score": float(right) / len(rows), "loss": float(loss / tokens)}


class Answered(NamedTuple):
    """Of each row, (B): whether its whole answer is the likeliest, the summed loss of its tokens, and their number."""

    right: Tensor
    loss: Tensor
    tokens: Tensor


def answered(model: nn.Module, batch: Batch, cache: Any = None) -> Answered:
    """How a model answers each row of a batch, behind what a cache holds."""
    owner = batch.said.nonzero()[:, 0]
    return answers_of(batch.logits(model, cache), batch.targets, owner, len(batch.ids))


def answers_of(logits: Tensor, targets: Tensor, owner: Tensor, rows: int) -> Answered:
    """How rows are answered.

    Args:
        logits: (M, V).
        targets: (M), the tokens that have to be said.
        owner: (M), the rows that they belong to.
        rows: how many there are.
    """
    zeros = torch.zeros(rows, dtype=torch.float64, device=logits.device)
    tokens = zeros.index_add(0, owner, torch.ones_like(targets, dtype=torch.float64))
    right = zeros.index_add(0, owner, (logits.argmax(dim=-1) == targets).double())
    loss = zeros.index_add(0, owner, cross_entropy(logits, targets, reduction="none").double())
    return Answered(right == tokens, loss, tokens)


@torch.no_grad()
def forgetting(model: Any, rows: Sequence[Row]) -> Record:
    """The loss of a text's tokens with and without the adapter, and KL(base || adapted), mean of all tokens in nats."""
    device = next(model.parameters()).device
    sums, tokens = {"loss_before": 0.0, "loss": 0.0, "kl": 0.0}, 0
    for number in range(0, len(rows), BATCH):
        batch = Batch.of(rows[number : number + BATCH], device)
        told = {}
        for name, switch in (("loss_before", model.disable_adapter()), ("loss", nullcontext())):
            with switch:
                told[name] = batch.logits(model).log_softmax(dim=-1)
            sums[name] -= float(told[name].gather(1, batch.targets[:, None]).sum())
        sums["kl"] += float(kl_div(told["loss"], told["loss_before"], log_target=True, reduction="sum"))
        tokens += len(batch.targets)
    return {name: value / tokens for name, value in sums.items()}
