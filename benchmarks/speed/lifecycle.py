"""The life of an adapter: save, load, switch, and the first token after a switch."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure
from peft import PeftModel
from rich.progress import track
from torch import Tensor

from ..common.tables import Record, Table, bytes_of, decimal, duration, tabulate
from .measure import Samples, ratio, stopwatch, summary
from .presets import HIFICL, LORA, Preset, adapt, build
from .report import COLORS, Bar, spread

SAVE, LOAD, SWITCH = "save", "load", "switch"
FIRST, NEXT = "first token after a switch", "first token without a switch"
STEPS = (SAVE, LOAD, SWITCH, FIRST, NEXT)
PROMPT = 32

TITLE = "Adapter life"
METHOD = f"""A model of 32 layers with two loaded adapters; LoRA r = 16 on q, k, v and o. Save: `save_pretrained` of
one adapter. Load: `load_adapter` of that folder under a new name, which is deleted afterwards, outside the time.
Switch: `set_adapter` to the other one. Then a prompt of {PROMPT} tokens twice: the first time right after the switch,
the second time as it always is; the delay is the median of the difference. Files lie in the system's temporary folder,
hot in the cache."""


def run(preset: Preset, device: torch.device, compiled: bool) -> list[Record]:
    base = build(preset.lifecycle_model, device)
    ids = torch.zeros(1, PROMPT, dtype=torch.long, device=device)
    models = {method: adapt(base, method).eval() for method in (LORA, HIFICL)}
    samples: dict[str, Samples] = {step: {method: [] for method in models} for step in STEPS}
    sizes = {}
    with TemporaryDirectory() as temporary:
        folders = {method: Path(temporary, method) for method in models}
        for method, model in models.items():
            model.save_pretrained(str(folders[method]))
            sizes[method] = (folders[method] / "adapter_model.safetensors").stat().st_size
            model.load_adapter(folders[method], "other")
            live(model, folders[method], ids)  # not counted
        start = time.perf_counter()
        for _ in track(range(30), TITLE):
            for method, model in models.items():
                for step, seconds in live(model, folders[method], ids).items():
                    samples[step][method].append(seconds)
            if len(samples[SAVE][LORA]) >= 5 and time.perf_counter() - start > preset.seconds:
                break
    records: list[Record] = [
        {
            "method": method,
            "step": step,
            **summary(samples[step], method),
            "of_lora": ratio(samples[step], method, LORA),
        }
        for step in STEPS
        for method in models
    ]
    for record in records:
        method = str(record["method"])
        record["layers"] = preset.lifecycle_model.layers
        record["file_bytes"] = sizes[method]
        record["delay_seconds"] = median(
            first - usual for first, usual in zip(samples[FIRST][method], samples[NEXT][method], strict=True)
        )
    return records


def live(model: PeftModel, folder: Path, ids: Tensor) -> dict[str, float]:
    """Seconds of each step, once."""
    device = ids.device
    watch: Callable[[Callable[[], object]], float] = partial(stopwatch, device=device)
    current, other = ("default", "other") if model.active_adapter == "default" else ("other", "default")
    seconds = {
        SAVE: watch(lambda: model.save_pretrained(str(folder), selected_adapters=["default"])),
        LOAD: watch(lambda: model.load_adapter(folder, "new")),
    }
    model.delete_adapter("new")
    model.set_adapter(current)
    with torch.no_grad():
        prefill = partial(model, input_ids=ids, logits_to_keep=1)
        prefill()
        seconds[SWITCH] = watch(lambda: model.set_adapter(other))
        seconds[FIRST] = watch(prefill)
        seconds[NEXT] = watch(prefill)
    return seconds


def tables(records: list[Record]) -> list[Table]:
    return [
        tabulate(
            "Time",
            records,
            {
                "step": "step",
                "method": "method",
                "time": lambda r: duration(r["seconds"]),
                "quartiles": spread,
                "of LoRA's": lambda r: decimal(r["of_lora"]),
            },
        ),
        tabulate(
            "File and delay",
            [r for r in records if r["step"] == SWITCH],
            {
                "method": "method",
                "adapter file": lambda r: bytes_of(r["file_bytes"]),
                "delay of the first token after a switch": lambda r: f"{r['delay_seconds'] * 1e3:.3f} ms",
            },
        ),
    ]


def bars(records: list[Record]) -> list[Bar]:
    found = [r for r in records if r["method"] == HIFICL and r["step"] == SWITCH and r["layers"] == 32]
    measured = found[0]["of_lora"] if found else None
    return [Bar("switch between two loaded adapters, 32 layers: time over LoRA", "<=", 1.00, measured)]


def draw(records: list[Record], figure: Figure) -> None:
    axes = figure.subplots()
    for offset, method in ((-0.2, LORA), (0.2, HIFICL)):
        mine = [r for r in records if r["method"] == method]
        drawn = axes.bar(
            [place + offset for place in range(len(mine))],
            [r["seconds"] * 1e3 for r in mine],
            width=0.38,
            color=COLORS[method],
            label=f"{method}, {bytes_of(mine[0]['file_bytes'])} file",
        )
        axes.bar_label(drawn, fmt="%.3g", fontsize=9)
    axes.set_xticks(range(len(STEPS)), STEPS)
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(f"Adapter life, {records[0]['layers']} layers")
