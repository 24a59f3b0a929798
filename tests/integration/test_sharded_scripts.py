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
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def launch(flags: str, folder: Path, script: str, *arguments: str) -> None:
    """By accelerate, on CPUs that it takes for GPUs."""
    command = ["accelerate.commands.launch", *flags.split(), "--main_process_port", "0"]
    run(folder, *command, "-m", "tests.integration.as_on_gpus", script, *arguments)


def test_context_parallelism(tmp_path: Path) -> None:
    script_of_the_page("train_context.py", tmp_path)
    launch("--use_fsdp --fsdp_version 2 --num_processes 2", tmp_path, "train_context.py")
    same_as_one_process(tmp_path, torch.arange(16)[None] + 9, steps=4)


def test_pipeline_parallelism(tmp_path: Path) -> None:
    script_of_the_page("train_stages.py", tmp_path)
    torchrun = ["torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    run(tmp_path, *torchrun, "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "train_stages.py")
    same_as_one_process(tmp_path, torch.arange(20).reshape(4, 5) + 9, steps=3)
