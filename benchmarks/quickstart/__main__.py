"""`python -m benchmarks.quickstart`: see the package's docstring."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mode

from rich.console import Console

from . import __doc__ as what_it_does
from .adapters import METHODS, train
from .base import load_base, train_base
from .data import NAMING, NEW_TASKS, load_splits
from .report import TITLES, Predictions, Row, draw, make_table, versions
from .training import END, accuracy, ask, prepare_process

MINIMUM_GAIN = 0.30  # in accuracy, of HiFICL over zero-shot and over the commonest answer, on each task


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart",
        description=what_it_does,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and jitter; the splits are fixed")
    args = parser.parse_args()
    out, seed = args.out, args.seed
    out.mkdir(parents=True, exist_ok=True)
    prepare_process()
    console = Console()

    splits = load_splits()
    test = splits["test"]
    console.print("Images:", ", ".join(f"{len(split)} {name}" for name, split in splits.items()))

    base_seconds = train_base(out / "base", splits["base"], seed)
    processor, base = load_base(out / "base")
    predictions: Predictions = {model: {} for model in TITLES}
    predictions["base"]["naming"] = ask(base, processor, NAMING, test)
    base_accuracy = accuracy(predictions["base"]["naming"], NAMING, test)
    console.print(f"Base model, {base.num_parameters():,} parameters: names {base_accuracy:.1%} of the test digits")

    rows = []
    for name, task in NEW_TASKS.items():
        commonest = mode(task.answers[digit] for digit in splits["adapters"]["digit"])
        predictions["commonest"][name] = [f"{commonest} {END}"] * len(test)
        predictions["base"][name] = ask(base, processor, task, test)
        rows += [Row(name, model, accuracy(predictions[model][name], task, test)) for model in ("commonest", "base")]

        for method_name, method in METHODS.items():
            trials = train(out / "base", method, task, splits, seed)
            chosen = trials[0]
            folder = out / method_name / name
            chosen.model.save_pretrained(folder)
            predictions[method_name][name] = ask(chosen.model, processor, task, test)
            rows.append(
                Row(
                    task=name,
                    method=method_name,
                    test_accuracy=accuracy(predictions[method_name][name], task, test),
                    trainable_parameters=chosen.model.get_nb_trainable_parameters()[0],
                    file_bytes=(folder / "adapter_model.safetensors").stat().st_size,
                    training_seconds=chosen.seconds,
                    validation_accuracies={f"{t.learning_rate:g}": t.validation_accuracy for t in trials},
                )
            )

    console.print(make_table(rows, f"{len(test)} held-out images; one seed: differences of a few points are noise"))
    draw(out / "quickstart.png", rows, predictions, test)
    (out / "predictions.json").write_text(json.dumps(predictions, indent=1))

    # A process of its own, which compares every answer with predictions.json and fails where one differs.
    served = subprocess.run([sys.executable, "-m", "benchmarks.quickstart.serve", "--out", str(out)], check=False)

    seconds = time.perf_counter() - start
    results = {
        "seed": seed,
        "versions": versions(),
        "images": {name: len(split) for name, split in splits.items()},
        "base": {"test_accuracy": base_accuracy, "parameters": base.num_parameters(), "training_seconds": base_seconds},
        "new_tasks": [dataclasses.asdict(row) for row in rows],
        "unchanged_after_reload": served.returncode == 0,
        "seconds": seconds,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1))
    console.print(f"{seconds:.0f} s. Models, adapters, quickstart.png and results.json are in {out}")

    score = {(row.task, row.method): row.test_accuracy for row in rows}
    for name in NEW_TASKS:
        gain = score[name, "hificl"] - max(score[name, "base"], score[name, "commonest"])
        if gain < MINIMUM_GAIN:
            sys.exit(f"HiFICL gains only {gain:.1%} on {name}; expected at least {MINIMUM_GAIN:.0%}")
    if served.returncode != 0:
        sys.exit("the reloaded adapters do not give the same answers")


if __name__ == "__main__":
    main()
