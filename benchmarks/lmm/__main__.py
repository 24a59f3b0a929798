"""`python -m benchmarks.lmm`: see the package's docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import __doc__ as what_it_does

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "lmm"
WORK = ROOT / "out" / "lmm"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lmm",
        description=what_it_does,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    results = argparse.ArgumentParser(add_help=False)
    results.add_argument("--results", type=Path, default=RESULTS, help="folder to write to, and to go on from")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands.add_parser("run", parents=[results], help="train and measure a row of a table"))
    memory = commands.add_parser("memory", parents=[results], help="compute memory and time, without weights")
    memory.add_argument("--models", nargs="+", help="default: the paper's")
    commands.add_parser("report", parents=[results], help="write the tables of what is there")
    args = parser.parse_args()
    try:
        if args.command == "run":
            _run(args)
        elif args.command == "memory":
            from . import memory as computed

            print(computed.write(args.results, args.models or ()))
        else:
            from . import report

            print(report.write(args.results))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("--model", required=True, help="folder or hub id of a vision-language model with a chat template")
    run.add_argument("--task", required=True, choices=("vqav2", "okvqa", "coco"))
    run.add_argument("--method", required=True, help="zero-shot, K-shot, hificl-paper, hificl or lora-R")
    run.add_argument("--data", type=Path, help="folder of the task's official files, with COCO's pictures")
    run.add_argument("--hub", help="a data set's hub id, or a local folder of one, instead: it is streamed")
    run.add_argument("--hub-splits", nargs=2, default=("train", "validation"), metavar=("TRAIN", "TEST"))
    run.add_argument("--samples", type=int, default=1000, help="that are trained on, or that demonstrations come from")
    run.add_argument("--validation-samples", type=int, default=500, help="cut from training data, to choose rates by")
    run.add_argument("--questions", type=int, default=10_000, help="of the test, at most")
    run.add_argument("--limit", type=int, help="at most so many of each, for a smoke test")
    run.add_argument("--epochs", type=int, default=3)
    run.add_argument("--seed", type=int, default=3407)
    run.add_argument("--n", type=int, default=8, help="HiFICL's pairs per head")
    run.add_argument("--r", type=int, default=8, help="their rank")
    run.add_argument("--rates", nargs="+", type=float, default=(), help="default: the method's own")
    run.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the base")
    run.add_argument("--eval-batch", type=int, default=8)
    run.add_argument("--save-steps", type=int, default=50, help="steps between checkpoints")
    run.add_argument("--workers", type=int, default=4, help="processes that read pictures")
    run.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    run.add_argument("--work", type=Path, default=WORK, help="folder of checkpoints, adapters and answers")


def _run(args: argparse.Namespace) -> None:
    from ..common.environment import prepare
    from . import report, runner
    from .methods import Method

    most = args.limit or max(args.samples, args.validation_samples, args.questions)
    sizes = tuple(min(most, size) for size in (args.samples, args.validation_samples, args.questions))
    # Before anything is loaded: are there as many samples as the method shows, or begins as?
    wanted = args.n if args.method == "hificl" else Method.named(args.method).shots
    if wanted > sizes[0]:
        raise ValueError(f"{args.method} reads {wanted} demonstrations, and there are {sizes[0]} samples.")
    splits = runner.load_splits(args.task, args.data, args.hub, args.hub_splits, sizes, args.seed)
    prepare()
    base, processor = runner.load_model(args.model, args.dtype)
    job = runner.Job(
        args.model, args.task, args.method, args.n, args.r, sizes[0], sizes[1], args.epochs, args.seed, "test",
        sizes[2], args.dtype, " ".join((args.hub, *args.hub_splits)) if args.hub else "official files",
    )  # fmt: skip
    data = None if args.hub else args.data
    setup = runner.Setup(
        args.results, args.work, data, args.eval_batch, args.save_steps, args.workers, args.checkpointing
    )
    record = runner.run_row(job, args.rates, base, processor, splits, setup)
    print(f"{args.method}: {report._score(record)}")


if __name__ == "__main__":
    main()
