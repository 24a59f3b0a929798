"""Choosing a few weighted keys that do to queries what many keys do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SWEEPS = 50  # of coordinate descent, over weights that begin near their optimum
_TINY = torch.finfo(torch.float64).tiny
_LEAST = 1e-4  # a weight whose logarithm can still be trained


class Match(NamedTuple):
    """Weighted keys in the place of all keys of a context.

    Attributes:
        places: ``(P, n)``, of the chosen keys, in the order in which they were chosen.
        log_weights: ``(P, n)``.
        error: ``(P,)``, what is left of the target, relative to its norm.
    """

    places: Tensor
    log_weights: Tensor
    error: Tensor


@torch.no_grad()
def match_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, chosen: int | Tensor, first: int = 0
) -> Match:
    """Choose n keys and weights whose share of a context's attention comes nearest to that of all its keys.

    With ``p_qj`` the attention of query q to key j (a softmax over all T keys), a set C of keys with weights w adds
    ``sum_{j in C} w_j p_qj [1 ; v_j]`` to denominator and numerator of the attention of q, where the context adds
    ``sum_j p_qj [1 ; v_j]``.  The squared difference, summed over the queries, is made small by orthogonal matching
    pursuit: the key that is most in line with what is left joins C, and all weights are fitted again, not negative.
    The denominator is multiplied by the root mean square of the outputs' norms, so that both errors are errors of the
    output.  With ``n = T`` nothing is left, and all weights are 1.

    Args:
        query: ``(P, m, d)``, queries that stand for those to come.
        key: ``(P, T, d)``.
        value: ``(P, T, e)``.
        scaling: factor of every score.
        chosen: how many keys to choose, n; or the places ``(n,)`` of keys that have been chosen, whose weights stay 1.
        first: keys before this place are neither chosen nor part of what is matched, but take part in the softmax.

    Source: the idea is that of attention matching (arXiv 2602.16284).

    Example:

        >>> import torch
        >>> key = torch.tensor([[[4.0, 0.0], [0.0, 4.0], [0.0, 4.0]]])  # the last two are one key, twice
        >>> found = match_attention(torch.eye(2)[None], key, key, scaling=1.0, chosen=2)
        >>> found.log_weights.exp().round(decimals=3).tolist(), bool(found.error < 1e-3)
        ([[2.0, 1.0]], True)
    """
    query, key, value = query.double(), key.double(), value[:, first:].double()
    share = (query @ key.mT * scaling).softmax(-1)[:, :, first:]  # (P, m, T - first)
    output = share @ value / share.sum(-1, keepdim=True).clamp_min(_TINY)  # (P, m, e)
    unit = output.square().sum(-1).mean(1).sqrt()[:, None, None].expand(-1, value.shape[1], -1)
    what = torch.cat([unit, value], dim=-1)  # (P, T - first, 1 + e)
    target = share @ what  # (P, m, 1 + e)
    aligned = ((share.mT @ target) * what).sum(-1)  # of each key with the target, (P, T - first)
    size = target.square().sum((1, 2))
    norms = (share.square().sum(1) * what.square().sum(-1)).sqrt().clamp_min(_TINY)
    heads = torch.arange(len(key), device=key.device)

    def products(place: Tensor) -> Tensor:
        """Inner products of the chosen key of each head, (P,), with every key: (P, T - first)."""
        return (share.mT @ share[heads, :, place, None])[..., 0] * (what @ what[heads, place, :, None])[..., 0]

    found: list[Tensor] = []
    columns: list[Tensor] = []  # inner products of the chosen keys with all
    weights = aligned.new_zeros(len(key), 0)
    for step in range(chosen if isinstance(chosen, int) else len(chosen)):
        if isinstance(chosen, int):
            left = aligned.clone()
            if columns:
                left -= torch.einsum("pnt,pn->pt", torch.stack(columns, 1), weights)
                left.scatter_(1, torch.stack(found, 1), -torch.inf)
            found.append((left / norms).argmax(-1))
        else:
            found.append((chosen[step] - first).expand(len(key)))
        columns.append(products(found[-1]))
        weights = torch.cat([weights, weights.new_ones(len(key), 1)], dim=1)
        places = torch.stack(found, 1)  # (P, step + 1)
        gram = torch.stack(columns, 1).gather(2, places[:, None].expand(-1, step + 1, -1))
        if isinstance(chosen, int):
            weights = _not_negative(gram, aligned.gather(1, places), weights)
    rest = (
        size - 2 * (weights * aligned.gather(1, places)).sum(1) + torch.einsum("pn,pnk,pk->p", weights, gram, weights)
    )
    return Match(places + first, weights.clamp_min(_LEAST).log(), (rest / size.clamp_min(_TINY)).clamp_min(0).sqrt())


def _not_negative(gram: Tensor, aligned: Tensor, weights: Tensor) -> Tensor:
    """The w >= 0 that minimises ``w G w - 2 a w``, by coordinate descent from `weights`; (P, k, k), (P, k), (P, k)."""
    weights = weights.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2).clamp_min(_TINY)
    for _ in range(_SWEEPS):
        for place in range(weights.shape[1]):
            slope = aligned[:, place] - (gram[:, place] * weights).sum(1)
            weights[:, place] = (weights[:, place] + slope / diagonal[:, place]).clamp_min(0)
    return weights
