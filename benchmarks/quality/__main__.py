"""`python -m benchmarks.quality`: see the package's docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import __doc__ as what_it_does

RESULTS = Path(__file__).parents[1] / "results" / "quality"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=what_it_does,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("run", "trials", "costs", "report"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to, and to go on from")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", help="default: all")
    parser.add_argument("--methods", nargs="+", help="default: all")
    args = parser.parse_args()
    if args.command == "report":
        from . import report

        print(report.write(args.results))
        return
    from ..common import environment, files
    from . import costs, runner
    from .methods import ALL_METHODS
    from .plan import jobs, trials
    from .tasks import TASKS

    for named, known in ((args.tasks, TASKS), (args.methods, ALL_METHODS)):
        if unknown := sorted(set(named or ()) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")

    if args.command == "costs":
        environment.prepare()
        files.write(args.results / "costs.json", costs.measure())
        return
    grid = trials if args.command == "trials" else jobs
    chosen = [job for job in grid(tuple(args.tasks or TASKS)) if args.methods is None or job.method in args.methods]
    if not chosen:
        parser.error(f"none of these is among the {args.command}")
    runner.run(chosen, args.results, args.processes)


if __name__ == "__main__":
    main()
