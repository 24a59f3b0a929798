"""Wrong input: an error that names what, found, expected and the remedy; the model stays as it was."""

from __future__ import annotations

import json
import random
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
    PeftModelForSequenceClassification,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_hificl import HiFICLConfig, HiFICLLayer, checkpoint
from peft_hificl.names import HeadShape

from .helpers import VOCAB, adapted, build, config, hificl_layers, inputs_for, llama, logits, unchanged

# -- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n", "r"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), ("8", TypeError), (True, TypeError)]
)
def test_numbers(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"HiFICLConfig\.{name} must be .*at least 1, found {value!r}"):
        HiFICLConfig(**{name: value})


@pytest.mark.parametrize(
    "field",
    [
        "init_weights", "factorize_keys", "factorize_values", "scale_self_attention", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices",
    ],
)  # fmt: skip
def test_fields_of_the_wrong_type(field: str) -> None:
    with pytest.raises(TypeError, match=rf"HiFICLConfig\.{field} must be .*found 1.5"):
        HiFICLConfig(**{field: 1.5})


def test_a_pattern_without_indices() -> None:
    with pytest.raises(ValueError, match="layers_pattern='layers' needs layers_to_transform"):
        HiFICLConfig(layers_pattern="layers")


# -- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"target_modules": ["no_such_module"]}, "no_such_module.*not found"),
        ({"target_modules": ["mlp"]}, "'model.layers.0.mlp' of type LlamaMLP.*attention interface.*target_modules"),
        ({"target_modules": ["q_proj"]}, "'model.layers.0.self_attn.q_proj' of type Linear"),
        ({"target_modules": r".*layers\.1.*"}, "cannot adapt module 'model.layers.1'"),
        ({"target_modules": "all-linear"}, "'all-linear' means linear layers"),
        ({"target_modules": ["self_attn", "lm_head"]}, "'lm_head' of type Linear"),  # found wrong before any change
        ({"layers_to_transform": [7]}, "not found"),
        ({"exclude_modules": ["self_attn"]}, "excluded"),
    ],
)
@pytest.mark.parametrize("route", ["get_peft_model", "inject"])
def test_targets(choice: dict[str, object], message: str, route: str) -> None:
    base = build("gqa")
    attach = get_peft_model if route == "get_peft_model" else lambda model, cfg: inject_adapter_in_model(cfg, model)
    with unchanged(base), pytest.raises((ValueError, TypeError), match=message):
        attach(base, config(**choice))


def test_models_without_attention_that_dispatches() -> None:
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)).eval()
    with unchanged(bloom), pytest.raises(ValueError, match=r"BloomAttention does not .*attention interface"):
        get_peft_model(bloom, config())
    with unchanged(bloom), pytest.raises(TypeError, match=r"'transformer.h.0.self_attention' of type BloomAttention"):
        get_peft_model(bloom, config(target_modules=["self_attention"]))
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), config())


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda base: get_peft_model(base, config()), "PeftModel already.*add_adapter.*load_adapter"),
        (lambda base: get_peft_model(base, LoraConfig(target_modules=["q_proj"])), "PeftModel already"),
        (lambda base: get_peft_model(base, config()).base_model, "HiFICLModel already"),
        (torch.compile, "is compiled: attach the adapter first"),
    ],
    ids=["hificl", "lora", "tuner", "compiled"],
)
@pytest.mark.parametrize("targets", [None, ["self_attn"]])
def test_models_that_are_wrapped(
    wrap: Callable[[nn.Module], nn.Module], message: str, targets: list[str] | None, saved: Path
) -> None:
    model = wrap(build("gqa"))
    for attach in (get_peft_model, lambda model, cfg: inject_adapter_in_model(cfg, model, "b")):
        with unchanged(model), pytest.raises(ValueError, match=message):
            attach(model, config(target_modules=targets))
    with unchanged(model), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, saved)


