"""Training with the usual loops: Trainer on a vision-language model, and plain accelerate."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader

from .helpers import (
    adapted,
    adapter_of,
    build,
    config,
    fresh,
    hificl_layers,
    inputs_for,
    logits,
    picture_data,
    trainer,
)


def test_trainer_trains_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = fresh()
    start = adapter_of(whole)
    log = trainer(tmp_path / "whole", whole, save_strategy="steps", save_steps=4)
    log.train()
    losses = [entry["loss"] for entry in log.state.log_history if "loss" in entry]
    assert sum(losses[4:]) < sum(losses[:4])  # the second epoch's four batches against the first's
    assert any(not torch.equal(start[name], p) for name, p in adapter_of(whole).items())
    resumed = fresh()
    trainer(tmp_path / "whole", resumed).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, parameter in adapter_of(resumed).items():
        torch.testing.assert_close(parameter, adapter_of(whole)[name], rtol=1e-5, atol=1e-6, msg=name)
    stored = tmp_path / "whole" / "checkpoint-8"
    reloaded = PeftModel.from_pretrained(build("vlm"), stored)
    inputs = inputs_for("vlm")
    assert torch.equal(logits(reloaded, **inputs), logits(whole.eval(), **inputs))


def test_load_best_model_at_end(tmp_path: Path) -> None:
    model = fresh()
    run = trainer(
        tmp_path, model, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, num_train_epochs=2,
    )  # fmt: skip
    run.train()
    best = run.state.best_model_checkpoint  # the worst loss is "best" here, so that it is not the last one
    assert best is not None and not best.endswith(str(run.state.global_step))
    want = logits(PeftModel.from_pretrained(build("vlm"), best), **inputs_for("vlm"))
    assert torch.equal(logits(model.eval(), **inputs_for("vlm")), want)


def test_trainer_in_bf16(tmp_path: Path) -> None:
    model = fresh()
    trainer(tmp_path, model, bf16=True, num_train_epochs=1, gradient_checkpointing=True).train()
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in adapter_of(model).values())


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_plain_accelerate_loop(mixed_precision: str) -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = fresh()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(picture_data(), batch_size=8))
    losses = []
    for _ in range(4):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-2:]) < sum(losses[:2])  # the last epoch's two batches against the first's
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_parameters_offloaded_by_accelerate() -> None:
    torch.manual_seed(1)
    model = get_peft_model(build("gqa"), config()).eval()
    want = logits(model, **inputs_for("gqa"))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(layer.hificl_K_A["default"].weight.is_meta for layer in hificl_layers(model))
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), want)


def test_an_adapter_that_is_added_after_offloading() -> None:
    """Alone, with the first one, and in one batch with it: as on a model that was never offloaded."""
    inputs = inputs_for("gqa")
    outputs = []
    for offloaded in (False, True):
        model = adapted("gqa", name="first")
        if offloaded:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        torch.manual_seed(2)
        model.add_adapter("late", config(n=4))
        found = [logits(model, **inputs), logits(model, **inputs, adapter_names=["late", "first"])]
        model.set_adapter("late")
        found.append(logits(model, **inputs))
        model.base_model.set_adapter(["first", "late"])
        found.append(logits(model, **inputs))
        outputs.append(found)
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)
    assert len({out.sum().item() for out in outputs[0]}) == 4


def test_a_base_that_accelerate_has_offloaded_already() -> None:
    """Its weights are on the meta device until they are used; the adapter is where they are used."""
    want = logits(adapted("gqa"), **inputs_for("gqa"))
    base = build("gqa")
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    assert base.model.layers[0].self_attn.q_proj.weight.is_meta
    torch.manual_seed(1)
    model = get_peft_model(base, config()).eval()
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), want)
    model.unload()
    assert not any("virtual_pairs" in name for name, _ in base.named_modules())


def test_saving_from_within_checkpoint_wrappers(tmp_path: Path) -> None:
    """They change the names of modules, but not the keys of a state dict."""
    model = adapted("gqa")
    want = logits(model, **inputs_for("gqa"))
    layers = model.get_base_model().model.layers
    for i in range(len(layers)):
        layers[i] = checkpoint_wrapper(layers[i])
    torch.testing.assert_close(logits(model, **inputs_for("gqa")), want)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("gqa"), tmp_path), **inputs_for("gqa")), want)
    with torch.no_grad():
        for layer in hificl_layers(model):
            for parameter in layer.parameters():
                parameter.zero_()
    set_peft_model_state_dict(model, load_peft_weights(tmp_path))
    assert torch.equal(logits(model, **inputs_for("gqa")), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_adapter_on_an_offloaded_base_has_its_dtype(dtype: torch.dtype) -> None:
    base = build("gqa").to(dtype)
    want = logits(base, **inputs_for("gqa"))
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    model = get_peft_model(base, config(), autocast_adapter_dtype=False).eval()
    adapter = [p for name, p in model.named_parameters() if "hificl_" in name]
    assert {(p.dtype, p.device.type) for p in adapter} == {(dtype, "cpu")}
    assert not torch.equal(logits(model, **inputs_for("gqa")), want)
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs_for("gqa")), want)
