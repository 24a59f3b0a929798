"""Initialising virtual pairs with the keys and values of real demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from . import support
from .layer import HiFICLLayer
from .names import MODULE, plain
from .ops.matching import match_attention

_QUERIES = 256  # of the prompt, at most, that stand for those to come


class _Read(NamedTuple):
    """What one attention was called with when the base model ran on the prompt."""

    query: Tensor  # (1, H, T, d)
    key: Tensor  # (1, G, T, d)
    value: Tensor  # (1, G, T, e)
    scaling: float


@torch.no_grad()
def initialize_from_demonstrations(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Sequence[int] | None = None, adapter_name: str | None = None
) -> dict[str, float]:
    """Initialise an adapter with the keys and values that a prompt of demonstrations adds to every attention.

    The base model runs on the prompt once; virtual pair i of each head becomes the key and value of ``tokens[i]``:

        K_D = K[tokens],  V_D = V[tokens],  each factorised at rank r (truncated SVD, exact for r >= n)

    Without `tokens`, each head gets n tokens of its own and a log-weight for each of them, so that together they change
    the attention of the prompt's last queries as all of its keys and values do, as nearly as n tokens can
    (`ops.matching`).  A first token that is an attention sink is among them where it matters.  With
    `skip_first_token`, it is left out of the prompt that is matched: every later row keeps its own.

    With rotary embeddings, the prompt gets the positions -T, ..., -1, so that it stands right before later prompts,
    which begin at 0.  With ``n = T`` and ``r >= n`` the fresh adapter then answers like the base model with the
    demonstrations in its prompt; with fewer pairs, like a base model that sees only these tokens of them.  A sliding
    window does not hide virtual pairs: every token sees them.  Without rotary embeddings, the prompt gets the usual
    positions, so the demonstrations and later prompts share theirs.

    Args:
        model: the adapted model.
        inputs: the model's inputs for one prompt (a batch of 1) of demonstrations without a query.  Add your own
            ``position_ids`` if the model does not count positions from 0.
        tokens: as many positions in the prompt as the adapter has pairs, the same in all heads.  A good choice is one
            word of each demonstration's answer, or several spread over long answers.  None: each head's own, with
            weights, which needs `pair_weights`.
        adapter_name: which adapter; None: the active one.

    Returns:
        By attention module, how far the pairs are from the whole prompt, from 0 (as it) to 1 (as none): the difference
        in numerator and denominator of the attention, relative to their norm, averaged over heads.  It is measured
        before the pairs are cut to rank r.

    Raises:
        ValueError: no such adapter, a number of tokens other than n, a token that the prompt does not have, no `tokens`
            for an adapter without `pair_weights` or for a prompt of less than n tokens, a batch of more than one
            prompt, padding, M-RoPE without ``position_ids``, or an adapter that is merged or offloaded.

    A demonstration that is trained on, too, has its answer in the pairs already.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, initialize_from_demonstrations
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=2, r=2, pair_weights=True))
        >>> prompt = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 6]])}
        >>> errors = initialize_from_demonstrations(model, prompt)  # or tokens=[2, 5]
        >>> list(errors), 0 < errors["model.layers.0.self_attn"] < 1
        (['model.layers.0.self_attn'], True)
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
    if tokens is None and not all(adapter_name in layer.hificl_W for layer in adapted.values()):
        raise ValueError(
            f"Without tokens=, pairs get weights, which adapter {adapter_name!r} does not have: attach it with "
            "HiFICLConfig(pair_weights=True), or give one token for each pair."
        )
    if tokens is not None and pairs != {len(tokens)}:
        raise ValueError(
            f"{len(tokens)} tokens for an adapter of n={', '.join(map(str, sorted(pairs)))} virtual pairs: give one "
            "token for each pair."
        )
    if any(parameter.is_meta for layer in adapted.values() for parameter in layer.parameters()):
        raise ValueError("The adapter is offloaded by accelerate: initialize it before the model is dispatched.")
    read = _read(model, inputs, adapted)
    for name, found in read.items():
        size, first, n = found.key.shape[2], adapted[name].skip_first_token[adapter_name], adapted[name].n[adapter_name]
        if found.key.shape[0] != 1:
            raise ValueError(f"The demonstrations are a batch of {found.key.shape[0]}: give one prompt.")
        if tokens is not None and not all(-size <= place < size for place in tokens):
            raise ValueError(f"tokens={list(tokens)} for a prompt of {size} tokens: each must be one of them.")
        if tokens is None and size - first < n:
            raise ValueError(
                f"A prompt of {size} tokens{' (the first is left out)' if first else ''} for n={n} pairs: give more."
            )
    before = {
        parameter: parameter.clone()
        for layer in adapted.values()
        for name, parameter in layer.named_parameters()
        if adapter_name in name.split(".")
    }
    errors = {}
    try:
        for name, found in read.items():
            errors[plain(name).removesuffix(f".{MODULE}")] = _set(adapted[name], adapter_name, found, tokens)
    except BaseException:  # out of memory in a late layer, or interrupted
        for parameter, value in before.items():
            parameter.copy_(value)
        raise
    return errors


def _set(layer: HiFICLLayer, adapter_name: str, found: _Read, tokens: Sequence[int] | None) -> float:
    """Set the pairs of one layer, and return how far they are from the whole prompt."""
    heads, size = layer.heads[adapter_name], found.key.shape[2]
    key, value = (t[0].repeat_interleave(heads // t.shape[1], dim=0) for t in (found.key, found.value))
    # The last ones have read other demonstrations, as the queries to come will have.
    places = torch.linspace(size // 2, size - 1, min(size - size // 2, _QUERIES)).round().long()
    chosen = layer.n[adapter_name] if tokens is None else torch.tensor(tokens, device=key.device) % size
    first = int(tokens is None and layer.skip_first_token[adapter_name])
    query = found.query[0][:, places].reshape(heads, -1, found.query.shape[-1])  # of all heads that share pairs
    match = match_attention(query, key, value, found.scaling, chosen, first)
    keys, values = (t.gather(1, match.places[..., None].expand(-1, -1, t.shape[-1])) for t in (key, value))
    layer.set_pairs(adapter_name, keys, values, match.log_weights)
    return float(match.error.mean())


def _read(model: nn.Module, inputs: Mapping[str, Any], layers: Mapping[str, HiFICLLayer]) -> dict[str, _Read]:
    """Run the base model once, and return what each adapted attention was called with."""
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
    for name, layer in layers.items():
        dispatch = support.dispatch_of(type(model.get_submodule(name.rpartition(".")[0])))
        if support.exchange_of(dispatch, layer.base_config._attn_implementation) is not None:
            raise ValueError(
                "Sequence parallelism gives each rank a part of the prompt: initialize the adapter before DeepSpeed's "
                "Ulysses is registered (before accelerate prepares the model)."
            )
    modes = {module: module.training for module in base.modules()}
    calls: dict[str, list[_Read]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, seen=calls[name]: seen.append(_Read(*args)))
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
    return {name: _of_all_heads(layers[name], of_layer[0]) for name, of_layer in calls.items()}


def _of_all_heads(layer: HiFICLLayer, found: _Read) -> _Read:
    """What was read, of the heads of all ranks, where a tensor-parallel model divides them."""
    if layer.sharding is None:
        return found
    query, key, value = map(layer.sharding.gathered, found[:3])
    return _Read(query, key, value, found.scaling)
