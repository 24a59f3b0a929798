"""Convert a checkpoint of the method's authors (encoder.pth) into an adapter folder.

The file is a dict of tensors that torch has saved: K_learn_A (L, H, n, r) and K_learn_B (L, H, r, d), or K_learn
(L, H, n, d) where the keys were learned whole, and the same for V.  Their shapes are compared with those of the base
model, which is built from its configuration, without weights.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from . import checkpoint
from .config import HiFICLConfig
from .layer import HiFICLLayer

HELP = "convert the authors' encoder.pth into an adapter folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="the file, usually named encoder.pth")
    parser.add_argument("--base", required=True, metavar="MODEL", help="the base model: a folder or its id on the Hub")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder of the adapter, which must be new")
    parser.add_argument(
        "--no-scale-self-attention",
        action="store_true",
        help='it was trained with alpha = 1 ("w/o SA scaling"), of which the file has no trace',
    )


def run(options: argparse.Namespace) -> None:
    convert(options.checkpoint, options.base, options.output, not options.no_scale_self_attention)
    print(f"Saved {options.output}")


def convert(
    file: str | os.PathLike[str], base: str, folder: str | os.PathLike[str], scale_self_attention: bool = True
) -> None:
    """Convert a checkpoint of the method's authors into an adapter folder.

    Args:
        file: the checkpoint.
        base: folder or Hub id of the base model that it was trained on; only its configuration is read.
        folder: where the adapter is saved.
        scale_self_attention: False: it was trained with alpha = 1.

    Raises:
        ValueError: the file is no such checkpoint, or not one of this base model; or the folder is not empty.
        OSError: the file or the configuration cannot be read.
    """
    if os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"{os.fspath(folder)!r} is not empty: give the adapter a new folder.")
    tensors = read(file)
    ranks = [tensor.shape[3] for key, tensor in tensors.items() if key.endswith("_A")]
    config = HiFICLConfig(
        task_type="CAUSAL_LM",
        n=next(tensor.shape[2] for key, tensor in tensors.items() if key in ("K_learn", "K_learn_A")),
        r=ranks[0] if ranks else 1,
        factorize_keys="K_learn_A" in tensors,
        factorize_values="V_learn_A" in tensors,
        scale_self_attention=scale_self_attention,
        inference_mode=True,
    )
    model = get_peft_model(_without_weights(base), config)
    layers = [module for module in model.modules() if isinstance(module, HiFICLLayer)]
    for key, tensor in tensors.items():
        name = f"hificl_{key.replace('_learn', '')}"
        for layer in layers:
            expected = (len(layers), *getattr(layer, name)["default"].weight.shape)
            if tensor.shape != expected:
                raise ValueError(
                    f"{key!r} of {os.fspath(file)!r} has shape {tuple(tensor.shape)}, but for {base!r} it must be "
                    f"{expected}: give the base model that it was trained on."
                )
        for layer, weight in zip(layers, tensor, strict=True):
            getattr(layer, name)["default"].weight = nn.Parameter(weight.clone(), requires_grad=False)
    model.save_pretrained(os.fspath(folder), save_embedding_layers=False)


def read(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, of which nothing but tensors is read.

    Raises:
        ValueError: it cannot be read, or it holds something else.
    """
    name = os.fspath(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what torch raises for a file of another kind depends on its first bytes
        raise ValueError(f"{name!r} is damaged, or holds more than tensors ({type(error).__name__}).") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{name!r} holds {type(tensors).__name__}, not a dict of tensors.")
    whole = [kind for kind in "KV" if f"{kind}_learn" in tensors]
    wanted = {f"{kind}_learn{end}" for kind in "KV" for end in ([""] if kind in whole else ["_A", "_B"])}
    if wanted != tensors.keys():
        raise ValueError(
            f"{name!r} lacks {sorted(wanted - tensors.keys())} and has unexpected "
            f"{sorted(map(str, tensors.keys() - wanted))}: "
            "the authors' checkpoints hold K_learn_A and K_learn_B, or K_learn, and the same for V."
        )
    for key, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (tensor.ndim != 4 or not tensor.is_floating_point()):
            raise ValueError(
                f"{key!r} of {name!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, but must be four "
                "dimensions of floating-point numbers: layers, heads and a matrix."
            )
    checkpoint.check_finite(tensors)
    return dict(tensors)


def _without_weights(base: str) -> PreTrainedModel:
    """The base model on the meta device, with a head for text, as it has where it generates."""
    config = AutoConfig.from_pretrained(base)
    cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model: PreTrainedModel = (
            AutoModelForCausalLM.from_config(config) if cls is None or not cls.can_generate() else cls(config)
        )
    return model
