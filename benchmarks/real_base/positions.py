"""How much a trained adapter's effect depends on where a text stands: the same texts, at later positions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import set_seed

from peft_hificl import HiFICLLayer

from ..common import files
from ..common.environment import note_environment
from ..common.tables import Record
from ..quality.training import batches, fit
from . import runner
from .base import load_base
from .encoding import Row, loss_of, measure
from .methods import METHODS

METHOD, SAMPLES, RATE = "hificl-skip-weights", 64, 0.015
OFFSETS = (0, 64, 256, 1024, 4096)
FILE = "positions.jsonl"


def run(tasks: Sequence[str], seeds: Sequence[int], results: Path, cache: Path) -> None:
    """Train on each task with each seed, and append a line for each offset that is not there yet."""
    path = results / FILE
    if path.exists():
        files.drop_torn_line(path)  # what a killed process has left
    there = list(map(json.loads, files.lines(path)[0])) if path.exists() else []
    done = {(record["task"], record["seed"], record["offset"]) for record in there}
    note_environment(results / "environment.json")
    jobs = [(task, seed) for task in tasks for seed in seeds if not done.issuperset((task, seed, o) for o in OFFSETS)]
    for task, seed in track(jobs, f"{len(jobs)} trainings"):
        model, rows = _trained(task, seed, cache)
        for record in records(model, rows["validation"]):
            if (task, seed, record["offset"]) in done:
                continue
            files.append(path, {"task": task, "seed": seed, "method": METHOD, "rate": RATE} | record)


def _trained(task: str, seed: int, cache: Path) -> tuple[nn.Module, dict[str, list[Row]]]:
    rows = runner._task(cache, task)
    chosen = runner.training_rows(task, SAMPLES, seed, cache)
    set_seed(seed)
    attach = METHODS[METHOD].attach
    assert attach is not None
    model, groups = attach(load_base(cache / "model"), chosen, RATE)
    data = batches(range(len(chosen)), runner.STEPS, seed, runner.BATCH)
    fit(model, lambda numbers: loss_of(model, [chosen[n] for n in numbers]), groups, data, runner.STEPS)
    return model.eval(), rows


def records(model: nn.Module, rows: Sequence[Row]) -> Iterator[Record]:
    """For each offset: score and loss, and how far the scores of the pairs have moved from those at offset 0.

    ``moved`` is the root mean square of the change of ``scaling * q.k_D``, over queries, heads and layers;
    ``spread`` is the standard deviation of these scores at offset 0.
    """
    before: Tensor | None = None
    for offset in OFFSETS:
        with _at(model, offset):
            found = measure(model, rows)
            scores = _scores(model, rows[:25])
        before = scores if before is None else before
        moved = (scores - before).square().mean().sqrt()
        record = found | {"moved": float(moved), "spread": float(before.std())}
        yield {"offset": offset} | {name: round(value, 5) for name, value in record.items()}


@contextmanager
def _at(model: Any, offset: int) -> Iterator[None]:
    """Every text of the block begins at this position."""

    def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs["input_ids"]
        positions = torch.arange(offset, offset + ids.shape[1], device=ids.device)[None]
        return args, {**kwargs, "position_ids": positions}

    hook = model.get_base_model().register_forward_pre_hook(shift, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _scores(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """The scores of the pairs for all tokens of these rows, in all layers, before log-weights."""
    found: list[Tensor] = []

    def hear(layer: Any, args: tuple[Any, ...]) -> None:
        query, _, _, scaling = args
        found.append(query @ layer.pairs_of("default").keys.mT * scaling)

    hooks = [m.register_forward_pre_hook(hear) for m in model.modules() if isinstance(m, HiFICLLayer)]
    try:
        loss_of(model, rows)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
