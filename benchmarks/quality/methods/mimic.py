"""MimIC (arXiv 2504.08851): a learnable shift per head, whose size depends on the query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.masking_utils import eager_mask

from .learner import Learner, Setup
from .teacher import Teacher, drawn_to_states


class Shift(nn.Module):
    """Per head, ``out = SA(q, K, V) + mu v`` with ``mu = Z1 / (Z1 + Z2)``, ``log Z1 = w . q + b``.

    ``Z2`` is the head's own softmax denominator.

    Parameters: v, w (H, d), b (H).  v starts near zero, so the model starts near the base.
    """

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.v = nn.Parameter(1e-3 * torch.randn(heads, dim))
        self.w = nn.Parameter(dim**-0.5 * torch.randn(heads, dim))
        self.b = nn.Parameter(torch.zeros(heads))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """(B, H, T, d), (B, H, S, d), (B, H, S, d) -> (B, H, T, d)"""
        scores = query @ key.mT * scaling  # (B, H, T, S)
        if mask is not None:
            scores = scores + mask
        log_z2 = scores.logsumexp(dim=-1, keepdim=True)  # (B, H, T, 1)
        log_z1 = (query * self.w[:, None]).sum(dim=-1, keepdim=True) + self.b[:, None, None]
        return (scores - log_z2).exp() @ value + torch.sigmoid(log_z1 - log_z2) * self.v[:, None]


def mimic_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    output = module.mimic.attend(query, key, value, attention_mask, kwargs["scaling"])
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("mimic", mimic_attention_forward)
AttentionMaskInterface.register("mimic", eager_mask)  # without one, no mask would reach the function


def attach(base: LlavaForConditionalGeneration, setup: Setup) -> Learner:
    teacher = Teacher(base, setup)
    base.requires_grad_(False)
    base.set_attn_implementation({"text_config": "mimic"})
    shifts = []
    for layer in base.model.language_model.layers:
        layer.self_attn.mimic = Shift(base.config.text_config.num_attention_heads, layer.self_attn.head_dim)
        shifts += layer.self_attn.mimic.parameters()
    groups: list[dict[str, Any]] = [{"params": shifts, "lr": setup.rate}]
    return Learner(base, groups, drawn_to_states(base, base, setup, teacher))
