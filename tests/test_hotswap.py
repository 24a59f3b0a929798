"""`hotswap_adapter`: another adapter's weights in the place of a loaded one's."""

from __future__ import annotations

import shutil
from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from peft_hificl import hotswap_adapter

from .helpers import adapted, build, changed, config, hificl_layers, inputs_for, logits, unchanged


def stored(folder: Path, kind: str = "gqa", **fields: object) -> Path:
    adapted(kind, seed=2, **fields).save_pretrained(folder)
    return folder


def memory(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("fields", [{}, {"factorize_keys": False, "pair_weights": True}], ids=str)
def test_the_weights_are_replaced_in_place(kind: str, fields: dict[str, object], tmp_path: Path) -> None:
    stored(tmp_path, kind, **fields)
    model = adapted(kind, **fields)
    before = memory(model)
    hotswap_adapter(model, tmp_path, "default")
    assert memory(model) == before
    assert torch.equal(logits(model, **inputs_for(kind)), logits(adapted(kind, seed=2, **fields), **inputs_for(kind)))


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7, 9]}], ids=str)
def test_with_what_was_trained_beside_the_pairs(extra: dict[str, object], tmp_path: Path) -> None:
    inputs = inputs_for("gqa")
    inputs["input_ids"][:, 2] = 7
    other = adapted("gqa", seed=2, **extra)
    for name, parameter in other.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(parameter)
    other.save_pretrained(tmp_path)
    model = adapted("gqa", **extra)
    before = memory(model)
    hotswap_adapter(model, str(tmp_path), "default")
    assert memory(model) == before and torch.equal(logits(model, **inputs), logits(other, **inputs))


def test_other_adapters_the_name_its_state_and_its_strength_stay(tmp_path: Path) -> None:
    stored(tmp_path / "folder" / "inner")
    model = adapted("gqa", name="a")
    model.add_adapter("b", config())
    for layer in hificl_layers(model):
        layer.set_scale("b", 0.5)
    want = logits(model, **inputs_for("gqa"))
    hotswap_adapter(model, tmp_path / "folder", "b", subfolder="inner")
    assert model.active_adapters == ["a"] and torch.equal(logits(model, **inputs_for("gqa")), want)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".b." in name)
    model.set_adapter("b")
    other = adapted("gqa", seed=2)
    for layer in hificl_layers(other):
        layer.set_scale("default", 0.5)
    assert torch.equal(logits(model, **inputs_for("gqa")), logits(other, **inputs_for("gqa")))


def test_stored_names_are_mapped_as_peft_maps_them(tmp_path: Path) -> None:
    stored(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace(".layers.", ".blocks."): tensor for key, tensor in load_file(path).items()}, path)
    mapping = {r"\.blocks\.": ".layers."}
    want = logits(PeftModel.from_pretrained(build("gqa"), tmp_path, key_mapping=mapping), **inputs_for("gqa"))
    model = adapted("gqa")
    with (
        unchanged(model),
        pytest.raises(ValueError, match="The state dict lacks .*layers.* and has unexpected .*block"),
    ):
        hotswap_adapter(model, tmp_path, "default")
    hotswap_adapter(model, tmp_path, "default", key_mapping=mapping, torch_device="cpu")
    assert torch.equal(logits(model, **inputs_for("gqa")), want)


def test_a_keyword_that_nobody_reads(tmp_path: Path) -> None:
    """Without a word, it would be another adapter's weights, those of the folder itself."""
    stored(tmp_path)
    stored(tmp_path / "inner")
    model = adapted("gqa")
    with unchanged(model), pytest.raises(TypeError, match="does not know 'sub_folder': give key_mapping, or where"):
        hotswap_adapter(model, tmp_path, "default", sub_folder="inner")


def test_a_model_that_transformers_has_adapted(tmp_path: Path) -> None:
    stored(tmp_path)
    base = build("gqa")
    base.add_adapter(config(), "mine")
    hotswap_adapter(base, tmp_path, "mine")
    assert torch.equal(logits(base, **inputs_for("gqa")), logits(adapted("gqa", seed=2), **inputs_for("gqa")))


@pytest.mark.parametrize("given", ["compiled", "model"])
def test_compiled_code_is_not_compiled_again(given: str, tmp_path: Path) -> None:
    stored(tmp_path)
    model, inputs = adapted("gqa"), inputs_for("gqa")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    logits(compiled, **inputs)
    frames = counter.frame_count
    hotswap_adapter(compiled if given == "compiled" else model, tmp_path, "default")
    want = logits(adapted("gqa", seed=2), **inputs)
    torch.testing.assert_close(logits(compiled, **inputs), want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == frames > 0


def test_what_is_stored_in_half_precision(tmp_path: Path) -> None:
    stored(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    model = adapted("gqa")
    hotswap_adapter(model, tmp_path, "default")
    weight = hificl_layers(model)[0].hificl_K_A["default"].weight
    want = hificl_layers(adapted("gqa", seed=2))[0].hificl_K_A["default"].weight
    assert weight.dtype == torch.float32 and torch.equal(weight, want.bfloat16().float())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 4}, "has n=4, but 'default' on the model has n=3: load it under a name of its own"),
        ({"r": 3}, "has r=3, but"),
        ({"factorize_keys": False}, "has factorize_keys=False"),
        ({"factorize_values": False}, "has factorize_values=False"),
        ({"pair_weights": True}, "has pair_weights=True"),
        ({"scale_self_attention": False, "n": 4}, "has n=4, scale_self_attention=False, but .*has n=3, scale_self"),
        ({"skip_first_token": True}, "has skip_first_token=True"),
        (
            {"trainable_token_indices": [1, 2]},
            "has trainable_token_indices=.1, 2., but .* has trainable_token_indices=None",
        ),
        ({"layers_to_transform": [0]}, "The state dict lacks .*layers.1"),
        ({"modules_to_save": ["lm_head"]}, "The adapter file has unexpected 'base_model.model.lm_head"),
    ],
    ids=str,
)
def test_an_adapter_that_does_not_fit(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    stored(tmp_path, **fields)
    model = adapted("gqa")
    with unchanged(model), pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path, "default")


