"""What the tests of training frameworks share: a script as a process, and what an adapter has learned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..examples import ASSISTANT, END, FOLDER, USER, rows

ROOT = FOLDER.parent
DATA = FOLDER / "data" / "ports.jsonl"


def run(script: str, arguments: str, folder: Path, *more_of_path: Path) -> str:
    """What a script of `integrations` prints, as a process in a folder."""
    variables = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *more_of_path))),
    }  # fmt: skip
    command = [sys.executable, *(["-m", script] if "/" not in script else [str(ROOT / "integrations" / script)])]
    done = subprocess.run(
        [*command, *arguments.split()], capture_output=True, text=True, check=False, cwd=folder, env=variables
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def pairs(adapter: Path) -> dict[str, torch.Tensor]:
    """The stored tensors: pairs alone, whose values have moved from zero."""
    stored = load_file(adapter / "adapter_model.safetensors")
    assert stored and all("hificl_" in key for key in stored)
    assert all(tensor.abs().max() > 0 for key, tensor in stored.items() if "V_B" in key)
    return stored


def answers(base: Path, adapter: Path) -> list[str]:
    """To the questions of the data, by the base model with the adapter."""
    words = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    found = []
    for row in rows("ports"):
        ids = words(f"{USER}{row['question']}{END}{ASSISTANT}", return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)
        found.append(words.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return found
