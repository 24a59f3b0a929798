"""Task Vector (arXiv 2310.15916): the state of a k-shot prompt's last token, put in the place of a query's."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from ..encoding import IGNORED, collate
from ..scoring import measure
from .learner import Fitted, Setup
from .teacher import SHOTS, draw_demonstrations, recorded_states

DRAWS = 16  # prompts whose states are averaged, each with demonstrations and a dummy query of its own


class Patch:
    """Exchanges what a layer makes of the last token of a prompt; tokens that are decoded one by one pass."""

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector

    def __call__(self, layer: nn.Module, args: object, output: Tensor) -> Tensor:
        if output.shape[1] == 1:
            return output
        return torch.cat([output[:, :-1], self.vector.expand(len(output), 1, -1)], dim=1)


@torch.no_grad()
def vectors(base: LlavaForConditionalGeneration, setup: Setup) -> list[Tensor]:
    """The mean state of the last prompt token after each layer, (D)."""
    rng = np.random.default_rng([setup.seed, DRAWS])
    dummies = rng.choice(setup.samples, DRAWS).tolist()
    shown = draw_demonstrations(setup.samples, dummies, SHOTS, rng)
    inputs = collate(setup.splits, [("train", row) for row in dummies], shown)
    first = (inputs.pop("labels") != IGNORED).long().argmax(dim=1)  # of the answer
    with recorded_states(base) as states:
        base(**inputs)
    return [after[torch.arange(DRAWS), first - 1].mean(dim=0) for after in states[1::2]]


def fit(base: LlavaForConditionalGeneration, setup: Setup) -> Fitted:
    """Patch the layer that is best on validation."""
    start = time.perf_counter()
    base.requires_grad_(False)
    layers, made, scores = base.model.language_model.layers, vectors(base, setup), []
    for layer, vector in zip(layers, made, strict=True):
        handle = layer.register_forward_hook(Patch(vector))
        scores.append(measure(base, setup.task, setup.splits, "validation")["score"])
        handle.remove()
    best = int(np.argmax(scores))
    layers[best].register_forward_hook(Patch(made[best]))
    return Fitted(base, seconds=time.perf_counter() - start)
