"""`heads="kv"`: pairs that all query heads of a key/value head share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_hificl import HiFICLConfig, VirtualPairs, concatenate_pairs, initialize_from_demonstrations, select_rows

from . import oracle
from .helpers import (
    BUILDERS,
    GROUPS,
    adapted,
    build,
    config,
    hificl_layers,
    inputs_for,
    llama,
    logits,
    pairs_for,
    train,
)
from .zoo import recorded_attention

HEADS = 4  # query heads


def base_of(grouping: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return llama(kv_heads=GROUPS[grouping][1]).eval()


@pytest.fixture(params=list(GROUPS))
def shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    """A model with a shared adapter, for each grouping of heads."""
    monkeypatch.setitem(BUILDERS, "one", lambda: base_of(request.param))
    return adapted("one", heads="kv", pair_weights=True)


def groups_of(model: nn.Module) -> int:
    return hificl_layers(model)[0].head_shape.groups


def per_query_head(model: PeftModel, kind: str) -> PeftModel:
    """The same pairs in an adapter that has them per query head."""
    other = adapted(kind, pair_weights=True)
    with torch.no_grad():
        for (_, target), (_, source) in zip(factors(other), factors(model), strict=True):
            target.copy_(source.repeat_interleave(len(target) // len(source), dim=0))
    return other


def factors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if "hificl_" in name]


def test_parameters_are_those_of_the_key_value_heads(shared: PeftModel) -> None:
    groups = groups_of(shared)
    shapes = {name.split(".")[-3]: tuple(p.shape) for name, p in factors(shared)}
    assert shapes == {
        "hificl_K_A": (groups, 3, 2), "hificl_K_B": (groups, 2, 16), "hificl_V_A": (groups, 3, 2),
        "hificl_V_B": (groups, 2, 16), "hificl_W": (groups, 3),
    }  # fmt: skip


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_every_call_is_the_definition(shared: PeftModel, implementation: str) -> None:
    shared.get_base_model().set_attn_implementation(implementation)
    with torch.no_grad(), recorded_attention() as calls:
        shared(**inputs_for("gqa"))
    assert len(calls) == 2
    times = HEADS // groups_of(shared)
    for call in calls:
        layer = call.module.virtual_pairs
        pairs, weights = pairs_for(layer, len(call.query)), layer.hificl_W["default"].weight
        assert pairs.keys.shape == (1, groups_of(shared), 3, 16) and weights.shape == (groups_of(shared), 3)
        want, _ = oracle.hificl(
            call.query, call.key, call.value, *(t.repeat_interleave(times, dim=1) for t in pairs[:2]),
            scaling=call.options["scaling"], log_weights=weights.repeat_interleave(times, dim=0)[None],
            mask=torch.ones(9, 9, dtype=torch.bool).tril()[None, None],
        )  # fmt: skip
        torch.testing.assert_close(call.output, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_are_the_sums_over_the_query_heads(shared: PeftModel, implementation: str) -> None:
    inputs = inputs_for("gqa")
    models = {"kv": shared, "query": per_query_head(shared, "one")}
    for model in models.values():
        model.get_base_model().set_attn_implementation(implementation)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.testing.assert_close(logits(shared, **inputs), logits(models["query"], **inputs), rtol=1e-5, atol=1e-5)
    for (name, got), (_, want) in zip(*map(factors, models.values()), strict=True):
        assert want.grad.any()
        per_group = want.grad.unflatten(0, (len(got), -1)).sum(1)
        torch.testing.assert_close(got.grad, per_group, rtol=1e-4, atol=1e-6, msg=name)


def test_generation_with_and_without_a_cache(shared: PeftModel) -> None:
    ids = inputs_for("gqa")["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(shared.generate(input_ids=ids, use_cache=cache, **options) for cache in (True, False)))


def test_it_compiles_whole(shared: PeftModel) -> None:
    torch._dynamo.reset()
    inputs = inputs_for("gqa")
    compiled = torch.compile(shared.get_base_model(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, **inputs), logits(shared, **inputs), rtol=1e-4, atol=1e-5)


def test_it_trains_and_reloads(shared: PeftModel, tmp_path: Path) -> None:
    before = [p.detach().clone() for _, p in factors(shared)]
    train(shared, "gqa")
    assert all(not torch.equal(p, old) for (_, p), old in zip(factors(shared), before, strict=True))
    shared.save_pretrained(tmp_path)
    assert "per key/value head" in (tmp_path / "README.md").read_text()
    want = logits(shared, **inputs_for("gqa"))
    assert torch.equal(logits(PeftModel.from_pretrained(build("one"), tmp_path), **inputs_for("gqa")), want)
    base = build("one")
    base.load_adapter(tmp_path)  # transformers' own
    assert torch.equal(logits(base, **inputs_for("gqa")), want)


def test_a_file_from_before_the_option_is_one_per_query_head(tmp_path: Path) -> None:
    model = adapted("gqa")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    assert stored.pop("heads") == "query"
    path.write_text(json.dumps(stored))
    loaded = PeftModel.from_pretrained(build("gqa"), tmp_path)
    assert torch.equal(logits(loaded, **inputs_for("gqa")), logits(model, **inputs_for("gqa")))


def test_a_file_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    adapted("gqa", heads="kv").save_pretrained(tmp_path)
    message = r"has shape \(2, 3, 2\), but that of this adapter \(n=3, r=2, heads='query'\) .* has \(4, 3, 2\)"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(build("gqa"), tmp_path, config=config())


def test_unknown_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="HiFICLConfig.heads must be 'query' or 'kv', found 'key'"):
        HiFICLConfig(heads="key")
    with pytest.raises(TypeError, match="HiFICLConfig.heads must be 'query' or 'kv', found 4"):
        HiFICLConfig(heads=4)


# -- beside adapters with pairs per query head ------------------------------------------------------------------------


def with_both(shared: PeftModel) -> PeftModel:
    torch.manual_seed(5)
    shared.add_adapter("query", config(n=2))
    return shared


def test_a_union_of_both_kinds_is_the_definition(shared: PeftModel) -> None:
    with_both(shared).base_model.set_adapter(["default", "query"])
    layer = hificl_layers(shared)[0]
    of_shared, of_query = layer._pairs("default"), layer._pairs("query")
    times = HEADS // groups_of(shared)
    with torch.no_grad(), recorded_attention() as calls:
        shared(**inputs_for("gqa"))
    call = calls[0]
    keys, values = (
        torch.cat([a.repeat_interleave(times, dim=1), b], dim=2)
        for a, b in zip(of_shared[:2], of_query[:2], strict=True)
    )
    want, _ = oracle.hificl(
        call.query, call.key, call.value, keys, values, scaling=call.options["scaling"],
        log_weights=torch.cat([of_shared.log_weights, torch.zeros(1, HEADS, 2)], dim=-1),
        mask=torch.ones(9, 9, dtype=torch.bool).tril()[None, None],
    )  # fmt: skip
    torch.testing.assert_close(call.output, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_rows_of_both_kinds(shared: PeftModel) -> None:
    names = ["query", "default", "__base__", "default"]
    model, ids = with_both(shared), inputs_for("gqa", rows=4)["input_ids"]
    mixed = logits(model, input_ids=ids, adapter_names=names)
    for row, name in enumerate(names):
        alone = logits(model, input_ids=ids[row : row + 1], adapter_names=[name])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_sets_of_few_heads_alone_stay_so() -> None:
    few = VirtualPairs(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    assert concatenate_pairs([few, few]).keys.shape == (1, 2, 6, 8)
    assert select_rows([few, None], [0, 1, 1]).values.shape == (3, 2, 3, 8)


# -- starts -----------------------------------------------------------------------------------------------------------


def test_a_start_from_demonstrations_is_exact(shared: PeftModel) -> None:
    """The pairs are the keys and values of the prompt, as they are."""
    shared.add_adapter("start", config(n=6, r=6, heads="kv"))
    shared.set_adapter("start")
    prompt, ids = (inputs_for("gqa", rows=1, length=length)["input_ids"] for length in (6, 9))
    initialize_from_demonstrations(shared, {"input_ids": prompt}, tokens=list(range(6)))
    with shared.disable_adapter():
        in_context = logits(shared, input_ids=torch.cat([prompt, ids], dim=1))[:, 6:]
    torch.testing.assert_close(logits(shared, input_ids=ids), in_context, rtol=1e-4, atol=1e-4)


def test_pairs_of_more_heads_are_refused() -> None:
    layer = hificl_layers(adapted("gqa", heads="kv", pair_weights=True))[0]
    before: list[Tensor] = [p.clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match="Pairs of 4 heads for an adapter with pairs of 2: give those of the key/val"):
        layer.set_pairs("default", torch.randn(4, 3, 16), torch.randn(4, 3, 16))
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))


def test_stored_tensors_are_small(tmp_path: Path) -> None:
    sizes = []
    for heads in ("query", "kv"):
        adapted("gqa", heads=heads).save_pretrained(tmp_path / heads)
        tensors = load_file(tmp_path / heads / "adapter_model.safetensors")
        sizes.append(sum(tensor.numel() for tensor in tensors.values()))
    assert sizes[0] == 2 * sizes[1]
