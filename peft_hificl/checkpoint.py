"""Checks of stored adapters: a file is found wrong before a model is touched, never half-loaded."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import HiFICLConfig

PREFIX = "hificl_"
MODULE = "virtual_pairs"  # the name under which an attention module holds its HiFICLLayer
TOKENS = ".token_adapter.trainable_tokens_delta"  # PEFT's name for the rows that trainable_token_indices trains
# Heads that PEFT adds to modules_to_save, whether a model has them or not.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_WRAPPERS = re.compile(r"\.(original_module|modules_to_save(\.\w+(?=\.))?|token_adapter|base_layer)(?=\.|$)")

HeadShape = tuple[int, int, int]  # query heads, head dimension of keys, head dimension of values


class Stored(NamedTuple):
    """What an adapter file holds: the head shape of each adapted module, and the shapes of all other tensors."""

    modules: dict[str, HeadShape]
    others: dict[str, tuple[int, ...]] | None  # None: shapes that differ are to be ignored


def read(path: str | os.PathLike[str], **options: Any) -> dict[str, Tensor]:
    """The tensors stored at a local path or Hub id; `options` are those of `peft.utils.load_peft_weights`.

    Raises:
        ValueError: there is no file, or it cannot be read.
    """
    folder = os.path.join(path, options.get("subfolder") or "")
    files = [os.path.join(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    local = any(os.path.exists(file) for file in files)
    if not local and os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        broken = [file for file in files if os.path.islink(file)]
        found = f"{os.path.basename(broken[0])} is a link to a file that is gone" if broken else "no weights"
        raise ValueError(
            f"The folder {folder!r} holds {CONFIG_NAME} but {found}: copy {SAFETENSORS_WEIGHTS_NAME} beside it, or "
            "save the adapter again."
        )
    try:
        return dict(load_peft_weights(os.fspath(path), device="cpu", **options))
    except Exception as error:
        if not local and isinstance(error, (OSError, ValueError)):
            raise  # not on the Hub, or the Hub is out of reach: it says so itself
        raise ValueError(
            f"The adapter weights in {folder!r} cannot be read ({type(error).__name__}: {error}). The file is "
            "damaged or incomplete: copy or download it again."
        ) from error


def uncompiled(name: str) -> str:
    """The name of a module, parameter or tensor without what torch.compile puts into it."""
    return name.replace("._orig_mod", "")


def plain(name: str) -> str:
    """The name of a module, parameter or tensor without what torch.compile and a PeftModel put into it."""
    return uncompiled(name).removeprefix("base_model.model.")


def module_of(key: str) -> str | None:
    """The attention module that a checkpoint key belongs to; None for keys that are not HiFICL's.

    >>> module_of("base_model.model.model.layers.0.self_attn.virtual_pairs.hificl_K_A")
    'model.layers.0.self_attn'
    """
    module, dot, _ = key.rpartition(f".{PREFIX}")
    return plain(module).removesuffix(f".{MODULE}") if dot else None


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
            "configuration belongs to another file."
        )
    for field, present in (
        ("modules_to_save", any(module_of(key) is None for key in tensors)),
        ("trainable_token_indices", any("trainable_tokens" in key for key in tensors)),
    ):
        if getattr(config, field) and not present:
            raise ValueError(
                f"The configuration says {field}={getattr(config, field)!r}, but the adapter file holds no tensors for "
                "it: the two do not belong together."
            )
    found = {}
    for module, shapes in modules.items():
        expected_names = set(config.parameter_shapes(1, 1, 1))
        check_names(f"Module {module!r} of the adapter file", expected_names, shapes, "the configuration")
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
                    f"Tensor {name} of module {module!r} in the adapter file has shape {shapes[name]}, but the "
                    f"configuration (n={config.n}, r={config.r}) says {expected}: the two do not belong together."
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

    A stage of a pipeline has a part of the modules, and takes that part.

    Raises:
        ValueError: the adapter was made for another base model.
    """
    elsewhere = on_other_stages(stored.modules, model)
    check_names("The base model", set(stored.modules) - elsewhere, targeted, "the adapter file", what="adapted modules")
    for module, shape in targeted.items():
        if stored.modules[module] != shape:
            raise ValueError(
                f"Module {module!r} of the base model has {_words(shape)}, but the adapter was made for "
                f"{_words(stored.modules[module])}: load it onto the base model it was trained on, or, to train a "
                "fresh adapter on this model, write a new HiFICLConfig instead of loading one."
            )
    if stored.others is not None:
        others = stored.others
        if elsewhere:
            here = {_WRAPPERS.sub("", key) for key in model.state_dict()}
            others = {key: shape for key, shape in others.items() if _WRAPPERS.sub("", key) in here}
        _check_others(others, model, config)


def on_other_stages(modules: Iterable[str], model: nn.Module) -> set[str]:
    """Those of an adapter's modules that the model, a stage of a pipeline, has left to other stages.

    A stage differs from another model in that its configuration counts more layers than it has: a layer that is within
    the count, but gone or replaced by something without parameters, is on another stage.

    Raises:
        ValueError: the stage gave its layers new numbers, so that their names mean other layers.
    """
    here = {plain(name): module for name, module in model.named_modules()}
    elsewhere, containers = set(), set()
    for name in modules:
        layer = re.match(r"((?:.*?\.)?)(\d+)\.", name)
        if layer is None or next(here.get(layer[0][:-1], nn.Identity()).parameters(), None) is not None:
            continue
        rest = [module for other, module in here.items() if other.startswith(layer[1])]
        count = max((getattr(getattr(m, "config", None), "num_hidden_layers", None) or 0 for m in rest), default=0)
        if int(layer[2]) < count:
            elsewhere.add(name)
            containers.add(layer[1])
    for name, module in here.items():
        for container in containers:
            number = name.removeprefix(container).partition(".")[0]
            index = getattr(module, "layer_idx", None)
            if name.startswith(container) and number.isdigit() and isinstance(index, int) and index != int(number):
                raise ValueError(
                    f"{name!r} is layer {index} of the model: it has been given another number, so that the stored "
                    "adapter cannot be told apart by names. Keep the numbers of the layers when you split the model "
                    "into stages: put nn.Identity() in the place of those that are on other stages."
                )
    return elsewhere


