"""How alike the virtual pairs of one adapter are, or those of two adapters on one model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import sharding
from ..layer import layers_with
from ..names import MODULE, plain


class Similarity(NamedTuple):
    """Cosines between virtual pairs of one attention module, ``(H, n, m)``, of their keys and of their values.

    Two adapters of ``heads="kv"`` are compared by key/value head, ``(G, n, m)``.
    """

    keys: Tensor
    values: Tensor


class Duplicate(NamedTuple):
    """Two pairs of one head (key/value head, with ``heads="kv"``) that are nearly the same."""

    module: str
    head: int
    pairs: tuple[int, int]
    keys: float
    values: float


def pair_similarity(model: nn.Module, first: str, second: str | None = None) -> dict[str, Similarity]:
    """Cosines between each pair of one adapter and each pair of another, head by head.

    Adapters on one frozen model share the coordinates of its heads, so their keys and values can be compared; the order
    of the pairs means nothing.  Random directions of dimension d have cosines of about ``1 / sqrt(d)`` in size.

    Args:
        model: the adapted model; neither adapter need be active.
        first: an adapter, of n pairs.
        second: another one, of m pairs; None: the first one itself.

    Returns:
        The cosines by the name of the attention module, for modules that have both.

    Raises:
        ValueError: no such adapter, or no module that has both.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, inspection
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> model = get_peft_model(base, HiFICLConfig(n=4, r=4))
        >>> keys = inspection.pair_similarity(model, "default")["model.layers.0.self_attn"].keys
        >>> keys.shape, bool(torch.allclose(keys.diagonal(dim1=1, dim2=2), torch.ones(2, 4)))
        (torch.Size([2, 4, 4]), True)
    """
    sharding.check_whole(model, "pair_similarity")
    second = first if second is None else second
    for name in (first, second):
        if not layers_with(model, name):
            raise ValueError(f"There is no HiFICL adapter {name!r} on this model.")
    both = set(layers_with(model, first)) & set(layers_with(model, second))
    if not both:
        raise ValueError(f"No attention has both adapters, {first!r} and {second!r}: there is nothing to compare.")
    found = {}
    for name, layer in model.named_modules():
        if layer in both:
            with torch.no_grad():
                one, other = (layer.pairs_of(adapter) for adapter in (first, second))
            cosines = [_cosines(a[0], b[0]) for a, b in ((one.keys, other.keys), (one.values, other.values))]
            found[plain(name).removesuffix(f".{MODULE}")] = Similarity(*cosines)
    return found


def duplicate_pairs(model: nn.Module, adapter_name: str, threshold: float = 0.95) -> list[Duplicate]:
    """Pairs of one head whose keys and whose values have cosines of at least `threshold`, the most alike first.

    Such pairs look at the same and write the same; one of them with the weight of both would do.

    Raises:
        ValueError: no such adapter.
    """
    found = []
    for name, (keys, values) in pair_similarity(model, adapter_name).items():
        alike = torch.minimum(keys, values).triu(diagonal=1) >= threshold
        for head, i, j in alike.nonzero().tolist():
            found.append(Duplicate(name, head, (i, j), keys[head, i, j].item(), values[head, i, j].item()))
    return sorted(found, key=lambda duplicate: -min(duplicate.keys, duplicate.values))


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    heads = max(len(a), len(b))
    a, b = (nn.functional.normalize(t.float(), dim=-1).repeat_interleave(heads // len(t), dim=0) for t in (a, b))
    return (a @ b.mT).cpu()
