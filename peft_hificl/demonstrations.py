"""Initialising virtual pairs with the keys and values of real demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .layer import HiFICLLayer


@torch.no_grad()
def initialize_from_demonstrations(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Sequence[int], adapter_name: str | None = None
) -> None:
    """Initialise an adapter with the keys and values that a prompt of demonstrations adds to every attention.

    The base model runs on the prompt once; virtual pair i of each head becomes the key and value of ``tokens[i]``:

        K_D = K[tokens],  V_D = V[tokens],  each factorised at rank r (truncated SVD, exact for r >= n)

    With rotary embeddings, the prompt gets the positions -T, ..., -1, so that it stands right before later prompts,
    which begin at 0.  With ``n = T`` and ``r >= n`` the fresh adapter then answers like the base model with the
    demonstrations in its prompt; with fewer pairs, like a base model that sees only these tokens of them.  A sliding
    window does not hide virtual pairs: every token sees them.  Without rotary embeddings, the prompt gets the usual
    positions, so the demonstrations and later prompts share theirs.

    Args:
        model: the adapted model.
        inputs: the model's inputs for one prompt (a batch of 1) of demonstrations without a query.  Add your own
            ``position_ids`` if the model does not count positions from 0.
        tokens: as many positions in the prompt as the adapter has pairs.  A good choice is one word of each
            demonstration's answer, or several spread over long answers.
        adapter_name: which adapter; None: the active one.

    Raises:
        ValueError: no such adapter, a number of tokens other than n, a token that the prompt does not have, a batch of
            more than one prompt, padding, M-RoPE without ``position_ids``, or an adapter that is merged or offloaded.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, initialize_from_demonstrations
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=2, r=2))
        >>> initialize_from_demonstrations(model, {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6]])}, tokens=[2, 5])
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HiFICLLayer)}
    if adapter_name is None:
        active = sorted({name for layer in layers.values() for name in layer.active_adapters if layer.has(name)})
        if len(active) != 1:
            raise ValueError(f"The model has {active} as active HiFICL adapters: name one with adapter_name=.")
        adapter_name = active[0]
    adapted = {name: layer for name, layer in layers.items() if layer.has(adapter_name)}
    if not adapted:
        raise ValueError(f"There is no HiFICL adapter {adapter_name!r} on this model.")
    pairs = {layer.n[adapter_name] for layer in adapted.values()}
    if pairs != {len(tokens)}:
        raise ValueError(
            f"{len(tokens)} tokens for an adapter of n={', '.join(map(str, sorted(pairs)))} virtual pairs: give one "
            "token for each pair."
        )
    if any(parameter.is_meta for layer in adapted.values() for parameter in layer.parameters()):
        raise ValueError("The adapter is offloaded by accelerate: initialize it before the model is dispatched.")
    read = _read(model, inputs, adapted)
    places = list(tokens)
    for key, _ in read.values():
        size = key.shape[2]
        if key.shape[0] != 1:
            raise ValueError(f"The demonstrations are a batch of {key.shape[0]}: give one prompt.")
        if not all(-size <= place < size for place in places):
            raise ValueError(f"tokens={places} for a prompt of {size} tokens: each must be one of them.")
    before = {
        parameter: parameter.clone()
        for layer in adapted.values()
        for name, parameter in layer.named_parameters()
        if adapter_name in name.split(".")
    }
    try:
        for name, (key, value) in read.items():
            adapted[name].set_pairs(adapter_name, key[0][:, places], value[0][:, places])
    except BaseException:  # out of memory in a late layer, or interrupted
        for parameter, value in before.items():
            parameter.copy_(value)
        raise


def _read(
    model: nn.Module, inputs: Mapping[str, Any], layers: Mapping[str, HiFICLLayer]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the base model once, and return the keys and values (1, G, T, d) of each adapted attention."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = dict(inputs)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not mask.all():
        raise ValueError("attention_mask has zeros, which would shift positions: give the demonstrations unpadded.")
    if "position_ids" not in inputs:
        rope = getattr(base.config.get_text_config(), "rope_parameters", None)
        if "mrope_section" in str(rope):
            raise ValueError(
                f"{type(base).__name__} has positions in several dimensions (M-RoPE): give position_ids in inputs, "
                "shifted so that the prompts to come follow them."
            )
        if rope or any("Rotary" in type(module).__name__ for module in base.modules()):
            shape = next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None)
            inputs["position_ids"] = torch.arange(-shape.shape[1], 0, device=shape.device)[None]
    # Every tuner layer of PEFT has this flag.  Its `enable_adapters` would also change `requires_grad`.
    switches: dict[Any, bool]
    switches = {m: m._disable_adapters for m in base.modules() if "_disable_adapters" in vars(m)}
    if any(getattr(module, "merged", False) for module in switches):
        raise ValueError("An adapter is merged into the base weights: unmerge it before demonstrations are read.")
    modes = {module: module.training for module in base.modules()}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, seen=calls[name]: seen.append(args[1:]))
        for name, layer in layers.items()
    ]
    try:
        base.eval()
        for module in switches:
            module._disable_adapters = True
        with torch.compiler.set_stance("force_eager"):  # compiled code does not see the new hooks
            base(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for module, disabled in switches.items():
            module._disable_adapters = disabled
        for module, mode in modes.items():
            module.training = mode
    for name, of_layer in calls.items():
        if len(of_layer) != 1:
            raise ValueError(
                f"{name.rpartition('.')[0]} attends {len(of_layer)} times in one forward pass: demonstrations can "
                "only be read where each attention is called once."
            )
    return {name: of_layer[0] for name, of_layer in calls.items()}