def test_beside_a_peft_model_of_another_method_as_the_message_says() -> None:
    model = get_peft_model(build("gqa"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    base, lora = model.get_base_model(), logits(model, **inputs_for("gqa"))
    torch.manual_seed(1)
    base.add_adapter(config(), "pairs")
    hificl = logits(base, **inputs_for("gqa"))
    torch.testing.assert_close(hificl, logits(adapted("gqa"), **inputs_for("gqa")))
    base.set_adapter("default")
    assert torch.equal(logits(model, **inputs_for("gqa")), lora)


def test_a_model_that_prepare_pippy_has_traced() -> None:
    base = build("gqa")
    base.pippy_stage = object()
    with unchanged(base), pytest.raises(ValueError, match="prepare_pippy.*attach or load the adapter first"):
        get_peft_model(base, config())


def test_attention_that_depends_on_the_implementations_name_is_refused() -> None:
    """It would leave out its sparse mask if it saw a name that it does not know."""
    modeling = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    from peft_hificl.support import dispatch_of

    with pytest.raises(TypeError, match="depending on the attention implementation's name"):
        dispatch_of(modeling.DeepseekV32Attention)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "virtual_pairs", "weight", "__base__"])
def test_adapter_names_that_cannot_be(name: str) -> None:
    base = build("gqa")
    with unchanged(base), pytest.raises(ValueError, match=f"cannot be named '{name}'"):
        get_peft_model(base, config(), adapter_name=name)


def test_adapter_names_that_are_taken() -> None:
    model = adapted("gqa", name="a")
    with unchanged(model), pytest.raises(ValueError, match="'a' already exists"):
        model.add_adapter("a", config())
    base = model.get_base_model()
    with unchanged(base), pytest.raises(ValueError, match="'a' is already attached to 'model.layers.0.self_attn'"):
        inject_adapter_in_model(config(), base, "a")


def test_a_tensor_parallel_model_of_another_kind_is_refused() -> None:
    """Older versions of transformers keep plain tensors; those of today are in integration/tensor_parallel.py."""
    base = build("gqa")
    base._tp_size = 2
    with unchanged(base), pytest.raises(ValueError, match=r"tensor parallelism.*'model.layers.0.self_attn' are no DT"):
        get_peft_model(base, config())


def test_an_adapter_on_another_device() -> None:
    model = adapted("gqa")
    hificl_layers(model)[1].to("meta")
    with pytest.raises(
        ValueError, match=r"LlamaAttention runs on cpu, but its HiFICL adapter is on meta: it was never"
    ):
        model(**inputs_for("gqa"))


def test_heads_that_differ_at_run_time() -> None:
    model = adapted("gqa")
    hificl_layers(model)[0].head_shape = HeadShape(8, 16, 16, groups=2)
    with pytest.raises(ValueError, match=r"heads=4, .*was made for HeadShape\(heads=8, "):
        model(**inputs_for("gqa"))


# -- stored adapters -------------------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]


def drop_one(tensors: Tensors) -> None:
    del tensors[next(k for k in tensors if "V_B" in k)]


def drop_a_layer(tensors: Tensors) -> None:
    for key in [k for k in tensors if ".layers.1." in k]:
        del tensors[key]


def drop_all(tensors: Tensors) -> None:
    tensors.clear()
    tensors["base_model.model.something"] = torch.zeros(1)


