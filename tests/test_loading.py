"""Loads that fail: whatever fails between attaching and loading, the model is as it was, and a retry works."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_hificl import HiFICLConfig

from .conftest import build, inputs_for, llama, logits
from .test_bad_input import unchanged
from .test_peft_api import adapted, config, hificl_layers

INPUTS = inputs_for("gqa")


def stored(folder: Path, **kwargs: object) -> Tensor:
    """Save an adapter into a folder; its output on the base model of `build`."""
    model = adapted("gqa", seed=3, **kwargs)
    model.save_pretrained(folder)
    return logits(model, **INPUTS)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    (tmp_path / "good").mkdir()
    stored(tmp_path / "good")
    return tmp_path / "good"


# -- stored adapters that cannot be loaded ---------------------------------------------------------------------------


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def dangling_link(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(folder / "gone")


def other_keys(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({f"x.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors")


def truncated(folder: Path) -> None:
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])


BROKEN: dict[Callable[[Path], None], str] = {
    no_weights: r"holds adapter_config.json but no weights: copy adapter_model.safetensors",
    dangling_link: r"adapter_model.safetensors is a link to a file that is gone",
    other_keys: r"lacks 'x.base_model.model.model.layers.0.self_attn'",
    truncated: r"cannot be read",
}


def from_pretrained(model: nn.Module, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, folder)


def with_a_config(model: nn.Module, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, folder, config=config(target_modules=["self_attn"]))


def trainable(model: nn.Module, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, folder, is_trainable=True, low_cpu_mem_usage=True)


def second(model: nn.Module, folder: Path) -> nn.Module:
    model.load_adapter(folder, "b")
    model.set_adapter("b")
    return model


def by_transformers(model: nn.Module, folder: Path) -> nn.Module:
    model.load_adapter(folder)
    return model


def second_by_transformers(model: nn.Module, folder: Path) -> nn.Module:
    model.load_adapter(folder, "b")
    model.set_adapter("b")
    return model


def with_a_hificl() -> nn.Module:
    model = build("gqa")
    torch.manual_seed(1)
    model.add_adapter(config(), "a")
    return model


def with_a_lora() -> nn.Module:
    model = build("gqa")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    return model


PEFTS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], nn.Module]]] = {
    "from_pretrained": (lambda: build("gqa"), from_pretrained),
    "with-a-config": (lambda: build("gqa"), with_a_config),
    "trainable": (lambda: build("gqa"), trainable),
    "beside-lora": (with_a_lora, from_pretrained),
    "load_adapter": (lambda: adapted("gqa", name="a"), second),
}
TRANSFORMERS = {
    "transformers": (lambda: build("gqa"), by_transformers),
    "transformers-second": (with_a_hificl, second_by_transformers),
    "transformers-beside-lora": (with_a_lora, second_by_transformers),
}
ROUTES = {**PEFTS, **TRANSFORMERS}


def assert_loads(model: nn.Module, load: Callable[[nn.Module, Path], nn.Module], folder: Path) -> None:
    want = logits(adapted("gqa", seed=3), **INPUTS)
    torch.testing.assert_close(logits(load(model, folder), **INPUTS), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("damage", BROKEN, ids=lambda d: d.__name__)
def test_a_broken_folder_changes_nothing(
    damage: Callable[[Path], None], route: str, good: Path, tmp_path: Path
) -> None:
    make, load = ROUTES[route]
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    damage(bad)
    model = make()
    before = load_count(model)
    with unchanged(model), pytest.raises(ValueError, match=BROKEN[damage]):
        load(model, bad)
    assert load_count(model) == before
    assert_loads(model, load, good)


def load_count(model: nn.Module) -> tuple[object, ...]:
    """What PEFT and transformers keep on a model beside its modules."""
    return (
        hasattr(model, "peft_config"),
        getattr(model, "_hf_peft_config_loaded", None),
        list(getattr(model, "targeted_module_names", [])),
    )


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("route", PEFTS)
def test_a_second_read_that_fails_changes_nothing(
    route: str, error: type[BaseException], good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT reads the weights when the adapter is attached, as far as it knows."""
    make, load = PEFTS[route]
    model = make()
    before = load_count(model)

    def fail(*args: object, **kwargs: object) -> None:
        raise error("gone")

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", fail)
        with unchanged(model), pytest.raises(error, match="gone"):
            load(model, good)
    assert load_count(model) == before
    assert_loads(model, load, good)


