"""A dry run: attach an adapter to a copy of the model without weights, and see what PEFT would save of it."""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from . import sharding
from .config import HiFICLConfig
from .layer import forget_unloaded

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Saved(NamedTuple):
    """Key and shape of each tensor that `save_pretrained` writes of an adapter.

    Attributes:
        always: the virtual pairs, the modules of `modules_to_save` and the trained tokens.
        embeddings: those, and the embeddings that PEFT saves too after the vocabulary was resized.
    """

    always: dict[str, torch.Size]
    embeddings: dict[str, torch.Size]


def saved_shapes(
    tuner: BaseTuner, adapter_name: str, config: HiFICLConfig, state_dict: dict[str, Tensor] | None
) -> Saved:
    """What PEFT would save of an adapter after attaching it.

    PEFT's own code attaches the adapter to a copy of the model whose weights are on the meta device.  Neither the model
    nor the configuration is changed.

    Args:
        tuner: the tuner that is about to attach the adapter to its model.
        adapter_name: the adapter's name.
        config: its configuration, with targets found.
        state_dict: as for `BaseTuner.inject_adapter`.
    """
    bare: Any = without_weights(tuner)
    forget_unloaded(bare, adapter_name)
    bare.peft_config[adapter_name] = copy.deepcopy(config)
    bare.model.peft_config = bare.peft_config
    sharding.forget(bare.model)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT will warn again when it attaches the adapter in earnest
        BaseTuner.inject_adapter(bare, bare.model, adapter_name, state_dict=state_dict)
    # PEFT would leave out all tensors whose names contain that of another adapter, which may be that of a module.
    others = {name for name, other in bare.peft_config.items() if isinstance(other, HiFICLConfig)} - {adapter_name}
    bare.model.peft_config = {name: other for name, other in bare.peft_config.items() if name not in others}
    always = get_peft_model_state_dict(bare.model, adapter_name=adapter_name, save_embedding_layers=False)
    more: dict[str, Tensor] = {}
    with suppress(AttributeError, NotImplementedError):  # not every model has embeddings
        more = get_peft_model_state_dict(bare.model, adapter_name=adapter_name, save_embedding_layers=True)
    return Saved(*({key: tensor.shape for key, tensor in saved.items()} for saved in (always, more)))


def without_weights(module: nn.Module) -> Any:
    """A copy of a module and its submodules, with parameters and buffers on the meta device and without hooks.

    Attributes that are dicts, lists or sets are copied, so that the copy can be changed without changing the module;
    other attributes are the same objects.  Weights and modules that are shared (tied) within the module are shared
    within the copy.
    """
    copies: dict[Any, Any] = {}

    def bare(tensor: Tensor) -> Tensor:
        if tensor not in copies:
            meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            copies[tensor] = nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
        found: Tensor = copies[tensor]
        return found

    def copied(original: nn.Module) -> nn.Module:
        if original not in copies:
            # A class may have a __new__ that calls __init__, as FSDP2's have.
            clone = copies[original] = object.__new__(type(original))
            state: dict[str, Any] = {
                name: copy.copy(value) if isinstance(value, dict | list | set) else value
                for name, value in vars(original).items()
            }
            for name in ("_parameters", "_buffers"):
                state[name] = {n: None if tensor is None else bare(tensor) for n, tensor in state[name].items()}
            state["_modules"] = {n: None if child is None else copied(child) for n, child in state["_modules"].items()}
            vars(clone).update(state, **{name: type(state[name])() for name in _HOOKS})
            # bitsandbytes' layers override this method to read attributes of their weights that the copies lack.
            vars(clone)["_save_to_state_dict"] = MethodType(nn.Module._save_to_state_dict, clone)
        found: nn.Module = copies[original]
        return found

    return copied(module)
