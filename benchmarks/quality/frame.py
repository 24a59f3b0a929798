"""A folder of results as tidy tables, and what the report asks of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ..common import files
from ..common.tables import Record
from . import methods, plan, tasks
from .statistics import Paired, paired

TASKS = {name: task.title for name, task in tasks.TASKS.items()}
METHODS = {name: method.title for name, method in methods.METHODS.items()}
TRIALS = {name: method.title for name, method in (methods.TRIALS | methods.STARTS).items()}
_ABLATED = ("hificl-teacher", "hificl-whole-k", "hificl-whole-v", "hificl-alpha-1")
ABLATIONS = {name: METHODS[name] for name in _ABLATED}
COMPARED = {name: title for name, title in METHODS.items() if name not in (*ABLATIONS, *plan.MATCHED)}
# By r, by n and by number of demonstrations.
RANKS = {r: "hificl" if r == 8 else f"hificl-r{r}" for r in sorted((*methods.RANKS, 8))}
PAIRS = {n: "hificl" if n == 8 else f"hificl-n{n}" for n in sorted((*methods.PAIRS, 8))}
SHOTS = {0: "zero-shot"} | {k: f"icl-{k}" for k in methods.SHOTS}
TEACHERS = ("mimic", "live")  # the methods that read a k-shot prompt at every step of training

SEEDS = len(plan.SEEDS)

CAPTION_MEASURES = ("cider", "exact_match", "chair_i", "chair_s", "recall")
RUN = ("task", "method", "samples", "seed", "vector", "rate", "parameters", "seconds", "score", *CAPTION_MEASURES)
SWEEP = ("task", "method", "samples", "rate", "seed", "score")
OF_OLD_RUNS = "AVX2"  # the vector instructions of runs whose records do not name them
_NONE = pd.Series(dtype=float)


@dataclass(frozen=True)
class Rates:
    """The learning rates of one method, task and size: those that were tried, and those that the runs had."""

    grid: tuple[float, ...]
    chosen: tuple[float, ...]
    better: float | None = None  # one that did better on validation than those that were chosen

    @property
    def at_edge(self) -> bool:
        """A better rate may lie outside a grid that ends with the chosen one."""
        return bool(self.grid) and any(rate <= self.grid[0] or rate >= self.grid[-1] for rate in self.chosen)


@dataclass(frozen=True)
class Results:
    runs: pd.DataFrame
    sweeps: pd.DataFrame
    trials: pd.DataFrame  # sweeps that choose no rate of a run
    costs: Record
    unusable: list[str]

    @cached_property
    def _runs(self) -> dict[tuple[str, str, int], pd.DataFrame]:
        return {key: of.set_index("seed") for key, of in self.runs.groupby(["method", "task", "samples"])}

    @cached_property
    def _sweeps(self) -> dict[tuple[str, str, int], pd.DataFrame]:
        return dict(iter(self.sweeps.groupby(["method", "task", "samples"])))

    @property
    def cost_rows(self) -> dict[str, Record]:
        return {row["method"]: row for row in self.costs.get("rows") or () if "method" in row}

    def scores(self, method: str, task: str, samples: int, measure: str = "score", exact: bool = False) -> pd.Series:
        """By seed.  What draws on no training samples (0) stands for every size, unless `exact`."""
        of = self._runs.get((method, task, samples))
        if of is None and not exact:
            of = self._runs.get((method, task, 0))
        return _NONE if of is None else of[measure].dropna()

    def means(self, method: str, samples: int, exact: bool = False, tasks: Iterable[str] = tuple(TASKS)) -> pd.Series:
        """By seed, over the tasks: a seed that lacks one is left out, as the rest would be a mean of something else."""
        by_task = [self.scores(method, task, samples, exact=exact) for task in tasks]
        return pd.concat(by_task, axis=1, join="inner").mean(axis=1)

    def difference(self, first: str, second: str, samples: int, task: str | None = None) -> Paired | None:
        """First less second, paired by seed; without a task, of the means over all tasks."""
        both = [self.scores(m, task, samples) if task else self.means(m, samples) for m in (first, second)]
        pairs = pd.concat(both, axis=1, join="inner")
        return paired(pairs.iloc[:, 0], pairs.iloc[:, 1])

    def parameters(self, method: str) -> tuple[int, ...]:
        """Numbers of trainable parameters of its runs, increasing; more than one if they depend on task or size."""
        found = self.runs.loc[self.runs["method"] == method, "parameters"].dropna().unique()
        if not found.size and (cost := self.cost_rows.get(method, {}).get("trainable_parameters")) is not None:
            return (int(cost),)
        return tuple(sorted(int(number) for number in found))

    def training_ratio(self, method: str, reference: str = "hificl") -> float | None:
        """Geometric mean of the ratios of training time, over runs of the same task, samples and seed.

        Only where both ran with the same vector instructions: a grid may be worked through on several machines.
        """
        keys = ["task", "samples", "seed", "vector"]
        timed = self.runs[self.runs["seconds"] > 0].set_index(keys)
        mine, theirs = (timed.loc[timed["method"] == name, "seconds"] for name in (method, reference))
        ratios = (mine / theirs).dropna()
        return float(np.exp(np.log(ratios).mean())) if len(ratios) else None

    def trial(
        self, method: str, task: str, samples: int, seeds: tuple[int, ...] = plan.TRIAL_SEEDS
    ) -> tuple[float, list[float]] | None:
        """The rate that is best on validation data, on average over these seeds, and its scores by seed.

        None as long as one of its rates lacks a seed.
        """
        both = pd.concat([of for of in (self.sweeps, self.trials) if len(of)] or [self.sweeps])
        mine = both[(both["method"] == method) & (both["task"] == task) & (both["samples"] == samples)]
        by_rate = {rate: of.set_index("seed")["score"].to_dict() for rate, of in mine.groupby("rate")}
        if any(not set(seeds) <= set(by_rate.get(r, ())) for r in methods.ALL_METHODS[method].rates):
            return None
        best = max(by_rate, key=lambda rate: plan.mean_score(by_rate[rate][seed] for seed in seeds))
        return best, [by_rate[best][seed] for seed in seeds]

    def rates(self, method: str, task: str, samples: int) -> Rates | None:
        chooser, size = plan.swept_as(method, samples)
        tried, ran = self._sweeps.get((chooser, task, size)), self._runs.get((method, task, samples))
        chosen = () if ran is None else tuple(sorted(ran["rate"].dropna().unique().tolist()))
        if tried is None or (ran is None and (chooser, size) != (method, samples)):
            return Rates((), chosen) if chosen else None
        scores = tried.groupby("rate")["score"].agg(plan.mean_score)  # over seeds, where there are several
        best = float(scores.idxmax())
        chosen = chosen or (best,)
        is_best = any(scores.get(rate, math.nan) == scores.max() for rate in chosen)
        return Rates(tuple(scores.index.tolist()), chosen, None if is_best else best)


def load(folder: Path) -> Results:
    """Read what is there; what cannot be used is named, not passed over."""
    unusable: list[str] = []

    def read(kind: str, parse: Callable[[Record], Record], key: tuple[str, ...]) -> list[Record]:
        parsed: dict[tuple[object, ...], Record] = {}  # of two lines for the same job the later one holds
        for path in sorted((folder / kind).glob("*.jsonl")):
            name, (lines, torn) = path.relative_to(folder), files.lines(path)
            for number, line in enumerate(lines, 1):
                try:
                    row = parse(json.loads(line))
                    if row["task"] != path.stem:
                        raise ValueError(f"is of the task {row['task']}")
                    parsed[tuple(row[column] for column in key)] = row
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    unusable.append(f"{name}, line {number}: {type(error).__name__}: {error}")
            if torn:
                unusable.append(f"{name}: the last line, which was written in part")
        return list(parsed.values())

    runs = read("runs", _run, ("task", "method", "samples", "seed"))
    sweeps, trials = (
        read(kind, _sweep, ("task", "method", "samples", "rate", "seed")) for kind in ("sweeps", "trials")
    )
    costs = folder / "costs.json"
    measured = json.loads(costs.read_text()) if costs.exists() else {}
    return Results(_tidy(runs, RUN), _tidy(sweeps, SWEEP), _tidy(trials, SWEEP), measured, unusable)


def _run(run: Record) -> Record:
    test, vector = run["test"], str(run.get("vector", OF_OLD_RUNS))
    numbers = [_number(run.get(name)) for name in ("rate", "trainable_parameters", "training_seconds")]
    measures = [_number(test.get(name)) for name in CAPTION_MEASURES]
    values = run["task"], run["method"], int(run["samples"]), int(run["seed"]), vector, *numbers
    return dict(zip(RUN, (*values, _finite(test["score"]), *measures), strict=True))


def _sweep(sweep: Record) -> Record:
    score = _finite(sweep["validation"]["score"])
    values = sweep["task"], sweep["method"], int(sweep["samples"]), _finite(sweep["rate"]), int(sweep["seed"]), score
    return dict(zip(SWEEP, values, strict=True))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finite(value: float) -> float:
    if not math.isfinite(float(value)):
        raise ValueError(f"{value} where a finite number is needed")
    return float(value)


def _tidy(records: list[Record], columns: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame(records, columns=list(columns))
