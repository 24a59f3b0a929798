"""The quickstart, cut down to a few steps and pictures."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.base_model.scenes import make_scenes
from benchmarks.common import files
from benchmarks.quality import tasks
from benchmarks.quality.__main__ import RESULTS
from benchmarks.quality.plan import FULL, Job
from benchmarks.quality.runner import rate_of
from benchmarks.quality.store import Store
from benchmarks.quickstart import __main__ as quickstart
from benchmarks.quickstart import adapters, asking, real, report, serve
from benchmarks.real_base.__main__ import CACHE
from benchmarks.real_base.tasks import SPLITS

from ..helpers import byte_tokenizer, llama


def test_rates_are_those_that_the_benchmark_chooses():
    names = {"hificl": "hificl", "lora": "lora-8"}
    for task, rates in adapters.RATES.items():
        store = Store(RESULTS, [task])
        chosen = {method: rate_of(Job(task, name, FULL, 0), store) for method, name in names.items()}
        assert rates == chosen


@pytest.fixture
def small(monkeypatch):
    """Few pictures and steps, and one process."""
    monkeypatch.setattr(tasks, "SIZES", {"train": 20, "validation": 1, "test": 10})
    monkeypatch.setattr(tasks, "_scenes", lambda split: make_scenes(split, 300, tasks.SEED))
    monkeypatch.setattr(asking, "SAMPLES", 16)
    monkeypatch.setattr(asking, "QUERIES", 8)
    monkeypatch.setattr(quickstart, "STEPS_EACH", 10)
    for module in (quickstart, serve):
        monkeypatch.setattr(module, "prepare", lambda: None)

    def run(command, check):
        try:
            serve.main(command[3:])
        except SystemExit:
            return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)


def test_from_base_model_to_served_adapters(small, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "MINIMUM_GAIN", -1.0)
    quickstart.main(["--out", str(tmp_path)])

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["unchanged_after_reload"]
    rows = {(row["task"], row["method"]): row for row in results["rows"]}
    assert set(rows) == {(task, method) for task in asking.CHOSEN for method in report.TITLES}
    for (_, method), row in rows.items():
        assert (row["trainable_parameters"] > 0) == (method in ("hificl", "lora"))
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000

    # One answer that is another: the process that serves must not agree.
    path = tmp_path / "predictions.json"
    predictions = json.loads(path.read_text())
    serve.main(["--out", str(tmp_path)])
    predictions["hificl"]["captions"][-1] += " indeed"
    path.write_text(json.dumps(predictions))
    with pytest.raises(SystemExit, match="answer differently"):
        serve.main(["--out", str(tmp_path)])


def test_fails_if_the_adapter_does_not_help(small, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "MINIMUM_GAIN", 1.1)
    with pytest.raises(SystemExit, match="HiFICL gains only"):
        quickstart.main(["--out", str(tmp_path)])


def test_shows_the_nearest_reference():
    references = ["we see a three blue over gray", "here we see a three blue over gray"]
    assert report.nearest("here we see a two blue over gray", {"references": references}) == references[1]


@pytest.mark.slow
def test_as_it_is(tmp_path):
    command = [sys.executable, "-m", "benchmarks.quickstart", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=900)
    assert json.loads((tmp_path / "results.json").read_text())["unchanged_after_reload"]


# -- on the real base --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """What `prepare` leaves, but tiny, and a training of a few steps; the samples are words and their first letters."""
    torch.manual_seed(0)
    llama(vocab_size=256).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    splits = {name: [(f"{letter}{name}", letter) for letter in "abcdefghij"] for name in SPLITS}
    for task in real.CHOSEN:
        files.write(tmp_path / "tasks" / f"{task}.json", splits)
    for name, value in {"SAMPLES": 8, "STEPS": 2, "MINIMUM_GAIN": -1.0}.items():
        monkeypatch.setattr(real, name, value)
    monkeypatch.setattr(real, "prepare", lambda threads: None)
    return tmp_path


def test_from_the_real_base_to_adapters_that_are_switched(cache, monkeypatch):
    out = cache / "out"
    command = ["--cache", str(cache), "--out", str(out)]
    real.main(command)
    results = json.loads((out / "results.json").read_text())
    assert results["unchanged_after_reload"]
    assert [row["task"] for row in results["rows"]] == list(real.CHOSEN)
    assert all(row["trainable_parameters"] == 2 * 2 * 4 * 8 * (8 + 16) for row in results["rows"])
    for task in real.CHOSEN:
        assert results["questions"][task] == [[f"{letter}validation", letter] for letter in "abc"]
        assert len(results["answers"]["base"][task]) == len(results["answers"]["HiFICL"][task]) == real.SHOWN
        assert (out / task / "adapter_model.safetensors").exists()
    assert results["answers"]["base"] != results["answers"]["HiFICL"]

    # As if reloading had lost something: the weights of one adapter change.
    load = adapters.load

    def damaged(base, folder, names):
        model = load(base, folder, names)
        for name, parameter in model.named_parameters():
            if f"hificl_V_B.{names[-1]}." in name:
                torch.nn.init.normal_(parameter)
        return model

    monkeypatch.setattr(adapters, "load", damaged)
    with pytest.raises(SystemExit, match="answer differently"):
        real.main(command)


def test_fails_if_the_adapter_does_not_help_the_real_base(cache, monkeypatch):
    monkeypatch.setattr(real, "MINIMUM_GAIN", 1.1)
    with pytest.raises(SystemExit, match="HiFICL gains only"):
        real.main(["--cache", str(cache), "--out", str(cache / "out")])


def test_what_is_not_prepared_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        real.main(["--cache", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "run `python -m benchmarks.real_base prepare`" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not (CACHE / "model").exists(), reason="needs `make real-base`")
def test_as_it_is_on_the_real_base(tmp_path):
    command = [sys.executable, "-m", "benchmarks.quickstart.real", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=900)
    assert json.loads((tmp_path / "results.json").read_text())["unchanged_after_reload"]
