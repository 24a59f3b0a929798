"""Tiny models and files, made once."""

from __future__ import annotations

import pytest

from benchmarks.lmm import runner

from . import tiny


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder of each model, and one of data."""
    folder = tmp_path_factory.mktemp("lmm")
    tiny.save_data(folder / "data")
    for name, save in tiny.MODELS.items():
        save(folder / name)
    return folder


@pytest.fixture
def load(root, monkeypatch):
    """The runner's own loading, with a processor for Qwen3-VL that needs no torchvision."""
    original = runner.AutoProcessor

    class Processors:
        @staticmethod
        def from_pretrained(name):
            return tiny.qwen3_vl_processor() if name.endswith("qwen3_vl") else original.from_pretrained(name)

    monkeypatch.setattr(runner, "AutoProcessor", Processors)
    return lambda name: runner.load_model(str(root / name), "float32")
