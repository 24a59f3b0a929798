"""Registers HiFICL with PEFT, and its parameter names with transformers."""

from __future__ import annotations

import enum
import warnings

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

NAME = "HIFICL"


def add_peft_type() -> None:
    """Add the member ``HIFICL`` to `peft.PeftType`, unless PEFT has one already.

    `register_peft_method` refuses a name that is not in the enum, and PEFT has no public way to extend the enum.  The
    member is made by the standard library's own enum code, so it behaves like any other: it can be looked up by name
    and value, iterated, pickled, copied and written to JSON.
    """
    if NAME not in PeftType.__members__:
        member = enum._proto_member(NAME)  # type: ignore[attr-defined]
        type.__setattr__(PeftType, NAME, member)
        member.__set_name__(PeftType, NAME)


def register(config_cls: type, model_cls: type) -> None:
    """Register HiFICL's classes with PEFT, unless PEFT already has a method of this name, which then stays."""
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[NAME])
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
    elif known is not model_cls:
        warnings.warn(
            f"PEFT already has a method {NAME}, served by {known.__module__}.{known.__qualname__} and "
            f"{PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[NAME]].__qualname__}; peft_hificl leaves it in place, so PEFT's "
            "own classes are used. Uninstall peft-hificl, or import its functions directly.",
            stacklevel=3,
        )


def register_key_renaming() -> None:
    """Let transformers' own `load_adapter` find the parameter ``hificl_K_A.default.weight`` for the key ``hificl_K_A``.

    It renames stored keys by patterns, after which HiFICL's end with the adapter's name (``hificl_K_A.default``).  The
    pattern added here appends ``.weight``.  It goes into the "legacy" mapping, which is applied to every model.
    """
    renaming = WeightRenaming(r"(hificl_[KVW]\w*\.[^.]+)$", r"\1.weight")
    mapping = get_checkpoint_conversion_mapping("legacy") or []
    if not any(known.source_patterns == renaming.source_patterns for known in mapping):
        register_checkpoint_conversion_mapping("legacy", [*mapping, renaming], overwrite=True)
