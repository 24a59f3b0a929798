"""A context manager that changes the strength of adapters for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .layer import HiFICLLayer, checked_strength


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the strengths of all HiFICL adapters of a model, until the block is left.

    A strength w multiplies the weight of each virtual pair in the softmax:

        Z_D = w * sum over virtual keys exp s(k_D)        beta_i = w * exp s(k_D,i) / (Z_SA + Z_D)

    so that w = 1 is the adapter as it was trained and w = 0 the base model.  PEFT's function of this name does the same
    to LoRA adapters, and to these alone.

    Args:
        model: a model with HiFICL adapters, active or not.
        multiplier: at least 0.

    Raises:
        ValueError: a multiplier that is negative or not finite, or a model without HiFICL adapters.
        TypeError: a multiplier that is not a number.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, rescale_adapter_scale
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> want = base(prompt).logits
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=2, r=2))
        >>> with rescale_adapter_scale(model, 0):
        ...     torch.equal(model(prompt).logits, want)
        True
    """
    layers = [module for module in model.modules() if isinstance(module, HiFICLLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no HiFICL adapters, whose strengths could be multiplied: attach or load one, "
            "or use peft.helpers.rescale_adapter_scale for LoRA."
        )
    multiplier = checked_strength(multiplier)
    before = {layer: dict(layer.scaling) for layer in layers}
    for strengths in before.values():
        for strength in strengths.values():
            checked_strength(strength * multiplier)  # all of them before the first one is changed
    try:
        for layer, strengths in before.items():
            for name, strength in strengths.items():
                layer.set_scale(name, strength * multiplier)
        yield
    finally:
        for layer, strengths in before.items():
            for name, strength in strengths.items():
                layer.set_scale(name, strength)  # which passes over adapters that were deleted meanwhile
