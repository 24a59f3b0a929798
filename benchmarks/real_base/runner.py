"""Work through jobs: a line of JSON for each, several processes, and nothing done twice."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
from rich.progress import MofNCompleteColumn, Progress
from torch.optim import AdamW
from transformers import set_seed

from ..common import files
from ..common.environment import note_environment, prepare
from ..common.tables import Record
from ..quality.methods.learner import trainable
from ..quality.training import batches, fit, samples
from ..speed.measure import peak_bytes
from . import together
from .base import load_base, load_tokenizer
from .encoding import Row, encode, encode_text, forgetting, loss_of, measure
from .methods import METHODS, Adapter, Method
from .tasks import load_general, load_task
from .together import State, Together, log_probabilities, state_of

STEPS, BATCH = 50, 8
READ = 32  # samples that a method reads, at most, before it trains
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

    Of the method's own rates, if any was tried.  Of two equal ones the lower; None where there are no such seeds.
    """
    scores = _tried(done, task, method, size)
    scores = {rate: of for rate, of in scores.items() if rate in METHODS[method].rates} or scores
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


def training_rows(task: str, size: int, seed: int, cache: Path) -> list[Row]:
    """The samples of a seed, of which fewer are the first of more."""
    rows = _task(cache, task)["train"]
    return [rows[number] for number in samples(len(rows), size, seed)]


@functools.cache
def _start(method: str, task: str, seed: int, size: int, cache: Path) -> State:
    """What a method begins with: it depends neither on the rate nor on samples beyond the first `READ`.

    On the CPU, whose decompositions of small matrices are faster than a GPU's.
    """
    attach = METHODS[method].attach
    assert attach is not None
    set_seed(seed)
    model, _ = attach(load_base(cache / "model", "cpu"), training_rows(task, size, seed, cache), 1.0)
    return state_of(model)


@functools.cache
def _general(cache: Path) -> list[Row]:
    tokenizer = load_tokenizer(cache / "model")
    return encode_text(tokenizer, load_general(cache / "tasks"))


@functools.cache
def _before(cache: Path) -> list[torch.Tensor]:
    """What the base says of the general sentences."""
    return log_probabilities(load_base(cache / "model"), _general(cache))


def perform(job: Job, cache: Path) -> Record:
    """Train and measure."""
    method, rows = METHODS[job.method], _task(cache, job.task)
    chosen = training_rows(job.task, job.samples, job.seed, cache)
    set_seed(job.seed)
    base = load_base(cache / "model")
    record: Record = asdict(job) | {"vector": torch.backends.cpu.get_cpu_capability()}
    if method.attach is None or job.rate is None:
        return record | _rounded(method.answer(base, rows, job.split, chosen))
    model, groups = method.attach(base, chosen, job.rate)
    model.eval()
    record |= {"steps": STEPS, "batch": BATCH, "parameters": sum(p.numel() for p in trainable(model))}
    record["start"] = _rounded(measure(model, rows[job.split]) | forgetting_of(model, cache))

    def loss(numbers: list[int]) -> torch.Tensor:
        return loss_of(model, [chosen[number] for number in numbers])

    try:
        data = batches(range(len(chosen)), STEPS, job.seed, BATCH)
        record["seconds"] = round(fit(model, loss, groups, data, STEPS, optimizer_type=optimizer_of(method)), 2)
    except FloatingPointError as error:  # of this rate nothing is to be had
        return record | {"diverged": str(error), "score": 0.0}
    record |= _rounded(measure(model, rows[job.split]) | forgetting_of(model, cache))
    longest = sorted(range(len(chosen)), key=lambda number: -len(chosen[number].ids))[:BATCH]
    return record | {"peak_bytes": peak_bytes(lambda: loss(longest).backward(), base.device)}


