"""The HiFICL tuner: attaches adapters to the attention modules of a model."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch.distributed as dist
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from . import attention, checkpoint, loading, targets
from .config import HiFICLConfig
from .layer import CANNOT_MERGE, HiFICLLayer


class HiFICLModel(BaseTuner):
    """Learns n virtual key-value pairs per attention head of a frozen model (HiFICL, arXiv 2603.12760).

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to adapt.
        config ([`HiFICLConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, `"default"` if PEFT is not told otherwise.
        low_cpu_mem_usage (`bool`): Create the adapter's weights on the meta device, to be loaded.

    Raises:
        ValueError: nothing to adapt, an adapter name that is taken, or a stored adapter of another base model.
        TypeError: a target that is not attention, or an attention that HiFICL cannot adapt.

    The model is checked before it is changed: after an error it is as it was.

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

    prefix = checkpoint.PREFIX
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
        # Adapters whose weights PEFT is about to read: their configuration, and what is to be done when it has.
        self._awaited: _Awaited = {}
        shared = getattr(model, "peft_config", None)
        before = dict(shared or {})
        attached = False
        try:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
            attached = not self._awaited
        finally:
            if not attached:  # PEFT has given the model the configuration all the same
                if shared is None:
                    vars(model).pop("peft_config", None)
                    if getattr(model, "_hf_peft_config_loaded", False):  # set by transformers before it calls PEFT
                        model._hf_peft_config_loaded = False  # type: ignore[assignment]
                else:
                    shared.clear()
                    shared.update(before)
                    model.peft_config = shared
        if self._awaited:
            self.peft_config = {**before, adapter_name: self._awaited[adapter_name][0]}

    # -- attaching ------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        named = list(self.targeted_module_names)
        self._awaited.pop(adapter_name, None)
        try:
            _check_kind(model)
            config = self.peft_config[adapter_name]
            load = loading.in_progress(config)
            stored = None
            if load is not None:
                stored = checkpoint.stored_shapes(load.tensors, config)
                if load.ignore_mismatched_sizes:
                    stored = stored._replace(others=None)
                low_cpu_mem_usage = low_cpu_mem_usage or load.low_cpu_mem_usage
            inject = partial(self._inject, model, adapter_name, low_cpu_mem_usage, state_dict, stored)
            if load is None:
                inject()
            elif load.by_peft:
                inject(dry=True)
                self._awaited[adapter_name] = (config, [inject])
                del self.peft_config[adapter_name]
                if getattr(self.peft_config, "awaited", None) is not self._awaited:
                    self.peft_config = self.model.peft_config = _Configs(self.peft_config, self._awaited)
            else:
                with _undone_on_error(model, adapter_name):
                    inject()
                    # transformers reads them again, with no word to the tuner: should that fail, or find no names for
                    # them, what is attached is what was stored.
                    model.load_state_dict(self._in_keys_of(model, adapter_name, load.tensors), strict=False)
        except BaseException:
            self.targeted_module_names = named
            self.peft_config.pop(adapter_name, None)
            raise

    def _inject(
        self,
        model: nn.Module,
        adapter_name: str,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
        stored: checkpoint.Stored | None,
        dry: bool = False,
    ) -> None:
        """Attach an adapter, or find out whether that is possible."""
        config = self.peft_config[adapter_name]
        before = asked = config.target_modules
        if config._found_targets is not None and config.target_modules == config._found_targets[1]:
            # It has served already: what was found there must not be said of this model, nor the other way round.
            asked = config._found_targets[0]
            searched = copy.copy(config)
            searched.target_modules = asked
            self._prepare_adapter_config(searched, self.get_model_config(model))
            if searched.target_modules != config.target_modules:
                config = self.peft_config[adapter_name] = searched
        done = False
        try:
            self._attach(model, adapter_name, config, low_cpu_mem_usage, state_dict, stored, dry)
            done = not dry
        finally:
            if not done:
                config.target_modules = before
        if done:
            config._found_targets = (asked, config.target_modules)
            if type(model).__module__.startswith("transformers."):
                config._base_model_class = type(model).__name__

    def _attach(
        self,
        model: nn.Module,
        adapter_name: str,
        config: HiFICLConfig,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
        stored: checkpoint.Stored | None,
        dry: bool,
    ) -> None:
        self._prepare_adapter_config(config, self.get_model_config(model))
        modules = {name: module for name, module in model.named_modules() if not isinstance(module, OptimizedModule)}
        if state_dict is None:
            names = {name for name in modules if name and self._check_target_module_exists(config, name)}
        else:
            # PEFT takes whatever stands before ".hificl_" in a key for the target: that is to be the attention.
            live = {checkpoint.plain(name): name for name in modules}
            attentions = {key: live.get(name, name) for key in state_dict if (name := checkpoint.module_of(key))}
            names = set(attentions.values())
            state_dict = {
                f"{attentions[key]}{key[key.rindex(f'.{checkpoint.PREFIX}') :]}" if key in attentions else key: value
                for key, value in state_dict.items()
            }
        self._check_before_change(model, adapter_name, config, names, stored)
        if not dry:
            with _undone_on_error(model, adapter_name):
                super().inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)

    @staticmethod
    def _check_target_module_exists(config: HiFICLConfig, key: str) -> Any:
        return check_target_module_exists(config, checkpoint.plain(key))

    def _check_before_change(
        self,
        model: nn.Module,
        adapter_name: str,
        config: HiFICLConfig,
        names: set[str],
        stored: checkpoint.Stored | None,
    ) -> None:
        """Find whatever can be wrong with an adapter before the first module is changed."""
        # The first two cannot be a key of a ParameterDict; the third names the layer itself in a state dict's keys.
        if "." in adapter_name or hasattr(nn.ParameterDict, adapter_name) or adapter_name == checkpoint.MODULE:
            raise ValueError(f"An adapter cannot be named {adapter_name!r}: choose a plain word, without dots.")
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise ValueError(
                "The base model is sharded by tensor parallelism, which HiFICL does not support: load it without "
                "tp_plan (device_map='auto' splits it by layers, which works)."
            )
        if hasattr(model, "pippy_stage"):
            raise ValueError(
                "accelerate's prepare_pippy has traced the model, and its stages would not see an adapter that comes "
                "later: attach or load the adapter first."
            )
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            raise ValueError(
                "The base model is partly offloaded to disk, where PEFT has no place for a HiFICL adapter: give "
                "from_pretrained a device_map (or max_memory) that needs no disk."
            )
        if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            raise ValueError(
                f"target_modules={config.target_modules!r} means linear layers, but HiFICL adapts attention modules: "
                "leave target_modules=None to have them found."
            )
        shapes = {}
        for name, module in model.named_modules():
            if isinstance(module, HiFICLLayer) and adapter_name in module.n:
                raise ValueError(
                    f"An adapter named {adapter_name!r} is already attached to {name.rpartition('.')[0]!r}: choose "
                    "another adapter_name, or delete_adapter() it first."
                )
            if name in names and checkpoint.MODULE not in name.split("."):
                reason = attention.why_unsupported(module)
                if reason:
                    raise TypeError(
                        f"HiFICL cannot adapt module {name!r} of type {type(module).__name__}: {reason}. Choose "
                        "attention modules as target_modules, or leave target_modules=None to have them found."
                    )
                shapes[checkpoint.plain(name)] = attention.head_shape_of(module)
        tokens = config.trainable_token_indices
        elsewhere = stored is not None and checkpoint.on_other_stages(stored.modules, model)
        whole = set() if elsewhere else set(config.modules_to_save or ()).difference(*checkpoint.HEADS.values())
        for field, wanted in (
            ("modules_to_save", whole),
            ("trainable_token_indices", tokens if isinstance(tokens, dict) else ()),
        ):
            absent = sorted(end for end in wanted if not any(name.endswith(end) for name, _ in model.named_modules()))
            if absent:
                raise ValueError(
                    f"{field} names {', '.join(map(repr, absent))}, not found in {type(model).__name__}; give names of "
                    "its modules, or their ends."
                )
        if stored is not None and shapes:
            checkpoint.check_fits(stored, shapes, model, config)

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
        # Matched by a wide pattern when a second adapter is added; the attention within has the same name.
        if isinstance(target, (HiFICLLayer, OptimizedModule)):
            return
        layer = getattr(target, checkpoint.MODULE, None)
        if layer is None:
            layer = attention.attach(target, attention.head_shape_of(target))
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; several of them share one softmax.

        Raises:
            ValueError: the adapters disagree about scale_self_attention.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for module in self.modules():
            if isinstance(module, HiFICLLayer):
                module.check_together(names)  # all of them before the first one is switched
        super().set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        self._do_or_await(adapter_names, partial(super().set_requires_grad, adapter_names, requires_grad))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        self._do_or_await(adapter_name, partial(super()._cast_adapter_dtype, adapter_name, autocast_adapter_dtype))

    def _do_or_await(self, adapter_names: Any, step: Callable[[], None]) -> None:
        if isinstance(adapter_names, str) and adapter_names in self._awaited:
            self._awaited[adapter_names][1].append(step)
        else:
            step()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "HiFICL adapters cannot be combined into a weighted one yet. Adapters that are active together share one "
            "softmax, which weighs their pairs by each query: model.base_model.set_adapter(['a', 'b'])."
        )

    # -- detaching ------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for module in list(self.model.modules()):
            if isinstance(getattr(module, checkpoint.MODULE, None), HiFICLLayer):
                attention.detach(module)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Called when PEFT's wrappers around whole modules and embeddings go; there is no weight to hand over.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active and no other is, the first one that is left becomes active."""
        if adapter_name in self.active_adapters:
            others = sorted(n for n, c in self.peft_config.items() if n != adapter_name and isinstance(c, HiFICLConfig))
            active = [name for name in self.active_adapters if name != adapter_name] or others[:1]
            if active:  # each layer would choose among its own, which need not be the same on all of them
                warnings.warn(f"{adapter_name} was active; active from now on: {', '.join(active)}.", stacklevel=3)
                self.set_adapter(active)
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
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if not dist.is_initialized() or dist.get_rank() == 0:  # the one that saves; the others may have nothing to save
            ends = f".modules_to_save.{adapter_name}.", f"{checkpoint.TOKENS}.{adapter_name}"
            beside = {key: tensor for key, tensor in state_dict.items() if any(end in key for end in ends)}
            checkpoint.check_whole({**found, **beside})
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return checkpoint.uncompiled(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: HiFICLConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tuner = getattr(model, "base_model", None)
        awaited = isinstance(tuner, HiFICLModel) and adapter_name in tuner._awaited
        with tuner._attached_late(adapter_name) if awaited else nullcontext():  # type: ignore[union-attr]
            return cls._in_keys_of(model, adapter_name, state_dict)

    @contextmanager
    def _attached_late(self, adapter_name: str) -> Iterator[None]:
        """The weights are here: do what had to wait for them."""
        self.peft_config[adapter_name], steps = self._awaited.pop(adapter_name)
        try:
            with _undone_on_error(self.model, adapter_name):
                for step in steps:
                    step()
                yield
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        shared = getattr(self.model, "peft_config", None)
        if shared is None:
            self.model.peft_config = self.peft_config
        elif shared is not self.peft_config:
            shared.update(self.peft_config)
            self.peft_config = shared

    @classmethod
    def _in_keys_of(cls, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A stored state dict in the keys of the model, found to fit it."""
        live = model.state_dict()
        own = {
            key: tensor
            for key, tensor in live.items()
            if checkpoint.module_of(key) and key.rpartition(f".{checkpoint.MODULE}.")[2].split(".")[1] == adapter_name
        }
        names = {checkpoint.plain(key): key for key in live}
        names |= {checkpoint.plain(cls._remove_adapter_name_from_key(key, adapter_name)): key for key in own}
        for name, module in model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT has renamed those that were there before it asks us
                for stored, key in module.adapter_state_dict_load_map(adapter_name).items():
                    names[checkpoint.plain(f"{name}.{stored}")] = f"{name}.{key}"
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        modules = {module for key in state_dict if (module := checkpoint.module_of(key))}
        elsewhere = checkpoint.on_other_stages(modules, base)
        remapped = {
            names.get(checkpoint.plain(key), key): tensor
            for key, tensor in state_dict.items()
            if checkpoint.module_of(key) not in elsewhere
        }
        dtypes = {key: tensor.dtype for key, tensor in live.items()}
        for key, tensor in own.items():
            if tensor.is_meta:  # it takes the dtype of the base model when it has been loaded
                dtypes[key] = model.get_submodule(key.rpartition(f".{checkpoint.PREFIX}")[0])._like.dtype
        checkpoint.check_state_dict(remapped, {key: tensor.shape for key, tensor in own.items()}, dtypes)
        return remapped

    # -- one adapter per row ----------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names=[...]`, one per row, to every layer for the duration of one forward or generate."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call model.eval() first.")
        unknown = set(adapter_names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; there are "
                f"{', '.join(sorted(self.peft_config))} and __base__."
            )
        thread = threading.get_ident()
        # `generate` repeats each row, but not inside an encoder.
        repeats = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)

        def hand_down(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if threading.get_ident() != thread:
                return None  # another thread's forward, which has rows of its own
            first = args[0] if args else next(iter(kwargs.values()))
            batch_size = first if isinstance(module, HiFICLLayer) else len(first)
            repeated = repeats if batch_size == repeats * len(adapter_names) else 1
            return args, {**kwargs, "adapter_names": [name for name in adapter_names for _ in range(repeated)]}

        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, (HiFICLLayer, AuxiliaryTrainingWrapper)):
                    hooks.callback(module.register_forward_pre_hook(hand_down, with_kwargs=True).remove)
            yield


