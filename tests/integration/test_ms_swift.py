"""ms-swift's command line with the plugin: the page's commands, on a small model."""

from __future__ import annotations

import json
import os
import re
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..examples import FOLDER, rows, save_chat_model

pytest.importorskip("swift.tuner_plugin")
pytestmark = pytest.mark.integration

ROOT = FOLDER.parent
PAGE = (ROOT / "docs" / "guides" / "frameworks.md").read_text()


def run(command: str, folder: Path, more: str, **names: Path) -> None:
    """A command of the page, as a process."""
    (line,) = re.findall(rf"^swift {command} .*$", PAGE, re.MULTILINE)
    _, _, *arguments = shlex.split(string.Template(line).substitute(names) + f" {more}")
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", f"swift.cli.{command}", *arguments],
        capture_output=True, text=True, check=False, cwd=folder, env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_training_and_inference(tmp_path: Path) -> None:
    save_chat_model(tmp_path / "base")
    (tmp_path / "integrations").symlink_to(ROOT / "integrations")
    with (tmp_path / "data.jsonl").open("w") as file:
        for row in rows("ports"):
            chat = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            file.write(json.dumps({"messages": chat}) + "\n")
    small = "--model_type llama --template dummy --torch_dtype float32 --report_to none --per_device_train_batch_size 2"
    names = {"MODEL": tmp_path / "base", "DATA": tmp_path / "data.jsonl"}
    run("sft", tmp_path, f"{small} --num_train_epochs 2 --gradient_accumulation_steps 1", **names)

    (adapter,) = tmp_path.glob("out/*/checkpoint-4")
    stored = load_file(adapter / "adapter_model.safetensors")
    assert stored and all("hificl_" in key for key in stored)
    assert all(tensor.abs().max() > 0 for key, tensor in stored.items() if "V_B" in key)  # zero at the start
    run("infer", tmp_path, "--max_new_tokens 4 --temperature 0 --max_batch_size 1", CHECKPOINT=adapter, **names)
    answers = [json.loads(line)["response"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]

    words = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    for row, answer in zip(rows("ports"), answers, strict=True):
        chat = [{"role": "user", "content": row["question"]}]
        ids = words.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")[
            "input_ids"
        ]
        want = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert answer == words.decode(want, skip_special_tokens=True)
