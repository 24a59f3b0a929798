"""`inspection.record`: alpha and beta of every backend and mask form are those of the definition."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_mask

from peft_hificl import Scoring, VirtualPairs, inspection
from peft_hificl.backends import BACKENDS
from peft_hificl.inspection.recording import weights_of
from peft_hificl.listeners import Call, heard_by, listening

from . import oracle
from .helpers import (
    GROUPS,
    MASKS,
    VOCAB,
    adapted,
    build,
    config,
    gemma2,
    gpt_oss,
    hificl_layers,
    inputs_for,
    llama,
    logits,
    mask_of,
    tensors,
)

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


def definition(call: Call, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Alpha (B, H, T) and beta (B, H, T, n), query by query; beta is what unit vectors write beside values of zero."""
    n, heads, scoring = call.pairs.keys.shape[2], call.query.shape[1], call.scoring
    weights = call.pairs.log_weights
    units = torch.eye(n, dtype=call.query.dtype).expand(*call.pairs.keys.shape[:2], n, n)
    nothing = torch.zeros_like(call.key[..., :1]).expand(*call.key.shape[:3], n)
    beta, alpha = oracle.hificl(
        call.query, call.key, nothing, call.pairs.keys, units,
        scaling=scoring.scaling, mask=mask, bias=scoring.bias, softcap=scoring.softcap, sinks=scoring.sinks,
        log_weights=None if weights is None else weights.expand(-1, heads, -1), alpha_one=True,
    )  # fmt: skip
    return (alpha if call.pairs.scale_self_attention else torch.ones_like(alpha)), beta


def mask_seen(call: Call) -> Tensor | None:
    """The mask of a model's own call, broadcastable to (B, H, T, S)."""
    mask, length, size = call.scoring.mask, call.query.shape[2], call.key.shape[2]
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, *mask.shape[:2], length, size, device="cpu")
    if mask is None and call.scoring.is_causal and length > 1:
        return torch.ones(length, size, dtype=torch.bool).tril()[None, None]
    return None if mask is None else mask[..., :size]


