"""One adapter per row of a batch: what `adapter_names` of a call means for each module that the call runs.

A PeftModel's ``forward`` and ``generate`` do not pass ``adapter_names`` on to the base model, most of whose modules do
not accept it.  Instead, `Running.modules` holds, for the length of the call and for this thread alone, which adapter
each row has in every module with adapters.  Nothing is stored or registered on the model, as another thread may be
running it at the same time.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .names import cache_in

# Fields of a configuration that hold the placeholder token ids of images, videos and sounds.
_PLACEHOLDER = re.compile(r"(image|video|audio|speech)_(token|patch)_(id|index)")
# Inputs that describe the text, which differ between prompts even if their images are alike.
_OF_TEXT = re.compile(r"decoder_|attention_mask|position_ids|cache_position|labels|negative_prompt")


class Rows(NamedTuple):
    """Which adapter each row of one module's batch has in a call.

    Attributes:
        names: an adapter, or ``"__base__"``, per prompt.
        times: how many consecutive rows a prompt may have; empty: any number.
        module: the name of the module.
        refusal: why it is not certain which prompt a row belongs to; empty if it is.
    """

    names: list[str]
    times: tuple[int, ...]
    module: str = ""
    refusal: str = ""

    def spread(self, batch_size: int) -> list[str]:
        """One name per row of a batch.

        Raises:
            ValueError: the names do not fit the batch, or it is not certain which prompt a row belongs to.
        """
        times, rest = divmod(batch_size, len(self.names))
        if self.times and (rest or times not in self.times):
            raise ValueError(_wrong_number(self.names, batch_size))
        refusal = self.refusal or (rest and f"it runs {batch_size} rows for {len(self.names)} prompts")
        if refusal:
            raise ValueError(
                f"adapter_names gives each prompt an adapter, but {self.module!r} works on images or sounds, and which "
                f"prompt they belong to is not certain: {refusal}. Give all prompts of a batch one adapter, or leave "
                "this module out of target_modules and modules_to_save."
            )
        return [name for name in self.names for _ in range(times)]


class Running(threading.local):
    """The rows of the call with `adapter_names` that this thread is in; each thread has its own."""

    def __init__(self) -> None:
        self.modules: Mapping[nn.Module, Rows] = {}  # replaced as a whole, never edited; empty: no such call


running = Running()


def hand_down(module: AuxiliaryTrainingWrapper, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """A forward pre-hook of PEFT's wrappers (`modules_to_save`, trained tokens): passes them `adapter_names`."""
    rows = running.modules.get(module)
    # Without kwargs, another thread is just registering the hook for a call of its own.
    if rows is None or kwargs is None:
        return None
    batch = args[0] if args else next(iter(kwargs.values()))
    own = module._get_available_adapters()
    names = [name if name in own else "__base__" for name in rows.spread(len(batch))]
    return args, {**kwargs, "adapter_names": names}


def install(model: nn.Module) -> None:
    """Register `hand_down` on PEFT's wrappers in a model, if it is not there yet."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and hand_down not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hand_down, with_kwargs=True)


def of_call(model: nn.Module, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Rows, Rows]:
    """The rows of modules that run on the prompts, and of modules that run on their images or sounds.

    Args:
        model: the base model.
        names: an adapter, or ``"__base__"``, per prompt.
        args: the arguments of its forward or generate, as far as they are known.
        kwargs: its keyword arguments, as far as they are known.

    Raises:
        ValueError: the call has another number of prompts.
    """
    main = getattr(model, "main_input_name", "input_ids")
    first = args[0] if args else kwargs.get("inputs")  # of generate
    inputs = kwargs if first is None else {main: first, **kwargs}
    ids, of_media = inputs.get("input_ids"), placeholders(model)
    places = None  # (B, T) per placeholder; None: the model takes one image or sound per prompt
    if isinstance(mask := inputs.get("image_embeds_position_mask"), Tensor):  # of Kosmos-2
        places = [mask != 0]
    elif of_media:
        places = [] if ids is None else [ids == placeholder for placeholder in of_media]
    for name in ("input_ids", "inputs_embeds", *([main] if places is None else [])):
        if isinstance(batch := inputs.get(name), Tensor):
            if len(batch) != len(names):
                raise ValueError(_wrong_number(names, len(batch)))
            break
    # `generate` repeats the rows of a prompt in a decoder, but not in an encoder: both numbers are allowed.
    text = Rows(names, times=(1, max(_setting(name, model, args, kwargs) for name in _REPEATING)))
    return text, text if places is None else _of_media(names, places, inputs)


_REPEATING = ("num_beams", "num_return_sequences")


def _setting(name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """A setting of `generate`: from the keyword, else the given GenerationConfig, else the model's own."""
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, GenerationConfig)), None)
    own = getattr(model, "generation_config", None)
    return kwargs.get(name) or getattr(given, name, None) or getattr(own, name, None) or 1


def placeholders(model: nn.Module) -> set[int]:
    """The token ids that stand for images, videos and sounds in a prompt."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = [value for config in configs for name, value in vars(config).items() if _PLACEHOLDER.fullmatch(name)]
    return {value for value in found if value is not None}


def _of_media(names: list[str], places: list[Tensor], inputs: dict[str, Any]) -> Rows:
    """The rows of modules that run on images, videos and sounds, of which a prompt may have any number."""
    rows = Rows(names, times=())
    if len(set(names)) == 1:
        return rows._replace(names=names[:1])
    if not places or cache_in(inputs) is not None:
        return rows._replace(refusal="the ids of the prompts are not given, or those before them are in a cache")
    counts = torch.stack([place.sum(dim=1) for place in places]).T.tolist()  # per prompt: one number per placeholder
    seeing = {name for name, count in zip(names, counts, strict=True) if any(count)}
    if len(seeing) == 1:
        return rows._replace(names=list(seeing))
    if any(count != counts[0] for count in counts):
        numbers = ", ".join(str(sum(count)) for count in counts)
        return rows._replace(refusal=f"the prompts have {numbers} placeholders, and not all the same number")
    for name, value in inputs.items():  # equally many placeholders are equally many images only if sizes are equal
        described = isinstance(value, Tensor) and not value.is_floating_point() and value.shape[:2] != places[0].shape
        if described and not _OF_TEXT.match(name) and bool((value != value[:1]).any()):
            return rows._replace(refusal=f"they differ in {name}")
    return rows


def _wrong_number(names: list[str], rows: int) -> str:
    return f"adapter_names has {len(names)} entries for a batch of {rows} rows: give one per row."
