"""What the runs show, as Markdown tables: scores, paired differences, costs and forgetting, rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from ..common.tables import Record, Table, bytes_of, count, decimal
from ..quality.statistics import Interval, holm, interval, paired
from .methods import ANSWERS, METHODS
from .runner import SPLITS, Job, best_rate, load
from .tasks import TASKS

NOTHING = "-"
MEAN = "mean over tasks"
PROMPTS = 0  # the number of training samples of a section on prompts alone, on all tasks that have any
REFERENCES = ("lora-3", "8-shot")

EXPLANATION = """\
Score: the share of answers that are right to the last token, in %. Mean ± half the width of the 95 % t-interval over
seeds, whose number stands in brackets; a seed draws the training samples, their order and the start. Prompts do not
depend on the number of training samples: a k-shot prompt shows the first k of them. A mean over tasks is given where
every task of the table was measured, over the seeds that all of them have. The rate is that with the best mean on
validation data of the same task and number of samples; where none was tried there, the lowest that was run. What was
not run at that rate has no score.

Forgetting: the mean loss of a token of 64 sentences that no task is about, with and without the adapter, and
KL(base || adapted) of these tokens in nats; at the start, before the first step, and after training."""

Cell = dict[int, Record]  # by seed


class Results:
    """Records of one split by task, method and number of samples, at the rate that validation data have chosen."""

    def __init__(self, done: Mapping[Job, Record], split: str) -> None:
        self.done = done
        self.split = split
        self._cells: dict[tuple[str, str, int], dict[float, Cell]] = {}
        for job, record in done.items():
            if job.split == split and job.method in METHODS:
                rates = self._cells.setdefault((job.task, job.method, job.samples), {})
                rates.setdefault(job.rate or 0.0, {})[job.seed] = record
        self.sizes = sorted({size if METHODS[name].attach else PROMPTS for _, name, size in self._cells})

    def rate(self, task: str, method: str, size: int) -> float | None:
        best = best_rate(self.done, task, method, size)
        return min(self.rates(task, method, size), default=None) if best is None else best

    def rates(self, task: str, method: str, size: int) -> set[float]:
        return set(self._cells.get((task, method, size), {}))

    def cell(self, task: str, method: str, size: int, rate: float | None = None) -> Cell:
        size = size if METHODS[method].attach else METHODS[method].shots
        rate = self.rate(task, method, size) if rate is None else rate
        return {} if rate is None else self._cells.get((task, method, size), {}).get(rate, {})

    def tasks(self, size: int) -> list[str]:
        names = [name for name, method in METHODS.items() if (method.attach is None) == (size == PROMPTS)]
        return [task for task in TASKS if any(self.cell(task, name, size) for name in names)]

    def methods(self, size: int) -> list[str]:
        return [name for name in METHODS if any(self.cell(task, name, size) for task in self.tasks(size))]


def scores(cell: Cell) -> dict[int, float]:
    return {seed: record["score"] for seed, record in cell.items()}


def over_tasks(cells: Iterable[dict[int, float]]) -> dict[int, float]:
    """The mean over tasks of each seed that all of them have."""
    found = list(cells)
    shared = set.intersection(*map(set, found)) if found else set()
    return {seed: fmean(cell[seed] for cell in found) for seed in sorted(shared)}


def by_task(found: Results, size: int, method: str) -> list[dict[int, float]]:
    """Scores by seed of each task, and last their mean."""
    cells = [scores(found.cell(task, method, size)) for task in found.tasks(size)]
    return [*cells, over_tasks(cells)]


def percent(found: Interval | None, sign: str = "") -> str:
    if found is None:
        return NOTHING
    spread = "" if found.half is None else f" ± {100 * found.half:.1f}"
    return f"{100 * found.mean:{sign}z.1f}{spread} ({found.count})"


def score_table(found: Results, size: int) -> Table:
    rows = [
        [METHODS[name].title, *(percent(interval(list(of.values()))) for of in by_task(found, size, name))]
        for name in found.methods(size)
    ]
    return Table("Scores, in %", ("method", *found.tasks(size), MEAN), rows)


def difference_table(found: Results, size: int, reference: str) -> Table:
    """Of pairs with the same task and seed; p of the two-sided paired t-test of the means over tasks."""
    others = by_task(found, size, reference)
    rows, tests = [], []
    for name in found.methods(size):
        if name in (reference, "zero-shot"):
            continue
        pairs = []
        for own, other in zip(by_task(found, size, name), others, strict=True):
            seeds = sorted(own.keys() & other.keys())
            pairs.append(paired([own[seed] for seed in seeds], [other[seed] for seed in seeds]))
        rows.append([METHODS[name].title, *(percent(pair, "+") for pair in pairs)])
        tests.append(pairs[-1].p if pairs[-1] else None)
    corrected = [NOTHING if p is None else f"{p:.3f}" for p in holm(tests)]
    title = f"Difference from {METHODS[reference].title}, in points"
    columns = ("method", *found.tasks(size), MEAN, "p (Holm)")
    return Table(title, columns, [[*row, p] for row, p in zip(rows, corrected, strict=True)])


def cost_table(found: Results, size: int) -> Table:
    rows = []
    for name in found.methods(size):
        records = [record for task in found.tasks(size) for record in found.cell(task, name, size).values()]
        trained = [record for record in records if "general_kl" in record]
        if trained:
            starts = [record["start"] for record in trained if record["start"]]
            rows.append(
                [
                    METHODS[name].title,
                    count(trained[-1]["parameters"]),
                    *_of_one(trained),
                    *(_mean(trained, field) for field in ("general_loss_before", "general_loss")),
                    *(_mean(of, "general_kl") if of else NOTHING for of in (starts, trained)),
                    f"{100 * fmean(start['score'] for start in starts):.1f}" if starts else NOTHING,
                    str(len(trained)),
                ]
            )
    columns = (
        "method", "parameters", "seconds", "memory of a step", "loss of the base", "loss after", "KL at the start",
        "KL after", "score at the start, in %", "runs",
    )  # fmt: skip
    return Table("Costs and forgetting, over the tasks", columns, rows)


def _of_one(records: Sequence[Record]) -> tuple[str, str]:
    """Seconds and memory of a training; of one that shared its batch with others there are none."""
    alone = [record for record in records if "seconds" in record]
    if not alone:
        return NOTHING, NOTHING
    seconds = median(record["seconds"] for record in alone)
    return f"{seconds:.0f}", bytes_of(max(record["peak_bytes"] for record in alone))


def change_tables(found: Results, size: int) -> list[Table]:
    """`ANSWERS` with one thing or a few changed: a table for those changes that were tried on the same tasks."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in found.methods(size):
        if name.startswith(f"{ANSWERS}-"):
            tasks = tuple(task for task in found.tasks(size) if found.cell(task, name, size))
            groups.setdefault(tasks, []).append(name)
    return [_change_table(found, size, tasks, changed) for tasks, changed in groups.items()]


