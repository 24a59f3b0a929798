"""Module paths from before 0.1.0, which still work, with a DeprecationWarning, until 0.2."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

_MOVED = {
    "attention": ("interface", "backends", "support"),
    "functional": ("ops.formula",),
    "fused": ("ops.merged", "ops.calls"),
    "kernels": ("ops.kernels",),
}


class _Moved(ModuleType):
    """A module that looks its names up in the modules that they have moved to."""

    def __getattr__(self, name: str) -> Any:
        package, _, old = self.__name__.rpartition(".")
        if name.startswith("__"):  # such as __path__, which the import system asks for
            raise AttributeError(name)
        for new in _MOVED[old]:
            module = importlib.import_module(f"{package}.{new}")
            if hasattr(module, name):
                warnings.warn(
                    f"{self.__name__}.{name} has moved to {module.__name__}.{name}; the old path goes in 0.2.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def keep_paths(package: str) -> None:
    """Make the old paths importable, as in `from peft_hificl.functional import virtual_attention`."""
    for old in _MOVED:
        module = sys.modules[f"{package}.{old}"] = _Moved(f"{package}.{old}")
        setattr(sys.modules[package], old, module)
