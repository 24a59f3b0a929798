"""What people do with LoRA, done with HiFICL: on a GQA decoder, an MHA decoder and a vision-language model."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import peft.functional
import pytest
import torch
import transformers as tf
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_hificl import HiFICLConfig, HiFICLLayer
from peft_hificl.names import HeadShape

from .helpers import adapted, build, config, hificl_layers, inputs_for, llama, logits, pairs_for, train, unchanged

# -- attach and train ------------------------------------------------------------------------------------------------


def test_parameter_count_is_the_papers() -> None:
    shapes = HiFICLConfig(n=8, r=8).parameter_shapes(heads=32, key_dim=128, value_dim=128)
    per_layer = sum(a * b * c for a, b, c in shapes.values())
    assert per_layer == 69_632 and 32 * per_layer == 2_228_224  # 2.2M on a 7B model
    shapes = HiFICLConfig(n=8, r=16).parameter_shapes(heads=32, key_dim=128, value_dim=128)
    assert 32 * sum(a * b * c for a, b, c in shapes.values()) == 4_456_448


def test_default_targets_are_the_text_decoders(kind: str) -> None:
    model = adapted(kind)
    where = "model.language_model.layers" if kind == "vlm" else "model.layers"
    assert sorted(model.targeted_module_names) == [f"{where}.{i}.self_attn" for i in (0, 1)]
    pattern = model.peft_config["default"].target_modules
    assert pattern == where.replace(".", r"\.") + r"\.\d+\.self_attn"


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ({}, range(4)),
        ({"exclude_modules": ["layers.0.self_attn"]}, range(1, 4)),
        ({"layers_to_transform": [0, 1]}, [0, 1]),
    ],
    ids=["default", "exclude", "layers"],
)
def test_one_config_on_several_models(choice: dict[str, object], layers: list[int], tmp_path: Path) -> None:
    """It means all layers of a deeper model, and each model keeps what was found for it."""
    shared = config(**choice)
    shallow = get_peft_model(build("gqa"), shared)
    names = [f"model.layers.{i}.self_attn" for i in layers]
    assert get_peft_model(llama(layers=4), shared).targeted_module_names == names
    assert get_peft_model(build("gqa"), shared).peft_config["default"] is shared  # the same targets, the same object
    if not choice:  # what was found for a model holds for any number of layers
        found = shallow.peft_config["default"]
        assert get_peft_model(llama(layers=4), found).targeted_module_names == names
    assert get_peft_model(build("vlm"), shared).targeted_module_names[0].startswith("model.language_model.layers")
    shallow.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("gqa"), tmp_path)
    assert again.targeted_module_names == shallow.targeted_module_names


def test_names_that_peft_has_shortened_are_found_again_in_another_model() -> None:
    """From twenty names on, PEFT keeps their common ends, which are the names of other attentions in other models."""
    shared = config(layers_to_transform=list(range(20)))
    get_peft_model(llama(layers=20), shared)
    assert shared.target_modules == {"self_attn"}
    names = get_peft_model(build("vlm"), shared).targeted_module_names
    assert names == [f"model.language_model.layers.{i}.self_attn" for i in range(2)]


@pytest.mark.parametrize(
    ("task", "cls"),
    [
        ("TOKEN_CLS", "TokenClassification"),
        ("QUESTION_ANS", "QuestionAnswering"),
        ("SEQ_CLS", "SequenceClassification"),
    ],
)
def test_task_types_with_a_head(task: str, cls: str, tmp_path: Path) -> None:
    """PEFT names the heads in the configuration, some of them after the adapter was attached."""
    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}

    def base() -> tf.PreTrainedModel:
        torch.manual_seed(0)
        return getattr(tf, f"RobertaFor{cls}")(
            tf.RobertaConfig(**small, num_attention_heads=4, max_position_embeddings=64)
        ).eval()

    shared = config(task_type=task)
    for _ in range(2):  # one configuration for two models
        model = get_peft_model(base(), shared).eval()
        heads = [name for name, p in model.named_parameters() if "modules_to_save" in name and p.requires_grad]
        assert heads
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    ids = {"input_ids": inputs_for("gqa")["input_ids"]}
    with torch.no_grad():
        for a, b in zip(model(**ids).to_tuple(), loaded(**ids).to_tuple(), strict=True):
            assert torch.equal(a, b)


def test_only_the_adapter_learns(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build(kind), HiFICLConfig(n=8, r=8, modules_to_save=["lm_head"]))
    model.print_trainable_parameters()
    assert "trainable params" in capsys.readouterr().out
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, kind, steps=8)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == ("hificl_" in name or "modules_to_save" in name), name


def test_paper_init_is_not_the_identity() -> None:
    """V_B = 0 makes the virtual values zero, but the virtual keys take part in the softmax: alpha < 1."""
    base = build("gqa")
    want = logits(base, **inputs_for("gqa"))
    model = get_peft_model(base, HiFICLConfig(n=8, r=8)).eval()
    for layer in hificl_layers(model):
        assert not layer.hificl_V_B["default"].weight.any() and layer.hificl_K_A["default"].weight.any()
        assert 0.005 < layer.hificl_K_B["default"].weight.std() < 0.02
        assert not pairs_for(layer, 2).values.any()
    difference = (logits(model, **inputs_for("gqa")) - want).abs()
    assert difference.max() > 0.01


@pytest.mark.parametrize(
    ("ablation", "names"),
    [
        ({}, {"K_A", "K_B", "V_A", "V_B"}),
        ({"factorize_keys": False}, {"K", "V_A", "V_B"}),
        ({"factorize_values": False}, {"K_A", "K_B", "V"}),
        ({"factorize_keys": False, "factorize_values": False}, {"K", "V"}),
        ({"scale_self_attention": False}, {"K_A", "K_B", "V_A", "V_B"}),
    ],
    ids=["full", "dense-K", "dense-V", "dense", "alpha-1"],
)
def test_ablations_train_save_and_load(ablation: dict[str, bool], names: set[str], tmp_path: Path) -> None:
    model = adapted("gqa", **ablation)
    train(model, "gqa")
    keys = get_peft_model_state_dict(model)
    assert {k.rpartition("hificl_")[2] for k in keys} == names
    want = logits(model, **inputs_for("gqa"))
    model.save_pretrained(tmp_path)
    assert torch.equal(want, logits(PeftModel.from_pretrained(build("gqa"), tmp_path), **inputs_for("gqa")))


def test_alpha_one_at_paper_init_is_the_identity() -> None:
    base = build("gqa")
    want = logits(base, **inputs_for("gqa"))
    model = get_peft_model(base, HiFICLConfig(scale_self_attention=False)).eval()
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), want)


# -- save and load ---------------------------------------------------------------------------------------------------

FRESH = """
import json, sys, torch, peft, peft_hificl
from tests.helpers import build, inputs_for, logits
for kind, route, folder in json.loads(sys.argv[1]):
    if route == "PeftModel":
        model = peft.PeftModel.from_pretrained(build(kind), folder)
    else:
        model = getattr(peft, route).from_pretrained(folder)
    torch.save(logits(model.eval(), **inputs_for(kind)), folder + "/got.pt")
