"""`python -m benchmarks.speed`: see the package's docstring."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..common.environment import prepare
from . import __doc__ as what_it_does
from . import attention, inference, lifecycle, paper, report, rows, serving, training
from .presets import PRESETS

PARTS = {
    "attention": attention,
    "training": training,
    "inference": inference,
    "lifecycle": lifecycle,
    "rows": rows,
    "serving": serving,
    "paper": paper,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=what_it_does,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/speed"), help="folder to write to")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="model and sizes; 1b and 8b are for a GPU")
    parser.add_argument("--quick", dest="preset", action="store_const", const="quick", help="toy sizes: does it run?")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (float32) or cuda (bf16)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; on shared cores two wait for each other")
    parser.add_argument("--compile", action="store_true", help="decode compiled too")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T", help="of the attention operation")
    parser.add_argument("--training-lengths", nargs="+", type=int, metavar="T", help="of the training step")
    parser.add_argument("--image-tokens", type=int, help="of each image in a prompt")
    parser.add_argument("--seconds", type=float, help="per comparison, at least five rounds")
    args = parser.parse_args()

    chosen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name in ("lengths", "training_lengths", "image_tokens", "seconds")
        if (value := getattr(args, name)) is not None
    }
    preset = dataclasses.replace(PRESETS[args.preset], **chosen)
    settings = {
        "preset": args.preset,
        "device": str(args.device),
        "compile": args.compile,
        **dataclasses.asdict(preset),
    }
    prepare(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    console = Console()
    for name in args.parts:
        start = time.perf_counter()
        records = PARTS[name].run(preset, args.device, args.compile)
        report.save(args.out, name, settings, records, time.perf_counter() - start)
    report.write(args.out, PARTS, console)
    console.print(f"speed.md, a picture and a JSON file per part are in {args.out}")


if __name__ == "__main__":
    main()
