"""The names of an adapter's modules and parameters in a model and in a file, and the shape of attention heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

PREFIX = "hificl_"  # of every parameter of an adapter
MODULE = "virtual_pairs"  # the name under which an attention module holds its HiFICLLayer


class HeadShape(NamedTuple):
    """The heads of one attention.

    Attributes:
        heads: query heads.
        key_dim: head dimension of queries and keys.
        value_dim: head dimension of values.
        groups: key/value heads; each is shared by the same number of query heads.
    """

    heads: int
    key_dim: int
    value_dim: int
    groups: int


def uncompiled(name: str) -> str:
    """The name of a module, parameter or tensor without what torch.compile adds to it."""
    return name.replace("._orig_mod", "")


def plain(name: str) -> str:
    """The name of a module, parameter or tensor without what torch.compile and a PeftModel add to it."""
    return uncompiled(name).removeprefix("base_model.model.")


def module_of(key: str) -> str | None:
    """The attention module that a checkpoint key belongs to; None for keys that are not HiFICL's.

    >>> module_of("base_model.model.model.layers.0.self_attn.virtual_pairs.hificl_K_A")
    'model.layers.0.self_attn'
    """
    module, dot, _ = key.rpartition(f".{PREFIX}")
    return plain(module).removesuffix(f".{MODULE}") if dot else None


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model's forward, by its name since transformers 5.24 or by that of before."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def adapter_of(key: str) -> str | None:
    """The adapter in the name of a parameter of a model; None for parameters that are not HiFICL's.

    >>> adapter_of("model.layers.0.self_attn.virtual_pairs.hificl_K_A.default.weight")
    'default'
    """
    parts = uncompiled(key).rpartition(f".{MODULE}.")[2].split(".")
    return parts[1] if module_of(key) and len(parts) > 1 else None
