"""What each of two or four processes does under torch's `context_parallel`, alone and as accelerate prepares it.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.integration.context_parallel FOLDER context CASE...
    python -m torch.distributed.run --nproc-per-node 4 -m tests.integration.context_parallel FOLDER ring CASE...

Each case compares with the formula over the whole row, or with one process that has it; see ranks.py.  The base model
itself cannot run so on CPUs, for which torch has no ring: only adapted attentions can, by kernels of their own choice.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import (
    Accelerator,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
)
from accelerate.big_modeling import _attach_context_parallel_hooks
from accelerate.utils import TorchContextParallelConfig
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import _cp_options, context_parallel_unshard, set_rotate_method
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_hificl import Scoring, VirtualPairs, initialize_from_demonstrations
from peft_hificl.inspection import record
from peft_hificl.ops import merged

from .. import oracle
from ..helpers import build, logits
from . import reports
from .as_on_gpus import pretend
from .ranks import STEPS, adapted, adapted_twice, case, main, refused, sgd, stored_as

LENGTH = 16
ROWS = 3 + torch.arange(LENGTH) + 20 * torch.arange(2)[:, None]
POSITIONS = torch.arange(LENGTH)[None].expand_as(ROWS)
LABELS = functional.pad(ROWS, (0, 1), value=-100)[:, 1:].contiguous()


@functools.cache
def mesh() -> DeviceMesh:
    return dist.init_device_mesh("cpu", (dist.get_world_size(),))


@contextlib.contextmanager
def in_parts(*tensors: Tensor, dim: int = 1) -> Iterator[list[Tensor]]:
    """This rank's part of them, which `context_parallel` chooses."""
    parts = [tensor.clone() for tensor in tensors]
    with context_parallel(mesh(), buffers=parts, buffer_seq_dims=[dim] * len(parts)):
        yield parts


def of_all_ranks(tensor: Tensor, dim: int = 1) -> Tensor:
    """The whole row, in its own order."""
    (whole,) = context_parallel_unshard(mesh(), [tensor.detach()], [dim])
    return whole


def summed(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


@contextlib.contextmanager
def torchs_options(balanced: bool, rotation: str) -> Iterator[None]:
    before = _cp_options.enable_load_balance
    _cp_options.enable_load_balance = balanced
    set_rotate_method(rotation)
    try:
        yield
    finally:
        _cp_options.enable_load_balance = before
        set_rotate_method("allgather")


ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_group": {"groups": 1},
    "pairs_of_groups": {"groups": 2, "pair_heads": 2, "n": 1},
    "alpha_one": {"alpha_one": True},
    "first_token": {"skip_first_token": True, "log_weights": True},
    "first_token_alpha_one": {"skip_first_token": True, "alpha_one": True},
    "sinks": {"sinks": True, "log_weights": True},
    "wide_values": {"value_dim": 12},
    "no_mask": {"causal": False, "skip_first_token": True},
}


