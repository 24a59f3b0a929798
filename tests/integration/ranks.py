"""What each of two processes does; test_two_processes.py starts them.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.integration.ranks FOLDER GROUP CASE...

Each case compares with one process that sees the whole batch, and most run with LoRA, too, which tells whether the
recipe itself is right.  What came of them is written to FOLDER/RANK.json: an error's text, or null, for each case up
to the first that failed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    PartialState,
)
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedSequenceParallelConfig
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_hificl import Scoring, VirtualPairs, initialize_from_demonstrations, parameter_groups
from peft_hificl.inspection import record
from peft_hificl.sharding import Exchange

from ..helpers import build, config, hificl_layers, inputs_for, llama, logits
from . import reports

# A group shares its processes.
GROUPS: dict[str, dict[str, Callable[[Path], None]]] = {
    name: {} for name in ("torch", "deepspeed", "tensor", "mesh", "context", "ring", "stages")
}
KINDS = ["hificl", "lora"]
IDS = inputs_for("gqa", rows=4)["input_ids"]
STEPS = 3


def case(group: str, **choices: list[Any]) -> Callable[..., Callable[..., None]]:
    """A case for every combination of these arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for values in itertools.product(*choices.values()):
            name = "-".join(map(str, [function.__name__, *values]))
            GROUPS[group][name] = functools.partial(function, **dict(zip(choices, values, strict=True)))
        return function

    return register


def adapted_twice(kv_heads: int, heads: str) -> PeftModel:
    """A model with two adapters, of which the first is active."""
    settings: dict[str, Any] = {"heads": heads, "skip_first_token": True, "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    model = get_peft_model(llama(kv_heads=kv_heads), config(**settings, pair_weights=True), adapter_name="a")
    model.add_adapter("b", config(**settings, n=2))
    return model.eval()


def adapted(kind: str) -> PeftModel:
    """The same adapter, with an effect, on every rank."""
    base = build("gqa")
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(base, lora if kind == "lora" else config(task_type="CAUSAL_LM"))


# -- data parallel: every way of it trains as one process does with all rows -----------------------------------------


class Parallel(NamedTuple):
    """A model that is spread over the ranks."""

    inner: PeftModel  # which stores the adapter
    step: Callable[[Tensor], Tensor]  # trains on these rows, and returns their loss
    full_state: Callable[[], dict[str, Tensor]]  # a call for all ranks; complete on rank 0


def own_rows() -> Tensor:
    return IDS.chunk(dist.get_world_size())[dist.get_rank()]


def sgd(model: nn.Module, momentum: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=momentum)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[Tensor], Any], ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, labels=ids).loss
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def trains_as_one_process(kind: str, parallel: Parallel, folder: Path) -> None:
    """Losses, and the stored adapter after one step, which tells its gradients, and after the last."""
    alone = adapted(kind)
    optimizer = sgd(alone)
    for number in range(STEPS):
        before = {name: p.clone() for name, p in get_peft_model_state_dict(alone).items()}
        want = step(alone, optimizer, Tensor.backward, IDS)
        with reports() as found:
            loss = parallel.step(own_rows())
        assert found == []  # wherever the gradients are kept
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / dist.get_world_size(), want, rtol=1e-5, atol=1e-5)
        if number in (0, STEPS - 1):
            here = stored_as(folder / str(number), parallel.inner, parallel.full_state(), alone)
            assert not any(torch.equal(p, before[name]) for name, p in get_peft_model_state_dict(alone).items())
    same_logits(PeftModel.from_pretrained(build("gqa"), here), alone)


