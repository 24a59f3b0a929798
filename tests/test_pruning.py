"""`inspection.pair_effects` and `prune_pairs`: losses against those of models whose pairs have other log-weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_hificl import HiFICLConfig, inspection, prune_pairs
from peft_hificl.inspection import effects

from .helpers import VOCAB, adapted, build, config, hificl_layers, inputs_for, logits, train, unchanged


def data_for(kind: str) -> list[dict[str, Tensor]]:
    """Two batches with different numbers of labels."""
    whole = inputs_for(kind)
    labels = whole["input_ids"].clone()
    labels[0, :6] = -100
    return [
        {name: value[:1] for name, value in {**whole, "labels": labels}.items()},
        {name: value[1:] for name, value in {**whole, "labels": labels}.items()},
    ]


def loss_of(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    """By definition: the mean over all labels of all batches."""
    losses = []
    for batch in data:
        scores = logits(model, **batch)[:, :-1].flatten(0, 1)
        losses.append(nn.functional.cross_entropy(scores, batch["labels"][:, 1:].flatten(), reduction="none"))
    counted = torch.cat([batch["labels"][:, 1:].flatten() != -100 for batch in data])
    return torch.cat(losses)[counted].mean().item()


def with_log_weight(model: PeftModel, layer: int, head: int, pair: int | slice, value: float) -> PeftModel:
    """A copy of a model with `pair_weights` whose pairs have another log-weight."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        hificl_layers(changed)[layer].hificl_W["default"].weight[head, pair] += value
    return changed


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_each_pair_and_each_head_is_removed_alone(implementation: str) -> None:
    model, data = adapted("gqa", pair_weights=True), data_for("gqa")
    model.get_base_model().set_attn_implementation(implementation)
    loss = loss_of(model, data)
    pairs, heads = inspection.pair_effects(model, data), inspection.head_effects(model, data)
    assert pairs.loss == heads.loss == pytest.approx(loss, rel=1e-5)
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn"
        assert (pairs.effects[name].shape, heads.effects[name].shape) == ((4, 3), (4,))
        for head, pair in [(0, 0), (3, 2), (1, 1)]:
            want = loss_of(with_log_weight(model, layer, head, pair, float("-inf")), data) - loss
            assert pairs.effects[name][head, pair].item() == pytest.approx(want, abs=1e-5)
        want = loss_of(with_log_weight(model, layer, 2, slice(None), float("-inf")), data) - loss
        assert heads.effects[name][2].item() == pytest.approx(want, abs=1e-5)
    assert min(effect.abs().max() for effect in pairs.effects.values()) > 1e-3


def test_pairs_of_every_kind_of_model_are_removed(kind: str) -> None:
    model, data = adapted(kind, pair_weights=True), data_for(kind)
    want = loss_of(with_log_weight(model, 0, 2, 1, float("-inf")), data) - loss_of(model, data)
    name, effects_of_layer = next(iter(inspection.pair_effects(model, data).effects.items()))
    assert name.endswith("layers.0.self_attn")
    assert effects_of_layer[2, 1].item() == pytest.approx(want, abs=1e-5) and abs(want) > 1e-4


