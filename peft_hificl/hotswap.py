"""Another adapter's weights in the place of a loaded one's, which keeps its name and its memory."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from torch._dynamo import OptimizedModule

from . import checkpoint
from .config import HiFICLConfig
from .layer import layers_with
from .model import HiFICLModel
from .ops.formula import OF_THE_SOFTMAX
from .sharding import like

# What decides the shapes of tensors, or how they are used, and is the same for two adapters that can be exchanged.
_FIELDS = (
    "n", "r", "heads", "factorize_keys", "factorize_values", "pair_weights", *OF_THE_SOFTMAX, "trainable_token_indices"
)  # fmt: skip


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    *,
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> None:
    """Put the weights of a stored adapter in the place of a loaded one's.

    The parameters stay the same objects in the same memory, so a compiled model is not compiled again, and neither
    optimizers nor CUDA graphs notice.  The adapter keeps its name, its strength, and whether it is active.  PEFT's
    function of this name does the same to LoRA adapters, and to these alone.

    Everything is checked before the first weight is copied: after an error the model is as it was.

    Args:
        model: the model with the loaded adapter: a [`~peft.PeftModel`], or one that `torch.compile` has made of it.
        model_name_or_path: a folder, or an id on the Hub.
        adapter_name: the adapter whose weights are replaced.
        key_mapping: new names of stored tensors, as for `PeftModel.from_pretrained`.
        kwargs: where to look, as for `PeftConfig.from_pretrained`: `subfolder`, `revision`, `cache_dir`, `token`.
            PEFT's `torch_device` is accepted, too: the weights go where those are that they replace.

    Raises:
        TypeError: any other keyword.
        ValueError: no such HiFICL adapter on the model; a stored adapter of another method, or of other `n`, `r`,
            `heads`, `factorize_keys`, `factorize_values`, `pair_weights`, `scale_self_attention`,
            `skip_first_token` or `trainable_token_indices`; tensors with other names, shapes or numbers that are not
            finite; an adapter whose weights are offloaded or sharded.

    Example:

        >>> from tempfile import mkdtemp
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, hotswap_adapter
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=2, r=2))
        >>> folder = mkdtemp()
        >>> model.save_pretrained(folder)
        >>> hotswap_adapter(model, folder, "default")
    """
    where, unknown = PeftModel._split_kwargs(kwargs)
    unknown.pop("torch_device", None)
    if unknown:
        raise TypeError(
            f"hotswap_adapter() does not know {', '.join(map(repr, sorted(unknown)))}: give key_mapping, or where the "
            "adapter is (subfolder, revision, cache_dir, token)."
        )
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    layers = layers_with(model, adapter_name)
    current = configs.get(adapter_name)
    if not layers or not isinstance(current, HiFICLConfig):
        names = sorted(name for name, config in configs.items() if isinstance(config, HiFICLConfig))
        raise ValueError(f"There is no HiFICL adapter {adapter_name!r} to replace on this model, which has {names}.")
    stored = PeftConfig.from_pretrained(os.fspath(model_name_or_path), **where)
    if not isinstance(stored, HiFICLConfig):
        raise ValueError(
            f"{model_name_or_path!s} holds an adapter of type {getattr(stored.peft_type, 'value', stored.peft_type)}, "
            f"which cannot replace the HiFICL adapter {adapter_name!r}."
        )
    other = [field for field in _FIELDS if getattr(stored, field) != getattr(current, field)]
    if other:
        raise ValueError(
            f"The adapter in {model_name_or_path!s} has "
            + ", ".join(f"{field}={getattr(stored, field)!r}" for field in other)
            + f", but {adapter_name!r} on the model has "
            + ", ".join(f"{field}={getattr(current, field)!r}" for field in other)
            + ": load it under a name of its own with load_adapter()."
        )
    adapter = f"the adapter {adapter_name!r} in the model"
    held = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if any(tensor.is_meta or hasattr(tensor, "device_mesh") for tensor in held.values()):
        raise ValueError(
            f"The weights of {adapter} are offloaded or sharded: replace them before the model is dispatched or "
            "wrapped."
        )
    old = HiFICLModel._in_keys_of(model, adapter_name, held)
    tensors = checkpoint.read(checkpoint.folder_of(model_name_or_path, **where), key_mapping)
    new = HiFICLModel._in_keys_of(model, adapter_name, tensors)
    checkpoint.check_names("The adapter file", set(old), new, adapter, what="tensors")
    found, wanted = ({key: tensor.shape for key, tensor in tensors.items()} for tensors in (new, old))
    checkpoint.check_shapes("the adapter file", found, wanted, adapter)
    places = model.state_dict()  # the same memory as the parameters'
    values = {key: like(tensor.to(places[key].device, places[key].dtype), places[key]) for key, tensor in new.items()}
    for key, value in values.items():
        places[key].copy_(value)
