"""The Lightning example: what it learns, and what its checkpoints hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..examples import ENOUGH, rows, save_chat_model
from .frameworks import DATA, answers, pairs, run

pytest.importorskip("lightning")
pytestmark = pytest.mark.integration

SCRIPT = "lightning/train_lightning.py"


def test_the_example_learns_its_facts(tmp_path: Path) -> None:
    save_chat_model(tmp_path / "base")
    run(SCRIPT, f"--model base --data {DATA} --output_dir adapter {ENOUGH}", tmp_path)
    pairs(tmp_path / "adapter")
    assert answers(tmp_path / "base", tmp_path / "adapter") == [row["answer"] for row in rows("ports")]


def test_a_checkpoint_holds_the_adapter_alone_and_is_gone_on_from(tmp_path: Path) -> None:
    save_chat_model(tmp_path / "base")
    line = f"--model base --data {DATA} --output_dir"
    run(SCRIPT, f"{line} whole --num_train_epochs 3", tmp_path)
    run(SCRIPT, f"{line} half --num_train_epochs 2", tmp_path)
    (checkpoint,) = (tmp_path / "half").rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state and all("hificl_" in name for name in state)
    run(SCRIPT, f"{line} rest --num_train_epochs 3 --resume {checkpoint}", tmp_path)
    want, got = pairs(tmp_path / "whole"), pairs(tmp_path / "rest")
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5)
