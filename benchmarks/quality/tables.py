"""The tables of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev

from ..common.tables import Table, bytes_of, count, duration, scientific
from . import paper
from .frame import ABLATIONS, COMPARED, METHODS, PAIRS, RANKS, SEEDS, TASKS, TEACHERS, TRIALS, Rates, Results
from .plan import FULL, SIZES, START_SEEDS, STARTED, STARTED_ON, TRIED, TRIED_ON
from .statistics import Interval, Paired, holm, interval

NOTHING = "-"
MEAN = "mean over tasks"
OTHERS = (
    "lora-8",
    "lora-16",
    "prefix",
    "prefix-demos",
    "ia3",
    "icl-8",
    "task-vector",
    "live",
    "mimic",
    "hificl-one-rate",
    "hificl-paper",
    "hificl-unit",
)
OTHERS_OF_16 = ("hificl", "lora-8", "lora-16", "prefix-demos")


# -- numbers as text ---------------------------------------------------------------------------------------------------


def percent(found: Interval | None, signed: bool = False) -> str:
    """In %, or in points where it is a difference."""
    return _spread(found, 100, "+z.1f" if signed else ".1f")


def _spread(found: Interval | None, scale: float, form: str) -> str:
    if found is None:
        return NOTHING
    text = format(scale * found.mean, form)
    if found.half is not None:
        text += f" ± {format(scale * found.half, form.lstrip('+'))}"
    return text + seeds(found)


def seeds(found: Interval) -> str:
    return "" if found.count >= SEEDS else f" ({found.count} seed{'s' if found.count > 1 else ''})"


def p_value(p: float | None) -> str:
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _text(value: float | None, form: Callable[[float], str]) -> str:
    return NOTHING if value is None else form(value)


def times(ratio: float | None) -> str:
    return _text(ratio, lambda number: f"{number:.2f}x")


def parameters(found: Results, method: str) -> str:
    """With the ratio to HiFICL's; a range where they depend on task or size."""
    own, reference = found.parameters(method), found.parameters("hificl")
    if not own or own == (0,):
        return NOTHING
    text = " to ".join(count(number) for number in dict.fromkeys((own[0], own[-1])))
    return f"{text} ({own[-1] / reference[-1]:.2f}x)" if reference and reference[-1] else text


# -- scores ------------------------------------------------------------------------------------------------------------


def accuracy(found: Results, title: str, methods: Mapping[str, str]) -> Table:
    """Methods by tasks with all training samples; the best of a column in bold."""
    columns = [[interval(found.scores(method, task, FULL)) for method in methods] for task in TASKS]
    columns.append([interval(found.means(method, FULL)) for method in methods])
    cells = zip(*map(_best_in_bold, columns), strict=True)
    rows = [(title, *row) for title, row in zip(methods.values(), cells, strict=True)]
    return Table(title, ("method", *TASKS.values(), MEAN), rows)


def beside(table: Table, place: int | None, columns: Mapping[str, Iterable[str]]) -> Table:
    """The table with further columns before the one at a place, or at its end."""
    place = len(table.columns) if place is None else place
    more = zip(*columns.values(), strict=True)
    rows = [(*row[:place], *cells, *row[place:]) for row, cells in zip(table.rows, more, strict=True)]
    return Table(table.title, (*table.columns[:place], *columns, *table.columns[place:]), rows)


def main(found: Results) -> Table:
    table = accuracy(found, f"Test scores in % after {FULL} training samples", COMPARED)
    cider = [_spread(interval(found.scores(method, "captions", FULL, "cider")), 1, ".3f") for method in COMPARED]
    table = beside(table, None, {"captions, CIDEr": cider})
    return beside(table, 1, {"trainable parameters": [parameters(found, method) for method in COMPARED]})


def published() -> Table:
    columns = ("model", "method", "trainable parameters", *paper.TASKS, "source")
    return Table("The paper's main table: other models, other data", columns, paper.MAIN)


def by_samples(found: Results, task: str | None = None) -> Table:
    """Methods by number of training samples; 0 where none are drawn on."""

    def score(method: str, samples: int) -> Interval | None:
        scores = found.scores(method, task, samples, exact=True) if task else found.means(method, samples, exact=True)
        return interval(scores)

    scores = {method: {samples: score(method, samples) for samples in (0, *SIZES)} for method in METHODS}
    scores = {method: of for method, of in scores.items() if any(of.values())}
    sizes = [samples for samples in (0, *SIZES) if samples or any(of[0] for of in scores.values())]
    rows = [(METHODS[method], *(percent(of[samples]) for samples in sizes)) for method, of in scores.items()]
    title = TASKS[task][:1].upper() + TASKS[task][1:] if task else "Mean over tasks"
    return Table(f"{title}: test score in % by number of training samples", ("method", *map(count, sizes)), rows)


