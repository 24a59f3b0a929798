"""A teacher: the base model with demonstrations in its prompt, which a student without them is drawn to."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss
from transformers import LlavaForConditionalGeneration

from ..encoding import IGNORED, Row, collate
from .learner import Loss, Setup

SHOTS = 8
CROSS_ENTROPY = 0.5  # what it counts beside the teacher, in LIVE as in MimIC


@dataclass(frozen=True)
class Run:
    """One forward pass: logits of the answers, and the states at the tokens of query and answer."""

    loss: Tensor
    logits: Tensor  # (tokens of all answers, V)
    states: list[Tensor] = field(default_factory=list)  # of each layer two, (tokens of all queries and answers, D)


class Teacher:
    """Reads each sample behind demonstrations drawn from the other samples of the run, anew at each step."""

    def __init__(self, base: LlavaForConditionalGeneration, setup: Setup) -> None:
        self.base, self.setup = copy.deepcopy(base).eval().requires_grad_(False), setup
        self.rng = np.random.default_rng([setup.seed, SHOTS])

    @torch.no_grad()
    def read(self, rows: list[int]) -> Run:
        shown = draw_demonstrations(self.setup.samples, rows, SHOTS, self.rng)
        return _run(self.base, self.base, self.setup, rows, shown)


def draw_demonstrations(
    samples: Sequence[int], queries: Iterable[int | None], shots: int, rng: np.random.Generator
) -> list[list[Row]]:
    """Training samples to show before each query: none twice, and never the query itself (None: not one of them)."""
    shown = []
    for query in queries:
        chosen = [row for row in rng.permutation(samples)[: shots + 1].tolist() if row != query]
        shown.append([("train", row) for row in chosen[:shots]])
    return shown


def drawn_to_states(model: nn.Module, base: LlavaForConditionalGeneration, setup: Setup, teacher: Teacher) -> Loss:
    """MimIC's loss: mean squared error of the states after each attention and each FFN, and half the cross-entropy."""

    def loss(rows: list[int]) -> Tensor:
        shown, mine = teacher.read(rows), _run(model, base, setup, rows)
        pairs = list(zip(mine.states, shown.states, strict=True))
        return sum((mse_loss(*pair) for pair in pairs), start=CROSS_ENTROPY * len(pairs) * mine.loss) / len(pairs)

    return loss


def drawn_to_answers(model: nn.Module, base: LlavaForConditionalGeneration, setup: Setup, teacher: Teacher) -> Loss:
    """LIVE's loss: KL divergence of the answers' distributions from the teacher's, and half the cross-entropy."""

    def loss(rows: list[int]) -> Tensor:
        shown, mine = teacher.read(rows), _run(model, base, setup, rows)
        told, said = (run.logits.log_softmax(dim=-1) for run in (shown, mine))
        return kl_div(said, told, log_target=True, reduction="batchmean") + CROSS_ENTROPY * mine.loss

    return loss


def _run(
    model: nn.Module,
    base: LlavaForConditionalGeneration,
    setup: Setup,
    rows: list[int],
    shown: list[list[Row]] | None = None,
) -> Run:
    """A forward pass of the model, which is the base or is wrapped around it."""
    split = setup.splits["train"]
    batch = collate(setup.splits, [("train", row) for row in rows], shown)
    with recorded_states(base) as recorded:
        output = model(**batch)
    answered = batch["labels"] != IGNORED
    lengths = torch.tensor([len(split.prompts[row]) + len(split.answers[row]) for row in rows])
    from_end = batch["attention_mask"].flip(1).cumsum(dim=1).flip(1)  # 1 at the last token of a row, then 2, 3, ...
    own = (from_end <= lengths[:, None]) & batch["attention_mask"].bool()  # of the query and its answer
    before = answered.roll(-1, dims=1)  # the logits there are of an answer's token
    return Run(output.loss, output.logits[before], [states[own] for states in recorded])


@contextmanager
def recorded_states(base: LlavaForConditionalGeneration) -> Iterator[list[Tensor]]:
    """The residual stream after each attention and after each FFN, (B, T, D), in this order."""
    states: list[Tensor] = []
    handles = []
    for layer in base.model.language_model.layers:
        attended = layer.post_attention_layernorm  # its input is the stream after the attention
        handles.append(attended.register_forward_pre_hook(lambda _, args: states.append(args[0])))
        handles.append(layer.register_forward_hook(lambda _, args, output: states.append(output)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
