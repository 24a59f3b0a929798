"""Shipped scripts that shard, by their commands, in two processes or more: what they store is that of one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_hificl import HiFICLConfig

from .. import examples

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "parallel.md").read_text(encoding="utf-8")


def script_of_the_page(name: str, folder: Path) -> None:
    """The script, and the base model that it reads."""
    (script,) = re.findall(rf'```python title="{name}"\n(.*?)```', PAGE, re.DOTALL)
    (folder / name).write_text(script)
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8)).save_pretrained(folder / "base")


def same_as_one_process(folder: Path, ids: Tensor, steps: int) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(0)
    model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    wanted = get_peft_model_state_dict(model)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def run(folder: Path, *command: str) -> None:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu", "HF_DATASETS_CACHE": str(folder / "cache"),
        "ACCELERATE_USE_CPU": str("torch.distributed.run" in command),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def torchrun(folder: Path, ranks: int, *command: str) -> None:
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    run(folder, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(ranks), *command)


def launch(flags: str, folder: Path, script: str, *arguments: str) -> None:
    """By accelerate, on CPUs that it takes for GPUs."""
    command = ["-m", "accelerate.commands.launch", *flags.split(), "--main_process_port", "0"]
    run(folder, *command, "-m", "tests.integration.as_on_gpus", script, *arguments)


WRAP = "--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
WAYS = {
    "fsdp2": f"--use_fsdp --fsdp_version 2 {WRAP}",
    "fsdp1": f"--use_fsdp --fsdp_version 1 {WRAP} --fsdp_sync_module_states false "
    "--fsdp_cpu_ram_efficient_loading false",
    "zero2": "--use_deepspeed --zero_stage 2",
    "zero3": "--use_deepspeed --zero_stage 3",
    "hsdp": f"--use_fsdp --fsdp_version 2 {WRAP} --use_parallelism_config --parallelism_config_dp_replicate_size 2 "
    "--parallelism_config_dp_shard_size 2",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chat model, an adapter that one process has trained, and one that it went on with."""
    folder = tmp_path_factory.mktemp("sharded")
    examples.save_chat_model(folder / "model")
    script, *arguments = options(4, "one")
    run(folder, str(ROOT / script), *arguments)
    run(folder, str(ROOT / script), *arguments[:-1], "more", "--adapter", "one")
    return folder


def options(batch_size: int, output: str) -> list[str]:
    data = ROOT / "examples" / "data" / "ports.jsonl"
    text = f"examples/train_sharded.py --model model --data {data} --epochs 4 --learning_rate 0.05"
    return [*text.split(), "--batch_size", str(batch_size), "--output_dir", output]


@pytest.mark.parametrize("way", [*WAYS, "ddp"])
def test_the_example_of_many_ways(way: str, trained: Path) -> None:
    """Each way stores what one process stores, and FSDP2 goes on with an adapter as one process does."""
    ranks = 4 if way == "hsdp" else 2
    for output, more in ((way, []), ("more-sharded", ["--adapter", "one"]))[: 2 if way == "fsdp2" else 1]:
        script, *arguments = options(4 // ranks, output)
        if way == "ddp":
            torchrun(trained, 2, str(ROOT / script), *arguments, *more)
        else:
            launch(f"{WAYS[way]} --num_processes {ranks}", trained, str(ROOT / script), *arguments, *more)
        wanted, found = (
            load_file(trained / name / "adapter_model.safetensors") for name in ("more" if more else "one", output)
        )
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("way", [*WAYS, "ddp"])
def test_the_page_has_the_command(way: str) -> None:
    flags = "--multi_gpu" if way == "ddp" else WAYS[way].replace("_size 2", "_size N").replace("stage 2", "stage 3")
    page = re.sub(r"_size \d", "_size N", " ".join(PAGE.replace("\\\n", " ").split()))
    assert f"accelerate launch {flags} " in page


def test_context_parallelism(tmp_path: Path) -> None:
    script_of_the_page("train_context.py", tmp_path)
    launch("--use_fsdp --fsdp_version 2 --num_processes 2", tmp_path, "train_context.py")
    same_as_one_process(tmp_path, torch.arange(16)[None] + 9, steps=4)


def test_pipeline_parallelism(tmp_path: Path) -> None:
    script_of_the_page("train_stages.py", tmp_path)
    torchrun(tmp_path, 2, "train_stages.py")
    same_as_one_process(tmp_path, torch.arange(20).reshape(4, 5) + 9, steps=3)
