"""Finds out whether the adapter that is being attached is about to be loaded, and from where.

PEFT and transformers attach an adapter first and read its weights afterwards.  If reading failed, or the weights did
not fit, a random adapter would be left on the model.  So the weights must be checked before the adapter is attached,
but neither the tuner nor the configuration is told that a load is going on.  Only the call that loads knows: this file
looks for it on the stack.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor
from transformers.utils.hub import extract_commit_hash

from . import checkpoint
from .config import HiFICLConfig

_PEFT = ("peft.peft_model", "PeftModel.from_pretrained"), ("peft.peft_model", "PeftModel.load_adapter")
_TRANSFORMERS = ("transformers.integrations.peft", "PeftAdapterMixin.load_adapter")


class Load(NamedTuple):
    """What a call that loads an adapter is about to load.

    Attributes:
        tensors: the stored tensors.
        ignore_mismatched_sizes: whether tensors of other shapes, unless they are HiFICL's, are to be skipped.
        by_peft: True: PEFT loads, and passes the tensors to the tuner later; False: transformers loads by itself.
    """

    tensors: dict[str, Tensor]
    ignore_mismatched_sizes: bool
    by_peft: bool


def in_progress(config: HiFICLConfig) -> Load | None:
    """The load for which this very configuration object is being attached, with its weights read; None if none is.

    Raises:
        ValueError: there are no weights, or they cannot be read.
    """
    frame = sys._getframe(1)
    while frame is not None:
        function = frame.f_globals.get("__name__"), frame.f_code.co_qualname
        given = frame.f_locals if function in (*_PEFT, _TRANSFORMERS) else {}
        if any(value is config for value in given.values()):
            break
        frame = frame.f_back  # type: ignore[assignment]
    else:
        return None
    if function == _TRANSFORMERS:
        options = given["load_config"]
        tensors = given["adapter_state_dict"]
        if tensors is None:
            download = {} if options.download_kwargs is None else options.download_kwargs
            tensors = checkpoint.read(_folder_of(given["peft_model_id"], download))
        return Load(tensors, options.ignore_mismatched_sizes, by_peft=False)
    options = given["kwargs"]
    folder = _folder_of(given["model_id"], given.get("hf_hub_download_kwargs", options))
    tensors = checkpoint.read(folder, given["key_mapping"])
    return Load(tensors, options.get("ignore_mismatched_sizes", False), by_peft=True)


def _folder_of(path: str | os.PathLike[str], options: dict[str, Any]) -> str:
    """The folder with the weights; `options` are those with which the caller is about to ask the Hub for them, too.

    They are given the commit that was found.  Its file is in the cache by then, so the caller need not ask once more,
    and loads what has been checked, even if somebody pushes in between.
    """
    hub, _ = PeftModel._split_kwargs(options)
    folder = checkpoint.folder_of(path, **hub)
    commit = extract_commit_hash(os.path.join(folder, CONFIG_NAME), None)
    if commit is not None and not os.path.exists(path):
        options["revision"] = commit
        options.pop("force_download", None)
    return folder
