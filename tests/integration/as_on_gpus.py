"""Run a script on CPUs as accelerate would on GPUs: it shards with FSDP, where it would take DDP.

    accelerate launch --use_fsdp ... -m tests.integration.as_on_gpus SCRIPT ARGUMENT...

DeepSpeed runs on CPUs, but accelerate would take each process for the only one.
"""

from __future__ import annotations

import os
import runpy
import sys

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed import fsdp
from torch.distributed.fsdp import FullStateDictConfig


def pretend() -> None:
    PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, which takes minutes
        deepspeed.init_distributed("gloo", dist_init_required=False)
    else:
        # FSDP1 crashes where it shall move to the CPU what is there.
        fsdp.FullStateDictConfig = lambda offload_to_cpu, rank0_only: FullStateDictConfig(rank0_only=rank0_only)
        PartialState._shared_state.update(distributed_type=DistributedType.MULTI_GPU, device=torch.device("cpu"))


if __name__ == "__main__":
    pretend()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
