"""`python -m benchmarks.composition`: see the package's docstring."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import set_seed

from ..base_model.model import load_base
from ..common import files
from ..common.environment import command, environment, prepare
from ..common.tables import Record, Table
from ..quality.__main__ import RESULTS
from ..quality.encoding import CHECKPOINT
from ..quality.methods import METHODS, Setup
from ..quality.plan import FULL, Job
from ..quality.runner import rate_of
from ..quality.scoring import score
from ..quality.store import Store
from ..quality.tasks import TASKS
from ..quality.training import BATCH, STEPS
from ..quickstart import adapters, asking
from . import __doc__ as what_it_does

CHOSEN = ("knowledge", "captions", "convention")
QUERIES = 100
LIKE = {"hificl": "hificl", "lora": "lora-8"}  # the quality benchmark's names, whose rates are taken
ALONE, NONE = "its own alone", "no adapter"
WAYS: dict[str, dict[str, tuple[float, dict[str, Any]]]] = {
    "hificl": {
        "both, at 1": (1.0, {"combination_type": "cat"}),
        "both, at 0.5": (0.5, {"combination_type": "cat"}),
        "both, at 1, n = 8, r = 8": (1.0, {"combination_type": "svd", "n": 8, "r": 8}),
    },
    "lora": {"both, at 1": (1.0, {"combination_type": "cat"}), "both, at 0.5": (0.5, {"combination_type": "cat"})},
}


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.composition",
        description=what_it_does,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/composition"), help="folder to write to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of samples, weights and batches")
    args = parser.parse_args(arguments)
    prepare()
    records = [record for seed in args.seeds for record in run(seed, args.out / "adapters" / str(seed))]
    results = {
        "command": command(),
        **environment(),
        "seeds": args.seeds,
        "training_samples": asking.SAMPLES,
        "steps": STEPS[asking.SAMPLES],
        "batch": BATCH,
        "test_pictures": QUERIES,
        "records": records,
        "seconds": time.perf_counter() - start,
    }
    files.write(args.out / "results.json", results)
    Console().print(table_of(records).rich())
    (args.out / "composition.md").write_text(report(results))


def report(results: Record) -> str:
    """composition.md."""
    text = f"Written by `{results['command']}`. Means over seeds {results['seeds']}, in %."
    return "\n".join(["# Composition", "", text, "", *table_of(results["records"]).markdown()]) + "\n"


def run(seed: int, folder: Path) -> Iterator[Record]:
    """Teach each task, then compose every two."""
    _, base = load_base(CHECKPOINT)
    splits = {task: asking.load(task, base, seed, QUERIES) for task in CHOSEN}

    def scored(model: nn.Module, task: str) -> float:
        return score(task, asking.ask(model, task, splits[task]), splits[task]["test"].examples)["score"]

    for task in CHOSEN:
        yield {"seed": seed, "method": "base", "way": NONE, "tasks": [task], "task": task, "score": scored(base, task)}
    for method, ways in WAYS.items():
        for task in CHOSEN:
            teach(method, task, splits[task], seed, folder / method / task)
        model = adapters.load(load_base(CHECKPOINT)[1], folder / method, CHOSEN)
        for task in CHOSEN:
            model.set_adapter(task)
            yield {
                "seed": seed, "method": method, "way": ALONE, "tasks": [task], "task": task,
                "score": scored(model, task),
            }  # fmt: skip
        for pair in combinations(CHOSEN, 2):
            for way, (weight, options) in ways.items():
                error = compose(model, pair, weight, options)
                for task in pair:
                    yield {
                        "seed": seed, "method": method, "way": way, "tasks": pair, "task": task,
                        "score": scored(model, task), "error": error,
                    }  # fmt: skip
                model.set_adapter(CHOSEN[0])
                model.delete_adapter("both")


def teach(method: str, task: str, splits: asking.Splits, seed: int, folder: Path) -> None:
    """Train and save one adapter, as the quickstart does, at the rate that the quality benchmark chose."""
    set_seed(seed)
    processor, base = load_base(CHECKPOINT)
    model = adapters.ATTACH[method](base, processor, splits["train"].examples)
    rate = rate_of(Job(task, LIKE[method], FULL, seed), Store(RESULTS, [task]))
    assert rate is not None  # both methods are trained
    setup = Setup(task, splits, list(range(asking.SAMPLES)), seed, STEPS[asking.SAMPLES], rate)
    adapters.train(model, setup, f"{METHODS[LIKE[method]].title}, {task}, seed {seed}")
    adapters.save(model, folder)


def compose(model: PeftModel, tasks: Sequence[str], weight: float, options: dict[str, Any]) -> float | None:
    """Make the composed adapter the active one; return the mean error of its layers that HiFICL reports."""
    errors = model.add_weighted_adapter(list(tasks), [weight] * len(tasks), "both", **options)
    model.set_adapter("both")
    return mean(errors.values()) if errors else None


def table_of(records: list[Record]) -> Table:
    """A row per method and way, a column per task and, where there is one, the task that it is composed with."""
    columns = [(task, other) for task in CHOSEN for other in CHOSEN if other != task]
    found: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        task, row = record["task"], (record["method"], record["way"])
        others = [other for other in record["tasks"] if other != task] or [o for o in CHOSEN if o != task]
        for other in others:
            found[row][task, other].append(100 * record["score"])
        if record.get("error") is not None:
            errors[row].append(record["error"])
    titles = {"base": "base", "hificl": "HiFICL", "lora": "LoRA, r = 8"}
    rows = [
        (
            titles[row[0]],
            row[1],
            *(f"{mean(scores[column]):.1f}" for column in columns),
            f"{mean(errors[row]):.2f}" if row in errors else "",
        )
        for row, scores in found.items()
    ]
    heads = [f"{TASKS[task].title}, with {TASKS[other].title}" for task, other in columns]
    return Table("Score of a task, with another's adapter", ("method", "adapters", *heads, "error of pairs"), rows)


if __name__ == "__main__":
    main()