def stored_as(folder: Path, model: PeftModel, state: dict[str, Tensor], alone: PeftModel) -> Path:
    """Rank 0 stores the adapter, and what it has stored is that of one process."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()
    stored, wanted = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(alone)
    assert stored.keys() == wanted.keys(), (sorted(stored), sorted(wanted))
    for name, tensor in wanted.items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    return folder


def same_logits(model: nn.Module, other: nn.Module) -> None:
    want = logits(other.eval(), input_ids=IDS)
    torch.testing.assert_close(logits(model.eval(), input_ids=IDS), want, rtol=1e-4, atol=1e-4)


@case("torch", kind=KINDS)
def ddp(folder: Path, kind: str) -> None:
    model = adapted(kind)
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    run = functools.partial(step, wrapped, optimizer, accelerator.backward)
    trains_as_one_process(kind, Parallel(model, run, model.state_dict), folder)


@case("torch", kind=KINDS)
def trainer(folder: Path, kind: str) -> None:
    """transformers' own.  Every step sees all rows, so that their order does not matter."""
    model, alone = adapted(kind), adapted(kind)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="steps",
        save_steps=STEPS, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": IDS, "labels": IDS}).with_format("torch")
    run = Trainer(model, arguments, train_dataset=rows)
    run.train()
    assert isinstance(run.model_wrapped, nn.parallel.DistributedDataParallel)
    optimizer = sgd(alone, momentum=0.0)
    for _ in range(STEPS):
        step(alone, optimizer, Tensor.backward, IDS)
    dist.barrier()
    same_logits(PeftModel.from_pretrained(build("gqa"), folder / f"checkpoint-{STEPS}"), alone)


@case("torch", kind=KINDS, use_orig_params=[True, False])
def fsdp1(folder: Path, kind: str, use_orig_params: bool) -> None:
    """By PEFT's policy, what is trained is a unit of its own, and so is a decoder layer."""
    model, copy = adapted(kind), adapted(kind)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )  # fmt: skip
    run = functools.partial(step, wrapped, sgd(wrapped), Tensor.backward)

    def full_state() -> dict[str, Tensor]:
        # By way of a model that is not wrapped: PEFT 0.21 looks for LoRA's layers under the names that they have in
        # the wrapped one, which are not those of its state dict, and stores nothing.
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
            copy.load_state_dict(wrapped.state_dict())
        return copy.state_dict()

    trains_as_one_process(kind, Parallel(copy, run, full_state), folder)


@case("torch", kind=KINDS)
def fsdp2(folder: Path, kind: str) -> None:
    model = adapted(kind)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    run = functools.partial(step, model, sgd(model), Tensor.backward)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full_state = functools.partial(get_model_state_dict, model, options=options)
    trains_as_one_process(kind, Parallel(model, run, full_state), folder)


@case("torch", way=["fsdp1", "fsdp1_flat", "fsdp1_layers", "fsdp2"])
def rates_under_fsdp(folder: Path, way: str) -> None:
    """`parameter_groups` of a sharded model: each kind of parameter learns at its rate."""

    def fresh() -> PeftModel:
        torch.manual_seed(1)
        return get_peft_model(build("gqa"), config(task_type="CAUSAL_LM", pair_weights=True))

    model, alone, copy = fresh(), fresh(), fresh()
    if way == "fsdp2":
        wrapped: nn.Module = model
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        policy = fsdp_auto_wrap_policy(model)
        if way == "fsdp1_layers":  # the adapter is in the units of the layers
            policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=way != "fsdp1_flat", device_id=torch.device("cpu")
        )
    optimizers = [
        torch.optim.SGD(parameter_groups(m, lr=0.1, key_lr_ratio=0.3, weight_lr_ratio=10)) for m in (wrapped, alone)
    ]
    found, wanted = ([group["lr"] for group in optimizer.param_groups] for optimizer in optimizers)
    assert found == wanted and len(wanted) == 3
    for _ in range(STEPS):
        step(wrapped, optimizers[0], Tensor.backward, own_rows())
        step(alone, optimizers[1], Tensor.backward, IDS)
    if way == "fsdp2":
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        stored_as(folder / "adapter", model, state, alone)
    else:
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
            copy.load_state_dict(wrapped.state_dict())
        stored_as(folder / "adapter", copy, copy.state_dict(), alone)


def diverges(model: PeftModel, step: Callable[[Tensor], Tensor]) -> None:
    """The adapter "late" begins the same on all ranks, and after a step it is another on each."""

    def on_all_ranks() -> list[Tensor]:
        own = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if ".late." in name])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        return gathered

    assert torch.equal(*on_all_ranks())
    step(own_rows())
    assert not torch.allclose(*on_all_ranks(), rtol=1e-3)


def with_another(model: PeftModel, name: str) -> PeftModel:
    torch.manual_seed(2)
    if model.peft_config["default"].peft_type == "HIFICL":
        model.add_adapter(name, config(task_type="CAUSAL_LM", pair_weights=True))
    else:
        model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))
    model.set_adapter(name)
    return model


