"""The causal effect of virtual pairs: what the loss on given data would be without them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import sharding
from ..layer import HiFICLLayer
from ..names import MODULE, plain
from ..ops.formula import VirtualPairs

Data = Sequence[Mapping[str, Any]]  # batches: what the model takes, labels among it


class Adapter(NamedTuple):
    """One adapter on a model: its name and, by the name of the attention module, its layers."""

    name: str
    layers: dict[str, HiFICLLayer]


class Effects(NamedTuple):
    """What the virtual pairs of an adapter do, measured.

    Attributes:
        loss: the loss with all pairs.
        effects: by module, how much the loss rises without a pair, ``(H, n)``, or without all pairs of a head,
            ``(H,)``; negative: it does harm.
    """

    loss: float
    effects: dict[str, Tensor]


def pair_effects(model: nn.Module, data: Data, adapter_name: str | None = None) -> Effects:
    """Measure, for every virtual pair, how much the loss rises when this pair alone is removed.

        effect_i = L(w_i = -inf) - L            the log-weight -inf takes pair i out of every softmax

    One forward over the data for each of L * H * n pairs: give it few data.  Derivatives with respect to the
    log-weights would take one backward, but once an adapter is trained they are near zero and order its pairs badly.
    Pairs that do the same stand in for one another, so effects need not add up.

    Args:
        model: the adapted model.
        data: batches with labels, for which the model returns its loss.  Losses are averaged over batches, weighted by
            the number of labels that count.
        adapter_name: which adapter; it must be the only active one.  None: the active one.

    Raises:
        ValueError: no such adapter, several active ones, data without labels, or a loss that is not finite.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, inspection
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=4, r=2))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> found = inspection.pair_effects(model, [{"input_ids": ids, "labels": ids}])
        >>> found.effects["model.layers.0.self_attn"].shape
        torch.Size([2, 4])
    """
    adapter = adapter_of(model, adapter_name)
    every = {
        (name, head, pair): pairs_removed(layer, head, pair)
        for name, layer in adapter.layers.items()
        for head in range(layer.head_shape.heads)
        for pair in range(layer.n[adapter.name])
    }
    return _measured(model, data, adapter, every)


def head_effects(model: nn.Module, data: Data, adapter_name: str | None = None) -> Effects:
    """Measure, for every head, how much the loss rises when all its virtual pairs are removed.

    As `pair_effects`, with one forward over the data for each of L * H heads.
    """
    adapter = adapter_of(model, adapter_name)
    every = {
        (name, head): pairs_removed(layer, head, slice(None))
        for name, layer in adapter.layers.items()
        for head in range(layer.head_shape.heads)
    }
    return _measured(model, data, adapter, every)


def pairs_removed(layer: HiFICLLayer, head: int, pairs: int | slice) -> Tensor:
    """A mask (H, n), True for these pairs of one head of the active adapter."""
    removed = torch.zeros(layer.head_shape.heads, layer.n[layer.active_names[0]], dtype=torch.bool)
    removed[head, pairs] = True
    return removed


def _measured(model: nn.Module, data: Data, adapter: Adapter, every: Mapping[tuple[Any, ...], Tensor]) -> Effects:
    """The effect of each removal, whose key is the module's name and the place in the result."""
    loss = loss_without(model, data, adapter, {})
    if not math.isfinite(loss):
        raise ValueError(f"The loss on data is {loss}: nothing can be said about single pairs.")
    found: dict[str, list[float]] = {name: [] for name in adapter.layers}
    for (name, *_), removed in every.items():
        found[name].append(loss_without(model, data, adapter, {name: removed}) - loss)
    heads = {name: layer.head_shape.heads for name, layer in adapter.layers.items()}
    return Effects(
        loss, {name: torch.tensor(values).reshape(heads[name], -1).squeeze(-1) for name, values in found.items()}
    )


def loss_without(model: nn.Module, data: Data, adapter: Adapter, removed: Mapping[str, Tensor]) -> float:
    """The measured loss without the pairs that are True in `removed`, (H, n) by the name of the module."""
    extra = {name: torch.zeros(gone.shape).masked_fill(gone, float("-inf")) for name, gone in removed.items()}
    total, number = 0.0, 0
    with at_rest(model), weighed(adapter.layers, extra), torch.no_grad():
        for batch in checked(model, data):
            count = _count(model, batch)
            total, number = total + model(**batch).loss.item() * count, number + count
    return total / number


def adapter_of(model: nn.Module, adapter_name: str | None, doing: str = "This measurement of an adapter") -> Adapter:
    """The only active adapter of a model, for what an error calls `doing`.

    Raises:
        ValueError: none or several are active, or another one than that of the given name; or its heads are divided
            by tensor parallelism.
    """
    sharding.check_whole(model, doing)
    layers = {
        plain(name).removesuffix(f".{MODULE}"): module
        for name, module in model.named_modules()
        if isinstance(module, HiFICLLayer)
    }
    active = sorted({name for layer in layers.values() for name in layer.active_names})
    if adapter_name is not None and not any(layer.has(adapter_name) for layer in layers.values()):
        raise ValueError(f"There is no HiFICL adapter {adapter_name!r} on this model.")
    if len(active) != 1 or adapter_name not in (None, active[0]):
        wanted = "the adapter" if adapter_name is None else repr(adapter_name)
        raise ValueError(
            f"The model has {active} as active HiFICL adapters: activate {wanted} alone, with model.set_adapter(...)."
        )
    return Adapter(active[0], {name: layer for name, layer in layers.items() if layer.active_names})


def pairs_of(layer: HiFICLLayer, adapter_name: str | None = None) -> VirtualPairs:
    """The pairs of an adapter of a layer, (1, H, n, d), without gradients; None: of the active one."""
    with torch.no_grad():
        return layer._pairs(layer.active_names[0] if adapter_name is None else adapter_name)


@contextmanager
def weighed(layers: Mapping[str, HiFICLLayer], extra: Mapping[str, Tensor]) -> Iterator[None]:
    """Add log-weights (H, n) to the pairs of these layers, in the calls of this thread."""
    thread = threading.get_ident()

    def hook(more: Tensor, pairs: VirtualPairs | None) -> VirtualPairs | None:
        if pairs is None or threading.get_ident() != thread:
            return None
        more = more.to(pairs.keys.device)[None]
        return pairs._replace(log_weights=more if pairs.log_weights is None else pairs.log_weights + more)

    handles = [
        layers[name].register_forward_hook(lambda _, args, pairs, more=more: hook(more, pairs))
        for name, more in extra.items()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not see the new hooks
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def checked(model: nn.Module, data: Data) -> Data:
    """Raise a ValueError for data without batches or without labels."""
    if isinstance(data, Mapping) or not len(data):
        raise ValueError("data must be a list of batches with labels, [dict(input_ids=..., labels=...), ...].")
    for number, batch in enumerate(data):
        if not isinstance(batch.get("labels"), Tensor):
            raise ValueError(f"Batch {number} of data has no labels, only {', '.join(batch)}: the loss needs them.")
        if not _count(model, batch):
            raise ValueError(f"Batch {number} of data has no label that counts: all of them are -100.")
    return data


def _count(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """How many labels a mean over a batch is taken over.

    A decoder shifts them by one token; an encoder-decoder, an encoder, and a head of another task do not.
    """
    base: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    shifted = base is not None and base.can_generate() and not base.config.is_encoder_decoder
    labels = batch["labels"]
    return int(((labels[:, 1:] if shifted else labels) != -100).sum())
