"""Optimizers for pairs that are products A B, whose groups list the factors by turns: A, B, A, B, ..."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

MOMENTUM = 0.95
RMS = 0.2  # of an update at rate 1: about that of AdamW, so that both take the same rates
RIDGE = 1e-3  # of the mean of a factor's squared singular values


class Preconditioned(AdamW):
    """AdamW of gradients that are free of how a product is factorised (arXiv 2402.02347).

    For A (n, r), B (r, d) of each head, ``dA (B B^T)^-1`` and ``(A^T A)^-1 dB`` take the places of dA and dB: without
    Adam's division, A B would then move alike for A G and G^-1 B with any invertible G, to first order.
    """

    @torch.no_grad()
    def step(self, *args: Any) -> None:  # type: ignore[override]
        for first, second in _factors(self):
            assert first.grad is not None and second.grad is not None
            left, right = _gram(first.mT), _gram(second)  # (..., r, r)
            # Into the same memory: a solution lies column by column, which AdamW, if fused, would read row by row.
            first.grad.copy_(torch.linalg.solve(right, first.grad, left=False))
            second.grad.copy_(torch.linalg.solve(left, second.grad))
        super().step(*args)


class MuonOfRows(AdamW):
    """Muon for the factors B, one matrix (r, d) of each head; AdamW for the rest.

    An update is the momentum's nearest matrix of orthonormal rows, from its singular value decomposition, as these
    matrices are small.  (torch's own Muon takes parameters of two dimensions alone.)
    """

    @torch.no_grad()
    def step(self, *args: Any) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for second in group["params"][1::2]:
                momentum = self.state[second].setdefault("momentum", torch.zeros_like(second))
                momentum.lerp_(second.grad, 1 - MOMENTUM)
                left, _, right = torch.linalg.svd(second.grad.lerp(momentum, MOMENTUM), full_matrices=False)
                second.mul_(1 - group["lr"] * group["weight_decay"])
                second.sub_(left @ right, alpha=group["lr"] * RMS * math.sqrt(max(second.shape[-2:])))
                second.grad = None  # it is done
        super().step(*args)


def _factors(optimizer: AdamW) -> Iterator[tuple[Tensor, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["params"][::2], group["params"][1::2], strict=True)


def _gram(rows: Tensor) -> Tensor:
    """(..., r, r), X X^T of X (..., r, d), with something on its diagonal so that it has an inverse."""
    gram = rows @ rows.mT
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    return gram + RIDGE * mean * torch.eye(gram.shape[-1], device=gram.device)
