"""Warnings, each given once, about adapters that have no effect or get no gradient.

Two faults outside of this package would go unnoticed otherwise.  The `forward` of an attention, or of a module around
it, may be replaced after the adapter was attached, so that the adapter is never called.  And a kernel of the base model
(such as dynamic quantisation of activations) may pass no gradient on, so that training changes nothing.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .layer import HiFICLLayer
from .support import dispatch_of

Layers = dict[str, HiFICLLayer]  # by name


class EffectWatch:
    """Two hooks around the forward of a model that owns adapted attentions: was each adapter called?"""

    # Per thread and watch, a stack (forwards may nest): how often each layer had been called when a forward began.
    _begun = threading.local()

    def __init__(self, layers: Layers, depth: int | None) -> None:
        self.layers = layers
        self.depth = depth
        self.reported = False

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_exporting():
            self._check_forwards(module)
        if not torch.compiler.is_compiling():
            counts = [layer.calls for layer in self.layers.values()]
            vars(self._begun).setdefault(f"{id(self)}", []).append(counts)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        begun = vars(self._begun).get(f"{id(self)}")
        if not begun:
            return
        counts = begun.pop()
        if self.reported or output is None or getattr(module, "_is_replica", False) or _drops_layers(module):
            return
        missed = [
            name
            for (name, layer), count in zip(self.layers.items(), counts, strict=True)
            if layer.calls == count and layer.is_active and not _is_elsewhere(module, name)
        ]
        # Assisted generation may skip the last layers; it lowers num_hidden_layers meanwhile.
        whole = self.depth == getattr(module.config, "num_hidden_layers", None)
        if missed and whole and not any(map(_is_compiled, module.modules())):
            self.reported = True
            warnings.warn(
                f"The HiFICL adapters of {len(missed)} attention module(s) ({missed[0]}, ...) had no effect in this "
                f"forward of {type(module).__name__}: their attention was not computed through transformers' attention "
                "interface, or they were left out. If a forward was replaced after the adapter had been attached (by a "
                "kernels package, or a patch), undo that.",
                stacklevel=2,
            )

    def _check_forwards(self, module: nn.Module) -> None:
        """Refuse to export attentions whose forward transformers' exporters have replaced while they trace.

        Raises:
            TypeError: the adapter would be missing in what is exported.
        """
        for name, layer in self.layers.items():
            if not layer.disable_adapters:
                try:
                    dispatch_of(type(module.get_submodule(name)))
                except TypeError as error:
                    raise TypeError(
                        f"The HiFICL adapter of {name!r} cannot be exported: as the exporter has changed it, {error}. "
                        "Leave this module out (exclude_modules), or export without the adapter (unload)."
                    ) from None


class GradientWatch:
    """Hooks on the outermost model and its outputs: after a backward, has each adapter in training had a gradient?"""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.reported = False

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            for layer in self.layers.values():
                layer.awaits_gradient.clear()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.reported or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        waiting = {name: layer for name, layer in self.layers.items() if layer.awaits_gradient}
        if waiting:
            parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
            for tensor in parts:
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    # Not its own node, which holds the hook: a cycle would keep the graph until Python looks for them.
                    below = [] if tensor.grad_fn is None else [node for node, _ in tensor.grad_fn.next_functions]
                    tensor.register_hook(lambda grad, below=below: self._check_later(waiting, below))

    def _check_later(self, waiting: Layers, below: list[Any]) -> None:
        """Called when the backward reaches an output of the model: check when the backward has ended."""
        if not _leaves_out(below):
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._check(waiting))

    def _check(self, waiting: Layers) -> None:
        without = [name for name, layer in waiting.items() if layer.awaits_gradient]
        if without and not self.reported:
            self.reported = True
            warnings.warn(
                f"HiFICL adapters require a gradient, but no gradient has reached {len(without)} of {len(waiting)} in "
                f"a backward ({without[0]}, ...). If that was a training step, it does not change them: something in "
                "the base model passes no gradient on, as quantised kernels that are made for inference (torchao's "
                "dynamic activation quantisation). Train on another base, such as one with quantised weights alone.",
                stacklevel=2,
            )


def _leaves_out(below: list[Any]) -> bool:
    """Whether the backward that runs leaves out a part of a graph, as `torch.autograd.grad` of inputs does.

    Args:
        below: the nodes below its root, of which torch does not say it.
    """
    nodes, seen = list(below), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or not node.next_functions:  # nor of leaves
            continue
        if not torch._C._will_engine_execute_node(node):
            return True
        seen.add(node)
        nodes += [below for below, _ in node.next_functions]
    return False


def _is_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether a module has been taken out of a model with what is around it, as for another stage of a pipeline."""
    here: Any = model
    for part in name.split("."):
        here = getattr(here, part, None)
        if here is None:
            return True
    return False


def _drops_layers(module: nn.Module) -> bool:
    """Whether LayerDrop skips layers at random."""
    config: Any = module.config
    return module.training and any(name.endswith("layerdrop") and value for name, value in vars(config).items())


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled, in which case calls of layers within are not counted."""
    forward = vars(module).get("forward")
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")
