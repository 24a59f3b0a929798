"""Work through the grid: a line of JSON for each job, two processes, and nothing done twice."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import set_seed

from ..base_model.model import load_base
from ..common.environment import note_environment, prepare
from ..common.tables import Record
from .encoding import CHECKPOINT, encoded_task
from .methods import ALL_METHODS, Setup
from .methods.teacher import draw_demonstrations
from .plan import Job, mean_score
from .scoring import measure
from .store import Store
from .training import BATCH, STEPS, samples


def rate_of(job: Job, store: Store) -> float | None:
    """Its own, or of its sweep the one that is best on validation data, on average over seeds; None: not trained."""
    found: dict[float | None, list[float]] = {}
    for of in job.waits_for:
        found.setdefault(of.rate, []).append(store[of]["validation"]["score"])
    # Of two equal ones the lower rate.
    return max(found, key=lambda rate: mean_score(found[rate])) if found else job.rate


def is_done(job: Job, store: Store) -> bool:
    """Whether its record is there and, of a run, has the rate that its sweep chooses: a grid may have grown since."""
    if job not in store or not all(of in store for of in job.waits_for):
        return False
    return not job.waits_for or store[job]["rate"] == rate_of(job, store)


def perform(job: Job, rate: float | None) -> Record:
    """Train and measure, at this rate."""
    splits = encoded_task(job.task)
    method = ALL_METHODS[job.method]
    number = len(splits["train"].prompts)
    of_run = samples(number, job.samples or number, job.seed)
    steps = STEPS.get(job.samples, 0) if method.rates else 0
    set_seed(job.seed)
    _, base = load_base(CHECKPOINT)
    split = "validation" if job.sweeps else "test"
    record: Record = {
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
    return record


def run(jobs: Sequence[Job], results: Path, processes: int) -> None:
    """Perform what is not there yet, in this order as far as runs wait for their sweeps.

    Raises:
        ValueError: what a run waits for is neither there nor among the jobs.
    """
    store = Store(results, {job.task for job in jobs})
    left = [job for job in jobs if not is_done(job, store)]
    if left:
        note_environment(results / "environment.json")
    done = round(sum(job.cost for job in jobs) - sum(job.cost for job in left))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("s of work"))
    running: dict[Future[Record], Job] = {}
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), prepare) as pool,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), speed_estimate_period=600) as bar,
    ):
        task = bar.add_task(f"{len(left)} runs left", total=round(done + sum(job.cost for job in left)), completed=done)
        try:
            while left or running:
                ready = [job for job in left if all(of in store for of in job.waits_for)]
                if not ready and not running:
                    raise ValueError(f"{left[0].method} waits for the sweep of a method that is not among the jobs")
                for job in ready:
                    if len(running) == processes:
                        break
                    left.remove(job)
                    if is_done(job, store):  # a run that waited to be judged by a sweep
                        bar.update(task, advance=job.cost)
                    else:
                        running[pool.submit(perform, job, rate_of(job, store))] = job
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    record = future.result()
                    store.add(job := running.pop(future), record)
                    name = f"{job.task} {job.method} {job.samples}"
                    bar.update(task, advance=job.cost, description=f"{len(left)} runs left, last {name}")
        finally:  # where a job fails, those beside it are still of use
            for future, job in running.items():
                if future.exception() is None:
                    store.add(job, future.result())
