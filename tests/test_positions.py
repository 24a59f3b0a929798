"""Left-padded rows: an adapter has the same effect on a padded row as on the row alone, whoever calls the model."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from peft_hificl import HiFICLConfig
from peft_hificl.positions import PositionsFromMask

from . import architectures
from .architectures import FAMILIES, Family, Inputs
from .helpers import llama
from .zoo import each, generate, recorded_attention, run

pytestmark = pytest.mark.filterwarnings("ignore")

# Learned, or otherwise absolute, positions: the base model itself answers otherwise to a padded row.
ABSOLUTE = {
    "albert", "bart", "bert", "bigbird_pegasus", "biogpt", "blenderbot", "clip", "ctrl", "distilbert", "electra",
    "encoder_decoder", "ernie", "florence2", "gpt2", "gpt_bigcode", "layoutlm", "marian", "mbart", "mobilebert",
    "paligemma", "pegasus", "plbart", "recurrent_gemma", "siglip",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def no_gradients() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        yield
    transformers.logging.set_verbosity(verbosity)


def alone(inputs: Inputs, row: int) -> Inputs:
    """One of two rows, without its padding."""
    ids = inputs["input_ids"]
    padding = int((ids[row] == 0).sum())
    parts = {k: v[row * len(v) // 2 : (row + 1) * len(v) // 2] for k, v in inputs.items()}
    columns = {
        k
        for k, v in parts.items()
        if v.shape[1:2] == ids.shape[1:] and not v.is_floating_point() and not k.startswith("decoder_")
    }
    return {k: v[:, padding:] if k in columns else v for k, v in parts.items()}


def distance(padded: Tensor, single: Tensor) -> float:
    """Between a padded row's last tokens and those of the row alone, relative to the largest value."""
    size = min(padded.shape[0], single.shape[0])
    return float((padded[-size:] - single[-size:]).abs().max() / single.abs().max())


def text_families() -> tuple[Family, ...]:
    return tuple(f for f in FAMILIES if bool((f.inputs().get("input_ids", torch.ones(1)) == 0).any()))


@each(text_families())
def test_a_padded_row_equals_the_row_alone(family: Family) -> None:
    base = architectures.build(family)
    inputs = architectures.forward_inputs(family, base)
    model = architectures.adapt(base)
    with model.disable_adapter():
        plain = distance(run(model, inputs)[0], run(model, alone(inputs, 0))[0])
    assert (plain > 1e-4) == (family.name in ABSOLUTE), plain
    if family.name not in ABSOLUTE:
        assert distance(run(model, inputs)[0], run(model, alone(inputs, 0))[0]) < 1e-4


@each(text_families())
def test_without_padding_positions_are_those_of_the_base_model(family: Family) -> None:
    base = architectures.build(family)
    model = architectures.adapt(base)
    inputs = alone(architectures.forward_inputs(family, base), 1)
    with recorded_attention() as calls:
        run(model, inputs)
    with recorded_attention() as plain, model.disable_adapter():
        run(model, inputs)
    # Whatever comes before the first adapted attention knows no adapter, but the positions.
    assert torch.equal(calls[0].query, plain[0].query) and torch.equal(calls[0].key, plain[0].key)


@each(tuple(f for f in text_families() if f.generates and "padding" not in f.quirks))
def test_generates_the_same_for_a_padded_row_and_the_row_alone(family: Family) -> None:
    model = architectures.adapt(architectures.build(family))
    inputs = family.inputs()
    with model.disable_adapter():
        plain = distance(generate(model, inputs).logits[0], generate(model, alone(inputs, 0)).logits[0])
    if plain < 1e-4:
        assert distance(generate(model, inputs).logits[0], generate(model, alone(inputs, 0)).logits[0]) < 1e-4


IDS = torch.tensor([[5, 6, 7, 8]])
PADDED = torch.cat([torch.zeros(1, 6, dtype=torch.long), IDS], dim=1)
MASK = (PADDED != 0).long()


def trained(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    base = llama(**kwargs).eval()
    torch.manual_seed(1)
    return get_peft_model(base, HiFICLConfig(n=3, r=2, init_weights=False)).eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("training", [False, True])
def test_under_every_implementation_and_in_training(implementation: str, training: bool) -> None:
    torch.compiler.set_stance("force_eager")
    model = trained().train(training)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(
        run(model, {"input_ids": PADDED, "attention_mask": MASK})[:, 6:], run(model, {"input_ids": IDS})
    )
    torch.compiler.set_stance("default")


def test_positional_arguments_and_embeddings() -> None:
    model = trained().get_base_model()
    expected = run(model, {"input_ids": IDS})
    torch.testing.assert_close(model(PADDED, MASK)[0][:, 6:], expected)
    torch.testing.assert_close(model(PADDED, MASK, None)[0][:, 6:], expected)
    embeds = model.get_input_embeddings()(PADDED)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=MASK)[0][:, 6:], expected)
    hidden = model.model(PADDED, MASK)[0][:, 6:]  # the model inside is called by embedders and reward heads
    torch.testing.assert_close(hidden, model.model(IDS)[0])


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_in_parts_with_a_mask_that_grows(name: str) -> None:
    if name == "cache" and name not in inspect.signature(transformers.LlamaForCausalLM.forward).parameters:
        pytest.skip("transformers names it so since 5.24")
    model = trained()
    whole = model(input_ids=PADDED, attention_mask=MASK).logits
    cache = transformers.DynamicCache()
    model(input_ids=PADDED[:, :8], attention_mask=MASK[:, :8], use_cache=True, **{name: cache})
    second = model(input_ids=PADDED[:, 8:], attention_mask=MASK, **{name: cache})
    torch.testing.assert_close(second.logits, whole[:, 8:])


