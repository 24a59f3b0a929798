"""Whether HiFICL can adapt an attention module, and why not: read from the source of its class and its surroundings.

If a module does not compute its attention through transformers' attention interface, an adapter on it would be ignored
without a word.  So this is checked before an adapter is attached; what can change later is checked on every call.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.eager_paged import eager_paged_attention_forward
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import sharding
from .backends import BACKENDS, FLASH, backend_of, flash_package
from .names import MODULE, HeadShape

# transformers' function for each implementation, whose results HiFICL computes; None: that of the modelling file.
_OWN = {name: backend.own for name, backend in BACKENDS.items()} | {"paged|eager": eager_paged_attention_forward}

# The arguments of attention functions that HiFICL takes into account; any other could change the result unnoticed.
_KNOWN_ARGUMENTS = {
    "module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "position_bias",
    "sliding_window", "is_causal", "kwargs",
}  # fmt: skip

_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_KEY_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


class Dispatch(NamedTuple):
    """How a class of attention modules reaches its attention function.

    Attributes:
        interface: where it looks the function up.
        eager: its function for "eager" at the time when the class was read.
        namespace: the globals of its modelling file, where that function is looked up again on every call.
        eager_name: the name of that function there.
    """

    interface: AttentionInterface
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    namespace: dict[str, Any]
    eager_name: str

    def function_of(self, implementation: str | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The function that the attention would call without an adapter."""
        return self.interface.get_interface(implementation, self.namespace[self.eager_name])


def why_unsupported(module: nn.Module) -> str | None:
    """Why HiFICL cannot adapt this module; None if it can."""
    forward = vars(module).get("forward")
    if isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks":
        forward = vars(module).get("_old_forward")  # which accelerate's forward calls
    if getattr(forward, "__module__", None) == "transformers.distributed.tensor_parallel":
        forward = None  # it runs the class's own, with this rank's part of the module's parameters
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
    try:
        check_implementation(implementation, type(module).__name__)
        head_shape_of(module)
    except ValueError as error:
        return str(error)
    return why_replaced(dispatch, implementation)


def why_replaced(dispatch: Dispatch, implementation: str) -> str | None:
    """Why the attention that a module would run without an adapter is not the one that HiFICL computes; None if it is.

    This is checked on every call, as functions can be replaced at any time: DeepSpeed's Ulysses registers its own for
    "sdpa" when accelerate prepares a model, and torch's context parallelism patches `scaled_dot_product_attention`.
    Both compute what transformers' own does, over tokens that ranks share; HiFICL knows either, but not both at once.
    """
    if implementation == "paged|sdpa":  # of transformers before 5.19
        implementation = "sdpa"
    found, own = dispatch.function_of(implementation), _own(dispatch, implementation)
    if found is not own and exchange_of(dispatch, implementation) is None:
        if dispatch.interface is not ALL_ATTENTION_FUNCTIONS and implementation in dispatch.interface._local_mapping:
            return f"its modelling code replaces {implementation!r} by an attention of its own"
        return (
            f"{_name_of(found)} has taken the place of transformers' own attention function {implementation!r}, as "
            "attention packages do, and HiFICL does not know what it computes. Run without it"
        )
    if implementation == "sdpa":
        patched = torch.nn.functional.scaled_dot_product_attention
        # transformers' exporters replace it by an equivalent function, and an export uses the formula anyway.
        if (
            patched is not torch._C._nn.scaled_dot_product_attention
            and (found is not own or sharding.ring_in(patched) is None)
            and not (torch.compiler.is_exporting() and patched.__module__.startswith("transformers.exporters."))
        ):
            return (
                f"torch.nn.functional.scaled_dot_product_attention has been replaced by {_name_of(patched)}, as "
                "attention packages do, and HiFICL does not know what it computes. Run without it"
            )
    return None


