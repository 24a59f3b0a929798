"""What each process does with a base model that transformers divides between two or, in both ways, four of them.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.integration.tensor_parallel FOLDER tensor CASE...
    python -m torch.distributed.run --nproc-per-node 4 -m tests.integration.tensor_parallel FOLDER mesh CASE...

Each case compares with one process that has the whole model; see ranks.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from peft_hificl import hotswap_adapter, initialize_from_demonstrations, prune_pairs, to_prefix_cache
from peft_hificl.inspection import pair_effects, pair_similarity, record

from .. import architectures
from ..helpers import build, config, hificl_layers, llama, logits, unchanged
from .as_on_gpus import pretend
from .ranks import IDS, STEPS, case, main, refused, sgd

KINDS = ["mha", "gqa"]


def stored(model: PreTrainedModel, folder: Path) -> Path:
    """The base model in a folder that all ranks see."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


def divided(path: Path, tp_plan: Any = "auto", kind: Any = AutoModelForCausalLM, **kwargs: Any) -> PreTrainedModel:
    plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=tp_plan)
    return kind.from_pretrained(path, distributed_config=plan, **kwargs).eval()


def both(kind: str, folder: Path, seed: int = 1, **kwargs: Any) -> tuple[PeftModel, PeftModel]:
    """A fresh adapter on a divided model and on a whole one."""
    path = stored(build(kind), folder / "base")
    models = []
    for base in (divided(path), build(kind)):
        torch.manual_seed(seed)
        models.append(get_peft_model(base, config(task_type="CAUSAL_LM", **kwargs)).eval())
    return models[0], models[1]


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Element by element; in half precision by the norm: single elements depend on the order in which ranks add up."""
    if tolerance < 1e-2:
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    else:
        assert float((found.float() - wanted.float()).norm() / wanted.float().norm()) < tolerance


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


# Grouped heads, latent attention, fused projections, attentions that plans leave whole or gather, sinks, a picture.
FAMILIES = [
    "gemma2", "deepseek_v2", "gpt_neox", "phi3", "olmo2", "gpt_oss", "granite_swa", "granitemoe", "t5gemma", "llava",
]  # fmt: skip


@case("tensor", family=FAMILIES)
def computes(folder: Path, family: str) -> None:
    """Outputs and gradients with transformers' own plan for each architecture."""
    entry = next(entry for entry in architectures.FAMILIES if entry.name == family)
    alone = architectures.build(entry)
    model = divided(stored(alone, folder / "base"), kind=type(alone))
    inputs = architectures.forward_inputs(entry, alone)
    found = []
    for base in (model, alone):
        torch.manual_seed(1)
        adapter = get_peft_model(base, config()).eval()
        output = adapter(**inputs).logits
        output.square().mean().backward()
        found.append((output.detach(), {name: p.grad for name, p in adapter.named_parameters() if p.requires_grad}))
    (output, gradients), (wanted, of_one_process) = found
    close(output, wanted)
    for name, gradient in of_one_process.items():
        close(gradients[name].full_tensor() / gradient.abs().max(), gradient / gradient.abs().max())


