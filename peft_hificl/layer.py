"""The adapter on one attention module."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .config import HiFICLConfig
from .names import HeadShape
from .offloading import accelerate_hooks
from .ops.formula import (
    OF_THE_SOFTMAX,
    VirtualPairs,
    concatenate_pairs,
    disagreement,
    select_rows,
    weighted,
    without_autocast,
)
from .rows import running
from .sharding import Sharding, like, local

_IDENTITY_MASS = 2e-4  # of all pairs of a head, at scores of zero


class Factor(nn.Module):
    """One parameter of one adapter: ``virtual_pairs.hificl_K_A.default.weight``.

    It is a module, and is called to get its value, because other libraries rely on that form: TRL copies the parameters
    with ``.default.`` in their name, FSDP wraps childless modules that have a ``weight``, and accelerate and DeepSpeed
    load offloaded or partitioned weights when the module that owns them is called.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, left: Tensor | None = None) -> Tensor:
        """The weight, (H, x, y), or its product with `left`, (H, w, x)."""
        if left is None:
            value = local(self.weight).clone()  # FSDP frees the weight's memory when this returns
        else:
            with without_autocast(left.device):
                value = torch.bmm(left, local(self.weight))
        if value.requires_grad and any(getattr(hook, "offload", False) for hook in accelerate_hooks(self)):
            value.register_hook(_refuse_gradient)
        return value

    def fill(self, value: Tensor) -> None:
        """Set the weight, (H, x, y) or (H, x), of all heads."""
        self.weight.copy_(like(value, self.weight, source=0))