"""
RELOADS = [
    ("gqa", "PeftModel"), ("gqa", "AutoPeftModelForCausalLM"), ("mha", "PeftModel"),
    ("mha", "AutoPeftModelForCausalLM"), ("vlm", "PeftModel"), ("vlm", "AutoPeftModel"),
]  # fmt: skip


@pytest.fixture(scope="module")
def reloaded_afresh(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """The logits of trained adapters, and of the same when one other process has loaded them all."""
    want, jobs = {}, []
    for kind, route in RELOADS:
        folder = tmp_path_factory.mktemp("fresh")
        base = build(kind)
        base.save_pretrained(folder / "base")
        base = type(base).from_pretrained(folder / "base").eval()
        torch.manual_seed(1)
        model = get_peft_model(base, config(**{} if kind == "vlm" else {"task_type": "CAUSAL_LM"}))
        train(model, kind)
        model.save_pretrained(folder)
        want[kind, route] = logits(model, **inputs_for(kind))
        jobs.append((kind, route, str(folder)))
    command = [sys.executable, "-W", "ignore", "-c", FRESH, json.dumps(jobs)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    return {(kind, route): (torch.load(f"{folder}/got.pt"), want[kind, route]) for kind, route, folder in jobs}


@pytest.mark.parametrize(("kind", "route"), RELOADS)
def test_reload_in_a_fresh_process_is_bit_equal(
    kind: str, route: str, reloaded_afresh: dict[tuple[str, str], tuple[Tensor, Tensor]]
) -> None:
    got, want = reloaded_afresh[kind, route]
    assert torch.equal(got, want)


def test_the_file_holds_the_adapter_alone_and_names_its_targets(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * 4
    assert all(re.search(r"\.virtual_pairs\.hificl_[KV]_[AB]$", key) for key in stored)  # as in every version
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    names = [name for name, _ in build(kind).named_modules() if re.fullmatch(saved["target_modules"], name)]
    assert names == model.targeted_module_names and saved["peft_type"] == "HIFICL"
    assert type(PeftConfig.from_pretrained(tmp_path)) is HiFICLConfig


def test_reload_needs_no_detection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("vlm")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("peft_hificl.targets.find_self_attention", lambda model: pytest.fail("searched"))
    reloaded = PeftModel.from_pretrained(build("vlm"), tmp_path)
    assert torch.equal(logits(reloaded, **inputs_for("vlm")), logits(model, **inputs_for("vlm")))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a repository `someone/adapter` in a Hub cache of our own; returns where its files belong."""
    repository = tmp_path / "models--someone--adapter"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_an_adapter_from_the_hub(hub: Path, tmp_path: Path) -> None:
    model = adapted("gqa")
    want = logits(model, **inputs_for("gqa"))
    model.save_pretrained(hub)
    loaded = PeftModel.from_pretrained(build("gqa"), "someone/adapter", cache_dir=tmp_path)
    assert torch.equal(logits(loaded, **inputs_for("gqa")), want)
    (hub / "adapter_model.safetensors").write_bytes(b"damaged")
    base = build("gqa")
    with pytest.raises(ValueError, match="models--someone--adapter.*cannot be read.*download it again"):
        PeftModel.from_pretrained(base, "someone/adapter", cache_dir=tmp_path)
    assert not hificl_layers(base)
    (hub / "adapter_model.safetensors").unlink()
    assert HiFICLConfig.from_pretrained("someone/adapter", cache_dir=tmp_path).n == 3  # a configuration alone


