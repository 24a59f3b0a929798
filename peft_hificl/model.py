"""The HiFICL tuner: attaches adapters to the attention modules of a model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from . import attention, checkpoint, targets
from .config import HiFICLConfig
from .layer import CANNOT_MERGE, HiFICLLayer

# Heads that PEFT adds to modules_to_save, whether a model has them or not.
_CLASSIFIERS = {"classifier", "score", "qa_outputs"}


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

    # -- attaching ------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
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
        try:
            self._attach(model, adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            config.target_modules = before
            raise
        config._found_targets = (asked, config.target_modules)
        if type(model).__module__.startswith("transformers."):
            config._base_model = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}

    def _attach(
        self,
        model: nn.Module,
        adapter_name: str,
        config: HiFICLConfig,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        self._prepare_adapter_config(config, self.get_model_config(model))
        if state_dict is None:
            names = {name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)}
        else:
            # PEFT takes whatever stands before ".hificl_" in a key for the target: that is to be the attention.
            state_dict = {key.replace(f".{checkpoint.MODULE}.", "."): value for key, value in state_dict.items()}
            names = {name for key in state_dict if (name := checkpoint.module_of(key))}
        self._check_before_change(model, adapter_name, config, names)
        with _undone_on_error(model, adapter_name):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            _note_in_device_map(model)

    def _check_before_change(self, model: nn.Module, adapter_name: str, config: HiFICLConfig, names: set[str]) -> None:
        """Find whatever can be wrong with an adapter before the first module is changed."""
        # The first two cannot be a key of a ParameterDict; the third names the layer itself in a state dict's keys.
        if "." in adapter_name or hasattr(nn.ParameterDict, adapter_name) or adapter_name == checkpoint.MODULE:
            raise ValueError(f"An adapter cannot be named {adapter_name!r}: choose a plain word, without dots.")
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise ValueError(
                "The base model is sharded by tensor parallelism, which HiFICL does not support: load it without "
                "tp_plan (device_map='auto' splits it by layers, which works)."
            )
        _check_offloading(model, config, names)
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
                shapes[name] = attention.head_shape_of(module)
        tokens = config.trainable_token_indices
        for field, wanted in (
            ("modules_to_save", set(config.modules_to_save or ()) - _CLASSIFIERS),
            ("trainable_token_indices", tokens if isinstance(tokens, dict) else ()),
        ):
            absent = sorted(end for end in wanted if not any(name.endswith(end) for name, _ in model.named_modules()))
            if absent:
                raise ValueError(
                    f"{field} names {', '.join(map(repr, absent))}, not found in {type(model).__name__}; give names of "
                    "its modules, or their ends."
                )
        if config._stored is not None and shapes:
            checkpoint.check_fits(config._stored, shapes, model, config)

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
        if isinstance(target, HiFICLLayer):  # matched by a wide pattern when a second adapter is added
            return
        layer = getattr(target, checkpoint.MODULE, None)
        if layer is None:
            layer = attention.attach(target, attention.head_shape_of(target))
        layer.update_layer(adapter_name, peft_config, *attention.device_and_dtype(target))
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

    # -- detaching ------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for module in list(self.model.modules()):
            if isinstance(getattr(module, checkpoint.MODULE, None), HiFICLLayer):
                attention.detach(module)
        _note_in_device_map(self.model)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Called when PEFT's wrappers around whole modules and embeddings go; there is no weight to hand over.
        setattr(parent, child_name, new_module)

    # -- loading --------------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: HiFICLConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        expected = {
            f"{name.removeprefix('_fsdp_wrapped_module.')}.{parameter}.{adapter_name}": tensors[adapter_name].shape
            for name, module in model.named_modules()
            if isinstance(module, HiFICLLayer)
            for parameter in module.adapter_layer_names
            if adapter_name in (tensors := getattr(module, parameter))
        }
        checkpoint.check_state_dict(remapped, expected)
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


def _check_offloading(model: nn.Module, config: HiFICLConfig, names: set[str]) -> None:
    """accelerate brings offloaded weights in by hooks, under the names that they had when it attached these."""
    modules = dict(model.named_modules())
    hooks = [(name, hook) for name, module in modules.items() for hook in attention.accelerate_hooks(module)]
    on_disk = "disk" in (getattr(model, "hf_device_map", None) or {}).values()
    if on_disk and not hooks and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "The base model was partly offloaded to disk, and PeftModel.from_pretrained has taken its weights apart to "
            "offload them anew, with no place for a HiFICL adapter. Load the base model again, attach with "
            "get_peft_model(base, HiFICLConfig.from_pretrained(path)) and load with set_peft_model_state_dict(model, "
            "load_peft_weights(path)); or give the base a device_map (or max_memory) that needs no disk."
        )
    offloaded = [(name, hook) for name, hook in hooks if getattr(hook, "offload", False)]
    for name, hook in offloaded:
        inside = [target for target in names if f"{target}.".startswith(f"{name}." if name else "")]
        if hook.place_submodules and inside:
            raise ValueError(
                f"accelerate loads the weights of module {name!r} all at once (preload_module_classes), and would look "
                f"for those of an adapter on {min(inside)!r} among them: offload without preload_module_classes."
            )
    tokens = config.trainable_token_indices
    ends = [*(config.modules_to_save or ()), *(tokens if isinstance(tokens, dict) else ())]
    copied = {name for name in modules if name.endswith(tuple(ends))}
    if isinstance(tokens, list | tuple) and offloaded:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        copied |= {name for name, module in modules.items() if module is embeddings}
    for name, _ in offloaded:
        if any(f"{name}.".startswith(f"{whole}.") for whole in copied):
            raise ValueError(
                f"Module {name!r} is offloaded by accelerate: PEFT's copy of it (modules_to_save, "
                "trainable_token_indices) would compute with the base model's weights, whatever it learns or loads. "
                "Load the adapter before offloading, leave the module out, or keep it in memory (device_map)."
            )


def _note_in_device_map(model: nn.Module) -> None:
    """An adapter stays where an offloaded attention runs; transformers' load_adapter asks the map where to load it."""
    device_map = getattr(model, "hf_device_map", None)
    if device_map is None:
        return
    for name in [name for name in device_map if name.endswith(f".{checkpoint.MODULE}")]:
        del device_map[name]
    for name, module in model.named_modules():
        if isinstance(getattr(module, checkpoint.MODULE, None), HiFICLLayer):
            hooks = [hook for submodule in module.modules() for hook in attention.accelerate_hooks(submodule)]
            devices = [hook.execution_device for hook in hooks if getattr(hook, "offload", False)]
            if devices:
                device_map[f"{name}.{checkpoint.MODULE}"] = devices[0]


@contextmanager
def _undone_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """PEFT has checks of its own, some of them after the change: after an error, take the new adapter off again."""
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except Exception:
        for module in list(model.modules()):
            layer = getattr(module, checkpoint.MODULE, None)
            if isinstance(layer, HiFICLLayer) and adapter_name in layer.n:
                layer.delete_adapter(adapter_name)
                if not layer.n:
                    attention.detach(module)
        _note_in_device_map(model)
        for parameter, value in requires_grad.items():
            parameter.requires_grad = value
        raise