def attends(folder: Path, kind: str) -> None:
    """Output and every gradient, against the definition over the whole row."""
    options = {"groups": 4, "pair_heads": 4, "n": 3, "value_dim": 8, "causal": True, **ATTENTIONS[kind]}
    torch.manual_seed(3)
    shapes = {
        "query": (2, 4, LENGTH, 8), "key": (2, options["groups"], LENGTH, 8),
        "value": (2, options["groups"], LENGTH, options["value_dim"]),
        "keys": (1, options["pair_heads"], options["n"], 8),
        "values": (1, options["pair_heads"], options["n"], options["value_dim"]),
    }  # fmt: skip
    if options.get("log_weights"):
        shapes["logs"] = (1, 4, options["n"])
    if options.get("sinks"):
        shapes["sinks"] = (4,)
    whole = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    alpha_one, skip = options.get("alpha_one", False), options.get("skip_first_token", False)
    virtual = [whole[name].repeat_interleave(4 // options["pair_heads"], dim=1) for name in ("keys", "values")]
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    wanted, _ = oracle.hificl(
        *(whole[name] for name in ("query", "key", "value")), *virtual, 0.3,
        mask=(mask.tril() if options["causal"] else mask)[None, None], sinks=whole.get("sinks"),
        log_weights=whole.get("logs"), alpha_one=alpha_one, skip_first_token=skip,
    )  # fmt: skip
    direction = torch.randn_like(wanted)
    wanted.backward(direction)
    for balanced, rotation in itertools.product([True, False], ["allgather", "alltoall"]):
        if balanced and not options["causal"]:
            continue
        with torchs_options(balanced, rotation):
            with in_parts(*(whole[name].detach() for name in ("query", "key", "value")), direction, dim=2) as found:
                *parts, own_direction = found
                tensors = dict(zip(("query", "key", "value"), parts, strict=True))
                tensors |= {name: whole[name].detach().clone() for name in whole if name not in tensors}
                tensors = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
                pairs = VirtualPairs(tensors["keys"], tensors["values"], tensors.get("logs"), not alpha_one, skip)
                scoring = Scoring(0.3, is_causal=options["causal"], sinks=tensors.get("sinks"))
                called = [tensors[name] for name in ("query", "key", "value")]
                output = merged.attention(*called, pairs, scoring, mesh().get_group())
                with torch.no_grad():
                    assert torch.equal(merged.attention(*called, pairs, scoring, mesh().get_group()), output)
                output.backward(own_direction.float())
            close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
            close(of_all_ranks(output, 2), wanted.float())
            for name, tensor in tensors.items():
                gradient = of_all_ranks(tensor.grad, 2) if name in ("query", "key", "value") else summed(tensor.grad)
                close(gradient, whole[name].grad.float(), msg=f"{name}, {balanced}, {rotation}")


case("context", kind=list(ATTENTIONS))(attends)
case("ring", kind=list(ATTENTIONS))(attends)  # of four processes


@case("context", kv_heads=[1, 2, 4], heads=["query", "kv"], balanced=[True, False])
def computes(folder: Path, kv_heads: int, heads: str, balanced: bool) -> None:
    """Logits and gradients of a model."""
    model, alone = (adapted_twice(kv_heads, heads) for _ in range(2))

    def same(**kwargs: Any) -> None:
        with in_parts(ROWS, POSITIONS) as (ids, positions):
            found = of_all_ranks(logits(model, input_ids=ids, position_ids=positions, **kwargs))
        torch.testing.assert_close(found, logits(alone, input_ids=ROWS, **kwargs), rtol=0, atol=2e-5)

    with torchs_options(balanced, "allgather"):
        same()
        _attach_context_parallel_hooks(model)  # which drop masks: transformers takes positions that jump for documents
        same(adapter_names=["b", "a"])
        with in_parts(ROWS, POSITIONS, LABELS) as (ids, positions, labels):
            output = model(input_ids=ids, position_ids=positions, use_cache=False).logits.flatten(0, 1)
            functional.cross_entropy(output, labels.flatten(), reduction="sum").backward()
        output = alone(input_ids=ROWS).logits.flatten(0, 1)
        functional.cross_entropy(output, LABELS.flatten(), reduction="sum").backward()
        gradients = dict(alone.named_parameters())
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                torch.testing.assert_close(summed(weight.grad), gradients[name].grad, rtol=1e-4, atol=1e-4, msg=name)
        for m in (model, alone):
            m.set_adapter("b")
        same()
        for m in (model, alone):
            m.base_model.set_adapter(["a", "b"])
        same()
    assert torch.equal(logits(model, input_ids=ROWS), logits(alone, input_ids=ROWS))


@case("context")
def computes_in_bfloat16(folder: Path) -> None:
    model = adapted("hificl").eval()
    wanted = logits(model, input_ids=ROWS)
    half = adapted("hificl").eval().bfloat16()
    with in_parts(ROWS, POSITIONS) as (ids, positions):
        found = of_all_ranks(logits(half, input_ids=ids, position_ids=positions)).float()
    assert float((found - wanted).norm() / wanted.norm()) < 5e-2


@case("context")
def compiles(folder: Path) -> None:
    model = adapted("hificl").eval()
    wanted = logits(model, input_ids=ROWS)
    _attach_context_parallel_hooks(model)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager")
    with in_parts(ROWS, POSITIONS) as (ids, positions):
        found = of_all_ranks(logits(model, input_ids=ids, position_ids=positions, use_cache=False))
    for result in (found, logits(model, input_ids=ROWS)):
        torch.testing.assert_close(result, wanted, rtol=0, atol=2e-5)


@case("context")
def recomputes(folder: Path) -> None:
    """With gradient checkpointing, a backward within the block is right; after it, without the ring, refused."""

    def gradients(model: PeftModel, within: bool, length: int = LENGTH) -> list[Tensor]:
        _attach_context_parallel_hooks(model)
        with contextlib.ExitStack() as block:
            ids, positions = block.enter_context(in_parts(ROWS[:, :length], POSITIONS[:, :length]))
            loss = model(input_ids=ids, position_ids=positions, use_cache=False).logits.square().mean()
            if not within:
                block.close()
            loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    # Six tokens do not divide into the four parts of load balancing, which torch leaves out within the block alone.
    uneven = [gradients(adapted("hificl").train(), within, length=6) for within in (True, False)]
    torch.testing.assert_close(*uneven)
    wanted = gradients(adapted("hificl").train(), within=True)
    for after in (wanted, gradients(adapted("hificl").train(), within=False)):
        model = adapted("hificl").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(gradients(model, within=True), after)
        refused(lambda: gradients(model, within=False), "number of tensors")
    model = adapted("hificl").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    found = gradients(model, within=False)  # without the ring, and nothing notices
    assert not any(torch.allclose(gradient, want, rtol=1e-2) for gradient, want in zip(found, wanted, strict=True))


@case("context")
def refused_under_context_parallel(folder: Path) -> None:
    """What a ring of kernels cannot compute; and both ways of sharing a row at once."""
    model = adapted("hificl").eval()
    want = logits(model, input_ids=ROWS)
    with in_parts(ROWS, POSITIONS) as (ids, positions):
        own = {"input_ids": ids, "position_ids": positions}
        mask = torch.zeros(1, 1, LENGTH // 2, LENGTH // 2)
        refused(lambda: logits(model, **own, attention_mask=mask), "LlamaAttention.*context parallelism.*no mask")
        cache = model(**own, use_cache=True).past_key_values
        refused(lambda: logits(model, **own, past_key_values=cache), "mask|as many keys as queries")
        with record(model):
            refused(lambda: logits(model, **own), "recorded")
        refused(lambda: initialize_from_demonstrations(model, {"input_ids": ids[:1]}, [1, 2, 3]), "before")
        with model.disable_adapter():  # the base model itself
            refused(lambda: logits(model, **own), "flash_attention_for_cpu.*sharding strategy")
        for attention in model.modules():
            if hasattr(attention, "attention_dropout"):
                attention.attention_dropout = 0.1
        refused(lambda: model.train()(**own), "dropout")
        ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: None
        try:
            refused(lambda: logits(model.eval(), **own), "taken the place")
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        model.get_base_model().set_attn_implementation("eager")
    model.get_base_model().set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(model, input_ids=ROWS), want)


def with_fsdp2(**kwargs: Any) -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=False,
    )  # fmt: skip
    pretend()
    accelerator = Accelerator(fsdp_plugin=plugin, **kwargs)
    assert accelerator.is_fsdp2
    return accelerator


@case("context", rotation=["allgather", "alltoall"])
def trains_with_accelerate(folder: Path, rotation: str) -> None:
    """Losses, gradients (by the file after one step) and the stored adapter; FSDP2 sums gradients over the ranks."""
    handler = TorchContextParallelConfig(cp_comm_strategy=rotation)
    accelerator = with_fsdp2(parallelism_config=ParallelismConfig(cp_size=2, cp_handler=handler))
    model, alone = adapted("hificl"), adapted("hificl")
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    assert sum(isinstance(module, FSDPModule) for module in wrapped.modules()) > 2
    own_optimizer = sgd(alone)
    for number in range(STEPS):
        ids, positions, labels, mask = ROWS.clone(), POSITIONS.clone(), LABELS.clone(), torch.ones_like(ROWS)
        wanted = alone(input_ids=ROWS, labels=ROWS, shift_labels=LABELS, num_items_in_batch=2 * LENGTH - 2).loss
        wanted.backward()
        own_optimizer.step()
        own_optimizer.zero_grad()
        with reports() as found:
            buffers = [ids, positions, labels, mask]
            with accelerator.maybe_context_parallel(buffers, [1] * 4, set(buffers)):
                loss = wrapped(
                    input_ids=ids, position_ids=positions, attention_mask=mask, labels=labels, shift_labels=labels,
                    num_items_in_batch=LENGTH - 1,
                ).loss  # fmt: skip
                accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        assert found == []
        torch.testing.assert_close(summed(loss) / 2, wanted.detach(), rtol=1e-5, atol=1e-5)
        if number in (0, STEPS - 1):
            here = stored_as(folder / str(number), model, accelerator.get_state_dict(wrapped), alone)
    again = PeftModel.from_pretrained(build("gqa"), here).eval()
    wanted = logits(alone.eval(), input_ids=ROWS)
    torch.testing.assert_close(logits(again, input_ids=ROWS), wanted, rtol=1e-4, atol=1e-4)


@case("context")
def trainer_with_context_parallel(folder: Path) -> None:
    """transformers' own: losses, norms of gradients, the stored adapter."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True, fsdp=True, parallelism_config=ParallelismConfig(cp_size=2),
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    )  # fmt: skip
    pretend()
    model, alone = adapted("hificl"), adapted("hificl")
    rows = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS}).with_format("torch")
    run = Trainer(model, arguments, train_dataset=rows)
    run.train()
    assert run.accelerator.is_fsdp2 and sum(isinstance(module, FSDPModule) for module in model.modules()) > 2
    optimizer = sgd(alone, momentum=0.0)
    for found in run.state.log_history[:STEPS]:
        loss = alone(input_ids=ROWS, labels=ROWS).loss
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in alone.parameters() if p.requires_grad])
        assert [found["loss"], found["grad_norm"]] == pytest.approx([loss.item(), norm.item()], rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    stored_as(folder / "adapter", model, run.accelerator.get_state_dict(run.model_wrapped), alone)


if __name__ == "__main__":
    main(*sys.argv[1:])