@case("tensor")
def trains_in_bfloat16(folder: Path) -> None:
    """The adapter in float32, with gradient checkpointing, and clipped gradients."""
    path = stored(build("gqa").bfloat16(), folder / "base")
    losses, norms, outputs = [], [], []
    for base in (divided(path, dtype="bfloat16"), AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16")):
        torch.manual_seed(1)
        model = get_peft_model(base, config(task_type="CAUSAL_LM"))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(STEPS):
            loss = model.train()(input_ids=IDS, labels=IDS).loss
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            norms.append(norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item())
        outputs.append(logits(model.eval(), input_ids=IDS).float())
    assert losses[:STEPS] == pytest.approx(losses[STEPS:], rel=2e-2)
    assert norms[:STEPS] == pytest.approx(norms[STEPS:], rel=5e-2)
    close(*outputs, tolerance=0.1)


@case("tensor")
def trainer_with_tensor_parallelism(folder: Path) -> None:
    """transformers' own: losses, norms of gradients, the stored adapter.  On CPUs, without pretence, it is refused."""
    model, alone = both("gqa", folder)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=len(IDS), learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="steps",
        save_steps=STEPS, save_only_model=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": IDS, "labels": IDS}).with_format("torch")
    refused(lambda: Trainer(model, arguments, train_dataset=rows), "MULTI_CPU")
    AcceleratorState._reset_state()
    pretend()
    run = Trainer(model, arguments, train_dataset=rows)
    run.train()
    optimizer = sgd(alone, momentum=0.0)
    for found in run.state.log_history[:STEPS]:
        loss = alone.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in alone.parameters() if p.requires_grad])
        assert [found["loss"], found["grad_norm"]] == pytest.approx([loss.item(), norm.item()], rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    same_adapter(model, alone, tolerance=1e-4)
    again = PeftModel.from_pretrained(build("gqa"), folder / f"checkpoint-{STEPS}")
    same_adapter(again, alone, tolerance=1e-4)


@case("tensor", implementation=["sdpa", "eager"])
def serves(folder: Path, implementation: str) -> None:
    """Several adapters, strengths, rows of their own, generation, padding; the ranks have other seeds."""
    path = stored(build("gqa"), folder / "base")
    one = divided(path), build("gqa")
    models = []
    for base in one:
        base.set_attn_implementation(implementation)
        torch.manual_seed(1)
        model = get_peft_model(base, config(task_type="CAUSAL_LM", pair_weights=True), adapter_name="a")
        torch.manual_seed(2 + (dist.get_rank() if base is one[0] else 0))  # those of the first rank count
        model.add_adapter("b", config(task_type="CAUSAL_LM", n=2, heads="kv", factorize_keys=False))
        models.append(model.eval())
    model, alone = models
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    for name in "ab":
        same_adapter(model, alone, name)

    def same() -> None:
        close(logits(model, input_ids=IDS, attention_mask=mask), logits(alone, input_ids=IDS, attention_mask=mask))
        found, wanted = (
            m.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=4, do_sample=False) for m in models
        )
        assert torch.equal(found, wanted)

    same()
    base_output = [logits(m, input_ids=IDS) for m in models]
    for m in models:
        m.set_adapter("b")
    same()
    for m in models:
        m.base_model.set_adapter(["a", "b"])
    same()
    for m in models:
        for layer in hificl_layers(m):
            layer.set_scale("a", 0.3)
    same()
    rows = {"adapter_names": ["a", "__base__", "b", "a"]}
    close(logits(model, input_ids=IDS, **rows), logits(alone, input_ids=IDS, **rows))
    assert torch.equal(*(m.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, **rows) for m in models))
    for m in models:
        m.delete_adapter("a")
    same()
    assert not torch.allclose(base_output[0], logits(model, input_ids=IDS), atol=1e-2)
    close(logits(model.unload(), input_ids=IDS), logits(build("gqa"), input_ids=IDS))


@case("tensor")
def serves_continuous_batches(folder: Path) -> None:
    found = []
    for model in both("gqa", folder):
        results = model.generate_batch(
            inputs=IDS.tolist(),
            generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, page_size=4, max_batch_tokens=7),
        )
        found.append([(result.error, result.generated_tokens) for result in results.values()])
    assert found[0] == found[1] and not any(error for error, _ in found[0])


@case("tensor", heads=["query", "kv"], factorized=[True, False])
def starts_from_demonstrations(folder: Path, heads: str, factorized: bool) -> None:
    kinds: dict[str, Any] = {"heads": heads, "factorize_keys": factorized, "factorize_values": factorized}
    model, alone = both("gqa", folder, pair_weights=True, **kinds)
    for tokens in (None, [2, 4, 8]):
        errors = []
        for m in (model, alone):
            torch.manual_seed(5 + (dist.get_rank() if m is model else 0))
            errors.append(initialize_from_demonstrations(m, {"input_ids": IDS[:1]}, tokens))
        assert errors[0] == pytest.approx(errors[1], abs=1e-5)
        same_adapter(model, alone, tolerance=1e-4)
        close(logits(model, input_ids=IDS), logits(alone, input_ids=IDS), 1e-4)


@case("tensor")
def hotswaps(folder: Path) -> None:
    model, alone = both("gqa", folder)
    other = get_peft_model(build("gqa"), config(task_type="CAUSAL_LM"))
    if dist.get_rank() == 0:
        other.save_pretrained(folder / "other")
    dist.barrier()
    for m in (model, alone):
        hotswap_adapter(m, folder / "other", "default")
    same_adapter(model, alone)
    close(logits(model, input_ids=IDS), logits(alone, input_ids=IDS))


