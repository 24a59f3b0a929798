"""`skip_first_token=True`: a token that sees only itself attends without the pairs.  `init_weights="identity"`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_hificl import HiFICLConfig, Scoring, VirtualPairs, concatenate_pairs, select_rows, virtual_attention
from peft_hificl.ops import merged

from . import oracle
from .helpers import (
    GROUPS,
    MASKS,
    TOLERANCE,
    adapted,
    build,
    config,
    gemma2,
    gpt_oss,
    hificl_layers,
    inputs_for,
    logits,
    mask_of,
    tensors,
    train,
)
from .zoo import recorded_attention

BACKENDS = pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])


def skipping(kind: str, **kwargs: object) -> PeftModel:
    return adapted(kind, skip_first_token=True, **kwargs)


def pairs_of(x: dict[str, Tensor], **kwargs: object) -> VirtualPairs:
    return VirtualPairs(x["virtual_keys"], x["virtual_values"], skip_first_token=True, **kwargs)


def packed(batch: int, length: int) -> Tensor:
    """Two documents in each row, the second of which begins at another place in every row."""
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    for row in range(batch):
        mask[row, :, 2 + row :, : 2 + row] = False
    return mask


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("more", ["", "alpha-1", "log-weights", "sinks"])
@pytest.mark.parametrize("mask", [*MASKS, "is_causal", "packed", "one-key"])
@pytest.mark.parametrize("groups", GROUPS)
def test_kernels_and_formula_are_the_definition(groups: str, mask: str, more: str, dtype: torch.dtype) -> None:
    """Forward and all gradients."""
    if mask == "padded" and more == "alpha-1":
        pytest.skip("without pairs in its softmax, a query that sees nothing has no defined output")
    torch.manual_seed(0)
    heads, kv = GROUPS[groups]
    size = 1 if mask == "one-key" else 5
    x = tensors(heads, kv, size, size, 6, 6, 3)
    if more == "log-weights":
        x["log_weights"] = torch.randn(1, heads, 3, dtype=torch.float64)
    if more == "sinks":
        x["sinks"] = torch.randn(heads, dtype=torch.float64)
    seen = (
        {"packed": packed(2, 5), "one-key": None}.get(mask, mask_of(mask, 5, 5, heads)) if mask != "is_causal" else None
    )
    options = {"is_causal": True} if mask == "is_causal" else {"mask": seen}
    want_in = {name: tensor.clone().requires_grad_() for name, tensor in x.items()}
    want, alpha = oracle.hificl(
        **want_in, scaling=0.3, mask=mask_of("causal", 5, 5, 1) if mask == "is_causal" else seen,
        alpha_one=more == "alpha-1", skip_first_token=True,
    )  # fmt: skip
    first = (alpha == 1).any(-1)
    assert first.all() if mask in ("causal", "additive", "is_causal", "packed", "one-key", "window") else True
    direction = torch.randn_like(want)
    inputs = list(want_in.values())
    gradients = torch.autograd.grad(want, inputs, direction, allow_unused=True, materialize_grads=True)
    if mask == "one-key":
        assert not any(gradients[3].flatten().tolist())
    for attend in (merged.attention, lambda *args: virtual_attention(*args)[0]):
        got_in = {name: tensor.to(dtype).requires_grad_() for name, tensor in x.items()}
        pairs = pairs_of(got_in, log_weights=got_in.get("log_weights"), scale_self_attention=more != "alpha-1")
        args = (
            got_in["query"],
            got_in["key"],
            got_in["value"],
            pairs,
            Scoring(0.3, sinks=got_in.get("sinks"), **options),
        )
        assert merged.attention_path(*args).kernel
        got = attend(*args)
        bound = TOLERANCE[dtype]
        torch.testing.assert_close(got.double(), want, rtol=10 * bound, atol=10 * bound)
        for name, a, b in zip(
            x, torch.autograd.grad(got, list(got_in.values()), direction.to(dtype)), gradients, strict=True
        ):
            torch.testing.assert_close(
                a.double(), b, rtol=10 * bound, atol=10 * bound, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_huge_scores_of_hidden_pairs_leave_no_nan() -> None:
    """The share of a hidden pair is exp(score - LSE of the context), infinite here, times a gradient of zero."""
    x = tensors(2, 2, 3, 3, 4, 4, 2, batch=1)
    x = {name: tensor.float() for name, tensor in x.items()}
    x["query"][:, :, 0] = 50.0
    x["virtual_keys"] = torch.full_like(x["virtual_keys"], 50.0)
    x["key"][:, :, 0] = -50.0
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    log_weights = torch.zeros(1, 2, 2, requires_grad=True)
    args = (x["query"], x["key"], x["value"], pairs_of(x, log_weights=log_weights), Scoring(1.0, is_causal=True))
    assert merged.attention_path(*args).kernel
    output = merged.attention(*args)
    torch.testing.assert_close(output[:, :, 0], x["value"][:, :, 0])
    for gradient in torch.autograd.grad(output.sum(), [*x.values(), log_weights]):
        assert gradient.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("case", ["gqa", "mha", "vlm", "sinks", "softcap"])
def test_the_first_token_is_the_base_models(case: str, implementation: str) -> None:
    torch.manual_seed(0)
    base = {"sinks": gpt_oss, "softcap": gemma2}.get(case, lambda: build(case))().eval()
    if implementation != "eager" and case in ("sinks", "softcap"):
        pytest.skip("these models are eager")
    base.set_attn_implementation(implementation)
    inputs = inputs_for("vlm" if case == "vlm" else "gqa")
    want = logits(base, **inputs)
    model = get_peft_model(base, config(skip_first_token=True))
    got = logits(model, **inputs)
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=1e-5, atol=1e-5)
    assert ((got - want)[:, 1:].abs().amax(-1) > 1e-3).all()


@BACKENDS
def test_padded_rows_are_as_alone(implementation: str) -> None:
    model, ids = skipping("gqa"), inputs_for("gqa")["input_ids"]
    model.get_base_model().set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    got = logits(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got[1, 3:], logits(model, input_ids=ids[1:, 3:])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[0], logits(model, input_ids=ids[:1])[0], rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0  # on the right
    got = logits(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got[1, :6], logits(model, input_ids=ids[1:, :6])[0], rtol=1e-4, atol=1e-4)


@BACKENDS
def test_packed_documents_are_as_alone(implementation: str) -> None:
    model, ids = skipping("gqa"), inputs_for("gqa", rows=1)["input_ids"]
    model.get_base_model().set_attn_implementation(implementation)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]  # transformers builds the mask from it
    got = logits(model, input_ids=ids, position_ids=positions, use_cache=False)
    for part in (slice(0, 4), slice(4, 9)):
        torch.testing.assert_close(got[0, part], logits(model, input_ids=ids[:, part])[0], rtol=1e-4, atol=1e-4)


@BACKENDS
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_is_uncached(length: int, cache: str | None, implementation: str) -> None:
    if cache and implementation == "flex_attention":
        pytest.skip("compiles for every shape")
    model, ids = skipping("gqa"), inputs_for("gqa", length=length)["input_ids"]
    model.get_base_model().set_attn_implementation(implementation)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, cache_implementation=cache,
        disable_compile=True, **options,
    )  # fmt: skip
    whole = logits(model, input_ids=made.sequences)
    for step, got in enumerate(made.logits):
        torch.testing.assert_close(got, whole[:, length - 1 + step], rtol=1e-4, atol=1e-4)


def test_every_call_of_an_eager_model_is_the_definition() -> None:
    model = skipping("gqa", pair_weights=True)
    model.get_base_model().set_attn_implementation("eager")
    inputs = inputs_for("gqa")
    with torch.no_grad(), recorded_attention() as calls:
        model(**inputs)
    for call in calls:
        pairs = call.module.virtual_pairs(call.query, call.key, call.value)
        assert pairs.skip_first_token
        want, _ = oracle.hificl(
            call.query, call.key, call.value, pairs.keys, pairs.values, call.options["scaling"],
            mask=mask_of("causal", 9, 9, 1), log_weights=pairs.log_weights, skip_first_token=True,
        )  # fmt: skip
        torch.testing.assert_close(call.output, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_sets_that_disagree_are_refused() -> None:
    sets = [VirtualPairs(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), skip_first_token=skip) for skip in (0, 1)]
    with pytest.raises(ValueError, match="disagree about skip_first_token"):
        concatenate_pairs(sets)
    with pytest.raises(ValueError, match="one batch disagree about skip_first_token"):
        select_rows(sets, [0, 1])
    assert concatenate_pairs(sets[1:] * 2).skip_first_token and select_rows([None, sets[1]], [0, 1]).skip_first_token
    model = skipping("gqa", name="a")
    model.add_adapter("b", config())
    with pytest.raises(ValueError, match=r"disagree about skip_first_token: \{'a': True, 'b': False\}"):
        model.base_model.set_adapter(["a", "b"])


def test_it_is_saved_and_read_back(tmp_path: Path) -> None:
    model = skipping("gqa")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("gqa"), tmp_path)
    assert again.peft_config["default"].skip_first_token
    assert torch.equal(logits(again, **inputs_for("gqa")), logits(model, **inputs_for("gqa")))


# -- init_weights="identity" --------------------------------------------------------------------------------------

IDENTITY = {"init_weights": "identity", "pair_weights": True, "skip_first_token": True}


def weights_of(model: nn.Module) -> list[Tensor]:
    return [layer.hificl_W["default"].weight for layer in hificl_layers(model)]


@BACKENDS
@pytest.mark.parametrize("n", [1, 8])
def test_a_fresh_adapter_answers_as_the_base_does(kind: str, n: int, implementation: str) -> None:
    base = build(kind)
    base.set_attn_implementation(implementation)
    want = logits(base, **inputs_for(kind))
    model = get_peft_model(base, HiFICLConfig(n=n, r=4, **IDENTITY)).eval()
    error = (logits(model, **inputs_for(kind)) - want).abs().max() / want.std()
    assert 0 < error < 1e-3
    for weight in weights_of(model):
        torch.testing.assert_close(weight.exp().sum(-1), torch.full_like(weight[:, 0], 2e-4))


def test_without_self_attention_scaling_every_paper_start_is_the_identity_bit_by_bit(kind: str) -> None:
    want = logits(build(kind), **inputs_for(kind))
    for init_weights in (True, "unit_keys", "identity"):
        model = get_peft_model(
            build(kind), HiFICLConfig(n=8, r=8, init_weights=init_weights, scale_self_attention=False)
        )
        assert torch.equal(logits(model.eval(), **inputs_for(kind)), want)


def test_it_draws_what_the_papers_start_draws_and_trains(kind: str) -> None:
    models = []
    for options in ({"init_weights": True}, IDENTITY):
        torch.manual_seed(3)
        models.append(get_peft_model(build(kind), HiFICLConfig(n=4, r=4, **options)))
    paper, identity = (dict(model.named_parameters()) for model in models)
    for name in paper:
        assert torch.equal(paper[name], identity[name]), name
    before = [weight.clone() for weight in weights_of(models[1])]
    losses = train(models[1], kind, steps=8)
    assert losses[-1] < losses[0]
    assert all((new != old).all() for new, old in zip(weights_of(models[1]), before, strict=True))


@pytest.mark.parametrize(
    ("options", "missing"),
    [({}, "pair_weights=True and skip_first_token=True"), ({"pair_weights": True}, "skip_first_token=True"),
     ({"skip_first_token": True}, "pair_weights=True")],
)  # fmt: skip
def test_it_needs_both(options: dict[str, bool], missing: str) -> None:
    with pytest.raises(ValueError, match=f"'identity' needs {missing}: set it"):
        HiFICLConfig(init_weights="identity", **options)
