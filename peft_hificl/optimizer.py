"""Learning rates of an adapter's parameters."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .layer import HiFICLLayer


def parameter_groups(
    model: nn.Module, lr: float, key_lr_ratio: float = 0.3, weight_lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: ``key_lr_ratio * lr`` for virtual keys, ``lr`` for all else that is trained.

    In `out = alpha SA + sum_i beta_i V_D,i`, values enter linearly, keys through the exponential of their scores.  The
    ratio was chosen on validation data of the small base in ``benchmarks`` (docs/benchmark-history.md); the paper has
    one rate, ``key_lr_ratio=1``.

    Args:
        model: the adapted model.  FSDP puts other parameters in the place of the model's: if you wrap it yourself, call
            this on the wrapped one; `accelerator.prepare` exchanges those of an optimizer.  What FSDP1 has flattened
            together cannot be told apart: it needs ``use_orig_params=True``, or PEFT's ``fsdp_auto_wrap_policy``.
        lr: rate of the virtual values and of all other parameters that require a gradient.  A LoRA or a module of
            ``modules_to_save`` may need a smaller rate than virtual values; put it into a group of your own.
        key_lr_ratio: rate of the virtual keys (``hificl_K_A``, ``hificl_K_B``, or ``hificl_K``), as a fraction of
            ``lr``.
        weight_lr_ratio: rate of the log-weights (``hificl_W``), as a fraction of ``lr``.  An adapter that begins with
            ``init_weights="identity"`` needs a large one, such as 30, as its log-weights have a long way to go.

    Returns:
        One to three groups, for ``torch.optim.AdamW(parameter_groups(model, lr=3e-2))``; empty groups are left out.

    Raises:
        ValueError: a rate or ratio that is not positive and finite, or no HiFICL adapter that requires a gradient.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, parameter_groups
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=2, r=2))
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1))
        >>> [round(group["lr"], 3) for group in optimizer.param_groups]
        [0.1, 0.03]
    """
    rates = {"lr": lr, "key_lr_ratio": key_lr_ratio, "weight_lr_ratio": weight_lr_ratio}
    for name, value in rates.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: it must be positive and finite.")
    layers = [module for module in model.modules() if isinstance(module, HiFICLLayer)]
    own = [(name, id(parameter)) for layer in layers for name, parameter in layer.named_parameters()]
    keys, weights = ({i for name, i in own if name.startswith(kind)} for kind in ("hificl_K", "hificl_W"))
    adapter = {i for _, i in own}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not any(id(parameter) in adapter for parameter in trained):
        raise ValueError(
            "No HiFICL adapter of this model requires a gradient: attach one with get_peft_model, and load a trained "
            "one with is_trainable=True."
        )
    groups = [
        {"params": [p for p in trained if id(p) not in keys | weights], "lr": lr},
        {"params": [p for p in trained if id(p) in keys], "lr": key_lr_ratio * lr},
        {"params": [p for p in trained if id(p) in weights], "lr": weight_lr_ratio * lr},
    ]
    return [group for group in groups if group["params"]]
