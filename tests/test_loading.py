"""Loads that fail: whatever fails between attaching and loading, the model is as it was, and a retry works."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
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

from peft_hificl import HiFICLConfig, checkpoint

from .helpers import (
    VOCAB,
    adapted,
    build,
    changed,
    config,
    hificl_layers,
    inputs_for,
    llama,
    logits,
    pairs_for,
    unchanged,
)

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
    other_keys: r"has unexpected 'x.base_model.model.model.layers.0.self_attn",
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
def test_a_second_read_that_fails_leaves_an_adapter_without_effect(
    route: str, error: type[BaseException], good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT attaches, then reads the weights, and says nothing if that fails; a LoRA is without effect then, too."""
    make, load = PEFTS[route]
    model = make()
    before = logits(model, **INPUTS)

    def fail(*args: object, **kwargs: object) -> None:
        raise error("gone")

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", fail)
        with pytest.raises(error, match="gone"):
            load(model, good)
    assert torch.equal(logits(model, **INPUTS), before)
    assert_loads(model, load, good)


def test_what_a_failed_load_left_on_other_layers_is_no_part_of_the_next_adapter(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = stored(tmp_path / "one layer", layers_to_transform=[0])
    model = build("gqa")
    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", lambda *args, **kwargs: pytest.fail("gone"))
        with pytest.raises(pytest.fail.Exception, match="gone"):
            PeftModel.from_pretrained(model, good)
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path / "one layer"), **INPUTS), output)


class Quantised(nn.Linear):
    """As bitsandbytes' 8-bit layers: what is saved of it is read from attributes of its weight."""

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}SCB"] = self.weight.SCB


class FullySharded:
    """As FSDP2's class: a new object is one of the class before it was sharded, with arguments."""

    def __new__(cls, *args: object) -> nn.Module:
        return cls.__mro__[2](*args)


@pytest.mark.parametrize("kind", ["quantised", "sharded"])
def test_a_base_whose_modules_cannot_be_made_anew(kind: str, good: Path) -> None:
    model = build("gqa")
    for layer in model.model.layers:
        if kind == "quantised":
            linear = layer.mlp.up_proj
            layer.mlp.up_proj = Quantised(linear.in_features, linear.out_features, bias=False)
            layer.mlp.up_proj.weight = linear.weight
            linear.weight.SCB = torch.ones(linear.out_features)
        else:
            layer.__class__ = type("FSDPLayer", (FullySharded, type(layer)), {})
    loaded = PeftModel.from_pretrained(model, good)
    assert torch.equal(logits(loaded, **INPUTS), logits(adapted("gqa", seed=3), **INPUTS))


def test_an_adapter_without_weights_is_not_used_in_silence(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("gqa", name="a")
    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", lambda *args, **kwargs: pytest.fail("gone"))
        with pytest.raises(pytest.fail.Exception, match="gone"):
            model.load_adapter(good, "b")
    for use in (
        lambda: model.set_adapter("b"),
        lambda: model.base_model.set_adapter(["a", "b"]),
        lambda: model(**INPUTS, adapter_names=["a", "b"]),
        lambda: model.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(ValueError, match=r"weights of adapter 'b' were never loaded.*delete_adapter\('b'\)"):
            use()
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model, **INPUTS), logits(adapted("gqa"), **INPUTS))
    model.delete_adapter("b")
    model.save_pretrained(tmp_path / "saved")
    assert_loads(model, second, good)