def add_one(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.0.self_attn.virtual_pairs.hificl_K"] = torch.zeros(4, 3, 16)


def add_a_layer(tensors: Tensors) -> None:
    tensors |= {k.replace(".layers.1.", ".layers.2."): v.clone() for k, v in tensors.items() if ".layers.1." in k}


def transpose(tensors: Tensors) -> None:
    key = next(k for k in tensors if "K_A" in k)
    tensors[key] = tensors[key].mT.contiguous()


def flatten(tensors: Tensors) -> None:
    key = next(k for k in tensors if "K_B" in k)
    tensors[key] = tensors[key].flatten()


def scalar(tensors: Tensors) -> None:
    tensors[next(k for k in tensors if "V_B" in k)] = torch.tensor(1.0)


def not_a_number(tensors: Tensors) -> None:
    next(v for k, v in tensors.items() if "V_A" in k)[0, 0, 0] = float("nan")


def infinite(tensors: Tensors) -> None:
    next(v for k, v in tensors.items() if "K_B" in k)[0, 0, 0] = float("inf")


def integers(tensors: Tensors) -> None:
    key = next(k for k in tensors if "K_A" in k)
    tensors[key] = tensors[key].int()


def too_large(tensors: Tensors) -> None:
    key = next(k for k in tensors if "V_A" in k)
    tensors[key] = tensors[key].double()
    tensors[key][0, 1, 0] = 1e300


DAMAGES: dict[Callable[[Tensors], None], str] = {
    drop_one: r"lacks '\S*hificl_V_B",
    drop_a_layer: r"lacks '\S*model.layers.1.self_attn",
    drop_all: r"lacks",
    add_one: r"has unexpected '.*hificl_K'",
    add_a_layer: r"has unexpected '\S*model.layers.2.self_attn",
    transpose: r"hificl_K_A.* has shape \(4, 2, 3\).*\(4, 3, 2\)",
    flatten: r"hificl_K_B.* has shape \(128,\)",
    scalar: r"hificl_V_B.* has shape \(\)",
    not_a_number: r"hificl_V_A\S* holds values that are not finite.*earlier checkpoint",
    infinite: r"hificl_K_B\S* holds values that are not finite",
    integers: r"hificl_K_A\S* holds values that are not finite numbers \(dtype torch.int32\)",
    too_large: r"hificl_V_A\S* \(torch.float64\) holds 1e\+300, which the parameter's torch.float32 cannot hold",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    base = build("gqa")
    base.save_pretrained(folder / "base")
    model = get_peft_model(llama().from_pretrained(folder / "base"), config(task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    return folder


def copy_of(saved: Path, folder: Path) -> Path:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(saved / name, folder / name)
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    "route", ["from_pretrained", "config", "load_adapter", "auto", "transformers", "set_state_dict"]
)
def test_files_that_do_not_fit(damage: Callable[[Tensors], None], route: str, saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if route == "auto":
        with pytest.raises(ValueError, match=DAMAGES[damage]):
            AutoPeftModelForCausalLM.from_pretrained(folder)
        return
    model = adapted("gqa", name="a") if route in ("load_adapter", "set_state_dict") else build("gqa")
    with unchanged(model), pytest.raises(ValueError, match=DAMAGES[damage]):
        if route == "from_pretrained":
            PeftModel.from_pretrained(model, folder)
        elif route == "config":
            PeftModel.from_pretrained(model, folder, config=config())
        elif route == "transformers":
            model.load_adapter(folder)
        elif route == "load_adapter":
            model.load_adapter(folder, "b")
        else:
            set_peft_model_state_dict(model, tensors, adapter_name="a")


OTHER_BASES = {
    "heads": (
        lambda: llama_like(num_attention_heads=8),
        r"hificl_K_A.* has shape \(4, 3, 2\).*LlamaForCausalLM has \(8, 3, 2\)",
    ),
    "head-dim": (lambda: llama_like(head_dim=8), r"hificl_K_B.* has shape \(4, 2, 16\).* has \(4, 2, 8\)"),
    "more-layers": (lambda: llama_like(num_hidden_layers=3), r"lacks 'model.layers.2.self_attn"),
    "fewer-layers": (lambda: llama_like(num_hidden_layers=1), r"has unexpected 'model.layers.1.self_attn"),
    "another-family": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_head=4, n_layer=2)),
        r"not found in the base model",
    ),
}


def llama_like(**kwargs: int) -> tf.PreTrainedModel:
    fields = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, **kwargs}
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(**{"vocab_size": VOCAB, "intermediate_size": 32, "num_hidden_layers": 2, **fields})
    )


