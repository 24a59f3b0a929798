"""A process that knows nothing but the saved files: one base model, two HiFICL adapters, switched task by task.

`python -m benchmarks.quickstart.serve --out out/quickstart` exits with an error if any answer differs from those that
the training process wrote down.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from rich.table import Table

import peft_hificl  # noqa: F401  registers HiFICL with PEFT: needed before an adapter is loaded

from .base import load_base
from .data import NAMING, NEW_TASKS, load_splits
from .training import accuracy, ask, prepare_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder that the quickstart wrote")
    out = parser.parse_args().out
    prepare_process()
    expected = json.loads((out / "predictions.json").read_text())
    test = load_splits()["test"]

    processor, base = load_base(out / "base")
    first, *others = NEW_TASKS
    model = PeftModel.from_pretrained(base, out / "hificl" / first, adapter_name=first)
    for name in others:
        model.load_adapter(out / "hificl" / name, adapter_name=name)

    table = Table("active adapter", "task", "test accuracy", "answers as before", title="Reloaded in a fresh process")
    unchanged = True

    def check(adapter: str, task_name: str) -> None:
        nonlocal unchanged
        task = {"naming": NAMING, **NEW_TASKS}[task_name]
        answers = ask(model, processor, task, test)
        before = expected["hificl" if adapter in NEW_TASKS else "base"][task_name]
        same = sum(now == then for now, then in zip(answers, before, strict=True))
        unchanged &= same == len(test)
        table.add_row(adapter, task.title, f"{accuracy(answers, task, test):.1%}", f"{same} of {len(test)}")

    for name in [*NEW_TASKS, *NEW_TASKS]:  # twice: switching back changes nothing either
        model.set_adapter(name)
        check(name, name)
    with model.disable_adapter():
        for name in ("naming", *NEW_TASKS):
            check("disabled", name)

    Console().print(table)
    if not unchanged:
        sys.exit("the reloaded adapters answer differently from those that were saved")


if __name__ == "__main__":
    main()
