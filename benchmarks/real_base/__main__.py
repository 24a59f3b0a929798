"""`python -m benchmarks.real_base`: see the package's docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import __doc__ as what_it_does

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "real_base"
CACHE = ROOT / "out" / "real_base"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_base",
        description=what_it_does,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache, results = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    cache.add_argument("--cache", type=Path, default=CACHE, help="folder of the model and the tasks")
    results.add_argument("--results", type=Path, default=RESULTS, help="folder to write to, and to go on from")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", parents=[cache], help="download the model and the data of the tasks")
    commands.add_parser("report", parents=[results], help="write the tables of what is there")
    run = commands.add_parser("run", parents=[cache, results], help="train and measure what is not there yet")
    run.add_argument("--tasks", nargs="+", help="default: all")
    run.add_argument("--methods", nargs="+", help="default: all")
    run.add_argument("--samples", nargs="+", type=int, default=[16, 64])
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    run.add_argument("--split", choices=("validation", "test"), default="validation")
    run.add_argument("--rates", nargs="+", type=float, help="default: the method's own; on test data the best of them")
    run.add_argument("--processes", type=int, default=1)
    run.add_argument(
        "--at-once", type=int, default=1, help="trainings of one method and rate that share a batch, for a GPU"
    )
    moved = commands.add_parser(
        "positions", parents=[cache, results], help="move texts that an adapter was not trained at"
    )
    moved.add_argument("--tasks", nargs="+", default=["past", "kind"])
    moved.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    if args.command == "report":
        from . import report

        print(report.write(args.results))
        return

    from ..common.environment import prepare
    from . import base, runner, sources, tasks
    from .methods import METHODS

    prepare()
    if args.command == "prepare":
        packages, model = args.cache / "packages", args.cache / "model"
        sources.download(packages)
        tasks.make(packages, args.cache / "tasks")
        if not model.exists():
            base.convert(packages, model)
        print(args.cache)
        return
    for named, known in ((args.tasks, tasks.TASKS), (getattr(args, "methods", ()), METHODS)):
        if unknown := sorted(set(named or ()) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    if args.command == "positions":
        from . import positions

        positions.run(args.tasks, args.seeds, args.results, args.cache.resolve())
        return
    chosen = args.tasks or list(tasks.TASKS)
    done = runner.load(args.results, chosen)
    methods = args.methods or list(METHODS)
    try:
        jobs = list(runner.plan(chosen, methods, args.samples, args.seeds, args.split, args.rates or (), done))
        runner.check(jobs, args.cache)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    runner.run(jobs, args.results, args.cache.resolve(), args.processes, args.at_once)


if __name__ == "__main__":
    main()