@pytest.mark.parametrize("autocast", [True, False], ids=["float32-adapter", "bfloat16-adapter"])
def test_dtype_policy_survives_the_reload(autocast: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = build("gqa").to(torch.bfloat16)
    model = get_peft_model(base, config(), autocast_adapter_dtype=autocast).eval()
    want = logits(model, **inputs_for("gqa"))
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(build("gqa").to(torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for name, p in reloaded.named_parameters() if "hificl_" in name}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    assert torch.equal(logits(reloaded, **inputs_for("gqa")), want)


@pytest.mark.parametrize("name", ["default", "task-a"])
def test_the_model_cards_snippet_runs_as_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the base model is known by a relative path
    base = build("vlm")
    base.save_pretrained("base")
    model = get_peft_model(type(base).from_pretrained("base"), config(), adapter_name=name)
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.count("## How to use th") == 1 and "library_name: peft" in card
    snippet = card.split("```python")[1].split("```")[0]
    assert "import peft_hificl" in snippet
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", snippet + "\nprint(type(model).__name__, model.active_adapters)"],
        cwd=tmp_path / "adapter", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "PeftModel" in done.stdout
    # Another adapter is saved over it: its section takes the place of the old one, what the user wrote stays.
    readme = tmp_path / "adapter" / "README.md"
    readme.write_text(card + "\n### Results\n\nGood.\n")
    get_peft_model(type(base).from_pretrained("base"), config(n=7), adapter_name=name).save_pretrained("adapter")
    card = readme.read_text()
    assert card.count("## How to use") == 1 and card.endswith("\n### Results\n\nGood.")
    assert "7 virtual key-value pairs" in card and "3 virtual key-value pairs" not in card


def test_the_model_card_of_two_adapters_shows_both(tmp_path: Path) -> None:
    model = adapted("gqa")
    model.add_adapter("captions", config())
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("## How to use this HiFICL adapter\n") == 1
    assert card.count("## How to use the HiFICL adapter captions\n") == 1


def test_a_readme_that_is_not_pefts_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    HiFICLConfig().save_pretrained(tmp_path / "configs")
    HiFICLConfig().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low-cpu-mem"])
def test_load_adapter_and_switch(kind: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    inputs, want = inputs_for(kind), {}
    for seed, name in ((1, "a"), (2, "b")):
        model = adapted(kind, seed)
        want[name] = logits(model, **inputs)
        model.save_pretrained(tmp_path / name)
    base = build(kind)
    bare = logits(base, **inputs)
    model = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a", low_cpu_mem_usage=low_cpu_mem_usage)
    model.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in model.parameters())
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        assert torch.equal(logits(model, **inputs), want[name])
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs), bare)
    model.delete_adapter("a")
    assert list(model.peft_config) == ["b"] and torch.equal(logits(model, **inputs), want["b"])
    assert not any(".a." in name for name, _ in model.named_parameters())


