"""The tables of what is there, beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..common.tables import Record, Table
from ..quality import paper
from .runner import Job, load

TASKS = {"vqav2": "VQAv2, accuracy", "okvqa": "OK-VQA, accuracy", "coco": "COCO captions, CIDEr"}
CHAIR = ("chair_i", "chair_s", "recall")
FILE = "report.md"


def write(results: Path) -> Path:
    """Write the report.

    Raises:
        FileNotFoundError: there are no results.
    """
    records = load(results)
    if not records:
        raise FileNotFoundError(f"There are no results in {results}: start with `python -m benchmarks.lmm run`.")
    lines = ["# The paper's tasks on the paper's models", "", "Written by `python -m benchmarks.lmm report`."]
    for table in [*tests(records), rates(records), published()]:
        if table.rows:
            lines += ["", *table.markdown()]
    path = results / FILE
    path.write_text("\n".join(lines) + "\n")
    return path


def tests(records: Mapping[Job, Record]) -> list[Table]:
    """The test scores of a model on a task, a line for each run."""
    found = sorted({(job.model, job.task) for job in records if job.split == "test"})
    return [_tests(records, model, task) for model, task in found]


def _tests(records: Mapping[Job, Record], model: str, task: str) -> Table:
    columns = ["method", "n, r", "parameters", "rate", "samples", "epochs", "seed", "answers", "score"]
    rows: list[list[object]] = []
    for job, record in records.items():
        if (job.model, job.task, job.split) != (model, task, "test"):
            continue
        trained = "parameters" in record
        size = f"{job.n}, {job.r}" if job.method.startswith("hificl") else "-"
        row: list[object] = [
            job.method,
            size,
            f"{record['parameters']:,}" if trained else "-",
            f"{job.rate:g}" if job.rate else "-",
        ]
        row += [
            str(job.samples),
            str(job.epochs) if trained else "-",
            str(job.seed),
            str(job.questions),
            _score(record),
        ]
        rows.append([*row, *(_percent(record, name) for name in CHAIR)] if task == "coco" else row)
    return Table(
        f"{TASKS[task]}: {model}", columns + (["CHAIR i", "CHAIR s", "recall"] if task == "coco" else []), rows
    )


def _score(record: Record) -> str:
    if "diverged" in record:
        return "diverged"
    return f"{record['cider']:.4f}" if "cider" in record else f"{100 * record['vqa_accuracy']:.2f}"


def _percent(record: Record, name: str) -> str:
    return f"{100 * record[name]:.1f}" if name in record else "-"


def rates(records: Mapping[Job, Record]) -> Table:
    """The scores by which rates were chosen."""
    rows = [
        [Path(job.model).name, job.task, job.method, job.seed, job.samples, f"{job.rate:g}", _score(record)]
        for job, record in records.items()
        if job.split == "validation"
    ]
    return Table("Rates, on validation data", ["model", "task", "method", "seed", "samples", "rate", "score"], rows)


def published() -> Table:
    """The papers' figures."""
    columns = ["model", "method", "parameters", *paper.TASKS, "source"]
    return Table("Published, not measured here", columns, [list(row) for row in paper.MAIN])
