"""The machine and the versions that results depend on, and a process that says nothing but what the benchmark says."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from . import files

PACKAGES = ("peft-hificl", "peft", "torch", "transformers", "datasets", "evaluate")


def prepare(threads: int = 1) -> None:
    """Before anything is measured; on shared cores, and with small matrices, two threads mostly wait for each other."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT reads it, not this code


def environment() -> dict[str, Any]:
    """Hardware and versions."""
    hardware: dict[str, object] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        hardware |= {"gpu": properties.name, "gpu GiB": round(properties.total_memory / 2**30)}
        hardware |= {"cuda": torch.version.cuda}
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    return {"hardware": hardware, "versions": versions}


def note_environment(path: Path) -> None:
    """Each that had a part in these results, once."""
    known = json.loads(path.read_text()) if path.exists() else []
    if (this := environment()) not in known:
        files.write(path, [*known, this])


def command() -> str:
    """The command line of this process, as it can be repeated."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
