"""Two processes, or four: data parallel in all its ways; tensor, sequence and context parallel.  See ranks.py."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from . import context_parallel, pipeline_parallel, tensor_parallel  # noqa: F401  # which add their cases
from .ranks import GROUPS

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
MODULES = {
    "tensor": "tensor_parallel", "mesh": "tensor_parallel", "context": "context_parallel", "ring": "context_parallel",
    "stages": "pipeline_parallel",
}  # fmt: skip
CASES = [(group, name) for group, cases in GROUPS.items() for name in cases]


def start(group: str, names: list[str]) -> tuple[list[dict[str, str | None]], str]:
    """What came of these cases on each rank, up to the first that failed, and what was printed."""
    number = 4 if group in ("mesh", "ring") else 2
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number), "--local-addr", "127.0.0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),  # a free port
        *("-m", f"tests.integration.{MODULES.get(group, 'ranks')}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*command, folder, group, *names], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
            try:
                process.wait(timeout=240)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its ranks
                process.wait()
        ranks = [Path(folder, f"{rank}.json") for rank in range(number)]
        outcomes = [json.loads(path.read_text()) if path.exists() else {} for path in ranks]
        return outcomes, Path(folder, "log").read_text(encoding="utf-8")


@functools.cache
def failures(group: str) -> dict[str, str]:
    """The group's cases share two processes; after one that fails, the rest gets two new ones."""
    found: dict[str, str] = {}
    left = list(GROUPS[group])
    while left:
        outcomes, log = start(group, left)
        done = [name for name in left if all(name in rank for rank in outcomes)]
        failed = {
            name: f"rank {i}:\n{e}" for i, rank in enumerate(outcomes) for name, e in rank.items() if e is not None
        }
        if not failed and len(done) < len(left):
            failed = {left[len(done)]: f"the ranks ended before they came to an end:\n{log[-3000:]}"}
        found |= failed
        left = [name for name in left if name not in done and name not in failed]
    return found


@pytest.mark.parametrize(("group", "name"), CASES, ids=[name for _, name in CASES])
def test_on_both_ranks(group: str, name: str) -> None:
    assert name not in failures(group), failures(group)[name]
