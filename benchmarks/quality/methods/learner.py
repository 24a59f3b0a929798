"""What a method is given, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from ..encoding import Split, collate
from ..training import batches, fit

Loss = Callable[[list[int]], Tensor]  # of these training samples


@dataclass(frozen=True)
class Setup:
    """Everything that is the same for every method of a run, and the rate, which is the method's own."""

    task: str
    splits: dict[str, Split]
    samples: list[int]  # rows of the training split
    seed: int
    steps: int
    rate: float


@dataclass(frozen=True)
class Fitted:
    model: nn.Module  # generates
    shots: int = 0  # demonstrations it wants in the prompt
    parameters: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Learner:
    """A frozen base with something to train, and what it is trained by."""

    model: nn.Module
    groups: list[dict[str, Any]]
    loss: Loss


Attach = Callable[[LlavaForConditionalGeneration, Setup], Learner]


@dataclass(frozen=True)
class Method:
    title: str
    fit: Callable[[LlavaForConditionalGeneration, Setup], Fitted]
    rates: tuple[float, ...] = ()  # as many for each method that is trained, a factor of about 3 apart
    attach: Attach | None = None  # of a method that is trained


def trained(title: str, rates: tuple[float, ...], attach: Attach) -> Method:
    def fit_learner(base: LlavaForConditionalGeneration, setup: Setup) -> Fitted:
        learner = attach(base, setup)
        data = batches(setup.samples, setup.steps, setup.seed)
        seconds = fit(learner.model, learner.loss, learner.groups, data, setup.steps)
        return Fitted(learner.model, parameters=number(learner), seconds=seconds)

    return Method(title, fit_learner, rates, attach)


def number(learner: Learner) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for group in learner.groups for parameter in group["params"])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def cross_entropy(model: nn.Module, setup: Setup) -> Loss:
    """Of the answer and the end token, given picture and question."""

    def loss(rows: list[int]) -> Tensor:
        value: Tensor = model(**collate(setup.splits, [("train", row) for row in rows])).loss
        return value

    return loss
