"""A process that knows nothing but the base and the saved files: two HiFICL adapters on one base, switched by task.

`python -m benchmarks.quickstart.serve --out out/quickstart` exits with an error if any answer differs from those that
the training process wrote down.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..base_model.model import load_base
from ..common.environment import prepare
from ..common.tables import Table
from ..quality.encoding import CHECKPOINT
from ..quality.scoring import score
from ..quality.tasks import TASKS
from . import adapters, asking
from .asking import CHOSEN


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder that the quickstart wrote")
    out = parser.parse_args(arguments).out
    prepare()
    expected = json.loads((out / "predictions.json").read_text())

    _, base = load_base(CHECKPOINT)
    splits = {task: asking.load(task, base, 0, len(expected["hificl"][task])) for task in CHOSEN}
    model = adapters.load(base, out / "hificl", CHOSEN)

    rows, unchanged = [], True
    # Twice each: switching back changes nothing either.  Without an adapter it is the base again.
    for adapter, task in [(task, task) for task in (*CHOSEN, *CHOSEN)] + [(None, task) for task in CHOSEN]:
        with adapters.switched(model, adapter):
            said = asking.ask(model, task, splits[task])
        before = expected["hificl" if adapter else "zero-shot"][task]
        same = sum(now == then for now, then in zip(said, before, strict=True))
        unchanged &= same == len(said)
        reached = score(task, said, splits[task]["test"].examples)["score"]
        rows.append((adapter or "none", TASKS[task].title, f"{reached:.1%}", f"{same} of {len(said)}"))

    columns = ("active adapter", "task", "score", "answers as before")
    Console().print(Table("Reloaded in a fresh process", columns, rows).rich())
    if not unchanged:
        sys.exit("the reloaded adapters answer differently from those that were saved")


if __name__ == "__main__":
    main()
