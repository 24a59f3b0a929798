"""Flash attention packages: the merge with their outputs, and their place in transformers' models.

No package is run here: stand-ins take their place, with the real signatures (`flash_packages`).
tests/test_gpu_flash.py runs whatever is installed on a GPU.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import modeling_flash_attention_utils as transformers_own
from transformers.generation import ContinuousBatchingConfig
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_hificl import Scoring, VirtualPairs, inspection, interface, support
from peft_hificl.ops import merged
from peft_hificl.ops.kernels import Call
from peft_hificl.ops.packages import (
    Packing,
    package_of,
    sequences_of_mask,
    sequences_of_positions,
    sequences_of_starts,
)

from . import cuda_kernels, oracle
from .flash_packages import SIGNATURES, functions, package
from .helpers import GROUPS, adapted, build, config, gemma2, gpt_oss, inputs_for, llama, logits, tensors

FAMILIES = list(SIGNATURES)


@pytest.fixture(autouse=True)
def _any_dtype(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Stand-ins take float64, too."""
    if "real_limits" not in request.fixturenames:
        monkeypatch.setattr(Packing, "limits", lambda self, call: None)


@pytest.fixture
def real_limits() -> None:
    """For `_any_dtype`."""


# -- the merge -------------------------------------------------------------------------------------------------------

PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
HOLES = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]])
DOCUMENTS = [3, 1, 2]
# Rows, queries, keys, and what says which tokens form a sequence.
CASES: dict[str, tuple[int, int, int, Callable[[], Any]]] = {
    "rows": (2, 5, 5, lambda: None),
    "decode": (2, 1, 6, lambda: None),
    "more-keys": (2, 3, 6, lambda: None),
    "padded": (2, 6, 6, lambda: sequences_of_mask(PADDED, 6)),
    "holes": (2, 6, 6, lambda: sequences_of_mask(HOLES, 6)),
    "padded-decode": (2, 1, 6, lambda: sequences_of_mask(PADDED, 1)),
    "padded-more-keys": (2, 3, 6, lambda: sequences_of_mask(PADDED, 3)),
    "positions": (1, 6, 6, lambda: sequences_of_positions(torch.tensor([[4, 5, 6, 4, 4, 5]]))),
    "positions-of-a-cut-row": (1, 6, 6, lambda: sequences_of_positions(torch.tensor([[5, 6, 7, 4, 4, 5]]))),
    "starts": (1, 6, 6, lambda: sequences_of_starts(*[torch.tensor([0, 3, 4, 6])] * 2, torch.tensor(3), 3)),
    "starts-and-padding": (1, 8, 8, lambda: sequences_of_starts(*[torch.tensor([0, 3, 4, 6])] * 2, torch.tensor(3), 3)),
}


