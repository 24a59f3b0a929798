"""Sentence Transformers: its trainer trains the adapter alone, and its loader gives the trained model back."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from ..examples import FOLDER, tokenizer
from ..helpers import hificl_layers

sentence_transformers = pytest.importorskip("sentence_transformers")
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SCRIPT = FOLDER.parent / "integrations" / "sentence_transformers" / "train_embeddings.py"
SENTENCES = ["Which port does Halden listen on?", "7411", "Who?"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    words = tokenizer()
    words.model_max_length = 64
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = tf.BertModel(tf.BertConfig(vocab_size=len(words), initializer_range=0.2, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu").save(str(tmp_path / "base"))
    return tmp_path / "base"


def trained(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that the script has trained, which it keeps to itself."""
    kept = []
    save = sentence_transformers.SentenceTransformer.save_pretrained

    def keep(model: Any, *args: Any, **kwargs: Any) -> None:
        kept.append(copy.deepcopy(model))
        save(model, *args, **kwargs)

    monkeypatch.setattr(sentence_transformers.SentenceTransformer, "save_pretrained", keep)
    line = f"--model {base} --data {FOLDER / 'data' / 'ports.jsonl'} --output_dir {folder} --num_train_epochs 3"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *line.split()])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", base.parent / "cache")
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return kept[-1]


def test_the_example(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(base, tmp_path / "adapter", monkeypatch)
    want = model.encode(SENTENCES)
    plain = sentence_transformers.SentenceTransformer(str(base), device="cpu")
    assert len(hificl_layers(model)) == 2 and abs(want - plain.encode(SENTENCES)).max() > 1e-2

    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored and all("hificl_" in key for key in stored)
    assert any(tensor.abs().max() > 0 for key, tensor in stored.items() if "V_B" in key)  # zero at the start
    for name, parameter in plain.named_parameters():
        found = [p for key, p in model.named_parameters() if key.replace(".base_layer", "") == name]
        assert len(found) == 1 and torch.equal(found[0].cpu(), parameter), name  # the base is as it was

    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "HIFICL"
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert abs(loaded.encode(SENTENCES) - want).max() < 1e-5
    # Each sentence alone, without padding.
    assert abs(torch.tensor([loaded.encode(text) for text in SENTENCES]).numpy() - want).max() < 1e-5
    loaded.disable_adapters()
    assert abs(loaded.encode(SENTENCES) - plain.encode(SENTENCES)).max() < 1e-5
