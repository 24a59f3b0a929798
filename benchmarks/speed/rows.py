"""A batch with one adapter per row, against one adapter after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from ..common.colors import GREY
from ..common.tables import Record, Table, decimal, duration, tabulate
from .measure import interleave, ratio, summary
from .presets import CONFIGS, HIFICL, LORA, Preset, adapt, build
from .report import COLORS, Bar, spread

TASKS, PROMPT, TOKENS = 8, 32, 16
BASE = "base, one batch"
TOGETHER, SWITCHING = "one batch", "one after the other"

TITLE = "One adapter per row"
METHOD = f"""{TASKS} prompts of {PROMPT} tokens, each of another task with an adapter of its own, answered greedily with
{TOKENS} tokens by `generate`. One batch: all rows at once, with `adapter_names`. One after the other: `set_adapter` and
a batch of one row, {TASKS} times. The base answers them in one batch without an adapter. HiFICL n = 8, r = 8; LoRA
r = 16 on q, k, v and o, as PEFT runs it; strengths from 0.25 to 2."""


def run(preset: Preset, device: torch.device, compiled: bool) -> list[Record]:
    base = build(preset.model, device)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, preset.model.vocabulary, (TASKS, PROMPT), generator=generator).to(device)
    variants: dict[str, Callable[[], object]] = {BASE: partial(answer, base, prompts)}
    for method in (LORA, HIFICL):
        model, names = with_tasks(base, method)
        variants[f"{method}, {TOGETHER}"] = partial(answer, model, prompts, adapter_names=names)
        variants[f"{method}, {SWITCHING}"] = partial(one_by_one, model, prompts, names)
    samples = interleave(variants, device, preset.seconds)
    return [
        {
            "variant": name,
            **(timing := summary(samples, name)),
            "rows_per_second": TASKS / timing["seconds"],
            "speed_of_base": 1 / ratio(samples, name, BASE),
            "speed_of_lora": 1 / ratio(samples, name, f"{LORA}, {TOGETHER}"),
            "speed_of_switching": 1 / ratio(samples, name, f"{HIFICL}, {SWITCHING}"),
        }
        for name in variants
    ]


def with_tasks(base: PreTrainedModel, method: str) -> tuple[PeftModel, list[str]]:
    """A model with an adapter per task, and their names."""
    model = adapt(base, method).eval()
    names = ["default", *(f"task {index}" for index in range(1, TASKS))]
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[method]())
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        for index, name in enumerate(names):
            layer.set_scale(name, (index + 1) / 4)
    return model, names


def answer(model: PreTrainedModel | PeftModel, prompts: Tensor, **options: object) -> Tensor:
    sizes = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    found: Tensor = model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0, **sizes, **options
    )
    return found


def one_by_one(model: PeftModel, prompts: Tensor, names: list[str]) -> None:
    for prompt, name in zip(prompts, names, strict=True):
        model.set_adapter(name)
        answer(model, prompt[None])


def tables(records: list[Record]) -> list[Table]:
    return [
        tabulate(
            "Rows per second",
            records,
            {
                "variant": "variant",
                "rows/s": lambda r: decimal(r["rows_per_second"]),
                "of the base's": lambda r: decimal(r["speed_of_base"]),
                "of LoRA's in one batch": lambda r: decimal(r["speed_of_lora"]),
                "of HiFICL's, one after the other": lambda r: decimal(r["speed_of_switching"]),
                "time": lambda r: duration(r["seconds"]),
                "quartiles": spread,
            },
        )
    ]


def bars(records: list[Record]) -> list[Bar]:
    mine = next((r for r in records if r["variant"] == f"{HIFICL}, {TOGETHER}"), {})
    what = f"{TASKS} tasks in one batch: rows/s over"
    return [
        Bar(f"{what} LoRA's in one batch", ">=", 1.00, mine.get("speed_of_lora")),
        Bar(f"{what} one after the other", ">=", 1.00, mine.get("speed_of_switching")),
    ]


def draw(records: list[Record], figure: Figure) -> None:
    axes = figure.subplots()
    names = [str(record["variant"]) for record in records]
    drawn = axes.barh(
        names,
        [record["rows_per_second"] for record in records],
        color=[COLORS.get(name.partition(",")[0], GREY) for name in names],
    )
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("rows/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{TASKS} tasks, each with an adapter of its own")