def test_a_cache_is_found_by_either_name() -> None:
    """Whatever the transformers at hand calls it."""
    model = trained().get_base_model()
    (hook,) = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, PositionsFromMask)]
    cache = model(input_ids=PADDED[:, :8], attention_mask=MASK[:, :8], use_cache=True).past_key_values
    for name in ("past_key_values", "cache"):
        _, given = hook(model, (), {"input_ids": PADDED[:, 8:], "attention_mask": MASK, name: cache})
        assert given["position_ids"].tolist() == [list(range(2, PADDED.shape[1] - 6))]


def test_holes_in_a_mask_keep_the_distances_of_the_base_model() -> None:
    """Only what lies before the first visible token is left out of the count, as only that changes no distance."""
    model, mask = trained(), MASK.clone()
    mask[0, 8] = 0
    expected = model(input_ids=IDS, attention_mask=mask[:, 6:], position_ids=torch.arange(4)[None]).logits
    torch.testing.assert_close(
        model(input_ids=PADDED, attention_mask=mask).logits[:, [6, 7, 9]], expected[:, [0, 1, 3]]
    )


def test_positions_of_the_caller_are_kept() -> None:
    model = trained()
    there = model(input_ids=PADDED, attention_mask=MASK, position_ids=torch.arange(10)[None]).logits
    assert not torch.allclose(there, model(input_ids=PADDED, attention_mask=MASK).logits, atol=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_masks_of_other_forms_leave_positions_to_the_caller(implementation: str) -> None:
    """Of four dimensions, or a BlockMask: without `position_ids`, positions are columns, padding included."""
    model = trained()
    model.set_attn_implementation(implementation)
    columns = torch.arange(10)[None]
    mask: Any = (MASK[:, None, None] * torch.ones(10, 10, dtype=torch.long).tril()).bool()
    torch.compiler.set_stance("force_eager")
    if implementation == "flex_attention":
        shown = mask
        mask = create_block_mask(lambda b, h, q, k: shown[b, 0, q, k], 1, None, 10, 10, device="cpu")
    got, at_columns, counted = (
        model(input_ids=PADDED, attention_mask=mask, **positions).logits[:, 6:]
        for positions in ({}, {"position_ids": columns}, {"position_ids": (columns - 6).clamp_min(0)})
    )
    alone = run(model, {"input_ids": IDS})
    torch.compiler.set_stance("default")
    assert torch.equal(got, at_columns) and not torch.allclose(got, alone, atol=1e-3)
    torch.testing.assert_close(counted, alone, rtol=1e-4, atol=1e-5)


def test_classifier_free_guidance_with_a_padded_negative_prompt() -> None:
    """`generate` runs the negative prompt in a forward of its own, without positions."""
    model = trained()
    options: dict[str, Any] = {
        "input_ids": IDS, "guidance_scale": 3.0, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False,
        "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    plain = model.generate(**options, negative_prompt_ids=IDS, negative_prompt_attention_mask=MASK[:, 6:])
    padded = model.generate(**options, negative_prompt_ids=PADDED, negative_prompt_attention_mask=MASK)
    torch.testing.assert_close(torch.stack(padded.scores), torch.stack(plain.scores), rtol=1e-4, atol=1e-4)


def test_a_decoder_that_is_padded_in_an_encoder_decoder() -> None:
    family = next(f for f in FAMILIES if f.name == "t5gemma")
    model = architectures.adapt(architectures.build(family))
    source = alone(family.inputs(), 1)
    expected = run(model, {**source, "decoder_input_ids": IDS})
    padded = run(model, {**source, "decoder_input_ids": PADDED, "decoder_attention_mask": MASK})
    torch.testing.assert_close(padded[:, 6:], expected, rtol=1e-4, atol=1e-5)


def hooks(model: nn.Module) -> list[PositionsFromMask]:
    return [h for m in model.modules() for h in m._forward_pre_hooks.values() if isinstance(h, PositionsFromMask)]


@pytest.mark.parametrize("way", ["inject", "add_adapter", "copy", "pickle", "second adapter"])
def test_however_the_adapter_came_there(way: str) -> None:
    torch.manual_seed(0)
    model: Any = llama().eval()
    config = HiFICLConfig(n=3, r=2, init_weights=False)
    if way == "add_adapter":
        model.add_adapter(config)
    elif way == "inject":
        inject_adapter_in_model(config, model)
    else:
        model = get_peft_model(model, config)
        if way == "second adapter":
            model.add_adapter("b", config)
            model.set_adapter("b")
        else:
            model = copy.deepcopy(model) if way == "copy" else pickle.loads(pickle.dumps(model))
    model.eval()
    torch.testing.assert_close(
        run(model, {"input_ids": PADDED, "attention_mask": MASK})[:, 6:], run(model, {"input_ids": IDS})
    )
    assert len(hooks(model)) == 2  # of the model with the head and of the one inside, once each


def test_unloading_and_disabling_leave_the_base_model_as_it_was() -> None:
    torch.manual_seed(0)
    base = llama().eval()
    inputs = {"input_ids": PADDED, "attention_mask": MASK}
    plain = run(base, inputs)
    model = get_peft_model(base, HiFICLConfig(n=3, r=2, init_weights=False)).eval()
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), plain)
    base = model.unload()
    assert not hooks(base) and torch.equal(run(base, inputs), plain)


def test_compiled() -> None:
    model = trained()
    expected = run(model, {"input_ids": PADDED, "attention_mask": MASK})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, {"input_ids": PADDED, "attention_mask": MASK}), expected)