def test_what_changed_since_a_failed_load_stays(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later failure of the same name must not go back to how the model was before the first."""
    model = adapted("gqa", name="a")
    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", lambda *args, **kwargs: pytest.fail("gone"))
        with pytest.raises(pytest.fail.Exception, match="gone"):
            model.load_adapter(good, "b")
    model.add_adapter("c", config())
    model.set_adapter("c")
    want = logits(model, **INPUTS)
    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", lambda *args, **kwargs: {"x": torch.zeros(1)})
        with pytest.raises(ValueError, match="lacks"):
            model.load_adapter(good, "b")
    assert model.active_adapters == ["c"] and torch.equal(logits(model, **INPUTS), want)
    model.set_adapter("a")
    assert torch.equal(logits(model, **INPUTS), logits(adapted("gqa"), **INPUTS))
    model.delete_adapter("a")  # "b" still has no weights and is not the one that becomes active
    assert model.active_adapters == ["c"]


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


def test_a_hub_that_is_out_of_reach_is_not_called_a_folder() -> None:
    base = build("gqa")
    with unchanged(base), pytest.raises((OSError, ValueError)) as error:
        PeftModel.from_pretrained(base, "nobody/nothing", config=config(target_modules=["self_attn"]))
    assert "holds adapter_config.json" not in str(error.value)


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


@pytest.mark.parametrize(
    ("route", "extra"),
    [
        ("from_pretrained", {}),
        ("load_adapter", {}),
        ("transformers", {}),
        # PEFT's own routes ask for the prefix here, LoRA or not.
        ("transformers", {"modules_to_save": ["lm_head"]}),
        ("transformers", {"trainable_token_indices": [7, 9]}),
    ],
    ids=str,
)
def test_the_state_dict_of_an_injected_model(route: str, extra: dict[str, object], tmp_path: Path) -> None:
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


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_what_is_trainable_after_a_load_is_loras(is_trainable: bool, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """What PEFT does between attaching and loading is done when the adapter is there."""
    flags = []
    for name, cfg in (
        ("lora", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
        ("hificl", config(modules_to_save=["lm_head"])),
    ):
        options = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
        get_peft_model(build("gqa"), cfg).save_pretrained(tmp_path / name)
        model = PeftModel.from_pretrained(build("gqa"), tmp_path / name, **options)
        model.load_adapter(tmp_path / name, "b", **options)
        own = {key: p for key, p in model.named_parameters() if ".modules_to_save." in key or "lora_A" in key}
        own |= {key: p for key, p in model.named_parameters() if ".hificl_K_A" in key}
        flags.append({key.rpartition("self_attn")[0] + str(".b" in key): p.requires_grad for key, p in own.items()})
        others = [p.requires_grad for key, p in model.named_parameters() if ".default" not in key and ".b" not in key]
        assert not any(others)
    assert flags[0] == flags[1]


@pytest.mark.parametrize(
    ("task", "cls"),
    [
        ("TOKEN_CLS", "TokenClassification"),
        ("QUESTION_ANS", "QuestionAnswering"),
        ("SEQ_CLS", "SequenceClassification"),
    ],
)
def test_a_head_that_a_configuration_does_not_name(task: str, cls: str, tmp_path: Path) -> None:
    """PEFT adds it when it has attached the adapter, to a configuration that is passed in too."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    fields = tf.RobertaConfig(vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=0, **sizes)

    def base() -> tf.PreTrainedModel:
        torch.manual_seed(0)
        return getattr(tf, f"RobertaFor{cls}")(fields).eval()

    model = get_peft_model(base(), config(task_type=task)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, config=config(task_type=task)).eval()
    with torch.no_grad():
        for a, b in zip(model(**INPUTS).to_tuple(), loaded(**INPUTS).to_tuple(), strict=True):
            assert torch.equal(a, b)


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


def test_a_name_that_is_taken_by_an_adapter_of_a_peft_model(good: Path) -> None:
    """The one that is there stays; transformers does not know of it."""
    model = adapted("gqa", name="a")
    with unchanged(model), pytest.raises(ValueError, match="'a' is already attached"):
        model.get_base_model().load_adapter(good, "a")
    base = adapted("gqa", name="a").get_base_model()
    with unchanged(base), pytest.raises(ValueError, match="'a' is already attached"):
        PeftModel.from_pretrained(base, good, adapter_name="a")


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


# -- what a file may hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load",
    [
        lambda base, folder: PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False),
        lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
        lambda base, folder: base.load_adapter(folder),
    ],
    ids=["no-autocast", "low-cpu-mem", "transformers"],
)
def test_values_beyond_the_dtype_of_the_adapter(load: Callable[..., object], good: Path) -> None:
    """By these ways they pass through the dtype of the base model; float32, as PEFT casts adapters to, would do."""
    changed(good, lambda tensor: tensor.index_fill(0, torch.tensor([1]), 1e5))
    base = build("gqa").half()
    with (
        unchanged(base),
        pytest.raises(ValueError, match=r"V_A\S* \(torch.float32\) holds 1e\+05, which the parameter's torch.float16"),
    ):
        load(base, good)
    loaded = PeftModel.from_pretrained(base, good)
    assert pairs_for(hificl_layers(loaded)[0]).values.abs().max() > 1e4