def test_adapters_named_as_layers_are_loaded_and_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    """PEFT leaves tensors whose name contains that of another adapter out of a file, so of layers 0 and 1."""
    wanted = {}
    for seed in (2, 3):
        other = adapted("gqa", seed=seed, name="own")
        wanted[str(seed - 2)] = logits(other, **inputs_for("gqa"))
        other.save_pretrained(tmp_path / str(seed - 2))
    model = PeftModel.from_pretrained(build("gqa"), tmp_path / "0" / "own", adapter_name="0").eval()
    model.load_adapter(tmp_path / "1" / "own", "1")
    for name, want in wanted.items():
        model.set_adapter(name)
        assert torch.equal(logits(model, **inputs_for("gqa")), want)
    with pytest.raises(ValueError, match=r"'1' is the name of an adapter and a part of the name of .*layers\.1\."):
        model.save_pretrained(tmp_path / "both")
    model.delete_adapter("1")
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(build("gqa"), tmp_path / "both" / "0")
    assert torch.equal(logits(again, **inputs_for("gqa")), wanted["0"])


def test_layers_that_get_their_first_adapter_while_adapters_are_disabled() -> None:
    inputs, bare = inputs_for("gqa"), logits(build("gqa"), **inputs_for("gqa"))
    model = adapted("gqa", layers_to_transform=[0])
    with model.disable_adapter():
        torch.manual_seed(2)
        model.add_adapter("b", config())
        model.set_adapter("b")
        assert torch.equal(logits(model, **inputs), bare)
    assert not torch.equal(logits(model, **inputs), bare)


@pytest.mark.parametrize(("first", "second"), [("0", "new"), ("old", "0"), ("old", "model"), ("old", "self_attn")])
def test_adapters_that_could_not_be_saved_are_not_trained(first: str, second: str) -> None:
    model = adapted("gqa", name=first)
    with unchanged(model), pytest.raises(ValueError, match="is the name of an adapter and a part of the name of"):
        model.add_adapter(second, config())


def test_several_active_adapters_are_the_union_of_their_pairs(kind: str) -> None:
    model = adapted(kind, name="a")
    torch.manual_seed(2)
    model.add_adapter("b", config(n=2))
    model.base_model.set_adapter(["a", "b"])
    got = logits(model, **inputs_for(kind))
    # One adapter that holds both sets of pairs, learned whole.
    both = get_peft_model(build(kind), config(n=5, factorize_keys=False, factorize_values=False)).eval()
    for mine, theirs in zip(hificl_layers(both), hificl_layers(model), strict=True):
        mine.hificl_K["default"].weight.data = pairs_for(theirs, 2).keys[0]
        mine.hificl_V["default"].weight.data = pairs_for(theirs, 2).values[0]
    torch.testing.assert_close(got, logits(both, **inputs_for(kind)), rtol=1e-4, atol=1e-5)


def test_adapters_that_disagree_about_alpha_cannot_be_active_together() -> None:
    model = adapted("gqa", name="a")
    model.add_adapter("b", config(scale_self_attention=False))
    before = logits(model, **inputs_for("gqa"))
    with pytest.raises(ValueError, match="scale_self_attention"):
        model.base_model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"] and torch.equal(logits(model, **inputs_for("gqa")), before)


def test_a_layer_refuses_a_union_by_itself() -> None:
    """Whoever switches its adapters: PEFT's utilities and transformers reach it without passing by the model."""
    model = adapted("gqa", name="a")
    model.add_adapter("b", config(scale_self_attention=False))
    model.add_adapter("c", config())
    layer = hificl_layers(model)[0]
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=r"disagree about scale_self_attention: \{'a': True, 'b': False\}"):
        layer.set_adapter(["a", "b"])
    assert layer.active_adapters == ["a"]
    assert trainable == {name for name, p in layer.named_parameters() if p.requires_grad} != set()
    for together in (["a", "c"], ["b"], "b", ["b", "of another layer"]):
        layer.set_adapter(together)
    injected = inject_adapter_in_model(config(), build("gqa"), "a")
    inject_adapter_in_model(config(scale_self_attention=False), injected, "b")
    before = logits(injected, **inputs_for("gqa"))
    with pytest.raises(ValueError, match="scale_self_attention"):
        peft.functional.set_adapter(injected, ["a", "b"])
    assert torch.equal(logits(injected, **inputs_for("gqa")), before)


def test_parameters_reset_to_the_papers_start() -> None:
    for layer in hificl_layers(adapted("gqa")):
        layer.reset_parameters("default")
        assert not layer.hificl_V_B["default"].weight.any() and layer.hificl_K_B["default"].weight.std() < 0.02
    for layer in hificl_layers(adapted("gqa", init_weights=True, factorize_keys=False, factorize_values=False)):
        assert not layer.hificl_V["default"].weight.any() and layer.hificl_K["default"].weight.std() < 0.02


