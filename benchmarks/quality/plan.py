"""Which runs there are: the grid, in the order in which it is worked through, and what one run waits for.

What is alike for every method is fixed here and in `training`: samples, their order, steps, batch, schedule, seeds, the
number of rates that a method may try, and that validation data alone chooses among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..common.tables import Record
from .methods import ALL_METHODS, METHODS, SHOTS, STARTS, TRIALS
from .tasks import TASKS
from .training import STEPS

KINDS = ("runs", "sweeps", "trials")  # of jobs: sweeps choose the rates of runs, trials choose none
SEEDS = range(5)
TRIAL_SEEDS = (100, 101)  # of runs that are measured on validation data: none of those that are tested
START_SEEDS = (100, 101, 102, 103)
HARD_TASKS = ("knowledge", "captions", "composed")  # those that most methods do not solve with 1,000 samples
SIZES = tuple(STEPS)
FULL = SIZES[-1]
SWEPT_AT = {16: 64, 64: 64, 256: 1000, 1000: 1000}  # the size whose sweep chooses the rate

# Methods that are trained, with their sizes, most wanted first.  Slow or secondary ones have fewer: docs/benchmark.md.
TRAINED: dict[str, tuple[int, ...]] = {
    "hificl": SIZES,
    "lora-8": SIZES,
    "prefix-demos": SIZES,
    "hificl-n16": SIZES,
    "mimic": (FULL,),
    "hificl-paper": (64, FULL),
    "lora-3": SIZES,
    "hificl-paper-keys": SIZES,
    "lora-16": (16, 64, FULL),
    "live": (FULL,),
    "hificl-one-rate": (FULL,),
    "hificl-alpha-1": (FULL,),
    "hificl-whole-k": (FULL,),
    "hificl-whole-v": (FULL,),
    "prefix": (FULL,),
    "hificl-teacher": (FULL,),
    "ia3": (FULL,),
    "cartridge-demos": (FULL,),
    "cartridge": (FULL,),
    "hificl-unit": (FULL,),
}
# Other ranks and numbers of pairs take HiFICL's own rate, on half of the tasks.
MATCHED = tuple(name for name in METHODS if name.startswith(("hificl-r", "hificl-n")) and name not in TRAINED)
# What is compared by validation data, with both seeds: HiFICL's settings, and LoRA beside them.
TRIED = ("hificl", "hificl-n16", "hificl-one-rate", *TRIALS, "hificl-alpha-1", "lora-8")
TRIED_ON = {64: tuple(TASKS), FULL: HARD_TASKS}
STARTED, STARTED_ON = ("hificl-paper-keys", *STARTS, "lora-3"), ("knowledge", "composed")
SLOW = {"mimic": 3.0, "live": 3.0, "hificl-teacher": 3.0}  # a step's time, about


@dataclass(frozen=True)
class Job:
    """One training with one measurement: on validation data where the rate is given, else on test data."""

    task: str
    method: str
    samples: int
    seed: int
    rate: float | None = None  # of a sweep or trial; a run takes the rate that its sweep has chosen

    @property
    def sweeps(self) -> bool:
        return self.rate is not None

    @classmethod
    def of(cls, record: Record) -> Job:
        """The job that left this record: sweeps and trials are measured on validation data, runs are not."""
        rate = record["rate"] if "validation" in record else None
        return cls(record["task"], record["method"], record["samples"], record["seed"], rate)

    @property
    def kind(self) -> str:
        if not self.sweeps:
            return "runs"
        swept = {SWEPT_AT[size] for size in TRAINED.get(self.method, ())}
        chooses = self.samples in swept and self.seed in sweep_seeds(self.task, self.method, self.samples)
        return "sweeps" if chooses else "trials"

    @property
    def waits_for(self) -> list[Job]:
        """The sweep that chooses its rate."""
        if self.sweeps or not METHODS[self.method].rates:
            return []
        return sweep(self.task, *swept_as(self.method, self.samples))

    @property
    def cost(self) -> float:
        """Seconds, about."""
        steps = STEPS.get(self.samples, 0) if ALL_METHODS[self.method].rates else 50
        return (2 if self.task == "captions" else 1) * (2 + 0.045 * steps * SLOW.get(self.method, 1))


def swept_as(method: str, samples: int) -> tuple[str, int]:
    """The method and size whose sweep chooses the rate for this one."""
    return "hificl" if method in MATCHED else method, SWEPT_AT.get(samples, samples)


def sweep_seeds(task: str, method: str, samples: int) -> tuple[int, ...]:
    """Two where one would leave the choice to chance; one for those whose every seed takes three times as long."""
    solved = samples == FULL and task not in HARD_TASKS
    return TRIAL_SEEDS[:1] if solved or method in SLOW else TRIAL_SEEDS


def sweep(task: str, method: str, samples: int, seeds: Sequence[int] | None = None) -> list[Job]:
    seeds = sweep_seeds(task, method, samples) if seeds is None else seeds
    return [Job(task, method, samples, seed, rate) for seed in seeds for rate in ALL_METHODS[method].rates]


def mean_score(scores: Iterable[float]) -> float:
    """So rounded that sums of equal scores are equal in whatever order."""
    return round(fmean(scores), 9)


def jobs(tasks: tuple[str, ...] = tuple(TASKS)) -> Iterator[Job]:
    """The whole grid.  A run comes after the sweep that it waits for."""
    for task in tasks:
        yield Job(task, "zero-shot", 0, 0)
        for method in (*(f"icl-{k}" for k in SHOTS), "task-vector"):
            yield from (Job(task, method, FULL, seed) for seed in SEEDS)
    first = [method for method, sizes in TRAINED.items() if sizes == SIZES]
    sizes_of_first = [(method, size) for size in (FULL, 64, 16, 256) for method in first]
    others = [(m, size) for m, sizes in TRAINED.items() if m not in first for size in reversed(sizes)]
    for method, size in (*sizes_of_first, *others):
        for task in tasks:
            if SWEPT_AT[size] == size:
                yield from sweep(task, method, size)
            yield from (Job(task, method, size, seed) for seed in SEEDS)
    for method in MATCHED:
        yield from (Job(task, method, FULL, seed) for task in HARD_TASKS if task in tasks for seed in SEEDS)


def trials(tasks: tuple[str, ...] = tuple(TASKS)) -> Iterator[Job]:
    """Settings of HiFICL beside LoRA, on validation data; with 1,000 samples on tasks that not all of them solve.

    Then where an adapter starts, with more seeds, on two tasks with few samples.
    """
    for method in TRIED:
        for size, of in TRIED_ON.items():
            for task in of:
                if task in tasks:
                    yield from sweep(task, method, size, TRIAL_SEEDS)
    for method in STARTED:
        yield from (job for task in STARTED_ON if task in tasks for job in sweep(task, method, 64, START_SEEDS))
