"""`python -m benchmarks.quickstart`: see the package's docstring."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from transformers import set_seed

from ..base_model.model import load_base
from ..common import files
from ..common.environment import command, environment, prepare
from ..common.tables import Record
from ..quality.encoding import CHECKPOINT
from ..quality.methods import Setup
from ..quality.scoring import score
from ..quality.training import BATCH, STEPS
from . import __doc__ as what_it_does
from . import adapters, asking, report
from .asking import CHOSEN, Splits
from .report import TITLES, Row

STEPS_EACH = STEPS[asking.SAMPLES]
MINIMUM_GAIN = 0.20  # in score, of HiFICL over zero-shot, on each task


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart",
        description=what_it_does,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of training samples, weights, batches and demonstrations")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    prepare()
    console = Console()

    _, base = load_base(CHECKPOINT)
    console.print(f"Base model, {base.num_parameters():,} parameters: {CHECKPOINT}")
    splits = {task: asking.load(task, base, args.seed, asking.QUERIES) for task in track(CHOSEN, "pictures")}
    predictions: report.Predictions = {
        "zero-shot": {task: asking.ask(base, task, splits[task]) for task in track(CHOSEN, TITLES["zero-shot"])},
        "icl": {
            task: asking.ask_behind_demonstrations(base, task, splits[task], args.seed)
            for task in track(CHOSEN, TITLES["icl"])
        },
        **{method: {} for method in adapters.ATTACH},
    }
    trained = {}
    for task in CHOSEN:
        for method in adapters.ATTACH:
            trained[task, method], predictions[method][task] = teach(method, task, splits[task], args.out, args.seed)

    rows = []
    for task in CHOSEN:
        for method in TITLES:
            test = score(task, predictions[method][task], splits[task]["test"].examples)
            rows.append(Row(task, method, test, **trained.get((task, method), {})))
    title = f"The first {asking.QUERIES} test pictures; {asking.SAMPLES} training samples, one seed"
    console.print(report.make_table(rows, title))
    console.print(report.caption_example(predictions, splits["captions"]))
    report.draw(args.out / "quickstart.png", rows, predictions, splits)
    files.write(args.out / "predictions.json", predictions)

    # A process of its own, which compares every answer with predictions.json and fails where one differs.
    serve = [sys.executable, "-m", "benchmarks.quickstart.serve", "--out", str(args.out)]
    served = subprocess.run(serve, check=False)

    seconds = time.perf_counter() - start
    results = {
        "command": command(),
        **environment(),
        "seed": args.seed,
        "training_samples": asking.SAMPLES,
        "test_pictures": asking.QUERIES,
        "steps": STEPS_EACH,
        "batch": BATCH,
        "rates": adapters.RATES,
        "base_parameters": base.num_parameters(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "unchanged_after_reload": served.returncode == 0,
        "seconds": seconds,
    }
    files.write(args.out / "results.json", results)
    console.print(f"{seconds:.0f} s. Adapters, quickstart.png and results.json are in {args.out}")

    reached = {(row.task, row.method): row.test["score"] for row in rows}
    for task in CHOSEN:
        gain = reached[task, "hificl"] - reached[task, "zero-shot"]
        if gain < MINIMUM_GAIN:
            sys.exit(f"HiFICL gains only {gain:.1%} on {task}; expected at least {MINIMUM_GAIN:.0%}")
    if served.returncode != 0:
        sys.exit("the reloaded adapters do not give the same answers")


def teach(method: str, task: str, splits: Splits, out: Path, seed: int) -> tuple[Record, list[str]]:
    """Train and save one adapter on a fresh base; return what training took, and the answers of the adapted model."""
    set_seed(seed)
    processor, base = load_base(CHECKPOINT)
    model = adapters.ATTACH[method](base, processor, splits["train"].examples)
    setup = Setup(task, splits, list(range(asking.SAMPLES)), seed, STEPS_EACH, adapters.RATES[task][method])
    seconds = adapters.train(model, setup, f"{TITLES[method]}, {task}")
    took = {
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "file_bytes": adapters.save(model, out / method / task),
        "training_seconds": seconds,
    }
    return took, asking.ask(model, task, splits)


if __name__ == "__main__":
    main()