def visible(case: str, is_causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """The mask (B, 1, T, S) written out, and the queries (B, T) that are not padding."""
    rows, length, size, _ = CASES[case]
    mask, real = torch.zeros(rows, 1, length, size, dtype=torch.bool), torch.ones(rows, length, dtype=torch.bool)
    for b in range(rows):
        if case.startswith(("positions", "starts")):
            documents = [i for i, n in enumerate(DOCUMENTS) for _ in range(n)]
            keys = dict(enumerate(documents))
        else:
            shown = {"holes": HOLES}.get(case, PADDED if "padded" in case else torch.ones(2, size))[b]
            keys = {s: 0 for s in range(size) if shown[s]}
        place = {s: sum(keys[k] == document for k in keys if k < s) for s, document in keys.items()}
        for t in range(length):
            s_of_t = t + size - length
            if s_of_t not in keys:
                real[b, t] = False
                continue
            for s in keys:
                distance = place[s_of_t] - place[s]
                mask[b, 0, t, s] = (
                    keys[s] == keys[s_of_t]
                    and (not is_causal or distance >= 0)
                    and (window is None or abs(distance) <= window)
                )
    return mask, real


def check(
    family: str, case: str, groups: str, is_causal: bool = True, window: int | None = None, head_dim: int = 8,
    sinks: bool = False, log_weights: bool = False, alpha_one: bool = False, first: bool = False,
    rows_of_pairs: int = 1,
) -> ModuleType:  # fmt: skip
    """Output and every gradient against the definition; zero for padding."""
    torch.manual_seed(0)
    heads, kv = GROUPS[groups]
    rows, length, size, sequences = CASES[case]
    x = tensors(heads, kv, length, size, head_dim, head_dim, 3, rows)
    if rows_of_pairs > 1:
        for name in ("virtual_keys", "virtual_values"):
            x[name] = torch.randn(rows, *x[name].shape[1:], dtype=torch.float64)
    if sinks:
        x["sinks"] = torch.randn(heads, dtype=torch.float64)
    if log_weights:
        x["log_weights"] = torch.randn(1, heads, 3, dtype=torch.float64)
    mask, real = visible(case, is_causal, window)
    want_in, y = ({name: t.clone().requires_grad_() for name, t in x.items()} for _ in range(2))
    want, _ = oracle.hificl(**want_in, scaling=0.3, mask=mask, alpha_one=alpha_one, skip_first_token=first)
    want = torch.where(real[:, None, :, None], want, 0)  # as a package leaves padding

    module = package(family)
    packing = Packing(package_of(*functions(module)), sequences(), is_causal, window, deterministic=True)
    assert torch.equal(packing.mask(x["query"], x["key"]), mask)
    pairs = VirtualPairs(y["virtual_keys"], y["virtual_values"], y.get("log_weights"), not alpha_one, first)
    args = (y["query"], y["key"], y["value"], pairs, Scoring(0.3, mask=packing, sinks=y.get("sinks")))
    assert merged.attention_path(*args).kernel == f"{family}_stand_in"
    got = merged.attention(*args)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    direction = torch.randn_like(want)
    expected = torch.autograd.grad(want, list(want_in.values()), direction)
    for name, a, b in zip(x, torch.autograd.grad(got, list(y.values()), direction), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(merged.attention(*args), want, rtol=0, atol=1e-10)
    assert all(call["deterministic"] for name, call in module.calls if "dout" in call)
    return module


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients(family: str, case: str) -> None:
    module = check(family, case, "gqa")
    rows = case in ("rows", "decode", "more-keys")
    names = ["flash_attn_func" if rows else "flash_attn_varlen_func"] * 2
    backwards = [name for name in SIGNATURES[family] if name.startswith("_")]
    assert [name for name, _ in module.calls] == [names[0], backwards[0 if rows else -1], names[1]]


@pytest.mark.parametrize("groups", ["mha", "mqa"])
@pytest.mark.parametrize("case", ["rows", "padded"])
def test_groups(case: str, groups: str) -> None:
    check("fa2", case, groups)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("window", [None, 0, 1])
@pytest.mark.parametrize("case", ["rows", "more-keys", "padded", "holes", "positions"])
@pytest.mark.parametrize("family", ["fa2", "fa2-old", "fa4"])
def test_windows_with_and_without_causality(family: str, case: str, window: int | None, is_causal: bool) -> None:
    check(family, case, "gqa", is_causal, window)


@pytest.mark.parametrize("case", ["rows", "padded", "padded-decode", "positions"])
@pytest.mark.parametrize(
    "options",
    [
        {"sinks": True},
        {"log_weights": True},
        {"alpha_one": True},
        {"first": True},
        {"first": True, "is_causal": False},
        {"first": True, "window": 0},
        {"rows_of_pairs": 2},
        {"head_dim": 6},
        {"sinks": True, "log_weights": True, "alpha_one": True, "first": True, "head_dim": 12},
    ],
    ids="-".join,
)
def test_all_that_pairs_can_be(options: dict[str, Any], case: str) -> None:
    check("fa2", case, "gqa", **options)


@pytest.mark.parametrize("options", [{}, {"alpha_one": True, "sinks": True}, {"first": True}], ids="-".join)
@pytest.mark.parametrize("case", ["rows", "padded", "padded-decode", "padded-more-keys", "positions"])
@pytest.mark.parametrize("kernel", cuda_kernels.NAMES)
def test_the_pairs_are_computed_by_each_of_cudas_kernels(
    kernel: str, case: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the layout of what the package gives."""
    cuda_kernels.take_the_place_of_the_cpus(monkeypatch, kernel)
    check(FAMILIES[0], case, "gqa", **options)


def test_where_the_package_cannot_the_other_kernels_compute(real_limits: None) -> None:
    """In float32, and with what no LSE can express: as under sdpa, with a mask."""
    torch.manual_seed(1)
    module = package("fa2")
    x = {name: t.float() for name, t in tensors(4, 2, 6, 6, 8, 8, 3).items()}
    pairs = VirtualPairs(x.pop("virtual_keys"), x.pop("virtual_values"))
    packing = Packing(package_of(*functions(module)), sequences_of_mask(PADDED, 6))
    mask = packing.mask(x["query"], x["key"])
    for options, kernel in ({}, "flash"), ({"softcap": 0.5}, None):
        path = merged.attention_path(*x.values(), pairs, Scoring(0.3, mask=packing, **options))
        assert path.kernel == kernel
        got, want = (merged.attention(*x.values(), pairs, Scoring(0.3, mask=m, **options)) for m in (packing, mask))
        assert torch.equal(got, want)
    assert not module.calls
    half = [t.bfloat16() for t in x.values()]
    assert merged.attention_path(*half, pairs, Scoring(0.3, mask=packing)).kernel == packing.package.name
    wide = [torch.nn.functional.pad(t, (0, 256)) for t in half]
    assert merged.attention_path(*wide, pairs, Scoring(0.3, mask=packing)).kernel == "flash"
    assert "up to 256" in packing.limits(merged.Call(*wide, None, False, 0.3))
    assert "float16 or bfloat16" in packing.limits(merged.Call(*x.values(), None, False, 0.3))


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_a_query_that_no_key_is_visible_to(sinks: bool) -> None:
    """A new token of a row of nothing but padding: zero, as without an adapter, and no gradient."""
    x = {name: t.requires_grad_() for name, t in tensors(4, 2, 1, 6, 8, 8, 3).items()}
    mask = torch.stack([torch.zeros(6), PADDED[0]])
    packing = Packing(package_of(*functions(package("fa2"))), sequences_of_mask(mask, 1))
    pairs = VirtualPairs(x["virtual_keys"], x["virtual_values"])
    scoring = Scoring(0.3, mask=packing, sinks=torch.randn(4, dtype=torch.float64) if sinks else None)
    output = merged.attention(x["query"], x["key"], x["value"], pairs, scoring)
    assert not output[0].any() and output[1].all()
    output.sum().backward()
    assert not x["query"].grad[0].any() and all(t.grad.isfinite().all() for t in x.values())


def test_sequences_are_found_as_transformers_finds_them() -> None:
    x = torch.randn(2, 6, 4, 8)
    for mask, length in (PADDED, 6), (HOLES, 6), (PADDED, 3), (PADDED, 1), (HOLES, 1), (HOLES[:, -1:], 1):
        mine = sequences_of_mask(mask, length)
        size = mask.shape[1]
        *_, places, (query_starts, key_starts), (most_queries, most_keys) = transformers_own._upad_input(
            x[:, :length], x[:, :size], x[:, :size], mask, length, transformers_own._unpad_input
        )
        assert torch.equal(mine.queries, places.long())
        assert torch.equal(mine.query_starts, query_starts) and torch.equal(mine.key_starts, key_starts)
        assert (mine.most_queries, mine.most_keys) == (most_queries, most_keys)
    for positions in ([0, 1, 2, 3], [7, 8, 9], [0, 1, 0, 0, 1], [2, 3, 2]):
        ids = torch.tensor([positions])
        found = sequences_of_positions(ids)
        assert (found is None) == (not transformers_own._is_packed_sequence(ids, 1))
        if found is not None:
            (starts, _), (most, _) = transformers_own.prepare_fa_kwargs_from_position_ids(ids)
            assert torch.equal(found.query_starts, starts) and found.most_queries == int(most)


def test_a_row_that_is_cut_after_the_first_token_of_a_document() -> None:
    found = sequences_of_positions(torch.tensor([7, 4, 5, 4]))
    assert found is not None and found.query_starts.tolist() == found.key_starts.tolist() == [0, 1, 3, 4]
    assert (found.most_queries, found.most_keys) == (2, 2)


def test_sequences_of_more_keys_than_queries() -> None:
    found = sequences_of_starts(torch.tensor([0, 1, 3]), torch.tensor([0, 4, 9]), 2, 5)
    assert (found.most_queries, found.most_keys) == (2, 5)
    packing = Packing(package_of(*functions(package("fa2"))), found)
    mask = packing.mask(torch.randn(1, 4, 3, 8), torch.randn(1, 2, 9, 8))
    assert mask[0, 0].int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0, 0],  # the last of four tokens
        [0, 0, 0, 0, 1, 1, 1, 1, 0],  # the last two of five
        [0, 0, 0, 0, 1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("window", [None, 0, 1, 5])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_queries_that_see_one_key(case: str, is_causal: bool, window: int | None) -> None:
    """As the mask has it, which is not made for them."""
    rows, length, size, sequences = CASES[case]
    packing = Packing(package_of(*functions(package("fa2"))), sequences(), is_causal, window)
    query, key = torch.randn(rows, 4, length, 8), torch.randn(rows, 2, size, 8)
    mask, real = visible(case, is_causal, window)
    assert torch.equal(packing.mask(query, key), mask)
    assert torch.equal(packing.sees_one_key(query, key), (mask.sum(-1) == 1) & real[:, None])


def test_the_largest_head_dimension(real_limits: None) -> None:
    limits = Packing(package_of(*functions(package("fa2")))).limits
    calls = [Call(*torch.randn(3, 1, 2, 5, dim, dtype=torch.bfloat16), None, False, 1.0) for dim in (256, 264)]
    assert [limits(call) for call in calls] == [None, "flash attention packages want a head dimension up to 256"]


# -- packages that HiFICL cannot use ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"_flash_attn_backward": None, "_flash_attn_varlen_backward": None}, "no backward that takes a log-sum-exp"),
        ({"flash_attn_func": "q, k, v, softmax_scale=None"}, "flash_attn_func does not take causal, window_size"),
        (
            {"_flash_attn_varlen_backward": "dout, q, k, v, out, lse, dq, dk, dv, softmax_scale, causal, window_size"},
            "does not take deterministic, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k",
        ),
        (
            {"_flash_attn_backward": SIGNATURES["fa2-old"]["_flash_attn_backward"].replace("rng_state=None", "seed")},
            "_flash_attn_backward wants seed",
        ),
    ],
    ids=["no-backward", "forward", "backward", "unknown"],
)
def test_a_package_without_what_is_needed_is_named(changes: dict[str, str | None], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        package_of(*functions(package("fa2-old", changes)))


def test_a_package_of_one_function() -> None:
    module = package("fa2")
    for both in (None, module.flash_attn_varlen_func), (module.flash_attn_func, None):
        with pytest.raises(ValueError, match="fa2_stand_in has no flash_attn_func or no flash_attn_varlen_func"):
            package_of(*both)


@pytest.mark.parametrize("case", ["rows", "padded"])
@pytest.mark.parametrize("found", ["alone", "another-shape"])
def test_a_package_that_returns_no_lse_is_refused(case: str, found: str) -> None:
    """As FlashAttention-3 did for a while, and FlashAttention-2 before 2.6 for sequences."""
    rows, length, size, sequences = CASES[case]
    x = tensors(4, 2, length, size, 8, 8, 3, rows)
    pairs = VirtualPairs(x.pop("virtual_keys"), x.pop("virtual_values"))
    packing = Packing(package_of(*functions(package("fa3-vllm"))), sequences())

    def changed(**values: Any) -> Any:
        output = torch.zeros_like(values["q"])
        return output if found == "alone" else (output, output.new_zeros(rows, 4, 128))

    both = {name: getattr(packing.package, name)._replace(call=changed) for name in ("rows", "sequences")}
    packing = packing._replace(package=packing.package._replace(**both))
    with pytest.raises(ValueError, match=r"fa3-vllm_stand_in gives no log-sum-exp of shape \(.*newer version"):
        merged.attention(*x.values(), pairs, Scoring(0.3, mask=packing))


# -- in transformers' models -----------------------------------------------------------------------------------------

NAME, HUB = "flash_attention_2", "kernels-community/flash-attn2"


@pytest.fixture(params=["fa2", "fa3-vllm"])
def loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """transformers has loaded a stand-in under `NAME`; what is adapted is as transformers itself computes it."""
    module = package(request.param)
    pad, unpad = transformers_own._pad_input, transformers_own._unpad_input

    def found(implementation: str, *_: Any, **__: Any) -> tuple[Any, ...]:
        assert implementation in (NAME, HUB)
        return *functions(module), None, pad, unpad

    monkeypatch.setattr(transformers_own, "_lazy_imports", found)
    monkeypatch.setattr(transformers_own, "_loaded_implementation", None)
    yield module
    transformers_own._loaded_implementation = None


def switched(model: tf.PreTrainedModel | PeftModel, name: str = NAME) -> Any:
    """Without transformers' check for a GPU."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.config._attn_implementation_internal = name
    return model


def small(kind: str) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "initializer_range": 0.2}
    if kind == "mistral":  # a window in every layer
        sizes |= {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 3, "pad_token_id": 0}
        return tf.MistralForCausalLM(tf.MistralConfig(**sizes)).eval()
    if kind == "bert":  # both ways
        return tf.BertForMaskedLM(tf.BertConfig(**sizes)).eval()
    return {"llama": llama, "gpt_oss": gpt_oss, "gemma2": gemma2}[kind]().eval()


def with_pairs(kind: str, **options: Any) -> PeftModel:
    base = small(kind)
    torch.manual_seed(1)
    return get_peft_model(base, config(**options)).eval()


KINDS = ["llama", "mistral", "gpt_oss", "gemma2", "bert"]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_what_it_does_in_eager(kind: str, padded: bool, loaded: ModuleType) -> None:
    """Grouped queries, windows, sinks, a soft-cap, attention both ways; values and gradients of the pairs."""
    inputs = inputs_for("gqa")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if padded:
        inputs["attention_mask"][0, :3] = 0
    real = inputs["attention_mask"].bool()
    grads = []
    for name in ("eager", NAME):
        model = switched(with_pairs(kind), name)
        output = model(**inputs).logits[real]
        output.square().sum().backward()
        grads.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    called = {name for name, _ in loaded.calls}
    used = "flash_attn_varlen_func" if padded else "flash_attn_func"
    assert called == (set() if kind == "gemma2" else {used, *(n for n in called if n.startswith("_"))})
    assert kind == "gemma2" or any("dout" in x for _, x in loaded.calls)


def test_the_base_model_itself_agrees(loaded: ModuleType) -> None:
    """transformers' own function with the stand-in: what the other tests stand on."""
    inputs = inputs_for("gqa")
    want = logits(build("gqa"), **inputs)
    torch.testing.assert_close(logits(switched(build("gqa")), **inputs), want, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in loaded.calls} == {"flash_attn_func"}


def test_disabled_and_without_adapters_it_is_the_base_model(loaded: ModuleType) -> None:
    inputs = inputs_for("gqa")
    want = logits(switched(build("gqa")), **inputs)
    model = switched(adapted("gqa"))
    assert not torch.equal(logits(model, **inputs), want)
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs), want)
    assert torch.equal(logits(model.unload(), **inputs), want)


