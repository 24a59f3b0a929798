"""HiFICL inside transformers' attention interface: the one file that knows it.

Every attention module of transformers that dispatches calls ``attention_interface(self, query, key, value, mask,
...)`` with a function looked up by ``self.config._attn_implementation``.  An adapted module gets a shallow copy of its
configuration in which this name is ``"hificl"``, so that `hificl_attention_forward` receives the call, finds the
adapter on the module (its first argument) and mixes the virtual pairs in.

The module's original configuration object is kept on the adapter and stays the live source of the real implementation:
masks are built for it as before, and `model.set_attn_implementation(...)` keeps working.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, create_mask
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.flex_attention import compile_friendly_flex_attention

from . import functional, fused
from .checkpoint import MODULE, HeadShape
from .layer import HiFICLLayer

IMPLEMENTATION = "hificl"
SUPPORTED = ("eager", "sdpa", "flex_attention")
_FLEX_GIVES_LSE = {"cuda"}  # on a CPU, compiled flex_attention cannot return it, and has no backward

# What the attention functions of transformers take; an argument that is not here could change the result unseen.
_KNOWN_ARGUMENTS = {
    "module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "position_bias",
    "sliding_window", "is_causal", "kwargs",
}  # fmt: skip

_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_KEY_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


class Dispatch(NamedTuple):
    """How a class of attention modules reaches its attention function."""

    eager: Callable[..., tuple[Tensor, Tensor | None]]
    interface: AttentionInterface


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
        ValueError: an implementation that is not supported, or heads that differ from those the adapter was made for.
    """
    layer = getattr(module, MODULE, None)
    if layer is None:
        raise ValueError(
            f"{type(module).__name__} runs with attn_implementation={IMPLEMENTATION!r} but has no HiFICL adapter. The "
            f"name is set by attaching an adapter; load the base model with one of {', '.join(SUPPORTED)}."
        )
    implementation = layer.base_config._attn_implementation
    # Only while decoding: an edit behind autograd's back (`parameter.data`) is seen by the next call with more tokens.
    pairs = layer(query.shape[0], reuse=query.shape[2] == 1 and key.shape[2] > 1)
    if layer.recorded is not None:
        layer.recorded.append((key, value))
    if pairs is None:
        dispatch = dispatch_of(type(module))
        attend = dispatch.interface.get_interface(implementation, dispatch.eager)
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        return attend(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)

    check_implementation(implementation, type(module).__name__)
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "adapter_names needs a PeftModel (get_peft_model, PeftModel.from_pretrained), which hands each row its "
            "adapter; a model with adapters added by its own add_adapter() runs the active adapters for every row."
        )
    found = (query.shape[1], query.shape[3], value.shape[3])
    if found != layer.head_shape:
        raise ValueError(
            f"{type(module).__name__} attends with (query heads, key dim, value dim) = {found}, but its HiFICL adapter "
            f"was made for {layer.head_shape}: this attention is not supported; please report it."
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
    if kwargs.get("cache") is not None:
        raise ValueError("HiFICL does not support paged caches (continuous batching): use `generate` as usual.")
    bias = kwargs.get("position_bias")
    options: dict[str, Any] = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
        "dropout": dropout if module.training else 0.0,
    }
    if implementation == "eager":
        output, weights = functional.virtual_attention(
            query, key, value, pairs, mask=attention_mask, bias=bias, **options
        )
        return output.transpose(1, 2).contiguous(), weights.to(query.dtype)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = implementation == "sdpa" and is_causal and attention_mask is None and query.shape[2] > 1
    if is_causal:
        # As in transformers' sdpa: without a mask, the context is the first T keys, causally.
        size = query.shape[2]
        key, value, bias = key[:, :, :size], value[:, :, :size], None if bias is None else bias[..., :size]
    elif implementation == "flex_attention" and _flex_merges(query, pairs, attention_mask, bias, options):
        output = _merged_flex_attention(module, query, key, value, pairs, attention_mask, options["scaling"])
        return output.transpose(1, 2).contiguous(), None
    elif attention_mask is not None and not isinstance(attention_mask, Tensor):
        attention_mask = _dense(attention_mask, query, key)
    elif implementation == "flex_attention" and attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    output = fused.attention(
        query, key, value, pairs, mask=attention_mask, is_causal=is_causal, bias=bias, **options
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _flex_merges(
    query: Tensor, pairs: functional.VirtualPairs, mask: Any, bias: Tensor | None, options: dict[str, Any]
) -> bool:
    """Whether flex_attention can give its log-sum-exp, and that is all the formula needs."""
    whole = fused.needs_formula(pairs, **{name: options[name] for name in ("softcap", "sinks", "dropout")})
    return query.device.type in _FLEX_GIVES_LSE and not isinstance(mask, Tensor) and bias is None and whole is None


def _merged_flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: functional.VirtualPairs,
    block_mask: Any,
    scaling: float,
) -> Tensor:
    heads = query.shape[1]
    grouped = heads & (heads - 1) == 0  # the kernel knows groups where the number of heads is a power of 2
    if not grouped:
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    output, auxiliary = compile_friendly_flex_attention(
        query, key, value, training=module.training, block_mask=block_mask, enable_gqa=grouped, scale=scaling,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return fused.merge(output, auxiliary.lse, query, pairs, scaling=scaling)


def _dense(block_mask: Any, query: Tensor, key: Tensor) -> Tensor:
    """A flex_attention BlockMask as a boolean mask (B, H, T, S)."""
    batch, heads = block_mask.shape[:2]
    return create_mask(block_mask.mask_mod, batch, heads, query.shape[2], key.shape[2], device=query.device)


def attach(module: nn.Module, head_shape: HeadShape) -> HiFICLLayer:
    """Give an attention module an (empty) HiFICLLayer and route its attention calls here."""
    config = cast(PreTrainedConfig, module.config)
    layer = HiFICLLayer(config, head_shape)
    module.add_module(MODULE, layer)
    own = copy.copy(config)
    own._attn_implementation_internal = IMPLEMENTATION
    module.config = own
    return layer


def detach(module: nn.Module) -> None:
    """Undo `attach`: the module has its own configuration object again and no adapter."""
    layer = getattr(module, MODULE)
    module.config = layer.base_config
    delattr(module, MODULE)


def why_unsupported(module: nn.Module) -> str | None:
    """Why HiFICL cannot adapt this module; None if it can."""
    forward = vars(module).get("forward")
    if isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks":
        forward = vars(module).get("_old_forward")  # which accelerate calls
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return "its forward has been replaced, and HiFICL cannot see what the new one does"
    try:
        dispatch = dispatch_of(type(module))
    except TypeError as error:
        return str(error)
    config = getattr(module, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return "it has no transformers configuration to look its attention implementation up in"
    layer = getattr(module, MODULE, None)
    implementation = (layer.base_config if layer is not None else config)._attn_implementation
    if implementation in dispatch.interface._local_mapping:
        return f"its modelling code replaces {implementation!r} by an attention of its own"
    try:
        check_implementation(implementation, type(module).__name__)
        head_shape_of(module)
    except ValueError as error:
        return str(error)
    return None


def check_implementation(implementation: str | None, where: str) -> None:
    if implementation not in SUPPORTED:
        raise ValueError(
            f"HiFICL does not support attn_implementation={implementation!r}, found on {where}; supported are "
            f"{', '.join(SUPPORTED)}. Call model.set_attn_implementation('sdpa')."
        )


# What was read, or the reason why not.  A plain dict: torch.compile looks things up in it, and cannot read sources.
_dispatches: dict[tuple[type[nn.Module], Callable[..., Any]], Dispatch | str] = {}


def dispatch_of(cls: type[nn.Module]) -> Dispatch:
    """Read from the source of a class how it dispatches.

    Raises:
        TypeError: it does not dispatch, or does so in a way that HiFICL could get wrong; the message says how.
    """
    key = cls, cls.forward  # somebody may put another forward on the class
    if key not in _dispatches:
        try:
            _dispatches[key] = _read_dispatch(cls)
        except TypeError as error:
            _dispatches[key] = str(error)
    dispatch = _dispatches[key]
    if isinstance(dispatch, str):
        raise TypeError(dispatch)
    return dispatch


def _read_dispatch(cls: type[nn.Module]) -> Dispatch:
    forward: Any = cls.forward
    while hasattr(forward, "__wrapped__"):
        # functools.wraps copies __module__, but not this.
        if forward.__globals__["__name__"].partition(".")[0] not in ("transformers", "torch"):
            raise TypeError(f"the forward of {cls.__name__} has been wrapped, and HiFICL cannot see what that does")
        forward = forward.__wrapped__
    tree = _source_of(forward)
    lookups = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get_interface"
    ]
    if len(lookups) != 1 or ast.unparse(lookups[0].args[0]) != "self.config._attn_implementation":
        raise TypeError(
            f"{cls.__name__} does not compute its attention through transformers' attention interface "
            "(ALL_ATTENTION_FUNCTIONS.get_interface)"
        )
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    holder = [ast.unparse(node.targets[0]) for node in assignments if node.value is lookups[0]]
    if sum(ast.unparse(node.targets[0]) in holder for node in assignments) > 1:
        raise TypeError(f"{cls.__name__} may exchange the attention function that it has looked up")
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for node in ast.walk(_source_of(base)):
            # With "hificl" in the place of "sdpa", it would take another path (leave out a sparse mask, say).
            if isinstance(node, ast.Compare) and "_attn_implementation" in ast.unparse(node):
                literals = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                if literals & {"sdpa", "flex_attention"}:
                    raise TypeError(
                        f"{cls.__name__} behaves differently depending on the attention implementation's name"
                    )
    eager = forward.__globals__.get(ast.unparse(lookups[0].args[1]))
    interface = forward.__globals__.get(ast.unparse(lookups[0].func.value))  # type: ignore[attr-defined]
    if eager is None or interface is None:
        raise TypeError(f"{cls.__name__} keeps its attention functions where HiFICL cannot see them")
    unknown = set(inspect.signature(eager).parameters) - _KNOWN_ARGUMENTS
    if unknown:
        raise TypeError(f"the attention function of {cls.__name__} takes {sorted(unknown)}, which HiFICL does not know")
    return Dispatch(eager, interface)


def _source_of(thing: Callable[..., Any]) -> ast.Module:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):
        raise TypeError(f"the source of {thing.__qualname__} cannot be read") from None


