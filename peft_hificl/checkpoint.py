"""Checks of stored adapters: a file is found wrong before a model is touched, never half-loaded."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import HiFICLConfig

PREFIX = "hificl_"
MODULE = "virtual_pairs"  # the name under which an attention module holds its HiFICLLayer
TOKENS = ".token_adapter.trainable_tokens_delta"  # PEFT's name for the rows that trainable_token_indices trains
_WRAPPERS = re.compile(r"\.(original_module|modules_to_save(\.\w+(?=\.))?|token_adapter|base_layer)(?=\.|$)")

HeadShape = tuple[int, int, int]  # query heads, head dimension of keys, head dimension of values


class Stored(NamedTuple):
    """What an adapter file holds: the head shape of each adapted module, and the shapes of all other tensors."""

    modules: dict[str, HeadShape]
    others: dict[str, tuple[int, ...]] | None  # None: shapes that differ are to be ignored


def read(path: str, **hub_kwargs: Any) -> dict[str, Tensor] | None:
    """The tensors stored at a local path or Hub id; None where there are none.

    Raises:
        ValueError: the file cannot be read.
    """
    folder = os.path.join(path, hub_kwargs.get("subfolder") or "")
    local = any(os.path.exists(os.path.join(folder, name)) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if not local and os.path.isdir(path):
        return None
    try:
        return dict(load_peft_weights(path, device="cpu", **hub_kwargs))
    except Exception as error:
        if not local and isinstance(error, (OSError, ValueError)):
            return None  # not on the Hub, or the Hub is out of reach: the load that follows says so itself
        raise ValueError(
            f"The adapter weights in {folder!r} cannot be read ({type(error).__name__}: {error}). The file is "
            "damaged or incomplete: copy or download it again."
        ) from error


def module_of(key: str) -> str | None:
    """The attention module that a checkpoint key belongs to; None for keys that are not HiFICL's.

    >>> module_of("base_model.model.model.layers.0.self_attn.virtual_pairs.hificl_K_A")
    'model.layers.0.self_attn'
    """
    module, dot, _ = key.rpartition(f".{PREFIX}")
    return module.removeprefix("base_model.model.").removesuffix(f".{MODULE}") if dot else None


def stored_shapes(tensors: Mapping[str, Tensor], config: HiFICLConfig) -> Stored:
    """Check stored tensors against their configuration.

    Raises:
        ValueError: tensors that are missing, superfluous, misshapen or not finite.
    """
    check_finite(tensors)
    modules: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module = module_of(key)
        if module is not None:
            modules[module][key.rpartition(".")[2]] = tuple(tensor.shape)
    if not modules:
        raise ValueError(
            f"The adapter file holds no {PREFIX}* tensors, found {_some(tensors)}: it is not a HiFICL adapter, or its "
            "adapter_config.json belongs to another file."
        )
    for field, present in (
        ("modules_to_save", any(module_of(key) is None for key in tensors)),
        ("trainable_token_indices", any("trainable_tokens" in key for key in tensors)),
    ):
        if getattr(config, field) and not present:
            raise ValueError(
                f"adapter_config.json says {field}={getattr(config, field)!r}, but the adapter file holds no tensors "
                "for it: the two files do not belong together."
            )
    found = {}
    for module, shapes in modules.items():
        expected_names = set(config.parameter_shapes(1, 1, 1))
        check_names(f"Module {module!r} of the adapter file", expected_names, shapes, "adapter_config.json")
        for name, shape in shapes.items():
            if len(shape) != 3:
                raise ValueError(
                    f"Tensor {name} of module {module!r} in the adapter file has shape {shape}, expected three "
                    "dimensions: the file is damaged or not a HiFICL adapter."
                )
        keys = shapes["hificl_K_B" if config.factorize_keys else "hificl_K"]
        values = shapes["hificl_V_B" if config.factorize_values else "hificl_V"]
        heads, key_dim, value_dim = keys[0], keys[2], values[2]
        for name, expected in config.parameter_shapes(heads, key_dim, value_dim).items():
            if shapes[name] != expected:
                raise ValueError(
                    f"Tensor {name} of module {module!r} in the adapter file has shape {shapes[name]}, but "
                    f"adapter_config.json (n={config.n}, r={config.r}) says {expected}: the two files do not belong "
                    "together."
                )
        found[module] = (heads, key_dim, value_dim)
    others = {
        key.removeprefix("base_model.model."): tuple(tensor.shape)
        for key, tensor in tensors.items()
        if module_of(key) is None
    }
    return Stored(found, others)


def check_fits(stored: Stored, targeted: Mapping[str, HeadShape], model: nn.Module, config: HiFICLConfig) -> None:
    """Compare what a file holds with what a model has.

    Raises:
        ValueError: the adapter was made for another base model.
    """
    check_names("The base model", set(stored.modules), targeted, "the adapter file", what="adapted modules")
    for module, shape in stored.modules.items():
        if shape != targeted[module]:
            raise ValueError(
                f"Module {module!r} of the base model has {_words(targeted[module])}, but the adapter was made for "
                f"{_words(shape)}: load it onto the base model it was trained on, or, to train a fresh adapter on "
                "this model, write a new HiFICLConfig instead of loading one."
            )
    if stored.others is not None:
        _check_others(stored.others, model, config)


def _check_others(stored: Mapping[str, tuple[int, ...]], model: nn.Module, config: HiFICLConfig) -> None:
    """Modules saved whole, trained tokens, and embeddings, which PEFT saves too after the vocabulary was resized."""
    embeddings = []
    for side in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):  # not every model has them
            embeddings.append(getattr(model, f"get_{side}_embeddings")())
    names = {_WRAPPERS.sub("", name) for name, module in model.named_modules() if any(module is e for e in embeddings)}
    # PEFT's wrappers may stand around a module of the base model, and save it under their own names besides.
    base = {_WRAPPERS.sub("", key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    ends = tuple(config.modules_to_save or ())
    saved = tuple(f"{_WRAPPERS.sub('', name)}." for name, _ in model.named_modules() if ends and name.endswith(ends))
    whole = {key for key in base if key.startswith(saved)} if saved else set()
    tokens = {key for key in stored if key.endswith(TOKENS) and config.trainable_token_indices is not None}
    resized = {key for key in stored if _WRAPPERS.sub("", key).rpartition(".")[0] in names} - tokens
    check_names(
        "The adapter file", whole, set(stored) - tokens - (resized - whole), "the base model",
        what="tensors beside HiFICL's",
    )  # fmt: skip
    for key in set(stored) - tokens:
        expected = base.get(_WRAPPERS.sub("", key))
        if stored[key] != expected:
            raise ValueError(
                f"Tensor {key!r} of the adapter file has shape {stored[key]}, but the base model asks for {expected}: "
                "load the adapter onto the base model it was trained on (resize_token_embeddings() first, if that was "
                "done), or give PeftModel.from_pretrained ignore_mismatched_sizes=True to leave such tensors out."
            )
    indices = config.trainable_token_indices
    counts = {len(i) for i in (indices.values() if isinstance(indices, dict) else [indices or []])}
    for key in tokens:
        if stored[key][0] not in counts:
            raise ValueError(
                f"Tensor {key!r} of the adapter file has {stored[key][0]} rows, but adapter_config.json says "
                f"trainable_token_indices={indices!r}: the two files do not belong together."
            )


def check_state_dict(state_dict: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Check a state dict, in the model's own keys, against the parameters it is to fill.

    Raises:
        ValueError: tensors that are missing, superfluous, misshapen or not finite.
    """
    found = {key for key in state_dict if f".{PREFIX}" in key}
    check_names("The state dict", set(expected), found, "the adapter in the model")
    for key in found:
        if state_dict[key].shape != expected[key]:
            raise ValueError(
                f"Tensor {key!r} has shape {tuple(state_dict[key].shape)}, but the adapter in the model has "
                f"{tuple(expected[key])}: load it with the HiFICLConfig (n, r) and the base model it was trained with."
            )
    check_finite(state_dict)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        is_number = tensor.is_floating_point() or f".{PREFIX}" not in key
        if not is_number or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"Tensor {key!r} holds values that are not finite numbers (dtype {tensor.dtype}): the training that "
                "made it diverged, or the file is damaged. Use an earlier checkpoint."
            )


def check_names(
    holder: str, expected: set[str], found: Iterable[str], source: str, what: str = "HiFICL tensors"
) -> None:
    found = set(found)
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        parts = ([f"lacks {_some(missing)}"] if missing else []) + ([f"has unexpected {_some(extra)}"] if extra else [])
        raise ValueError(
            f"{holder} {' and '.join(parts)}: its {what} are not those of {source} ({len(expected)} expected, "
            f"{len(found)} found). Use the files and the base model that belong together; to train a fresh adapter, "
            "write a new HiFICLConfig."
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"


def _words(shape: HeadShape) -> str:
    heads, key_dim, value_dim = shape
    dims = (
        f"head dimension {key_dim}"
        if key_dim == value_dim
        else f"head dimensions {key_dim} (keys), {value_dim} (values)"
    )
    return f"{heads} query heads of {dims}"