@pytest.mark.parametrize("case", OTHER_BASES)
def test_the_wrong_base_model(case: str, saved: Path) -> None:
    make, message = OTHER_BASES[case]
    for load in (PeftModel.from_pretrained, lambda model, folder: model.load_adapter(folder)):
        base = make().eval()
        with unchanged(base), pytest.raises(ValueError, match=message):
            load(base, saved)


def with_a_head(folder: Path, **kwargs: object) -> Path:
    model = adapted("gqa", modules_to_save=["lm_head"], **kwargs)
    model.save_pretrained(folder)
    return folder


HEAD = "base_model.model.lm_head.weight"
TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
OTHER_DAMAGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop(HEAD), r"lacks 'lm_head.weight'"),
    "misshapen": (lambda t: t.update({HEAD: t[HEAD][:7]}), r"'lm_head.weight'.*\(7, 32\).*\(99, 32\)"),
    "nan": (lambda t: t[HEAD].fill_(float("nan")), "lm_head.weight' holds values that are not finite"),
    "foreign": (lambda t: t.update({"base_model.model.nose": torch.zeros(3)}), "unexpected 'nose'"),
    "tokens": (
        lambda t: t.update({TOKENS: t[TOKENS][:1]}),
        r"trainable_tokens_delta'.* has shape \(1, 32\).* has \(2, 32\)",
    ),
    "overflow": (lambda t: t.update({HEAD: t[HEAD].double() * 1e300}), r"lm_head\S* \(torch.float64\) holds .*e\+29"),
}


@pytest.mark.parametrize("route", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize("damage", OTHER_DAMAGES)
def test_other_tensors_that_do_not_fit(damage: str, route: str, tmp_path: Path) -> None:
    """Whole modules and trained tokens, saved beside the pairs."""
    with_a_head(tmp_path, trainable_token_indices=[7, 9])
    intact = PeftModel.from_pretrained(build("gqa"), tmp_path)
    intact.load_adapter(tmp_path, "again")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    damage_file, message = OTHER_DAMAGES[damage]
    damage_file(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = build("gqa") if route == "from_pretrained" else adapted("gqa", name="a", modules_to_save=["lm_head"])
    with unchanged(model), pytest.raises(ValueError, match=message):
        if route == "from_pretrained":
            PeftModel.from_pretrained(model, tmp_path)
        else:
            model.load_adapter(tmp_path, "b")


def test_embeddings_saved_after_the_vocabulary_grew(tmp_path: Path) -> None:
    base = build("gqa")
    base.resize_token_embeddings(VOCAB + 8)
    model = get_peft_model(base, config()).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    grown = build("gqa")
    with unchanged(grown), pytest.raises(ValueError, match="resize_token_embeddings"):
        PeftModel.from_pretrained(grown, tmp_path)
    grown.resize_token_embeddings(VOCAB + 8)
    loaded = PeftModel.from_pretrained(grown, tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, base.get_input_embeddings().weight)


@pytest.mark.parametrize("save_embedding_layers", [False, True])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "extra",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["mlp"]},
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        {"trainable_token_indices": [1, 2], "modules_to_save": ["mlp"]},
    ],
    ids=str,
)
def test_what_peft_saves_beside_the_pairs_loads(
    extra: dict[str, object], tied: bool, save_embedding_layers: bool, tmp_path: Path
) -> None:
    """No file that PEFT writes is refused, whatever it adds to it."""
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=tied).eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(**extra)).eval()
    want = logits(model, **inputs_for("gqa"))
    model.save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
    for name in ("default", "second"):
        if name == "default":
            loaded = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path)
        else:
            loaded.load_adapter(tmp_path, name)
            loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval(), **inputs_for("gqa")), want)


