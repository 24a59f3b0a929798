"""Which modules of a model HiFICL adapts by default: the self-attentions of its text decoder, found by structure."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from . import attention

# Classes and names by which transformers' models tell apart what is not self-attention over text.
_OTHER_KIND = re.compile(r"Cross|Vision|Visual|Image|Video|Audio|Perceiver|Resampler|QFormer|Pooler|Pooling")
_CROSS_NAME = re.compile(r"cross|enc(oder)?_?dec|encoder_attn", re.IGNORECASE)


def find_self_attention(model: nn.Module) -> list[str]:
    """Names of every self-attention of the model's text decoder (of its encoder, where it has no decoder).

    Vision and audio towers, perceivers and cross-attentions are left out, and so are layers of hybrid models that are
    not attention (state-space or linear-attention layers).

    Raises:
        ValueError: there is none that HiFICL can adapt; the message says why.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a transformers model, so its self-attentions cannot be found by structure: "
            "please specify `target_modules` in the HiFICLConfig."
        )
    decoder = _text_decoder(model)
    # A model within the model may have towers of its own.
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    found_towers = [(part, part.get_encoder(kind)) for part in parts for kind in ("image", "video", "audio")]
    towers = {tower for part, tower in found_towers if tower is not part and tower is not None} - {decoder}
    outside = {m for tower in towers for m in tower.modules() if m is not decoder}
    inside = set(decoder.modules()) - outside
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if module in inside and not _is_other_kind(name, module)
    ]
    reasons = {name: reason for name, module in candidates if (reason := attention.why_unsupported(module))}
    found = [name for name, _ in candidates if name not in reasons]
    if not found:
        likely = {reasons[name]: name for name, module in candidates if "attention" in type(module).__name__.lower()}
        why = "; ".join(f"{name}: {reason}" for reason, name in likely.items())
        raise ValueError(
            f"{type(model).__name__} has no self-attention that HiFICL can adapt: "
            f"{why or f'nothing in {type(decoder).__name__} is an attention module'}. HiFICL needs attention that goes "
            "through transformers' attention interface."
        )
    return found


def _text_decoder(model: nn.Module) -> nn.Module:
    """The innermost decoder: what wraps a language model may name an encoder-decoder whole (BLIP-2 over T5)."""
    while isinstance(model, PreTrainedModel):
        decoder = model.get_decoder()
        # Some encoders call their output layer `decoder` (ModernBERT).
        if decoder is model or next(decoder.children(), None) is None:
            break
        model = decoder
    return model


def _is_other_kind(name: str, module: nn.Module) -> bool:
    return bool(
        _OTHER_KIND.search(type(module).__name__)
        or _CROSS_NAME.search(name)
        or getattr(module, "is_cross_attention", False)
    )
