"""The cache of keys and values that transformers' continuous batching hands to the model.

Many requests share one row, in one cache; a mask keeps them apart.  Before transformers 5.24 the attention function
writes the new keys and values to it and reads those of all requests from it, since then the attention module does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import PagedAttentionCache

from .backends import FLASH, backend_of
from .block_sharing import BlockSharing, sharing_of
from .layer import HiFICLLayer

_TAKES_KEYWORDS = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters  # since transformers 5.19

# The adapters that each layer ran when it last wrote to a cache, with their strengths.
_writers: WeakKeyDictionary[PagedAttentionCache, dict[HiFICLLayer, dict[str, float]]] = WeakKeyDictionary()
_sharing: WeakKeyDictionary[PagedAttentionCache, BlockSharing | None] = WeakKeyDictionary()


def check_implementation(implementation: str) -> None:
    """Raise a ValueError if HiFICL reads no paged cache under this attention implementation."""
    if implementation == "flex_attention" or backend_of(implementation) is FLASH:
        raise ValueError(
            f"HiFICL reads no paged cache under {implementation!r}: call model.set_attn_implementation('sdpa')."
        )


class BeforePagedForward:
    """A forward pre-hook of continuous batching: no attention reads keys and values that another adapter has computed.

    A cache may stay in use after an adapter was switched, edited or unloaded.  Which blocks its requests share from
    then on is left to `block_sharing`.

    Args:
        layers: those of the model, by the names of their attentions.

    Raises:
        ValueError: by a call: a request that is still running began with another adapter.
    """

    def __init__(self, layers: dict[str, HiFICLLayer]) -> None:
        self.layers = layers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("cache")
        if isinstance(cache, PagedAttentionCache):
            _check(cache, self.layers.values(), kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check(cache: PagedAttentionCache, layers: Iterable[HiFICLLayer], keywords: dict[str, Any]) -> None:
    writers = _writers.setdefault(cache, {})
    if not writers:
        begun = _has_past(keywords)
        if begun and _has_common_blocks(cache):
            raise ValueError(
                "This continuous batching manager has served the model without its HiFICL adapter, and would reuse "
                "keys and values that were computed without it: make a new manager."
            )
        _sharing[cache] = sharing_of(cache, begun)
    sharing = _sharing[cache] if cache.use_prefix_sharing else None
    if sharing is not None:
        sharing.begin_forward()
    now = {layer: {name: layer.scaling[name] for name in layer.active_names} for layer in layers}
    # A layer that is new, while others of its model have written, had no adapter before.
    others_wrote = any(layer in writers for layer in now)
    before = {layer: writers.get(layer, {} if others_wrote else now[layer]) for layer in now}
    changed = [layer for layer in now if before[layer] != now[layer]]
    if changed and (_has_past(keywords) if sharing is None else sharing.has_others):
        raise ValueError(
            f"The active HiFICL adapters, with their strengths, have changed from {before[changed[0]]} to "
            f"{now[changed[0]]} while requests were running, whose keys and values the former have made: let the "
            "manager finish its requests, or cancel them, before adapter or strength is changed."
        )
    writers.update(now)


def _has_past(keywords: dict[str, Any]) -> bool:
    """Whether some request has more keys than queries, and so has keys from earlier calls."""
    keys = keywords["cu_seq_lens_k"]  # by kind of layer
    keys = keys.values() if isinstance(keys, dict) else [keys]
    return any(int(ends.max()) > int(keywords["cu_seq_lens_q"].max()) for ends in keys)


def _has_common_blocks(cache: PagedAttentionCache) -> bool:
    """Whether a request could reuse blocks of another one.  (A warm-up request has earlier keys too, but its own.)"""
    allocators = getattr(cache, "cache_allocators", None)  # since transformers 5.18
    if allocators is None:
        return bool(cache.use_prefix_sharing)
    return any(allocator.ledger.hash_to_block for allocator in allocators.values())


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as transformers' own is
def update(
    cache: PagedAttentionCache, index: int, key: Tensor, value: Tensor, keywords: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Write the keys and values (1, G, T, d) of a layer to a cache, and return those of all requests, (1, G, S, d)."""
    new = {"key_states": key, "value_states": value, "layer_idx": index}
    if _TAKES_KEYWORDS:
        return cache.update(**new, kwargs=dict(keywords))
    where = {name: keywords[name] for name in ("read_index", "write_index")}
    key, value = cache.update(**new, **where)  # (S, G, d)
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None]