@case("torch")
def added_after_fsdp2_as_lora(folder: Path) -> None:
    model = adapted("lora")
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    with_another(model, "late")
    diverges(model, functools.partial(step, model, sgd(model), Tensor.backward))


def added_after_fsdp2(folder: Path, ran: bool, loaded: bool) -> None:
    """An adapter that comes later is sharded and reduced, too; on four ranks, two of which have copies."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copies", "shards")) if ranks > 2 else None
    model, alone = adapted("hificl"), adapted("hificl")
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if ran:
        step(model, sgd(model), Tensor.backward, own_rows())
        step(alone, sgd(alone), Tensor.backward, IDS)
    with_another(alone, "late")
    if loaded:
        if dist.get_rank() == 0:
            alone.save_pretrained(folder, selected_adapters=["late"])
        dist.barrier()
        model.load_adapter(folder / "late", "late", is_trainable=True)
        model.set_adapter("late")
    else:
        with_another(model, "late")
    for layer in hificl_layers(model):
        for name, weight in layer.named_parameters():
            assert isinstance(weight, DTensor) and (".late." not in name or weight.requires_grad)
    optimizer, own_optimizer = sgd(model), sgd(alone)
    for _ in range(STEPS):
        want = step(alone, own_optimizer, Tensor.backward, IDS)
        loss = step(model, optimizer, Tensor.backward, own_rows())
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / ranks, want, rtol=1e-5, atol=1e-5)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "after", state_dict=state)
        for name, wanted in (("late", get_peft_model_state_dict(alone, adapter_name="late")),):
            stored = load_file(folder / "after" / name / "adapter_model.safetensors")
            assert stored.keys() == wanted.keys()
            for key, tensor in wanted.items():
                torch.testing.assert_close(stored[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    dist.barrier()
    refused(lambda: model.add_adapter("more", config(modules_to_save=["lm_head"])), "lm_head", "leave it out")


case("torch", ran=[False, True], loaded=[False, True])(added_after_fsdp2)
case("mesh", ran=[False, True], loaded=[False, True])(added_after_fsdp2)


@case("torch")
def refused_after_fsdp2(folder: Path) -> None:
    """Beside tensor parallelism of somebody else's."""
    mesh, base = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")), build("gqa")
    for layer in base.model.layers:
        weight = distribute_tensor(layer.self_attn.q_proj.weight.data, mesh["tp"], [Shard(0)])
        layer.self_attn.q_proj.weight = nn.Parameter(weight)
        fully_shard(layer, mesh=mesh["dp"])
    refused(lambda: get_peft_model(base, config()), "self_attn.*FSDP2 beside tensor parallelism")


@case("torch")
def refused_after_fsdp1(folder: Path) -> None:
    model = adapted("hificl")
    FullyShardedDataParallel(model, auto_wrap_policy=fsdp_auto_wrap_policy(model), device_id=torch.device("cpu"))
    refused(lambda: with_another(model, "late"), "FSDP .version 1.", "before")
    assert list(model.peft_config) == ["default"]


@case("torch", kind=KINDS)
def set_after_ddp(folder: Path, kind: str) -> None:
    model = adapted(kind)
    model.add_adapter("late", model.peft_config["default"])
    wrapped = nn.parallel.DistributedDataParallel(model)
    model.set_adapter("late")
    diverges(model, functools.partial(step, wrapped, sgd(model), Tensor.backward))


@case("torch", version=[1, 2])
def fsdp_with_accelerate(folder: Path, version: int) -> None:
    """Training, storing the adapter, and going back to a checkpoint, as PEFT's documentation has it."""
    model = adapted("hificl")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if version == 1 else "transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False, activation_checkpointing=True,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # On CPUs accelerate would use DDP, without a word.
    accelerator.state.fsdp_plugin = plugin
    for state in (PartialState, AcceleratorState):
        state._shared_state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
    if version == 1:
        wrapped = accelerator.prepare(model)  # which replaces the parameters: the optimizer comes later
        optimizer = accelerator.prepare(sgd(wrapped))
    else:
        wrapped, optimizer = accelerator.prepare(model, sgd(model))
    unit = FullyShardedDataParallel if version == 1 else FSDPModule
    assert isinstance(wrapped, unit) and sum(isinstance(m, unit) for m in wrapped.modules()) > 2
    run = functools.partial(step, wrapped, optimizer, accelerator.backward)

    def full_state() -> dict[str, Tensor]:
        if version == 2:
            return accelerator.get_state_dict(wrapped)
        # The same without `offload_to_cpu`, which fails for parameters that are on CPUs already.
        options = FullStateDictConfig(rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, options):
            return wrapped.state_dict()

    trains_as_one_process("hificl", Parallel(accelerator.unwrap_model(wrapped), run, full_state), folder)
    if version == 1:  # its checkpoints are made with `offload_to_cpu`
        return

    accelerator.save_state(folder / "state")
    stored = full_state()
    loss = run(own_rows())
    accelerator.load_state(folder / "state")
    assert all(torch.equal(stored[name], tensor) for name, tensor in full_state().items())
    assert torch.equal(run(own_rows()), loss)


