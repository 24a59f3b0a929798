"""Where the adapter lies: on base models that accelerate keeps elsewhere, that moved, or that are quantised."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict, load_peft_weights
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import PreTrainedModel

from peft_hificl import HiFICLConfig, HiFICLLayer

from .helpers import adapted, build, changed, config, hificl_layers, inputs_for, logits

CPU = torch.device("cpu")
PARTLY_ON_DISK = {
    "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


def loaded_partly_on_disk(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    base.save_pretrained(folder / "base")
    return type(base).from_pretrained(folder / "base", device_map=PARTLY_ON_DISK, offload_folder=folder).eval()


OFFLOADS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "cpu_offload": lambda base, folder: accelerate.cpu_offload(base, CPU),
    "disk_offload": lambda base, folder: accelerate.disk_offload(base, folder / "offload", CPU),
    "dispatch": lambda base, folder: accelerate.dispatch_model(
        base, PARTLY_ON_DISK, offload_dir=folder / "offload", main_device="cpu"
    ),
    "from_pretrained": loaded_partly_on_disk,
}


@pytest.fixture(params=list(OFFLOADS))
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[PreTrainedModel], PreTrainedModel]:
    return partial(OFFLOADS[request.param], folder=tmp_path)


def adapt(base: nn.Module, **kwargs: object) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, config(**kwargs)).eval()


def generated(model: nn.Module, **kwargs: object) -> Tensor:
    """The scores of every step."""
    inputs = inputs_for("gqa")
    inputs["input_ids"][0, :3] = 0  # padding
    result = model.generate(
        **inputs, attention_mask=(inputs["input_ids"] > 0).long(), max_new_tokens=5, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **kwargs,
    )  # fmt: skip
    return torch.stack(result.logits)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    ids = inputs_for("gqa")["input_ids"]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def refused(base: nn.Module, match: str) -> Iterator[None]:
    """With an error, before anything has changed."""

    def state() -> tuple[object, ...]:
        return (
            [(name, type(module), module.__dict__.get("config")) for name, module in base.named_modules()],
            [(name, p.requires_grad, p.device) for name, p in base.named_parameters()],
            dict(getattr(base, "hf_device_map", {})),
        )

    before, want = state(), generated(base)
    with pytest.raises(ValueError, match=match):
        yield
    assert state() == before and torch.equal(generated(base), want)


# -- bases that accelerate has offloaded -----------------------------------------------------------------------------


def test_an_adapter_on_an_offloaded_base_is_as_on_any_other(offload: Callable, tmp_path: Path) -> None:
    plain, base = adapt(build("gqa")), offload(build("gqa"))
    assert base.model.layers[0].self_attn.q_proj.weight.is_meta
    bare = logits(base, **inputs_for("gqa"))
    model = adapt(base)
    assert torch.equal(logits(model, **inputs_for("gqa")), logits(plain, **inputs_for("gqa")))
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        assert torch.equal(generated(model, **options), generated(plain, **options))
    want = gradients(plain)
    assert all(torch.equal(gradient, want[name]) for name, gradient in gradients(model).items())
    for one in (plain, model):
        torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2).step()
        one.eval().save_pretrained(tmp_path / ("trained" if one is model else "expected"))
    trained, expected = (load_peft_weights(str(tmp_path / name)) for name in ("trained", "expected"))
    assert trained.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.items())
    assert torch.equal(generated(model), generated(plain))
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs_for("gqa")), bare)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, **inputs_for("gqa")), bare)
    assert not any("virtual_pairs" in name for name in getattr(unloaded, "hf_device_map", ()))


def load_by_peft(base: PreTrainedModel, path: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, path)


def load_as_second(base: PreTrainedModel, path: Path) -> nn.Module:
    model = get_peft_model(base, config(n=2))
    model.load_adapter(path, "second")
    model.set_adapter("second")
    return model.eval()


def load_into_config(base: PreTrainedModel, path: Path) -> nn.Module:
    model = get_peft_model(base, HiFICLConfig.from_pretrained(path))
    set_peft_model_state_dict(model, load_peft_weights(str(path)))
    return model.eval()


def load_by_transformers(base: PreTrainedModel, path: Path) -> nn.Module:
    base.load_adapter(str(path))
    return base.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("load", [load_by_peft, load_as_second, load_into_config, load_by_transformers])
def test_loading_onto_an_offloaded_base(
    load: Callable, offload: Callable, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plain = adapt(build("gqa"))
    plain.save_pretrained(tmp_path / "adapter")
    base, how = offload(build("gqa")), request.node.callspec.params["offload"]
    if load is load_by_transformers and how in ("cpu_offload", "disk_offload"):
        model = load(base, tmp_path / "adapter")  # transformers loads onto base.device, which is meta
        for _ in range(2):
            with pytest.raises(ValueError, match=r"is on meta: it was never loaded.*use PeftModel\.from_pretrained"):
                model(**inputs_for("gqa"))
        return
    if load is load_by_peft and how == "from_pretrained":
        with pytest.raises(ValueError, match=r"partly offloaded to disk.*Load the base model again.*get_peft_model"):
            load(base, tmp_path / "adapter")
        return
    assert torch.equal(generated(load(base, tmp_path / "adapter")), generated(plain))


def test_adapters_of_transformers_own_on_an_offloaded_base(offload: Callable) -> None:
    base, injected = offload(build("gqa")), offload(build("gqa"))
    torch.manual_seed(1)
    base.add_adapter(config())
    torch.manual_seed(1)
    inject_adapter_in_model(config(), injected)
    want = generated(adapt(build("gqa")))
    assert torch.equal(generated(base), want) and torch.equal(generated(injected), want)


def test_an_offloaded_adapter_that_would_not_learn_is_refused() -> None:
    """Its gradients would go to weights that accelerate throws away after the forward."""
    model = adapt(build("gqa"))
    want = generated(model)
    accelerate.cpu_offload(model, CPU)
    assert torch.equal(generated(model), want)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        with pytest.raises(RuntimeError, match="gradients would be lost: offload the base model first"):
            gradients(model)


def test_an_adapter_that_is_dispatched_but_not_offloaded_learns() -> None:
    model, plain = adapt(build("gqa")), adapt(build("gqa"))
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for layer in hificl_layers(model) for module in layer.modules())
    want = gradients(plain)
    assert all(torch.equal(gradient, want[name]) for name, gradient in gradients(model).items())


# PEFT's copy of an offloaded module keeps the hook that brings in the base's weights, whatever it has learnt itself.
@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["mlp"]},
        {"trainable_token_indices": [5, 6]},
        {"trainable_token_indices": {"embed_tokens": [5, 6]}},
    ],
    ids=str,
)
def test_copies_of_offloaded_modules_are_refused(fields: dict[str, object], tmp_path: Path) -> None:
    base = accelerate.cpu_offload(build("gqa"), CPU)
    with refused(base, "offloaded by accelerate.*keep it in memory"):
        adapt(base, **fields)
    plain = adapt(build("gqa"), **fields)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad and "hificl_" not in name:
                parameter.mul_(2)
    plain.save_pretrained(tmp_path)
    with refused(base, "offloaded by accelerate.*keep it in memory"):
        PeftModel.from_pretrained(base, tmp_path)
    before = PeftModel.from_pretrained(build("gqa"), tmp_path)
    want = generated(before)
    torch.testing.assert_close(generated(plain), want)
    if "modules_to_save" in fields:  # PEFT reads trained tokens where no hook sees it, for LoRA too
        assert torch.equal(generated(accelerate.cpu_offload(before, CPU)), want)


def test_a_head_that_stays_in_memory_is_trained_beside_offloaded_layers(tmp_path: Path) -> None:
    fields = {"modules_to_save": ["lm_head"]}
    base = accelerate.dispatch_model(
        build("gqa"), {**PARTLY_ON_DISK, "lm_head": "cpu"}, offload_dir=tmp_path, main_device="cpu"
    )
    want, got = gradients(adapt(build("gqa"), **fields)), gradients(adapt(base, **fields))
    assert any("lm_head" in name for name in got)
    assert all(torch.equal(gradient, want[name]) for name, gradient in got.items())


@pytest.mark.parametrize("preloaded", ["LlamaAttention", "LlamaDecoderLayer"])
def test_layers_that_accelerate_loads_whole_are_refused(preloaded: str) -> None:
    base = accelerate.cpu_offload(build("gqa"), CPU, preload_module_classes=[preloaded])
    with refused(base, r"layers\.0.*preload_module_classes"):
        adapt(base)


# -- bases that have moved -------------------------------------------------------------------------------------------


def through_meta(model: nn.Module) -> None:
    """As accelerate does for FSDP with cpu_ram_efficient_loading."""
    state, buffers = model.state_dict(), {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to("meta")
    model.load_state_dict(state, assign=True)
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low-cpu-mem"])
def test_an_adapter_that_is_loaded_after_a_trip_through_meta(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    other = adapted("gqa", 2)
    other.save_pretrained(tmp_path)
    model = adapted("gqa")
    through_meta(model)
    model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("other")
    assert torch.equal(generated(model), generated(other))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low-cpu-mem"])
def test_a_later_adapter_has_the_dtype_that_the_base_has_by_then(low_cpu_mem_usage: bool) -> None:
    model = get_peft_model(build("gqa"), config(), autocast_adapter_dtype=False)
    wide = {name: tensor.double() for name, tensor in model.state_dict().items()}
    model.load_state_dict(wide, assign=True)
    model.add_adapter("late", config(), autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage)
    if low_cpu_mem_usage:
        state = get_peft_model_state_dict(model, adapter_name="default")
        state = {name: tensor.float() for name, tensor in state.items()}
        set_peft_model_state_dict(model, state, adapter_name="late", low_cpu_mem_usage=True)
    dtypes = {p.dtype for name, p in model.named_parameters() if "hificl_" in name and "late" in name}
    assert dtypes == {torch.float64}


def test_a_copy_moves_on_its_own() -> None:
    model = get_peft_model(build("gqa"), config(), autocast_adapter_dtype=False)
    clone = copy.deepcopy(model).to(torch.float64)
    for one, dtype in ((model, torch.float32), (clone, torch.float64)):
        one.add_adapter("late", config(), autocast_adapter_dtype=False)
        assert {p.dtype for name, p in one.named_parameters() if "hificl_" in name and "late" in name} == {dtype}


def test_weights_of_8_bits_are_not_the_dtype_of_an_adapter() -> None:
    base = build("gqa").to(torch.float8_e4m3fn)
    model = get_peft_model(base, config(), autocast_adapter_dtype=False)
    assert {p.dtype for layer in hificl_layers(model) for p in layer.parameters()} == {torch.float32}


def test_the_weights_of_an_attention_may_be_buffers() -> None:
    """Packed weights are, in some quantisations; the adapter of before does not count while there are any."""
    base = build("gqa").double()
    for layer in base.model.layers:
        for module in layer.self_attn.modules():
            for name in list(module._parameters):
                parameter = module._parameters.pop(name)
                module.register_buffer(name, None if parameter is None else parameter.detach())
    model = get_peft_model(base, config(), autocast_adapter_dtype=False)
    hificl_layers(model)[0].float()
    model.add_adapter("late", config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in hificl_layers(model)[0].parameters()} == {torch.float32, torch.float64}


# -- quantised bases -------------------------------------------------------------------------------------------------


def test_a_weight_only_base_of_torchao_trains_and_reloads(tmp_path: Path) -> None:
    def quantised() -> PreTrainedModel:
        base = build("gqa")
        quantize_(base, Int8WeightOnlyConfig())
        return base

    base = quantised()
    bare = logits(base, **inputs_for("gqa"))
    model = adapt(base)
    assert {p.dtype for layer in hificl_layers(model) for p in layer.parameters()} == {torch.float32}
    # The same numbers, not quantised.
    plain = build("gqa")
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear) and "virtual_pairs" not in name:
                plain.get_submodule(name).weight.copy_(module.weight.dequantize())
    plain = adapt(plain)
    want = gradients(plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6, msg=name)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    trained = generated(model.eval())
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(quantised(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(generated(loaded), trained)
    model.add_adapter("late", config())
    assert torch.equal(logits(model.unload(), **inputs_for("gqa")), bare)
    assert not any(isinstance(module, HiFICLLayer) for module in base.modules())


def test_a_load_that_fails_leaves_nothing_in_the_device_map(tmp_path: Path) -> None:
    adapted("gqa").save_pretrained(tmp_path)
    changed(tmp_path, lambda tensor: tensor + 1e5)
    base = OFFLOADS["dispatch"](build("gqa").half(), tmp_path)
    before = dict(base.hf_device_map)
    with pytest.raises(ValueError, match=r"float16 cannot hold"):
        base.load_adapter(tmp_path)
    assert base.hf_device_map == before and not hificl_layers(base)
