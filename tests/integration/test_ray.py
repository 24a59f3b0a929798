"""The Ray Train example, with two workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..examples import rows, save_chat_model
from .frameworks import DATA, answers, pairs, run

pytest.importorskip("ray.train")
pytestmark = pytest.mark.integration


def test_two_workers_learn_the_facts_of_both(tmp_path: Path) -> None:
    save_chat_model(tmp_path / "base")
    run(
        "ray/train_ray.py",
        f"--model base --data {DATA} --output_dir adapter --num_workers 2 --num_train_epochs 60 --learning_rate 0.1",
        tmp_path,
    )
    pairs(tmp_path / "adapter")
    assert answers(tmp_path / "base", tmp_path / "adapter") == [row["answer"] for row in rows("ports")]