def test_attaching_to_and_saving_a_model_under_the_package(loaded: ModuleType, tmp_path: Any) -> None:
    inputs = inputs_for("gqa")
    base = switched(build("gqa"))
    torch.manual_seed(1)
    model = get_peft_model(base, config()).eval()
    model.save_pretrained(tmp_path)
    want = logits(model, **inputs)
    again = PeftModel.from_pretrained(switched(build("gqa")), tmp_path)
    assert torch.equal(logits(again, **inputs), want)


@pytest.mark.parametrize("given", ["positions", "lengths"])
def test_documents_in_one_row_are_as_each_alone(given: str, loaded: ModuleType) -> None:
    """Padding-free batches, as data collators make them."""
    model = switched(with_pairs("llama", skip_first_token=True))
    documents = [torch.randint(5, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in (4, 1, 6)]
    want = torch.cat([logits(model, input_ids=ids) for ids in documents], dim=1)
    loaded.calls.clear()
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents])[None]
    more: dict[str, Any] = {}
    if given == "lengths":
        starts = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
        more = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 6, "max_length_k": 6}
    got = logits(model, input_ids=torch.cat(documents, dim=1), position_ids=positions, **more)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in loaded.calls} == {"flash_attn_varlen_func"}
    loss = model(
        input_ids=torch.cat(documents, dim=1), position_ids=positions, labels=torch.cat(documents, dim=1), **more
    ).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_generation_with_and_without_a_cache(kind: str, cache: str | None, loaded: ModuleType) -> None:
    inputs = inputs_for("gqa")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :4] = 0
    inputs["input_ids"][1, :4] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = switched(with_pairs(kind), "eager").generate(**inputs, **settings, use_cache=False)
    options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    model = switched(with_pairs(kind))
    assert torch.equal(model.generate(**inputs, **settings, **options), want)
    assert torch.equal(model.generate(**inputs, **settings, use_cache=False), want)


