"""Few virtual pairs in the place of many, and how much of the attention output that changes."""

from __future__ import annotations

import torch
from torch import Tensor

from .formula import VirtualPairs, grouped_matmul


@torch.no_grad()
def condense(pairs: VirtualPairs, n: int) -> VirtualPairs:
    """Merge virtual pairs into n weighted ones.

    A group of pairs with weights ``w_i = exp(log_weight_i)`` becomes one pair:

        w = sum_i w_i        k = sum_i w_i k_i / w        v = sum_i w_i v_i / w

    For a query of zeros, whose scores are equal, this changes neither ``Z_D`` nor ``sum_i beta_i V_D,i``; what it
    changes grows with the spread of the scores within a group.  Pairs that are equal are merged without any change.
    Groups are formed in each head by Ward's method: two groups at a time, those that are nearest in keys and values,
    each measured in units of its spread over all pairs, and weighted by ``w w' / (w + w')``.

    Args:
        pairs: ``(1, H, N, d)`` and ``(1, H, N, e)``, with or without log-weights.
        n: how many are wanted; the pairs themselves are returned if there are no more than that.

    Returns:
        Keys ``(1, H, n, d)``, values ``(1, H, n, e)`` in the dtypes of `pairs`, and log-weights ``(1, H, n)``.

    Raises:
        ValueError: n below 1, or pairs that differ between the rows of a batch.

    Example:

        >>> import torch
        >>> from peft_hificl import VirtualPairs
        >>> from peft_hificl.ops.condense import condense
        >>> key = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[None, None]  # (1, 1, 3, 2)
        >>> few = condense(VirtualPairs(keys=key, values=key), n=2)
        >>> few.keys.tolist(), few.log_weights.exp().tolist()
        ([[[[1.0, 0.0], [0.0, 1.0]]]], [[[2.0, 1.0]]])
    """
    batch, heads, size, dim = pairs.keys.shape
    if n < 1:
        raise ValueError(f"n must be at least 1, found {n}: an adapter has at least one pair per head.")
    if batch != 1:
        raise ValueError(f"These pairs differ between {batch} rows of a batch: condense those of each row.")
    if n >= size:
        return pairs
    dtype = torch.promote_types(pairs.keys.dtype, torch.float32)
    means = torch.cat([pairs.keys[0], pairs.values[0]], dim=-1).to(dtype)  # of the groups, (H, N, d + e)
    logs = means.new_zeros(heads, size) if pairs.log_weights is None else pairs.log_weights[0].to(dtype)
    logs = logs.expand(heads, size).clamp_min(torch.finfo(dtype).min / 4)  # of their weights, (H, N); finite
    total = logs.logsumexp(-1, keepdim=True)
    logs = logs - total
    places = means / _spread(means, logs, dim)  # what distances are measured between
    costs = torch.stack([_costs(places, logs, places[:, i], logs[:, i]) for i in range(size)], dim=1)  # (H, N, N)
    costs.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    head = torch.arange(heads, device=means.device)
    for left in range(size - 1, n - 1, -1):  # groups after this step
        found = costs[:, : left + 1, : left + 1].flatten(1).argmin(1)
        first, second = found // (left + 1), found % (left + 1)
        first, second = torch.minimum(first, second), torch.maximum(first, second)
        share = torch.sigmoid(logs[head, second] - logs[head, first])[:, None]
        for tensor in (means, places):
            tensor[head, first] = torch.lerp(tensor[head, first], tensor[head, second], share)
            tensor[head, second] = tensor[head, left]  # the last group takes the free slot
        logs[head, first] = torch.logaddexp(logs[head, first], logs[head, second])
        logs[head, second] = logs[head, left]
        for slot in (first, second):
            row = _costs(places[:, :left], logs[:, :left], places[head, slot], logs[head, slot])
            costs[head, slot, :left] = row
            costs[head, :left, slot] = row
            costs[head, slot, slot] = torch.inf
    keys, values = means[None, :, :n].split([dim, means.shape[-1] - dim], dim=-1)
    log_weights = (logs + total)[None, :, :n]
    return pairs._replace(keys=keys.to(pairs.keys.dtype), values=values.to(pairs.values.dtype), log_weights=log_weights)


def _spread(means: Tensor, logs: Tensor, dim: int) -> Tensor:
    """The standard deviation of keys and that of values in each head, (H, 1, d + e); 1 where all are equal."""
    weights = logs.exp()[..., None]
    variance = (weights * (means - (weights * means).sum(1, keepdim=True)) ** 2).sum(1, keepdim=True)
    kinds = [part.sum(-1, keepdim=True).expand_as(part) for part in variance.split([dim, means.shape[-1] - dim], -1)]
    spread = torch.cat(kinds, dim=-1).sqrt()
    return spread.where(spread > 0, 1)


def _costs(places: Tensor, logs: Tensor, place: Tensor, log: Tensor) -> Tensor:
    """What it costs to merge each group of a head, (H, m, d + e) and (H, m), with one of them: (H, m)."""
    weights, weight = logs.exp(), log.exp()[:, None]
    harmonic = weights * weight / (weights + weight).clamp_min(torch.finfo(logs.dtype).tiny)
    return harmonic * ((places - place[:, None]) ** 2).sum(-1)


def output_error(pairs: VirtualPairs, reference: VirtualPairs, scaling: float, queries: int = 256) -> float:
    """How far the attention output is off if `pairs` stand in the place of `reference`, relative to what it was.

    For random queries (entries ~ N(0, 1), always the same ones), of which each gives its context as much weight as the
    reference's pairs, ``Z_SA = Z_D``, while the context's values are zero, this is ``|out - out'| / |out|`` with
    ``out = sum_i exp(s_i + w_i) V_D,i / (Z_SA + Z_D)``.  Norms are over all heads and queries.

    Example:

        >>> import torch
        >>> from peft_hificl import VirtualPairs
        >>> pairs = VirtualPairs(keys=torch.randn(1, 4, 2, 8), values=torch.randn(1, 4, 2, 8))
        >>> round(output_error(pairs._replace(values=0.75 * pairs.values), pairs, scaling=8**-0.5), 6)
        0.25
    """
    dim = reference.keys.shape[-1]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, queries, dim, generator=generator, dtype=torch.float64)

    def attended(found: VirtualPairs) -> tuple[Tensor, Tensor]:
        heads = found.keys.shape[1]
        keys, values = (tensor.double().cpu() for tensor in found[:2])
        scores = grouped_matmul(query.expand(1, heads, -1, -1) * scaling, keys.mT)  # (1, H, queries, n)
        if found.log_weights is not None:
            scores = scores + found.log_weights.double().cpu()[:, :, None]
        return scores.softmax(-1) @ values, scores.logsumexp(-1, keepdim=True)

    (output, lse), (wanted, context) = attended(pairs), attended(reference)
    difference = torch.sigmoid(lse - context) * output - wanted / 2
    size = float(wanted.norm()) / 2
    return float(difference.norm()) / size if size else float(difference.norm())