class HiFICLLayer(nn.Module, BaseTunerLayer):
    """Virtual key-value pairs of one attention module, for any number of adapters.

    Per adapter, with H query heads (key/value heads, if its `heads` is "kv"), n pairs, rank r and head dimensions d
    (keys) and e (values):

        K_D = K_A K_B    hificl_K_A (H, n, r), hificl_K_B (H, r, d)    or whole: hificl_K (H, n, d)
        V_D = V_A V_B    hificl_V_A (H, n, r), hificl_V_B (H, r, e)    or whole: hificl_V (H, n, e)
        w                hificl_W (H, n), log-weights of the pairs, with `pair_weights`

    An adapter's strength, `scaling[name]`, adds its logarithm to the log-weights of all pairs: 1 is the adapter as it
    was trained, 0 the base model.  It is a setting of the running model, which is not saved.  `set_scale`,
    `scale_layer` and `unscale_layer` change it, with the meanings that they have in PEFT's LoRA layers.

    The layer does not wrap the attention module but sits *inside* it (``self_attn.virtual_pairs``).  No module of the
    base model is renamed, so base checkpoints, disk offload and other adapters (such as a LoRA on q_proj) still find
    every module under its name.  The attention function that this package registers takes the layer from the
    attention module that it is called with; see `interface`.

    Args:
        base_config: the original configuration object of the attention module, from which the attention implementation
            is read on every call.
        head_shape: query and key/value heads, head dimension of keys, head dimension of values.

    Attributes:
        sharding: where the parameters of the next adapter will be, if ranks share the base model; see `sharding`.
    """

    hificl_W: Any  # noqa: N815  # a ModuleDict, as the others that are looked up by name
    adapter_layer_names = ("hificl_K_A", "hificl_K_B", "hificl_V_A", "hificl_V_B", "hificl_K", "hificl_V", "hificl_W")
    other_param_names = (
        "n", "r", "heads", *OF_THE_SOFTMAX, "scaling", "log_scaling", "awaits_weights", "had_gradient",
    )  # fmt: skip

    def __init__(self, base_config: PreTrainedConfig, head_shape: HeadShape) -> None:
        super().__init__()
        self.base_config = base_config
        self.head_shape = head_shape
        self.sharding: Sharding | None = None
        self._device_and_dtype = torch.device("cpu"), torch.get_default_dtype()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.n: dict[str, int] = {}
        self.r: dict[str, int] = {}
        self.heads: dict[str, int] = {}  # how many have pairs: the query heads or the key/value heads
        self.scale_self_attention: dict[str, bool] = {}
        self.skip_first_token: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        # The logarithms of strengths that have been set, for compiled code, which would be compiled anew for another
        # float.  On the CPU, wherever the layer is: a tensor without dimensions mixes with those of every device.
        self.log_scaling: dict[str, Tensor] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self.cast_input_dtype_enabled = True  # PEFT's helpers read and set it; it has no effect here
        heads, key_dim, value_dim, _ = head_shape
        self.in_features, self.out_features = heads * key_dim, heads * value_dim
        self.awaits_weights: dict[str, bool] = {}  # True: has no effect until PEFT has loaded its weights
        # For `watch`: how often this layer was called, which adapters have ever had a gradient, and which adapters have
        # given pairs to the current forward without having had a gradient yet.
        self.calls = 0
        self.had_gradient: dict[str, bool] = {}
        self.awaits_gradient: set[str] = set()

    def update_layer(self, adapter_name: str, config: HiFICLConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Create the parameters of an adapter, whose name must be new to this layer.

        They get the device and dtype that the attention computes in; PEFT may cast them to float32 afterwards.
        """
        heads, key_dim, value_dim, groups = self.head_shape
        heads = groups if config.heads == "kv" else heads
        factors = {name: Factor(shape) for name, shape in config.parameter_shapes(heads, key_dim, value_dim).items()}
        for name, factor in factors.items():
            getattr(self, name)[adapter_name] = factor
        self.n[adapter_name] = config.n
        self.r[adapter_name] = config.r
        self.heads[adapter_name] = heads
        for name in OF_THE_SOFTMAX:
            getattr(self, name)[adapter_name] = getattr(config, name)
        self.scaling[adapter_name] = 1.0
        self.awaits_weights[adapter_name] = self.had_gradient[adapter_name] = False
        self.reset_parameters(adapter_name, config.init_weights)
        self._device_and_dtype = device, dtype
        for factor in factors.values():
            if not factor.weight.is_meta:
                factor.to(device=device, dtype=dtype)
            if self.sharding is not None:
                self.sharding.place(factor)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Initialise an adapter as `HiFICLConfig.init_weights` says.

        A whole K_D starts with the standard deviation that K_A K_B has, a whole V_D at zero, and log-weights at zero
        or, for "identity", where n scores of zero have a Z_D of 0.0002.
        """
        root = self.r[adapter_name] ** 0.5
        spread = 1 / root if init_weights == "unit_keys" else 0.01  # of K_B; that of K_A K_B is sqrt(r) times larger
        stds = {"hificl_K_B": spread, "hificl_V_B": 0.0, "hificl_K": spread * root, "hificl_V": 0.0, "hificl_W": 0.0}
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                std = stds.get(name, 1.0) if init_weights else 1.0
                weight = getattr(self, name)[adapter_name].weight
                if weight.is_meta:  # there is nothing to fill, and torch is slow to find out
                    continue
                if name == "hificl_W" and std == 0:  # nothing is drawn, so that all other factors start as without it
                    small = init_weights == "identity" and self.scale_self_attention[adapter_name]
                    weight.fill_(math.log(_IDENTITY_MASS / self.n[adapter_name]) if small else 0.0)
                else:
                    nn.init.normal_(weight, std=std)

    @torch.no_grad()
    def set_pairs(self, adapter_name: str, keys: Tensor, values: Tensor, log_weights: Tensor | None = None) -> None:
        """Set an adapter to these pairs, (H or G, n, d) and (H or G, n, e), or to their best approximation of rank r.

        With the singular value decomposition ``X = U S W`` truncated at rank r and a random rotation R,
        ``A = sqrt(n) U R`` and ``B = R' S W / sqrt(n)``.  So the entries of A have variance one, as in the other
        initialisations, and the rotation spreads the singular values over all rows of B.  Log-weights, where
        the adapter has them, become `log_weights`, of the heads that have pairs, or zero.

        Raises:
            ValueError: more heads than the adapter has pairs for.
        """
        heads = self.heads[adapter_name]
        if heads % keys.shape[0]:
            raise ValueError(
                f"Pairs of {keys.shape[0]} heads for an adapter with pairs of {heads}: give those of the key/value "
                'heads, or use an adapter of HiFICLConfig(heads="query").'
            )
        if adapter_name in self.hificl_W:
            logs = torch.zeros(1, 1) if log_weights is None else log_weights
            logs = logs.repeat_interleave(heads // len(logs), dim=0)
            self.hificl_W[adapter_name].fill(logs.expand(heads, self.n[adapter_name]))
        for kind, pairs in (("K", keys), ("V", values)):
            whole = pairs.repeat_interleave(heads // pairs.shape[0], dim=0).float()  # (H, n, d)
            if adapter_name in getattr(self, f"hificl_{kind}"):
                getattr(self, f"hificl_{kind}")[adapter_name].fill(whole)
                continue
            factors = [getattr(self, f"hificl_{kind}_{factor}")[adapter_name] for factor in "AB"]
            left, right = (torch.empty(f.weight.shape, dtype=f.weight.dtype, device=f.weight.device) for f in factors)
            n, rank = left.shape[1:]
            u, s, w = torch.linalg.svd(whole, full_matrices=False)  # (H, n, k), (H, k), (H, k, d)
            k = min(rank, s.shape[1])
            rotation = torch.linalg.qr(torch.randn(heads, k, k, device=whole.device))[0]
            nn.init.normal_(left)  # columns beyond k are multiplied by rows of zeros
            right.zero_()
            left[:, :, :k].copy_(n**0.5 * u[:, :, :k] @ rotation)
            right[:, :k].copy_(rotation.mT @ (s[:, :k, None] * w[:, :k]) / n**0.5)
            for factor, value in zip(factors, (left, right), strict=True):
                factor.fill(value)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> VirtualPairs | None:
        """The virtual pairs for one attention call: of the active adapters, or of each row's own (see `rows`).

        Args:
            query: ``(B, H, T, d)``.
            key: ``(B, G, S, d)``; not used here, but read by the forward pre-hook of `demonstrations`.
            value: ``(B, G, S, e)``; as `key`.
            scaling: factor of the scores; as `key`.

        Returns:
            The pairs, or None if no adapter takes part in this call.

        Raises:
            ValueError: `adapter_names` was given, and it is not certain which row has which adapter.
        """
        if not torch.compiler.is_compiling():
            self.calls += 1
        if self.disable_adapters:
            return None
        rows = running.modules.get(self)
        if rows is not None:
            adapter_names = rows.spread(len(query))
            names = sorted(set(adapter_names))
            choices = [self._pairs(name) if self._takes_part(name) else None for name in names]
            return select_rows(choices, [names.index(name) for name in adapter_names])
        active = self.active_names
        return concatenate_pairs([self._pairs(name) for name in active]) if active else None

    @property
    def active_names(self) -> list[str]:
        """The adapters that take part in a call without `adapter_names`."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if self._takes_part(name)]

    @property
    def is_active(self) -> bool:
        return bool(self.active_names)

    def has(self, adapter_name: str) -> bool:
        """Whether this layer has parameters of an adapter."""
        return adapter_name in self.n

    def _takes_part(self, adapter_name: str) -> bool:
        """Whether an adapter that is asked for gives pairs: it is here, loaded, and of a strength above 0."""
        if not self.has(adapter_name) or self.awaits_weights[adapter_name]:
            return False
        # Compiled code does not look at the number: strength 0 is a log-weight of -inf there.
        return torch.compiler.is_compiling() or self.scaling[adapter_name] != 0

    def pairs_of(self, adapter_name: str) -> VirtualPairs:
        """The pairs of an adapter as it was trained, whatever its strength: (1, H, n, d), (1, H, n, e), (1, H, n)."""
        keys, values = self._product("hificl_K", adapter_name), self._product("hificl_V", adapter_name)
        log_weights = None
        if adapter_name in self.hificl_W:
            log_weights = self.hificl_W[adapter_name]()[None]
            log_weights = log_weights.repeat_interleave(self.head_shape.heads // self.heads[adapter_name], dim=1)
        of_the_softmax = (getattr(self, name)[adapter_name] for name in OF_THE_SOFTMAX)
        return VirtualPairs(keys, values, log_weights, *of_the_softmax)

    def _pairs(self, adapter_name: str) -> VirtualPairs:
        pairs = self.pairs_of(adapter_name)
        if torch.is_grad_enabled() and not self.had_gradient[adapter_name] and not torch.compiler.is_compiling():
            for product in pairs[:2]:
                if product.requires_grad:
                    self.awaits_gradient.add(adapter_name)
                    product.register_hook(lambda grad: self._gradient_came(adapter_name))
        log_strength: float | Tensor | None
        if torch.compiler.is_compiling():
            log_strength = self.log_scaling.get(adapter_name)
        else:
            strength = self.scaling[adapter_name]
            log_strength = None if strength == 1 else math.log(strength)
        return pairs if log_strength is None else weighted(pairs, log_strength)

    def _gradient_came(self, adapter_name: str) -> None:
        self.awaits_gradient.discard(adapter_name)
        if adapter_name in self.had_gradient:  # it may have been deleted since the forward
            self.had_gradient[adapter_name] = True

    def _product(self, name: str, adapter_name: str) -> Tensor:
        whole: nn.ModuleDict = getattr(self, name)
        if adapter_name in whole:
            product = whole[adapter_name]()
        else:
            left, right = getattr(self, f"{name}_A")[adapter_name], getattr(self, f"{name}_B")[adapter_name]
            product = right(left())
        return product[None]  # (1, H, n, d)

    # -- strength --------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter; nothing happens if this layer does not have it.

        Raises:
            ValueError: a strength that is negative or not finite.
            TypeError: a strength that is not a number.
        """
        scale = checked_strength(scale)
        if self.has(adapter):
            self._set_scaling({adapter: scale})

    def scale_layer(self, scale: float) -> None:
        """Multiply the strengths of the active adapters; errors are those of `set_scale`."""
        scale = checked_strength(scale)
        if scale != 1:
            self._set_scaling({name: self.scaling[name] * scale for name in self.active_adapters if self.has(name)})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strengths of the active adapters, or set them to 1; errors are those of `set_scale`."""
        names = [name for name in self.active_adapters if self.has(name)]
        if scale is None:
            self._set_scaling(dict.fromkeys(names, 1.0))
            return
        if checked_strength(scale) == 0:
            raise ValueError("A strength cannot be divided by 0: unscale_layer() without a number sets it back to 1.")
        self._set_scaling({name: self.scaling[name] / scale for name in names})

    @torch.inference_mode(False)  # a tensor made in inference mode could not be changed outside of it
    def _set_scaling(self, strengths: dict[str, float]) -> None:
        """Set strengths, all or none."""
        for name, strength in {name: checked_strength(value) for name, value in strengths.items()}.items():
            log = math.log(strength) if strength else -math.inf
            if name in self.log_scaling:
                self.log_scaling[name].fill_(log)
            else:
                self.log_scaling[name] = torch.tensor(log, dtype=torch.float64, device="cpu")
            self.scaling[name] = strength

    # -- what PEFT asks of a tuner layer -------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; several of them share one softmax.

        Raises:
            ValueError: the adapters disagree about scale_self_attention or skip_first_token.
        """
        self.check_together([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def check_together(self, names: list[str]) -> None:
        """Raise a ValueError if these adapters cannot share one softmax."""
        own = [name for name in names if self.has(name)]
        differing = disagreement({field: [getattr(self, field)[name] for name in own] for field in OF_THE_SOFTMAX})
        if differing:
            found = {name: getattr(self, differing)[name] for name in own}
            raise ValueError(
                f"These adapters cannot be active together, they disagree about {differing}: {found}. It belongs to "
                "the softmax that they would share; activate adapters that agree."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> NoReturn:
        raise NotImplementedError(CANNOT_MERGE)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self._device_and_dtype

    def extra_repr(self) -> str:
        heads, key_dim, value_dim, groups = self.head_shape
        return (
            f"heads={heads}, key/value heads={groups}, key_dim={key_dim}, value_dim={value_dim}, n={self.n}, r={self.r}"
        )

    # BaseTunerLayer has properties of these names that read the wrapped module; this layer wraps none.
    weight: Any = None
    bias: Any = None


def layers_with(model: nn.Module, adapter_name: str) -> list[HiFICLLayer]:
    """The layers of a model that have parameters of an adapter."""
    return [module for module in model.modules() if isinstance(module, HiFICLLayer) and module.has(adapter_name)]


def forget_unloaded(model: nn.Module, adapter_name: str) -> None:
    """Remove what an earlier load has left of an adapter whose weights it could not read: the name is free again."""
    for layer in layers_with(model, adapter_name):
        if layer.awaits_weights[adapter_name]:
            layer.delete_adapter(adapter_name)


def checked_strength(strength: float) -> float:
    """The strength of an adapter as a float.

    Raises:
        ValueError: it is negative or not finite.
        TypeError: it is not a number.
    """
    if not isinstance(strength, Real):
        raise TypeError(f"The strength of an adapter must be a number, found {type(strength).__name__}: {strength!r}.")
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(
            f"The strength of an adapter must be a finite number of at least 0, found {strength}: it multiplies the "
            "weights of the pairs in the softmax, which cannot be negative. 0 is the base model, 1 the adapter as it "
            "was trained."
        )
    return float(strength)


def _refuse_gradient(gradient: Tensor) -> NoReturn:
    """accelerate removes the weights after each forward, and their gradients would be lost with them."""
    raise RuntimeError(
        "This HiFICL adapter is offloaded by accelerate, so its gradients would be lost: offload the base model first "
        "and attach the adapter afterwards, which stays in memory and can be trained."
    )


CANNOT_MERGE = (
    "A HiFICL adapter cannot be merged: its virtual key-value pairs add columns to the attention's softmax, which no "
    "change of the base weights can express. Use `unload()` to get the base model back, or keep the adapter attached."
)
