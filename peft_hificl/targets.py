"""Finds the modules that HiFICL adapts by default: the self-attentions of the text decoder."""

from __future__ import annotations

import dataclasses
import re

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from . import checkpoint, support
from .config import HiFICLConfig
from .names import plain

# Names of classes and modules in transformers that are not self-attention over text.
_TOWER = re.compile(r"Vision|Visual|Image|Video|Audio|QFormer")
_OTHER_KIND = re.compile(r"Cross|Perceiver|Resampler|Pooler|Pooling")
_CROSS_NAME = re.compile(r"cross|enc(oder)?_?dec|encoder_attn", re.IGNORECASE)


class FoundPattern(str):
    """A regular expression in `target_modules` that was found in a model, not given by the user."""


class FoundNames(set[str]):
    """Names in `target_modules` that were found in a model, not given by the user."""


def default_targets(model: nn.Module, config: HiFICLConfig) -> FoundPattern | FoundNames:
    """What `target_modules=None` stands for in a model: a regular expression for its self-attentions, or their names.

    The expression accepts any layer number, so that the same configuration covers all layers of a deeper model.

    Raises:
        ValueError: there is none that HiFICL can adapt, or `exclude_modules` and `layers_to_transform` leave none.
    """
    # A compiled module has the same plain name as the module that it wraps; the dict keeps the latter, which is last.
    modules = {plain(name): module for name, module in model.named_modules()}
    found = [plain(name) for name in find_self_attention(model)]
    # PEFT applies exclude_modules and layers_to_transform, if it is given the last parts of the names as targets.
    by_end = dataclasses.replace(config, target_modules=list({name.rpartition(".")[2] for name in found}))
    names = {name for name in found if check_target_module_exists(by_end, name)}
    kinds = {type(modules[name]) for name in found}
    for name, module in modules.items():  # refuse to adapt only some of the layers
        if type(module) in kinds and name not in found and check_target_module_exists(by_end, name):
            reason = support.why_unsupported(module)
            if reason:
                raise ValueError(f"HiFICL can adapt {found[0]!r} and its like, but not {name!r}: {reason}.")
    if not names:
        raise ValueError(
            f"None of the {len(found)} self-attentions of {type(model).__name__} ({found[0]!r}, ...) is left to adapt: "
            f"excluded by exclude_modules={config.exclude_modules!r}, or not found at "
            f"layers_to_transform={config.layers_to_transform!r}, layers_pattern={config.layers_pattern!r}."
        )
    pattern = "|".join(sorted({re.sub(r"(?<=\.)\d+(?=\\|$)", r"\\d+", re.escape(name)) for name in names}))
    matched = {name for name in modules if re.fullmatch(pattern, name)}
    return FoundPattern(pattern) if matched == names and config.layers_to_transform is None else FoundNames(names)


def find_self_attention(model: nn.Module) -> list[str]:
    """Names of every self-attention of the model's text decoder (of its encoder, where it has no decoder).

    Vision and audio towers, perceivers and cross-attentions are left out, and so are layers of hybrid models that are
    not attention (state-space or linear-attention layers).  If the model is nothing but a tower, the self-attentions
    of the tower are found.

    Raises:
        ValueError: there is none that HiFICL can adapt; the message says why.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a transformers model, so its self-attentions cannot be found by structure: "
            "please specify `target_modules` in the HiFICLConfig."
        )
    decoder = _text_decoder(model)
    outside = {m for tower in _towers(model) - {decoder} for m in tower.modules() if m is not decoder}
    inside = set(decoder.modules()) - outside
    candidates = {name: module for name, module in model.named_modules() if not _is_other_kind(name, module)}
    text = {n: m for n, m in candidates.items() if m in inside and not _TOWER.search(type(m).__name__)}
    part = candidates if not _embeds_tokens(model) and not _adaptable(text) else text
    found = _adaptable(part)
    if not found:
        likely = {
            support.why_unsupported(module): name
            for name, module in part.items()
            if "attention" in type(module).__name__.lower()
        }
        why = "; ".join(f"{name}: {reason}" for reason, name in likely.items())
        others = _adaptable(candidates)
        hint = (
            f" Attention of other parts, like {others[0]!r}, is adapted where target_modules names it."
            if others
            else ""
        )
        raise ValueError(
            f"{type(model).__name__} has no self-attention {'over text ' if others else ''}that HiFICL can adapt: "
            f"{why or f'nothing in {type(decoder).__name__} is an attention module'}. HiFICL needs attention that goes "
            f"through transformers' attention interface.{hint}"
        )
    return found


def _adaptable(modules: dict[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if support.why_unsupported(module) is None]


def _text_decoder(model: nn.Module) -> nn.Module:
    """The innermost decoder: BLIP-2 over T5, for one, calls a whole encoder-decoder its decoder."""
    while isinstance(model, PreTrainedModel):
        decoder = model.get_decoder()
        # Some encoders call their output layer `decoder` (ModernBERT).
        if decoder is model or next(decoder.children(), None) is None:
            break
        model = decoder
    return model


def _embeds_tokens(model: PreTrainedModel) -> bool:
    """Whether the model has token embeddings.  A tower has none, but its configuration may state a vocabulary."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return vocabulary is not None and any(embedding.num_embeddings >= vocabulary for embedding in embeddings)


def _towers(model: nn.Module) -> set[nn.Module]:
    """Encoders of images, videos and sounds, in the model and in the models within it."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = [(part, part.get_encoder(kind)) for part in parts for kind in ("image", "video", "audio")]
    return {tower for part, tower in found if tower is not part and tower is not None}


def text_modules(model: nn.Module) -> set[nn.Module]:
    """The modules whose batch has one row per prompt: the text decoder, its encoder, the embeddings and heads."""
    decoder = _text_decoder(model)
    text: list[nn.Module | None] = [decoder]
    heads = {name for names in checkpoint.HEADS.values() for name in names}
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and (part is model or decoder in part.modules()):
            text += [part.get_output_embeddings(), *(getattr(part, name, None) for name in heads)]
            if part.config.is_encoder_decoder:
                text.append(part.get_encoder())
    towers = _towers(model) - set(text)
    outside = {module for tower in towers for module in tower.modules()}
    return {module for part in text if part is not None for module in part.modules()} - outside


def _is_other_kind(name: str, module: nn.Module) -> bool:
    return bool(
        _OTHER_KIND.search(type(module).__name__)
        or _CROSS_NAME.search(name)
        or getattr(module, "is_cross_attention", False)
    )
