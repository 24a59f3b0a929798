"""Shipped scripts that shard, by their commands, in two processes or more: what they store is that of one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_hificl import HiFICLConfig

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "parallel.md").read_text(encoding="utf-8")


def launch(flags: str, folder: Path, script: str, *arguments: str) -> None:
    """By accelerate, on CPUs that it takes for GPUs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags.split()]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        [*command, "--main_process_port", "0", "-m", "tests.integration.as_on_gpus", script, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_pages_script_of_context_parallelism(tmp_path: Path) -> None:
    (script,) = re.findall(r'```python title="train_context.py"\n(.*?)```', PAGE, re.DOTALL)
    (tmp_path / "train_context.py").write_text(script)
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8)).save_pretrained(tmp_path / "base")
    launch("--use_fsdp --fsdp_version 2 --num_processes 2", tmp_path, "train_context.py")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    ids = torch.arange(16)[None] + 9
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wanted = get_peft_model_state_dict(model)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
