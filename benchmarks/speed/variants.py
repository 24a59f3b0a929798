"""Four ways to compute attention with virtual pairs, or without, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from peft_hificl import Scoring, VirtualPairs
from peft_hificl.ops import merged

from .presets import HIFICL, N, Preset, dtype_for

PLAIN, CONCATENATION, SECOND_SCORES = "plain SDPA", "concatenation", "second score matrix"


@dataclass(frozen=True)
class Inputs:
    """What one attention call is given; `mask` is None where the causal flag says it all."""

    query: Tensor
    key: Tensor
    value: Tensor
    pairs: VirtualPairs
    mask: Tensor | None
    visible: Tensor  # the same as a boolean mask (T, S), whichever way the variant is told
    visible_and_virtual: Tensor  # (T, n + S): the virtual columns are always visible

    @property
    def scaling(self) -> float:
        return self.query.shape[-1] ** -0.5

    @property
    def repeated(self) -> tuple[Tensor, Tensor]:
        """Keys and values with one head per query head."""
        groups = self.query.shape[1] // self.key.shape[1]
        return self.key.repeat_interleave(groups, 1), self.value.repeat_interleave(groups, 1)


def plain_sdpa(x: Inputs) -> Tensor:
    if x.mask is None:
        return sdpa(x.query, x.key, x.value, is_causal=True, enable_gqa=x.key.shape[1] != x.query.shape[1])
    return sdpa(x.query, *x.repeated, attn_mask=x.mask)


def hificl(x: Inputs) -> Tensor:
    return merged.attention(x.query, x.key, x.value, x.pairs, Scoring(x.scaling, mask=x.mask, is_causal=x.mask is None))


def concatenation(x: Inputs) -> Tensor:
    """Softmax attention over ``[K_D ; K]``: virtual columns force a mask, pairs per query head force repeated keys."""
    rows = x.query.shape[0]
    key, value = x.repeated
    key = torch.cat([x.pairs.keys.expand(rows, -1, -1, -1), key], dim=2)
    value = torch.cat([x.pairs.values.expand(rows, -1, -1, -1), value], dim=2)
    return sdpa(x.query, key, value, attn_mask=x.visible_and_virtual)


def second_scores(x: Inputs) -> Tensor:
    """The formula term by term: SA from the kernel, and Z_SA from all the scores formed once more.

    This is what the authors' code does, except that it leaves the mask out of Z_SA.
    """
    key, value = x.repeated
    attended = sdpa(x.query, key, value, attn_mask=x.mask, is_causal=x.mask is None)
    scores = (x.query @ key.mT * x.scaling).masked_fill(~x.visible, float("-inf"))
    virtual = x.query @ x.pairs.keys.mT * x.scaling  # (B, H, T, n)
    log_z_context = scores.logsumexp(dim=-1, keepdim=True)
    log_z = torch.logaddexp(log_z_context, virtual.logsumexp(dim=-1, keepdim=True))
    alpha, beta = (log_z_context - log_z).exp(), (virtual - log_z).exp()
    return alpha * attended + beta @ x.pairs.values


VARIANTS: dict[str, Callable[[Inputs], Tensor]] = {
    PLAIN: plain_sdpa,
    HIFICL: hificl,
    CONCATENATION: concatenation,
    SECOND_SCORES: second_scores,
}


def make_inputs(preset: Preset, kv_heads: int, length: int, padded: bool, device: torch.device) -> Inputs:
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype_for(device), requires_grad=True)

    dim = preset.head_dim
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if padded:
        visible[:, : length // 4] = False
        visible.fill_diagonal_(True)
    return Inputs(
        query=leaf(1, preset.heads, length, dim),
        key=leaf(1, kv_heads, length, dim),
        value=leaf(1, kv_heads, length, dim),
        pairs=VirtualPairs(leaf(1, preset.heads, N, dim), leaf(1, preset.heads, N, dim)),
        mask=visible[None, None] if padded else None,
        visible=visible,
        visible_and_virtual=torch.nn.functional.pad(visible, (N, 0), value=True),
    )