def _best_in_bold(column: Sequence[Interval | None]) -> list[str]:
    best = max((cell.mean for cell in column if cell), default=math.nan)
    return [f"**{percent(cell)}**" if cell and cell.mean == best else percent(cell) for cell in column]


# -- paired tests ------------------------------------------------------------------------------------------------------


def comparisons(found: Results, method: str = "hificl", others: Sequence[str] = OTHERS) -> Table:
    rows = []
    for other in others:
        cells = [found.difference(method, other, samples) for samples in SIZES]
        rows.append((METHODS[other], *(text for cell in cells for text in (percent(cell, True), _p(cell)))))
    title = f"{METHODS[method]} less another method, over all tasks, in points"
    return Table(title, _columns("compared with", SIZES), rows)


def comparison(found: Results, other: str, method: str = "hificl") -> Table:
    """By task; p is followed by Holm's, corrected for the number of tasks."""
    tested = {samples: [found.difference(method, other, samples, task) for task in TASKS] for samples in SIZES}
    tested = {samples: cells for samples, cells in tested.items() if any(cells)}
    columns = []
    for cells in tested.values():
        columns.append([percent(cell, True) for cell in cells])
        corrected = holm([cell.p if cell else None for cell in cells])
        columns.append([f"{_p(cell)} ({p_value(p)})" for cell, p in zip(cells, corrected, strict=True)])
    rows = [(title, *(column[place] for column in columns)) for place, title in enumerate(TASKS.values())]
    return Table(f"{METHODS[method]} less {METHODS[other]}, in points; p (Holm's p)", _columns("task", tested), rows)


def _p(found: Paired | None) -> str:
    return p_value(found.p if found else None)


def _columns(first: str, sizes: Iterable[int]) -> tuple[str, ...]:
    return first, *(column for samples in sizes for column in (f"{count(samples)} samples", "p"))


# -- ablation, hallucination -------------------------------------------------------------------------------------------


def ablation(found: Results) -> Table:
    methods = {"hificl": "HiFICL (full)"} | ABLATIONS
    table = accuracy(found, f"Ablation, test scores in % after {FULL} training samples", methods)
    less = [percent(found.difference(method, "hificl", FULL), True) for method in ABLATIONS]
    columns: dict[str, Iterable[str]] = {"mean, less the full method's": ["", *less]}
    theirs = zip(*(paper.ABLATION[method] for method in methods), strict=True)
    columns |= {f"paper: {task}": cells for task, cells in zip(paper.TASKS, theirs, strict=True)}
    return beside(table, None, columns)


def ranks(found: Results) -> Table:
    methods = {method: f"r = {r}" for r, method in RANKS.items()}
    return beside(accuracy(found, "Rank, with n = 8", methods), 1, _parameters(found, methods))


def pairs(found: Results) -> Table:
    methods = {method: f"n = {n}" for n, method in PAIRS.items()}
    return beside(accuracy(found, "Virtual pairs per head, with r = 8", methods), 1, _parameters(found, methods))


def trials(found: Results) -> list[Table]:
    """Settings that were compared on validation data: the mean of each at its best rate."""
    tables = []
    for samples, tasks in TRIED_ON.items():
        rows = []
        for method in TRIED:
            of_tasks = [found.trial(method, task, samples) for task in tasks]
            if any(of_tasks):
                cells = [NOTHING if of is None else f"{100 * fmean(of[1]):.1f} ({of[0]:g})" for of in of_tasks]
                mean = fmean(fmean(of[1]) for of in of_tasks if of) if all(of_tasks) else None
                title = (METHODS | TRIALS)[method]
                rows.append((title, *cells, NOTHING if mean is None else f"{100 * mean:.1f}"))
        columns = ("setting", *(TASKS[task] for task in tasks), "mean")
        tables.append(Table(f"Validation scores in % after {samples} training samples (rate)", columns, rows))
    return tables


def starts(found: Results) -> Table:
    """Where an adapter starts: mean and standard deviation over more seeds, at the best rate."""
    rows = []
    for method in STARTED:
        of_tasks = [found.trial(method, task, 64, START_SEEDS) for task in STARTED_ON]
        cells = [
            NOTHING if of is None else f"{100 * fmean(of[1]):.1f} ± {100 * stdev(of[1]):.1f} ({of[0]:g})"
            for of in of_tasks
        ]
        rows.append(((METHODS | TRIALS)[method], *cells))
    columns = ("start", *(TASKS[task] for task in STARTED_ON))
    return Table("Validation scores in % after 64 training samples, mean ± standard deviation (rate)", columns, rows)


def _parameters(found: Results, methods: Iterable[str]) -> dict[str, list[str]]:
    return {"trainable parameters": [parameters(found, method) for method in methods]}


