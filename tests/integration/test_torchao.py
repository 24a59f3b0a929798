"""Bases that torchao has quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from peft_hificl import HiFICLConfig

from ..helpers import build, config, inputs_for, logits, train
from . import reports

pytestmark = pytest.mark.integration

WEIGHT_ONLY = ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"]
DYNAMIC = ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"]
INPUTS = inputs_for("gqa")


def quantised(name: str, only: str = "layers") -> tf.PreTrainedModel:
    from torchao import quantization

    base = build("gqa")
    linear = lambda module, name: isinstance(module, nn.Linear) and only in name
    quantization.quantize_(base, getattr(quantization, name)(), filter_fn=linear)
    return base


def loaded_quantised(name: str, folder: Path) -> tf.PreTrainedModel:
    """As transformers quantises while it loads; its output layer stays as it is."""
    from torchao import quantization

    build("gqa").save_pretrained(folder)
    options = tf.TorchAoConfig(quant_type=getattr(quantization, name)())
    return tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.float32)


def dequantised(base: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """An ordinary model with the weights that a quantised one stands for."""
    plain = build("gqa")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            weight = parameter.dequantize() if hasattr(parameter, "dequantize") else parameter
            plain.get_parameter(name).copy_(weight)
    return plain


def attached(base: nn.Module) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, config(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("loaded", [False, True], ids=["quantised", "loaded"])
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_a_weight_only_base_trains_and_reloads(name: str, loaded: bool, tmp_path: Path) -> None:
    def base() -> tf.PreTrainedModel:
        return loaded_quantised(name, tmp_path / "base") if loaded else quantised(name)

    first = base()
    assert type(first.model.layers[0].self_attn.q_proj.weight.data) is not torch.Tensor
    plain, model = attached(dequantised(first)), attached(first)
    torch.testing.assert_close(logits(model, **INPUTS), logits(plain, **INPUTS), rtol=1e-4, atol=1e-4)
    for one in (model, plain):
        one.train()(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    trained = [key for key, p in plain.named_parameters() if p.requires_grad]
    assert trained
    for key in trained:
        found, want = (one.get_parameter(key).grad for one in (model, plain))
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-5, msg=key)
    with reports() as found:
        losses = train(model, "gqa", steps=6)
    assert losses[-1] < losses[0] and not found
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, **INPUTS), logits(model, **INPUTS))


def steps_with_reports(model: PeftModel) -> list[str]:
    """Trained as with gradient checkpointing: the embeddings' output requires a gradient, so that `backward` runs."""
    model.enable_input_require_grads()
    with reports() as found:
        train(model, "gqa", steps=4)
    return found


@pytest.mark.parametrize("loaded", [False, True], ids=["quantised", "loaded"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_an_adapter_that_gets_no_gradient_is_reported_once(name: str, loaded: bool, tmp_path: Path) -> None:
    """Kernels that quantise activations have no backward for them, and say nothing."""
    model = attached(loaded_quantised(name, tmp_path) if loaded else quantised(name))
    (report,) = steps_with_reports(model)
    assert "layers.0.self_attn" in report or "layers.1.self_attn" in report


def test_the_one_layer_that_gets_no_gradient_is_named() -> None:
    model = attached(quantised(DYNAMIC[0], only="layers.1.self_attn.o_proj"))
    (report,) = steps_with_reports(model)
    assert "layers.1.self_attn" in report and "layers.0.self_attn" not in report


def test_a_fresh_adapter_is_not_reported() -> None:
    """Its virtual values are zero, and so are most gradients of the first step."""
    model = get_peft_model(build("gqa"), HiFICLConfig(task_type="CAUSAL_LM", n=3, r=2))
    assert steps_with_reports(model) == []