def _check_others(stored: Mapping[str, tuple[int, ...]], model: nn.Module, config: HiFICLConfig) -> None:
    """Modules saved whole, trained tokens, and embeddings, which PEFT saves too after the vocabulary was resized."""
    embeddings = []
    for side in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):  # not every model has them
            embeddings.append(getattr(model, f"get_{side}_embeddings")())
    modules = model.named_modules()
    names = {_WRAPPERS.sub("", name) for name, module in modules if any(module is e for e in embeddings)}
    # PEFT's wrappers may stand around a module of the base model, and save it under their own names besides.
    base = {_WRAPPERS.sub("", key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}

    def below(ends: tuple[str, ...]) -> set[str]:
        tops = tuple(f"{_WRAPPERS.sub('', n)}." for n, _ in model.named_modules() if ends and n.endswith(ends))
        return {key for key in base if key.startswith(tops)} if tops else set()

    whole = below(tuple(config.modules_to_save or ()))
    heads = below(tuple(HEADS.get(config.task_type or "", ())))  # the configuration may not name them yet
    tokens = {key for key in stored if key.endswith(TOKENS) and config.trainable_token_indices is not None}
    resized = {key for key in stored if _WRAPPERS.sub("", key).rpartition(".")[0] in names} - tokens
    check_names(
        "The adapter file", whole, set(stored) - tokens - ((resized | heads) - whole), "the base model",
        what="tensors beside HiFICL's",
    )  # fmt: skip
    for key in set(stored) - tokens:
        expected = base.get(_WRAPPERS.sub("", key))
        if stored[key] != expected:
            raise ValueError(
                f"Tensor {key!r} of the adapter file has shape {stored[key]}, but the base model asks for {expected}: "
                "load the adapter onto the base model it was trained on (resize_token_embeddings() first, if that was "
                "done), or load it with ignore_mismatched_sizes=True to leave such tensors out."
            )
    indices = config.trainable_token_indices
    counts = {len(i) for i in (indices.values() if isinstance(indices, dict) else [indices or []])}
    for key in tokens:
        if stored[key][0] not in counts:
            raise ValueError(
                f"Tensor {key!r} of the adapter file has {stored[key][0]} rows, but the configuration says "
                f"trainable_token_indices={indices!r}: the two do not belong together."
            )


def check_state_dict(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, torch.Size], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Check a state dict, in the model's own keys, against the parameters it is to fill.

    Args:
        state_dict: what is to be loaded.
        expected: the shapes of HiFICL's parameters.
        dtypes: the dtypes of all parameters.

    Raises:
        ValueError: tensors that are missing, superfluous, misshapen, not finite, or not within the range of the dtype.
    """
    found = {key for key in state_dict if f".{PREFIX}" in key}
    check_names("The state dict", set(expected), found, "the adapter in the model")
    check_finite(state_dict)
    for key in found:
        if state_dict[key].shape != expected[key]:
            raise ValueError(
                f"Tensor {key!r} has shape {tuple(state_dict[key].shape)}, but the adapter in the model has "
                f"{tuple(expected[key])}: load it with the HiFICLConfig (n, r) and the base model it was trained with."
            )
    for key, tensor in state_dict.items():
        dtype = dtypes.get(key, tensor.dtype)
        if dtype == tensor.dtype or not dtype.is_floating_point:
            continue
        beyond = ~torch.isfinite(tensor.to(dtype))
        if beyond.any():
            raise ValueError(
                f"Tensor {key!r} ({tensor.dtype}) holds {tensor[beyond][0].item():.4g}, which the parameter's "
                f"{dtype} cannot hold: load the base model in a dtype with a wider range, or PeftModel with "
                "autocast_adapter_dtype=True, under which an adapter is float32."
            )


def check_whole(state_dict: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for a tensor without elements: it would be saved so, in silence."""
    empty = [key for key, tensor in state_dict.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(
            f"{_some(empty)} would be saved empty: DeepSpeed ZeRO-3 (or FSDP) keeps them in parts, on several ranks. "
            "Give save_pretrained the whole state dict, state_dict=accelerator.get_state_dict(model), or save within "
            "deepspeed.zero.GatheredParameters(list(model.parameters()))."
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for what is not a tensor of finite numbers."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{key!r} is not a tensor but {type(tensor).__name__}: the file holds more than an adapter. Keep the "
                "tensors alone, or save the adapter again with save_pretrained."
            )
        finite = tensor.is_floating_point() or f".{PREFIX}" not in key
        if finite:
            try:
                # float8 can be converted, but not tested
                finite = bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())
            except (RuntimeError, NotImplementedError) as error:
                raise ValueError(f"Tensor {key!r} cannot be read as numbers ({tensor.dtype}): {error}") from error
        if not finite:
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
