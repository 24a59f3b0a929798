"""LIVE, the learnable in-context vector (arXiv 2406.13185)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from .learner import Learner, Setup
from .teacher import Teacher, drawn_to_answers

WEIGHT, WEIGHT_RATE = 0.1, 1e-2  # published: the start of a_l, and its rate; the grid is of the vectors' rate


class InContextVectors(nn.Module):
    """After each layer l, ``h' = (h + a_l v_l) |h| / |h + a_l v_l|`` at every token.

    Parameters: ``vectors`` (L, D) from N(0, 0.01), as a start at zero would give ``weights`` (L) no gradient.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(0.01 * torch.randn(layers, width))
        self.weights = nn.Parameter(torch.full((layers,), WEIGHT))

    def shift(self, layer: int, states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        moved = states + self.weights[layer] * self.vectors[layer]
        return moved * (states.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))


def attach(base: LlavaForConditionalGeneration, setup: Setup) -> Learner:
    teacher = Teacher(base, setup)
    base.requires_grad_(False)
    layers = base.model.language_model.layers
    base.live = InContextVectors(len(layers), base.config.text_config.hidden_size)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, args, output, number=number: base.live.shift(number, output))
    groups: list[dict[str, Any]] = [
        {"params": [base.live.vectors], "lr": setup.rate},
        {"params": [base.live.weights], "lr": WEIGHT_RATE},
    ]
    return Learner(base, groups, drawn_to_answers(base, base, setup, teacher))