def test_inference_mode_asks_for_no_gradient(tmp_path: Path) -> None:
    def trained(model: nn.Module) -> set[str]:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return {re.search(r"hificl_\w+\.(\w+)", name).group(1) for name in names}

    model = get_peft_model(build("gqa"), config(inference_mode=True), adapter_name="a")
    assert trained(model) == set()
    layer = hificl_layers(model)[0]
    layer.update_layer("b", config(inference_mode=True), torch.device("cpu"), torch.float32)
    assert trained(layer) == set()
    layer.set_adapter("b", inference_mode=True)
    assert trained(layer) == set()
    layer.set_adapter("b")
    assert trained(layer) == {"b"}
    model = adapted("gqa", name="a")
    model.save_pretrained(tmp_path)
    model.add_adapter("b", config())
    assert trained(model) == {"a"}
    for names, mode, expected in (
        ("b", False, {"b"}),
        ("b", True, set()),
        (["a", "b"], True, set()),
        (["a", "b"], False, {"a", "b"}),
    ):
        model.base_model.set_adapter(names, inference_mode=mode)
        assert trained(model) == expected
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(build("gqa"), tmp_path / "a", adapter_name="a", is_trainable=trainable)
        assert trained(loaded) == ({"a"} if trainable else set())


def test_a_refused_union_switches_nothing() -> None:
    model = adapted("gqa", name="a")
    model.add_adapter("b", config(scale_self_attention=False, layers_to_transform=[1]))  # they meet in layer 1 alone
    model.add_adapter("c", config())
    model.set_adapter("c")
    before = logits(model, **inputs_for("gqa"))
    with pytest.raises(ValueError, match="scale_self_attention"):
        model.base_model.set_adapter(["a", "b"])
    assert [layer.active_adapters for layer in hificl_layers(model)] == [["c"], ["c"]]
    assert torch.equal(logits(model, **inputs_for("gqa")), before)


def test_a_second_adapter_leaves_the_first_ones_requires_grad_alone() -> None:
    model = adapted("gqa", name="a")
    model.add_adapter("b", config())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".a." in name for name in trainable)


def test_unload_restores_the_base_model(kind: str) -> None:
    base = build(kind)
    configs = {name: m.config for name, m in base.named_modules() if hasattr(m, "config")}
    classes = {name: type(m) for name, m in base.named_modules()}
    keys, want = list(base.state_dict()), logits(base, **inputs_for(kind))
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in base.modules()
    ]  # transformers' own, since the first forward
    model = get_peft_model(base, config(modules_to_save=["lm_head"]))
    got = model.unload()
    assert got is base and list(got.state_dict()) == keys and not hasattr(got, "peft_config")
    assert {name: type(m) for name, m in got.named_modules()} == classes
    assert all(m.config is configs[name] for name, m in got.named_modules() if name in configs)
    assert torch.equal(logits(got, **inputs_for(kind)), want)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in got.modules()] == hooks


@pytest.mark.parametrize("extra", [{"trainable_token_indices": [1, 2]}, {"modules_to_save": ["mlp"]}], ids=str)
def test_unload_with_pefts_own_wrappers(extra: dict[str, object]) -> None:
    base = build("gqa")
    keys, want = list(base.state_dict()), logits(base, **inputs_for("gqa"))
    got = get_peft_model(base, config(**extra)).unload()
    assert list(got.state_dict()) == keys and torch.equal(logits(got, **inputs_for("gqa")), want)


def test_merging_is_refused_in_one_sentence(kind: str) -> None:
    model = adapted(kind)
    want = logits(model, **inputs_for(kind))
    for call in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(NotImplementedError, match=r"cannot be merged.*unload"):
            call()
    assert torch.equal(logits(model, **inputs_for(kind)), want)


def test_base_state_dict_keys_never_change(kind: str) -> None:
    base = build(kind)
    keys = set(base.state_dict())
    get_peft_model(base, config())
    assert {key for key in base.state_dict() if "hificl_" not in key} == keys


# -- transformers' own integration -----------------------------------------------------------------------------------