def check(records: inspection.Records, calls: list[Call], rows: slice = slice(None)) -> None:
    """Every call's weights are those of the definition, up to the precision of float32."""
    assert calls
    numbers: dict[str, int] = {}
    for call in calls:
        name = records._names[call.layer]
        number = numbers[name] = numbers.get(name, -1) + 1
        found = records[name].calls[number]
        alpha, beta = definition(call, mask_seen(call))
        torch.testing.assert_close(found.alpha[rows], alpha[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.beta[rows], beta[rows], rtol=1e-4, atol=1e-5)
    assert {name: len(record.calls) for name, record in records.items()} == {
        name: number + 1 for name, number in numbers.items()
    }


def call_of(backend: str, heads: str, scoring: Scoring, **kwargs: bool) -> Call:
    torch.manual_seed(0)
    parts = tensors(*GROUPS[heads], length=4, size=6, d=4, e=5, n=3)
    weights = torch.randn(1, 4, 3, dtype=torch.float64)
    pairs = VirtualPairs(parts["virtual_keys"], parts["virtual_values"], log_weights=weights, **kwargs)
    layer = hificl_layers(adapted("gqa"))[0]
    context = (parts[name] for name in ("query", "key", "value"))
    return Call(layer, BACKENDS[backend].attend, layer, *context, pairs, scoring, torch.empty(0))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", GROUPS)
@pytest.mark.parametrize("form", MASKS)
def test_every_mask_form_is_the_definition(form: str, heads: str, backend: str) -> None:
    mask = mask_of(form, 4, 6, 4)
    call = call_of(backend, heads, Scoring(scaling=0.4, mask=mask, dropout=0.5))
    found, (alpha, beta) = weights_of(call), definition(call, mask)
    seen = slice(None) if form != "padded" else slice(0, 1)  # the first queries of a padded row see no context
    torch.testing.assert_close(found.alpha[seen], alpha[seen])
    torch.testing.assert_close(found.beta[seen], beta[seen])
    torch.testing.assert_close(found.alpha, 1 - found.mass)


OPTIONS = {
    "bias": {"bias": torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(1, 1, 4, 6)},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": torch.linspace(-1, 1, 4, dtype=torch.float64)},
}


@pytest.mark.parametrize("alpha_one", [False, True], ids=["", "alpha-1"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_the_definition(option: str, backend: str, alpha_one: bool) -> None:
    scoring = Scoring(scaling=0.4, mask=mask_of("causal", 4, 6, 4), **OPTIONS[option])
    call = call_of(backend, "gqa", scoring, scale_self_attention=not alpha_one)
    found, (alpha, beta) = weights_of(call), definition(call, scoring.mask)
    torch.testing.assert_close(found.alpha, alpha)
    torch.testing.assert_close(found.beta, beta)


MODELS = {
    "mha": lambda: build("mha"),
    "gqa": lambda: build("gqa"),
    "mqa": lambda: llama(kv_heads=1).eval(),
    "sinks": lambda: gpt_oss().eval(),
    "softcap": lambda: gemma2().eval(),
}


def model_of(kind: str, implementation: str, **kwargs: object) -> PeftModel:
    torch.manual_seed(0)
    base = MODELS[kind]()
    base.set_attn_implementation(implementation)
    return get_peft_model(base, config(**kwargs)).eval()


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_models_calls_are_the_definition(implementation: str, kind: str, padded: bool) -> None:
    if kind in ("sinks", "softcap") and implementation == "sdpa":
        pytest.skip("transformers refuses sdpa for this model")
    model, inputs = model_of(kind, implementation, pair_weights=True), inputs_for("gqa")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if padded:
        inputs["attention_mask"][0, :3] = 0
    calls: list[Call] = []
    with torch.no_grad(), heard_by(calls.append), inspection.record(model) as records:
        model(**inputs)
    check(records, calls, slice(1 if padded else 0, None))
    if padded:  # a query of the padded row, as in a row of its own
        with torch.no_grad(), inspection.record(model) as alone:
            model(input_ids=inputs["input_ids"][:1, 3:])
        for name, record in alone.items():
            torch.testing.assert_close(records[name].beta[:1, :, 3:], record.beta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_alpha_one(implementation: str) -> None:
    model = model_of("gqa", implementation, scale_self_attention=False)
    calls: list[Call] = []
    with torch.no_grad(), heard_by(calls.append), inspection.record(model) as records:
        model(**inputs_for("gqa"))
    check(records, calls)
    record = records["model.layers.1.self_attn"]
    assert bool((record.alpha == 1).all()) and bool((record.mass > 0.01).all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_generation_is_one_record_of_all_tokens(implementation: str) -> None:
    model, inputs = model_of("gqa", implementation), inputs_for("gqa")
    with inspection.record(model) as records:
        ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad(), inspection.record(model) as whole:
        model(input_ids=ids[:, :-1])
    for name, record in whole.items():
        assert [call.alpha.shape[2] for call in records[name].calls] == [9, 1, 1, 1]
        torch.testing.assert_close(records[name].alpha, record.alpha, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(records[name].beta, record.beta, rtol=1e-4, atol=1e-5)


def test_columns_of_a_union_and_of_rows() -> None:
    model = adapted("gqa", name="a")
    torch.manual_seed(5)
    model.add_adapter("b", config(n=2))
    inputs, name = inputs_for("gqa", rows=3), "model.layers.0.self_attn"
    alone = {}
    for adapter in "ab":
        model.set_adapter(adapter)
        with torch.no_grad(), inspection.record(model) as records:
            model(**inputs)
        alone[adapter] = records[name]
    with torch.no_grad(), inspection.record(model) as records:
        model(**inputs, adapter_names=["b", "__base__", "a"])
    mixed = records[name]
    a, b = ([inspection.Column(adapter, i) for i in range(n)] for adapter, n in (("a", 3), ("b", 2)))
    assert mixed.columns == [[*b, None], [None] * 3, a]
    torch.testing.assert_close(mixed.beta[2], alone["a"].beta[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed.beta[0, ..., :2], alone["b"].beta[0], rtol=1e-4, atol=1e-5)
    assert not mixed.beta[0, ..., 2].any() and not mixed.beta[1].any() and bool((mixed.alpha[1] == 1).all())

    model.base_model.set_adapter(["a", "b"])
    calls: list[Call] = []
    with torch.no_grad(), heard_by(calls.append), inspection.record(model) as records:
        model(**inputs)
    check(records, calls)
    assert records[name].columns == [[*a, *b]] * 3


@pytest.mark.parametrize("case", ["rows", "union", "compiled"])
def test_columns_beside_an_adapter_of_strength_0(case: str) -> None:
    model = adapted("gqa", name="a")
    model.add_adapter("b", config(n=5))
    for layer in hificl_layers(model):
        layer.set_scale("b", 0)
    if case != "rows":
        model.base_model.set_adapter(["b", "a"])
    run = torch.compile(model, backend="eager") if case == "compiled" else model
    with torch.no_grad(), inspection.record(model) as records:
        run(**inputs_for("gqa"), **({"adapter_names": ["a", "b"]} if case == "rows" else {}))
    torch.compiler.reset()
    for found in records.values():
        assert [len(row) for row in found.columns] == [found.beta.shape[-1]] * 2
        silent = torch.tensor([[column is None or column.adapter == "b" for column in row] for row in found.columns])
        assert found.beta.movedim(-1, 1)[silent].eq(0).all()
        assert found.beta.movedim(-1, 1)[~silent].gt(0).any()


def test_half_precision_is_recorded_in_float32() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    with torch.no_grad(), inspection.record(model) as want:
        model(**inputs)
    with torch.no_grad(), inspection.record(model) as records, torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    first = "model.layers.0.self_attn"
    assert records[first].beta.dtype == torch.float32
    torch.testing.assert_close(records[first].beta, want[first].beta, rtol=0.1, atol=0.01)
    torch.testing.assert_close(records[first].alpha + records[first].mass, torch.ones_like(want[first].alpha))


def test_nothing_changes_for_the_model_and_nothing_is_left() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    want = logits(model, **inputs)
    with pytest.raises(ZeroDivisionError), inspection.record(model):
        assert torch.equal(logits(model, **inputs), want)
        raise ZeroDivisionError
    assert listening.each == ()


def test_gradients_are_those_without_a_record() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    want = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    with inspection.record(model) as records:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not records["model.layers.0.self_attn"].beta.requires_grad
    for got, gradient in zip((p.grad for p in model.parameters() if p.requires_grad), want, strict=True):
        assert torch.equal(got, gradient)


def test_only_this_threads_calls_are_recorded() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    with inspection.record(model) as records:
        thread = threading.Thread(target=lambda: logits(model, **inputs))
        thread.start()
        thread.join()
        assert len(records) == 0
        logits(model, **inputs)
    assert len(records) == 2


def test_only_this_models_calls_are_recorded() -> None:
    model, other, inputs = adapted("gqa"), adapted("gqa"), inputs_for("gqa")
    with inspection.record(model) as records, inspection.record(other.get_base_model().model.layers[0]) as of_other:
        logits(other, **inputs)
    assert not records and list(of_other) == ["self_attn"]


def test_a_compiled_model_is_recorded() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    with torch.no_grad(), inspection.record(model) as want:
        model(**inputs)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.get_base_model(), backend=counter)
    output, traced = logits(compiled, **inputs), []
    for _ in range(2):
        with inspection.record(model) as records:
            assert torch.equal(logits(compiled, **inputs), output)
        for name, record in want.items():
            torch.testing.assert_close(records[name].beta, record.beta)
        assert torch.equal(logits(compiled, **inputs), output)
        traced.append(counter.frame_count)
    assert traced[0] == traced[1] > 1  # the second time, all is in dynamo's cache


def test_a_whole_graph_cannot_be_recorded() -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    logits(compiled, **inputs)
    refused = pytest.raises(torch._dynamo.exc.Unsupported, match="record the model before it is compiled")
    with refused, inspection.record(model):
        logits(compiled, **inputs)
    logits(compiled, **inputs)


def test_what_cannot_be_read_says_why() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no HiFICL adapter"), inspection.record(build("gqa")):
        pass
    model, inputs = adapted("gqa"), inputs_for("gqa")
    with inspection.record(model) as records, model.disable_adapter():
        logits(model, **inputs)
    with pytest.raises(KeyError, match="no call of 'model.layers.0.self_attn' with virtual pairs was recorded"):
        records["model.layers.0.self_attn"]
    with pytest.raises(KeyError, match="no adapted attention 'self_attn'; there are model.layers.0"):
        records["self_attn"]
    with pytest.raises(ValueError, match="Nothing was recorded"):
        records.summary()
    with inspection.record(model) as records:
        logits(model, **inputs)
        logits(model, input_ids=inputs["input_ids"][:1])
    record = records["model.layers.0.self_attn"]
    assert [len(call.alpha) for call in record.calls] == [2, 1]
    with pytest.raises(ValueError, match="different rows or pairs"):
        _ = record.alpha


# -- kinds of tokens, table, sentences ---------------------------------------------------------------------------------


def test_kinds_of_tokens() -> None:
    model, inputs = adapted("vlm"), inputs_for("vlm")
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :2] = 0
    labels = inputs["input_ids"].clone()
    labels[:, :7] = -100
    kinds = inspection.token_kinds(model, **inputs, attention_mask=mask, labels=labels)
    assert kinds[0] == ["first", *["image"] * 4, *["question"] * 2, *["answer"] * 2]
    assert kinds[1] == [*["padding"] * 2, "first", *["image"] * 2, *["question"] * 2, *["answer"] * 2]


def test_the_table_holds_the_tensors() -> None:
    model, inputs = adapted("vlm"), inputs_for("vlm")
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :2] = 0
    with inspection.record(model) as records:
        logits(model, **inputs, attention_mask=mask)
    kinds = inspection.token_kinds(model, **inputs, attention_mask=mask)
    table = records.table(kinds)
    assert list(table) == ["module", "layer", "row", "head", "token", "kind", "alpha", "mass"]
    assert len(table) == 2 * 4 * (9 + 7)
    for entry in table.sample(20, random_state=0).itertuples():
        record = records[entry.module]
        assert list(records)[entry.layer] == entry.module
        assert entry.alpha == record.alpha[entry.row, entry.head, entry.token].item()
        assert entry.mass == record.mass[entry.row, entry.head, entry.token].item()
        assert entry.kind == kinds[entry.row][entry.token] != "padding"
    means = table.groupby(["kind", "layer", "head"])["mass"].mean()
    by_kind = records.by_kind(kinds)
    assert by_kind.keys() == {"first", "image", "question"}
    for kind, masses in by_kind.items():
        torch.testing.assert_close(masses.flatten(), torch.tensor(means[kind].to_numpy()), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="kinds has 1 rows of up to 9 tokens, but 2 rows of 9 tokens were recorded"):
        records.table(kinds[:1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_without_kinds_the_mask_says_where_a_row_begins(implementation: str, side: str) -> None:
    model, inputs = adapted("gqa"), inputs_for("gqa")
    model.set_attn_implementation(implementation)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, : 3 if side == "left" else None][-3:] = 0
    kinds = inspection.token_kinds(model, **inputs)
    assert kinds[0].count("padding") == 3
    with inspection.record(model) as records:
        logits(model, **inputs)
    known = records.by_kind(kinds)
    assert records.by_kind().keys() == {"first", "other"}
    torch.testing.assert_close(records.by_kind()["first"], known["first"])
    torch.testing.assert_close(records.by_kind()["other"], known["question"])
    assert records.table().mass.tolist() == records.table(kinds).mass.tolist()
    assert records.summary().splitlines()[0] == records.summary(kinds).splitlines()[0]

    if side == "left":
        with inspection.record(model) as records:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        torch.testing.assert_close(records.by_kind()["first"], known["first"])
        assert records["model.layers.0.self_attn"].weights.seen.sum(dim=1).tolist() == [8, 11]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_without_kinds_the_mask_of_an_encoder_says_it(implementation: str) -> None:
    """All its tokens see those that are no padding, padding too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = tf.BertModel(tf.BertConfig(vocab_size=VOCAB, **sizes))
    base.set_attn_implementation(implementation)
    model = get_peft_model(base, config()).eval()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with inspection.record(model) as records, torch.no_grad():
        model(input_ids=inputs_for("gqa")["input_ids"], attention_mask=mask)
    (record,) = records.values()
    assert torch.equal(record.weights.seen, mask.bool())


def test_the_summary_warns_of_a_first_token_without_attention_of_its_own() -> None:
    model, inputs = adapted("gqa", init_weights=True, n=9), inputs_for("gqa")
    with inspection.record(model) as records:
        logits(model, **inputs)
    first = records.by_kind()["first"].mean(dim=1)
    assert bool((first > 0.5).all())
    lines = records.summary().splitlines()
    share = f"{100 * first.mean():.0f} %"
    assert lines[0] == (
        f"The pairs take {share} of the first token's attention, averaged over 2 layers; in 2 of them more than half, "
        f"{share} on average."
    )
    assert "attention sink" in lines[1]
    generated = inspection.token_kinds(model, inputs["input_ids"][:, :3])
    assert "the answer tokens' attention" in records.summary(generated)

    model = adapted("gqa", scale_self_attention=False)
    with inspection.record(model) as records:
        logits(model, **inputs)
    assert "attention sink" not in records.summary()

    model = adapted("gqa", pair_weights=True)
    with torch.no_grad():
        for layer in hificl_layers(model):
            layer.hificl_W["default"].weight.fill_(-30.0)
    with inspection.record(model) as records:
        logits(model, **inputs)
    assert records.summary().splitlines() == [
        "The pairs take 0 % of the first token's attention, averaged over 2 layers.",
        "The pairs take 0 % of the other tokens' attention, averaged over 2 layers.",
        "24 of 24 pairs never take 1 % of any token's attention.",
    ]


def test_the_tensors_need_no_extra() -> None:
    code = (
        "import sys; from peft_hificl import inspection; "
        "assert not {'pandas', 'matplotlib'} & sys.modules.keys(), 'an extra was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
