"""What two processes do: a rank of the tests in test_two_processes.py, started by torchrun.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.integration.ranks FOLDER CASE...

Each case compares with one process that sees the whole batch, or with LoRA.  What came of it is written to
FOLDER/<rank>.json, an error's text or null per case.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, StateDictType, fully_shard

from ..conftest import build, inputs_for, logits
from ..test_peft_api import config

CASES: dict[str, Callable[[Path], None]] = {}
IDS = inputs_for("gqa", rows=4)["input_ids"]
STEPS = 3


def case(function: Callable[..., None]) -> Callable[..., None]:
    """For HiFICL; and for LoRA, which tells whether the recipe itself is right."""
    for kind in ("hificl", "lora"):
        CASES[f"{function.__name__}-{kind}"] = functools.partial(function, kind)
    return function


def adapted(kind: str) -> PeftModel:
    """The same adapter with an effect, on every rank."""
    base = build("gqa")
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(base, lora if kind == "lora" else config(task_type="CAUSAL_LM"))


def own_rows() -> Tensor:
    return IDS.chunk(dist.get_world_size())[dist.get_rank()]


# -- data parallel: every way of it trains as one process does with all rows -----------------------------------------


class Parallel(NamedTuple):
    """A model that is spread over the ranks."""

    inner: PeftModel  # which knows how to save
    step: Callable[[Tensor], Tensor]  # trains on these rows, and returns their loss
    full_state: Callable[[], dict[str, Tensor]]  # a call for all ranks; complete on rank 0


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.5)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Any, ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, labels=ids).loss
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def trains_as_one_process(kind: str, parallel: Parallel, folder: Path) -> None:
    """Losses, and the stored adapter after one step (its gradients) and after all."""
    alone = adapted(kind)
    optimizer = sgd(alone)
    for number in range(STEPS):
        before = {name: p.clone() for name, p in get_peft_model_state_dict(alone).items()}
        want = step(alone, optimizer, torch.Tensor.backward, IDS)
        loss = parallel.step(own_rows())
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / dist.get_world_size(), want, rtol=1e-5, atol=1e-5)
        if number in (0, STEPS - 1):
            here = folder / str(number)
            state = parallel.full_state()
            if dist.get_rank() == 0:
                parallel.inner.save_pretrained(here, state_dict=state)
            dist.barrier()
            stored = load_file(here / "adapter_model.safetensors")
            wanted = get_peft_model_state_dict(alone)
            assert stored.keys() == wanted.keys(), (sorted(stored), sorted(wanted))
            for name, tensor in wanted.items():
                assert not torch.equal(tensor, before[name]), name
                torch.testing.assert_close(stored[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    loaded = PeftModel.from_pretrained(build("gqa"), here).eval()
    want = logits(alone.eval(), input_ids=IDS)
    torch.testing.assert_close(logits(loaded, input_ids=IDS), want, rtol=1e-4, atol=1e-4)


@case
def ddp(kind: str, folder: Path) -> None:
    model = adapted(kind)
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    run = functools.partial(step, wrapped, optimizer, accelerator.backward)
    trains_as_one_process(kind, Parallel(model, run, model.state_dict), folder)


def fsdp1(kind: str, folder: Path, use_orig_params: bool) -> None:
    """PEFT's policy: what is trained is a unit of its own, and so is a decoder layer."""
    model, copy = adapted(kind), adapted(kind)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )  # fmt: skip
    run = functools.partial(step, wrapped, sgd(wrapped), torch.Tensor.backward)

    def full_state() -> dict[str, Tensor]:
        # By way of a model that is not wrapped, as PEFT 0.21 looks for wrapped layers under other names than they have
        # in the state dict, and stores nothing.
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
            copy.load_state_dict(wrapped.state_dict())
        return copy.state_dict()

    trains_as_one_process(kind, Parallel(copy, run, full_state), folder)


@case
def fsdp1_original_parameters(kind: str, folder: Path) -> None:
    fsdp1(kind, folder, use_orig_params=True)


@case
def fsdp1_flat_parameters(kind: str, folder: Path) -> None:
    fsdp1(kind, folder, use_orig_params=False)


@case
def fsdp2(kind: str, folder: Path) -> None:
    model = adapted(kind)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    run = functools.partial(step, model, sgd(model), torch.Tensor.backward)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = functools.partial(get_model_state_dict, model, options=whole)
    trains_as_one_process(kind, Parallel(model, run, state), folder)


def fsdp_with_accelerate(version: int, folder: Path) -> None:
    model = adapted("hificl")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, auto_wrap_policy=fsdp_auto_wrap_policy(model) if version == 1 else None,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # On CPUs accelerate would use DDP, without a word.
    accelerator.state.fsdp_plugin = plugin
    for state in (PartialState, AcceleratorState):
        state._shared_state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    unit = FullyShardedDataParallel if version == 1 else FSDPModule
    assert isinstance(wrapped, unit) and sum(isinstance(m, unit) for m in wrapped.modules()) > 2
    run = functools.partial(step, wrapped, optimizer, accelerator.backward)
    full_state = functools.partial(accelerator.get_state_dict, wrapped)
    trains_as_one_process("hificl", Parallel(accelerator.unwrap_model(wrapped), run, full_state), folder)

    accelerator.save_state(folder / "state")
    stored = full_state()
    loss = run(own_rows())
    accelerator.load_state(folder / "state")
    assert all(torch.equal(stored[name], tensor) for name, tensor in full_state().items())
    assert torch.equal(run(own_rows()), loss)


CASES["fsdp1_with_accelerate"] = functools.partial(fsdp_with_accelerate, 1)
CASES["fsdp2_with_accelerate"] = functools.partial(fsdp_with_accelerate, 2)


# -- running them ----------------------------------------------------------------------------------------------------


def main(folder: str, *names: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    outcomes: dict[str, str | None] = {}
    for name in names:
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        try:
            AcceleratorState._reset_state(reset_partial_state=True)
            CASES[name](own)
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(outcomes))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