def test_transformers_add_set_disable_delete(kind: str) -> None:
    model, inputs = build(kind), inputs_for(kind)
    bare = logits(model, **inputs)
    outputs = {}
    for seed, name in ((1, "a"), (2, "b")):
        torch.manual_seed(seed)
        model.add_adapter(config(), name)
        outputs[name] = logits(model, **inputs)
    assert len({bare.sum().item(), *(o.sum().item() for o in outputs.values())}) == 3
    model.set_adapter("a")
    assert torch.equal(logits(model, **inputs), outputs["a"])
    model.disable_adapters()
    assert torch.equal(logits(model, **inputs), bare)
    model.enable_adapters()
    assert torch.equal(logits(model, **inputs), outputs["a"])
    model.delete_adapter("a")
    model.set_adapter("b")
    assert torch.equal(logits(model, **inputs), outputs["b"])


def test_transformers_loads_what_peft_saved_and_back(kind: str, tmp_path: Path) -> None:
    saved = adapted(kind)
    want = logits(saved, **inputs_for(kind))
    saved.save_pretrained(tmp_path / "peft")
    model = build(kind)
    model.load_adapter(tmp_path / "peft")
    assert torch.equal(logits(model, **inputs_for(kind)), want)
    model.save_pretrained(tmp_path / "transformers")
    again = PeftModel.from_pretrained(build(kind), tmp_path / "transformers")
    assert torch.equal(logits(again, **inputs_for(kind)), want)


def test_injection_and_state_dicts(kind: str) -> None:
    inputs = inputs_for(kind)
    torch.manual_seed(1)
    one = inject_adapter_in_model(config(), build(kind), "x")
    want, state = logits(one, **inputs), get_peft_model_state_dict(one, adapter_name="x")
    two = inject_adapter_in_model(config(), build(kind), "y")
    assert not set_peft_model_state_dict(two, state, adapter_name="y").unexpected_keys
    assert torch.equal(logits(two, **inputs), want)
    # Injection that takes its targets from the keys of a state dict.
    three = inject_adapter_in_model(config(), build(kind), "z", state_dict=state, low_cpu_mem_usage=True)
    set_peft_model_state_dict(three, state, adapter_name="z", low_cpu_mem_usage=True)
    assert torch.equal(logits(three, **inputs), want)


def test_state_dicts_load_through_fsdps_wrapper() -> None:
    """FSDP puts a module of this name around the model, which PEFT looks through."""
    state = get_peft_model_state_dict(adapted("gqa", seed=2))
    model = adapted("gqa", seed=1)
    wrapper = nn.Module()
    wrapper.add_module("_fsdp_wrapped_module", model)
    wrapper.peft_config = model.peft_config
    for name in ("state_dict", "load_state_dict", "named_parameters"):  # in FSDP's the wrapper does not show
        setattr(wrapper, name, getattr(model, name))
    with pytest.raises(ValueError, match="lacks"):
        set_peft_model_state_dict(wrapper, dict(list(state.items())[1:]))
    set_peft_model_state_dict(wrapper, state)
    assert torch.equal(logits(model, **inputs_for("gqa")), logits(adapted("gqa", seed=2), **inputs_for("gqa")))


def test_weights_are_replaced_in_place(tmp_path: Path) -> None:
    adapted("gqa", seed=2).save_pretrained(tmp_path)
    model = adapted("gqa", seed=1)
    parameters = {name: p for name, p in model.named_parameters() if "hificl_" in name}
    set_peft_model_state_dict(model, load_peft_weights(tmp_path, device="cpu"))
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert torch.equal(logits(model, **inputs_for("gqa")), logits(adapted("gqa", seed=2), **inputs_for("gqa")))


@pytest.mark.parametrize(
    ("covers", "active", "want"),
    [
        ({"a": [0, 1], "b": [0], "c": [1]}, ["a"], ["b"]),
        ({"a": [1], "b": [0], "c": [1]}, ["a"], ["b"]),
        ({"a": [0], "c": [1], "b": [0, 1]}, ["a"], ["b"]),
        ({"a": [0, 1], "b": [0], "c": [1]}, ["a", "c"], ["c"]),
        ({"a": [0, 1], "b": [0], "c": [1]}, ["b"], ["b"]),  # another than the one that is deleted
        ({"a": [0]}, ["a"], []),
    ],
    ids=str,
)
def test_deleting_an_active_adapter(covers: dict[str, list[int]], active: list[str], want: list[str]) -> None:
    """Every layer has the same active adapters afterwards, whatever adapters it has itself."""

    def make(names: list[str]) -> PeftModel:
        model = None
        for seed, (name, layers) in enumerate(covers.items()):
            torch.manual_seed(seed)
            cfg = config(target_modules=[f"layers.{i}.self_attn" for i in layers])
            if model is None:
                model = get_peft_model(build("gqa"), cfg, adapter_name=name).eval()
            else:
                model.add_adapter(name, cfg)
        model.base_model.set_adapter(names)
        return model

    model, inputs = make(active), inputs_for("gqa")
    model.delete_adapter("a")
    assert model.active_adapters == want
    assert all(layer.active_adapters == want for layer in hificl_layers(model))
    other = make(want).base_model.model if want else build("gqa")
    assert torch.equal(logits(model.base_model.model, **inputs), logits(other, **inputs))


