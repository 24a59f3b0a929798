"""Takes an adapter off a model again, after an error while it was attached or loaded."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from . import continuous_batching, hooks, interface, offloading
from .layer import HiFICLLayer


class Undo:
    """Remembers a model before an adapter is attached, and restores it when called.

    As a context manager, it restores the model if the block raises.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model, self.adapter_name = model, adapter_name
        self.modules = set(model.modules())
        self.requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        tuned = (m for m in self.modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
        self.active = {module: module._active_adapter for module in tuned}

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self()

    def __call__(self) -> None:
        for parent in self.modules:
            for name, child in list(parent.named_children()):
                if child not in self.modules and isinstance(child, HiFICLLayer):
                    interface.detach(parent)
                elif child not in self.modules and isinstance(child, AuxiliaryTrainingWrapper):
                    setattr(parent, name, child.original_module)
        for module, names in self.active.items():
            module._active_adapter = names
            if isinstance(module, HiFICLLayer):
                module.delete_adapter(self.adapter_name)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(self.adapter_name, names)
                module._active_adapter = names
        hooks.refresh(self.model)
        if not any(isinstance(module, HiFICLLayer) for module in self.model.modules()):
            continuous_batching.unguard(self.model)
        offloading.note_in_device_map(self.model)
        for parameter, value in self.requires_grad.items():
            parameter.requires_grad = value