def hallucination(found: Results) -> Table:
    forms = {"chair_s": (100, ".2f"), "chair_i": (100, ".2f"), "recall": (100, ".1f"), "cider": (1, ".3f")}
    rows = []
    for method, title in (COMPARED | ABLATIONS).items():
        measured = {name: interval(found.scores(method, "captions", FULL, name)) for name in forms}
        if any(measured.values()) or method in paper.CHAIR:
            theirs = paper.CHAIR.get(method, (NOTHING,) * 3)
            rows.append((title, *(_spread(measured[name], *form) for name, form in forms.items()), *theirs))
    columns = ("method", "CHAIR_s, %", "CHAIR_i, %", "recall, %", "CIDEr")
    published = ("paper: CHAIR_s", "paper: CHAIR_i", "source")
    return Table(f"Objects in captions after {FULL} training samples", (*columns, *published), rows)


# -- costs -------------------------------------------------------------------------------------------------------------


def costs(found: Results) -> Table:
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "training step": ("step_seconds", duration),
        "over HiFICL's": ("step_over_hificl", times),
        "its peak memory": ("step_peak_bytes", bytes_of),
        "its FLOPs": ("step_flops", scientific),
        "answer": ("query_seconds", duration),
        "over HiFICL's answer": ("query_over_hificl", times),
        "FLOPs of an answer": ("query_flops", scientific),
    }
    by_method = found.cost_rows
    rows = [
        (METHODS[m], parameters(found, m), *(_text(by_method[m].get(field), form) for field, form in shown.values()))
        for m in METHODS
        if m in by_method
    ]
    return Table("Cost of a training step and of an answer", ("method", "trainable parameters", *shown), rows)


def cost_ratio(found: Results, method: str, field: str, reported: str | None = None) -> float | None:
    """A method's cost over HiFICL's: as measured side by side where it was, else the ratio of the two."""
    own, reference = (found.cost_rows.get(name, {}) for name in (method, "hificl"))
    if reported and own.get(reported) is not None:
        return float(own[reported])
    return own[field] / reference[field] if own.get(field) is not None and reference.get(field) else None


def teachers(found: Results) -> Table:
    rows = [
        (
            METHODS[method],
            times(cost_ratio(found, method, "step_seconds", "step_over_hificl")),
            times(cost_ratio(found, method, "step_flops")),
            times(found.training_ratio(method)),
            f"{paper.TRAINING_TIME}x" if method == "mimic" else NOTHING,
            f"{paper.TRAINING_FLOPS}x" if method == "mimic" else NOTHING,
        )
        for method in (*TEACHERS, "hificl-teacher")
    ]
    columns = (
        "method",
        "time of a step",
        "FLOPs of a step",
        "training time of the runs",
        "paper: time",
        "paper: FLOPs",
    )
    return Table("Training with a teacher over HiFICL's", columns, rows)


# -- learning rates ----------------------------------------------------------------------------------------------------


def rates(found: Results) -> Table:
    rows = []
    for method, title in METHODS.items():
        for samples in SIZES:
            by_task = [found.rates(method, task, samples) for task in TASKS]
            if any(by_task):
                grid = sorted({rate for of in by_task if of for rate in of.grid})
                sizes = {len(of.grid) for of in by_task if of and of.grid}
                text = ", ".join(f"{rate:g}" for rate in grid) if grid else NOTHING
                size = " or ".join(map(str, sorted(sizes))) if grid else NOTHING
                rows.append((title, count(samples), text, size, *map(_rate, by_task)))
    columns = ("method", "samples", "rates tried", "of a task", *TASKS.values())
    return Table("Learning rates: the grid, and what was chosen of it on validation", columns, rows)


def _rate(found: Rates | None) -> str:
    if found is None:
        return NOTHING
    text = " to ".join(f"{rate:g}" for rate in dict.fromkeys((found.chosen[0], found.chosen[-1])))
    if found.at_edge:
        text += " (edge)"
    return text if found.better is None else f"{text} (better: {found.better:g})"


def edges(found: Results) -> tuple[int, int]:
    """How many chosen rates lie at the edge of their grid, and of how many that were chosen from one."""
    cells = [found.rates(method, task, samples) for method in METHODS for task in TASKS for samples in SIZES]
    chosen = [cell for cell in cells if cell and cell.grid]
    return sum(cell.at_edge for cell in chosen), len(chosen)


def coverage(found: Results) -> Table:
    """Runs of each method and size: with nothing missing, as many as tasks times seeds."""
    known = found.runs[found.runs["task"].isin(TASKS)]
    counts = known.groupby(["method", "samples"]).size().to_dict()
    sizes = [samples for samples in (0, *SIZES) if samples or any(key[1] == 0 for key in counts)]
    rows = [
        (title, *(counts.get((method, samples), NOTHING) for samples in sizes)) for method, title in METHODS.items()
    ]
    return Table(f"Runs; a full cell is {len(TASKS) * SEEDS}", ("method", *map(count, sizes)), rows)


def unknown(found: Results) -> list[str]:
    """Tasks and methods of the runs that no table has a row for."""
    return sorted((set(found.runs["task"]) - set(TASKS)) | (set(found.runs["method"]) - set(METHODS)))
