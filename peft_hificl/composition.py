"""Several adapters in one: the configuration and the parameters of a weighted union of their virtual pairs."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .config import HiFICLConfig
from .layer import HiFICLLayer, checked_strength
from .names import MODULE, plain
from .ops.condense import condense, output_error
from .ops.formula import OF_THE_SOFTMAX, VirtualPairs, concatenate_pairs, disagreement, weighted

# The log-weight of pairs that take no part: finite in every dtype, and exp of it is 0.
ABSENT = -3e4

Parts = dict[str, float]  # adapters and their strengths, all above 0


def check(
    configs: Mapping[str, HiFICLConfig], model: nn.Module, adapters: Sequence[str], weights: Sequence[float], name: str
) -> Parts:
    """The adapters of a union with their strengths; those of strength 0 are left out.

    Raises:
        ValueError: adapters that do not exist, or cannot be combined, or weights that are no strengths of theirs.
    """
    if isinstance(adapters, str) or len(adapters) != len(weights):
        raise ValueError(f"adapters={adapters!r} and weights={weights!r}: give two lists, one weight for each adapter.")
    if name in configs:
        raise ValueError(f"An adapter named {name!r} exists already: choose another, or delete_adapter() it first.")
    unknown = sorted(set(adapters) - set(configs))
    if unknown:
        raise ValueError(f"There are no adapters {unknown} on this model, which has {sorted(configs)}.")
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"adapters={adapters!r} names one twice: give it the sum of its weights.")
    parts = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        if isinstance(weight, (int, float)) and weight < 0:
            raise ValueError(
                f"Adapter {adapter!r} has the weight {weight}: a pair's weight in a softmax cannot be negative, so "
                "adapters cannot be subtracted from each other as task vectors are (task arithmetic). Leave the "
                "adapter out with a weight of 0."
            )
        parts[adapter] = checked_strength(weight)
    parts = {adapter: weight for adapter, weight in parts.items() if weight}
    if not parts:
        raise ValueError("All weights are 0, which leaves no pairs: use model.disable_adapter() for the base model.")
    for adapter in parts:
        beside = [field for field in ("modules_to_save", "trainable_token_indices") if getattr(configs[adapter], field)]
        if beside:
            raise ValueError(
                f"Adapter {adapter!r} has trained {beside[0]}={getattr(configs[adapter], beside[0])!r} beside its "
                "virtual pairs, which a union of pairs cannot express: combine adapters without it."
            )
        for layer in (module for module in model.modules() if isinstance(module, HiFICLLayer)):
            _check_whole(layer, adapter, configs[adapter])
    field = disagreement({field: [getattr(configs[adapter], field) for adapter in parts] for field in OF_THE_SOFTMAX})
    if field:
        flags = {adapter: getattr(configs[adapter], field) for adapter in parts}
        raise ValueError(
            f"These adapters cannot be combined, they disagree about {field}: {flags}. It belongs to the softmax that "
            "they would share; combine adapters that agree."
        )
    return parts


def _check_whole(layer: HiFICLLayer, adapter: str, config: HiFICLConfig) -> None:
    _, key_dim, value_dim, _ = layer.head_shape
    shapes = config.parameter_shapes(layer.heads[adapter], key_dim, value_dim) if layer.has(adapter) else {}
    for name, shape in shapes.items():
        weight = getattr(layer, name)[adapter].weight
        if weight.is_meta or hasattr(weight, "device_mesh") or weight.shape != shape:
            raise ValueError(
                f"The weights of adapter {adapter!r} are not whole here, they are offloaded or sharded: combine "
                "adapters before the model is dispatched or wrapped."
            )


def config_of_union(configs: Mapping[str, HiFICLConfig], parts: Parts, model: nn.Module) -> HiFICLConfig:
    """The configuration of the union of adapters: n is the sum of theirs, and factors have the ranks of all."""
    those = [configs[adapter] for adapter in parts]
    factorize = [any(getattr(config, field) for config in those) for field in ("factorize_keys", "factorize_values")]
    ranks = [
        sum(config.r if getattr(config, field) else config.n for config in those)
        for field, factorized in zip(("factorize_keys", "factorize_values"), factorize, strict=True)
        if factorized
    ]
    layers = {plain(name): module for name, module in model.named_modules() if isinstance(module, HiFICLLayer)}
    having = {adapter: {name for name, layer in layers.items() if layer.has(adapter)} for adapter in parts}
    everywhere = len(set(map(frozenset, having.values()))) == 1
    weights = any(weight != 1 for weight in parts.values()) or any(config.pair_weights for config in those)
    union = replace(
        copy.deepcopy(those[0]),
        n=sum(config.n for config in those),
        r=max(ranks, default=those[0].r),
        factorize_keys=factorize[0],
        factorize_values=factorize[1],
        pair_weights=weights or not everywhere,
        heads=those[0].heads if len({config.heads for config in those}) == 1 else "query",
    )
    if not everywhere:
        names = sorted({name.removesuffix(f".{MODULE}") for found in having.values() for name in found})
        union.target_modules = "|".join(map(re.escape, names))
        union.exclude_modules = union.layers_to_transform = union.layers_pattern = None
    return union


def condensed(config: HiFICLConfig, configs: Mapping[str, HiFICLConfig], n: int | None, r: int | None) -> HiFICLConfig:
    """The configuration of a union, given its own, that is brought back to n pairs of rank r.

    Args:
        config: of the union.
        configs: of its adapters, whose largest n and r are taken where none is given.
        n: pairs per head.
        r: their rank; if it is given, keys and values are factorised.

    Raises:
        ValueError: more pairs than the union has, or a number below 1.
    """
    if n is not None and n > config.n:
        raise ValueError(
            f"n={n}, but these adapters have {config.n} pairs in all: give fewer, or leave n and r out with "
            "combination_type='cat', which keeps them all."
        )
    return replace(
        config,
        n=max(one.n for one in configs.values()) if n is None else n,
        r=max(one.r for one in configs.values()) if r is None else r,
        factorize_keys=config.factorize_keys or r is not None,
        factorize_values=config.factorize_values or r is not None,
        pair_weights=True,
    )


def fill_with_union(layer: HiFICLLayer, name: str, configs: Mapping[str, HiFICLConfig], parts: Parts) -> float:
    """Set an adapter, made for the configuration of the union, to exactly the pairs of others, and return 0.0.

        K_A = diag(K_A', K_A'', ...)    K_B = [K_B' ; K_B'' ; ...]    w = [w' + log strength' ; ...]

    and V likewise.  Where an adapter holds K whole, its factors are I and K.  A layer that lacks one of the adapters
    gets pairs of weight 0 in its place.  Pairs of key/value heads are repeated where others have those of query heads.
    """
    heads, (_, key_dim, value_dim, _) = layer.heads[name], layer.head_shape
    values: dict[str, Tensor] = {}
    for kind, dim in (("K", key_dim), ("V", value_dim)):
        pieces = [_factors(layer, kind, adapter, configs[adapter].n, dim, heads) for adapter in parts]
        if name in getattr(layer, f"hificl_{kind}"):
            values[f"hificl_{kind}"] = torch.cat([left @ right for left, right in pieces], dim=1)
            continue
        like = torch.cat([right for _, right in pieces], dim=1)  # (H, the sum of ranks, d), in the widest dtype
        n, rank = getattr(layer, f"hificl_{kind}_A")[name].weight.shape[1:]
        whole_left, whole_right = like.new_zeros(heads, n, rank), like.new_zeros(heads, rank, dim)
        whole_right[:, : like.shape[1]] = like
        row = column = 0
        for left, _ in pieces:
            whole_left[:, row : row + left.shape[1], column : column + left.shape[2]] = left
            row, column = row + left.shape[1], column + left.shape[2]
        values |= {f"hificl_{kind}_A": whole_left, f"hificl_{kind}_B": whole_right}
    if name in layer.hificl_W:
        like = next(iter(values.values()))
        logs = [
            _log_weights(layer, adapter, weight, configs[adapter].n, heads, like) for adapter, weight in parts.items()
        ]
        values["hificl_W"] = torch.cat(logs, dim=1)
    for parameter, value in values.items():
        getattr(layer, parameter)[name].weight.data = value
    return 0.0


def _factors(layer: HiFICLLayer, kind: str, adapter: str, n: int, dim: int, heads: int) -> tuple[Tensor, Tensor]:
    """Two factors, (H, n, x) and (H, x, d), of an adapter's keys ("K") or values ("V"); x = 0 where there are none."""
    like = next(layer.parameters())
    if not layer.has(adapter):
        return like.new_zeros(heads, n, 0), like.new_zeros(heads, 0, dim)
    if adapter in getattr(layer, f"hificl_{kind}"):
        whole = _repeated(getattr(layer, f"hificl_{kind}")[adapter].weight, heads)
        return torch.eye(n, dtype=whole.dtype, device=whole.device).expand(heads, n, n), whole
    left, right = (_repeated(getattr(layer, f"hificl_{kind}_{end}")[adapter].weight, heads) for end in "AB")
    return left, right


