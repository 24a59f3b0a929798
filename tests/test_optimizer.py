"""Rates for virtual keys and for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from peft_hificl import HiFICLConfig, parameter_groups

from .helpers import adapter_of, build, fresh, inputs_for, trainer


def names(model: PeftModel, group: dict) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


@pytest.mark.parametrize("whole", [False, True])
def test_keys_are_one_group_and_all_else_that_is_trained_the_other(whole: bool) -> None:
    settings = {"factorize_keys": not whole, "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(build("gqa"), HiFICLConfig(n=2, r=2, **settings))
    model.add_adapter("other", HiFICLConfig(n=2, r=2, **settings))  # is not active, so it is not trained
    rest, keys = parameter_groups(model, lr=0.1, key_lr_ratio=0.25)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names(model, keys) == {name for name in trained if "hificl_K" in name} != set()
    assert names(model, rest) == trained - names(model, keys)
    assert any("lm_head" in name for name in names(model, rest))
    assert sum(len(group["params"]) for group in (rest, keys)) == len(trained)
    assert (rest["lr"], keys["lr"]) == (0.1, pytest.approx(0.025))


def test_log_weights_are_a_group_of_their_own() -> None:
    model = get_peft_model(build("gqa"), HiFICLConfig(n=2, r=2, pair_weights=True, task_type="CAUSAL_LM"))
    rest, keys, weights = parameter_groups(model, lr=0.1, weight_lr_ratio=30)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names(model, weights) == {name for name in trained if "hificl_W" in name} != set()
    assert names(model, keys) == {name for name in trained if "hificl_K" in name}
    assert names(model, rest) == {name for name in trained if "hificl_V" in name}
    assert [group["lr"] for group in (rest, keys, weights)] == pytest.approx([0.1, 0.03, 3.0])
    assert parameter_groups(model, lr=0.1)[2]["lr"] == 0.1
    with pytest.raises(ValueError, match="weight_lr_ratio=0"):
        parameter_groups(model, lr=0.1, weight_lr_ratio=0)


def step(model: PeftModel, groups: list[dict]) -> None:
    optimizer = torch.optim.SGD(groups)
    model(**inputs_for("gqa"), labels=inputs_for("gqa")["input_ids"]).loss.backward()
    optimizer.step()


def test_keys_move_by_the_ratio() -> None:
    moved = {}
    for ratio in (1.0, 0.3):
        torch.manual_seed(1)
        model = get_peft_model(build("gqa"), HiFICLConfig(n=2, r=2, init_weights=False, task_type="CAUSAL_LM"))
        model.double()
        start = adapter_of(model)
        step(model, parameter_groups(model, 0.1, ratio))
        moved[ratio] = {name: new - start[name] for name, new in adapter_of(model).items()}
    for name, one in moved[1.0].items():
        assert one.abs().max() > 1e-6
        wanted = one * (0.3 if "hificl_K" in name else 1.0)
        torch.testing.assert_close(moved[0.3][name], wanted, rtol=1e-6, atol=1e-12, msg=name)


def test_trainer_schedules_both_rates(tmp_path: Path) -> None:
    model = fresh()
    like = trainer(tmp_path, model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), weight_decay=0.0)
    start, rates = adapter_of(model), []
    optimizer.register_step_pre_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    Trainer(model, like.args, train_dataset=like.train_dataset, optimizers=(optimizer, None)).train()
    assert len(rates) == 8
    assert max(rates) == pytest.approx([0.1, 0.03])
    assert all(keys == pytest.approx(0.3 * rest) for rest, keys in rates)
    assert len({rest for rest, _ in rates}) > 4  # a schedule
    assert all(not torch.equal(start[name], new) for name, new in adapter_of(model).items())


def test_beside_a_lora() -> None:
    model = get_peft_model(build("gqa"), HiFICLConfig(n=2, r=2, task_type="CAUSAL_LM"))
    model.get_base_model().add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "hificl_" in name)
    rest, keys = parameter_groups(model, 0.1)
    assert all("hificl_K" in name for name in names(model, keys))
    assert {"lora_" in name for name in names(model, rest)} == {True, False}


@pytest.mark.parametrize(("frozen", "rate"), [("hificl_K", 0.1), ("hificl_V", 0.03)])
def test_no_group_is_empty(frozen: str, rate: float) -> None:
    model = fresh()
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    assert [group["lr"] for group in parameter_groups(model, 0.1)] == pytest.approx([rate])


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.0), ("lr", float("inf")), ("lr", float("nan")), ("key_lr_ratio", -1.0)]
)
def test_rates_must_be_positive(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}: it must be positive and finite"):
        parameter_groups(fresh(), **{"lr": 0.1, field: value})


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="No HiFICL adapter of this model requires a gradient"):
        parameter_groups(build("gqa"), 0.1)
    model = fresh()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        parameter_groups(model, 0.1)