def _change_table(found: Results, size: int, tasks: Sequence[str], changed: Sequence[str]) -> Table:
    """At one rate for all tasks: of those that were tried with most seeds, the one with the best mean."""
    rates, means = dict[str, float](), dict[str, dict[int, float]]()
    for name in (ANSWERS, REFERENCES[0], *changed):
        at = {
            rate: over_tasks(scores(found.cell(task, name, size, rate)) for task in tasks)
            for rate in set.intersection(*(found.rates(task, name, size) for task in tasks))
        }
        if any(at.values()):
            rates[name], means[name] = max(at.items(), key=lambda item: (len(item[1]), fmean(item[1].values() or [0])))
    compared = [name for name in (ANSWERS, REFERENCES[0]) if name in means]
    rows = []
    for name, of in means.items():
        less = []
        for other in compared:
            seeds = sorted(of.keys() & means[other].keys())
            pair = paired([of[seed] for seed in seeds], [means[other][seed] for seed in seeds])
            less.append(NOTHING if name == other else percent(pair, "+"))
        records = [record for task in tasks for record in found.cell(task, name, size, rates[name]).values()]
        row = [METHODS[name].title, count(records[-1]["parameters"]), f"{rates[name]:g}"]
        trained = [record for record in records if "general_kl" in record]  # those that diverged have none
        kl = _mean(trained, "general_kl") if trained else NOTHING
        rows.append([*row, percent(interval(list(of.values()))), *less, kl])
    columns = ("method", "parameters", "rate", "score", *(f"less {METHODS[name].title}" for name in compared), "KL")
    return Table(f"Changes: means over {', '.join(tasks)}", columns, rows)


def rate_table(found: Results, size: int) -> Table:
    rows = [
        [
            METHODS[name].title,
            *(
                f"{found.rate(task, name, size):g}" if found.cell(task, name, size) else NOTHING
                for task in found.tasks(size)
            ),
        ]
        for name in found.methods(size)
        if METHODS[name].attach
    ]
    return Table("Rates", ("method", *found.tasks(size)), rows)


def _mean(records: Iterable[Record], field: str) -> str:
    return decimal(fmean(record[field] for record in records))


def write(results: Path) -> Path:
    """Write `report.md` into the folder of results, from whatever of them is there."""
    done = load(results, TASKS)
    lines = ["# A real language model: SmolLM2-135M-Instruct", ""]
    lines += ["Written by `python -m benchmarks.real_base report` from the JSON lines beside it.", "", EXPLANATION]
    for split in reversed(SPLITS):
        found = Results(done, split)
        for size in found.sizes:
            tables = [score_table(found, size)]
            if size != PROMPTS:
                compared = [name for name in REFERENCES if name in found.methods(size)]
                tables += [difference_table(found, size, name) for name in compared]
                tables += [cost_table(found, size), rate_table(found, size)]
                tables += change_tables(found, size) if split == "validation" else []
            lines += ["", f"## {split.capitalize()} data, {'prompts' if size == PROMPTS else f'{size} samples'}"]
            for table in tables:
                lines += ["", *table.markdown()]
    path = results / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
