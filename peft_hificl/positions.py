"""Positions of left-padded rows: taken from the mask if the caller gives none.

A virtual key has no position, but queries are rotated by theirs, so its score depends on the position of the query.
Without ``position_ids``, transformers numbers the columns of a batch, padding included.  That does not change rotary
attention over the context, which depends on distances alone, but an adapter would act differently on a padded row than
on the same row without padding.  So an adapted model counts positions from the first token that the mask shows, as
`generate` does.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from .layer import HiFICLLayer
from .names import cache_in
from .rows import running

_FIRST_POSITION = {"paligemma": 1}  # where it is not 0


class PositionsFromMask:
    """A forward pre-hook that gives a model the ``position_ids`` that its ``attention_mask`` (B, S) implies.

    Token t of row b gets the position ``max(c + t - p_b, 0)``, with c tokens in the cache and p_b columns of the mask
    before the first visible one.  Masked columns after that one are counted too, so all distances stay those of the
    base model.  Nothing is changed if the caller gives ``position_ids``, no mask or a mask of another form, or if no
    adapter is active.
    """

    def __init__(self, model: PreTrainedModel, layers: list[HiFICLLayer]) -> None:
        self.layers = layers
        self.arguments = list(inspect.signature(type(model).forward).parameters)[1:]
        self.first = _FIRST_POSITION.get(model.config.model_type, 0)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        if given.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if tokens is None or not any(layer.is_active or layer in running.modules for layer in self.layers):
            return None
        cache = cache_in(given)
        start = 0 if cache is None else cache.get_seq_length()
        padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # (B, 1)
        columns = torch.arange(tokens.shape[1], device=mask.device) + start
        positions = (columns - padding).clamp_min(0) + self.first  # (B, T)
        index = self.arguments.index("position_ids")
        if index < len(args):
            return (*args[:index], positions, *args[index + 1 :]), kwargs
        return args, {**kwargs, "position_ids": positions}


def counts_positions(model: PreTrainedModel, is_owner: bool) -> bool:
    """Whether to register `PositionsFromMask` on a model.

    It is registered on the model that owns the adapted attentions (`is_owner`), and on the models around it, as some of
    these compute positions themselves if none are given (Gemma 3, Fuyu).  Outer models whose positions have several
    dimensions (M-RoPE) are left alone: they compute them from the mask and the images.
    """
    takes = set(inspect.signature(type(model).forward).parameters)
    if not {"attention_mask", "position_ids"} <= takes:
        return False
    rotary = any("Rotary" in type(module).__name__ for module in model.modules())
    return rotary and (is_owner or not any(map(_has_own_positions, model.modules())))


def _has_own_positions(module: nn.Module) -> bool:
    if not isinstance(module, PreTrainedModel):
        return False
    usual = getattr(GenerationMixin, "_prepare_position_ids_for_generation", None)
    own = getattr(type(module), "_prepare_position_ids_for_generation", usual)
    return own is not usual or "mrope_section" in str(getattr(module.config, "rope_parameters", None))
