"""One row of a table: rates on validation data, then the test, a line of JSON for each, and nothing done twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, set_seed

from ..common import files
from ..common.environment import command, environment
from ..common.tables import Record
from . import recipe, samples, training
from .answering import answer_all
from .methods import Method, normalises_queries
from .prompts import Encoder
from .recipe import Sizes
from .samples import SHUFFLE, TASKS, Sample, Splits
from .scoring import MAIN, score

RUNS = "runs.jsonl"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Job:
    """One training with one measurement, or a measurement of prompts."""

    model: str
    task: str
    method: str
    n: int
    r: int
    samples: int
    held: int  # training data that are set apart for validation
    epochs: int
    seed: int
    split: str
    questions: int
    dtype: str
    data: str  # "official files", or the hub's id and the splits
    rate: float | None = None  # of what is trained

    @classmethod
    def of(cls, record: Record) -> Job:
        """The job that left this record."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    @property
    def folder(self) -> str:
        """A name for what its training leaves, which jobs on validation and test data share."""
        training = {name: value for name, value in asdict(self).items() if name not in ("split", "questions")}
        digest = hashlib.sha256(json.dumps(training).encode()).hexdigest()[:8]
        return f"{Path(self.model).name}-{self.task}-{self.method}-{digest}"


@dataclass(frozen=True)
class Setup:
    """What a job's outcome does not depend on, and where things are."""

    results: Path
    work: Path
    data: Path | None
    eval_batch: int = 8
    save_steps: int = 50
    workers: int = 0
    checkpointing: bool = False


def load(results: Path) -> dict[Job, Record]:
    """What is there.  What a killed process left of its last line is dropped, with a warning."""
    path = results / RUNS
    if not path.exists():
        return {}
    if files.drop_torn_line(path):
        warnings.warn(f"{path}: dropped the last line, which was written in part", stacklevel=2)
    records = [json.loads(line) for line in files.lines(path)[0]]
    return {Job.of(record): record for record in records}


def load_splits(
    task: str, data: Path | None, hub: str | None, hub_splits: Sequence[str], sizes: tuple[int, int, int], seed: int
) -> Splits:
    """Training, validation and test samples.

    Args:
        data: the folder of the task's official files; unused with `hub`.
        hub, hub_splits: a data set's id, and the names of its training and test splits.
        sizes: of training, validation, test; the last may be more than there are.

    Raises:
        FileNotFoundError, ValueError: see `samples`.
    """
    number, validation, questions = sizes
    if hub is not None:
        # Twice as many, as samples about the pictures of validation are left out.
        found = samples.stream(hub, hub_splits[0], 2 * (number + validation), SHUFFLE)
        test = samples.stream(hub, hub_splits[1], questions, SHUFFLE)
    elif data is not None:
        found, test = samples.read(task, data, "train"), samples.first(samples.read(task, data, "val"), questions)
    else:
        raise ValueError("Neither a folder of official files nor a hub's data set is given: set --data or --hub.")
    return samples.split_training(found, validation, number, seed) | {"test": test}


def load_model(name: str, dtype: str) -> tuple[PreTrainedModel, Any]:
    """The frozen base on this process's device, and its processor."""
    device = PartialState(cpu=not torch.cuda.is_available()).device
    base = AutoModelForImageTextToText.from_pretrained(name, dtype=DTYPES[dtype])
    base.requires_grad_(False)
    return base.to(device).eval(), AutoProcessor.from_pretrained(name)


def run_row(
    job: Job, rates: Sequence[float], base: PreTrainedModel, processor: Any, splits: Splits, setup: Setup
) -> Record:
    """Perform what is not there yet of a method's row; return the record of its test.

    Args:
        job: the test, without a rate.
        rates: to choose from, instead of the method's own.
    """
    method = Method.named(job.method)
    tried = (tuple(rates) or method.rates(normalises_queries(base))) if method.trained else ()
    with PartialState().main_process_first():
        done = load(setup.results)
    encoder = Encoder(processor, TASKS[job.task].instruction)
    rate = tried[0] if tried else None
    if len(tried) > 1:
        questions = len(splits["validation"])
        sweep = [replace(job, split="validation", questions=questions, rate=of) for of in tried]
        for trial in sweep:
            if trial not in done:
                done[trial] = perform(trial, base, encoder, splits, setup)
        rate = best_rate(done, sweep)
    test = replace(job, rate=rate, questions=len(splits["test"]))
    if test not in done:
        done[test] = perform(test, base, encoder, splits, setup)
    return done[test]


