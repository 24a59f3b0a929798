"""Who listens to the attention calls of a thread; nobody, unless something is being recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layer import HiFICLLayer
from .ops.formula import Scoring, VirtualPairs

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, VirtualPairs, Scoring], tuple[Tensor, Tensor | None]]


class Call(NamedTuple):
    """One attention call with virtual pairs.

    Attributes:
        layer: the adapter layer of the attention.
        attend: the function of `backends` that computes the call from module, query, key, value, pairs and scoring.
        output: what it computed, ``(B, H, T, e)``.
    """

    layer: HiFICLLayer
    attend: Attend
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    pairs: VirtualPairs
    scoring: Scoring
    output: Tensor


Listener = Callable[[Call], None]


class Listening(threading.local):
    """The listeners of this thread; each thread has its own."""

    def __init__(self) -> None:
        self.each: tuple[Listener, ...] = ()


listening = Listening()


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="what virtual pairs do is being recorded, which torch.compile(fullgraph=True) does not allow: record the "
    "model before it is compiled, or compile it without fullgraph"
)
def tell(*call: Any) -> None:
    """Hand a call, given as the fields of `Call`, to the listeners; compiled code runs this between two graphs."""
    for listener in listening.each:
        listener(Call(*call))


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Within the block, `listener` is handed the attention calls of this thread."""
    before = listening.each
    listening.each = (*before, listener)
    try:
        yield
    finally:
        listening.each = before