def exchange_of(dispatch: Dispatch, implementation: str) -> sharding.Exchange | sharding.Ring | None:
    """How ranks share the tokens of an attention of an implementation; None if they do not."""
    if implementation != "sdpa":
        return None
    own = _OWN[implementation]
    found, patched = dispatch.function_of(implementation), torch.nn.functional.scaled_dot_product_attention
    if found is not own:
        return sharding.exchange_in(found, own)
    return None if patched is torch._C._nn.scaled_dot_product_attention else sharding.ring_in(patched)


def _own(dispatch: Dispatch, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' function for an implementation, whose results HiFICL computes."""
    if implementation not in _OWN and backend_of(implementation) is FLASH:
        return flash_attention_forward
    return _OWN.get(implementation) or dispatch.eager


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"


def check_implementation(implementation: str | None, where: str) -> None:
    backend = None if implementation is None else backend_of(implementation.removeprefix("paged|"))
    if implementation is None or backend is None:
        raise ValueError(
            f"HiFICL does not support attn_implementation={implementation!r}, found on {where}; supported are "
            f"{', '.join(BACKENDS)}, and flash attention packages that transformers has loaded. Call "
            "model.set_attn_implementation('sdpa')."
        )
    if backend is FLASH:
        flash_package(implementation, where)


def check_backend(module: nn.Module, dispatch: Dispatch, implementation: str) -> None:
    """Raise a ValueError if HiFICL does not compute what this implementation does."""
    check_implementation(implementation, type(module).__name__)
    replaced = why_replaced(dispatch, implementation)
    if replaced is not None:
        raise ValueError(
            f"HiFICL cannot mix its virtual pairs into the attention of {type(module).__name__}: {replaced}."
        )


# What was read of each class, or why it cannot be adapted.  Filled before torch.compile traces a call: it can trace a
# lookup in a plain dict, but not the reading of sources.
_dispatches: dict[tuple[type[nn.Module], Callable[..., Any]], Dispatch | str] = {}


def dispatch_of(cls: type[nn.Module]) -> Dispatch:
    """How a class reaches its attention function, read from its source.

    Raises:
        TypeError: it does not use the attention interface, or in a way that HiFICL could get wrong.
    """
    key = cls, cls.forward  # the forward too, as it may be replaced on the class
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
            # With "hificl" as the name instead of "sdpa", it would take another path (without its sparse mask, say).
            if isinstance(node, ast.Compare) and "_attn_implementation" in ast.unparse(node):
                literals = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                if literals & {"sdpa", "flex_attention"}:
                    raise TypeError(
                        f"{cls.__name__} behaves differently depending on the attention implementation's name"
                    )
    eager_name = ast.unparse(lookups[0].args[1])
    eager = forward.__globals__.get(eager_name)
    interface = forward.__globals__.get(ast.unparse(lookups[0].func.value))  # type: ignore[attr-defined]
    if eager is None or interface is None:
        raise TypeError(f"{cls.__name__} keeps its attention functions where HiFICL cannot see them")
    origin = eager.__globals__["__name__"]  # functools.wraps copies __module__, but not this
    if origin != forward.__globals__["__name__"] and not origin.startswith("transformers."):
        raise TypeError(f"{_name_of(eager)} has taken the place of the eager attention function of {cls.__name__}")
    unknown = set(inspect.signature(eager).parameters) - _KNOWN_ARGUMENTS
    if unknown:
        raise TypeError(f"the attention function of {cls.__name__} takes {sorted(unknown)}, which HiFICL does not know")
    return Dispatch(interface, eager, forward.__globals__, eager_name)


def _source_of(thing: Callable[..., Any]) -> ast.Module:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):
        raise TypeError(f"the source of {thing.__qualname__} cannot be read") from None


def head_shape_of(module: nn.Module) -> HeadShape:
    """Heads and head dimensions of an attention module, from its attributes or its configuration.

    transformers' attention functions read from the module, too, how many query heads share a key/value head.

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
    # 0 where a configuration states fewer query heads than key/value heads: the first call will tell.
    per_group = getattr(module, "num_key_value_groups", 1) or 1
    return HeadShape(heads, key_dim, value_dim, groups=heads // per_group)