def sharded_when_loaded(folder: Path, dtype: str) -> None:
    """A base that transformers shards for data parallelism, too: FSDP2, alone or beside tensor parallelism."""
    tp_size = dist.get_world_size() // 2
    path = stored(build("gqa"), folder / "base")
    plan = DistributedConfig(tp_size=tp_size, fsdp_size=2)
    base = AutoModelForCausalLM.from_pretrained(path, distributed_config=plan, dtype=dtype)
    models = [base, AutoModelForCausalLM.from_pretrained(path, dtype=dtype)]
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    own = IDS.chunk(2)[dist.get_rank() // tp_size]
    losses: list[list[float]] = [[], []]
    for number, name in enumerate("ab"):  # the second one comes after a forward pass
        for m in models:
            torch.manual_seed(number)
            if number:
                m.add_adapter(name, config(task_type="CAUSAL_LM", pair_weights=True))
                m.set_adapter(name)
        if number == 0:
            for index, m in enumerate(models):
                torch.manual_seed(number)
                models[index] = get_peft_model(m, config(task_type="CAUSAL_LM"), adapter_name=name)
        model, alone = models
        same_adapter(model, alone, name)
        for m, ids, found in ((model, own, losses[0]), (alone, IDS, losses[1])):
            optimizer = torch.optim.AdamW([p for p in m.train().parameters() if p.requires_grad], lr=1e-2)
            for _ in range(STEPS):
                loss = m(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                loss = loss.detach().float()
                dist.all_reduce(loss)
                found.append(loss.item() / dist.get_world_size())
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
        same_adapter(model, alone, name, tolerance=tolerance)
    same_adapter(model, alone, "a", tolerance=tolerance)
    want = logits(model.eval(), input_ids=IDS)
    close(want, logits(alone.eval(), input_ids=IDS), min(10 * tolerance, 0.1))
    again = AutoModelForCausalLM.from_pretrained(path, distributed_config=plan, dtype=dtype)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(again, saved(model, folder / "adapter") / "b", **options).eval()
        close(logits(loaded, input_ids=IDS), want, tolerance)
        again = loaded.unload()
    again.load_adapter(folder / "adapter" / "b")
    close(logits(again, input_ids=IDS), want, tolerance)
    for m in models:
        torch.manual_seed(5)
        initialize_from_demonstrations(m, {"input_ids": IDS[:1]}, [2, 4, 8], adapter_name="b")
    if dtype == "float32":
        same_adapter(model, alone, "b", tolerance=1e-3)
    hotswap_adapter(model, folder / "adapter" / "b", "b")
    close(logits(model, input_ids=IDS), want, tolerance)
    refused(lambda: pair_similarity(model, "a"), "all heads")
    refused(lambda: get_peft_model(models[0].unload(), config(modules_to_save=["lm_head"])), "lm_head")


case("tensor", dtype=["float32", "bfloat16"])(sharded_when_loaded)
case("mesh", dtype=["float32", "bfloat16"])(sharded_when_loaded)  # of four processes


@case("tensor")
def refuses(folder: Path) -> None:
    """Before the first change, on every rank."""
    path = stored(build("gqa"), folder / "base")
    base = divided(path)

    def attach(model: nn.Module = base, **kwargs: Any) -> object:
        return get_peft_model(model, config(**kwargs))

    with unchanged(base):
        refused(lambda: attach(modules_to_save=["lm_head"]), "lm_head", "leave it out")
        refused(lambda: attach(modules_to_save=["embed_tokens"]), "embed_tokens")
        refused(lambda: attach(trainable_token_indices=[1, 2]), "embedding")
        refused(lambda: attach(trainable_token_indices={"embed_tokens": [1]}), "embed_tokens")
        refused(lambda: attach(base.model), "self_attn", "whole model")
    keys = {f"model.layers.*.self_attn.{part}_proj": "replicate" for part in "kv"}
    refused(lambda: attach(divided(path, tp_plan=keys)), "k_proj", "rowwise")
    replicas = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(dp_replicate_size=2))
    refused(lambda: attach(replicas), "dp_replicate_size=2", "fully_shard")
    one_group = stored(llama(kv_heads=1), folder / "mqa")
    refused(lambda: attach(divided(one_group)), "'model.layers.0.self_attn' has 4 query heads and 1 key", "tp_size")
    model = get_peft_model(base, config(heads="kv"))
    other = PeftModel.from_pretrained(build("gqa"), saved(model, folder / "a"))
    with unchanged(model):
        for call in (
            lambda: pair_similarity(model, "default"),
            lambda: pair_effects(model, [{"input_ids": IDS, "labels": IDS}]),
            lambda: to_prefix_cache(model),
            lambda: prune_pairs(model, [{"input_ids": IDS, "labels": IDS}], 2),
            lambda: record(model).__enter__(),
        ):
            refused(call, "all heads", "self_attn")
        refused(lambda: model.base_model.add_weighted_adapter(["default"], [0.5], "half"), "whole")
        of_three_layers = saved(get_peft_model(llama(layers=3), config()), folder / "b")
        refused(lambda: model.load_adapter(of_three_layers, "b"), "unexpected")
    close(logits(model, input_ids=IDS), logits(other.eval(), input_ids=IDS))


def saved(model: PeftModel, folder: Path) -> Path:
    """An adapter in a folder that all ranks see."""
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