_Awaited = dict[str, tuple[HiFICLConfig, list[Callable[[], None]]]]


class _Configs(dict[str, HiFICLConfig]):
    """A model's configurations; those of awaited adapters can be looked up, as PEFT does, but are not among them."""

    def __init__(self, configs: dict[str, HiFICLConfig], awaited: _Awaited) -> None:
        super().__init__(configs)
        self.awaited = awaited

    def __missing__(self, name: str) -> HiFICLConfig:
        return self.awaited[name][0]


def _check_kind(model: nn.Module) -> None:
    if isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        raise ValueError(
            f"The model is a {type(model).__name__} already. Call its add_adapter(name, config) to give it another "
            "HiFICL adapter, its load_adapter(path, name) to load one; beside adapters of another method, "
            "model.get_base_model().add_adapter(config, name)."
        )
    if isinstance(model, OptimizedModule):
        raise ValueError(
            "The model is compiled: attach the adapter first, to the model that torch.compile was given "
            "(model._orig_mod), and compile what comes out."
        )


@contextmanager
def _undone_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """PEFT has checks of its own, some of them after the change: after an error, take the new adapter off again."""
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modules = set(model.modules())
    others = [m for m in modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    active = {m: m._active_adapter for m in others if adapter_name not in m._get_available_adapters()}
    try:
        yield
    except BaseException:
        for parent in modules:
            for name, child in list(parent.named_children()):
                if child not in modules and isinstance(child, HiFICLLayer):
                    attention.detach(parent)
                elif child not in modules and isinstance(child, AuxiliaryTrainingWrapper):
                    setattr(parent, name, child.original_module)
        for module, names in active.items():
            module._active_adapter = names
            if isinstance(module, HiFICLLayer):
                module.delete_adapter(adapter_name)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, names)
                module._active_adapter = names
        for parameter, value in requires_grad.items():
            parameter.requires_grad = value
        raise
