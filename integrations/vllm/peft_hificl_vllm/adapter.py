"""A stored adapter, read and checked, and its pairs on one attention layer of vLLM."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedConfig

from peft_hificl import HiFICLConfig, HiFICLLayer, VirtualPairs, checkpoint
from peft_hificl.names import MODULE, HeadShape, module_of


class Adapter(NamedTuple):
    """An adapter as `save_pretrained` has written it.

    Attributes:
        config: its configuration.
        modules: by the name of an attention module in transformers, the tensors of its parameters by their names.
    """

    config: HiFICLConfig
    modules: dict[str, dict[str, Tensor]]

    def missing(self, count: int) -> list[str]:
        """The modules of the first `count` layers that are targets by the configuration, but have no tensors."""
        names = {re.sub(r"\.\d+\.", f".{i}.", module, count=1) for module in self.modules for i in range(count)}
        return sorted(name for name in names - set(self.modules) if check_target_module_exists(self.config, name))


def read(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in a folder or of a Hub id.

    Raises:
        ValueError: there is none, it is not HiFICL's, its file is damaged, or it holds more than pairs.
    """
    config = PeftConfig.from_pretrained(os.fspath(path))
    if not isinstance(config, HiFICLConfig):
        raise ValueError(
            f"{os.fspath(path)!r} holds an adapter of peft_type={config.peft_type!r}, not HIFICL: give the folder of a "
            "HiFICL adapter. vLLM serves LoRA adapters itself (--enable-lora)."
        )
    for field in ("modules_to_save", "trainable_token_indices"):
        value = getattr(config, field)
        if value:
            raise ValueError(
                f"The adapter in {os.fspath(path)!r} has {field}={value!r}: vLLM reads these modules from the base "
                "model, and would leave what was trained out. Train with pairs alone."
            )
    tensors = checkpoint.read(checkpoint.folder_of(path))
    checkpoint.check_finite(tensors)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module = module_of(key)
        if module is None:
            raise ValueError(
                f"The adapter in {os.fspath(path)!r} holds {key!r}, which is no parameter of pairs: vLLM would leave "
                "it out. Save it with save_embedding_layers=False, or train with pairs alone."
            )
        modules.setdefault(module, {})[key.rpartition(".")[2]] = tensor
    if not modules:
        raise ValueError(f"The adapter file in {os.fspath(path)!r} holds no tensors: save the adapter again.")
    return Adapter(config, modules)


def pairs_on(adapter: Adapter, module: str, shape: HeadShape) -> VirtualPairs:
    """The pairs of all heads of an attention module of this shape, in float32, as PEFT loads them.

    Raises:
        ValueError: the stored tensors are not those of an attention of this shape.
    """
    config, tensors = adapter.config, adapter.modules[module]
    heads = shape.groups if config.heads == "kv" else shape.heads
    expected = config.parameter_shapes(heads, shape.key_dim, shape.value_dim)
    source = f"an adapter (n={config.n}, r={config.r}, heads={config.heads!r}) on {module!r} of this base model"
    checkpoint.check_names("The adapter file", set(expected), tensors, source, what="tensors")
    checkpoint.check_shapes(
        f"the adapter file, on {module!r},",
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: torch.Size(sizes) for name, sizes in expected.items()},
        source,
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # fresh parameters are random
        layer = HiFICLLayer(PreTrainedConfig(), shape)
        layer.update_layer("default", config, torch.device("cpu"), torch.float32)
        for name, tensor in tensors.items():
            getattr(layer, name)["default"].fill(tensor.float())
        return layer.pairs_of("default")


class Pairs(nn.Module):
    """The pairs of one attention layer, as buffers: vLLM keeps these when it sleeps or reloads the base weights."""

    log_weights: Tensor | None

    def __init__(self, pairs: VirtualPairs) -> None:
        super().__init__()
        self.register_buffer("keys", pairs.keys, persistent=False)
        self.register_buffer("values", pairs.values, persistent=False)
        self.register_buffer("log_weights", pairs.log_weights, persistent=False)
        self.scale_self_attention = pairs.scale_self_attention
        self.skip_first_token = pairs.skip_first_token

    def forward(self) -> VirtualPairs:
        """The pairs: keys (1, H or G, n, d), values (1, H or G, n, e), log-weights (1, H, n) or None."""
        return VirtualPairs(self.keys, self.values, self.log_weights, self.scale_self_attention, self.skip_first_token)


def pairs_of(layer: nn.Module) -> VirtualPairs | None:
    """The pairs that are attached to an attention layer; None if there are none."""
    holder = getattr(layer, MODULE, None)
    return None if holder is None else holder()
