"""A training step of a whole model: forward, backward, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from ..common.colors import GREY
from ..common.tables import Record, Table, bytes_of, count, decimal, duration, scientific, tabulate
from .measure import flops, interleave, peak_bytes, ratio, storage_bytes, summary
from .presets import CONFIGS, HIFICL, LORA, N, Preset, R, adapt, build
from .report import COLORS, Bar, spread

FLOOR = "frozen floor"

TITLE = "Training step"
METHOD = f"""One sequence, forward, backward and AdamW step, all on one frozen base whose weights are shared.
`{FLOOR}`: the frozen model alone, backward down to its input embeddings, which are given a gradient, a little further
than an adapter's backward goes; nothing is trained. LoRA: r = 16 on q, k, v and o, without dropout. Prefix tuning: {N}
virtual tokens. HiFICL: n = {N}, r = {R}. Adapters in float32, PEFT's default, on a bf16 base too. No gradient
checkpointing, no clipping, no KV cache but prefix tuning's own. Peak memory is the model's weights, the adapter's, its
optimizer's state, and the peak of what the step allocates; the last is shown alone as `in the step`. FLOPs are those
of matrix products and attention."""


def run(preset: Preset, device: torch.device, compiled: bool) -> list[Record]:
    base = build(preset.model, device)
    models = {FLOOR: base} | {method: adapt(base, method) for method in CONFIGS}
    optimizers = {name: make_optimizer(model) for name, model in models.items() if name != FLOOR}
    records: list[Record] = []
    for length in track(sorted(preset.training_lengths), TITLE):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(preset.model.vocabulary, (1, length), generator=generator).to(device)
        steps: dict[str, Callable[[], None]] = {
            name: partial(floor_step, model, ids) if name == FLOOR else partial(step, model, optimizers[name], ids)
            for name, model in models.items()
        }
        samples = interleave(steps, device, preset.seconds)
        for name, model in models.items():
            state = [] if name == FLOOR else optimizer_state(optimizers[name])
            transient = peak_bytes(steps[name], device)
            records.append(
                {
                    "T": length,
                    "method": name,
                    **summary(samples, name),
                    "of_floor": ratio(samples, name, FLOOR),
                    "of_lora": ratio(samples, name, LORA),
                    "peak_bytes": storage_bytes([*model.parameters(), *model.buffers(), *state]) + transient,
                    "step_bytes": transient,
                    "flops": flops(steps[name]),
                    "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                    "optimizer_bytes": storage_bytes(state),
                }
            )
    return records


def make_optimizer(model: nn.Module) -> AdamW:
    return AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)


def optimizer_state(optimizer: AdamW) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def step(model: nn.Module, optimizer: AdamW, ids: Tensor) -> None:
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def floor_step(base: PreTrainedModel, ids: Tensor) -> None:
    base.train()
    embeddings = base.get_input_embeddings()(ids).requires_grad_()
    base(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()


def tables(records: list[Record]) -> list[Table]:
    lora_bytes = {r["T"]: r["peak_bytes"] for r in records if r["method"] == LORA}
    return [
        tabulate(
            "Time",
            records,
            {
                "T": "T",
                "method": "method",
                "time": lambda r: duration(r["seconds"]),
                "quartiles": spread,
                "of the floor's": lambda r: decimal(r["of_floor"]),
                "of LoRA's": lambda r: decimal(r["of_lora"]),
            },
        ),
        tabulate(
            "Memory, FLOPs, parameters",
            records,
            {
                "T": "T",
                "method": "method",
                "peak memory": lambda r: bytes_of(r["peak_bytes"]),
                "of LoRA's": lambda r: f"{r['peak_bytes'] / lora_bytes[r['T']]:.3f}",
                "in the step": lambda r: bytes_of(r["step_bytes"]),
                "FLOPs": lambda r: scientific(r["flops"]),
                "trainable": lambda r: count(r["trainable_parameters"]),
                "optimizer state": lambda r: bytes_of(r["optimizer_bytes"]),
            },
        ),
    ]


def bars(records: list[Record]) -> list[Bar]:
    long = [r for r in records if r["T"] >= 512]
    mine = [r for r in long if r["method"] == HIFICL]
    lora_bytes = {r["T"]: r["peak_bytes"] for r in long if r["method"] == LORA}

    def worst(what: str, bound: float, ratio_of: Callable[[Record], float]) -> Bar:
        where = f"worst of T = {', '.join(str(r['T']) for r in mine)}"
        return Bar(what, "<=", bound, max(map(ratio_of, mine), default=None), where)

    return [
        worst("training step, T >= 512: time over LoRA", 1.00, lambda r: r["of_lora"]),
        worst("training step, T >= 512: peak memory over LoRA", 1.00, lambda r: r["peak_bytes"] / lora_bytes[r["T"]]),
        worst("training step, T >= 512: time over the frozen floor", 1.05, lambda r: r["of_floor"]),
    ]


def draw(records: list[Record], figure: Figure) -> None:
    longest = [r for r in records if r["T"] == max(r["T"] for r in records)]
    names = [str(r["method"]) for r in longest]
    quantities = (("seconds", 1.0, "time, s"), ("peak_bytes", 2**-30, "peak memory, GiB"), ("flops", 1e-9, "GFLOP"))
    for axes, (quantity, scale, label) in zip(figure.subplots(1, 3), quantities, strict=True):
        bars_drawn = axes.bar(
            names, [r[quantity] * scale for r in longest], color=[COLORS.get(name, GREY) for name in names]
        )
        axes.bar_label(bars_drawn, fmt="%.3g", fontsize=9)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=8)
    figure.suptitle(f"Training step, T = {longest[0]['T']}")