def test_weights_stored_in_float8(good: Path) -> None:
    """A dtype that torch can convert, and not test for being finite."""
    changed(good, lambda tensor: tensor.to(torch.float8_e4m3fn))
    tensors = load_file(good / "adapter_model.safetensors")
    key, tensor = next((k, t) for k, t in tensors.items() if t.dtype == torch.float8_e4m3fn)
    for load in (from_pretrained, by_transformers):
        state = load(build("gqa"), good).state_dict()
        live = next(value for name, value in state.items() if f"{key.removeprefix('base_model.model.')}." in name)
        assert torch.equal(live, tensor.float())
    changed(good, lambda tensor: torch.full(tensor.shape, float("nan")).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"not finite numbers \(dtype torch.float8_e4m3fn\)"):
        PeftModel.from_pretrained(build("gqa"), good)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"epoch": 3}, "'epoch' is not a tensor but int: .*Keep the tensors alone"),
        ({"optimizer": {"lr": 0.1}}, "'optimizer' is not a tensor but dict"),
        ([1, 2], "cannot be read"),
    ],
    ids=["number", "dict", "list"],
)
@pytest.mark.parametrize("load", [from_pretrained, by_transformers])
def test_a_bin_file_with_objects(load: Callable[..., object], extra: object, message: str, good: Path) -> None:
    tensors = load_file(good / "adapter_model.safetensors")
    (good / "adapter_model.safetensors").unlink()
    torch.save({**tensors, **extra} if isinstance(extra, dict) else extra, good / "adapter_model.bin")
    base = build("gqa")
    with unchanged(base), pytest.raises(ValueError, match=message):
        load(base, good)
    torch.save(tensors, good / "adapter_model.bin")
    assert_loads(base, from_pretrained, good)  # transformers' own loader finds no local .bin, LoRA's neither


# -- stages of a pipeline --------------------------------------------------------------------------------------------


