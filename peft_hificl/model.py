"""The HiFICL tuner: attaches adapters to the attention modules of a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from . import (
    checkpoint,
    composition,
    continuous_batching,
    hooks,
    interface,
    loading,
    offloading,
    preflight,
    rows,
    sharding,
    support,
    targets,
)
from .config import HiFICLConfig
from .layer import CANNOT_MERGE, HiFICLLayer, forget_unloaded, layers_with
from .names import MODULE, PREFIX, adapter_of, module_of, plain, uncompiled
from .undo import Undo


class HiFICLModel(BaseTuner):
    """Learns n virtual key-value pairs per attention head of a frozen model (HiFICL, arXiv 2603.12760).

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to adapt.
        peft_config ([`HiFICLConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, `"default"` if PEFT is not told otherwise.
        low_cpu_mem_usage (`bool`): Create the adapter's weights on the meta device, as they are loaded next.

    Raises:
        ValueError: nothing to adapt, an adapter name that is taken, or a stored adapter of another base model.
        TypeError: a target that is not attention, or an attention that HiFICL cannot adapt.

    Everything is checked before the model is changed, and after an error the model is as it was before.

    Example:

        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig
        >>> base = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        ...                                     num_attention_heads=4, num_key_value_heads=2, vocab_size=99))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8))
        >>> model.print_trainable_parameters()
        trainable params: 3,072 || all params: 65,216 || trainable%: 4.7105
    """

    prefix = PREFIX
    tuner_layer_cls = HiFICLLayer
    target_module_mapping: dict[str, list[str]] = {}  # targets are found by structure

    def __init__(
        self,
        model: nn.Module,
        peft_config: HiFICLConfig | dict[str, HiFICLConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        self._unloaded: dict[str, Undo] = {}  # adapters whose weights PEFT is about to read
        before = getattr(model, "peft_config", None)
        others = dict(before or {})
        try:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except BaseException:  # PEFT stores the configuration on the model before it attaches the adapter
            if before is None:
                vars(model).pop("peft_config", None)
                if getattr(model, "_hf_peft_config_loaded", False):  # set by transformers before it calls PEFT
                    model._hf_peft_config_loaded = False  # type: ignore[assignment]
            else:
                before.clear()
                before.update(others)
            raise

    # -- attaching ------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        self._unloaded.clear()  # the model changes here, so an earlier load can no longer be undone
        with self._configured(adapter_name, model) as (config, load):
            state_dict = self._in_names_of(model, state_dict)
            names = {key.rpartition(f".{PREFIX}")[0] for key in state_dict or ()} or {
                name for name in self._own_names(model) if name and self._check_target_module_exists(config, name)
            }
            preflight.check(model, adapter_name, config, names, load)
            if load is not None:
                preflight.check_load(self, adapter_name, config, load, state_dict)
            forget_unloaded(model, adapter_name)
            with Undo(model, adapter_name) as undo:  # PEFT makes some of its own checks after the change
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
                hooks.refresh(model)
                rows.install(model)
                continuous_batching.guard(model)
                offloading.note_in_device_map(model)
                if load is not None:
                    self._prepare_load(model, adapter_name, load, undo)

    @contextmanager
    def _configured(self, adapter_name: str, model: nn.Module) -> Iterator[tuple[HiFICLConfig, loading.Load | None]]:
        """Fill in the targets and base class of an adapter's configuration, and restore it if attaching fails.

        The configuration in `peft_config` must be the very object that the user passed, because PEFT goes on to change
        that one (a model for sequence classification adds its head to `modules_to_save`).  There is one exception: if
        the object is already in use for another model, and this model's targets differ from those found there, this
        model gets a copy, so that each configuration holds the targets of its own model.
        """
        config, named = self.peft_config[adapter_name], list(self.targeted_module_names)
        noted = config.target_modules, config.auto_mapping
        try:
            preflight.check_kind(model)
            load = loading.in_progress(config)
            if isinstance(config.target_modules, (targets.FoundPattern, targets.FoundNames)):
                searched = copy.copy(config)
                searched.target_modules = None
                self._prepare_adapter_config(searched, self.get_model_config(model))
                if searched.target_modules != config.target_modules:
                    config = self.peft_config[adapter_name] = searched
            self._prepare_adapter_config(config, self.get_model_config(model))
            if type(model).__module__.startswith("transformers."):  # PEFT fills it in only if there is no task type
                kind = type(model)
                config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            found = isinstance(config.target_modules, targets.FoundNames)
            yield config, load
            if found:  # of 20 names or more, PEFT may have made a plain set of shorter ones
                config.target_modules = targets.FoundNames(config.target_modules)
        except BaseException:
            self.targeted_module_names = named
            self.peft_config.pop(adapter_name, None)
            config.target_modules, config.auto_mapping = noted
            raise

    def _prepare_load(self, model: nn.Module, adapter_name: str, load: loading.Load, undo: Undo) -> None:
        if load.by_peft:  # if PEFT fails to read the weights next, the adapter must have no effect
            self._unloaded[adapter_name] = undo
            for layer in layers_with(model, adapter_name):
                layer.awaits_weights[adapter_name] = True
        else:
            # transformers reads the weights again, without the tuner.  In case that fails, or finds no parameters of
            # their names, they are loaded here already.
            values = self._in_keys_of(model, adapter_name, load.tensors)
            places = model.state_dict()
            values |= {key: sharding.like(value, places[key]) for key, value in values.items() if key in places}
            model.load_state_dict(values, strict=False)

    @staticmethod
    def _own_names(model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if not isinstance(module, OptimizedModule)]

    def _in_names_of(self, model: nn.Module, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """A state dict whose keys have the attention's live name before ``.hificl_``, where PEFT reads the targets."""
        if state_dict is None:
            return None
        live = {plain(name): name for name in self._own_names(model)}
        attentions = {key: live.get(name, name) for key in state_dict if (name := module_of(key))}
        return {f"{name}{key[key.rindex(f'.{PREFIX}') :]}": state_dict[key] for key, name in attentions.items()}

    @staticmethod
    def _check_target_module_exists(config: HiFICLConfig, key: str) -> Any:
        return check_target_module_exists(config, plain(key))

    def _prepare_adapter_config(self, peft_config: HiFICLConfig, model_config: dict[str, Any]) -> HiFICLConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = targets.default_targets(self.model, peft_config)  # type: ignore[assignment]
        return peft_config

    def _create_and_replace(
        self,
        peft_config: HiFICLConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # A pattern may match the layer of an earlier adapter too, and torch.compile's wrapper of an attention, which is
        # itself matched under the same plain name.
        if isinstance(target, (HiFICLLayer, OptimizedModule)):
            return
        shape = support.head_shape_of(target)
        placed = sharding.sharding_of(self.model, current_key, target, shape)
        layer = getattr(target, MODULE, None)
        if layer is None:
            others = (module for module in self.model.modules() if isinstance(module, HiFICLLayer))
            disabled = any(other.disable_adapters for other in others)  # as disable_adapter_layers() has left them
            layer = interface.attach(target, shape)
            layer._disable_adapters = disabled
        layer.sharding = placed  # FSDP2 may have come after an earlier adapter
        layer.update_layer(adapter_name, peft_config, *offloading.device_and_dtype(target))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; several of them share one softmax.

        Raises:
            ValueError: the adapters disagree about scale_self_attention or skip_first_token, or the weights of one
                were never read.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        _check_loaded(self.model, names)
        self._unloaded.clear()
        for module in self.modules():
            if isinstance(module, HiFICLLayer):
                module.check_together(names)  # all of them before the first one is switched
        super().set_adapter(adapter_name, inference_mode)

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal["cat", "svd"] = "cat",
        n: int | None = None,
        r: int | None = None,
    ) -> dict[str, float]:
        """Add an adapter that combines others: their pairs in one softmax, each adapter with a strength of its own.

            Z_D = sum over adapters a of  weight_a * sum over pairs i of a  exp(s(k_D,i) + w_i)

        The others stay as they are.  As with LoRA's method of this name, the new adapter is not active, and is saved
        and loaded like any other.

        Args:
            adapters (`list[str]`): The adapters to combine.  Layers that only some of them have are included.
            weights (`list[float]`): The strength of each; 0 leaves an adapter out.  What `set_scale` has set for the
                running model does not count.
            adapter_name (`str`): The name of the new adapter.
            combination_type (`str`): "cat" keeps all pairs: n is the sum of all n, and the model answers as it does
                with these adapters active together at these strengths.  "svd" brings them back to `n` pairs per head,
                merged into weighted ones, of rank `r` (truncated singular value decomposition).
            n (`int`, *optional*): Of "svd"; None: the largest n of the adapters.
            r (`int`, *optional*): Of "svd"; None: the largest r of the adapters.

        Returns:
            `dict[str, float]`: For each adapted module, the relative error of the attention output, 0.0 with "cat".  It
            is measured with random queries (entries ~ N(0, 1)), each of which gives half of its attention to the pairs:
            0.1 means that what the pairs write changes by 10 % in norm.

        Raises:
            ValueError: adapters that do not exist, disagree about `scale_self_attention` or `skip_first_token`, have
                trained more than pairs, are offloaded or sharded; a name that is taken; a weight that is negative or
                not finite, or none above 0; `n` or `r` that do not fit.

        Example:

            >>> from peft import get_peft_model
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from peft_hificl import HiFICLConfig
            >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
            >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
            >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=2, r=2), adapter_name="a")
            >>> model.add_adapter("b", HiFICLConfig(task_type="CAUSAL_LM", n=3, r=2))
            >>> model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "both")
            {'model.layers.0.self_attn': 0.0}
            >>> model.peft_config["both"].n
            5
        """
        if combination_type not in ("cat", "svd"):
            raise ValueError(
                f"combination_type must be 'cat' or 'svd', found {combination_type!r}: HiFICL has no other, as its "
                "adapters are not added up but share a softmax."
            )
        if combination_type == "cat" and (n, r) != (None, None):
            raise ValueError("combination_type='cat' keeps all pairs, so it takes no n and r: use 'svd' for fewer.")
        parts = composition.check(self.peft_config, self.model, adapters, weights, adapter_name)
        _check_loaded(self.model, parts)
        configs = {name: self.peft_config[name] for name in parts}
        config = composition.config_of_union(configs, parts, self.model)
        if combination_type == "svd":
            config = composition.condensed(config, configs, n, r)
        targeted = list(self.targeted_module_names)
        names = {module: name.rpartition(".")[0] for name, module in self.model.named_modules()}
        errors = {}
        try:
            with Undo(self.model, adapter_name):
                self.peft_config[adapter_name] = config
                self.inject_adapter(self.model, adapter_name)
                for layer in layers_with(self.model, adapter_name):
                    attention = self.model.get_submodule(names[layer])
                    scaling = getattr(attention, "scaling", layer.head_shape.key_dim**-0.5)
                    errors[plain(names[layer])] = (
                        composition.fill_with_union(layer, adapter_name, configs, parts)
                        if combination_type == "cat"
                        else composition.fill_with_condensed(layer, adapter_name, parts, scaling)
                    )
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            self.targeted_module_names = targeted
            raise
        return errors

    # -- detaching ------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for module in list(self.model.modules()):
            if isinstance(getattr(module, MODULE, None), HiFICLLayer):
                interface.detach(module)
        hooks.refresh(self.model)
        continuous_batching.unguard(self.model)
        offloading.note_in_device_map(self.model)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Called when PEFT's wrappers of modules_to_save and trained tokens are removed; no weight has to be moved.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active and no other is, the first one that is left becomes active."""
        if adapter_name in self.active_adapters:
            loaded = {n for m in self.modules() if isinstance(m, HiFICLLayer) for n in m.n if not m.awaits_weights[n]}
            others = sorted(loaded - {adapter_name})
            active = [name for name in self.active_adapters if name != adapter_name] or others[:1]
            if active:  # otherwise each layer would choose by itself, and layers may differ in their adapters
                warnings.warn(f"{adapter_name} was active; active from now on: {', '.join(active)}.", stacklevel=3)
                self.set_adapter(active)
        self._unloaded.clear()
        super().delete_adapter(adapter_name)

    # -- saving and loading ---------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: HiFICLConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        _check_loaded(model, [adapter_name])
        kinds = HiFICLLayer, AuxiliaryTrainingWrapper
        places = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
        own = [name for name, m in places.items() if not isinstance(m, HiFICLLayer) or m.has(adapter_name)]
        preflight.check_told_apart(unwanted_adapter_names, own)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT selects keys that begin with the name of a layer.  FSDP1 and checkpoint_wrapper add to the names of
        # modules, but not to keys, so PEFT finds none there.
        found |= {key: tensor for key, tensor in state_dict.items() if module_of(key) is not None}
        found = {key: tensor for key, tensor in found.items() if adapter_of(key) in (adapter_name, None)}
        # Only rank 0 saves; other ranks may hold nothing.
        if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
            ends = f".modules_to_save.{adapter_name}.", f"{checkpoint.TOKENS}.{adapter_name}"
            beside = {key: tensor for key, tensor in state_dict.items() if any(end in key for end in ends)}
            checkpoint.check_whole({**found, **beside})
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """``hificl_K_A.default.weight`` in a model becomes ``hificl_K_A`` in a file."""
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        return uncompiled(key).removesuffix(".weight") if module_of(key) is not None else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: HiFICLConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tuner: Any = getattr(model, "base_model", None)
        undo = tuner._unloaded.pop(adapter_name, None) if isinstance(tuner, HiFICLModel) else None
        try:
            remapped = cls._in_keys_of(model, adapter_name, state_dict)
        except BaseException:
            if undo is not None:
                undo()
                tuner.peft_config.pop(adapter_name, None)
            raise
        for layer in layers_with(model, adapter_name):
            layer.awaits_weights[adapter_name] = False
        return remapped

    @classmethod
    def _in_keys_of(cls, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A stored state dict with the keys of the model, checked to fit its parameters."""
        live = model.state_dict()
        own = {key: tensor for key, tensor in live.items() if adapter_of(key) == adapter_name}
        names = {plain(key): key for key in live}
        names |= {plain(cls._remove_adapter_name_from_key(key, adapter_name)): key for key in own}
        for name, module in model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT may have renamed their keys before it calls this
                for stored, key in module.adapter_state_dict_load_map(adapter_name).items():
                    names[plain(f"{name}.{stored}")] = f"{name}.{key}"
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        modules = {module for key in state_dict if (module := module_of(key))}
        elsewhere = checkpoint.on_other_stages(modules, base)
        remapped = {
            names.get(plain(key), key): tensor for key, tensor in state_dict.items() if module_of(key) not in elsewhere
        }
        dtypes = {key: tensor.dtype for key, tensor in live.items()}
        for key, tensor in own.items():
            if tensor.is_meta:  # once loaded, it has the dtype that the attention computes in
                dtypes[key] = offloading.device_and_dtype(model.get_submodule(key.rpartition(f".{MODULE}.")[0]))[1]
        checkpoint.check_state_dict(remapped, {key: tensor.shape for key, tensor in own.items()}, dtypes)
        return remapped

    # -- one adapter per row ----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model."""
        if (known := rows.running.modules.get(self)) is None:
            return super().forward(*args, **kwargs)
        # A PeftModel with a task type calls `_enable_peft_forward_hooks` without the inputs; they are known here.
        with self._enable_peft_forward_hooks(*args, **kwargs, adapter_names=known.names):
            return super().forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Tell every layer, for one forward or generate, the adapters of its rows (`adapter_names=[...]`)."""
        names, outer = kwargs.get("adapter_names"), rows.running.modules
        if names is None and not outer:
            yield
            return
        rows.running.modules = {} if names is None else self._rows(names, args, kwargs)
        try:
            yield
        finally:
            rows.running.modules = outer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _rows(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[nn.Module, rows.Rows]:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call model.eval() first.")
        if not names or isinstance(names, str):
            raise ValueError(f"adapter_names must be a list, one name per row; got {names!r}.")
        unknown = set(names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; there are "
                f"{', '.join(sorted(self.peft_config))} and __base__."
            )
        _check_loaded(self.model, set(names))
        rows.install(self.model)  # PEFT wraps the heads of some tasks after attaching the adapter
        text, media = rows.of_call(self.model, list(names), args, kwargs)
        prompts = targets.text_modules(self.model)
        return {self: text} | {
            module: (text if module in prompts else media)._replace(module=name.removesuffix(f".{MODULE}"))
            for name, module in self.model.named_modules()
            if isinstance(module, (HiFICLLayer, AuxiliaryTrainingWrapper))
        }


def _check_loaded(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        if any(layer.awaits_weights[name] for layer in layers_with(model, name)):
            raise ValueError(
                f"The weights of adapter {name!r} were never loaded, as reading them failed: call load_adapter again, "
                f"or delete_adapter({name!r})."
            )
