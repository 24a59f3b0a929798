"""The causal effect of virtual pairs: what the loss on given data would be without them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layer import HiFICLLayer
from ..names import MODULE, plain
from ..ops.formula import VirtualPairs

Data = Sequence[Mapping[str, Any]]  # batches: what the model takes, labels among it


class Adapter(NamedTuple):
    """One adapter on a model: its name and, by the name of the attention module, its layers."""

    name: str
    layers: dict[str, HiFICLLayer]


class Effects(NamedTuple):
    """The estimated effect of each virtual pair of an adapter.

    Attributes:
        loss: the measured loss with all pairs.
        estimates: by module, ``(H, n)``: how much the loss would rise, to first order, if this pair alone were removed.
    """

    loss: float
    estimates: dict[str, Tensor]


def pair_effects(model: nn.Module, data: Data, adapter_name: str | None = None) -> Effects:
    """Estimate, for every virtual pair at once, how much the loss rises when it is removed.

    With a gate g on the pair, ``Z_D = sum_i g_i exp s(k_D,i)``, removing it means g = 1 -> 0, and to first order

        L(g_i = 0) - L(g_i = 1)  ~  -dL/dg_i  =  -dL/dw_i        at g_i = 1, w_i = log g_i = 0

    which one backward gives for all pairs.  It is an estimate: removing a pair is no small step, and pairs that do the
    same stand in for one another.  `read_pairs` and `prune_pairs` measure beside it.

    Args:
        model: the adapted model.
        data: batches with labels, for which the model returns its loss.  Losses are averaged over batches, weighted by
            the number of labels that count.
        adapter_name: which adapter; it must be the only active one.  None: the active one.

    Raises:
        ValueError: no such adapter, several active ones, data without labels, or a model that passes no gradient on.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, inspection
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=4, r=2))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> effects = inspection.pair_effects(model, [{"input_ids": ids, "labels": ids}])
        >>> effects.estimates["model.layers.0.self_attn"].shape
        torch.Size([2, 4])
    """
    layers = adapter_of(model, adapter_name).layers
    gates = {
        name: torch.zeros(layer.head_shape.heads, pairs_of(layer).keys.shape[2], requires_grad=True)
        for name, layer in layers.items()
    }
    sums = {name: torch.zeros_like(gate, requires_grad=False) for name, gate in gates.items()}
    total, number = 0.0, 0
    with at_rest(model), weighed(layers, gates), torch.enable_grad():
        for batch in checked(data):
            loss, count = _loss(model, batch)
            if not loss.requires_grad:
                raise ValueError(
                    f"The loss of {type(model).__name__} passes no gradient on to the adapter's pairs: estimate their "
                    "effects on a base without kernels made for inference."
                )
            gradients = torch.autograd.grad(loss, list(gates.values()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(gates, gradients, strict=True):
                sums[name] -= gradient * count
            total, number = total + loss.item() * count, number + count
    if not math.isfinite(total):
        raise ValueError(f"The loss on data is {total / number}: nothing can be said about single pairs.")
    return Effects(total / number, {name: estimate / number for name, estimate in sums.items()})


def loss_without(model: nn.Module, data: Data, adapter: Adapter, removed: Mapping[str, Tensor]) -> float:
    """The measured loss without the pairs that are True in `removed`, (H, n) by the name of the module."""
    extra = {name: torch.zeros(gone.shape).masked_fill(gone, float("-inf")) for name, gone in removed.items()}
    total, number = 0.0, 0
    with at_rest(model), weighed(adapter.layers, extra), torch.no_grad():
        for batch in checked(data):
            loss, count = _loss(model, batch)
            total, number = total + loss.item() * count, number + count
    return total / number


def adapter_of(model: nn.Module, adapter_name: str | None) -> Adapter:
    """The only active adapter of a model.

    Raises:
        ValueError: none or several are active, or another one than that of the given name.
    """
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
    """Within the block the model is in evaluation mode, and none of its parameters requires a gradient."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True
        for module, mode in modes.items():
            module.training = mode


def checked(data: Data) -> Data:
    """Raise a ValueError for data without batches or without labels."""
    if isinstance(data, Mapping) or not len(data):
        raise ValueError("data must be a list of batches with labels, [dict(input_ids=..., labels=...), ...].")
    for number, batch in enumerate(data):
        if not isinstance(batch.get("labels"), Tensor):
            raise ValueError(f"Batch {number} of data has no labels, only {', '.join(batch)}: the loss needs them.")
        if not _count(batch):
            raise ValueError(f"Batch {number} of data has no label that counts: all of them are -100.")
    return data


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    return model(**batch).loss, _count(batch)


def _count(batch: Mapping[str, Any]) -> int:
    """How many labels a mean over a batch is taken over; those of a language model are shifted by one token."""
    labels, ids = batch["labels"], batch.get("input_ids")
    shifted = isinstance(ids, Tensor) and labels.shape == ids.shape
    return int(((labels[:, 1:] if shifted else labels) != -100).sum())
