"""What each of two processes does with a base model that transformers divides between them.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.integration.tensor_parallel FOLDER tensor CASE...

Each case compares with one process that has the whole model; see ranks.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from ..helpers import build, config, hificl_layers, llama, logits, pairs_for
from .ranks import IDS, STEPS, case, main, sgd, step

KINDS = ["mha", "gqa"]


def base_model(kind: str) -> PreTrainedModel:
    return build(kind)


def stored(model: PreTrainedModel, folder: Path) -> Path:
    """The base model in a folder that all ranks see."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


def divided(path: Path, **kwargs: Any) -> PreTrainedModel:
    plan = DistributedConfig(tp_size=dist.get_world_size(), **kwargs)
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=plan).eval()


def both(kind: str, folder: Path, seed: int = 1, **kwargs: Any) -> tuple[PeftModel, PeftModel]:
    """A fresh adapter on a divided model and on a whole one."""
    path = stored(base_model(kind), folder / "base")
    models = []
    for base in (divided(path), build(kind)):
        torch.manual_seed(seed)
        models.append(get_peft_model(base, config(task_type="CAUSAL_LM", **kwargs)).eval())
    return models[0], models[1]


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def same_adapter(model: nn.Module, alone: nn.Module, adapter_name: str = "default", tolerance: float = 0.0) -> None:
    """Whole, by the names and shapes of one process."""
    found, wanted = (get_peft_model_state_dict(m, adapter_name=adapter_name) for m in (model, alone))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert type(found[name]) is Tensor, name
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@case("tensor", kind=KINDS, heads=["query", "kv"])
def trains(folder: Path, kind: str, heads: str) -> None:
    """Fresh values, logits, losses, gradients and the stored file."""
    model, alone = both(kind, folder, heads=heads, pair_weights=True, skip_first_token=True)
    same_adapter(model, alone)
    for layer in hificl_layers(model):
        for weight in layer.parameters():
            assert isinstance(weight, DTensor) and weight.to_local().shape[0] * 2 == weight.shape[0]
    close(logits(model, input_ids=IDS), logits(alone, input_ids=IDS))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (model, alone)]
    for _ in range(STEPS):
        losses = []
        for m, optimizer in zip((model, alone), optimizers, strict=True):
            optimizer.zero_grad()
            loss = m(input_ids=IDS, labels=IDS).loss
            loss.backward()
            losses.append(loss.detach())
        close(*losses)
        gradients = dict(alone.named_parameters())
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                close(weight.grad.full_tensor(), gradients[name].grad)
        for optimizer in optimizers:
            optimizer.step()
    same_adapter(model, alone, tolerance=1e-4)
    model.save_pretrained(folder / "adapter", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    wanted = get_peft_model_state_dict(alone)
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    want = logits(model, input_ids=IDS)
    again = PeftModel.from_pretrained(build(kind), folder / "adapter").eval()  # on one process
    close(logits(again, input_ids=IDS), want)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(divided(folder / "base"), folder / "adapter", **options).eval()
        same_adapter(loaded, model)
        assert torch.equal(logits(loaded, input_ids=IDS), want)
    native = divided(folder / "base")
    native.load_adapter(folder / "adapter")  # transformers' own
    close(logits(native, input_ids=IDS), want)


if __name__ == "__main__":
    main(*sys.argv[1:])
