"""The adapter on one attention module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import PreTrainedConfig

from .checkpoint import HeadShape
from .config import HiFICLConfig
from .functional import VirtualPairs, concatenate_pairs, select_rows, without_autocast


class HiFICLLayer(nn.Module, BaseTunerLayer):
    """Virtual key-value pairs of one attention module, for any number of adapters.

    Per adapter, with H query heads, n pairs, rank r and head dimensions d (keys) and e (values):

        K_D = K_A K_B    hificl_K_A (H, n, r), hificl_K_B (H, r, d)    or whole: hificl_K (H, n, d)
        V_D = V_A V_B    hificl_V_A (H, n, r), hificl_V_B (H, r, e)    or whole: hificl_V (H, n, e)

    The layer does not wrap the attention module: it is a leaf *inside* it (``self_attn.virtual_pairs``).  No module of
    the base model is renamed, so base checkpoints, disk offload and other adapters (a LoRA on q_proj, before or after)
    see the base model as it always was.  The attention function that this package registers finds the layer on the
    attention module it is handed; see `attention`.

    Calling the layer returns the pairs that an attention call mixes in, or None if it is to run as the base model's.

    Args:
        base_config: the configuration object of the attention module as it was; stays the live source of the
            attention implementation.
        head_shape: query heads, head dimension of keys, head dimension of values.
    """

    adapter_layer_names = ("hificl_K_A", "hificl_K_B", "hificl_V_A", "hificl_V_B", "hificl_K", "hificl_V")
    other_param_names = ("n", "r", "scale_self_attention")

    def __init__(self, base_config: PreTrainedConfig, head_shape: HeadShape) -> None:
        super().__init__()
        self.base_config = base_config
        self.head_shape = head_shape
        self._device_and_dtype = torch.device("cpu"), torch.get_default_dtype()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.n: dict[str, int] = {}
        self.r: dict[str, int] = {}
        self.scale_self_attention: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self.cast_input_dtype_enabled = True  # PEFT's helpers look for it; queries meet the adapter in its own dtype
        self.in_features, self.out_features = head_shape[0] * head_shape[1], head_shape[0] * head_shape[2]
        # State of the parameters, the pairs that it gives, and the memory that keeps the state unique.
        self._multiplied_out: tuple[object, VirtualPairs, list[Tensor]] | None = None
        # While demonstrations are read (see there): what the attention, run without an adapter, is called with.
        self.recorded: list[tuple[Tensor, Tensor]] | None = None

    def update_layer(self, adapter_name: str, config: HiFICLConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Create the parameters of an adapter; its name must be new to this layer.

        Device and dtype are those that the attention computes in; PEFT may cast to float32 afterwards.
        """
        for parameters in self.children():
            if hook := getattr(parameters, "_hf_hook", None):
                from accelerate.hooks import remove_hook_from_module  # noqa: PLC0415 - it is there, it made the hook

                # It offloaded the adapters that were here and does not know the new one: let them stay where they run.
                remove_hook_from_module(parameters)
                parameters.to(device=hook.execution_device)
        for name, shape in config.parameter_shapes(*self.head_shape).items():
            getattr(self, name)[adapter_name] = nn.Parameter(torch.empty(shape))
        self.n[adapter_name] = config.n
        self.r[adapter_name] = config.r
        self.scale_self_attention[adapter_name] = config.scale_self_attention
        self.reset_parameters(adapter_name, config.init_weights)
        self._device_and_dtype = device, dtype
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Initialise an adapter as `HiFICLConfig.init_weights` says.

        A whole K_D starts with the spread that K_A K_B has, a whole V_D at zero.
        """
        root = self.r[adapter_name] ** 0.5
        spread = 1 / root if init_weights == "unit_keys" else 0.01  # of K_B: K_D has sqrt(r) times as much
        stds = {"hificl_K_B": spread, "hificl_V_B": 0.0, "hificl_K": spread * root, "hificl_V": 0.0}
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                std = stds.get(name, 1.0) if init_weights else 1.0
                nn.init.normal_(getattr(self, name)[adapter_name], std=std)

    @torch.no_grad()
    def set_pairs(self, adapter_name: str, keys: Tensor, values: Tensor) -> None:
        """Give an adapter these pairs, (H or G, n, d) and (H or G, n, e), or their best approximations of rank r.

        With the singular value decomposition ``X = U S W`` cut off at rank r and a random rotation R,
        ``A = sqrt(n) U R`` and ``B = R' S W / sqrt(n)``: A has the spread of the other initialisations, and no factor
        of B is all small.
        """
        heads = self.head_shape[0]
        for kind, pairs in (("K", keys), ("V", values)):
            whole = pairs.repeat_interleave(heads // pairs.shape[0], dim=0).float()  # (H, n, d)
            if adapter_name in getattr(self, f"hificl_{kind}"):
                getattr(self, f"hificl_{kind}")[adapter_name].copy_(whole)
                continue
            left, right = (getattr(self, f"hificl_{kind}_{factor}")[adapter_name] for factor in "AB")
            n, rank = left.shape[1:]
            u, s, w = torch.linalg.svd(whole, full_matrices=False)  # (H, n, k), (H, k), (H, k, d)
            k = min(rank, s.shape[1])
            rotation = torch.linalg.qr(torch.randn(heads, k, k, device=whole.device))[0]
            nn.init.normal_(left)  # what a rank above k leaves over meets zeros
            right.zero_()
            left[:, :, :k].copy_(n**0.5 * u[:, :, :k] @ rotation)
            right[:, :k].copy_(rotation.mT @ (s[:, :k, None] * w[:, :k]) / n**0.5)

    def forward(
        self, batch_size: int, adapter_names: list[str] | None = None, reuse: bool = False
    ) -> VirtualPairs | None:
        """The virtual pairs for one attention call.

        Args:
            batch_size: rows of the call.
            adapter_names: one adapter per row ("__base__": none) instead of the active adapters.
            reuse: while decoding; pairs of frozen adapters that were multiplied out before are used again, unless a
                parameter has changed since.

        Raises:
            ValueError: ``adapter_names`` is not one name per row.
        """
        if self.disable_adapters:
            return None
        if any(getattr(vars(kind).get("_hf_hook"), "offload", False) for kind in self.children()):
            # accelerate keeps the parameters elsewhere and brings them in for modules that are called; a
            # ParameterDict is not.
            with onload_layer(self):
                pairs = self._select(batch_size, adapter_names, reuse, keep=False)
            for tensor in (pairs.keys, pairs.values) if pairs is not None else ():
                if tensor.requires_grad:
                    tensor.register_hook(_refuse_gradient)
            return pairs
        return self._select(batch_size, adapter_names, reuse)

    def _select(
        self, batch_size: int, adapter_names: list[str] | None, reuse: bool, keep: bool = True
    ) -> VirtualPairs | None:
        if adapter_names is not None:
            if len(adapter_names) != batch_size:
                raise ValueError(
                    f"adapter_names has {len(adapter_names)} entries for a batch of {batch_size} rows: give one per "
                    "row."
                )
            names = sorted(set(adapter_names))
            choices = [self._pairs(name) if name in self.n else None for name in names]
            return select_rows(choices, [names.index(name) for name in adapter_names])
        active = [name for name in self.active_adapters if name in self.n]
        return self._union(active, reuse, keep) if active else None

    def _union(self, names: list[str], reuse: bool, keep: bool) -> VirtualPairs:
        if torch.compiler.is_compiling() or not keep:
            return concatenate_pairs([self._pairs(name) for name in names])
        state, known = self._state(names), self._multiplied_out
        if reuse and state is not None and known is not None and known[0] == state:
            return known[1]
        pairs = concatenate_pairs([self._pairs(name) for name in names])
        if state is not None:
            kinds = [getattr(self, kind) for kind in self.adapter_layer_names]
            held = [kind[name].detach() for kind in kinds for name in names if name in kind]
            self._multiplied_out = (state, pairs, held)
        else:
            self._multiplied_out = None  # a fused optimizer changes parameters without counting their version up
        return pairs

    def _state(self, names: list[str]) -> tuple[object, ...] | None:
        """What tells whether parameters have changed; None while they are trained.

        An edit in place counts the version up; anything else is other memory, as what `_multiplied_out` holds is not
        freed.
        """
        if (
            torch._C._are_functorch_transforms_active()
            or _get_current_dispatch_mode() is not None  # fake tensors, for one
            or torch._C._is_tracing()
        ):
            return None
        state: list[object] = [torch.is_inference_mode_enabled(), *names]
        state += [self.scale_self_attention[name] for name in names]
        for kind in self._modules.values():
            held = kind._parameters if kind is not None else {}
            for name in names:
                parameter = held.get(name)
                if parameter is not None:
                    if parameter.requires_grad or parameter.is_inference():
                        return None
                    if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
                        return None
                    state += (parameter.data_ptr(), parameter._version)
        return tuple(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_multiplied_out": None}

    def _pairs(self, adapter_name: str) -> VirtualPairs:
        return VirtualPairs(
            keys=self._product("hificl_K", adapter_name),
            values=self._product("hificl_V", adapter_name),
            scale_self_attention=self.scale_self_attention[adapter_name],
        )

    def _product(self, name: str, adapter_name: str) -> Tensor:
        whole: nn.ParameterDict = getattr(self, name)
        if adapter_name in whole:
            return whole[adapter_name][None]  # (1, H, n, d)
        left, right = getattr(self, f"{name}_A")[adapter_name], getattr(self, f"{name}_B")[adapter_name]
        with without_autocast(left.device):
            return torch.bmm(left, right)[None]  # (1, H, n, d)

    # -- what PEFT asks of a tuner layer -------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; several of them share one softmax.

        Raises:
            ValueError: the adapters disagree about scale_self_attention.
        """
        self.check_together([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def check_together(self, names: list[str]) -> None:
        """Raise a ValueError if these adapters cannot share one softmax."""
        flags = {name: self.scale_self_attention[name] for name in names if name in self.scale_self_attention}
        if len(set(flags.values())) > 1:
            raise ValueError(
                f"These adapters cannot be active together, they disagree about scale_self_attention: {flags}. It "
                "belongs to the softmax that they would share; activate adapters that agree."
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter of this layer."""
        self._multiplied_out = None
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> NoReturn:
        raise NotImplementedError(CANNOT_MERGE)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self._device_and_dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._multiplied_out = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        heads, key_dim, value_dim = self.head_shape
        return f"heads={heads}, key_dim={key_dim}, value_dim={value_dim}, n={self.n}, r={self.r}"

    # BaseTunerLayer would look for them on the module it wraps; this layer wraps none.
    weight: Any = None
    bias: Any = None


def _refuse_gradient(gradient: Tensor) -> NoReturn:
    """The weights that accelerate has brought in for one forward take their gradients along when they go."""
    raise RuntimeError(
        "This HiFICL adapter is offloaded by accelerate, so its gradients would be lost: offload the base model first "
        "and attach the adapter afterwards, which stays in memory and can be trained."
    )


CANNOT_MERGE = (
    "A HiFICL adapter cannot be merged: its virtual key-value pairs add columns to the attention's softmax, which no "
    "change of the base weights can express. Use `unload()` to get the base model back, or keep the adapter attached."
)