def test_an_encoder_decoder_does_not_shift_its_labels() -> None:
    """The loss of unequal batches is the mean over all labels, though these have the shape of the input."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    base = tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0))
    model = get_peft_model(base, config()).eval()
    ids = torch.randint(1, VOCAB, (2, 5))
    few, many = torch.full_like(ids, -100), ids.clone()
    few[:, :2] = ids[:, :2]
    data = [{"input_ids": ids, "labels": labels} for labels in (few, many)]
    with torch.no_grad():
        found = torch.cat([model(**batch).logits.flatten(0, 1) for batch in data])
    want = nn.functional.cross_entropy(found, torch.cat([few, many]).flatten()).item()
    assert inspection.head_effects(model, data).loss == pytest.approx(want, rel=1e-5)


def test_a_compiled_decoder_shifts_its_labels() -> None:
    model, ids = adapted("gqa"), torch.randint(1, VOCAB, (1, 5))
    few = ids.masked_fill(torch.arange(5) < 3, -100)
    data = [{"input_ids": ids, "labels": labels} for labels in (ids, few)]
    want = inspection.head_effects(model, data).loss
    assert inspection.head_effects(torch.compile(model, backend="eager"), data).loss == pytest.approx(want)


def test_the_model_is_left_as_it_was() -> None:
    model, data = adapted("gqa"), data_for("gqa")
    model.train()
    training = [module.training for module in model.modules()]
    with warnings.catch_warnings(), unchanged(model):
        warnings.simplefilter("error")
        inspection.pair_effects(model, data)
    assert [module.training for module in model.modules()] == training
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in hificl_layers(model))


VARIANTS = {
    "": {},
    "whole": {"factorize_keys": False, "factorize_values": False},
    "weights": {"pair_weights": True},
    "alpha-1": {"scale_self_attention": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_head_keeps_its_best_pairs(kind: str, variant: str, tmp_path: Path) -> None:
    model, data = adapted(kind, n=4, **VARIANTS[variant]), data_for(kind)
    measured = inspection.pair_effects(model, data).effects
    before = [pairs for layer in hificl_layers(model) for pairs in [effects.pairs_of(layer)]]
    loss = loss_of(model, data)
    pruned = prune_pairs(model, data, n=2)
    assert (pruned.n, model.peft_config["default"].n) == (2, 2)
    assert pruned.loss_before == pytest.approx(loss, rel=1e-5)
    assert pruned.loss_after == pytest.approx(loss_of(model, data), rel=1e-5) != pruned.loss_before
    for layer, old, (name, effect) in zip(hificl_layers(model), before, measured.items(), strict=True):
        assert layer.n == {"default": 2}
        pairs = effects.pairs_of(layer)
        for head in range(4):
            best = sorted(sorted(range(4), key=lambda pair: -effect[head, pair])[:2])
            assert pruned.kept[name][head].tolist() == best
            torch.testing.assert_close(pairs.keys[0, head], old.keys[0, head, best])
            torch.testing.assert_close(pairs.values[0, head], old.values[0, head, best])
            if old.log_weights is not None:
                assert torch.equal(pairs.log_weights[0, head], old.log_weights[0, head, best])
    want = logits(model, **inputs_for(kind))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(kind), tmp_path)
    assert again.peft_config["default"].n == 2
    assert torch.equal(logits(again, **inputs_for(kind)), want)
    losses = train(model, kind)
    assert losses[1] < losses[0]


def test_the_loss_that_may_be_lost() -> None:
    def fresh() -> PeftModel:
        return adapted("gqa", n=4)

    data = data_for("gqa")
    by_number = {n: prune_pairs(fresh(), data, n=n).loss_after for n in (1, 2, 3)}
    loss = loss_of(fresh(), data)
    for threshold in (-1.0, *(after - loss + 1e-6 for after in by_number.values()), 100.0):
        model = fresh()
        fits = [n for n in (1, 2, 3) if by_number[n] <= loss + threshold]
        pruned = prune_pairs(model, data, threshold=threshold)
        assert pruned.n == (fits[0] if fits else 4) == model.peft_config["default"].n
        assert pruned.loss_after == pytest.approx(by_number.get(pruned.n, loss), rel=1e-6)
        assert pruned.kept["model.layers.0.self_attn"].shape == (4, pruned.n)
        if not fits:
            assert torch.equal(logits(model, **data[0]), logits(fresh(), **data[0]))


def test_other_adapters_and_models_keep_their_pairs() -> None:
    shared = config(n=4)
    model = adapted("gqa", n=4)
    model.add_adapter("a", shared)
    model.add_adapter("b", shared)
    model.set_adapter("b")
    want = logits(model, **inputs_for("gqa"))
    model.set_adapter("a")
    prune_pairs(model, data_for("gqa"), n=1, adapter_name="a")
    assert {name: c.n for name, c in model.peft_config.items()} == {"default": 4, "a": 1, "b": 4} and shared.n == 4
    assert hificl_layers(model)[0].n == {"default": 4, "a": 1, "b": 4}
    mixed = logits(model, **inputs_for("gqa"), adapter_names=["b", "a"])
    torch.testing.assert_close(mixed[0], want[0], rtol=1e-4, atol=1e-5)
    model.set_adapter("b")
    assert torch.equal(logits(model, **inputs_for("gqa")), want)


def test_an_adapter_that_transformers_attached() -> None:
    base, data = build("gqa"), data_for("gqa")
    base.add_adapter(config(n=4))
    assert prune_pairs(base, data, n=2).loss_after == pytest.approx(loss_of(base, data), rel=1e-5)
    assert base.peft_config["default"].n == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either n or threshold, found n=None and threshold=None"),
        ({"n": 1, "threshold": 0.1}, "either n or threshold, found n=1 and threshold=0.1"),
        ({"n": 3}, "n=3 for an adapter of 3 pairs per head: give a number from 1 to 2"),
        ({"n": 0}, "n=0 for an adapter of 3 pairs"),
        ({"n": 1, "adapter_name": "other"}, "There is no HiFICL adapter 'other'"),
        ({"n": 1, "data": []}, "data must be a list of batches with labels"),
        ({"n": 1, "data": {"input_ids": torch.ones(1, 2)}}, "data must be a list of batches with labels"),
        ({"n": 1, "data": [inputs_for("gqa")]}, "Batch 0 of data has no labels, only input_ids"),
        (
            {"n": 1, "data": [{**inputs_for("gqa"), "labels": torch.full((2, 9), -100)}]},
            "Batch 0 of data has no label that counts",
        ),
    ],
)
def test_what_is_refused_changes_nothing(arguments: dict[str, object], message: str) -> None:
    model = adapted("gqa")
    with unchanged(model), pytest.raises(ValueError, match=message):
        prune_pairs(model, **{"data": data_for("gqa"), **arguments})
    assert model.peft_config["default"].n == 3


def test_an_adapter_that_is_not_active_alone_is_refused() -> None:
    model = adapted("gqa")
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match=r"has \['default'\] as active HiFICL adapters: activate 'other' alone"):
        prune_pairs(model, data_for("gqa"), n=1, adapter_name="other")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"\['default', 'other'\] as active HiFICL adapters: activate the adapter"):
        prune_pairs(model, data_for("gqa"), n=1)


def test_a_model_without_the_configuration_or_the_parameters_is_refused() -> None:
    model = adapted("gqa")
    with pytest.raises(ValueError, match="LlamaDecoderLayer holds no configuration of an adapter"):
        prune_pairs(model.get_base_model().model.layers[0], data_for("gqa"), n=1)
    hificl_layers(model)[1].hificl_V_A["default"].to("meta")
    with pytest.raises(
        ValueError, match=r"hificl_V_A of 'model.layers.1.self_attn' .* on meta: the adapter is offloaded"
    ):
        prune_pairs(model, data_for("gqa"), n=1)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = adapted("gqa")
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(float("nan"))
    with pytest.raises(ValueError, match="The loss on data is nan"):
        prune_pairs(model, data_for("gqa"), n=1)


def test_the_configuration_object_of_the_user_is_not_changed() -> None:
    own = HiFICLConfig(n=4, r=2)
    model = build("gqa")
    model.add_adapter(own)
    prune_pairs(model, data_for("gqa"), n=2)
    assert own.n == 4
