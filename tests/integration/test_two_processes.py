"""Two processes: data parallel in all its ways, sequence and context parallel.  See ranks.py."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .ranks import GROUPS

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
CASES = [(group, name) for group, cases in GROUPS.items() for name in cases]


@functools.cache
def outcomes(group: str) -> tuple[list[dict[str, str | None]], str]:
    """What came of each case on each rank, and what was printed."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),  # a free port
        *("-m", "tests.integration.ranks"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/log", "w", encoding="utf-8") as log:
            process = subprocess.Popen([*command, folder, group], cwd=ROOT, env=environment, stdout=log, stderr=log)
            try:
                process.wait(timeout=240)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its ranks
                process.wait()
        ranks = [Path(folder, f"{rank}.json") for rank in range(2)]
        found = [json.loads(path.read_text()) if path.exists() else {} for path in ranks]
        return found, Path(folder, "log").read_text(encoding="utf-8")


@pytest.mark.parametrize(("group", "name"), CASES, ids=[name for _, name in CASES])
def test_on_both_ranks(group: str, name: str) -> None:
    found, log = outcomes(group)
    for rank, errors in enumerate(found):
        assert name in errors, f"rank {rank} did not come so far:\n{log[-3000:]}"
        assert errors[name] is None, f"rank {rank}:\n{errors[name]}"
