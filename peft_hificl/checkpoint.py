"""Reading stored adapters, and checking them before the model is changed, so that none is ever half-loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import Tensor, nn

from .config import HiFICLConfig
from .dry_run import Saved
from .names import PREFIX, module_of, plain

TOKENS = ".token_adapter.trainable_tokens_delta"  # PEFT's name for the rows that trainable_token_indices trains
# By task type, the heads that PEFT adds to modules_to_save whether the model has them or not.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# What PEFT's wrappers around modules of the base model add to the names of parameters.
_WRAPPERS = re.compile(r"\.(original_module|modules_to_save(\.\w+(?=\.))?|token_adapter|base_layer)(?=\.|$)")


def folder_of(path: str | os.PathLike[str], *, subfolder: str | None = None, **options: Any) -> str:
    """The folder with the weights of a stored adapter: a local one, or of the Hub's cache, once downloaded.

    Args:
        path: a local path, or an id on the Hub.
        subfolder: where in it the adapter is.
        options: of `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: there are no weights.  Where the Hub refuses or is out of reach, its own error is raised.
    """
    path = os.fspath(path)
    folder = os.path.join(path, subfolder or "")
    files = [os.path.join(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    if any(os.path.exists(file) for file in files):
        return folder
    if os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        broken = [file for file in files if os.path.islink(file)]
        found = f"{os.path.basename(broken[0])} is a link to a file that is gone" if broken else "no weights"
        raise ValueError(
            f"The folder {folder!r} holds {CONFIG_NAME} but {found}: copy {SAFETENSORS_WEIGHTS_NAME} beside it, or "
            "save the adapter again."
        )
    try:
        file = hf_hub_download(path, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **options)
    except EntryNotFoundError:
        try:
            file = hf_hub_download(path, WEIGHTS_NAME, subfolder=subfolder, **options)
        except RemoteEntryNotFoundError as error:
            raise ValueError(
                f"There is no {SAFETENSORS_WEIGHTS_NAME} in {folder!r} on the Hub: push the adapter again, or give the "
                "revision or subfolder that has it."
            ) from error
    return os.path.dirname(file)


def read(folder: str, key_mapping: dict[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors stored in a folder (`folder_of`), under the names that PEFT's `key_mapping` gives them.

    Raises:
        ValueError: they cannot be read.
    """
    try:
        return dict(load_peft_weights(folder, device="cpu", key_mapping=key_mapping))
    except Exception as error:
        raise ValueError(
            f"The adapter weights in {folder!r} cannot be read ({type(error).__name__}: {error}). The file is "
            "damaged or incomplete: copy or download it again."
        ) from error


def on_other_stages(modules: Iterable[str], model: nn.Module) -> set[str]:
    """Those of an adapter's modules that are missing here because the model is one stage of a pipeline.

    A stage still has the configuration of the whole model.  So a layer is on another stage if its number is below
    `num_hidden_layers` of the configuration, but the model has no such layer, or one without parameters in its place.

    Raises:
        ValueError: the stage has renumbered its layers, so that the stored names would mean other layers.
    """
    # A module may be in several places, as the layers of a model that runs one layer several times.
    here = {plain(name): module for name, module in model.named_modules(remove_duplicate=False)}
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


def check_fits(stored: Mapping[str, Tensor], saved: Saved, model: nn.Module, config: HiFICLConfig) -> None:
    """Compare the tensors of a file with those that PEFT would save if the adapter were attached to this model.

    Names and shapes must be the same, with three exceptions.  If the model is a stage of a pipeline, tensors of other
    stages are left out.  Embeddings may be in the file or not.  So may the heads of a task: PEFT adds them to
    `modules_to_save` when it makes a model for that task, but not when transformers attaches the adapter.

    Args:
        stored: the tensors of the file.
        saved: the result of `dry_run.saved_shapes`.
        model: the base model.
        config: the adapter's configuration.

    Raises:
        ValueError: tensors that are missing, superfluous, misshapen or not finite.
    """
    check_finite(stored)
    shapes = {_comparable(key): tensor.shape for key, tensor in stored.items()}
    heads = tuple(
        f"{name}." for name, _ in model.named_modules() if name.endswith(HEADS.get(config.task_type or "", ()))
    )
    state = model.state_dict()
    optional = {_WRAPPERS.sub("", key): tensor.shape for key, tensor in state.items() if key.startswith(heads)}
    optional |= {_comparable(key): shape for key, shape in saved.embeddings.items()}
    elsewhere = on_other_stages({module for key in shapes if (module := module_of(key))}, model)
    if elsewhere:
        here = {_WRAPPERS.sub("", key) for key in state}
        shapes = {
            key: shape
            for key, shape in shapes.items()
            if (_WRAPPERS.sub("", key) in here if (module := module_of(key)) is None else module not in elsewhere)
        }
    expected = {key: optional[key] for key in shapes if key in optional}
    expected |= {_comparable(key): shape for key, shape in saved.always.items()}
    adapter = f"this adapter (n={config.n}, r={config.r}, heads={config.heads!r}) on {type(model).__name__}"
    check_names("The adapter file", set(expected), shapes, adapter, what="tensors")
    check_shapes("the adapter file", shapes, expected, adapter)


def _comparable(key: str) -> str:
    """A key without what a PeftModel adds to it and, if it is HiFICL's, without what torch.compile adds."""
    return plain(key) if module_of(key) else key.removeprefix("base_model.model.")


def check_state_dict(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, torch.Size], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Check a state dict, whose keys are those of the model, against the parameters that it will be copied into.

    Args:
        state_dict: the tensors to load.
        expected: the shapes of HiFICL's parameters.
        dtypes: the dtypes of all parameters.

    Raises:
        ValueError: tensors that are missing, superfluous, misshapen, not finite, or beyond the range of the dtype.
    """
    found = {key: tensor.shape for key, tensor in state_dict.items() if f".{PREFIX}" in key}
    check_names("The state dict", set(expected), found, "the adapter in the model")
    check_finite(state_dict)
    check_shapes("the state dict", found, expected, "the adapter in the model")
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
    """Raise a ValueError for a tensor without elements, which would be saved empty without a word."""
    empty = [key for key, tensor in state_dict.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(
            f"{_some(empty)} would be saved empty: DeepSpeed ZeRO-3 (or FSDP) keeps them in parts, on several ranks. "
            "Give save_pretrained the whole state dict, state_dict=accelerator.get_state_dict(model), or save within "
            "deepspeed.zero.GatheredParameters(list(model.parameters()))."
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for what is not a tensor, is not finite, or is HiFICL's and not of floating-point numbers."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{key!r} is not a tensor but {type(tensor).__name__}: the file holds more than an adapter. Keep the "
                "tensors alone, or save the adapter again with save_pretrained."
            )
        finite = tensor.is_floating_point() or f".{PREFIX}" not in key
        if finite:
            try:
                # isfinite is not implemented for float8.
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


def check_shapes(
    holder: str, shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], source: str
) -> None:
    for key, shape in shapes.items():
        if shape != expected[key]:
            remedy = (
                "load it with the HiFICLConfig (n, r, heads) and onto the base model that it was trained with; to "
                "train a fresh adapter, write a new HiFICLConfig instead of loading one."
                if module_of(key)
                else "load it onto the base model it was trained on (resize_token_embeddings() first, if that was "
                "done), or load it with ignore_mismatched_sizes=True to leave such tensors out."
            )
            raise ValueError(
                f"Tensor {key!r} of {holder} has shape {tuple(shape)}, but that of {source} has "
                f"{tuple(expected[key])}: {remedy}"
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"
