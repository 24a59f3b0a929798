"""An adapter as a prefix: virtual pairs in the cache of the bare base model, or in a stock PEFT prefix-tuning adapter.

Virtual pairs per key/value head are what a key-value cache holds.  A cache of n of them, in front of the tokens, gives
the softmax of the formula, with one difference: it moves the tokens by n positions.  A virtual key k carries no
rotation, so in the cache it is rotated once, by R(n), and every score stays as it was:

    R(p) q . k  =  R(p + n) q . R(n) k

Whether this holds for a model is not read from its code alone: the model runs on a few tokens, at positions p and
p + n, and with the prefix in the place of the adapter.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple, NoReturn

import torch
from peft import PeftModel, PrefixTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
)
from peft.utils.other import _prepare_prompt_learning_config
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from . import offloading, sharding, support, targets
from .layer import HiFICLLayer
from .names import MODULE
from .ops.formula import VirtualPairs, concatenate_pairs

_LENGTH = "original_max_position_embeddings"
_HALF = (torch.float16, torch.bfloat16)


class _Attention(NamedTuple):
    """One adapted attention: its name, its module and the pairs that the cache is to hold."""

    name: str
    module: Any
    pairs: VirtualPairs


Prefix = list[tuple[Tensor, Tensor]]  # keys (1, G, n, d), rotated by R(n), and values (1, G, n, e) of each layer


@torch.no_grad()
def to_prefix_cache(model: nn.Module, adapter_name: str | None = None, batch_size: int = 1) -> DynamicCache:
    """An adapter as a cache of n entries, with which the bare base model gives the adapted model's outputs.

    The keys are rotated by R(n), since a cache moves the tokens by n positions; see `prefix`.  The base model, in any
    process, needs this package no more.  Each call uses a cache up, as it appends its tokens: hand it a copy.

    Give the base model an ``attention_mask`` with n more ones in front.  `generate` then finds all positions.  A plain
    forward of left-padded rows needs ``position_ids``, which count from n: ``(mask.cumsum(-1) - 1)[:, n:]`` of that
    mask.

    Args:
        model: the adapted model.
        adapter_name: which adapter; None: the active ones, in one softmax.
        batch_size: rows of the cache: those of the batch times the beams.

    Returns:
        A cache with keys ``(batch_size, G, n, d)`` and values ``(batch_size, G, n, e)`` per layer, in the dtype that
        the attention computes in.

    Raises:
        ValueError: the outputs would not be the same, so wherever query heads of a group have different pairs
            (`heads="kv"` has not), log-weights are not zero, alpha is 1, the first token is skipped, not every layer is
            adapted, layers are not full attention (sliding windows, state spaces), or scores depend on more than
            distances; or something is attached beside the pairs.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, to_prefix_cache
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=2, r=2, heads="kv")).eval()
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> adapted, cache = model(input_ids=ids).logits, to_prefix_cache(model)
        >>> bare = model.unload()
        >>> torch.allclose(bare(input_ids=ids, past_key_values=cache).logits, adapted, atol=1e-5)
        True
    """
    base = _base_of(model)
    return _cache(base, _prefix(model, base, adapter_name), batch_size)


@torch.no_grad()
def to_prefix_tuning(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Save an adapter as a stock PEFT prefix-tuning adapter, which loads without this package.

    `PeftModel.from_pretrained(base, folder)` gives a model with the adapted model's outputs.  A plain forward of
    left-padded rows needs ``position_ids``, as for any prefix.

    Args:
        model: the adapted model.
        folder: where to save it.
        adapter_name: which adapter; None: the active ones, in one softmax.

    Raises:
        ValueError: as for [`to_prefix_cache`]; or keys and values, or layers, have different shapes, for which PEFT's
            format has no place.
    """
    base = _base_of(model)
    found = _prefix(model, base, adapter_name)
    _, groups, n, dim = found[0][0].shape
    shapes = {tuple(tensor.shape[1:]) for pair in found for tensor in pair}
    if len(shapes) > 1:
        _refuse(f"its keys and values have {len(shapes)} shapes, {sorted(shapes)}", "use to_prefix_cache")
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=base.config.name_or_path or None, inference_mode=True,
        num_virtual_tokens=n, num_layers=len(found), num_attention_heads=groups, token_dim=groups * dim,
        encoder_hidden_size=groups * dim,
    )  # fmt: skip
    loaded = _prepare_prompt_learning_config(copy.copy(config), base.config)
    if base.config.model_type in TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING or loaded != config:
        _refuse(f"PEFT would lay its prefix out in another way for {type(base).__name__}", "use to_prefix_cache")
    stacked = torch.stack([tensor[0].cpu() for pair in found for tensor in pair])  # (2 L, G, n, d)
    os.makedirs(folder, exist_ok=True)
    tensors = {"prompt_embeddings": stacked.permute(2, 0, 1, 3).reshape(n, -1).contiguous()}
    save_file(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config.save_pretrained(os.fspath(folder))


def _base_of(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _refuse(reason: str, remedy: str) -> NoReturn:
    raise ValueError(f"This adapter cannot be handed over as a prefix: {reason}. Remedy: {remedy}.")


def _cache(base: Any, prefix: Prefix, batch_size: int) -> DynamicCache:
    cache = DynamicCache(config=base.config)
    for index, pair in enumerate(prefix):
        cache.update(*(tensor.repeat(batch_size, 1, 1, 1) for tensor in pair), index)
    return cache


def _prefix(model: Any, base: Any, adapter_name: str | None) -> Prefix:
    """The prefix of an adapter, in the order of the cache's layers, in the dtype that each attention computes in."""
    attentions = _attentions(base, adapter_name)
    _check_pairs(attentions)
    _check_beside(model, base, adapter_name)
    _check_model(base)
    layers = {getattr(attention.module, "layer_idx", None): attention for attention in attentions}
    expected = range(len(DynamicCache(config=base.config).layers))
    if len(layers) != len(attentions) or layers.keys() != set(expected):
        _refuse(
            f"it is on {len(attentions)} attentions ({attentions[0].name!r}, ...), not on one for each of the "
            f"{len(expected)} layers of the cache of {type(base).__name__}",
            "adapt all self-attentions of the decoder, and no others",
        )
    ordered = [layers[index] for index in expected]
    prefix = []
    for attention, keys in zip(ordered, _rotated(base, ordered), strict=True):
        device, dtype = offloading.device_and_dtype(attention.module)
        prefix.append((keys.to(device, dtype), attention.pairs.values.to(device, dtype)))
    _check_outputs(base, adapter_name, prefix)
    return prefix


def _attentions(base: nn.Module, adapter_name: str | None) -> list[_Attention]:
    sharding.check_whole(base, "A prefix")
    found = []
    for name, layer in base.named_modules():
        if isinstance(layer, HiFICLLayer):
            names = layer.active_names if adapter_name is None else [adapter_name] * layer._takes_part(adapter_name)
            if names:
                module = name.removesuffix(f".{MODULE}")
                pairs = concatenate_pairs([layer._pairs(each) for each in names])
                found.append(_Attention(module, base.get_submodule(module), pairs))
    if not found:
        wanted = "active HiFICL adapter" if adapter_name is None else f"HiFICL adapter {adapter_name!r}"
        raise ValueError(f"There is no {wanted} of a strength above 0 on this model.")
    return found


def _check_pairs(attentions: list[_Attention]) -> None:
    """What a cache cannot hold must not be in the pairs."""
    for name, module, pairs in attentions:
        groups = getattr(module, MODULE).head_shape.groups
        if pairs.keys.is_meta:
            _refuse(f"{name!r} is offloaded by accelerate", "make the prefix before the model is dispatched")
        if not pairs.scale_self_attention:
            _refuse(
                "its scale_self_attention=False (alpha = 1) is no softmax over keys", "train with the default, True"
            )
        if pairs.skip_first_token:
            _refuse(
                "the first token of a row does not see its pairs (skip_first_token=True), but sees all of a cache",
                "train with the default, False",
            )
        if pairs.keys.shape[1] != groups:
            _refuse(
                f"{name!r} has pairs for {pairs.keys.shape[1]} query heads, but a cache holds those of its {groups} "
                "key/value heads",
                'train with HiFICLConfig(heads="kv")',
            )
        if pairs.log_weights is not None and pairs.log_weights.any():
            _refuse(
                f"the pairs of {name!r} have log-weights, for which a cache has no place",
                "train with pair_weights=False, and use the adapter at its full strength",
            )
    sizes = sorted({pairs.keys.shape[2] for _, _, pairs in attentions})
    if len(sizes) > 1:
        _refuse(f"its layers have {sizes} pairs", "use adapters that cover the same layers")


def _check_beside(model: Any, base: nn.Module, adapter_name: str | None) -> None:
    """The base model alone must be what the prefix is for: nothing else may be attached to it."""
    configs = getattr(model, "peft_config", {})
    active = {name for module in base.modules() if isinstance(module, HiFICLLayer) for name in module.active_names}
    for name in [adapter_name] if adapter_name else sorted(active):
        for field in ("modules_to_save", "trainable_token_indices"):
            if getattr(configs.get(name), field, None):
                _refuse(f"{name!r} has trained more than pairs ({field})", "save those weights with the base model")
    for name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, HiFICLLayer):
            continue
        if module.active_adapters and not (module.disable_adapters or module.merged):
            _refuse(f"{type(module).__name__} is active at {name!r}", "merge or disable that adapter first")


def _check_model(base: Any) -> None:
    """The model must be a decoder whose layers cache all tokens and whose scores depend on distances."""
    if not isinstance(base, PreTrainedModel) or not base.can_generate() or base.config.is_encoder_decoder:
        _refuse(f"{type(base).__name__} is not a decoder that generates with a cache", "keep the adapter attached")
    for index, layer in enumerate(DynamicCache(config=base.config).layers):
        if type(layer) is not DynamicLayer:
            _refuse(
                f"layer {index} of {type(base).__name__} caches in a {type(layer).__name__}, not all tokens alike",
                "keep the adapter attached",
            )
    rope = str(getattr(base.config.get_text_config(), "rope_parameters", None))
    for kind in ("mrope_section", "dynamic", "longrope"):
        if kind in rope:
            _refuse(f"its rotary embedding ({kind}) depends on more than distances", "keep the adapter attached")


def _rotated(base: Any, attentions: list[_Attention]) -> Iterator[Tensor]:
    """The keys of each attention, rotated by n positions, or as they are where the attention rotates none.

    For tokens on their own, each at a position p and at p + n, the model's own queries and keys are read.  The scores
    at p + n of the rotated virtual keys and of tokens n positions later must be those at p.
    """
    n = attentions[0].pairs.keys.shape[2]
    config = base.config.get_text_config()
    last = getattr(config, "max_position_embeddings", None) or 2048
    # Where models that scale queries by their position change the scale: at multiples of the length they first had.
    marks = {2**k for k in range(15)} | {(getattr(config, "rope_parameters", None) or {}).get(_LENGTH) or 1}
    positions = [0, *sorted({p for mark in marks for p in (mark - 2, mark - 1) if 0 < p < last - n})]
    grid = torch.cartesian_prod(torch.tensor([0, n]), torch.tensor(positions), _some_tokens(base, 4)).to(base.device)
    read = _read(base, attentions, tokens=grid[:, 2:], positions=grid[:, :1] + grid[:, 1:2])
    rotary = [m for m in targets.text_modules(base) if "Rotary" in type(m).__name__]
    for attention, (queries, keys) in zip(attentions, read, strict=True):
        dtype = torch.promote_types(attention.pairs.keys.dtype, torch.float32)
        own = attention.pairs.keys.to(dtype)
        query = queries.to(dtype).unflatten(0, (2, -1))  # (2, positions * tokens, H, d)
        key = keys.to(dtype).unflatten(0, (2, len(positions), -1))[:, 0].transpose(1, 2)  # (2, G, tokens, d)
        candidates = [own, *_turned(attention.module, rotary, own, n)]
        errors = [_shift_error(query, key, own, candidate) for candidate in candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        if not errors[best] < _tolerance(attention.module):
            _refuse(
                f"the scores of {attention.name!r} change when all tokens move by {n} positions (by "
                f"{100 * errors[best]:.0f} %), as with positions that are learned",
                "keep the adapter attached",
            )
        yield candidates[best]


def _turned(module: nn.Module, rotary: list[nn.Module], keys: Tensor, by: int) -> list[Tensor]:
    """The keys (1, G, n, d) rotated to the position `by` with the functions of the modelling file, if it has them."""
    rotate = support.dispatch_of(type(module)).namespace.get("apply_rotary_pos_emb")
    own = [m for m in module.modules() if m in rotary] or rotary
    if rotate is None or not own:
        return []
    position = torch.full((1, keys.shape[2]), by, device=keys.device)
    try:
        cos, sin = own[0](keys, position)
        scaling = getattr(own[0], "attention_scaling", 1.0)  # a factor of queries and keys, which virtual keys lack
        dim = cos.shape[-1]  # the rest is not rotated
        turned = rotate(keys[..., :dim], keys[..., :dim], cos / scaling, sin / scaling)[1]
    except (TypeError, ValueError, RuntimeError, KeyError):  # another signature: what is compared next decides
        return []
    return [torch.cat([turned, keys[..., dim:]], dim=-1)]


def _shift_error(query: Tensor, key: Tensor, own: Tensor, turned: Tensor) -> float:
    """How much scores differ at p and at p + n, in units of the largest: of the virtual keys, or of the model's own.

    Args:
        query: ``(2, rows, H, d)``, at p and at p + n.
        key: ``(2, G, m, d)``, at 0 and at n.
        own: the virtual keys ``(1, G, n, d)``.
        turned: what the cache is to hold of them.
    """
    grouped = query.unflatten(2, (own.shape[1], -1))  # (2, rows, G, H / G, d)
    errors = []
    for keys in (torch.cat([own, turned]), key):
        before, after = torch.einsum("srghd,sgmd->srghm", grouped, keys.to(grouped.device))
        errors.append(float((before - after).abs().max() / before.abs().max().clamp_min(1e-30)))
    return max(errors)


def _read(base: Any, attentions: list[_Attention], tokens: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries (R, H, d) and keys (R, G, d) of each attention, for R rows of one token, without the adapter.

    Raises:
        ValueError: the model's cache holds other keys or values than the attention is given.
    """
    calls: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {attention.name: [] for attention in attentions}
    cache = DynamicCache(config=base.config)
    with _running(base, []), torch.compiler.set_stance("force_eager"):
        hooks = [
            getattr(module, MODULE).register_forward_pre_hook(lambda _, args, seen=calls[name]: seen.append(args))
            for name, module, _ in attentions
        ]
        try:
            base(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
        except (TypeError, ValueError) as error:
            _refuse(f"{type(base).__name__} does not run on tokens alone ({error})", "keep the adapter attached")
        finally:
            for hook in hooks:
                hook.remove()
    for attention in attentions:
        seen, layer = calls[attention.name], cache.layers[attention.module.layer_idx]
        if len(seen) != 1 or not (torch.equal(seen[0][1], layer.keys) and torch.equal(seen[0][2], layer.values)):
            _refuse(
                f"the cache of {type(base).__name__} does not hold the keys and values of {attention.name!r} as it "
                "attends to them",
                "keep the adapter attached",
            )
    return [(seen[0][0][:, :, 0], seen[0][1][:, :, 0]) for seen in calls.values()]


def _check_outputs(base: Any, adapter_name: str | None, prefix: Prefix) -> None:
    """The base model with the prefix must give the adapted model's logits, whatever it computes its masks from."""
    if "token_type_ids" in signature(base.forward).parameters:
        _refuse(
            f"{type(base).__name__} takes token_type_ids, which may change what a token sees",
            "keep the adapter attached",
        )
    tokens = _some_tokens(base, 8).to(base.device)[None]
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    with torch.compiler.set_stance("force_eager"):
        with _running(base, None if adapter_name is None else [adapter_name]):
            adapted = base(input_ids=tokens, position_ids=positions, use_cache=False)[0]
        with _running(base, []):
            bare = base(input_ids=tokens, past_key_values=_cache(base, prefix, 1), use_cache=True)[0]
    error = float((bare - adapted).abs().max() / adapted.abs().max())
    if not error < _tolerance(base):
        _refuse(
            f"{type(base).__name__} treats entries of its cache in another way than virtual pairs (its logits differ "
            f"by {100 * error:.0f} %)",
            "keep the adapter attached",
        )


def _some_tokens(base: Any, number: int) -> Tensor:
    return torch.arange(1, number + 1) * base.config.get_text_config().vocab_size // (number + 1)


def _tolerance(module: nn.Module) -> float:
    return 0.05 if offloading.device_and_dtype(module)[1] in _HALF else 0.01


@contextmanager
def _running(base: nn.Module, names: list[str] | None) -> Iterator[None]:
    """The base model in evaluation mode with these HiFICL adapters; None: with those that are active."""
    modes = {module: module.training for module in base.modules()}
    states = {m: (m._disable_adapters, m._active_adapter) for m in base.modules() if isinstance(m, HiFICLLayer)}
    base.eval()
    for layer in states:
        if names is not None:
            layer._disable_adapters, layer._active_adapter = not names, names
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, state in states.items():
            layer._disable_adapters, layer._active_adapter = state