def test_an_adapter_of_its_own_for_each_row(loaded: ModuleType) -> None:
    model = adapted("gqa", name="a")
    torch.manual_seed(5)
    model.add_adapter("b", config(n=2))
    inputs = inputs_for("gqa", rows=3)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :2] = 0
    names = ["b", "__base__", "a"]
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = model(**inputs, adapter_names=names).logits[real]
        got = switched(model)(**inputs, adapter_names=names).logits[real]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_half_precision_is_computed_by_the_package(loaded: ModuleType, real_limits: None) -> None:
    """A query in float32 is cast as transformers casts it; whatever stays in float32 is computed as under sdpa."""
    inputs = inputs_for("gqa")
    exact = logits(adapted("gqa"), **inputs)
    assert torch.equal(logits(switched(adapted("gqa")), **inputs), exact) and not loaded.calls
    model = switched(adapted("gqa").to(torch.bfloat16))
    got = logits(model, **inputs)
    assert got.dtype == torch.bfloat16 and len(loaded.calls) == 2
    assert float((got.float() - exact).norm() / exact.norm()) < 0.05
    attention = model.get_base_model().model.layers[0].self_attn
    query, key, value = torch.randn(3, 1, 4, 5, 16)
    got, _ = interface.hificl_attention_forward(attention, query, key[:, :2], value[:, :2], None)
    assert got.dtype == torch.bfloat16 and loaded.calls[-1][1]["q"].dtype == torch.bfloat16