def best_rate(done: Mapping[Job, Record], sweep: Sequence[Job]) -> float | None:
    """The rate with the best score on validation data; of two equal ones the lower."""
    return max(sorted(sweep, key=lambda job: job.rate or 0), key=lambda job: done[job][MAIN[job.task]]).rate


def perform(job: Job, base: PreTrainedModel, encoder: Encoder, splits: Splits, setup: Setup) -> Record:
    """Train, answer and score, and add the record; whatever a killed process left of this job is gone on from."""
    state, folder, method = PartialState(), setup.work / job.folder, Method.named(job.method)
    record: Record = asdict(job) | {"recipe": recipe.as_record() | {"beams": recipe.beams(base.config.model_type)}}
    with _progress(state.is_main_process) as progress:
        model: Any = base
        try:
            if job.rate is not None:
                model, trained = _trained(job, method, base, encoder, splits["train"], setup, progress)
                record |= trained
            asked = splits[job.split]

            def show(query: Sample) -> list[Sample]:
                return samples.draw(splits["train"], method.shots, query, job.seed)

            path = folder / f"{job.split}-{job.questions}.jsonl"
            said = answer_all(model.eval(), encoder, asked, show, path, setup.eval_batch, progress)
            record |= score(job.task, asked, said, setup.data) if state.is_main_process else {}
        except FloatingPointError as error:  # of this rate nothing is to be had
            record |= {"diverged": str(error), MAIN[job.task]: 0.0}
        finally:
            if model is not base:
                model.unload()
    if state.is_main_process:
        record |= {
            "command": command(),
            "git": git_state(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        record |= environment() | {"processes": state.num_processes}
        record["versions"] |= {name: version(name) for name in ("accelerate", "pycocoevalcap")}
        files.append(setup.results / RUNS, record)
    state.wait_for_everyone()
    return load(setup.results)[job]


def _trained(
    job: Job,
    method: Method,
    base: PreTrainedModel,
    encoder: Encoder,
    train: Sequence[Sample],
    setup: Setup,
    progress: Progress,
) -> tuple[PeftModel, Record]:
    """The adapted model, trained or as it was stored, and what there is to say about its training."""
    folder = setup.work / job.folder
    adapter, told = folder / "adapter", folder / "training.json"
    if told.exists():
        return PeftModel.from_pretrained(base, adapter), json.loads(told.read_text())
    set_seed(job.seed)
    model = method.attach(base, Sizes(job.n, job.r))
    try:
        method.start(model, encoder, train)
        groups = method.groups(model, job.rate or 0.0)
        record: Record = {"parameters": sum(p.numel() for group in groups for p in group["params"])}
        record["adapter"] = json.loads(json.dumps(model.active_peft_config.to_dict(), default=sorted))
        record |= training.train(
            model, groups, encoder, train, folder, job.epochs, job.seed, progress,
            setup.save_steps, setup.workers, setup.checkpointing,
        )  # fmt: skip
    except BaseException:
        model.unload()
        raise
    if PartialState().is_main_process:
        model.save_pretrained(str(adapter), save_embedding_layers=False)
        files.write(told, record)  # last: what follows it is whole
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    PartialState().wait_for_everyone()
    return model, record


def git_state() -> Record:
    """The commit of this code, and whether files differ from it; empty outside a clone."""

    def git(*words: str) -> str:
        root = Path(__file__).parents[2]
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    return {}


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not shown or "PYTEST_VERSION" in os.environ) as progress:
        yield progress