# -- beside other adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["lora-first", "hificl-first"])
def test_lora_beside_hificl_in_either_order(kind: str, order: str, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=r".*language_model.*q_proj|model\.layers.*q_proj", init_lora_weights=False)
    alone = build(kind)
    alone.add_adapter(lora, "lora")
    keys = set(alone.get_adapter_state_dict("lora"))
    assert keys
    model, inputs = build(kind), inputs_for(kind)
    torch.manual_seed(1)
    for name in ("lora", "hificl") if order == "lora-first" else ("hificl", "lora"):
        model.add_adapter(lora if name == "lora" else config(), name)
    assert set(model.get_adapter_state_dict("lora")) == keys  # none lost, none renamed
    outputs = []
    for active in ("lora", "hificl", ["lora", "hificl"]):
        model.set_adapter(active)
        outputs.append(logits(model, **inputs))
    assert len({o.sum().item() for o in outputs}) == 3
    hificl_alone = build(kind)
    inject_adapter_in_model(config(), hificl_alone, "hificl")
    set_peft_model_state_dict(hificl_alone, model.get_adapter_state_dict("hificl"), adapter_name="hificl")
    torch.testing.assert_close(logits(hificl_alone, **inputs), outputs[1], rtol=1e-5, atol=1e-5)


def test_trainable_tokens_and_excluded_layers(tmp_path: Path) -> None:
    model = adapted("gqa", trainable_token_indices=[7, 9], exclude_modules=["layers.0.self_attn"])
    assert model.targeted_module_names == ["model.layers.1.self_attn"]
    train(model, "gqa")
    want = logits(model, **inputs_for("gqa"))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(build("gqa"), tmp_path), **inputs_for("gqa")), want, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ({"target_modules": ["self_attn"]}, [0, 1]),
        ({"target_modules": r".*layers\.1\.self_attn"}, [1]),
        ({"target_modules": ["model.layers.0.self_attn"]}, [0]),
        ({"target_modules": ["self_attn"], "layers_to_transform": 1}, [1]),
        ({"layers_to_transform": [0]}, [0]),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, [1]),
        ({"exclude_modules": r".*layers\.1\..*"}, [0]),
    ],
    ids=["names", "regex", "full-name", "names+layers", "default+layers", "default+pattern", "default+exclude"],
)
def test_forms_of_targets(choice: dict[str, object], layers: list[int], tmp_path: Path) -> None:
    model = adapted("gqa", **choice)
    names = [f"model.layers.{i}.self_attn" for i in layers]
    assert model.targeted_module_names == names
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(build("gqa"), tmp_path).targeted_module_names == names


# -- copies ----------------------------------------------------------------------------------------------------------


def test_copies_are_independent(kind: str) -> None:
    model, inputs = adapted(kind), inputs_for(kind)
    pickled = pickle.dumps(model)  # before its first forward, after which transformers' own hooks cannot be pickled
    want = logits(model, **inputs)
    name = model.targeted_module_names[0]
    for clone in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(logits(clone, **inputs), want)
        for layer in hificl_layers(clone):
            layer.hificl_V_B["default"].weight.data.zero_()
        mine, its = (m.get_base_model().get_submodule(name).virtual_pairs for m in (model, clone))
        assert mine.base_config is not its.base_config
        clone.base_model.model.set_attn_implementation("eager")
        assert not torch.equal(logits(clone, **inputs), want)
        assert torch.equal(logits(model, **inputs), want)
        assert model.config._attn_implementation == "sdpa"


def test_two_models_sharing_one_config_object() -> None:
    one = build("gqa")
    two = type(one)(one.config).eval()
    two.load_state_dict(one.state_dict())
    assert one.config is two.config
    inputs = inputs_for("gqa")
    bare = logits(two, **inputs)
    adapted_one = get_peft_model(one, config())
    assert torch.equal(logits(two, **inputs), bare)
    adapted_two = get_peft_model(two, config())
    assert not torch.equal(logits(adapted_one, **inputs), logits(adapted_two, **inputs))
    adapted_one.unload()
    assert torch.equal(logits(one, **inputs), bare)
    assert not torch.equal(logits(adapted_two, **inputs), bare)