class Stage(nn.Identity):
    """As transformers' own pipeline stages have it in the place of what is not theirs."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x


def stage(base: nn.Module, here: range, how: str) -> nn.Module:
    """One stage of a base model of four layers."""
    layers = base.model.layers
    if how == "placeholders":
        for index in set(range(4)) - set(here):
            layers[index] = Stage()
        if 0 not in here:
            base.model.embed_tokens = Stage()
        if 3 not in here:
            base.model.norm = base.lm_head = Stage()
    elif how == "ModuleDict":
        base.model.layers = nn.ModuleDict({str(index): layers[index] for index in here})
    elif how == "None":
        for index in set(range(4)) - set(here):
            layers[index] = None
    else:
        base.model.layers = layers[here.start : here.stop]
    return base


def four_layers() -> nn.Module:
    torch.manual_seed(0)
    return llama(layers=4).eval()


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    get_peft_model(four_layers(), config()).save_pretrained(tmp_path)
    return tmp_path


HALVES = (range(2), range(2, 4))


@pytest.mark.parametrize("load", [from_pretrained, by_transformers])
def test_stages_of_a_pipeline_together_are_the_model(load: Callable[..., nn.Module], deep: Path) -> None:
    want = logits(from_pretrained(four_layers(), deep), **INPUTS)
    first, last = (load(stage(four_layers(), here, "placeholders"), deep) for here in HALVES)
    assert [len(hificl_layers(part)) for part in (first, last)] == [2, 2]
    assert torch.equal(logits(last, inputs_embeds=logits(first, **INPUTS)), want)


@pytest.mark.parametrize("how", ["placeholders", "ModuleDict", "None", "slice"])
@pytest.mark.parametrize("load", [from_pretrained, by_transformers])
def test_a_stage_takes_its_layers(load: Callable[..., nn.Module], how: str, deep: Path) -> None:
    tensors = load_file(deep / "adapter_model.safetensors")
    for here in HALVES:
        base = stage(four_layers(), here, how)
        if how == "slice" and here.start:
            with pytest.raises(ValueError, match=r"layers.0.self_attn' is layer 2 .*Keep the numbers"):
                load(base, deep)
            assert not hificl_layers(base)
            continue
        load(base, deep)
        live = {key: value for key, value in base.state_dict().items() if ".hificl_" in key}
        assert len(live) == 2 * 4
        for key, value in live.items():
            plain = key.split(".default")[0]
            assert torch.equal(value, tensors[f"base_model.model.{plain}"])


def test_whole_modules_on_a_stage(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = get_peft_model(four_layers(), config(modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first, last = (from_pretrained(stage(four_layers(), here, "placeholders"), tmp_path) for here in HALVES)
    assert "lm_head.weight" not in " ".join(first.state_dict())
    assert torch.equal(last.base_model.model.lm_head.weight, tensors["base_model.model.lm_head.weight"])


def test_a_stage_saves_its_own_layers(deep: Path, tmp_path: Path) -> None:
    whole = load_file(deep / "adapter_model.safetensors")
    parts = []
    for here in HALVES:
        from_pretrained(stage(four_layers(), here, "placeholders"), deep).save_pretrained(tmp_path / f"{here.start}")
        parts.append(load_file(tmp_path / f"{here.start}" / "adapter_model.safetensors"))
    assert not parts[0].keys() & parts[1].keys() and parts[0].keys() | parts[1].keys() == whole.keys()
    assert all(torch.equal(tensor, whole[key]) for part in parts for key, tensor in part.items())


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_another_number_of_layers_is_not_a_stage(layers: int, deep: Path) -> None:
    for load in (from_pretrained, by_transformers):
        base = llama(layers=layers).eval()
        with unchanged(base), pytest.raises(ValueError, match=r"The adapter file (lacks|has unexpected) 'model.layers"):
            load(base, deep)


# -- compiled regions ------------------------------------------------------------------------------------------------


def in_regions(model: nn.Module, what: str) -> nn.Module:
    """Compile the layers, or their attentions, of a base model in its place."""
    layers = model.model.layers
    for index, layer in enumerate(list(layers)):
        if what == "layers":
            layers[index] = torch.compile(layer, backend="eager")
        else:
            layer.self_attn = torch.compile(layer.self_attn, backend="eager")
    return model


@pytest.mark.parametrize("what", ["layers", "attentions"])
def test_an_adapter_of_compiled_regions_and_of_the_model_as_it_was_are_the_same(what: str, tmp_path: Path) -> None:
    model = adapted("gqa", seed=3)
    model.save_pretrained(tmp_path / "plain")
    regions = in_regions(build("gqa"), what)
    logits(regions, **INPUTS)  # compiled before there is an adapter
    torch.manual_seed(3)
    compiled = get_peft_model(regions, config()).eval()
    want = logits(model, **INPUTS)
    torch.testing.assert_close(logits(compiled, **INPUTS), want, rtol=1e-5, atol=1e-5)
    compiled.save_pretrained(tmp_path / "compiled")
    plain, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == other.keys() and all(torch.equal(plain[key], other[key]) for key in plain)
    configs = [HiFICLConfig.from_pretrained(tmp_path / name) for name in ("plain", "compiled")]
    assert configs[0].target_modules == configs[1].target_modules
    for folder, base in (("plain", in_regions(build("gqa"), what)), ("compiled", build("gqa"))):
        loaded = PeftModel.from_pretrained(base, tmp_path / folder)
        torch.testing.assert_close(logits(loaded, **INPUTS), want, rtol=1e-5, atol=1e-5)


def test_whole_modules_in_compiled_regions(tmp_path: Path) -> None:
    """PEFT saves and looks for them by their names, LoRA's too: the regions must be compiled on both sides, or none."""
    torch.manual_seed(3)
    model = get_peft_model(in_regions(build("gqa"), "layers"), config(modules_to_save=["mlp"])).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(in_regions(build("gqa"), "layers"), tmp_path)
    assert torch.equal(logits(loaded, **INPUTS), logits(model, **INPUTS))
    base = build("gqa")
    with unchanged(base), pytest.raises(ValueError, match=r"has unexpected 'model.layers.0._orig_mod.mlp"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("targets", [{"target_modules": ["self_attn"], "layers_to_transform": [1]}, {}])
def test_transformers_own_loader_on_compiled_regions(targets: dict[str, object], tmp_path: Path) -> None:
    want = stored(tmp_path, **targets)
    base = in_regions(build("gqa"), "layers")
    base.load_adapter(tmp_path)
    torch.testing.assert_close(logits(base, **INPUTS), want, rtol=1e-5, atol=1e-5)


# -- saving what is in parts -----------------------------------------------------------------------------------------


def partitioned(model: nn.Module, of: str) -> nn.Module:
    """What DeepSpeed's ZeRO-3 leaves of parameters outside of a forward."""
    for name, parameter in model.named_parameters():
        if of in name:
            parameter.data = parameter.data.new_empty(0)
    return model


@pytest.mark.parametrize(
    ("of", "extra"),
    [
        (".hificl_", {}),
        (".layers.1.self_attn.virtual_pairs", {}),
        (".modules_to_save.default.", {"modules_to_save": ["lm_head"]}),
        (".trainable_tokens_delta.", {"trainable_token_indices": [7, 9]}),
    ],
)
def test_nothing_is_saved_empty(of: str, extra: dict[str, object], tmp_path: Path) -> None:
    model = adapted("gqa", **extra)
    whole = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    partitioned(model, of)
    with pytest.raises(ValueError, match=rf"{of}.* would be saved empty.*state_dict=accelerator.get_state_dict"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    model.save_pretrained(tmp_path, state_dict=whole)
    loaded = PeftModel.from_pretrained(build("gqa"), tmp_path)
    assert torch.equal(logits(loaded, **INPUTS), logits(adapted("gqa", **extra), **INPUTS))


def test_another_rank_may_have_nothing_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first has the state dict that accelerate has gathered, and all of them call `save_pretrained`."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda *group: 1)
    partitioned(adapted("gqa"), ".hificl_").save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


# -- what no other test would notice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "layers", "lm_head", "embed_tokens", "default_0"])
@pytest.mark.parametrize("load", [PeftModel.from_pretrained, lambda base, *args: base.load_adapter(*args)])
def test_an_adapter_may_be_named_like_a_part_of_the_model(load: Callable[..., object], name: str, good: Path) -> None:
    base = build("gqa")
    load(base, good, name)
    assert all(name in layer.n for layer in hificl_layers(base))
    torch.testing.assert_close(logits(base, **INPUTS), logits(adapted("gqa", seed=3), **INPUTS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "words"), [(0, ":"), (2, " and has unexpected 'x0', 'x1':"), (4, " .*'x0', 'x1', 'x2' and 1 more:")]
)
def test_a_file_of_something_else(count: int, words: str, good: Path) -> None:
    save_file({f"x{place}": torch.zeros(1) for place in range(count)}, good / "adapter_model.safetensors")
    base = build("gqa")
    with unchanged(base), pytest.raises(ValueError, match=rf"The adapter file lacks '.*hificl_V_A' and 5 more{words}"):
        from_pretrained(base, good)


def test_a_model_that_counts_no_layers_is_no_stage() -> None:
    """Whatever stands in the place of one."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Identity()])})
    for names in (["layers.0.attention"], ["blocks.0.attention"], ["attention"]):
        assert checkpoint.on_other_stages(names, model) == set()


def test_whose_fault_a_read_that_fails_is(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is there cannot be read; what is not on the Hub, or cannot be reached, is told by the Hub's error."""

    def fail(*args: object, **kwargs: object) -> None:
        raise error("gone")

    monkeypatch.setattr(checkpoint, "load_peft_weights", fail)
    for error in (OSError, ValueError, RuntimeError):
        with pytest.raises(ValueError, match=rf"cannot be read \({error.__name__}: gone\).*damaged"):
            checkpoint.read(good)
    monkeypatch.setattr(checkpoint, "hf_hub_download", fail)
    for error in (OSError, ValueError):
        with pytest.raises(error, match="^gone$"):
            checkpoint.folder_of("nobody/nothing")


@pytest.mark.parametrize("shared", ["layer", "attention"])
def test_a_layer_that_runs_twice_is_no_stage(shared: str, tmp_path: Path) -> None:
    def looped() -> tf.PreTrainedModel:
        base = build("gqa")
        first, _ = layers = base.model.layers
        if shared == "layer":
            layers[1] = first
        else:
            layers[1].self_attn = first.self_attn
        return base

    model = get_peft_model(looped(), config()).eval()
    assert len(hificl_layers(model)) == 1
    model.save_pretrained(tmp_path)
    want = logits(model, **inputs_for("gqa"), use_cache=False)
    again = PeftModel.from_pretrained(looped(), tmp_path)
    assert torch.equal(logits(again, **inputs_for("gqa"), use_cache=False), want)


def test_what_stands_beside_the_numbered_layers_of_a_stage() -> None:
    here, shared = nn.Linear(2, 2), nn.Linear(2, 2)
    here.config, here.layer_idx, shared.layer_idx = tf.LlamaConfig(num_hidden_layers=2), 1, 7
    model = nn.ModuleDict({"layers": nn.ModuleDict({"1": here, "shared": shared})})
    names = [f"layers.{place}.attention" for place in range(3)]
    assert checkpoint.on_other_stages(names, model) == {"layers.0.attention"}


def test_resized_embeddings_are_checked_on_the_stage_that_has_them(tmp_path: Path) -> None:
    for rows in (VOCAB, VOCAB + 8):
        whole = four_layers()
        whole.resize_token_embeddings(rows)
        get_peft_model(whole, config()).save_pretrained(tmp_path / f"{rows}", save_embedding_layers=True)
        for here in HALVES:
            base = stage(four_layers(), here, "placeholders")
            if rows == VOCAB:
                PeftModel.from_pretrained(base, tmp_path / f"{rows}")
                continue
            name = "model.embed_tokens" if here == HALVES[0] else "lm_head"
            with pytest.raises(ValueError, match=rf"'{name}.weight' .* shape \(107, 32\), but .* has \(99, 32\)"):
                PeftModel.from_pretrained(base, tmp_path / f"{rows}")


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7, 9]}], ids=str)
def test_a_second_read_by_transformers_that_fails_leaves_what_was_stored_beside_the_pairs(
    extra: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("gqa", seed=3, **extra)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name or ".trainable_tokens_delta." in name:
                parameter.mul_(2)
    model.save_pretrained(tmp_path)
    base = build("gqa")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_open", fail)
        with pytest.raises(OSError, match="gone"):
            base.load_adapter(tmp_path)
    base.set_adapter("default")
    torch.testing.assert_close(logits(base, **INPUTS), logits(model, **INPUTS), rtol=1e-6, atol=1e-6)