def head_shape_of(module: nn.Module) -> HeadShape:
    """Query heads and head dimensions of an attention module, as the module itself states them.

    Raises:
        ValueError: it does not state them.
    """
    config = module.config

    def first(*candidates: tuple[object, tuple[str, ...]]) -> int | None:
        for holder, names in candidates:
            for name in names:
                value = getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    heads = first((module, _HEADS), (config, _HEADS))
    key_dim = first((module, _KEY_DIM), (config, ("head_dim",)))
    value_dim = first((module, ("v_head_dim",))) or key_dim
    if heads is None or key_dim is None or value_dim is None:
        raise ValueError(f"{type(module).__name__} does not state its number of heads and head dimension")
    return heads, key_dim, value_dim


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """What an attention module computes in, as its own weights say, which may be quantised or kept elsewhere."""
    adapters: list[Tensor] = list(getattr(module, MODULE, nn.Module()).parameters())
    own: list[Tensor] = [tensor for tensor in module.parameters() if not any(tensor is other for other in adapters)]
    # Without parameters, quantised weights are buffers, or FSDP has flattened the module.
    tensors = own or [*module.buffers(), *adapters]
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dtype.itemsize > 1]
    tensor = next(iter([*floating, *tensors]), torch.empty(0))
    device, dtype = tensor.device, tensor.dtype if floating else torch.get_default_dtype()
    for submodule in module.modules():
        compute_dtype = getattr(submodule, "compute_dtype", None)  # bitsandbytes' 4-bit linear layers
        if isinstance(compute_dtype, torch.dtype):
            dtype = compute_dtype
        for hook in accelerate_hooks(submodule):
            execution_device = getattr(hook, "execution_device", None)
            if device.type == "meta" and execution_device is not None:
                device = torch.device(execution_device)
    return device, dtype


def accelerate_hooks(module: nn.Module) -> list[Any]:
    """What accelerate does before and after each forward of this module, to offload it for one."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


AttentionInterface.register(IMPLEMENTATION, hificl_attention_forward)