def with_deepspeed() -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, which takes minutes
    deepspeed.init_distributed("gloo", dist_init_required=False)
    return deepspeed


@case("deepspeed", kind=KINDS, stage=[2, 3])
def zero(folder: Path, kind: str, stage: int) -> None:
    deepspeed = with_deepspeed()
    model, copy = adapted(kind), adapted(kind)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=sgd(model),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    assert stage < 3 or all(p.numel() == 0 for p in model.parameters())  # until they are used

    def run(ids: Tensor) -> Tensor:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    def full_state() -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
            copy.load_state_dict(model.state_dict())
        return copy.state_dict()

    trains_as_one_process(kind, Parallel(copy, run, full_state), folder)
    if stage == 3 and kind == "hificl":
        refused(lambda: with_another(model, "late"), "ZeRO-3", "before")
    if stage == 3 and kind == "hificl" and dist.get_rank() == 0:  # never a file of empty tensors
        refused(lambda: model.save_pretrained(folder / "not_gathered"), "GatheredParameters")
        assert not (folder / "not_gathered" / "adapter_model.safetensors").exists()


# -- sequence parallel: a rank holds a part of every row -------------------------------------------------

LENGTH = 16
LONG = torch.arange(3, 3 + LENGTH)[None]
POSITIONS = torch.arange(LENGTH)[None]


def own_part(tensor: Tensor) -> Tensor:
    return tensor.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def refused(call: Callable[[], object], *patterns: str) -> None:
    """Raises an error whose message holds all of these."""
    try:
        call()
    except (ValueError, RuntimeError, TypeError) as error:
        for pattern in patterns:
            assert re.search(pattern, str(error), re.IGNORECASE), f"{pattern!r} is not in: {error}"
    else:
        raise AssertionError("it ran")


@contextmanager
def put_back() -> Iterator[None]:
    """transformers' own functions are there again afterwards, and DeepSpeed may be set up anew."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    try:
        yield
    finally:
        for name in ("sdpa", "flex_attention"):
            ALL_ATTENTION_FUNCTIONS._local_mapping.pop(name, None)
        parallel_state_sp._release_sequence_parallel_groups()


@contextmanager
def ulysses(model: nn.Module, rows: int, around: str = "sdpa") -> Iterator[None]:
    """DeepSpeed's sequence parallelism takes the place of a function in transformers' attention interface."""
    with_deepspeed()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    with put_back():
        UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model, core_attn_implementation=around, sequence_parallel_size=2, micro_batch_size=rows,
            seq_length=LENGTH, seq_length_is_variable=True,
        )  # fmt: skip
        yield


def of_all_ranks(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim=1)


@contextmanager
def without_ulysses() -> Iterator[None]:
    """transformers' own function is back, which is looked up at each call."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    replaced = ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa")
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = replaced