def test_heads_of_another_size_are_ignored_when_asked(tmp_path: Path) -> None:
    def base(labels: int) -> tf.PreTrainedModel:
        torch.manual_seed(0)
        return tf.LlamaForSequenceClassification(
            tf.LlamaConfig(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                num_labels=labels, pad_token_id=0,
            )
        )  # fmt: skip

    get_peft_model(base(3), config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score.weight.*ignore_mismatched_sizes"):
        PeftModel.from_pretrained(base(5), tmp_path)
    with pytest.warns(UserWarning, match="score"):
        model = PeftModel.from_pretrained(base(5), tmp_path, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match=r"score.weight.*ignore_mismatched_sizes"):
        model.load_adapter(tmp_path, "b")
    with pytest.warns(UserWarning, match="score"):
        model.load_adapter(tmp_path, "b", ignore_mismatched_sizes=True)
    assert PeftModelForSequenceClassification(base(3), config()).modules_to_save


def test_a_module_to_save_that_the_model_lacks() -> None:
    base = build("gqa")
    with (
        unchanged(base),
        pytest.raises(ValueError, match="modules_to_save names 'nope', not found in Llama"),
    ):
        get_peft_model(base, config(modules_to_save=["lm_head", "nope"]))


def test_a_module_to_save_that_holds_another_adapter() -> None:
    model = adapted("gqa", name="a")
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"modules_to_save names .*layers\.0', which holds an adapter"),
    ):
        model.add_adapter("b", config(modules_to_save=["layers.0"]))
    alone = get_peft_model(build("gqa"), config(modules_to_save=["layers.0"]))  # layer 1 gets pairs
    assert len(hificl_layers(alone)) == 1


@pytest.mark.parametrize("head", ["classifier", "score", "qa_outputs"])
def test_heads_that_peft_names_on_its_own_may_be_lacking(head: str, tmp_path: Path) -> None:
    """PEFT puts them into the configuration for its task types; a model without them takes it as LoRA's does."""
    cfg = config(modules_to_save=[head])
    model = get_peft_model(build("gqa"), cfg).eval()
    assert not any(head in name for name, _ in model.named_modules())
    model.save_pretrained(tmp_path)
    lora = get_peft_model(build("gqa"), LoraConfig(target_modules=["q_proj"], modules_to_save=[head]))
    assert not any(head in name for name, _ in lora.named_modules())
    with unchanged(base := build("gqa")), pytest.raises(ValueError, match=f"names '{head}_'"):
        get_peft_model(base, config(modules_to_save=[head, f"{head}_"]))


def test_trained_tokens_of_a_layer_that_the_model_lacks() -> None:
    base = build("gqa")
    with unchanged(base), pytest.raises(ValueError, match="trainable_token_indices names 'nope'.*LlamaForCausalLM"):
        get_peft_model(base, config(modules_to_save=["norm"], trainable_token_indices={"nope": [1]}))


@pytest.mark.parametrize("choice", [{"layers_to_transform": [7]}, {"exclude_modules": ["self_attn"]}, {"n": 4}])
def test_a_failed_attach_leaves_the_config_as_it_was(choice: dict[str, object]) -> None:
    cfg = config(**choice)
    with pytest.raises(ValueError):
        get_peft_model(build("gqa"), cfg, adapter_name="no.dots")
    assert cfg.target_modules is None


def with_a_hificl(**kwargs: object) -> nn.Module:
    model = build("gqa")
    model.add_adapter(config(**kwargs), "a")
    return model


ATTACH: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, HiFICLConfig], object]]] = {
    "get_peft_model": (lambda: build("gqa"), get_peft_model),
    "add_adapter": (
        lambda: adapted("gqa", name="a", modules_to_save=["lm_head"]),
        lambda model, cfg: model.add_adapter("b", cfg),
    ),
    "inject": (lambda: build("gqa"), lambda model, cfg: inject_adapter_in_model(cfg, model)),
    "inject-second": (
        lambda: with_a_hificl(modules_to_save=["lm_head"]),
        lambda model, cfg: inject_adapter_in_model(cfg, model, "b"),
    ),
    "transformers": (lambda: build("gqa"), lambda model, cfg: model.add_adapter(cfg)),
    "transformers-second": (with_a_hificl, lambda model, cfg: model.add_adapter(cfg, "b")),
}


