"""The quickstart, cut down to a few steps and pictures."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks.base_model.scenes import make_scenes
from benchmarks.quality import tasks
from benchmarks.quality.__main__ import RESULTS
from benchmarks.quality.plan import FULL, Job
from benchmarks.quality.runner import rate_of
from benchmarks.quality.store import Store
from benchmarks.quickstart import __main__ as quickstart
from benchmarks.quickstart import adapters, asking, report, serve


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
