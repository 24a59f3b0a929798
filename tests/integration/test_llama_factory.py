"""LLaMA-Factory v1 with the plugin: its trainer on the shipped configuration, and its way to load an adapter."""

from __future__ import annotations

import json
import runpy
import string
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..examples import rows, save_chat_model
from ..helpers import hificl_layers
from .frameworks import ROOT, pairs, run

pytest.importorskip("llamafactory.v1.trainers.sft_trainer", exc_type=ImportError)
pytestmark = pytest.mark.integration

FOLDER = ROOT / "integrations" / "llama_factory"


def test_training_and_going_on(tmp_path: Path) -> None:
    from llamafactory.v1.config.arg_utils import PluginConfig
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin

    save_chat_model(tmp_path / "base")
    with (tmp_path / "data.jsonl").open("w") as file:
        for row in rows("ports"):
            file.write(json.dumps({"instruction": row["question"], "output": row["answer"]}) + "\n")
    (tmp_path / "data.yaml").write_text("ports: {path: data.jsonl, source: local, converter: alpaca}\n")
    text = string.Template((FOLDER / "hificl.yaml").read_text()).substitute(MODEL="base", DATA="data.yaml")
    (tmp_path / "hificl.yaml").write_text(f"{text}\nbf16: false\n")
    run("llama_factory/sft_hificl.py", "hificl.yaml", tmp_path)
    stored = pairs(tmp_path / "hificl-adapter")

    runpy.run_path(str(FOLDER / "sft_hificl.py"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = PluginConfig(name="hificl", adapter_name_or_path=str(tmp_path / "hificl-adapter"))
    for is_train in (True, False):
        model = PeftPlugin("hificl")(base, settings, is_train)
        loaded = {name: p for name, p in model.named_parameters() if "hificl_" in name}
        assert len(hificl_layers(model)) == 2 and len(loaded) == len(stored)
        assert all(p.requires_grad == is_train for p in loaded.values())
        for name, p in loaded.items():
            assert torch.equal(p, stored[name.replace(".default.weight", "")])
        base = model.unload()
    fields = {"n": 4, "r": 2, "pair_weights": True}
    model = PeftPlugin("hificl")(base, PluginConfig(name="hificl", **fields), True)
    assert {name: getattr(model.peft_config["default"], name) for name in fields} == fields