def _repeated(weight: Tensor, heads: int) -> Tensor:
    return weight.repeat_interleave(heads // len(weight), dim=0)


def _log_weights(layer: HiFICLLayer, adapter: str, strength: float, n: int, heads: int, like: Tensor) -> Tensor:
    """The log-weights (H, n) of an adapter's pairs at a strength."""
    if not layer.has(adapter):
        return like.new_full((heads, n), ABSENT)
    if adapter in layer.hificl_W:
        return _repeated(layer.hificl_W[adapter].weight, heads) + math.log(strength)
    return like.new_full((heads, n), math.log(strength))


def fill_with_condensed(layer: HiFICLLayer, name: str, parts: Parts, scaling: float) -> float:
    """Set an adapter to the pairs of others, brought back to its n and r, and return the relative error of the output.

    Pairs are merged by `condense`; what is left is factorised as by `HiFICLLayer.set_pairs`.
    """
    union = concatenate_pairs(
        [weighted(layer.pairs_of(adapter), math.log(weight)) for adapter, weight in parts.items() if layer.has(adapter)]
    )
    n, union = layer.n[name], _one_weight_each(union, layer.heads[name])
    few = condense(union, n)
    missing = n - few.keys.shape[2]
    keys, values = (nn.functional.pad(tensor[0], (0, 0, 0, missing)) for tensor in few[:2])
    for parameter in layer.adapter_layer_names:
        if name in (held := getattr(layer, parameter)):
            held[name].to(dtype=keys.dtype, device=keys.device)
    assert few.log_weights is not None  # those of a weighted union
    logs = nn.functional.pad(few.log_weights[0].clamp_min(ABSENT), (0, missing), value=ABSENT)
    layer.set_pairs(name, keys, values, logs)
    return output_error(_one_weight_each(layer.pairs_of(name), layer.heads[name]), union, scaling)


def _one_weight_each(pairs: VirtualPairs, heads: int) -> VirtualPairs:
    """Pairs of so many heads with one log-weight each, where the formula has one for each query head that shares it."""
    keys, values = (_repeated(tensor[0], heads)[None] for tensor in pairs[:2])
    logs = pairs.log_weights
    assert logs is not None  # of a weighted set, or of an adapter with pair_weights
    return pairs._replace(keys=keys, values=values, log_weights=logs[:, :: max(logs.shape[1] // heads, 1)])
