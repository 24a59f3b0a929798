"""The device and dtype that an attention computes in, and adapters on a base model that accelerate offloads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import HiFICLConfig
from .names import MODULE


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that an attention module computes in, even if its weights are quantised or offloaded."""
    adapters: list[torch.Tensor] = list(getattr(module, MODULE, nn.Module()).parameters())
    tensors: list[torch.Tensor] = [p for p in module.parameters() if not any(p is own for own in adapters)]
    if not tensors:  # FSDP has flattened the parameters, or the quantised weights are buffers
        tensors = [*module.buffers(), *adapters]
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dtype.itemsize > 1]
    tensor = next(iter([*floating, *tensors]), torch.empty(0))
    device, dtype = tensor.device, tensor.dtype if floating else torch.get_default_dtype()
    for submodule in module.modules():
        compute_dtype = getattr(submodule, "compute_dtype", None)  # bitsandbytes' 4-bit linear layers
        if isinstance(compute_dtype, torch.dtype):
            dtype = compute_dtype
        for hook in accelerate_hooks(submodule):
            execution_device = getattr(hook, "execution_device", None)
            if device.type == "meta" and execution_device is not None:
                device = torch.device(execution_device)
    return device, dtype


def accelerate_hooks(module: nn.Module) -> list[Any]:
    """The hooks by which accelerate acts before and after each forward of this module, for instance to offload it."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def check(model: nn.Module, config: HiFICLConfig, names: set[str]) -> None:
    """Refuse adapters that would have no place on an offloaded base model.

    accelerate loads offloaded weights in hooks, under the names that they had when it registered the hooks.

    Raises:
        ValueError: weights on disk without hooks, or a target or copied module whose weights a hook would not find.
    """
    modules = dict(model.named_modules())
    hooks = [(name, hook) for name, module in modules.items() for hook in accelerate_hooks(module)]
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
                f"Module {name!r} is offloaded by accelerate: PEFT's copy of it would compute with the base model's "
                "weights, whatever it learns or loads (modules_to_save), or not at all (trainable_token_indices). "
                "Leave the module out, or keep it in memory (device_map); modules_to_save may also be loaded before "
                "the model is offloaded."
            )


def note_in_device_map(model: nn.Module) -> None:
    """Enter adapters into `hf_device_map`, where transformers' load_adapter looks up the device to load them to.

    An adapter on an offloaded attention is not offloaded itself: it stays on the device that the attention runs on.
    """
    device_map = getattr(model, "hf_device_map", None)
    if device_map is None:
        return
    for name in [name for name in device_map if name.endswith(f".{MODULE}")]:
        del device_map[name]
    for name, module in model.named_modules():
        if hasattr(module, MODULE):
            hooks = [hook for submodule in module.modules() for hook in accelerate_hooks(submodule)]
            devices = [hook.execution_device for hook in hooks if getattr(hook, "offload", False)]
            if devices:
                device_map[f"{name}.{MODULE}"] = devices[0]
