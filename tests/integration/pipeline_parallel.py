"""What each of two processes does with a stage of a pipeline.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.integration.pipeline_parallel FOLDER stages CASE...

Each case compares with one process that has the whole model; see ranks.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from ..helpers import build, config, hificl_layers, logits
from . import reports
from .ranks import IDS, STEPS, adapted, case, main, sgd, step, stored_as
from .tensor_parallel import stored


def cut(model: PeftModel) -> None:
    """Leave this rank's half of the layers."""
    base, rank = model.get_base_model(), dist.get_rank()
    base.model.layers[1 - rank] = PipelineIdentityLayer()
    if rank:
        base.model.embed_tokens = PipelineIdentityLayer()
    else:
        base.model.norm = base.lm_head = PipelineIdentityLayer()


class Stage(nn.Module):
    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{"inputs_embeds" if dist.get_rank() else "input_ids": x}, use_cache=False).logits


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@case("stages", schedule=["GPipe", "1F1B"], loaded=[False, True])
def trains_in_stages(folder: Path, schedule: str, loaded: bool) -> None:
    """Losses, gradients and the stored adapter; cut after it was attached, or loaded onto a stage."""
    model, alone = adapted("hificl"), adapted("hificl")
    cut(model)
    if loaded:
        if dist.get_rank() == 0:
            alone.save_pretrained(folder / "start")
        dist.barrier()
        model = PeftModel.from_pretrained(model.unload(), folder / "start", is_trainable=True)
    optimizer, own_optimizer = sgd(model), sgd(alone)
    stage = PipelineStage(Stage(model.train()), dist.get_rank(), 2, torch.device("cpu"))
    run = get_schedule_class(schedule)(stage, 2, loss_of)
    for _ in range(STEPS):
        before = {name: p.detach().clone() for name, p in alone.named_parameters()}
        wanted = step(alone.train(), own_optimizer, Tensor.backward, IDS)
        losses: list[Tensor] = []
        with reports() as found:
            if dist.get_rank():
                run.step(target=IDS, losses=losses)
                torch.testing.assert_close(torch.stack(losses).mean().detach(), wanted, rtol=1e-5, atol=1e-5)
            else:
                run.step(IDS)
        assert found == []
        optimizer.step()
        optimizer.zero_grad()
        after = dict(alone.named_parameters())
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                torch.testing.assert_close(weight, after[name], rtol=1e-4, atol=1e-5, msg=name)
                assert not torch.equal(weight, before[name]), name
    own = {name: tensor for name, tensor in model.state_dict().items() if "layers" in name}
    stages: list[Any] | None = None if dist.get_rank() else [None, None]
    dist.gather_object(own, stages)
    stored_as(folder / "adapter", model, {name: p for own in stages or [] for name, p in own.items()}, alone)
    again = PeftModel.from_pretrained(build("gqa"), folder / "adapter").eval()
    torch.testing.assert_close(logits(again, input_ids=IDS), logits(alone.eval(), input_ids=IDS), rtol=1e-4, atol=1e-4)


@case("stages")
def serves_in_stages(folder: Path) -> None:
    """As transformers cuts them, which answers on every rank, and has no training."""
    torch.manual_seed(1)
    alone = get_peft_model(build("gqa"), config(task_type="CAUSAL_LM")).eval()
    if dist.get_rank() == 0:
        alone.save_pretrained(folder / "adapter")
    path = stored(build("gqa"), folder / "base")
    base = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(pp_size=2))
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert len(hificl_layers(model)) == 1
    with reports() as found:
        torch.testing.assert_close(logits(model, input_ids=IDS), logits(alone, input_ids=IDS), rtol=1e-4, atol=1e-4)
        answers = [m.generate(input_ids=IDS, max_new_tokens=4, do_sample=False) for m in (model, alone)]
    assert torch.equal(*answers) and found == []


if __name__ == "__main__":
    main(*sys.argv[1:])
