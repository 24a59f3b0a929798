"""HiFICL and LoRA, trained alike, each at the learning rate that validation images choose from a grid of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import set_seed

from peft_hificl import HiFICLConfig

from .base import load_base
from .data import Task
from .training import accuracy, ask, batches, encode_task, fit

# Steps and grids were settled by earlier trials on the validation images: six rates of HiFICL, three of LoRA, and 200
# to 600 steps.  At 200 steps HiFICL is not trained to its end, LoRA is.
STEPS, BATCH_SIZE = 400, 32


@dataclass(frozen=True)
class Method:
    title: str
    config: Callable[[], PeftConfig]
    learning_rates: tuple[float, ...]  # as many for each method, a factor of about 3 apart


METHODS = {
    "hificl": Method(
        "HiFICL",
        lambda: HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8),
        learning_rates=(1.5e-2, 5e-2, 1.5e-1),
    ),
    "lora": Method(
        "LoRA",
        lambda: LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=16,
            target_modules=r".*language_model\..*\.[qkvo]_proj",  # the vision tower has projections of these names too
        ),
        learning_rates=(1e-3, 3e-3, 1e-2),
    ),
}


@dataclass(frozen=True)
class Trial:
    """An adapter trained at one learning rate."""

    learning_rate: float
    validation_accuracy: float
    seconds: float
    model: PeftModel


def train(base: Path, method: Method, task: Task, splits: DatasetDict, seed: int) -> list[Trial]:
    """Train one adapter per learning rate; the best on validation comes first.

    Everything but the method and its rate is the same for all: samples and their order, steps, batch size, schedule.
    """
    trials = []
    for rate in method.learning_rates:
        set_seed(seed)
        processor, model = load_base(base)
        model = get_peft_model(model, method.config())
        data = batches(encode_task(processor, task, splits["adapters"]), BATCH_SIZE, seed)
        seconds = fit(model, data, STEPS, rate, f"{method.title}, {task.title}, rate {rate:g}")
        validation = accuracy(ask(model, processor, task, splits["validation"]), task, splits["validation"])
        trials.append(Trial(rate, validation, seconds, model))
    return sorted(trials, key=lambda trial: -trial.validation_accuracy)
