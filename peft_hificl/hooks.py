"""Registers the hooks of adapted models: for `positions`, `paged_cache` and `watch`."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .layer import HiFICLLayer
from .names import MODULE
from .paged_cache import BeforePagedForward
from .positions import PositionsFromMask, counts_positions
from .watch import EffectWatch, GradientWatch

_KINDS = (BeforePagedForward, PositionsFromMask, EffectWatch, GradientWatch)


def refresh(model: nn.Module) -> None:
    """Register, on this model and the models within it, the hooks that adapted attentions need now.

    Attached to a part that is no model, such as a list of layers, attentions get the hook of continuous batching
    themselves: their calls have the cache, too.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    below = {part: set(part.modules()) for part in parts}
    covered = set().union(*below.values())
    for module in model.modules():
        _remove(module)
        layer = module._modules.get(MODULE)
        if isinstance(layer, HiFICLLayer) and layer not in covered:
            module.register_forward_pre_hook(BeforePagedForward({"": layer}), with_kwargs=True)
    for part in parts:
        layers = {
            name.rpartition(".")[0]: module for name, module in part.named_modules() if isinstance(module, HiFICLLayer)
        }
        if not layers:
            continue
        inner = {module for other in parts if other in below[part] - {part} for module in below[other]}
        own = {name: layer for name, layer in layers.items() if layer not in inner}
        if own:
            effect = EffectWatch(own, getattr(part.config, "num_hidden_layers", None))
            part.register_forward_pre_hook(effect.before)
            part.register_forward_hook(effect.after, always_call=True)
            part.register_forward_pre_hook(BeforePagedForward(own), with_kwargs=True)
        if not any(part in below[other] for other in parts if other is not part):
            gradient = GradientWatch(layers)
            part.register_forward_pre_hook(gradient.before)
            part.register_forward_hook(gradient.after)
        if counts_positions(part, bool(own)):
            part.register_forward_pre_hook(PositionsFromMask(part, list(layers.values())), with_kwargs=True)


def _remove(model: nn.Module) -> None:
    # By type, not by the handles that torch returned: a copy of a model has copies of the hooks, but no handles.
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", hook), _KINDS):
                del hooks[key]
                for flags in (
                    model._forward_pre_hooks_with_kwargs,
                    model._forward_hooks_with_kwargs,
                    model._forward_hooks_always_called,
                ):
                    flags.pop(key, None)
