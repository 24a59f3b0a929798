"""Continuous batching (`generate_batch`) of an adapted model: unsupported requests are refused when it is called.

Later would be too late: transformers runs the model in another thread, and an error there only ends up in the results.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager, ContinuousMixin

from . import block_sharing, paged_cache, rows, support
from .layer import HiFICLLayer
from .names import MODULE

_NO_ADAPTER_NAMES = (
    "Continuous batching knows no adapter_names: its requests share one row, and run the active adapters. Call it once "
    "per adapter, after set_adapter(...), or call `generate(..., adapter_names=[...])` without a paged cache."
)


def guard(model: nn.Module) -> None:
    """Let every adapted model within `model` check its arguments when continuous batching is started."""
    for module in model.modules():
        if not isinstance(module, ContinuousMixin) or "generate_batch" in vars(module) or not _adapted(module):
            continue
        module.destroy_cached_continuous_batching_manager()  # its cache was computed without the adapter
        module.generate_batch = functools.partial(_generate_batch, module)
        module.init_continuous_batching = functools.partial(_init_continuous_batching, module)


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    for module in model.modules():
        own = vars(module).get("generate_batch")
        if isinstance(module, ContinuousMixin) and getattr(own, "func", None) is _generate_batch:
            module.destroy_cached_continuous_batching_manager()  # its cache was computed with the adapter
            del module.generate_batch, module.init_continuous_batching


def _generate_batch(model: Any, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
    if adapter_names is not None:
        raise ValueError(_NO_ADAPTER_NAMES)
    return type(model).generate_batch(model, *args, **kwargs)


def _init_continuous_batching(
    model: Any,
    generation_config: Any = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> ContinuousBatchingManager:
    for module in _adapted(model):
        layer = getattr(module, MODULE)
        if rows.running.modules.get(layer) is not None:  # called by `generate(adapter_names=[...])`
            raise ValueError(_NO_ADAPTER_NAMES)
        if not layer.disable_adapters:
            implementation = layer.base_config._attn_implementation
            used = "paged|eager" if implementation == "eager" else implementation
            support.check_backend(module, support.dispatch_of(type(module)), used)
            if implementation != "flex_attention":  # which transformers refuses, without an adapter too
                paged_cache.check_implementation(implementation)
    config = continuous_batching_config
    if config is None:
        defaults = model.generation_config if generation_config is None else generation_config
        config = getattr(defaults, "continuous_batching_config", None) or ContinuousBatchingConfig()
    if any(config.cuda_graph_booleans):
        raise ValueError(
            f"HiFICL does not support continuous batching with use_cuda_graph={config.use_cuda_graph}: a graph goes on "
            "with the adapter that it was captured with. Leave use_cuda_graph out."
        )
    config = copy.copy(config)
    config.use_cuda_graph = False  # left None, it would be turned on by a padding interval
    config.auto_switch_to_flash = False  # HiFICL reads no paged cache under those
    manager: ContinuousBatchingManager = type(model).init_continuous_batching(
        model, generation_config, config, *args, **kwargs
    )
    block_sharing.note(manager)
    return manager


def _adapted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, MODULE, None), HiFICLLayer)]
