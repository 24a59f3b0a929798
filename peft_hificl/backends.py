"""The attention implementations of transformers, each with virtual pairs mixed in.

The keys of `BACKENDS` are the supported values of ``attn_implementation`` that need no other package; `backend_of`
knows flash attention packages, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_mask
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward, get_target_dtype
from transformers.integrations.flex_attention import compile_friendly_flex_attention, flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from .ops import calls, merged
from .ops.formula import Scoring, VirtualPairs, sees_one_key, virtual_attention
from .ops.packages import Package, Packing, package_of, sequences_of_mask, sequences_of_positions, sequences_of_starts

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
        prepare: what that function does first with query, key, value and mask, given these, the module, the name of
            the implementation, the module's flag `is_causal`, and the other keyword arguments of the call; None:
            nothing.
    """

    attend: Callable[[nn.Module, Tensor, Tensor, Tensor, VirtualPairs, Scoring], tuple[Tensor, Tensor | None]]
    own: Callable[..., tuple[Tensor, Tensor | None]] | None
    prepare: Callable[..., tuple[Tensor, Tensor, Tensor, Any]] | None = None


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
    elif query.device.type in _FLEX_GIVES_LSE and scoring.bias is None and not calls.needs_formula(scoring):
        return _flex_on_kernel(module, query, key, value, pairs, scoring), None
    elif mask is not None:
        mask = dense(mask, query, key)
    return merged.attention(query, key, value, pairs, scoring._replace(mask=mask, is_causal=False)), None


def dense(mask: BlockMask | Packing, query: Tensor, key: Tensor) -> Tensor:
    """What stands in the place of a mask as a boolean mask (B, H or 1, T, S)."""
    if isinstance(mask, Packing):
        return mask.mask(query, key)
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
    query, key, value = calls.autocast(query, key, value)  # the kernel gives wrong numbers if the cast is left to it
    heads = query.shape[1]
    grouped = heads & (heads - 1) == 0  # the kernel takes grouped heads only if their number is a power of 2
    if not grouped:
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    output, auxiliary = compile_friendly_flex_attention(
        query, key, value, training=module.training, block_mask=block_mask, enable_gqa=grouped,
        scale=scoring.scaling, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return merged.add_pairs(output, auxiliary.lse, query, pairs, scoring, first)


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, pairs: VirtualPairs, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    if scoring.bias is not None:
        raise ValueError(
            f"{type(module).__name__} has position biases, which flash attention packages leave out: call "
            "model.set_attn_implementation('sdpa')."
        )
    return merged.attention(query, key, value, pairs, scoring._replace(is_causal=False)), None


def _for_package(
    module: nn.Module, implementation: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, is_causal: bool,
    keywords: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Packing]:  # fmt: skip
    """The inputs in a dtype that packages take, and a `Packing` in the place of the mask (B, S)."""
    dtype = get_target_dtype(query, module)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    name, (batch, _, length, _) = type(module).__name__, query.shape
    starts: list[Any] = [keywords.get(k) for k in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")]
    positions, sequences = keywords.get("position_ids"), None
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(
                f"{name} was given a mask of {mask.dim()} dimensions, but {implementation} knows padding alone, a mask "
                "(rows, tokens): call model.set_attn_implementation('sdpa')."
            )
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]  # a static cache may be longer
        sequences = sequences_of_mask(mask, length)
    elif all(part is not None for part in starts):
        if batch != 1:
            raise ValueError(f"{name} was given cu_seq_lens_q for {batch} rows: lay all sequences in one row.")
        sequences = sequences_of_starts(*starts)
    elif positions is not None and batch == 1 and length > 1:
        if positions.numel() != length:
            raise ValueError(
                f"{name} was given position_ids of shape {tuple(positions.shape)} for {length} tokens, from which "
                f"{implementation} cannot tell documents apart: call model.set_attn_implementation('sdpa')."
            )
        sequences = sequences_of_positions(positions)
        if sequences is not None and key.shape[2] != length:
            raise ValueError(f"{name} was given several documents in one row and a cache: give them without a cache.")
    window: Any = keywords.get("sliding_window")
    deterministic = keywords.get("deterministic")
    if deterministic is None:
        deterministic = os.getenv("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"  # as transformers reads it
    narrow = window is not None and key.shape[2] > window
    package = flash_package(implementation, name)
    packing = Packing(package, sequences, is_causal, window - 1 if narrow else None, deterministic)
    return query, key, value, packing


# Packages by their functions, or why HiFICL cannot use them: filled before torch.compile traces a call.
_packages: dict[tuple[Any, Any], Package | str] = {}


def flash_package(implementation: str, where: str) -> Package:
    """The package that transformers has loaded, or now loads, for the implementation of an attention.

    Raises:
        ValueError: it cannot be loaded, or has no functions that HiFICL could use.
    """
    try:
        (rows, sequences, *_), *_ = lazy_import_flash_attention(implementation)
    except (ImportError, ValueError, RuntimeError) as error:
        found: Package | str = f"it cannot be loaded ({error})"
    else:
        if (rows, sequences) not in _packages:
            try:
                _packages[rows, sequences] = package_of(rows, sequences)
            except ValueError as error:
                _packages[rows, sequences] = str(error)
        found = _packages[rows, sequences]
    if isinstance(found, str):
        raise ValueError(
            f"HiFICL cannot use attn_implementation={implementation!r}, found on {where}: {found}. Call "
            "model.set_attn_implementation('sdpa')."
        )
    return found


BACKENDS = {
    "eager": Backend(_eager, own=None),
    "sdpa": Backend(_sdpa, own=sdpa_attention_forward),
    "flex_attention": Backend(_flex, own=flex_attention_forward),
}
FLASH = Backend(_flash, own=flash_attention_forward, prepare=_for_package)


def backend_of(implementation: str) -> Backend | None:
    """The backend for a value of ``attn_implementation``; None if HiFICL has none.

    `FLASH` is that of every name for which transformers has registered its function for flash attention packages:
    "flash_attention_2" and the like, and those of kernels from the Hub.
    """
    if implementation in BACKENDS:
        return BACKENDS[implementation]
    registered = AttentionInterface._global_mapping.get(implementation)
    return FLASH if registered is flash_attention_forward else None
