"""lm-eval's command line, which does not import the package: the score of an adapter is that of the adapted model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..examples import FOLDER, rows, save_chat_model
from ..helpers import config, logits

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.integration

TASK = """
task: ports
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{answer}}}}"
metric_list: [{{metric: perplexity}}]
"""


def perplexity(folder: Path) -> float:
    """Saves a base model and an adapter there; by definition, the answers' perplexity per answer."""
    save_chat_model(folder / "base")
    words = AutoTokenizer.from_pretrained(folder / "base")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, config(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(folder / "adapter")
    sums = []
    for row in rows("ports"):
        ids = torch.tensor([words(f"{row['question']} {row['answer']}")["input_ids"]])
        begin = len(words(row["question"])["input_ids"])
        scores = torch.log_softmax(logits(model, input_ids=ids)[0, begin - 1 : -1], dim=-1)
        sums.append(scores.gather(1, ids[0, begin:, None]).sum().item())
    return math.exp(-sum(sums) / len(sums))


def test_an_adapters_score(tmp_path: Path) -> None:
    want = perplexity(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ports.yaml").write_text(TASK.format(data=FOLDER / "data" / "ports.jsonl"))
    line = "lm_eval --model hf --model_args pretrained=base,peft=adapter,dtype=float32 --include_path tasks"
    line += " --tasks ports --device cpu --output_path out"
    command = [sys.executable, "-m", "peft_hificl.run", *line.split()]
    variables = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": variables}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["ports"]["perplexity,none"] == pytest.approx(want, rel=1e-3)