def perform_together(jobs: Sequence[Job], cache: Path) -> list[Record]:
    """Train and measure jobs of one method and rate as `perform` does, in one batch; see `together`."""
    method, rate = METHODS[jobs[0].method], jobs[0].rate
    assert method.attach is not None and rate is not None
    base, tasks, general = load_base(cache / "model"), [_task(cache, job.task) for job in jobs], _general(cache)
    chosen = [training_rows(job.task, job.samples, job.seed, cache) for job in jobs]
    states = [_start(job.method, job.task, job.seed, min(job.samples, READ), cache) for job in jobs]
    before = _before(cache)
    bare = replace(method.attach, start=None) if isinstance(method.attach, Adapter) else method.attach
    model, groups = bare(base, chosen[0], rate)
    model.eval()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = [group | {"params": [names[id(parameter)] for parameter in group["params"]]} for group in groups]
    number = sum(value.numel() for value in states[0].values())
    stacked = Together(model, states)

    def found() -> list[Record]:
        scores = together.measure(stacked, [rows[job.split] for rows, job in zip(tasks, jobs, strict=True)])
        lost = together.forgetting(stacked, general, before)
        return [_rounded(score | _general_names(record)) for score, record in zip(scores, lost, strict=True)]

    # What a method begins with is asked of validation data alone, where starts are compared.
    start = found() if jobs[0].split == "validation" else [{}] * len(jobs)
    data = [batches(range(len(rows)), STEPS, job.seed, BATCH) for rows, job in zip(chosen, jobs, strict=True)]
    diverged, records = together.train(stacked, named, chosen, data, STEPS, optimizer_of(method)), list[Record]()
    common = {"steps": STEPS, "batch": BATCH, "parameters": number, "together": len(jobs), "device": _device(base)}
    common["matmul"] = torch.get_float32_matmul_precision()
    for job, begun, bad, record in zip(jobs, start, diverged, found(), strict=True):
        end = {"diverged": "the loss is not finite: the rate is too high", "score": 0.0} if bad else record
        records.append(asdict(job) | common | {"start": begun} | end)
    return records


def _draws(method: Method) -> bool:
    return isinstance(method.attach, Adapter) and method.attach.dropout > 0


def optimizer_of(method: Method) -> type[AdamW]:
    return method.attach.optimizer if isinstance(method.attach, Adapter) else AdamW


def forgetting_of(model: torch.nn.Module, cache: Path) -> Record:
    """What the general sentences say of a model, by names of their own."""
    return _general_names(forgetting(model, _general(cache)))


def _general_names(record: Record) -> Record:
    return {f"general_{name}": value for name, value in record.items()}


def _device(base: torch.nn.Module) -> str:
    device = next(base.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _rounded(record: Record) -> Record:
    return {name: round(value, 5) for name, value in record.items()}


def check(jobs: Sequence[Job], cache: Path) -> None:
    """See that every job can be performed; warn of a task that has fewer training samples than a job asks for.

    Raises:
        FileNotFoundError: the tasks have not been prepared.
    """
    for task in {job.task for job in jobs}:
        available = len(load_task(cache / "tasks", task)["train"])
        most = max(job.samples for job in jobs if job.task == task)
        if most > available:
            warnings.warn(f"{task} has {available} training samples: these stand for {most}", stacklevel=2)


def run(jobs: Sequence[Job], results: Path, cache: Path, processes: int, at_once: int = 1) -> None:
    """Perform what is not there yet.

    Args:
        jobs: what shall be there.
        results: the folder of the JSON lines.
        cache: the folder of the model and the tasks.
        processes: how many work side by side.
        at_once: how many trainings of one method and rate share a batch.
    """
    done = load(results, {job.task for job in jobs})
    left = [job for job in jobs if job not in done]
    if not left:
        return
    note_environment(results / "environment.json")
    with ProcessPoolExecutor(processes, get_context("spawn"), prepare) as pool:
        futures = [pool.submit(_perform, part, cache) for part in parts_of(left, at_once)]
        try:
            with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
                shown = progress.add_task("jobs", total=len(left))
                for future in as_completed(futures):
                    for record in future.result():
                        files.append(results / f"{record['task']}.jsonl", record)
                        progress.advance(shown)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def parts_of(jobs: Sequence[Job], at_once: int) -> list[list[Job]]:
    """Jobs that share a batch: trainings of one method and rate.

    Prompts stay alone, and so do methods whose draws for each row need a row for each.
    """
    if at_once == 1:
        return [[job] for job in jobs]
    of = dict[tuple[str, float | None], list[Job]]()
    for job in jobs:
        of.setdefault((job.method, job.rate), []).append(job)
    sizes = {key: 1 if key[1] is None or _draws(METHODS[key[0]]) else at_once for key in of}
    return [
        group[start : start + sizes[key]] for key, group in of.items() for start in range(0, len(group), sizes[key])
    ]


def _perform(jobs: Sequence[Job], cache: Path) -> list[Record]:
    return [perform(jobs[0], cache)] if len(jobs) == 1 else perform_together(jobs, cache)
