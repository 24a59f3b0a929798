"""The benchmark of composed adapters, cut down to a few steps and pictures."""

import json
from pathlib import Path

import pytest

from benchmarks.base_model.scenes import make_scenes
from benchmarks.composition import __main__ as composition
from benchmarks.quality import tasks

RESULTS = Path(composition.__file__).parents[1] / "results" / "composition"


def test_the_report_is_that_of_the_results_beside_it():
    results = json.loads((RESULTS / "results.json").read_text())
    assert composition.report(results) == (RESULTS / "composition.md").read_text()


@pytest.mark.slow
def test_two_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "SIZES", {"train": 20, "validation": 1, "test": 10})
    monkeypatch.setattr(tasks, "_scenes", lambda split: make_scenes(split, 300, tasks.SEED))
    monkeypatch.setattr(composition, "prepare", lambda: None)
    monkeypatch.setattr(composition, "CHOSEN", ("knowledge", "convention"))
    monkeypatch.setattr(composition, "QUERIES", 8)
    monkeypatch.setattr(composition, "STEPS", {16: 5})
    monkeypatch.setattr(composition.asking, "SAMPLES", 16)
    composition.main(["--out", str(tmp_path), "--seeds", "3"])
    results = json.loads((tmp_path / "results.json").read_text())
    found = {(record["method"], record["way"], record["task"]): record for record in results["records"]}
    assert len(found) == len(results["records"]) == 2 * (1 + 4 + 3)
    errors = {way: found["hificl", way, "knowledge"]["error"] for way in composition.WAYS["hificl"]}
    assert [error == 0 for error in errors.values()] == [True, True, False]
    assert composition.report(results) == (tmp_path / "composition.md").read_text()
