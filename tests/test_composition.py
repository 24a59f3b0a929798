"""Several adapters combined into one: `add_weighted_adapter`, and `ops.condense` beneath it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from peft_hificl import HiFICLModel, VirtualPairs, composition
from peft_hificl.ops.condense import condense, output_error

from . import oracle
from .helpers import GROUPS, adapted, build, config, hificl_layers, inputs_for, llama, logits, pairs_for, unchanged
from .zoo import recorded_attention

WHOLE = {"factorize_keys": False, "factorize_values": False}
# Of "a" and "b": every way in which an adapter may hold its pairs, beside every other.
HELD = {
    "factors": ({}, {"n": 5, "r": 4}),
    "whole": (WHOLE, {"n": 5, **WHOLE}),
    "mixed": (WHOLE, {"n": 5, "r": 4}),
    "crossed": ({"factorize_keys": False}, {"n": 5, "factorize_values": False}),
    "rank above n": ({"n": 2, "r": 6}, {"n": 1, "r": 3, "factorize_values": False}),
    "log-weights": ({"pair_weights": True}, {"n": 5}),
    "first token skipped": (
        {"skip_first_token": True, "init_weights": "identity", "pair_weights": True},
        {"n": 5, "skip_first_token": True},
    ),
    "shared heads": ({"heads": "kv"}, {"n": 5, "heads": "kv", "pair_weights": True}),
    "shared and own heads": ({"heads": "kv", "pair_weights": True}, {"n": 5}),
    "alpha = 1": ({"scale_self_attention": False}, {"n": 5, "scale_self_attention": False, "pair_weights": True}),
}


def with_two(kind: str = "gqa", a: dict[str, object] = {}, b: dict[str, object] | None = None) -> PeftModel:  # noqa: B006
    """Adapters "a" (n = 3, r = 2) and "b" (n = 5, with log-weights), unless other fields are given; "a" is active."""
    model = adapted(kind, name="a", **a)
    torch.manual_seed(2)
    model.add_adapter("b", config(**({"n": 5, "pair_weights": True} if b is None else b)))
    return model


def union_logits(model: PeftModel, kind: str, **strengths: float) -> Tensor:
    """Of adapters that are active together, at these strengths."""
    for layer in hificl_layers(model):
        for name, strength in strengths.items():
            layer.set_scale(name, strength)
    before = model.active_adapters
    model.base_model.set_adapter(list(strengths))
    found = logits(model, **inputs_for(kind))
    model.base_model.set_adapter(before)
    for layer in hificl_layers(model):
        for name in strengths:
            layer.set_scale(name, 1)
    return found


# -- cat --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1), (0.5, 2)], ids=str)
@pytest.mark.parametrize("held", list(HELD))
def test_cat_is_the_union_and_is_saved_like_any_adapter(
    held: str, weights: tuple[float, float], tmp_path: Path
) -> None:
    model = with_two("gqa", *HELD[held])
    want = union_logits(model, "gqa", a=weights[0], b=weights[1])
    before = logits(model, **inputs_for("gqa"))
    errors = model.add_weighted_adapter(["a", "b"], list(weights), "both", "cat")
    assert errors == {f"model.layers.{i}.self_attn": 0.0 for i in (0, 1)}
    assert model.active_adapters == ["a"] and torch.equal(logits(model, **inputs_for("gqa")), before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".both." in name)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), want, rtol=1e-4, atol=1e-5)
    found = model.peft_config["both"]
    sizes = [{"n": 3, "r": 2, **fields} for fields in HELD[held]]
    assert found.n == sum(size["n"] for size in sizes)
    assert found.pair_weights == (weights != (1, 1) or any(size.get("pair_weights") for size in sizes))
    exact = logits(model, **inputs_for("gqa"))
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = PeftModel.from_pretrained(build("gqa"), tmp_path / "both")
    assert torch.equal(logits(again, **inputs_for("gqa")), exact)


def test_its_pairs_are_bit_for_bit_those_of_the_union() -> None:
    model = with_two("gqa", {}, {"n": 5, "factorize_values": False, "pair_weights": True})
    layer = hificl_layers(model)[0]
    model.base_model.set_adapter(["a", "b"])
    for name, strength in (("a", 0.5), ("b", 3)):
        layer.set_scale(name, strength)
    union = pairs_for(layer)
    model.add_weighted_adapter(["a", "b"], [0.5, 3], "both")
    for got, want in zip(layer.pairs_of("both")[:3], union[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert layer.pairs_of("both").keys.shape == (1, 4, 8, 16)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("heads", list(GROUPS))
def test_every_call_is_the_definition(heads: str, implementation: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(kv_heads=GROUPS[heads][1]).eval(), config(pair_weights=True), adapter_name="a")
    model.add_adapter("b", config(n=5, **WHOLE))
    model.get_base_model().set_attn_implementation(implementation)
    model.add_weighted_adapter(["b", "a"], [2, 0.25], "both")
    model.set_adapter("both")
    with torch.no_grad(), recorded_attention() as calls:
        model(**inputs_for("gqa"))
    for call in calls:
        a, b = (call.module.virtual_pairs.pairs_of(name) for name in "ab")
        weights = [torch.full((1, 4, 5), math.log(2)), a.log_weights + math.log(0.25)]
        want, _ = oracle.hificl(
            call.query, call.key, call.value, torch.cat([b.keys, a.keys], 2), torch.cat([b.values, a.values], 2),
            scaling=call.query.shape[-1] ** -0.5,
            mask=torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool).tril()[None, None],
            log_weights=torch.cat(weights, -1),
        )  # fmt: skip
        torch.testing.assert_close(call.output, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_on_every_kind_of_model(kind: str) -> None:
    model = with_two(kind, {}, {"n": 2})
    want = union_logits(model, kind, a=0.5, b=2)
    model.add_weighted_adapter(["a", "b"], [0.5, 2], "both")
    model.set_adapter("both")
    torch.testing.assert_close(logits(model, **inputs_for(kind)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combination", ["cat", "svd"])
@pytest.mark.parametrize("pattern", [None, r"model\.layers\.[01]\.self_attn"])
def test_layers_that_only_some_adapters_have(pattern: str | None, combination: str, tmp_path: Path) -> None:
    where = {"target_modules": pattern} if pattern else {}
    model = adapted("gqa", name="a", layers_to_transform=[1] if not pattern else None, **where)
    model.add_adapter("b", config(n=5, layers_to_transform=[0] if pattern is None else None, **where))
    model.add_adapter("c", config(n=1, exclude_modules=["layers.1.self_attn"]))
    want = union_logits(model, "gqa", a=1, b=1, c=2)
    sizes = {"n": 9, "r": 9} if combination == "svd" else {}
    errors = model.add_weighted_adapter(["a", "b", "c"], [1, 1, 2], "all", combination, **sizes)
    assert errors.keys() == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    model.set_adapter("all")
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), want, rtol=1e-4, atol=1e-4)
    exact = logits(model, **inputs_for("gqa"))
    model.save_pretrained(tmp_path, selected_adapters=["all"])
    again = PeftModel.from_pretrained(build("gqa"), tmp_path / "all")
    assert torch.equal(logits(again, **inputs_for("gqa")), exact)


def test_one_adapter_with_a_strength_and_one_that_is_left_out(tmp_path: Path) -> None:
    """A strength that is to be saved is made part of an adapter."""
    model = with_two()
    want = union_logits(model, "gqa", a=0.3)
    model.add_weighted_adapter(["a", "b"], [0.3, 0], "weak")
    assert model.peft_config["weak"].n == 3
    model.set_adapter("weak")
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), want, rtol=1e-4, atol=1e-5)


def test_what_was_set_for_the_running_model_does_not_count() -> None:
    model = with_two()
    want = union_logits(model, "gqa", a=0.5, b=1)
    for layer in hificl_layers(model):
        layer.set_scale("a", 7)
        layer.set_scale("b", 0)
    model.add_weighted_adapter(["a", "b"], [0.5, 1], "both")
    model.set_adapter("both")
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), want, rtol=1e-4, atol=1e-5)


def test_a_combined_adapter_can_be_trained_switched_and_deleted() -> None:
    model, inputs = with_two("gqa", WHOLE, {"n": 5, "r": 4}), inputs_for("gqa")
    model.add_weighted_adapter(["a", "b"], [0.5, 2], "both")
    model.set_adapter("both")
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    own = [p for name, p in model.named_parameters() if ".both." in name]
    assert len(own) == 10 and all(p.grad is not None and p.grad.any() for p in own)
    model.set_adapter("a")
    model.delete_adapter("both")
    assert sorted(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_adapters_stays(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama().to(dtype).eval(), config(), adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", config(n=5), autocast_adapter_dtype=False)
    for combination in ("cat", "svd"):
        model.add_weighted_adapter(["a", "b"], [1, 0.5], combination, combination)
        assert {p.dtype for name, p in model.named_parameters() if f".{combination}." in name} == {dtype}
    layer = hificl_layers(model)[0]
    want = torch.cat([layer.pairs_of(name).keys for name in "ab"], dim=2)
    assert torch.equal(layer.pairs_of("cat").keys, want)


# -- svd --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shared",
    [({}, {"n": 5, "pair_weights": True}), ({"heads": "kv"}, {"n": 5, "heads": "kv", "pair_weights": True}),
     ({"heads": "kv"}, {"n": 5}), ({"heads": "kv", "layers_to_transform": [1]}, {"n": 5, "layers_to_transform": [0]})],
    ids=["own", "shared", "shared and own", "shared here and own there"],
)  # fmt: skip
def test_svd_is_exact_where_nothing_is_lost(shared: tuple[dict[str, object], dict[str, object]]) -> None:
    model = with_two("gqa", *shared)
    want = union_logits(model, "gqa", a=0.5, b=2)
    errors = model.add_weighted_adapter(["a", "b"], [0.5, 2], "both", "svd", n=8, r=8)
    assert max(errors.values()) < 1e-5
    model.set_adapter("both")
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), want, rtol=1e-3, atol=1e-4)


def test_svd_of_an_adapter_with_itself_is_the_adapter_twice() -> None:
    model = adapted("gqa", name="a")
    model.add_weighted_adapter(["a"], [1], "copy")
    model.add_weighted_adapter(["a", "copy"], [1, 1], "both", "svd", n=3, r=3)
    want = union_logits(model, "gqa", a=2)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), want, rtol=1e-3, atol=1e-4)


def test_svd_reports_what_it_loses(tmp_path: Path) -> None:
    model = with_two("gqa", {"n": 4, "r": 4}, {"n": 4, "r": 4})
    sizes = [(8, 8), (6, 8), (4, 8), (2, 8), (4, 2), (4, 1)]
    errors = {
        (n, r): sum(model.add_weighted_adapter(["a", "b"], [1, 1], f"{n}-{r}", "svd", n=n, r=r).values())
        for n, r in sizes
    }
    assert errors[8, 8] < 1e-5 < errors[6, 8] < errors[4, 8] < errors[2, 8] < 2
    assert errors[4, 8] < errors[4, 2] < errors[4, 1]
    model.add_weighted_adapter(["a", "b"], [1, 1], "usual", "svd")
    found = model.peft_config["usual"]
    assert (found.n, found.r, found.pair_weights) == (4, 4, True)
    model.set_adapter("usual")
    want = logits(model, **inputs_for("gqa"))
    model.save_pretrained(tmp_path, selected_adapters=["usual"])
    assert torch.equal(logits(PeftModel.from_pretrained(build("gqa"), tmp_path / "usual"), **inputs_for("gqa")), want)


def test_svd_keeps_whole_matrices_whole_unless_a_rank_is_given() -> None:
    model = with_two("gqa", WHOLE, {"n": 5, **WHOLE})
    model.add_weighted_adapter(["a", "b"], [1, 1], "whole", "svd", n=4)
    model.add_weighted_adapter(["a", "b"], [1, 1], "factors", "svd", n=4, r=2)
    found = [(model.peft_config[name].factorize_keys, model.peft_config[name].r) for name in ("whole", "factors")]
    assert found == [(False, 2), (True, 2)]


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown": (["a", "x"], [1, 1], "new", {}, r"no adapters \['x'\] on this model, which has \['a', 'b'\]"),
    "lengths": (["a", "b"], [1], "new", {}, "one weight for each adapter"),
    "a word": ("ab", [1, 1], "new", {}, "give two lists"),
    "twice": (["a", "a"], [1, 1], "new", {}, "the sum of its weights"),
    "negative": (["a", "b"], [1, -0.5], "new", {}, "'b' has the weight -0.5.*cannot be negative.*task arithmetic"),
    "nan": (["a", "b"], [1, math.nan], "new", {}, "must be a finite number"),
    "infinite": (["a", "b"], [1, math.inf], "new", {}, "must be a finite number"),
    "nothing": (["a", "b"], [0, 0], "new", {}, "All weights are 0"),
    "no adapters": ([], [], "new", {}, "leaves no pairs"),
    "taken": (["a", "b"], [1, 1], "b", {}, "'b' exists already"),
    "bad name": (["a", "b"], [1, 1], "x.y", {}, "cannot be named 'x.y'"),
    "linear": (["a", "b"], [1, 1], "new", {"combination_type": "linear"}, "'cat' or 'svd', found 'linear'"),
    "cat with n": (["a", "b"], [1, 1], "new", {"n": 3}, "takes no n and r"),
    "n above": (["a", "b"], [1, 1], "new", {"combination_type": "svd", "n": 9}, "8 pairs in all"),
    "n below": (["a", "b"], [1, 1], "new", {"combination_type": "svd", "n": 0}, "n must be an int of at least 1"),
    "r below": (["a", "b"], [1, 1], "new", {"combination_type": "svd", "r": 0}, "r must be an int of at least 1"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_combined(case: str) -> None:
    adapters, weights, name, options, message = REFUSED[case]
    model = with_two()
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name, **options)


@pytest.mark.parametrize(
    ("field", "found"), [("scale_self_attention", "{'a': True"), ("skip_first_token", "{'a': False")]
)
def test_adapters_that_disagree_about_the_softmax(field: str, found: str) -> None:
    model = adapted("gqa", name="a")
    model.add_adapter("b", config(**{field: found.endswith("False")}))
    with unchanged(model), pytest.raises(ValueError, match=f"disagree about {field}: {found}"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "both")
    model.add_weighted_adapter(["a", "b"], [1, 0], "one")  # which takes no part does not disagree


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7, 9]}], ids=str)
def test_adapters_with_more_than_pairs(extra: dict[str, object]) -> None:
    model = adapted("gqa", name="a", **extra)
    model.add_adapter("b", config())
    with unchanged(model), pytest.raises(ValueError, match=f"'a' has trained {next(iter(extra))}.*beside its virtual"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "both")
    model.add_weighted_adapter(["a", "b"], [0, 1], "one")


def test_weights_that_are_not_here() -> None:
    model = with_two()
    layer = hificl_layers(model)[1]
    layer.to("meta")
    with pytest.raises(ValueError, match="'a' are not whole here, they are offloaded or sharded"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "both")
    assert sorted(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("step", ["fill_with_union", "fill_with_condensed", "inject"])
def test_an_error_on_the_way_leaves_nothing_behind(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_two()
    if step == "inject":
        monkeypatch.setattr("peft_hificl.hooks.refresh", lambda model: 1 / 0)
    else:
        kept = getattr(composition, step)
        calls: list[object] = []

        def fails(*args: object) -> float:
            calls.append(args)
            return kept(*args) if len(calls) == 1 else 1 / 0

        monkeypatch.setattr(composition, step, fails)
    targeted = list(model.targeted_module_names)
    with unchanged(model):
        with pytest.raises(ZeroDivisionError):
            model.add_weighted_adapter(["a", "b"], [1, 2], "both", "svd" if "condensed" in step else "cat")
        monkeypatch.undo()
    assert model.targeted_module_names == targeted and model.active_adapters == ["a"]
    model.add_weighted_adapter(["a", "b"], [1, 2], "both")


def test_beside_a_lora() -> None:
    base = build("gqa")
    torch.manual_seed(4)
    base.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    model = HiFICLModel(base, config(), "a")
    model.peft_config["b"] = config(n=2)
    model.inject_adapter(base, "b")
    model.set_adapter(["a", "b"])
    want = logits(base, **inputs_for("gqa"))
    model.add_weighted_adapter(["a", "b"], [1, 1], "both")
    model.set_adapter("both")
    torch.testing.assert_close(logits(base, **inputs_for("gqa")), want, rtol=1e-4, atol=1e-5)


# -- condense ---------------------------------------------------------------------------------------------------------


def random_pairs(heads: int, n: int, log_weights: int | None = None) -> VirtualPairs:
    weights = None if log_weights is None else torch.randn(1, log_weights, n)
    return VirtualPairs(torch.randn(1, heads, n, 16), torch.randn(1, heads, n, 8), weights)


@pytest.mark.parametrize("log_weights", [None, 1, 4], ids=str)
def test_nothing_changes_where_n_is_not_reduced(log_weights: int | None) -> None:
    pairs = random_pairs(4, 6, log_weights)
    for n in (6, 7):
        assert condense(pairs, n) is pairs


@pytest.mark.parametrize("log_weights", [None, 1, 4], ids=str)
def test_duplicates_are_merged_exactly(log_weights: int | None) -> None:
    """Each head has others of its own."""
    torch.manual_seed(0)
    distinct = random_pairs(4, 5)
    choice = torch.stack([torch.cat([torch.randperm(5), torch.randint(5, (9,))]) for _ in range(4)])
    keys, values = (torch.stack([tensor[0, head, choice[head]] for head in range(4)])[None] for tensor in distinct[:2])
    pairs = VirtualPairs(keys, values, None if log_weights is None else torch.randn(1, log_weights, 14))
    weights = torch.zeros(1, 4, 14) if pairs.log_weights is None else pairs.log_weights.expand(1, 4, 14)
    found = condense(pairs, 5)
    for head in range(4):
        for i in range(5):
            own = distinct.keys[0, head, i]
            place = [j for j in range(5) if torch.equal(found.keys[0, head, j], own)]
            assert len(place) == 1 and torch.equal(found.values[0, head, place[0]], distinct.values[0, head, i])
            want = weights[0, head, choice[head] == i].logsumexp(0)
            torch.testing.assert_close(found.log_weights[0, head, place[0]], want, rtol=1e-4, atol=1e-5)
    assert output_error(found, pairs, 0.25) < 1e-6


def test_what_a_query_of_zeros_sees_stays() -> None:
    torch.manual_seed(1)
    pairs = random_pairs(3, 20, 3)
    for n in (1, 4, 13):
        few = condense(pairs, n)
        assert few.keys.shape == (1, 3, n, 16) and few.values.shape == (1, 3, n, 8)
        torch.testing.assert_close(few.log_weights.logsumexp(-1), pairs.log_weights.logsumexp(-1))
        for got, want in ((few.keys, pairs.keys), (few.values, pairs.values)):
            torch.testing.assert_close(
                few.log_weights.softmax(-1)[..., None, :] @ got, pairs.log_weights.softmax(-1)[..., None, :] @ want
            )


def test_groups_are_found() -> None:
    """Three tight groups in each head, far apart, of which one is light."""
    torch.manual_seed(2)
    centres = 10 * torch.randn(2, 3, 24)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])[torch.randperm(9)]
    points = centres[:, group] + 0.01 * torch.randn(2, 9, 24)
    weights = torch.where(group == 1, -2.0, 0.0)[None, None]
    found = condense(VirtualPairs(points[None, ..., :16], points[None, ..., 16:], weights), 3)
    for head in range(2):
        nearest = torch.cdist(centres[head, :, :16], found.keys[0, head])
        assert sorted(nearest.argmin(1).tolist()) == [0, 1, 2] and nearest.min(1).values.max() < 0.1
        sizes = found.log_weights[0, head].exp()[nearest.argmin(1)]
        torch.testing.assert_close(sizes, torch.tensor([3, 2 * math.exp(-2), 4]), rtol=1e-4, atol=1e-5)


def test_pairs_without_weight_do_not_count() -> None:
    torch.manual_seed(3)
    pairs = random_pairs(2, 6)
    off = torch.zeros(1, 2, 6)
    off[..., [1, 4]] = -torch.inf
    few = condense(pairs._replace(log_weights=off), 4)
    kept = VirtualPairs(pairs.keys[:, :, [0, 2, 3, 5]], pairs.values[:, :, [0, 2, 3, 5]])
    assert few.log_weights.isfinite().all() and output_error(few, kept, 0.25) < 1e-6
    nothing = condense(pairs._replace(log_weights=torch.full((1, 2, 6), -torch.inf)), 2)
    assert all(tensor.isfinite().all() for tensor in nothing[:3]) and nothing.log_weights.max() < -1e30


def test_alpha_dtypes_and_refusals() -> None:
    pairs = random_pairs(2, 6)
    halves = pairs.keys.bfloat16(), pairs.values.bfloat16()
    pairs = VirtualPairs(*halves, None, scale_self_attention=False, skip_first_token=True)
    few = condense(pairs, 2)
    assert few.keys.dtype == few.values.dtype == torch.bfloat16 and few.log_weights.dtype == torch.float32
    assert not few.scale_self_attention and few.skip_first_token
    with pytest.raises(ValueError, match="n must be at least 1, found 0"):
        condense(pairs, 0)
    with pytest.raises(ValueError, match="2 rows of a batch"):
        condense(VirtualPairs(torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4)), 2)


def test_the_error_is_that_of_the_definition() -> None:
    """One query at a time, its context a single key with as much weight as the pairs, and a value of zeros."""
    torch.manual_seed(4)
    pairs, other = random_pairs(2, 5, 2), random_pairs(2, 3, 2)
    queries = torch.randn(1, 1, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference, size = 0.0, 0.0
    for head in range(2):
        for query in queries[0, 0]:

            def raw(found: VirtualPairs, head: int = head, query: Tensor = query) -> tuple[Tensor, Tensor]:
                keys, values, logs = (tensor[0, head].double() for tensor in found[:3])
                weights = torch.exp(keys @ query * 0.3 + logs)
                return (weights[:, None] * values).sum(0), weights.sum()

            (of_pairs, z), (of_other, z_other) = raw(pairs), raw(other)
            want = of_pairs / (z + z)
            difference += float((of_other / (z + z_other) - want).square().sum())
            size += float(want.square().sum())
    assert output_error(other, pairs, 0.3, queries=7) == pytest.approx(math.sqrt(difference / size))
    assert output_error(pairs, pairs, 0.3) == 0
