"""Module paths of before 0.1.0, which go on working, with a warning, until 0.2."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

_MOVED = {
    "attention": ("interface", "backends", "support"),
    "functional": ("ops.formula",),
    "fused": ("ops.merged",),
    "kernels": ("ops.kernels",),
}


class _Moved(ModuleType):
    """A module whose names are found in others."""

    def __getattr__(self, name: str) -> Any:
        package, _, old = self.__name__.rpartition(".")
        if name.startswith("__"):  # what the import system asks for
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
    """Let `import peft_hificl.functional` and its like find the modules that their contents have moved to."""
    for old in _MOVED:
        module = sys.modules[f"{package}.{old}"] = _Moved(f"{package}.{old}")
        setattr(sys.modules[package], old, module)
