"""The results folder: a file of JSON lines for each task and kind of job, to which lines are only ever added."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

from ..common import files
from ..common.tables import Record
from .plan import KINDS, Job


def path_of(folder: Path, kind: str, task: str) -> Path:
    return folder / kind / f"{task}.jsonl"


class Store:
    """The records of some tasks by job; of two lines for the same job the later one holds.

    One process may write a task at a time, and any number of them different tasks. What a killed process left of its
    last line is dropped, with a warning: that job is done again.
    """

    def __init__(self, folder: Path, tasks: Iterable[str]) -> None:
        self.folder = folder
        self._records: dict[Job, Record] = {}
        for path in [path_of(folder, kind, task) for kind in KINDS for task in tasks]:
            if not path.exists():
                continue
            if files.drop_torn_line(path):
                warnings.warn(f"{path}: dropped the last line, which was written in part", stacklevel=2)
            for line in files.lines(path)[0]:
                job = Job.of(record := json.loads(line))
                if job.kind == path.parent.name:  # a trial is no sweep, though a grown plan may make it one
                    self._records[job] = record

    def __contains__(self, job: Job) -> bool:
        return job in self._records

    def __getitem__(self, job: Job) -> Record:
        return self._records[job]

    def add(self, job: Job, record: Record) -> None:
        files.append(path_of(self.folder, job.kind, job.task), record)
        self._records[job] = record
