"""Run a script on CPUs as accelerate would on GPUs: it shards with FSDP, where it would take DDP.

accelerate launch --use_fsdp ... -m tests.integration.as_on_gpus SCRIPT ARGUMENT...
"""

from __future__ import annotations

import runpy
import sys

from accelerate import DistributedType, PartialState


def pretend() -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    pretend()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
