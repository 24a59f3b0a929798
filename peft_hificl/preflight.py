"""The checks that run before an adapter is attached: an error that they raise leaves the model unchanged."""

from __future__ import annotations

from collections.abc import Iterable

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from . import checkpoint, dry_run, offloading, sharding, support
from .config import HiFICLConfig
from .layer import HiFICLLayer
from .loading import Load
from .names import MODULE, module_of, plain


def check(model: nn.Module, adapter_name: str, config: HiFICLConfig, names: set[str], load: Load | None) -> None:
    """Run the checks below, except `check_kind` and `check_load`, which the tuner calls before and after.

    Args:
        model: the base model.
        adapter_name: the adapter's name.
        config: its configuration, with targets found.
        names: the names of its target modules.
        load: the load that attaches it, if there is one.

    Raises:
        ValueError: a name, a base model or a stored adapter that does not fit.
        TypeError: a target that is not attention, or an attention that HiFICL cannot adapt.
    """
    check_name(model, adapter_name)
    others = set(getattr(model, "peft_config", {})) - {adapter_name}
    if others and not config.inference_mode:
        check_told_apart({adapter_name, *others}, names)
    check_placement(model)
    offloading.check(model, config, names)
    sharding.check_late(model, config)
    sharding.check_beside(model, config, checkpoint.HEADS.get(config.task_type or "", ()))
    check_targets(model, config, names)
    modules = set() if load is None else {module for key in load.tensors if (module := module_of(key))}
    if not checkpoint.on_other_stages(modules, model):
        check_modules_beside(model, config)


def check_kind(model: nn.Module) -> None:
    """The model must be a plain base model: not wrapped by PEFT, and not compiled as a whole."""
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


def check_name(model: nn.Module, adapter_name: str) -> None:
    """The name must not be taken, and must be usable within the names of parameters."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"An adapter cannot be named {adapter_name!r}: choose a plain word, without dots.")
    # PEFT would mistake the first two for parts of parameter names; in `adapter_names`, the third means no adapter; the
    # others cannot be keys of a ModuleDict.
    if adapter_name in (MODULE, "weight", "__base__") or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"An adapter cannot be named {adapter_name!r}, as torch or PEFT use that name: choose another."
        )
    for name, module in model.named_modules():
        # An adapter whose weights were never loaded does not count: it is removed.
        if isinstance(module, HiFICLLayer) and module.has(adapter_name) and not module.awaits_weights[adapter_name]:
            raise ValueError(
                f"An adapter named {adapter_name!r} is already attached to {name.rpartition('.')[0]!r}: choose another "
                "adapter_name, or delete_adapter() it first."
            )


def check_told_apart(adapters: Iterable[str], modules: Iterable[str]) -> None:
    """Adapters must not be named as a part of the names of these modules, whose weights PEFT would take for theirs."""
    for name in modules:
        for adapter in adapters:
            if f".{adapter}." in f"base_model.model.{plain(name)}.":
                raise ValueError(
                    f"{adapter!r} is the name of an adapter and a part of the name of the module {plain(name)!r}: PEFT "
                    "would leave the weights of all other adapters there out when it saves them. Give that adapter "
                    "another name."
                )


def check_placement(model: nn.Module) -> None:
    """The base model must not be traced by prepare_pippy."""
    if hasattr(model, "pippy_stage"):
        raise ValueError(
            "accelerate's prepare_pippy has traced the model, and its stages would not see an adapter that comes "
            "later: attach or load the adapter first."
        )


def check_targets(model: nn.Module, config: HiFICLConfig, names: set[str]) -> None:
    """Every target must be an attention that can be adapted."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        raise ValueError(
            f"target_modules={config.target_modules!r} means linear layers, but HiFICL adapts attention modules: "
            "leave target_modules=None to have them found."
        )
    for name, module in model.named_modules():
        if name in names and MODULE not in name.split("."):
            reason = support.why_unsupported(module)
            if reason:
                raise TypeError(
                    f"HiFICL cannot adapt module {name!r} of type {type(module).__name__}: {reason}. Choose attention "
                    "modules as target_modules, or leave target_modules=None to have them found."
                )
            sharding.sharding_of(model, name, module, support.head_shape_of(module))


def check_load(
    tuner: BaseTuner, adapter_name: str, config: HiFICLConfig, load: Load, state_dict: dict[str, Tensor] | None
) -> None:
    """The tensors to load must be those that PEFT would save of the adapter after attaching it."""
    stored, saved = load.tensors, dry_run.saved_shapes(tuner, adapter_name, config, state_dict)
    if load.ignore_mismatched_sizes:  # then compare HiFICL's tensors alone
        stored = {key: tensor for key, tensor in stored.items() if module_of(key)}
        saved = dry_run.Saved({key: shape for key, shape in saved.always.items() if module_of(key)}, {})
    checkpoint.check_fits(stored, saved, tuner.model, config)


def check_modules_beside(model: nn.Module, config: HiFICLConfig) -> None:
    """Modules and embeddings that are trained beside the adapter must exist, and hold no other adapter."""
    tokens = config.trainable_token_indices
    for field, wanted in (
        ("modules_to_save", set(config.modules_to_save or ()).difference(*checkpoint.HEADS.values())),
        ("trainable_token_indices", tokens if isinstance(tokens, dict) else ()),
    ):
        absent = sorted(end for end in wanted if not any(name.endswith(end) for name, _ in model.named_modules()))
        if absent:
            raise ValueError(
                f"{field} names {', '.join(map(repr, absent))}, not found in {type(model).__name__}; give names of its "
                "modules, or their ends."
            )
    copied = () if config.inference_mode else tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        if name.endswith(copied) and any(isinstance(part, HiFICLLayer) for part in module.modules()):
            raise ValueError(
                f"modules_to_save names {name!r}, which holds an adapter already, and PEFT could not save a copy of "
                "both: train this adapter on a model of its own."
            )
