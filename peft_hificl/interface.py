"""HiFICL inside transformers' attention interface.

Every attention module of transformers that dispatches calls ``attention_interface(self, query, key, value, mask,
...)`` with a function looked up by ``self.config._attn_implementation``.  An adapted module gets a shallow copy of its
configuration in which this name is ``"hificl"``, so that `hificl_attention_forward` receives the call, finds the
adapter on the module (its first argument) and mixes the virtual pairs in.

The adapter keeps the module's original configuration object and reads the real implementation from it on every call.
The model builds its masks from that object as before, and `model.set_attn_implementation(...)` still takes effect.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.generation.continuous_batching import PagedAttentionCache

from . import paged_cache
from .backends import BACKENDS, FLASH, Backend, backend_of
from .layer import HiFICLLayer
from .listeners import listening, tell
from .names import MODULE, HeadShape
from .ops.formula import Scoring, VirtualPairs
from .support import Dispatch, check_backend, dispatch_of, exchange_of

IMPLEMENTATION = "hificl"


def hificl_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of adapted modules; signature and results are those of transformers' own.

    Args:
        query: ``(B, H, T, d)``.
        key: ``(B, G, S, d)``.
        value: ``(B, G, S, e)``.
        attention_mask: None, boolean, additive or a ``BlockMask``, as the module's own implementation gets it.

    Returns:
        The output ``(B, T, H, e)`` and, for ``eager``, the weights of the context values ``(B, H, T, S)``: each row
        sums to alpha, not to 1, as the virtual pairs take the rest.

    Raises:
        ValueError: an implementation that is not supported, or heads that are not those that the adapter was made for.
    """
    layer = getattr(module, MODULE, None)
    if layer is None:
        raise ValueError(
            f"{type(module).__name__} runs with attn_implementation={IMPLEMENTATION!r} but has no HiFICL adapter. The "
            f"name is set by attaching an adapter; load the base model with one of {', '.join(BACKENDS)}."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    pairs = layer(query, key, value, scale)
    dispatch, implementation = dispatch_of(type(module)), layer.base_config._attn_implementation
    if pairs is None:
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        attend = dispatch.function_of(implementation)
        # transformers' function for packages looks the package up in the configuration, which names HiFICL here.
        caller = _Unadapted(module, layer.base_config) if backend_of(implementation) is FLASH else module
        return attend(caller, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)

    _check_call(module, layer, dispatch, query, key, value, pairs, kwargs)
    key, value = _with_paged_past(module, layer, key, value, kwargs)
    backend = cast(Backend, backend_of(implementation.removeprefix("paged|")))
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if backend.prepare is not None:
        query, key, value, attention_mask = backend.prepare(
            module, implementation, query, key, value, attention_mask, is_causal, kwargs
        )
    scoring = Scoring(
        scaling=scale,
        mask=attention_mask,
        is_causal=is_causal,
        bias=kwargs.get("position_bias"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        dropout=dropout if module.training else 0.0,
    )
    exchange = exchange_of(dispatch, implementation)
    if exchange is not None:
        recorded = bool(listening.each)
        return exchange.attend(backend.attend, module, query, key, value, pairs, scoring, kwargs, recorded)
    output, weights = backend.attend(module, query, key, value, pairs, scoring)
    if listening.each:
        tell(layer, backend.attend, module, query, key, value, pairs, scoring, output)
    return output.transpose(1, 2).contiguous(), weights


class _Unadapted:
    """An adapted attention, but for its configuration, which is that of the base model."""

    def __init__(self, module: nn.Module, config: PreTrainedConfig) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _check_call(
    module: nn.Module,
    layer: HiFICLLayer,
    dispatch: Dispatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: VirtualPairs,
    keywords: dict[str, Any],
) -> None:
    """Refuse calls whose result would differ from the formula's, or that would fail later with an unclear error."""
    check_backend(module, dispatch, layer.base_config._attn_implementation)
    if hasattr(query, "device_mesh"):
        raise ValueError(
            f"{type(module).__name__} attends with distributed tensors ({type(query).__name__}), which HiFICL does not "
            "support: run it without context parallelism."
        )
    if keywords.get("adapter_names") is not None:
        raise ValueError(
            "adapter_names needs a PeftModel (get_peft_model, PeftModel.from_pretrained), which hands each row its "
            "adapter; a model with adapters added by its own add_adapter() runs the active adapters for every row."
        )
    found = HeadShape(query.shape[1], query.shape[3], value.shape[3], key.shape[1])
    wanted = layer.head_shape if layer.sharding is None else layer.sharding.part(layer.head_shape)
    if found != wanted:
        raise ValueError(
            f"{type(module).__name__} attends with {found}, but its HiFICL adapter was made for {wanted}: "
            "this attention is not supported; please report it."
        )
    if pairs.keys.device != query.device:
        remedy = (
            "it was never loaded (transformers' load_adapter loads nothing onto a base model that accelerate has "
            "offloaded: use PeftModel.from_pretrained there)"
            if pairs.keys.is_meta
            else "move the whole model, adapter included, with model.to(...)"
        )
        raise ValueError(
            f"{type(module).__name__} runs on {query.device}, but its HiFICL adapter is on {pairs.keys.device}: "
            f"{remedy}."
        )


def _with_paged_past(
    module: nn.Module, layer: HiFICLLayer, key: Tensor, value: Tensor, keywords: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The keys and values to attend to: under continuous batching those of its cache, otherwise those of the call."""
    cache, implementation = keywords.get("cache"), layer.base_config._attn_implementation
    backend = implementation.removeprefix("paged|")
    if "write_index" in keywords:
        paged_cache.check_implementation(backend)
    if cache is None:
        if backend != implementation and "write_index" not in keywords:
            raise ValueError(
                f"attn_implementation={implementation!r} is for continuous batching, but {type(module).__name__} was "
                f"called without its cache: call model.set_attn_implementation({backend!r})."
            )
        return key, value
    if not isinstance(cache, PagedAttentionCache):
        raise ValueError(f"HiFICL does not know the cache that {type(module).__name__} was given: {type(cache)}.")
    return paged_cache.update(cache, cast(int, module.layer_idx), key, value, keywords)


def attach(module: nn.Module, head_shape: HeadShape) -> HiFICLLayer:
    """Give an attention module a HiFICLLayer without adapters, and route its attention calls to this file."""
    config = cast(PreTrainedConfig, module.config)
    layer = HiFICLLayer(config, head_shape)
    module.add_module(MODULE, layer)
    own = copy.copy(config)
    own._attn_implementation_internal = IMPLEMENTATION
    module.config = own
    return layer


def detach(module: nn.Module) -> None:
    """Undo `attach`: remove the layer and give the module its original configuration object back."""
    layer = getattr(module, MODULE)
    module.config = layer.base_config
    delattr(module, MODULE)


AttentionInterface.register(IMPLEMENTATION, hificl_attention_forward)