# -- what no other test would notice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [True, False], ids=["float32-adapter", "bfloat16-adapter"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "first-frozen"])
def test_a_second_adapter_on_a_bf16_base_waits_without_gradients(frozen: bool, autocast: bool) -> None:
    """PEFT casts it to float32 when it has been attached."""
    base = build("gqa").to(torch.bfloat16)
    first = config(inference_mode=frozen)
    model = get_peft_model(base, first, adapter_name="a", autocast_adapter_dtype=autocast)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {value for name, value in before.items() if "hificl_" in name} == {not frozen}
    model.add_adapter("b", config(), autocast_adapter_dtype=autocast)
    after = dict(model.named_parameters())
    assert {name: after[name].requires_grad for name in before} == before
    second = [after[name] for name in after.keys() - before.keys()]
    assert len(second) == 2 * 4 and not any(p.requires_grad for p in second)
    assert {p.dtype for p in second} == {torch.float32 if autocast else torch.bfloat16}


def test_a_layer_tells_what_it_is() -> None:
    layer = HiFICLLayer(build("gqa").config, HeadShape(4, 16, 8, 2))
    layer.update_layer("a", config(), torch.device("cpu"), torch.bfloat16)
    layer.update_layer("b", config(n=5), torch.device("meta"), torch.float64)
    assert "heads=4, key/value heads=2, key_dim=16, value_dim=8, n={'a': 3, 'b': 5}, r={'a': 2, 'b': 2}" in repr(layer)
    assert (layer.in_features, layer.out_features) == (64, 32)
    assert layer.weight is None and layer.bias is None  # it wraps nothing that has them
    for name, place in (("a", ("cpu", torch.bfloat16)), ("b", ("meta", torch.float64))):
        assert {(p.device.type, p.dtype) for key, p in layer.named_parameters() if f".{name}." in key} == {place}
    for call in (layer.merge, layer.unmerge):
        with pytest.raises(NotImplementedError, match=r"cannot be merged.*keep the adapter attached\.$"):
            call()


def test_what_pefts_helpers_ask_of_a_layer() -> None:
    model, inputs = adapted("gqa", name="a"), inputs_for("gqa")
    model.add_adapter("b", config())
    want = logits(model, **inputs)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["a"], [])
    assert status.requires_grad == {"a": True, "b": False} and status.available_adapters == ["a", "b"]
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model, **inputs), want)
        assert not any(layer.cast_input_dtype_enabled for layer in hificl_layers(model))
    assert all(layer.cast_input_dtype_enabled for layer in hificl_layers(model))


def test_pairs_are_multiplied_out_in_their_own_dtype_under_autocast() -> None:
    for layer in hificl_layers(adapted("gqa")):
        want = pairs_for(layer)
        with torch.autocast("cpu", torch.bfloat16):
            got = pairs_for(layer)
        assert torch.equal(got.keys, want.keys) and torch.equal(got.values, want.values)
        assert got.keys.dtype == torch.float32


class OfMine(tf.LlamaForCausalLM):
    pass


def test_a_configuration_names_the_class_of_a_base_model_of_transformers(tmp_path: Path) -> None:
    """As PEFT does for an adapter without a task type; a class that cannot be imported by others is not named."""
    base = build("gqa")
    of_mine = OfMine(base.config)
    for model, want in (
        (base, {"base_model_class": "LlamaForCausalLM", "parent_library": type(base).__module__}),
        (of_mine, None),
    ):
        inject_adapter_in_model(cfg := config(), model)
        cfg.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"] == want


def test_an_error_leaves_no_configuration_on_the_base_model() -> None:
    base = build("gqa")
    with pytest.raises(ValueError, match="not found in the base model|no modules|excluded"):
        get_peft_model(base, config(target_modules=["nothing"]))
    assert not hasattr(base, "peft_config")


def test_a_state_dict_says_what_is_adapted() -> None:
    """As PEFT has it: its keys, not the configuration, name the attentions."""
    state = get_peft_model_state_dict(inject_adapter_in_model(config(), build("gqa")))
    first = {key: tensor for key, tensor in state.items() if "layers.0." in key}
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        model = inject_adapter_in_model(config(), build("gqa"), state_dict=first)
    assert [name for name, module in model.named_modules() if isinstance(module, HiFICLLayer)] == [
        "model.layers.0.self_attn.virtual_pairs"
    ]


def test_adapters_that_are_set_together_are_trained_together() -> None:
    model = adapted("gqa", name="a")
    model.add_adapter("b", config())
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".b." in name)
    model.base_model.set_adapter(["a", "b"])
    assert all(p.requires_grad for name, p in model.named_parameters() if "hificl_" in name)
