"""What a method costs: parameters; time, memory and FLOPs of a training step and of an answer, side by side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..base_model.model import load_base
from ..common.environment import command, environment
from ..common.tables import Record
from ..speed.measure import flops, interleave, peak_bytes, ratio, summary
from .encoding import CHECKPOINT, answers, encoded_task
from .methods import METHODS, Setup
from .methods.learner import number
from .methods.teacher import draw_demonstrations
from .tasks import TASKS
from .training import BATCH

TASK, QUERIES, SECONDS = "convention", 50, 60
TRAINED = (
    "hificl",
    "hificl-n16",
    "lora-8",
    "lora-16",
    "prefix",
    "prefix-demos",
    "cartridge",
    "ia3",
    "live",
    "mimic",
    "hificl-teacher",
)
PROMPTED = ("zero-shot", "icl-1", "icl-8", "icl-16")


def measure() -> Record:
    """Medians over rounds in which every method has its turn; ratios are those within a round."""
    splits, device = encoded_task(TASK), torch.device("cpu")
    samples = list(range(len(splits["train"].prompts)))
    queries = [("test", row) for row in range(QUERIES)]
    steps: dict[str, Callable[[], object]] = {}
    asked: dict[str, Callable[[], object]] = {}
    parameters = dict.fromkeys(PROMPTED, 0)
    for name in (*TRAINED, *PROMPTED):
        _, base = load_base(CHECKPOINT)
        setup = Setup(TASK, splits, samples, seed=0, steps=1, rate=1.0)
        attach = METHODS[name].attach
        if attach is not None:
            learner = attach(base, setup)
            parameters[name] = number(learner)
            steps[name] = lambda learner=learner: learner.loss(samples[:BATCH]).backward()  # type: ignore[misc]
            model, shown = learner.model, None
        else:
            shots = METHODS[name].fit(base, setup).shots
            model = base
            shown = draw_demonstrations(samples, [None] * QUERIES, shots, np.random.default_rng(0)) if shots else None
        asked[name] = lambda model=model, shown=shown: answers(  # type: ignore[misc]
            model, splits, queries, TASKS[TASK].max_new_tokens, shown
        )
    trained, answered = interleave(steps, device, SECONDS), interleave(asked, device, SECONDS)
    rows = []
    for name in (*TRAINED, *PROMPTED):
        row: Record = {"method": name, "trainable_parameters": parameters[name]}
        if name in steps:
            row |= {
                "step_seconds": summary(trained, name)["seconds"],
                "step_over_hificl": ratio(trained, name, "hificl"),
                "step_peak_bytes": peak_bytes(steps[name], device),
                "step_flops": flops(steps[name]),
            }
        row |= {
            "query_seconds": summary(answered, name)["seconds"] / QUERIES,
            "query_over_hificl": ratio(answered, name, "hificl"),
            "query_flops": flops(asked[name]) // QUERIES,
        }
        rows.append(row)
    return {"command": command(), **environment(), "task": TASK, "batch": BATCH, "queries": QUERIES, "rows": rows}