@pytest.mark.parametrize("route", PEFTS)
def test_a_second_read_of_other_weights_changes_nothing(
    route: str, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has been replaced in between."""
    make, load = PEFTS[route]
    model = make()
    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", lambda *args, **kwargs: {"x": torch.zeros(1)})
        with unchanged(model), pytest.raises(ValueError, match="lacks"):
            load(model, good)
    assert_loads(model, load, good)


def test_the_auto_class_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    base = build("gqa")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(llama().from_pretrained(tmp_path / "base"), config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    no_weights(tmp_path)
    with pytest.raises(ValueError, match="no weights"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_a_stored_configuration_alone_is_a_recipe(tmp_path: Path) -> None:
    """It may be used for a fresh adapter, with or without weights beside it; that one is active at once."""
    config(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    base = build("gqa")
    before = logits(base, **INPUTS)
    model = get_peft_model(base, HiFICLConfig.from_pretrained(tmp_path)).eval()
    assert len(hificl_layers(model)) == 2 and not torch.allclose(logits(model, **INPUTS), before)


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7, 9]}], ids=str)
@pytest.mark.parametrize("route", ["from_pretrained", "load_adapter", "transformers"])
def test_the_state_dict_of_an_injected_model(extra: dict[str, object], route: str, tmp_path: Path) -> None:
    """Its keys have no `base_model.model.`; LoRA's load all the same."""
    torch.manual_seed(3)
    injected = inject_adapter_in_model(config(**extra), build("gqa"))
    want = logits(injected, **INPUTS)
    tensors = {key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(injected).items()}
    assert not any(key.startswith("base_model") for key in tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    injected.peft_config["default"].save_pretrained(tmp_path)
    make, load = ROUTES[route]
    torch.testing.assert_close(logits(load(make(), tmp_path), **INPUTS), want, rtol=1e-6, atol=1e-6)


# -- by transformers alone -------------------------------------------------------------------------------------------


def test_a_state_dict_given_to_transformers_is_checked(good: Path) -> None:
    tensors = load_file(good / "adapter_model.safetensors")
    base = build("gqa")
    base.load_adapter(peft_config=HiFICLConfig.from_pretrained(good), adapter_state_dict=tensors)
    torch.testing.assert_close(logits(base, **INPUTS), logits(adapted("gqa", seed=3), **INPUTS), rtol=1e-6, atol=1e-6)
    tensors.popitem()
    base = build("gqa")
    with unchanged(base), pytest.raises(ValueError, match="lacks"):
        base.load_adapter(peft_config=HiFICLConfig.from_pretrained(good), adapter_state_dict=tensors)


@pytest.mark.parametrize("place", ["_get_resolved_checkpoint_files", "safe_open"])
@pytest.mark.parametrize("route", TRANSFORMERS)
def test_a_second_read_by_transformers_that_fails(
    place: str, route: str, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells the tuner nothing, so the adapter stays, as the one that was stored; deleted, it loads again."""
    make, load = TRANSFORMERS[route]
    model, name = make(), "default" if route == "transformers" else "b"
    before = logits(model, **INPUTS)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(f"transformers.modeling_utils.{place}", fail)
        with pytest.raises(OSError, match="gone"):
            load(model, good)
    model.set_adapter(name)
    want = logits(adapted("gqa", seed=3), **INPUTS)
    torch.testing.assert_close(logits(model, **INPUTS), want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="already exists"):
        load(model, good)
    model.delete_adapter(name)
    if name == "default":
        assert torch.equal(logits(model, **INPUTS), before)
    assert_loads(model, load, good)
