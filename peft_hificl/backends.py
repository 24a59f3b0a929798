"""The attention implementations of transformers, each with virtual pairs mixed in.

The keys of `BACKENDS` are the supported values of ``attn_implementation``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_mask
from transformers.integrations.flex_attention import compile_friendly_flex_attention, flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .ops import merged
from .ops.formula import Scoring, VirtualPairs, sees_one_key, virtual_attention

_FLEX_GIVES_LSE = {"cuda"}  # on a CPU, compiled flex_attention cannot return it, and has no backward


class Backend(NamedTuple):
    """One attention implementation, with and without virtual pairs.

    Attributes:
        attend: the attention with virtual pairs.  It takes the attention module, query ``(B, H, T, d)``, key
            ``(B, G, S, d)``, value ``(B, G, S, e)``, the pairs and the scoring, and returns the output
            ``(B, H, T, e)`` and either the weights of the context ``(B, H, T, S)`` or None.  The scoring holds what the
            module passed: `is_causal` is the module's flag, and `mask` has the form that transformers builds for this
            implementation.
        own: transformers' function without virtual pairs; None if each modelling file has its own.
    """

    attend: Callable[[nn.Module, Tensor, Tensor, Tensor, VirtualPairs, Scoring], tuple[Tensor, Tensor | None]]
    own: Callable[..., tuple[Tensor, Tensor | None]] | None


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    # transformers' eager functions ignore is_causal: causality is in the mask.
    output, weights = virtual_attention(query, key, value, pairs, scoring._replace(is_causal=False))
    return output, weights.to(query.dtype)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    bias, size = scoring.bias, query.shape[2]
    is_causal = scoring.is_causal and scoring.mask is None and size > 1
    if is_causal:
        # As in transformers' sdpa: without a mask, query t sees the keys 0..t, so only the first T keys count.
        key, value, bias = key[:, :, :size], value[:, :, :size], None if bias is None else bias[..., :size]
    return merged.attention(query, key, value, pairs, scoring._replace(is_causal=is_causal, bias=bias)), None


def _flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    mask: Any = scoring.mask
    if isinstance(mask, Tensor):
        mask = mask[..., : key.shape[2]]
    elif query.device.type in _FLEX_GIVES_LSE and scoring.bias is None and not merged.needs_formula(scoring):
        return _flex_on_kernel(module, query, key, value, pairs, scoring), None
    elif mask is not None:
        mask = dense(mask, query, key)
    return merged.attention(query, key, value, pairs, scoring._replace(mask=mask, is_causal=False)), None


def dense(mask: BlockMask, query: Tensor, key: Tensor) -> Tensor:
    """A BlockMask as a boolean mask (B, H, T, S)."""
    batch, heads = mask.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, query.shape[2], key.shape[2], device=query.device)


def _flex_on_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring
) -> Tensor:
    """Run flex_attention's own kernel on the context, and add the pairs by means of its log-sum-exp."""
    block_mask: Any = scoring.mask
    first = None
    if pairs.skip_first_token:
        mask = None if block_mask is None else dense(block_mask, query, key)
        first = sees_one_key(query.shape[2], key.shape[2], scoring._replace(mask=mask, is_causal=False), query.device)
    query, key, value = merged.autocast(query, key, value)  # the kernel gives wrong numbers if the cast is left to it
    heads = query.shape[1]
    grouped = heads & (heads - 1) == 0  # the kernel takes grouped heads only if their number is a power of 2
    if not grouped:
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    output, auxiliary = compile_friendly_flex_attention(
        query, key, value, training=module.training, block_mask=block_mask, enable_gqa=grouped,
        scale=scoring.scaling, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return merged.add_pairs(output, auxiliary.lse, query, pairs, scoring, first)


BACKENDS = {
    "eager": Backend(_eager, own=None),
    "sdpa": Backend(_sdpa, own=sdpa_attention_forward),
    "flex_attention": Backend(_flex, own=flex_attention_forward),
}
