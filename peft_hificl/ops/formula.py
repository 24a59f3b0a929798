"""The maths of HiFICL, as pure functions on tensors.

In-context demonstrations add keys and values to every attention head.  HiFICL (arXiv 2603.12760) learns those ``n``
*virtual key-value pairs* per head instead.  With ``s(k) = scaling * q.k`` the score of a key,

    Z_SA = sum over visible context keys exp s(k)          Z_D = sum over virtual keys exp s(k_D)
    alpha  = Z_SA / (Z_SA + Z_D)                           the self-attention weight, one per (batch, head, query)
    beta_i = exp s(k_D,i) / (Z_SA + Z_D)                   one weight per virtual pair
    out    = alpha * SA(q, K, V) + sum_i beta_i V_D,i

which is softmax attention over ``[K_D ; K]``, ``[V_D ; V]`` with the virtual columns always visible; with
`VirtualPairs.skip_first_token`, visible to every query but those that see a single key of the context.

Letters used for shapes: B batch, H query heads, G key/value heads (H is a multiple of G), T queries, S context keys,
n virtual pairs, d head dimension of queries and keys, e head dimension of values.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN = -1e4  # what an additive mask adds, at most, to the score of a key that no query shall see
OF_THE_SOFTMAX = ("scale_self_attention", "skip_first_token")  # in which all pairs of one softmax must agree


class VirtualPairs(NamedTuple):
    """The virtual key-value pairs that one attention call sees.

    Every leading dimension may be 1 or full size: a batch dimension of B gives each row its own pairs, a head
    dimension of G instead of H shares each pair among the query heads of one key/value head.

    Attributes:
        keys: ``(B or 1, H or G, n, d)``.
        values: ``(B or 1, H or G, n, e)``.
        log_weights: ``(B or 1, H or 1, n)``, added to the scores of the virtual keys, so that a pair counts
            ``exp(log_weight)`` times; ``-inf`` removes it.  None: every pair counts once.
        scale_self_attention: False sets ``alpha = 1`` and leaves ``beta`` as it is (the paper's ablation
            "w/o SA scaling").
        skip_first_token: True hides the pairs from a query that sees a single key of the context (`sees_one_key`): the
            first token of a row or of a packed document, whose self-attention would otherwise lose most to them.
    """

    keys: Tensor
    values: Tensor
    log_weights: Tensor | None = None
    scale_self_attention: bool = True
    skip_first_token: bool = False


class Scoring(NamedTuple):
    """How an attention call turns queries and keys into scores, and scores into weights.

    Attributes:
        scaling: factor of every score.
        mask: broadcastable to ``(B, H, T, S)``; boolean (True: visible) or added to the scores of the context.
        is_causal: query t sees the context keys 0..t only, beside what the mask says.
        bias: broadcastable to ``(B, H, T, S)``, added to the context scores (T5's position bias).
        softcap: every score s becomes ``softcap * tanh(s / softcap)``, those of virtual keys too.
        sinks: broadcastable to ``(H,)``; one more score per head whose value is zero (gpt-oss).  It is part of the
            self-attention: ``Z_SA`` includes it.
        dropout: probability with which a weight, virtual or not, is dropped.
    """

    scaling: float
    mask: Tensor | None = None
    is_causal: bool = False
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0


def concatenate_pairs(pairs: list[VirtualPairs]) -> VirtualPairs:
    """The union of several sets of virtual pairs, which then share one softmax.

    If some sets have pairs of H heads and others of G, those of G are repeated.

    Raises:
        ValueError: if the sets disagree about ``scale_self_attention`` or ``skip_first_token``, which belong to the
            whole softmax.
    """
    if len(pairs) == 1:
        return pairs[0]
    differing = disagreement({name: [getattr(p, name) for p in pairs] for name in OF_THE_SOFTMAX})
    if differing:
        raise ValueError(
            f"These sets of virtual pairs share one softmax but disagree about {differing}: use sets that agree."
        )
    log_weights = None
    if any(p.log_weights is not None for p in pairs):
        weights = [_log_weights(p) for p in pairs]
        batch, heads = (max(w.shape[i] for w in weights) for i in (0, 1))
        log_weights = torch.cat([w.expand(batch, heads, -1) for w in weights], dim=-1)
    most = max(p.keys.shape[1] for p in pairs)
    pairs = [_repeated(p, most) for p in pairs]
    return VirtualPairs(
        keys=_cat_pairs([p.keys for p in pairs]),
        values=_cat_pairs([p.values for p in pairs]),
        log_weights=log_weights,
        scale_self_attention=pairs[0].scale_self_attention,
        skip_first_token=pairs[0].skip_first_token,
    )


def weighted(pairs: VirtualPairs, log_weight: float | Tensor) -> VirtualPairs:
    """Virtual pairs that count ``exp(log_weight)`` times as often."""
    return pairs._replace(log_weights=_log_weights(pairs) + log_weight)


def select_rows(choices: list[VirtualPairs | None], rows: list[int]) -> VirtualPairs | None:
    """Virtual pairs that differ per batch row: row b gets ``choices[rows[b]]`` (None: no pairs at all).

    Shorter sets are padded with pairs of log-weight ``-inf``, which no query can see.  If some sets have pairs of H
    heads and others of G, those of G are repeated.

    Args:
        choices: sets with a batch dimension of 1, or None.
        rows: one index into ``choices`` per row.

    Raises:
        ValueError: if the sets disagree about ``scale_self_attention`` or ``skip_first_token``.
    """
    present = [c for c in choices if c is not None]
    if not present:
        return None
    differing = disagreement({name: [getattr(c, name) for c in present] for name in OF_THE_SOFTMAX})
    if differing:
        raise ValueError(f"The adapters of one batch disagree about {differing}: run them in batches of their own.")
    most = max(c.keys.shape[1] for c in present)
    present = [_repeated(c, most) for c in present]
    n = max(c.keys.shape[2] for c in present)
    heads = max(_log_weights(c).shape[1] for c in present)

    def padded(choice: VirtualPairs | None) -> tuple[Tensor, Tensor, Tensor]:
        like, real = (present[0], 0) if choice is None else (_repeated(choice, most), choice.keys.shape[2])
        keys = torch.nn.functional.pad(like.keys[:, :, :real], (0, 0, 0, n - real))
        values = torch.nn.functional.pad(like.values[:, :, :real], (0, 0, 0, n - real))
        log_weights = torch.nn.functional.pad(
            _log_weights(like)[..., :real].expand(1, heads, -1), (0, n - real), value=float("-inf")
        )
        return keys, values, log_weights

    keys, values, log_weights = (torch.cat(parts)[rows] for parts in zip(*map(padded, choices), strict=True))
    return VirtualPairs(keys, values, log_weights, present[0].scale_self_attention, present[0].skip_first_token)


def virtual_attention(
    query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Attention over the context and the virtual pairs: ``alpha * SA(q, K, V) + sum_i beta_i V_D,i``.

    Scores, softmax and mixing are done in at least float32, under autocast too.  Key/value heads are never expanded.

    Args:
        query: ``(B, H, T, d)``, after rotary embedding and any norm.
        key: ``(B, G, S, d)``.
        value: ``(B, G, S, e)``.
        pairs: the virtual pairs; see :class:`VirtualPairs`.
        scoring: scaling, mask and the other options; see :class:`Scoring`.

    Returns:
        The output ``(B, H, T, e)`` in the dtype of ``value``, and the weights of the context values ``(B, H, T, S)``
        (``alpha`` times the self-attention's own), with dropout applied.

    Source: arXiv 2603.12760, equations of section 3; exact, no approximation.

    Example:

        >>> import torch
        >>> from peft_hificl import Scoring, VirtualPairs, virtual_attention
        >>> q, k, v = torch.randn(3, 1, 4, 5, 8)  # B=1, H=G=4, T=S=5, d=e=8
        >>> pairs = VirtualPairs(keys=torch.randn(1, 4, 2, 8), values=torch.zeros(1, 4, 2, 8))
        >>> output, weights = virtual_attention(q, k, v, pairs, Scoring(scaling=8**-0.5))
        >>> output.shape, bool((weights.sum(-1) < 1).all())
        (torch.Size([1, 4, 5, 8]), True)
    """
    scaling, mask, is_causal, bias, softcap, sinks, dropout = scoring
    output_dtype = value.dtype
    dtype = torch.promote_types(torch.promote_types(query.dtype, pairs.keys.dtype), torch.float32)
    query, key, value = query.to(dtype) * scaling, key.to(dtype), value.to(dtype)

    # Not .mT: the TorchScript exporter of ONNX does not know it.
    context = grouped_matmul(query, key.transpose(-1, -2))  # (B, H, T, S)
    virtual = grouped_matmul(query, pairs.keys.to(dtype).transpose(-1, -2))  # (B, H, T, n)
    if softcap is not None:
        context, virtual = (softcap * torch.tanh(s / softcap) for s in (context, virtual))
    if bias is not None:
        context = context + bias.to(dtype)
    # The finite minimum instead of -inf, as a row that sees nothing would become NaN when alpha = 1.
    minimum = torch.finfo(dtype).min
    if is_causal:
        visible = torch.ones(context.shape[-2:], dtype=torch.bool, device=context.device).tril()
        context = context.masked_fill(~visible, minimum)
    if mask is not None:
        if mask.dtype == torch.bool:
            context = context.masked_fill(~mask, minimum)
        else:
            context = context + mask.to(dtype).clamp_min(minimum)
    if pairs.log_weights is not None:
        virtual = virtual + pairs.log_weights.to(dtype)[:, :, None]
    first = sees_one_key(query.shape[2], key.shape[2], scoring, query.device) if pairs.skip_first_token else None
    if first is not None:
        virtual = virtual.masked_fill(first[..., None], minimum)
    self_attention = [context]
    if sinks is not None:
        self_attention.append(sinks.to(dtype).reshape(1, -1, 1, 1).expand(*context.shape[:-1], 1))

    size = context.shape[-1]
    weights = torch.cat([*self_attention, virtual], dim=-1).softmax(dim=-1)
    context_weights, beta = weights[..., :size], weights[..., -virtual.shape[-1] :]
    if not pairs.scale_self_attention:
        context_weights = torch.cat(self_attention, dim=-1).softmax(dim=-1)[..., :size]
    if dropout:
        context_weights = torch.nn.functional.dropout(context_weights, dropout)
        beta = torch.nn.functional.dropout(beta, dropout)

    output = grouped_matmul(context_weights, value) + grouped_matmul(beta, pairs.values.to(dtype))  # (B, H, T, e)
    return output.to(output_dtype), context_weights


def sees_one_key(length: int, size: int, scoring: Scoring, device: torch.device) -> Tensor | None:
    """Which of T = `length` queries see a single one of S = `size` keys: broadcastable to (B, H, T); None: none does.

    Keys of an additive mask below `HIDDEN` count as hidden.
    """
    mask = scoring.mask
    if mask is None:
        if scoring.is_causal:
            return torch.arange(length, device=device) == 0
        return torch.ones(1, dtype=torch.bool, device=device) if size == 1 else None
    visible = mask if mask.dtype == torch.bool else mask > HIDDEN
    visible = visible.expand(*visible.shape[:-1], size)
    if scoring.is_causal:
        visible = visible & torch.ones(length, size, dtype=torch.bool, device=device).tril()
    return visible.sum(-1) == 1


def grouped_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``(B, H, T, x)``, ``(B or 1, G, x, y)`` -> ``(B, H, T, y)``; head h of left meets head h // (H / G) of right."""
    batch, heads, length, inner = left.shape
    if torch.compiler.is_exporting() and right.shape[1] != heads:
        # With a symbolic T, torch.export cannot prove that the reshape below is valid.
        right = right.repeat_interleave(heads // right.shape[1], dim=1)
    groups, size = right.shape[1], right.shape[3]
    # Stack the heads of a group along T, so that `right` need not be repeated for them.
    folded = left.reshape(batch, groups, heads // groups * length, inner)
    with without_autocast(left.device):
        return (folded @ right).reshape(batch, heads, length, size)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off, if it is on, as it would compute a float32 product in half precision."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def disagreement(values: dict[str, list[bool]]) -> str | None:
    """The first name whose values are not all equal."""
    return next((name for name, found in values.items() if len(set(found)) > 1), None)


def _log_weights(pairs: VirtualPairs) -> Tensor:
    if pairs.log_weights is not None:
        return pairs.log_weights
    return pairs.keys.new_zeros(1, 1, pairs.keys.shape[2])


def _repeated(pairs: VirtualPairs, heads: int) -> VirtualPairs:
    """The pairs with those of a key/value head repeated for each of its query heads."""
    times = heads // pairs.keys.shape[1]
    if times == 1:
        return pairs
    keys, values = (tensor.repeat_interleave(times, dim=1) for tensor in (pairs.keys, pairs.values))
    return pairs._replace(keys=keys, values=values)


def _cat_pairs(tensors: list[Tensor]) -> Tensor:
    batch = max(t.shape[0] for t in tensors)
    return torch.cat([t.expand(batch, -1, -1, -1) for t in tensors], dim=2)
