"""Attention functions that other packages put in the place of transformers' or torch's own.

An adapted attention either uses such a function or refuses the call.  What its user asked for is never passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from ..helpers import build, config, inputs_for, logits

pytestmark = pytest.mark.integration

IMPLEMENTATIONS = ["sdpa", "eager", "flex_attention"]
INPUTS = inputs_for("gqa")


class Recording:
    """Attentions of somebody else's, whose results are unlike all others: the queries themselves."""

    calls = 0

    def somebody_elses(self, module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        self.calls += 1
        return query.transpose(1, 2).contiguous(), None

    def in_the_place_of_torchs(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return query


@pytest.fixture(autouse=True)
def own_functions() -> Iterator[None]:
    mappings = ALL_ATTENTION_FUNCTIONS._local_mapping, AttentionInterface._global_mapping
    before = [dict(mapping) for mapping in mappings]
    with torch.compiler.set_stance("force_eager"):  # transformers compiles the making of flex_attention's masks
        yield
    for mapping, entries in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(entries)


def assign(implementation: str, function: Callable[..., Any]) -> None:
    ALL_ATTENTION_FUNCTIONS[implementation] = function


def own_function(implementation: str) -> Callable[..., Any]:
    return ALL_ATTENTION_FUNCTIONS.get(implementation, modeling_llama.eager_attention_forward)


WAYS = [assign, AttentionInterface.register]


def base_model(implementation: str) -> PreTrainedModel:
    model = build("gqa")
    model.set_attn_implementation(implementation)
    return model


def attached(implementation: str = "sdpa", **kwargs: Any) -> PeftModel:
    base = base_model(implementation)
    torch.manual_seed(1)
    return get_peft_model(base, config(**kwargs)).eval()


def used_or_refused(recording: Recording, call: Callable[[], Any], *found: str) -> None:
    """Never passed over; and if it is refused, the message tells what was found, and is not about anything else."""
    before = recording.calls
    try:
        call()
    except (ValueError, RuntimeError, TypeError) as error:
        for pattern in (*found, "replaced|registered|patched"):
            assert re.search(pattern, str(error)), f"{pattern!r} is not in: {error}"
        assert "modelling code" not in str(error)
    else:
        assert recording.calls > before, "passed over"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("replace", WAYS, ids=["assigned", "registered"])
def test_replaced_after_attaching(replace: Callable[..., None], implementation: str) -> None:
    model = attached(implementation)
    want = logits(model, **INPUTS)
    recording, own = Recording(), own_function(implementation)
    replace(implementation, recording.somebody_elses)
    found = (f"'{implementation}'", "somebody_elses")
    ids = INPUTS["input_ids"]
    used_or_refused(recording, lambda: logits(model, **INPUTS), *found)
    used_or_refused(recording, lambda: logits(model, input_ids=ids[:1, :1]), *found)
    used_or_refused(recording, lambda: logits(model, attention_mask=torch.ones_like(ids), **INPUTS), *found)
    used_or_refused(recording, lambda: logits(model, **INPUTS, adapter_names=["default", "__base__"]), *found)
    used_or_refused(recording, lambda: model.generate(**INPUTS, max_new_tokens=2), *found)
    used_or_refused(recording, lambda: model.train()(**INPUTS, labels=ids), *found)
    with model.eval().disable_adapter():
        assert torch.equal(logits(model, **INPUTS), logits(base_model(implementation), **INPUTS))
    assign(implementation, own)  # put back
    assert torch.equal(logits(model, **INPUTS), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("replace", WAYS, ids=["assigned", "registered"])
@pytest.mark.parametrize("targets", [None, ["self_attn"]], ids=["found", "named"])
def test_replaced_before_attaching(
    replace: Callable[..., None], implementation: str, targets: list[str] | None
) -> None:
    recording = Recording()
    replace(implementation, recording.somebody_elses)
    found = (f"'{implementation}'", "somebody_elses")
    used_or_refused(recording, lambda: logits(attached(implementation, target_modules=targets), **INPUTS), *found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_put_back_before_attaching(implementation: str) -> None:
    """Now the interface of Llama has an entry of its own, but what it holds is transformers'."""
    model = attached(implementation)
    want = logits(model, **INPUTS)
    own = own_function(implementation)
    assign(implementation, Recording().somebody_elses)
    assign(implementation, own)
    assert torch.equal(logits(attached(implementation), **INPUTS), want)
    assert torch.equal(logits(model, **INPUTS), want)


def test_torchs_function_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """`F.scaled_dot_product_attention = sageattn`, as SageAttention's README has it."""
    model = attached()
    want = logits(model, **INPUTS)
    recording = Recording()
    found = ("scaled_dot_product_attention", "in_the_place_of_torchs")
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording.in_the_place_of_torchs)
        used_or_refused(recording, lambda: logits(model, **INPUTS), *found)
        used_or_refused(recording, lambda: model.train()(**INPUTS, labels=INPUTS["input_ids"]), *found)
        used_or_refused(recording, lambda: logits(attached(), **INPUTS), *found)
        with model.eval().disable_adapter():
            assert torch.equal(logits(model, **INPUTS), logits(base_model("sdpa"), **INPUTS))
    assert torch.equal(logits(model, **INPUTS), want)


def test_the_eager_function_of_the_modelling_code_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("eager")
    recording = Recording()
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", recording.somebody_elses)
    used_or_refused(recording, lambda: logits(model, **INPUTS), "eager", "somebody_elses")
    with model.disable_adapter():
        assert torch.equal(logits(model, **INPUTS), logits(base_model("eager"), **INPUTS))
