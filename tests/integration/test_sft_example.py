"""The example for TRL's SFTTrainer, on a tiny model: what it trains, saves, loads, and answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as tf

from .. import examples
from ..examples import ASSISTANT, END, ENOUGH, USER, command, first_loss, losses, rows, run

pytestmark = pytest.mark.integration


def test_sft_trl(tmp_path: Path) -> None:
    examples.save_chat_model(tmp_path / "model")
    # TRL trains in bfloat16 by default, which a CPU does not offer to it.
    printed = run(command("sft_trl"), tmp_path, f"{ENOUGH} --bf16 False")
    learned = rows("owners")
    assert printed.endswith("".join(f"{row['question']} {row['answer']}\n" for row in learned))
    saved = {path.name for path in (tmp_path / "adapters" / "trl").iterdir()}
    assert saved >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}

    first, *_, last = losses(tmp_path / "adapters" / "trl")
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "model")
    inputs = [tokenizer(f"{USER}{row['question']}{END}{ASSISTANT}", return_tensors="pt") for row in learned]
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert first == pytest.approx(first_loss(base, inputs, [row["answer"] for row in learned]), abs=1e-5)
    assert last < first / 4
