"""Factorises the pairs of an adapter anew, so that both factors share their size alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .inspection.effects import adapter_of
from .layer import Factor
from .ops.formula import without_autocast


@torch.no_grad()
def balance_factors(model: nn.Module, adapter_name: str | None = None) -> None:
    """Exchange the factors of an adapter's pairs, in place, for balanced ones of the same product.

    With the singular value decomposition of each head's keys, and of its values likewise:

        K_A K_B = U S W    ->    K_A = U sqrt(S),  K_B = sqrt(S) W

    The adapter's outputs stay what they are, to rounding, but not what training makes of them.  An optimizer like Adam
    moves each entry by about its rate.  As `initialize_from_demonstrations` leaves the factors, the entries of A have
    variance one and a random rotation mixes all directions; balanced, a direction that is small is small in both
    factors, and each has a row and a column of its own.  Started so, a small language model generalised better from 16
    samples; on a small vision-language base there was no difference (docs/guides/starts.md).  Not in the paper.

    A direction without size (r > n, pairs that are alike) gets a random column of A and a row of zeros of B, so that it
    can still be learned.  Heads whose product is zero, like the values of the paper's start, and keys or values that
    are learned whole, stay as they are.

    Args:
        model: the adapted model.  Make the optimizer afterwards, as what an earlier one has gathered belongs to the old
            factors, and wrap the model for several processes afterwards.
        adapter_name: which adapter; it must be the only active one.  None: the active one.

    Raises:
        ValueError: no such adapter, several active ones, an adapter that is offloaded, one whose heads or parameters
            several ranks share, or weights that are not finite.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, balance_factors, initialize_from_demonstrations
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=2, r=2))
        >>> prompt = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6]])}
        >>> errors = initialize_from_demonstrations(model, prompt, tokens=[2, 5])
        >>> balance_factors(model)
        >>> pairs = model.base_model.model.model.layers[0].self_attn.virtual_pairs
        >>> left, right = pairs.hificl_K_A["default"].weight, pairs.hificl_K_B["default"].weight
        >>> torch.allclose(left.norm(), right.norm())
        True
    """
    adapter = adapter_of(model, adapter_name, "Balancing an adapter")
    found: list[tuple[Factor, Tensor]] = []  # nothing is changed before all is computed
    for name, layer in adapter.layers.items():
        for kind in ("hificl_K", "hificl_V"):
            if adapter.name not in (lefts := getattr(layer, f"{kind}_A")):
                continue
            factors: tuple[Factor, Factor] = lefts[adapter.name], getattr(layer, f"{kind}_B")[adapter.name]
            for factor, dim in zip(factors, (2, 1), strict=True):
                weight = factor.weight
                whole = weight.ndim == 3 and weight.shape[dim] == layer.r[adapter.name]  # else FSDP1 or ZeRO-3 has it
                if weight.is_meta or not whole or hasattr(weight, "device_mesh"):
                    raise ValueError(
                        f"{kind} of {name!r} has shape {tuple(weight.shape)} on {weight.device}: the adapter is "
                        "offloaded or sharded. Balance it before the model is dispatched or sharded."
                    )
                if not weight.isfinite().all():
                    raise ValueError(
                        f"{kind} of {name!r} has weights that are not finite: there is nothing to balance."
                    )
            found += zip(factors, _balanced(*(factor.weight for factor in factors)), strict=True)
    for factor, value in found:
        factor.fill(value)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors (H, n, r), (H, r, d) of the product of these."""
    noise = torch.finfo(left.dtype).eps  # in half precision, pairs that are alike differ by this much
    dtype = torch.promote_types(left.dtype, torch.float32)
    left, right = left.to(dtype), right.to(dtype)
    with without_autocast(left.device):
        product = left @ right  # (H, n, d)
    u, s, w = torch.linalg.svd(product, full_matrices=False)  # (H, n, k), (H, k), (H, k, d)
    k = min(left.shape[2], s.shape[1])
    u, s, w = u[..., :k], s[:, :k], w[:, :k]
    largest = s[:, :1]  # (H, 1)
    there = s > 4 * noise * largest  # (H, k)
    new_left, new_right = torch.zeros_like(left), torch.zeros_like(right)
    if k < left.shape[2] or not there.all():
        new_left.normal_().mul_((largest / left.shape[1]).sqrt()[..., None])  # columns about as long as the longest
    new_left[..., :k] = torch.where(there[:, None], u * s.sqrt()[:, None], new_left[..., :k])
    new_right[:, :k] = torch.where(there[..., None], s.sqrt()[..., None] * w, 0)
    zero = largest[..., None] == 0
    return torch.where(zero, left, new_left), torch.where(zero, right, new_right)
