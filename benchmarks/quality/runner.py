"""Work through the grid: a JSON file for each run, two processes, and nothing done twice."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import set_seed
from transformers.utils import logging

from benchmarks.base_model.model import load_base

from .encoding import CHECKPOINT, encoded_task
from .methods import ALL_METHODS, Setup
from .methods.teacher import draw_demonstrations
from .plan import Job, mean_score
from .scoring import measure
from .training import BATCH, STEPS, samples


def prepare_process() -> None:
    torch.set_num_threads(1)  # with matrices this small, two threads mostly wait for each other
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT reads it, not this code


def environment() -> dict[str, Any]:
    packages = ("peft-hificl", "peft", "torch", "transformers", "datasets", "evaluate")
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "vector": torch.backends.cpu.get_cpu_capability(),
    }
    return {
        "hardware": hardware,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def chosen_rate(job: Job, results: Path) -> float | None:
    """The rate of its sweep that is best on validation data, on average over seeds; None for what is not trained."""
    found: dict[float | None, list[float]] = {}
    for of in job.waits_for:
        found.setdefault(of.rate, []).append(json.loads(of.path(results).read_text())["validation"]["score"])
    return max(found, key=lambda rate: mean_score(found[rate])) if found else None  # of two equal ones the lower rate


def is_done(job: Job, results: Path) -> bool:
    """Whether its file is there and, of a run, has the rate that its sweep chooses: a grid may have grown since."""
    if not job.path(results).exists():
        return False
    if not job.waits_for:
        return True
    swept = all(of.path(results).exists() for of in job.waits_for)
    return swept and json.loads(job.path(results).read_text())["rate"] == chosen_rate(job, results)


def perform(job: Job, results: Path) -> None:
    """Train, measure and write one job."""
    splits = encoded_task(job.task)
    method, rate = ALL_METHODS[job.method], job.rate if job.sweeps else chosen_rate(job, results)
    number = len(splits["train"].prompts)
    of_run = samples(number, job.samples or number, job.seed)
    steps = STEPS.get(job.samples, 0) if method.rates else 0
    set_seed(job.seed)
    _, base = load_base(CHECKPOINT)
    split = "validation" if job.sweeps else "test"
    record: dict[str, Any] = {
        "task": job.task, "method": job.method, "samples": job.samples, "seed": job.seed, "rate": rate,
        "steps": steps, "batch": BATCH if steps else 0,
    }  # fmt: skip
    try:
        fitted = method.fit(base, Setup(job.task, splits, of_run, job.seed, steps, rate or 0.0))
    except FloatingPointError as error:  # of this rate nothing is to be had
        record |= {"diverged": str(error), split: {"score": 0.0}}
    else:
        shown = None
        if fitted.shots:
            rng = np.random.default_rng([job.seed, fitted.shots])
            shown = draw_demonstrations(of_run, [None] * len(splits[split].prompts), fitted.shots, rng)
        record |= {"trainable_parameters": fitted.parameters, "training_seconds": round(fitted.seconds, 2)}
        record["vector"] = torch.backends.cpu.get_cpu_capability()  # a grid may be worked through on several machines
        record[split] = {
            name: round(value, 5) for name, value in measure(fitted.model, job.task, splits, split, shown).items()
        }
    write(job.path(results), record)


def note_environment(path: Path) -> None:
    """Each that had a part in these results, once."""
    known = json.loads(path.read_text()) if path.exists() else []
    if (this := environment()) not in known:
        write(path, [*known, this])


def write(path: Path, record: Any) -> None:
    """Never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def run(jobs: Sequence[Job], results: Path, processes: int) -> None:
    """Perform what is not there yet, in this order as far as runs wait for their sweeps.

    Raises:
        ValueError: what a run waits for is neither there nor among the jobs.
    """
    results.mkdir(parents=True, exist_ok=True)
    left = [job for job in jobs if not is_done(job, results)]
    if left:
        note_environment(results / "environment.json")
    done = sum(job.cost for job in jobs) - sum(job.cost for job in left)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("s of work"))
    running: dict[Future[None], Job] = {}
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), prepare_process) as pool,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), speed_estimate_period=600) as bar,
    ):
        task = bar.add_task(f"{len(left)} runs left", total=round(done + sum(job.cost for job in left)), completed=done)
        while left or running:
            ready = [job for job in left if all(of.path(results).exists() for of in job.waits_for)]
            if not ready and not running:
                raise ValueError(f"{left[0].method} waits for the sweep of a method that is not among the jobs")
            for job in ready:
                if len(running) == processes:
                    break
                left.remove(job)
                if is_done(job, results):  # a run that waited to be judged by a sweep
                    bar.update(task, advance=job.cost)
                else:
                    running[pool.submit(perform, job, results)] = job
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
                job = running.pop(future)
                name = f"{job.task} {job.method} {job.samples}"
                bar.update(task, advance=job.cost, description=f"{len(left)} runs left, last {name}")