@case("deepspeed", kv_heads=[1, 2, 4], heads=["query", "kv"])
def sequence_parallel(folder: Path, kv_heads: int, heads: str) -> None:
    """Logits and gradients; Ulysses is registered after the adapter was attached, as accelerate does it, and before."""
    model, alone = (adapted_twice(kv_heads, heads) for _ in range(2))
    rows = LONG + 20 * torch.arange(2)[:, None]
    whole = {"input_ids": rows, "position_ids": POSITIONS.expand_as(rows), "use_cache": False}
    own = {**whole, "input_ids": own_part(rows), "position_ids": own_part(whole["position_ids"])}
    labels = functional.pad(rows, (0, 1), value=-100)[:, 1:]

    def same(model: nn.Module, **kwargs: Any) -> None:
        with without_ulysses():
            want = logits(alone, **whole, **kwargs)
        torch.testing.assert_close(of_all_ranks(logits(model, **own, **kwargs)), want, rtol=0, atol=1e-5)

    def backward(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> None:
        output = model(**inputs).logits.flatten(0, 1)
        functional.cross_entropy(output, labels.flatten(), reduction="sum").backward()

    with ulysses(model.get_base_model(), rows=2):
        same(model)
        same(adapted_twice(kv_heads, heads))
        same(model, adapter_names=["b", "__base__"])
        backward(model, own, own_part(labels))
        with without_ulysses():
            backward(alone, whole, labels)
        gradients = dict(alone.named_parameters())
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                dist.all_reduce(weight.grad)
                torch.testing.assert_close(weight.grad, gradients[name].grad, rtol=1e-4, atol=1e-4, msg=name)
        for m in (model, alone):
            m.set_adapter("b")
        same(model)
        with model.disable_adapter(), alone.disable_adapter():
            same(model)
        with record(model):
            refused(lambda: logits(model, **own), "recorded")
        refused(lambda: initialize_from_demonstrations(model, {"input_ids": rows[:1]}, [1, 2]), "before DeepSpeed")
    assert torch.equal(logits(model, **whole), logits(alone, **whole))


@case("deepspeed")
def sequence_parallel_that_is_refused(folder: Path) -> None:
    model = adapted("hificl").eval()
    own = {"input_ids": own_part(LONG), "position_ids": own_part(POSITIONS)}
    model.get_base_model().set_attn_implementation("flex_attention")
    with ulysses(model.get_base_model(), rows=1, around="flex_attention"), torch.compiler.set_stance("force_eager"):
        refused(lambda: logits(model, **own), "'flex_attention'", "ulysses|uattn")
    tensors = [torch.zeros(1, 4, 3, 16)] * 3
    pairs = VirtualPairs(torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16))
    for scores in ({"sinks": torch.zeros(4)}, {"bias": torch.zeros(1, 4, 3, 3)}):
        scoring = Scoring(1.0, **scores)
        refused(lambda: Exchange(None).attend(None, model, *tensors, pairs, scoring, {}, False), "sinks")


@case("deepspeed", kind=KINDS, stage=[2, 3])
def sequence_parallel_training(folder: Path, kind: str, stage: int) -> None:
    """With accelerate, which evaluates each rank's rows alone."""
    with_deepspeed()
    model, alone = adapted(kind), adapted(kind)
    labels = functional.pad(LONG, (0, 1), value=-100)[:, 1:]
    whole = {"input_ids": LONG, "position_ids": POSITIONS, "use_cache": False}
    own = {**whole, "input_ids": own_part(LONG), "position_ids": own_part(POSITIONS)}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch --use_deepspeed` does
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    handler = DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa")
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        parallelism_config=ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=handler),
    )

    def loss_of(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        output = model(**inputs).logits.flatten(0, 1)
        return functional.cross_entropy(output, labels.flatten(), reduction="sum") / (LENGTH - 1)

    with put_back():
        wrapped, _ = accelerator.prepare(model, sgd(model))
        optimizer = sgd(alone)
        for _ in range(STEPS):
            wrapped.train()
            loss = loss_of(wrapped, own, own_part(labels))
            # DeepSpeed 0.19 sums gradients over the ranks of a row, but averages them in stage 3.
            accelerator.backward(loss * (dist.get_world_size() if stage == 3 else 1))
            loss = loss.detach()
            dist.all_reduce(loss)
            with without_ulysses():
                want = loss_of(alone.train(), whole, labels)
                want.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-5)
        wrapped.eval()
        found = logits(wrapped, input_ids=LONG)
    torch.testing.assert_close(found, logits(alone.eval(), input_ids=LONG), rtol=1e-4, atol=1e-4)


# -- running them ----------------------------------------------------------------------------------------------------


def main(folder: str, group: str, *names: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    outcomes: dict[str, str | None] = {}
    for name in names:
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            GROUPS[group][name](own)
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(outcomes))
        if outcomes[name] is not None:  # the other rank may wait for this one, and never come back
            sys.exit(1)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
