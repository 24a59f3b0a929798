"""The goals of the benchmark, each decided from the results alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..common.tables import NOT_MEASURED, Table, count
from . import paper
from .frame import ABLATIONS, METHODS, TASKS, TEACHERS, Results
from .plan import FULL
from .statistics import Paired
from .tables import cost_ratio, p_value, percent, times

SHOWN, NOT_SHOWN = "shown", "not shown"
LORAS = ("lora-8", "lora-16")
ORDER = 2  # a ratio is of the paper's order from half of it on


@dataclass(frozen=True)
class Goal:
    key: str
    what: str
    found: str
    status: str


def verdict(held: Iterable[bool | None]) -> str:
    """One failure decides; without one, something that was not measured (None) leaves it open."""
    conditions = list(held)
    if any(condition is not None and not condition for condition in conditions):
        return NOT_SHOWN
    return NOT_MEASURED if None in conditions else SHOWN


def evaluate(found: Results) -> list[Goal]:
    return [
        *(_on_every_task(found, other) for other in ("task-vector", *reversed(TEACHERS), "icl-8")),
        *_parity(found, "hificl"),
        *_parity(found, "hificl-n16"),
        *(_below_full(found, method) for method in ABLATIONS),
        *(_training_time(found, method) for method in TEACHERS),
    ]


def _parity(found: Results, own: str) -> list[Goal]:
    """With LoRA and prefix tuning, of HiFICL with n = 8 or 16 pairs: two chances, as LoRA has two ranks."""
    return [
        *(_on_average(found, other, own) for other in (*LORAS, "prefix", "prefix-demos")),
        *(_clearly(found, other, samples, own) for samples in (16, 64) for other in LORAS),
        *(_half_the_parameters(found, other, own) for other in LORAS),
    ]


def table(goals: Iterable[Goal]) -> Table:
    rows = [
        (f'<a id="goal-{goal.key}"></a>{goal.key}', goal.what, goal.found or NOT_MEASURED, f"**{goal.status}**")
        for goal in goals
    ]
    return Table("Goals", ("row", "goal", "found, in points of the test score", "status"), rows)


def _on_every_task(found: Results, other: str) -> Goal:
    by_task = {task: found.difference("hificl", other, FULL, task) for task in TASKS}
    measured = {task: of for task, of in by_task.items() if of}
    text = ""
    if measured:
        low, high = (choose(measured, key=lambda task: measured[task].mean) for choose in (min, max))
        text = (
            f"above on {sum(of.mean > 0 for of in measured.values())} of {len(measured)} tasks measured, clearly on "
            f"{sum(bool(of.above_zero) for of in measured.values())}: "
            f"from {percent(measured[low], True)} ({TASKS[low]}) to {percent(measured[high], True)} ({TASKS[high]})"
        )
    status = verdict(of.mean > 0 if of else None for of in by_task.values())
    return Goal(f"a-{other}", f"HiFICL above {METHODS[other]} on every task, {FULL} samples", text, status)


def _on_average(found: Results, other: str, own: str) -> Goal:
    difference = found.difference(own, other, FULL)
    what = f"{METHODS[own]} at or above {METHODS[other]} on average over tasks, {FULL} samples"
    status = verdict([difference.mean >= 0 if difference else None])
    return Goal(_key("b", other, own), what, _found(difference), status)


def _clearly(found: Results, other: str, samples: int, own: str) -> Goal:
    difference = found.difference(own, other, samples)
    what = f"{METHODS[own]} clearly above {METHODS[other]} over all tasks, {samples} samples (interval above 0)"
    status = verdict([difference.above_zero if difference else None])
    return Goal(_key("c", f"{other}-{samples}", own), what, _found(difference), status)


def _half_the_parameters(found: Results, other: str, own: str) -> Goal:
    mine, theirs = found.parameters(own), found.parameters(other)
    key, what = _key("d", other, own), f"{METHODS[own]} with at most half the trainable parameters of {METHODS[other]}"
    if not mine or not theirs:
        return Goal(key, what, "", NOT_MEASURED)
    text = f"{count(mine[-1])} against {count(theirs[0])}: {times(mine[-1] / theirs[0])}"
    return Goal(key, what, text, verdict([2 * mine[-1] <= theirs[0]]))


def _key(kind: str, other: str, own: str) -> str:
    return f"{kind}-{other}" + own.removeprefix("hificl")


def _below_full(found: Results, method: str) -> Goal:
    difference = found.difference("hificl", method, FULL)
    name = method.removeprefix("hificl-")
    what = f"Ablation '{METHODS[method]}' below full HiFICL on average over tasks, {FULL} samples"
    return Goal(f"e-{name}", what, _found(difference), verdict([difference.mean > 0 if difference else None]))


def _training_time(found: Results, method: str) -> Goal:
    step = cost_ratio(found, method, "step_seconds", "step_over_hificl")
    runs = found.training_ratio(method)
    decisive = runs if step is None else step
    bound = paper.TRAINING_TIME / ORDER
    what = (
        f"Training with {METHODS[method]} takes a time of the order of the paper's {paper.TRAINING_TIME}x of HiFICL's "
        f"(at least {bound}x)"
    )
    text = "" if decisive is None else f"a training step {times(step)}, the runs {times(runs)}"
    return Goal(f"f-{method}", what, text, verdict([None if decisive is None else decisive >= bound]))


def _found(difference: Paired | None) -> str:
    if difference is None:
        return ""
    unclear = difference.half is not None and abs(difference.mean) <= difference.half
    return f"{percent(difference, True)}, p {p_value(difference.p)}{'; the interval has 0 in it' if unclear else ''}"
