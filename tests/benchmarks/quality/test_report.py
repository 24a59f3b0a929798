"""The report of the quality benchmark: its statistics, and what it makes of whole, partial and broken results."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.common import files
from benchmarks.common.tables import NOT_MEASURED, Table
from benchmarks.quality import frame, goals, plots, report, tables
from benchmarks.quality.__main__ import RESULTS
from benchmarks.quality.frame import METHODS, SHOTS, TASKS, TRIALS
from benchmarks.quality.methods import ALL_METHODS
from benchmarks.quality.plan import FULL, SIZES, START_SEEDS, STARTED, TRIAL_SEEDS
from benchmarks.quality.statistics import holm, interval, paired

LEVELS = dict.fromkeys(METHODS, 0.5) | {"hificl": 0.7, "hificl-n16": 0.7}
PARAMETERS = {"hificl": 1000, "hificl-n16": 1200, "lora-8": 2500, "lora-16": 5000}


def write_run(folder: Path, task: str, method: str, samples: int, seed: int, score: float, **more: object) -> None:
    run = {"task": task, "method": method, "samples": samples, "seed": seed, "rate": 0.005, "steps": 10, "batch": 8}
    run |= {"trainable_parameters": PARAMETERS.get(method, 1500), "training_seconds": 2.0, "test": {"score": score}}
    if method in SHOTS.values():
        run |= {"rate": None, "trainable_parameters": 0, "training_seconds": 0.0}
    if task == "captions":
        run["test"] |= {"cider": 4 * score, "exact_match": score, "chair_i": 0.1, "chair_s": 0.2, "recall": 0.9}
    files.append(folder / "runs" / f"{task}.jsonl", run | {"unheard of": 1} | more)


def write_all(
    folder: Path,
    levels: Mapping[str, float] = LEVELS,
    tasks: Iterable[str] = tuple(TASKS),
    sizes: Iterable[int] = (FULL,),
    seeds: int = 5,
) -> frame.Results:
    random = np.random.default_rng(0)
    for method, level in levels.items():
        for task in tasks:
            for samples in (0,) if method == "zero-shot" else sizes:
                for seed in range(seeds):
                    write_run(folder, task, method, samples, seed, level + random.uniform(-0.02, 0.02))
    return frame.load(folder)


def write_grid(folder: Path, method: str, scores: Mapping[float, float]) -> None:
    for rate, score in scores.items():
        sweep = {"task": "coarse", "method": method, "samples": FULL, "rate": rate, "seed": 0}
        files.append(folder / "sweeps" / "coarse.jsonl", sweep | {"validation": {"score": score}})


def remove_runs(folder: Path, method: str, **having: object) -> None:
    """Those of the coarse task."""
    path = folder / "runs" / "coarse.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    for record in records:
        if record["method"] != method or not having.items() <= record.items():
            files.append(path, record)


def row_of(table: Table, title: str) -> dict[str, str]:
    (row,) = [row for row in table.rows if row[0] == title]
    return dict(zip(table.columns, row, strict=True))


def statuses(found: frame.Results) -> dict[str, str]:
    return {goal.key: goal.status for goal in goals.evaluate(found)}


# -- statistics --------------------------------------------------------------------------------------------------------


def test_interval_by_hand() -> None:
    found = interval([0.5, 0.6, 0.7])
    assert found.mean == pytest.approx(0.6)
    assert found.half == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert found.above_zero
    assert interval([]) is None
    assert interval([0.3]).half is None and interval([0.3]).above_zero is None
    assert interval([0.1] * 5).half == 0


def test_paired_is_scipys() -> None:
    first, second = np.random.default_rng(0).uniform(size=(2, 5))
    expected = stats.ttest_rel(first, second)
    bounds = expected.confidence_interval(0.95)
    found = paired(first, second)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((bounds.low, bounds.high))


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (0.1, 0.0)], ids=["identical", "shifted"])
def test_pairs_without_variance(shift: float, p: float) -> None:
    first = np.random.default_rng(0).uniform(size=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired(first, first - shift)
    assert (found.p, found.half) == (p, 0)
    assert found.above_zero == (shift > 0)


def test_paired_needs_pairs() -> None:
    assert paired([], []) is None
    assert paired([0.5], [0.4]).p is None
    with pytest.raises(ValueError, match="as many values"):
        paired([1.0, 2.0], [1.0])


def test_holm_by_hand() -> None:
    # sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (raised to the one before it), 0.9 * 1
    assert holm([0.03, 0.9, 0.01, None, 0.02]) == pytest.approx([0.06, 0.9, 0.04, None, 0.06])
    assert holm([0.8, 0.7]) == [1, 1]
    assert holm([None]) == [None]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_whole_report(tmp_path: Path) -> None:
    write_all(tmp_path, sizes=SIZES)
    write_grid(tmp_path, "hificl", {0.001: 0.1, 0.005: 0.9, 0.01: 0.2})
    row = {"method": "mimic", "trainable_parameters": 1500, "step_seconds": 0.3, "step_over_hificl": 7.9}
    costs = [row | {"step_flops": 28.6e9, "query_seconds": None}, {"method": "hificl", "step_flops": 2e9}]
    (tmp_path / "costs.json").write_text(json.dumps({"hardware": {"cpu": "a cpu"}, "versions": {}, "rows": costs}))
    path = report.write(tmp_path)
    text = path.read_text()
    assert path == tmp_path / "report.md"
    for picture in ("samples", "parameters", "shots"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 10_000 and f"({picture}.png)" in text
    for anchor in (
        "goals",
        "main",
        "samples",
        "paired",
        "ablation",
        "hallucination",
        "costs",
        "rates",
        "goal-c-lora-8-16",
    ):
        assert f'<a id="{anchor}"></a>' in text
    for figure in ("54.19", "1.3315", "16.78", "5.74", "7.5x", "14.3x", "7.90x", "14.30x", "a cpu"):
        assert figure in text
    assert "nan" not in text.lower().split() and NOT_MEASURED not in statuses(frame.load(tmp_path)).values()


def test_the_report_is_that_of_the_results_beside_it(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md", "*.png"))
    assert report.write(tmp_path).read_text() == (RESULTS / "report.md").read_text()
    assert frame.load(RESULTS).unusable == []


def test_points_stand_where_they_were_measured(tmp_path: Path) -> None:
    found = write_all(tmp_path, sizes=SIZES)  # most methods have as many parameters as others
    expected = {plots.draw_samples: set(SIZES), plots.draw_parameters: set(PARAMETERS.values()) | {1500}}
    for draw, places in expected.items():
        figure = Figure()
        draw(found, figure)
        drawn = {x for axes in figure.axes for shown in axes.containers for x in shown.lines[0].get_xdata()}
        assert drawn == places


def test_empty_report(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = report.write(tmp_path).read_text()
    assert set(statuses(frame.load(tmp_path)).values()) == {NOT_MEASURED}
    assert "Not measured" in text
    assert "54.19" in text  # the paper's figures stand whatever was measured here


def test_missing_task_leaves_no_mean(tmp_path: Path) -> None:
    write_all(tmp_path, {"hificl": 0.7, "lora-8": 0.6})
    remove_runs(tmp_path, "lora-8", seed=4)
    row = row_of(tables.main(frame.load(tmp_path)), METHODS["lora-8"])
    assert row[TASKS["coarse"]].endswith("(4 seeds)") and row[tables.MEAN].endswith("(4 seeds)")
    remove_runs(tmp_path, "lora-8")
    found = frame.load(tmp_path)
    row = row_of(tables.main(found), METHODS["lora-8"])
    assert (row[TASKS["coarse"]], row[tables.MEAN]) == ("-", "-")
    assert row[TASKS["captions"]] != "-"
    assert found.difference("hificl", "lora-8", FULL) is None
    assert found.difference("hificl", "lora-8", FULL, "captions").count == 5
    assert row_of(tables.comparisons(found), METHODS["lora-8"])["1,000 samples"] == "-"


def test_main_table(tmp_path: Path) -> None:
    table = tables.main(write_all(tmp_path, LEVELS | {"hificl": 0.9}, seeds=1))
    row = row_of(table, "HiFICL")
    assert row["trainable parameters"] == "1,000 (1.00x)"
    assert row[TASKS["renaming"]].startswith("**") and row[TASKS["renaming"]].endswith("(1 seed)**")
    assert row_of(table, METHODS["lora-8"])["trainable parameters"] == "2,500 (2.50x)"
    assert row_of(table, METHODS["zero-shot"])["trainable parameters"] == "-"
    assert row_of(table, METHODS["zero-shot"])[tables.MEAN] != "-"  # its runs draw on no samples


def test_by_samples_shows_what_was_run(tmp_path: Path) -> None:
    table = tables.by_samples(write_all(tmp_path, {"zero-shot": 0.1, "hificl": 0.7}, sizes=(16, FULL)))
    assert table.columns == ("method", "0", "16", "64", "256", "1,000")
    assert [cell == "-" for cell in row_of(table, "zero-shot").values()] == [False, False, True, True, True, True]
    assert [cell == "-" for cell in row_of(table, "HiFICL").values()] == [False, True, False, True, True, False]


def test_comparison_corrects_across_tasks(tmp_path: Path) -> None:
    found = write_all(tmp_path, {"hificl": 0.51, "lora-8": 0.5})
    raw = [found.difference("hificl", "lora-8", FULL, task).p for task in TASKS]
    table = tables.comparison(found, "lora-8")
    assert table.columns == ("task", "1,000 samples", "p")
    expected = [f"{tables.p_value(p)} ({tables.p_value(q)})" for p, q in zip(raw, holm(raw), strict=True)]
    assert [row[2] for row in table.rows] == expected


def test_lines_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, "coarse", "lora-8", FULL, 0, float("nan"))
    write_run(tmp_path, "coarse", "lora-8", FULL, 1, 0.5, rate="fast")
    write_run(tmp_path, "captions", "lora-8", FULL, 2, 0.5)
    (of_another_task,) = (tmp_path / "runs" / "captions.jsonl").read_text().splitlines(keepends=True)
    write_all(tmp_path, {"hificl": 0.7, "new-method": 0.5})
    with (tmp_path / "runs" / "coarse.jsonl").open("a") as file:
        file.write(of_another_task + '{"task": "coarse"}\n{"task": "coa\n{"task"')
    found = frame.load(tmp_path)
    named = [line.split(":")[0] for line in found.unusable]
    lines = (1, 2, 13, 14, 15)  # five seeds of two methods between them
    assert named == [*(f"runs/coarse.jsonl, line {number}" for number in lines), "runs/coarse.jsonl"]
    assert tables.unknown(found) == ["new-method"]
    assert row_of(tables.coverage(found), "HiFICL")["1,000"] == 30


def test_of_two_lines_for_a_run_the_later_one_holds(tmp_path: Path) -> None:
    for score in (0.9, 0.2):
        write_run(tmp_path, "coarse", "hificl", FULL, 0, score)
        write_grid(tmp_path, "hificl", {0.001: score, 0.01: 0.5})
    found = frame.load(tmp_path)
    assert found.scores("hificl", "coarse", FULL).tolist() == [0.2]
    assert found.rates("hificl", "coarse", FULL).better == 0.01


def test_a_rate_is_told_of_what_ran_or_was_swept_alone(tmp_path: Path) -> None:
    write_grid(tmp_path, "hificl", {0.001: 0.1, 0.005: 0.9, 0.01: 0.2})
    write_run(tmp_path, "coarse", "hificl-n4", FULL, 0, 0.5)
    found = frame.load(tmp_path)
    assert found.rates("hificl", "coarse", FULL).chosen == (0.005,)
    assert found.rates("hificl-n4", "coarse", FULL).grid == (0.001, 0.005, 0.01)
    assert found.rates("hificl-r4", "coarse", FULL) is None
    assert found.rates("hificl", "coarse", 256) is None


@pytest.mark.parametrize(
    ("grid", "shown"),
    [
        ({0.001: 0.1, 0.005: 0.9, 0.01: 0.2}, "0.005"),
        ({0.001: 0.1, 0.002: 0.2, 0.005: 0.9}, "0.005 (edge)"),
        ({0.001: 0.1, 0.005: 0.2, 0.01: 0.9}, "0.005 (better: 0.01)"),
        ({}, "0.005"),
    ],
    ids=["inside", "edge", "not the best", "no grid"],
)
def test_rates(grid: dict[float, float], shown: str, tmp_path: Path) -> None:
    write_run(tmp_path, "coarse", "lora-8", FULL, 0, 0.5)
    write_grid(tmp_path, "lora-8", grid)
    found = frame.load(tmp_path)
    row = row_of(tables.rates(found), METHODS["lora-8"])
    assert row[TASKS["coarse"]] == shown and row[TASKS["captions"]] == "-"
    assert row["rates tried"] == (", ".join(map(str, grid)) or "-")
    assert tables.edges(found) == (int("edge" in shown), int(bool(grid)))


def write_trial(folder: Path, name: str, method: str, rate: float, *scores: float, task: str = "captions") -> None:
    for seed, score in zip(TRIAL_SEEDS, scores, strict=False):
        record = {"task": task, "method": method, "samples": FULL, "seed": seed, "rate": rate}
        files.append(folder / name / f"{task}.jsonl", record | {"validation": {"score": score}})


def test_trials_are_means_over_all_their_seeds_at_the_best_rate(tmp_path: Path) -> None:
    method = "hificl-keys-0.1"
    *rates, last = ALL_METHODS[method].rates
    write_trial(tmp_path, "sweeps", "hificl", 0.01, 0.3)  # of one seed and one rate
    for rate, scores in zip(rates, ((0.2, 0.8), (0.5, 0.56), (0.1, 0.9)), strict=True):
        write_trial(tmp_path, "trials", method, rate, *scores)
    write_trial(tmp_path, "trials", method, last, 0.9)  # the second is yet to come
    assert frame.load(tmp_path).trial(method, "captions", FULL) is None
    write_trial(tmp_path, "trials", method, last, 0.9, 0.1)
    found = frame.load(tmp_path)
    assert found.trial(method, "captions", FULL) == (rates[1], [0.5, 0.56])
    assert found.trial("hificl", "captions", FULL) is None
    few, many = tables.trials(found)
    assert few.rows == []
    assert [row[0] for row in many.rows] == [TRIALS[method]]
    row = row_of(many, TRIALS[method])
    assert (row[TASKS["captions"]], row[TASKS["composed"]], row["mean"]) == (f"53.0 ({rates[1]:g})", "-", "-")
    for task in ("knowledge", "composed"):
        for rate in (*rates, last):
            write_trial(tmp_path, "trials", method, rate, 0.2, 0.2, task=task)
    row = row_of(tables.trials(frame.load(tmp_path))[1], TRIALS[method])
    assert row["mean"] == "31.0"
    assert found.rates(method, "captions", FULL) is None  # and so no part of the rates that were chosen


def test_starts_are_shown_with_the_spread_of_more_seeds(tmp_path: Path) -> None:
    method, scores = "start-weights", (0.2, 0.4, 0.6, 0.8)
    for rate in ALL_METHODS[method].rates:
        for seed, score in zip(START_SEEDS, scores, strict=True):
            record = {"task": "composed", "method": method, "samples": 64, "seed": seed, "rate": rate}
            better = score + (0.1 if rate == 0.03 else 0.0)
            files.append(tmp_path / "trials" / "composed.jsonl", record | {"validation": {"score": better}})
    table = tables.starts(frame.load(tmp_path))
    row = row_of(table, TRIALS[method])
    assert (row[TASKS["composed"]], row[TASKS["knowledge"]]) == ("60.0 ± 25.8 (0.03)", "-")
    assert [of[0] for of in table.rows] == [(METHODS | TRIALS)[name] for name in STARTED]


# -- goals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.7, 0.3], ids=["ahead", "behind"])
def test_goals_follow_the_data(level: float, tmp_path: Path) -> None:
    found = statuses(write_all(tmp_path, LEVELS | {"hificl": level, "hificl-n16": level}, sizes=SIZES))
    expected = goals.SHOWN if level == 0.7 else goals.NOT_SHOWN
    assert {status for key, status in found.items() if key[0] in "abce"} == {expected}
    assert {status for key, status in found.items() if key[0] == "d"} == {goals.SHOWN}
    assert {status for key, status in found.items() if key[0] == "f"} == {goals.NOT_SHOWN}  # all train for 2 s


def test_each_number_of_pairs_is_judged_by_its_own_runs(tmp_path: Path) -> None:
    levels = {"hificl": 0.7, "hificl-n16": 0.3, "lora-8": 0.5}
    found = statuses(write_all(tmp_path, levels, sizes=(16, FULL)))
    for goal in ("b-lora-8", "c-lora-8-16"):
        assert (found[goal], found[f"{goal}-n16"]) == (goals.SHOWN, goals.NOT_SHOWN)
    assert found["d-lora-8-n16"] == goals.SHOWN and found["c-lora-16-16-n16"] == NOT_MEASURED


def test_one_task_decides_a_goal_on_every_task(tmp_path: Path) -> None:
    write_all(tmp_path, {"hificl": 0.7, "mimic": 0.5, "live": 0.5}, tasks=["coarse", "captions"])
    assert statuses(frame.load(tmp_path))["a-mimic"] == NOT_MEASURED
    for seed in range(5):
        write_run(tmp_path, "captions", "mimic", FULL, seed, 0.9)
    found = statuses(frame.load(tmp_path))
    assert found["a-mimic"] == goals.NOT_SHOWN and found["a-live"] == NOT_MEASURED


def test_clearly_needs_an_interval_above_zero(tmp_path: Path) -> None:
    found = write_all(tmp_path, {"hificl": 0.501, "lora-8": 0.5, "lora-16": 0.4}, sizes=(16,))
    difference = found.difference("hificl", "lora-8", 16)
    assert abs(difference.mean) < difference.half
    assert statuses(found)["c-lora-8-16"] == goals.NOT_SHOWN
    assert statuses(found)["c-lora-16-16"] == goals.SHOWN
    assert statuses(found)["c-lora-16-64"] == NOT_MEASURED


def test_half_the_parameters(tmp_path: Path) -> None:
    write_run(tmp_path, "coarse", "hificl", FULL, 0, 0.5, trainable_parameters=1251)
    write_run(tmp_path, "coarse", "lora-8", FULL, 0, 0.5)
    assert statuses(frame.load(tmp_path))["d-lora-8"] == goals.NOT_SHOWN
    write_run(tmp_path, "coarse", "hificl", FULL, 0, 0.5, trainable_parameters=1250)
    assert statuses(frame.load(tmp_path))["d-lora-8"] == goals.SHOWN


def test_training_time_of_teachers(tmp_path: Path) -> None:
    for method, seconds in (("hificl", 2), ("mimic", 8), ("live", 4)):
        write_run(tmp_path, "coarse", method, FULL, 0, 0.5, training_seconds=seconds)
    found = frame.load(tmp_path)
    assert found.training_ratio("mimic") == pytest.approx(4)
    # on another machine, with no run of the other method there
    write_run(tmp_path, "coarse", "mimic", FULL, 1, 0.5, training_seconds=100, vector="AVX512")
    write_run(tmp_path, "coarse", "hificl", FULL, 1, 0.5, training_seconds=2)
    found = frame.load(tmp_path)
    assert found.training_ratio("mimic") == pytest.approx(4)
    assert (statuses(found)["f-mimic"], statuses(found)["f-live"]) == (goals.SHOWN, goals.NOT_SHOWN)
    # a step that was timed side by side decides over the runs
    rows = [{"method": "mimic", "step_over_hificl": 1.5}]
    (tmp_path / "costs.json").write_text(json.dumps({"rows": rows}))
    assert statuses(frame.load(tmp_path))["f-mimic"] == goals.NOT_SHOWN
