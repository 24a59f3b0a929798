"""Which call is about to load the adapter that is being attached.

PEFT and transformers attach an adapter first, read its weights afterwards, and tell neither its configuration nor its
tuner that they will.  An error in between would leave a random adapter on the model, and what a file says of its shapes
would come too late.  The one thing that knows is the call itself, on the stack.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from peft import PeftModel
from torch import Tensor

from . import checkpoint
from .config import HiFICLConfig

_PEFT = ("peft.peft_model", "PeftModel.from_pretrained"), ("peft.peft_model", "PeftModel.load_adapter")
_TRANSFORMERS = ("transformers.integrations.peft", "PeftAdapterMixin.load_adapter")


class Load(NamedTuple):
    """What a call that loads an adapter is about to load."""

    tensors: dict[str, Tensor]
    ignore_mismatched_sizes: bool
    by_peft: bool  # PEFT hands the tuner what it has read; transformers does not


def in_progress(config: HiFICLConfig) -> Load | None:
    """The load that attaches an adapter of this very configuration object, its weights read; None if there is none.

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
            hub, _ = PeftModel._split_kwargs(options.download_kwargs or {})
            tensors = checkpoint.read(given["peft_model_id"], **hub)
        return Load(tensors, options.ignore_mismatched_sizes, by_peft=False)
    hub, others = PeftModel._split_kwargs({**given["kwargs"], **given.get("hf_hub_download_kwargs", {})})
    tensors = checkpoint.read(given["model_id"], key_mapping=given["key_mapping"], **hub)
    return Load(tensors, others.get("ignore_mismatched_sizes", False), by_peft=True)
