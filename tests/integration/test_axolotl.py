"""Axolotl reads the plugin's configuration file, and its loader attaches the adapter."""

from __future__ import annotations

import string
from pathlib import Path

import pytest

from ..examples import FOLDER, save_chat_model
from ..helpers import build, hificl_layers, inputs_for, logits

pytest.importorskip("axolotl.cli.config", exc_type=ImportError)
pytestmark = pytest.mark.integration

PLUGIN = FOLDER.parent / "integrations" / "axolotl"


def test_the_plugin_attaches_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.cli.config import load_cfg
    from axolotl.loaders.adapter import load_adapter

    monkeypatch.syspath_prepend(PLUGIN)
    monkeypatch.chdir(tmp_path)
    save_chat_model(tmp_path / "base")
    names = {"MODEL": tmp_path / "base", "DATA": FOLDER / "data" / "ports.jsonl"}
    text = string.Template((PLUGIN / "hificl.yaml").read_text()).substitute(names)
    (tmp_path / "hificl.yaml").write_text(f"{text}\nbf16: false\nsequence_len: 64\n")
    cfg = load_cfg(str(tmp_path / "hificl.yaml"))

    assert load_adapter(build("gqa"), cfg, cfg.adapter, config_only=True)[0] is None
    model, config = load_adapter(build("gqa"), cfg, cfg.adapter)
    assert (config.peft_type, config.n, config.r, config.skip_first_token) == ("HIFICL", 8, 8, True)
    assert len(hificl_layers(model)) == 2
    for layer in hificl_layers(model):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    cfg.lora_model_dir = str(tmp_path / "adapter")
    loaded, _ = load_adapter(build("gqa"), cfg, cfg.adapter, inference=True)
    inputs = inputs_for("gqa")
    assert abs(logits(loaded.eval(), **inputs) - logits(model.eval(), **inputs)).max() < 1e-5
    assert abs(logits(loaded, **inputs) - logits(build("gqa"), **inputs)).max() > 1e-2
