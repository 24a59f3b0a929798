"""Work through jobs: a line of JSON for each, several processes, and nothing done twice."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
from rich.progress import track
from transformers import set_seed

from ..common import files
from ..common.environment import note_environment, prepare
from ..common.tables import Record
from ..quality.methods.learner import trainable
from ..quality.training import batches, fit, samples
from ..speed.measure import peak_bytes
from .base import load_base, load_tokenizer
from .encoding import Row, encode, encode_text, forgetting, loss_of, measure
from .methods import METHODS
from .tasks import load_general, load_task

STEPS, BATCH = 50, 8
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Job:
    """One training with one measurement, or a measurement of prompts."""

    task: str
    method: str
    samples: int  # that are trained on, or shown
    seed: int
    split: str
    rate: float | None = None  # of what is trained

    @classmethod
    def of(cls, record: Record) -> Job:
        """The job that left this record."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


def load(results: Path, tasks: Iterable[str]) -> dict[Job, Record]:
    """What is there of these tasks.  What a killed process left of its last line is dropped, with a warning."""
    found = {}
    for path in [results / f"{task}.jsonl" for task in tasks]:
        if not path.exists():
            continue
        if files.drop_torn_line(path):
            warnings.warn(f"{path}: dropped the last line, which was written in part", stacklevel=2)
        for line in files.lines(path)[0]:
            record = json.loads(line)
            found[Job.of(record)] = record
    return found


def best_rate(done: Mapping[Job, Record], task: str, method: str, size: int) -> float | None:
    """The rate with the best mean score on validation data, over the seeds that every rate was tried with.

    Of two equal ones the lower; None where there are no such seeds.
    """
    scores = _tried(done, task, method, size)
    seeds = set[int]().union(*scores.values()).intersection(*scores.values())
    if not seeds:
        return None
    return max(sorted(scores), key=lambda rate: round(fmean(scores[rate][seed] for seed in seeds), 9))


def _tried(done: Mapping[Job, Record], task: str, method: str, size: int) -> dict[float, dict[int, float]]:
    """Scores on validation data by rate and seed."""
    scores: dict[float, dict[int, float]] = {}
    for job, record in done.items():
        if (job.task, job.method, job.samples, job.split) == (task, method, size, "validation") and job.rate:
            scores.setdefault(job.rate, {})[job.seed] = record["score"]
    return scores


def plan(
    tasks: Sequence[str],
    methods: Sequence[str],
    sizes: Sequence[int],
    seeds: Sequence[int],
    split: str,
    rates: Sequence[float],
    done: Mapping[Job, Record],
) -> Iterator[Job]:
    """The jobs of a command: on validation data every rate of a method's grid, on test data the one that was best.

    Args:
        tasks, methods, sizes, seeds, split: what is crossed; prompts are measured once for all sizes.
        rates: instead of the methods' own.
        done: what is there, to choose rates by.

    Raises:
        ValueError: a test without a rate that validation data have chosen.
    """
    for task in tasks:
        for name in methods:
            method = METHODS[name]
            if method.attach is None:
                # Without a demonstration nothing depends on the seed.
                yield from (
                    Job(task, name, method.shots, seed, split) for seed in (seeds if method.shots else seeds[:1])
                )
                continue
            for size in sizes:
                tried: Sequence[float | None] = rates or method.rates
                if not rates and split == "test":
                    tried = [best_rate(done, task, name, size)]
                    if tried == [None] or set(method.rates) - _tried(done, task, name, size).keys():
                        raise ValueError(
                            f"Not every rate of {name} was tried on validation data of {task} with {size} samples: "
                            "run it with --split validation first, or give --rates."
                        )
                yield from (Job(task, name, size, seed, split, rate) for seed in seeds for rate in tried)


@functools.cache
def _task(cache: Path, name: str) -> dict[str, list[Row]]:
    tokenizer = load_tokenizer(cache / "model")
    return {split: encode(tokenizer, of) for split, of in load_task(cache / "tasks", name).items()}


@functools.cache
def _general(cache: Path) -> list[Row]:
    tokenizer = load_tokenizer(cache / "model")
    return encode_text(tokenizer, load_general(cache / "tasks"))


def perform(job: Job, cache: Path) -> Record:
    """Train and measure."""
    method, rows = METHODS[job.method], _task(cache, job.task)
    chosen = [rows["train"][number] for number in samples(len(rows["train"]), job.samples, job.seed)]
    set_seed(job.seed)
    base = load_base(cache / "model")
    record: Record = asdict(job) | {"vector": torch.backends.cpu.get_cpu_capability()}
    if method.attach is None or job.rate is None:
        return record | _rounded(measure(base, rows[job.split], chosen))
    model, groups = method.attach(base, chosen, job.rate)
    record |= {"steps": STEPS, "batch": BATCH, "parameters": sum(p.numel() for p in trainable(model))}
    record["start"] = _rounded(measure(model, rows[job.split]) | forgetting_of(model, cache))

    def loss(numbers: list[int]) -> torch.Tensor:
        return loss_of(model, [chosen[number] for number in numbers])

    try:
        data = batches(range(len(chosen)), STEPS, job.seed, BATCH)
        record["seconds"] = round(fit(model, loss, groups, data, STEPS), 2)
    except FloatingPointError as error:  # of this rate nothing is to be had
        return record | {"diverged": str(error), "score": 0.0}
    record |= _rounded(measure(model, rows[job.split]) | forgetting_of(model, cache))
    longest = sorted(range(len(chosen)), key=lambda number: -len(chosen[number].ids))[:BATCH]
    return record | {"peak_bytes": peak_bytes(lambda: loss(longest).backward(), base.device)}


def forgetting_of(model: torch.nn.Module, cache: Path) -> Record:
    """What the general sentences say of a model, by names of their own."""
    return {f"general_{name}": value for name, value in forgetting(model, _general(cache)).items()}


def _rounded(record: Record) -> Record:
    return {name: round(value, 5) for name, value in record.items()}


def check(jobs: Sequence[Job], cache: Path) -> None:
    """See that every job can be performed.

    Raises:
        FileNotFoundError: the tasks have not been prepared.
        ValueError: a task has fewer training samples than a job asks for.
    """
    available = {task: len(load_task(cache / "tasks", task)["train"]) for task in {job.task for job in jobs}}
    for job in jobs:
        if job.samples > available[job.task]:
            raise ValueError(f"{job.task} has {available[job.task]} training samples, {job.samples} were asked for.")


def run(jobs: Sequence[Job], results: Path, cache: Path, processes: int) -> None:
    """Perform what is not there yet."""
    done = load(results, {job.task for job in jobs})
    left = [job for job in jobs if job not in done]
    if not left:
        return
    note_environment(results / "environment.json")
    with ProcessPoolExecutor(processes, get_context("spawn"), prepare) as pool:
        futures = {pool.submit(perform, job, cache): job for job in left}
        try:
            for future in track(as_completed(futures), f"{len(left)} jobs", total=len(left)):
                files.append(results / f"{futures[future].task}.jsonl", future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