def in_a_late_layer(what: Callable[..., object], error: type[BaseException]) -> Callable[..., object]:
    """The function, failing at every second call."""
    calls = 0

    def fails(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise error("half-way")
        return what(*args, **kwargs)

    return fails


@pytest.mark.parametrize("route", ATTACH)
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    ("owner", "place"),
    [(HiFICLLayer, "update_layer"), (HiFICLLayer, "reset_parameters"), (HiFICLConfig, "parameter_shapes")],
)
def test_an_error_half_way_takes_the_adapter_off_again(
    owner: type, place: str, error: type[BaseException], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first adapter, what was trainable, and whether one can try again, must survive it."""
    make, attach = ATTACH[route]
    model = make()
    next(m for n, m in model.named_modules() if n.endswith("mlp")).requires_grad_(False)
    layers = len(hificl_layers(model))
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, in_a_late_layer(getattr(owner, place), error))
        with unchanged(model), pytest.raises(error, match="half-way"):
            attach(model, config())
    assert len(hificl_layers(model)) == layers
    attach(model, config())
    assert all(layer.n for layer in hificl_layers(model)) and len(hificl_layers(model)) == 2


@pytest.mark.parametrize("route", ATTACH)
def test_an_error_of_pefts_after_the_attach(route: str) -> None:
    """PEFT finds that two settings contradict each other when it has wrapped a module already."""
    make, attach = ATTACH[route]
    model = make()
    with unchanged(model), pytest.raises(ValueError, match="already marked to be trained fully"):
        attach(model, config(modules_to_save=["embed_tokens"], trainable_token_indices={"embed_tokens": [1]}))
    attach(model, config())


def test_an_error_after_the_model_was_frozen_gives_its_gradients_back() -> None:
    """PEFT refuses such a module when all else is done; what required a gradient before requires it again."""
    fresh, model = build("gqa"), adapted("gqa", name="a")
    fresh.lm_head.requires_grad_(False)
    for base, attach in (
        (fresh, lambda cfg: get_peft_model(fresh, cfg)),
        (model.get_base_model(), lambda cfg: model.add_adapter("b", cfg)),
    ):
        base.extra = nn.ModuleList([nn.Linear(2, 2)])
        with unchanged(base), unchanged(model), pytest.raises(TypeError, match="cannot be applied to .*ModuleList"):
            attach(config(modules_to_save=["extra"]))
    assert fresh.get_input_embeddings().weight.requires_grad and not fresh.lm_head.weight.requires_grad
    assert all(p.requires_grad == (".a" in name) for name, p in model.named_parameters() if "hificl_" in name)


@pytest.mark.parametrize("route", ["from_pretrained", "load_adapter"])
def test_a_subfolder_is_where_the_files_are_checked(route: str, saved: Path, tmp_path: Path) -> None:
    """Beside it lies another adapter, which is whole and must not be read in its place."""
    copy_of(saved, tmp_path)
    within = tmp_path / "runs" / "best"
    within.mkdir(parents=True)
    want = adapted("gqa", seed=5, n=4)
    want.save_pretrained(within)
    options = {"subfolder": "runs/best"}
    assert HiFICLConfig.from_pretrained(tmp_path, **options).n == 4 != HiFICLConfig.from_pretrained(tmp_path).n
    loaded = PeftModel.from_pretrained(build("gqa"), tmp_path, **options)
    loaded.load_adapter(tmp_path, "again", **options)
    for name in ("default", "again"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, **inputs_for("gqa")), logits(want, **inputs_for("gqa")))
    (within / "adapter_model.safetensors").write_bytes(b"damaged")
    model = adapted("gqa", name="a") if route == "load_adapter" else build("gqa")

    def load() -> None:
        if route == "from_pretrained":
            PeftModel.from_pretrained(model, tmp_path, **options)
        else:
            model.load_adapter(tmp_path, "b", **options)

    with unchanged(model), pytest.raises(ValueError, match=r"runs/best' cannot be read"):
        load()
    tensors = load_file(saved / "adapter_model.safetensors")  # of n = 3
    save_file(tensors, within / "adapter_model.safetensors", metadata={"format": "pt"})
    with unchanged(model), pytest.raises(ValueError, match=r"adapter \(n=4, r=2, heads='query'\)"):
        load()


def test_n_and_r_that_are_not_the_files(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    stored = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**stored, "n": 10**12}))
    for load in (PeftModel.from_pretrained, lambda model, folder: model.load_adapter(folder)):
        base = build("gqa")
        with unchanged(base), pytest.raises(ValueError, match=r"this adapter \(n=1000000000000, r=2, heads='query'\)"):
            load(base, folder)


def test_a_partial_state_dict_changes_nothing() -> None:
    model = adapted("gqa")
    state = {key: torch.zeros_like(value) for key, value in get_peft_model_state_dict(model).items()}
    state.popitem()
    with unchanged(model), pytest.raises(ValueError, match="lacks"):
        set_peft_model_state_dict(model, state)


# -- fuzzing ---------------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    kind = rng.choice(["truncate", "flip", "zero", "insert", "remove", "header", "repeat", "empty"])
    at = rng.randrange(len(data))
    if kind == "truncate":
        del data[at:]
    elif kind == "flip":
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        data[at : at + rng.randint(1, 64)] = bytes(min(64, len(data) - at))
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randint(1, 16))
    elif kind == "remove":
        del data[at : at + rng.randint(1, 64)]
    elif kind == "header":
        data[rng.randrange(min(900, len(data)))] = rng.randrange(256)
    elif kind == "repeat":
        data += data[at:]
    else:
        data.clear()
    return bytes(data)


def mutate_json(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(text.encode(), rng)
    stored = json.loads(text)
    key = rng.choice(sorted(stored))
    values = [None, 0, -1, 3, 10**9, 1.5, "", "x", [], ["x"], {}, {"x": 1}, True, "HIFICL", "LORA", "CAUSAL_LM", [7, 9]]
    if rng.random() < 0.2:
        del stored[key]
    else:
        stored[key] = rng.choice(values)
    return json.dumps(stored).encode()


@pytest.mark.parametrize("part", range(10))
def test_fuzzed_files_never_leave_half_an_adapter(part: int, saved: Path, tmp_path: Path) -> None:
    """60 damaged copies per part: each loads whole, or fails with a message and leaves the base model as it was."""
    rng = random.Random(part)
    base = build("gqa")
    loaded = 0
    for case in range(60):
        folder = copy_of(saved, tmp_path)
        if rng.random() < 0.6:
            path = folder / "adapter_model.safetensors"
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        else:
            path = folder / "adapter_config.json"
            path.write_bytes(mutate_json(path.read_text(), rng))
        try:
            with unchanged(base):
                try:
                    model = PeftModel.from_pretrained(base, folder)
                except Exception as error:
                    assert str(error), f"case {case}: {type(error).__name__} without a message"
                    continue
                loaded += 1
                assert torch.isfinite(logits(model, **inputs_for("gqa"))).all(), f"case {case}"
                model.unload()
                base.requires_grad_(True)
        except AssertionError as error:
            raise AssertionError(f"part {part}, case {case}, {path.name}: {path.read_bytes()[:900]!r}") from error
    assert loaded < 50


# -- what no other test would notice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("factorize_keys", [True, False], ids=["", "whole-K"])
@pytest.mark.parametrize("factorize_values", [True, False], ids=["", "whole-V"])
def test_shapes_of_a_file_of_other_heads(factorize_keys: bool, factorize_values: bool, tmp_path: Path) -> None:
    cfg = config(factorize_keys=factorize_keys, factorize_values=factorize_values, target_modules=["self_attn"])
    shapes, here = cfg.parameter_shapes(4, 6, 5), cfg.parameter_shapes(4, 16, 16)
    tensors = {
        f"model.layers.{i}.self_attn.virtual_pairs.{n}": torch.zeros(s) for i in (0, 1) for n, s in shapes.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    cfg.save_pretrained(tmp_path)
    name = "hificl_K_B" if factorize_keys else "hificl_K"
    message = rf"{name}' of the adapter file has shape {shapes[name]}, but that of .* has {here[name]}: load it"
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        PeftModel.from_pretrained(build("gqa"), tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            r"The adapter file lacks 'lm_head.weight': its",
        ),
        (
            {"trainable_token_indices": [7, 9]},
            r"The adapter file lacks '\S*trainable_tokens_delta': its",
        ),
    ],
    ids=["modules_to_save", "trainable_token_indices"],
)
def test_a_file_that_lacks_all_of_what_the_configuration_promises(
    extra: dict[str, object], message: str, tmp_path: Path
) -> None:
    adapted("gqa", **extra).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    pairs = {key: tensor for key, tensor in tensors.items() if "hificl_" in key}
    assert len(pairs) < len(tensors)
    save_file(pairs, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(build("gqa"), tmp_path)


def test_whose_names_are_not_whose(tmp_path: Path) -> None:
    """The whole sentence."""
    model = with_a_head(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(key for key in tensors if "V_B" in key)
    without = {key: tensor for key, tensor in tensors.items() if key != first}
    layer = {key.replace(".layers.1.", ".layers.7."): tensor for key, tensor in tensors.items()}
    end = r" Use the files and the base model that belong together"
    whose = r"its tensors are not those of this adapter \(n=3, r=2, heads='query'\) on LlamaForCausalLM"
    for stored, message in (
        (without, rf"The adapter file lacks '\S*self_attn\S*hificl_V_B': {whose} \(9 expected, 8 found\)\.{end}"),
        (layer, r"The adapter file lacks '\S*layers.1\S*'.* and 1 more and has unexpected '\S*layers.7\S*'.* 1 more: "
         rf"{whose} \(9 expected, 9 found\)\.{end}"),
        ({key: tensor for key, tensor in tensors.items() if key != HEAD} | {"nose": torch.zeros(1)},
         rf"The adapter file lacks 'lm_head.weight' and has unexpected 'nose': {whose} \(9 expected, 9 found\)\.{end}"),
    ):  # fmt: skip
        save_file(stored, path)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(build("gqa"), tmp_path)
    model = adapted("gqa")
    state = get_peft_model_state_dict(model)
    del state[first]
    message = (
        r"The state dict lacks '\S*V_B\S*': its HiFICL tensors are not those of the adapter in the model \(8 expected"
    )
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, state)


def test_a_file_is_read_into_memory_not_onto_an_accelerator(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.utils.save_and_load.infer_device", lambda: "meta")
    assert {tensor.device.type for tensor in checkpoint.read(str(saved)).values()} == {"cpu"}


def test_numbers_that_torch_cannot_read() -> None:
    packed = torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(ValueError, match=r"'x' cannot be read as numbers \(torch.float4_e2m1fn_x2\)"):
        checkpoint.check_finite({"x": packed})


def test_tensors_of_a_dtype_that_torch_cannot_test_fit_parameters_of_the_same() -> None:
    eight_bits = torch.ones(2).to(torch.float8_e4m3fn)
    checkpoint.check_state_dict({"lm_head.weight": eight_bits}, {}, {"lm_head.weight": eight_bits.dtype})