def test_dropout_in_training_drops_pairs_too(loaded: ModuleType) -> None:
    """By the formula, as under the other implementations."""
    model = switched(with_pairs("llama"))
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.999
    inputs = inputs_for("gqa")
    model.train()
    torch.manual_seed(0)
    dropped = logits(model, **inputs)
    model.eval()
    assert not loaded.calls and float((dropped - logits(model, **inputs)).norm()) > 0.1
    assert loaded.calls


def test_what_pairs_take_is_recorded(loaded: ModuleType, real_limits: None) -> None:
    inputs = inputs_for("gqa")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :3] = 0
    found = []
    for name in ("sdpa", NAME):
        model = switched(with_pairs("llama").to(torch.bfloat16), name)
        with inspection.record(model) as records:
            logits(model, **inputs)
        found.append(records["model.layers.0.self_attn"].weights)
    want, got = found
    assert torch.equal(got.seen, want.seen) and got.beta.dtype == torch.float32
    seen = want.seen[:, None].expand(want.alpha.shape)
    torch.testing.assert_close(got.beta[seen], want.beta[seen], rtol=1e-4, atol=1e-5)


def test_a_kernel_from_the_hub(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers registers its own function under the name of the repository."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, HUB, flash_attention_forward)
    inputs = inputs_for("gqa")
    model = adapted("gqa")
    want = logits(model, **inputs)
    torch.testing.assert_close(logits(switched(model, HUB), **inputs), want, rtol=1e-4, atol=1e-4)
    assert loaded.calls


def test_a_function_in_the_place_of_transformers_own_is_refused(
    loaded: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = switched(adapted("gqa"))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, NAME, functools.partial(flash_attention_forward))
    with pytest.raises(ValueError, match="has taken the place of transformers' own|replaces 'flash_attention_2'"):
        logits(model, **inputs_for("gqa"))


def test_a_package_that_cannot_be_loaded_is_refused() -> None:
    """In a sentence that names it and what to do, before anything is changed."""
    for name in (NAME, "flash_attention_3"):
        base = switched(build("gqa"), name)
        with pytest.raises((TypeError, ValueError), match=f"{name}.*LlamaAttention.*cannot be loaded.*'sdpa'"):
            get_peft_model(base, config())
        assert not hasattr(base.model.layers[0].self_attn, "virtual_pairs")


def test_a_package_without_a_backward_is_refused(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = package("fa2", {"_flash_attn_backward": None, "_flash_attn_varlen_backward": None})
    monkeypatch.setattr(transformers_own, "_lazy_imports", lambda *args, **kwargs: (*functions(lacking), *[None] * 3))
    base = switched(build("gqa"))
    with pytest.raises((TypeError, ValueError), match="fa2_stand_in has no backward that takes a log-sum-exp"):
        get_peft_model(base, config())
    assert "no backward" in support.why_unsupported(base.model.layers[0].self_attn)


def test_calls_that_packages_would_misread_are_refused(loaded: ModuleType) -> None:
    model = switched(adapted("gqa"))
    attention = model.get_base_model().model.layers[0].self_attn
    query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    one, starts = (query[:1], key[:1], key[:1]), torch.tensor([0, 5])
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}
    for arguments, keywords, reason in [
        ((query, key, key, torch.ones(2, 1, 5, 5)), {}, "a mask of 4 dimensions.*padding alone"),
        ((query, key, key, None), lengths, "cu_seq_lens_q for 2 rows"),
        ((query, key, key, None), {"position_bias": torch.zeros(1, 4, 5, 5)}, "position biases"),
        ((*one, None), {"position_ids": torch.zeros(3, 1, 5)}, r"position_ids of shape \(3, 1, 5\) for 5 tokens"),
        ((one[0][:, :, :3], *one[1:], None), {"position_ids": torch.tensor([[0, 1, 0]])}, "documents.*and a cache"),
    ]:
        with pytest.raises(ValueError, match=reason):
            interface.hificl_attention_forward(attention, *arguments, **keywords)
    assert not loaded.calls


def test_continuous_batching_is_refused(loaded: ModuleType) -> None:
    model = switched(adapted("gqa"))
    with pytest.raises(ValueError, match=f"no paged cache under '{NAME}'.*'sdpa'"):
        model.generate_batch(inputs=[[1, 2]], continuous_batching_config=ContinuousBatchingConfig())


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["fa2"], indirect=True)
def test_compiled(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With breaks where the package is called, which is not what real ones need."""
    monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
    inputs = inputs_for("gqa")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :3] = 0
    results = []
    for compiled in (False, True):
        model = switched(with_pairs("llama"))
        torch._dynamo.reset()
        output = (torch.compile(model, backend="eager") if compiled else model)(**inputs).logits
        output[inputs["attention_mask"].bool()].square().sum().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def traced(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """A package's function that torch.compile can look into."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("loaded", ["fa2"], indirect=True)
def test_disabled_adapters_compile_whole(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "flash_attn_func", traced)
    inputs = inputs_for("gqa")
    want = logits(switched(build("gqa").bfloat16()), **inputs)
    model = switched(adapted("gqa").bfloat16())
    model.base_model.disable_adapter_layers()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, **inputs), want)
