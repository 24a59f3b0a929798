"""Runs the families of `architectures`, with an eye on every call of their adapted attentions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

from .architectures import FIRST_SPECIAL, VOCABULARY, Family, Inputs, Refused


def each(entries: tuple[Family, ...] | tuple[Refused, ...]) -> Any:
    """Parametrise over the entries that the installed transformers knows."""

    def unknown(entry: Family | Refused) -> tuple[pytest.MarkDecorator, ...]:
        known = hasattr(transformers, entry.model)
        return () if known else (pytest.mark.skip(f"transformers {transformers.__version__} has no {entry.model}"),)

    ids = [f"{e.name}-{e.model}" if [x.name for x in entries].count(e.name) > 1 else e.name for e in entries]
    params = [pytest.param(e, id=i, marks=unknown(e)) for e, i in zip(entries, ids, strict=True)]
    return pytest.mark.parametrize("family", params)


@dataclass
class Call:
    """One call of the attention function that the package registers: what it was given, and what it returned."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    output: Tensor


@contextmanager
def recorded_attention() -> Iterator[list[Call]]:
    mapping = AttentionInterface._global_mapping
    original, calls = mapping["hificl"], []

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        result = original(module, query, key, value, attention_mask, **options)
        calls.append(Call(module, query, key, value, attention_mask, options, result[0]))
        return result

    mapping["hificl"] = record
    try:
        yield calls
    finally:
        mapping["hificl"] = original


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs)[0]


@dataclass
class Generation:
    tokens: Tensor  # (B, prompt + new)
    logits: Tensor  # (B, new, V)
    queries: int  # how many the adapted attentions were given: fewer if there is a cache

    def agrees_with(self, other: Generation, first_row: int = 0) -> bool:
        rows = slice(first_row, None)
        return torch.equal(self.tokens[rows], other.tokens[rows]) and torch.allclose(
            self.logits[rows], other.logits[rows], rtol=1e-4, atol=1e-4
        )


def generate(model: nn.Module, inputs: Inputs, **options: Any) -> Generation:
    with recorded_attention() as calls:
        result = model.generate(
            **inputs, **options, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
            suppress_tokens=list(range(FIRST_SPECIAL, VOCABULARY)), output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return Generation(result.sequences, torch.stack(result.logits, dim=1), sum(c.query.shape[2] for c in calls))