def test_an_adapter_of_another_base_model(tmp_path: Path) -> None:
    stored(tmp_path, "vlm")
    model = adapted("gqa")
    with unchanged(model), pytest.raises(ValueError, match="The state dict lacks .* and has unexpected"):
        hotswap_adapter(model, tmp_path, "default")


@pytest.mark.parametrize("broken", ["nan", "shape", "lost", "damaged", "gone", "lora"])
def test_a_file_that_cannot_be_used(broken: str, tmp_path: Path) -> None:
    stored(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    if broken == "nan":
        changed(tmp_path, lambda tensor: tensor * torch.nan)
    elif broken == "shape":
        changed(tmp_path, lambda tensor: tensor[:2].clone())
    elif broken == "lost":
        tensors = load_file(path)
        tensors.popitem()
        save_file(tensors, path)
    elif broken == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    elif broken == "gone":
        path.unlink()
    else:
        shutil.rmtree(tmp_path)
        get_peft_model(build("gqa"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    messages = {
        "nan": "not finite", "shape": "has shape", "lost": "lacks", "damaged": "cannot be read", "gone": "no weights",
        "lora": "type LORA, which cannot replace",
    }  # fmt: skip
    model = adapted("gqa")
    with unchanged(model), pytest.raises(ValueError, match=messages[broken]):
        hotswap_adapter(model, tmp_path, "default")


def test_numbers_that_the_parameters_dtype_cannot_hold(tmp_path: Path) -> None:
    stored(tmp_path)
    changed(tmp_path, lambda tensor: tensor * 1e6)
    model = get_peft_model(build("gqa").half(), config(), autocast_adapter_dtype=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"which the parameter's torch\.float16 cannot hold"):
        hotswap_adapter(model, tmp_path, "default")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    stored(tmp_path)
    lora = get_peft_model(build("gqa"), LoraConfig(target_modules=["q_proj"]))
    for model, names in ((adapted("gqa", name="a"), r"\['a'\]"), (build("gqa"), r"\[\]"), (lora, r"\[\]")):
        with pytest.raises(
            ValueError, match=f"no HiFICL adapter 'default' to replace on this model, which has {names}"
        ):
            hotswap_adapter(model, tmp_path, "default")


def test_an_adapter_that_is_offloaded(tmp_path: Path) -> None:
    stored(tmp_path)
    model: PeftModel = adapted("gqa")
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded or sharded"):
        hotswap_adapter(model, tmp_path, "default")


def test_nothing_is_half_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that can fail comes before the first copy, the conversion of dtypes too."""
    stored(tmp_path)
    model = adapted("gqa")
    kept, calls = torch.Tensor.to, []

    def fails(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        return kept(self, *args, **kwargs)

    with unchanged(model):
        monkeypatch.setattr(torch.Tensor, "to", fails)
        with pytest.raises(MemoryError):
            hotswap_adapter(model, tmp_path, "default")
        monkeypatch.undo()


def test_rows_of_other_tokens_are_not_put_in_the_place_of_these(tmp_path: Path) -> None:
    of = {tokens: adapted("gqa", trainable_token_indices=tokens) for tokens in ((1, 2), (7, 8))}
    of[7, 8].save_pretrained(tmp_path)
    with unchanged(of[1, 2]), pytest.raises(ValueError, match=r"has trainable_token_indices=\[7, 8\], but .*\[1, 2\]"):
        hotswap_adapter(of[1, 2], tmp_path, "default")
    for tokens in ([7, 8], (7, 8)):
        same = adapted("gqa", seed=2, trainable_token_indices=tokens)
        hotswap_adapter(same, tmp_path, "default")
        assert torch.equal(logits(same, **inputs_for("gqa")), logits(of[7, 8], **inputs_for("gqa")))


def test_tokens_of_a_model_that_does_not_tell_its_embedding() -> None:
    """PEFT takes that of the name `embed_tokens`."""
    fields: dict[str, object] = {"trainable_token_indices": [7, 9], "target_modules": ["self_attn"]}
    model = get_peft_model(nn.ModuleDict({"own": build("gqa")}), config(**fields))
    assert any("embed_tokens.token_adapter" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("tokens", [(7, 9), {"embed_tokens": (7, 9)}], ids=str)
def test_tokens_in_a_tuple_are_rows(tokens: object) -> None:
    """PEFT alone would train the number in row 7 and column 9."""
    model = adapted("gqa", trainable_token_indices=tokens)
    shapes = [parameter.shape for name, parameter in model.named_parameters() if "tokens_delta" in name]
    assert shapes == [(2, 32)]
