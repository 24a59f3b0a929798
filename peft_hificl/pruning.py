"""Makes an adapter smaller: fewer virtual pairs, those whose removal costs least on given data."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .inspection.effects import Adapter, Data, adapter_of, loss_without, pair_effects
from .layer import HiFICLLayer


class Pruned(NamedTuple):
    """What `prune_pairs` has done.

    Attributes:
        n: the number of pairs per head that are left.
        loss_before: the measured loss with all pairs.
        loss_after: the measured loss with those that are left.
        kept: by module, ``(H, n)``: which of its pairs each head has kept.
    """

    n: int
    loss_before: float
    loss_after: float
    kept: dict[str, Tensor]


def prune_pairs(
    model: nn.Module,
    data: Data,
    n: int | None = None,
    threshold: float | None = None,
    adapter_name: str | None = None,
) -> Pruned:
    """Remove the virtual pairs of an adapter that matter least, in place: each head keeps its best n pairs.

    The best pairs of a head are those whose removal, each alone, raises the loss on the data most
    (`inspection.pair_effects`: one forward over the data for each pair).  What it costs to remove all others together
    is measured as well, before anything is changed.  With `threshold`, n is the smallest number at which the loss is at
    most `threshold` above that of the whole adapter; if none is, nothing is removed.

    The configuration's n and the parameters change together; the pairs that are left are the same as before, of the
    same rank r.  Measure again on data that pruning has not seen, and give a trainer a new optimizer: the parameters
    are new ones.

    Args:
        model: the adapted model.
        data: batches with labels, for which the model returns its loss.
        n: how many pairs each head keeps.
        threshold: how much the loss may rise.
        adapter_name: which adapter; it must be the only active one.  None: the active one.

    Raises:
        ValueError: not one of `n` and `threshold`, an n that is not below the adapter's, no such adapter, several
            active ones, data without labels, or parameters that are offloaded or sharded.  Nothing has changed then.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, prune_pairs
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=4, r=2))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> pruned = prune_pairs(model, [{"input_ids": ids, "labels": ids}], n=2)
        >>> pruned.n, pruned.kept["model.layers.0.self_attn"].shape, model.peft_config["default"].n
        (2, torch.Size([2, 2]), 2)
    """
    if not hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} holds no configuration of an adapter: give the model that was adapted."
        )
    adapter = adapter_of(model, adapter_name)
    before = _number(adapter)
    if (n is None) == (threshold is None):
        raise ValueError(f"Give prune_pairs either n or threshold, found n={n} and threshold={threshold}.")
    if n is not None and (not isinstance(n, int) or not 1 <= n < before):
        raise ValueError(f"n={n} for an adapter of {before} pairs per head: give a number from 1 to {before - 1}.")
    loss, effects = pair_effects(model, data, adapter.name)
    limit = math.inf if threshold is None else loss + threshold
    for left in range(1, before) if n is None else [n]:
        kept = {name: _best(effect, left, adapter, name) for name, effect in effects.items()}
        gone = {name: torch.ones_like(e, dtype=torch.bool).scatter(1, kept[name], False) for name, e in effects.items()}
        after = loss_without(model, data, adapter, gone)
        if after <= limit:
            _keep(model, adapter, kept, left)
            return Pruned(left, loss, after, kept)
    return Pruned(before, loss, loss, {name: torch.arange(before).expand(e.shape) for name, e in effects.items()})


def _number(adapter: Adapter) -> int:
    """The number of pairs per head.

    Raises:
        ValueError: the parameters are not all here.
    """
    for name, layer in adapter.layers.items():
        for kind, weight in _sized(layer, adapter.name).items():
            if weight.is_meta or weight.ndim < 2 or weight.shape[1] != layer.n[adapter.name]:
                raise ValueError(
                    f"{kind} of {name!r} has shape {tuple(weight.shape)} on {weight.device}: the adapter is offloaded "
                    "or sharded. Prune it where it is whole, on a model that is not dispatched."
                )
    return next(iter(adapter.layers.values())).n[adapter.name]


def _sized(layer: HiFICLLayer, adapter_name: str) -> dict[str, nn.Parameter]:
    """The parameters of an adapter whose second dimension counts pairs."""
    names = ("hificl_K_A", "hificl_V_A", "hificl_K", "hificl_V", "hificl_W")
    return {n: getattr(layer, n)[adapter_name].weight for n in names if adapter_name in getattr(layer, n)}


def _best(effect: Tensor, number: int, adapter: Adapter, name: str) -> Tensor:
    """The pairs (H, number) of the largest effect of each head, in their order.

    Heads that share their pairs keep the same ones, which are best for them together.
    """
    heads, n = effect.shape
    sets = min(len(weight) for weight in _sized(adapter.layers[name], adapter.name).values())
    together = effect.reshape(sets, heads // sets, n).sum(dim=1)
    best = together.topk(number, dim=1).indices.sort(dim=1).values
    return best.repeat_interleave(heads // sets, dim=0)


def _keep(model: nn.Module, adapter: Adapter, kept: dict[str, Tensor], number: int) -> None:
    """Replace the parameters and the configuration; all that may fail comes before the first change."""
    replaced: list[tuple[Any, nn.Parameter]] = []
    for name, layer in adapter.layers.items():
        for kind, weight in _sized(layer, adapter.name).items():
            index = kept[name][:: len(kept[name]) // len(weight)].to(weight.device)
            index = index if weight.ndim == 2 else index[..., None].expand(-1, -1, weight.shape[2])
            smaller = nn.Parameter(weight.detach().gather(1, index), requires_grad=weight.requires_grad)
            replaced.append((getattr(layer, kind)[adapter.name], smaller))
    configurations: Any = model.peft_config
    config = copy.copy(configurations[adapter.name])  # another adapter may have the same object
    config.n = number
    for factor, parameter in replaced:
        factor.weight = parameter
    for layer in adapter.layers.values():
        layer.n[adapter.name] = number
    configurations[adapter.name] = config
