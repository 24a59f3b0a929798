"""The grid of the quality benchmark, and how it is worked through."""

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.quality import costs, plan, runner
from benchmarks.quality.__main__ import main
from benchmarks.quality.encoding import encoded_task
from benchmarks.quality.methods import METHODS, SHOTS, TRIALS
from benchmarks.quality.plan import SEEDS, SIZES, TRAINED, TRIAL_SEEDS, Job, jobs, sweep, trials
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import STEPS

from .helpers import SMALL_SIZES, small_tasks


@pytest.fixture(scope="module")
def task():
    with small_tasks():
        yield encoded_task("convention")


@pytest.fixture
def quick(task, monkeypatch):
    """Few steps, on a task of few examples, in threads; metrics and seeds are a process's, so one where they matter."""
    for size in SIZES:
        monkeypatch.setitem(STEPS, size, 3)
    monkeypatch.setattr(runner, "encoded_task", lambda name: task)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda processes, *_: ThreadPoolExecutor(processes))


def read(job, results):
    return json.loads(job.path(results).read_text())


# -- plan --------------------------------------------------------------------------------------------------------------


def test_no_job_is_there_twice():
    grid = list(jobs())
    assert len(set(grid)) == len(grid) == len({job.path(plan.Path("x")) for job in grid})
    assert all(job.cost > 0 for job in grid)


def test_every_method_has_its_runs():
    runs = Counter((job.method, job.samples) for job in jobs() if not job.sweeps)
    seeds = len(SEEDS)
    assert seeds >= 5
    expected = {("zero-shot", 0): len(TASKS)}
    expected |= {(method, 1000): len(TASKS) * seeds for method in (*(f"icl-{k}" for k in SHOTS), "task-vector")}
    expected |= {(method, size): len(TASKS) * seeds for method, sizes in TRAINED.items() for size in sizes}
    expected |= {(method, 1000): len(plan.HARD_TASKS) * seeds for method in plan.MATCHED}
    assert runs == expected
    assert {method for method, _ in runs} == set(METHODS)


def test_every_method_that_is_trained_may_try_as_many_rates():
    trained = {name: method.rates for name, method in METHODS.items() if method.attach}
    assert set(trained) == set(TRAINED) | set(plan.MATCHED)
    assert {len(set(rates)) for rates in trained.values()} == {4}
    assert all(list(rates) == sorted(rates) for rates in trained.values())  # of two equal ones, the lower is chosen
    assert not any(method.rates for method in METHODS.values() if not method.attach)


def test_a_run_comes_after_the_sweep_that_it_waits_for():
    seen = set()
    for job in jobs():
        assert set(job.waits_for) <= seen
        assert bool(job.waits_for) == (not job.sweeps and METHODS[job.method].attach is not None)
        assert all(of.sweeps and of.task == job.task for of in job.waits_for)
        seen.add(job)


def test_sweeps_and_trials_draw_samples_of_their_own():
    assert not set(TRIAL_SEEDS) & set(SEEDS)
    assert {job.seed for job in (*jobs(), *trials()) if job.sweeps} == set(TRIAL_SEEDS)
    assert {job.seed for job in jobs() if not job.sweeps} == set(SEEDS)


def test_every_method_is_swept_by_as_many_seeds_but_the_slow_ones():
    swept = Counter((job.samples, job.task, job.method, job.rate) for job in jobs() if job.sweeps)
    for (samples, task, method, _), times in swept.items():
        assert times == (
            1 if method in plan.SLOW or (samples == 1000 and task not in plan.HARD_TASKS) else len(TRIAL_SEEDS)
        )


def test_trials_are_sweeps_that_choose_no_rate(tmp_path):
    tried = list(trials())
    assert all(job.sweeps for job in tried)
    assert {job.method for job in tried} == set(plan.TRIED) > set(TRIALS)
    assert {len(set(method.rates)) for method in TRIALS.values()} == {4}
    chooses = {job.path(tmp_path) for job in jobs() if job.sweeps}
    folders = Counter()
    for job in tried:
        folder = job.path(tmp_path).parts[-3]
        assert (job.path(tmp_path) in chooses) == (folder == "sweeps")
        folders[job.method, job.samples, folder] += 1
    assert folders["hificl", 1000, "sweeps"] == folders["hificl-keys-0.1", 1000, "trials"] == 3 * len(TRIAL_SEEDS) * 4
    assert folders["lora-8", 64, "sweeps"] == folders["hificl-alpha-1", 64, "trials"] == 6 * len(TRIAL_SEEDS) * 4


def test_a_part_of_the_tasks_is_that_part_of_the_grid():
    assert set(jobs(("coarse", "captions"))) == {job for job in jobs() if job.task in ("coarse", "captions")}


@pytest.mark.parametrize("arguments", [["trials", "--methods", "prefix"], ["run", "--methods", "hificl-keys-0.1"]])
def test_a_command_with_nothing_to_do_is_refused(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quality", *arguments, "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert f"none of these is among the {arguments[0]}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- one job -----------------------------------------------------------------------------------------------------------


def test_a_sweep_is_measured_on_validation_data_and_never_sees_test_data(task, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "encoded_task", lambda name: {s: of for s, of in task.items() if s != "test"})
    for method in ("lora-8", "hificl", "mimic"):
        job = Job("convention", method, 64, TRIAL_SEEDS[0], 0.01)
        runner.perform(job, tmp_path)
        record = read(job, tmp_path)
        assert 0 <= record["validation"]["score"] <= 1
        assert "test" not in record
        assert (record["rate"], record["seed"], record["steps"], record["batch"]) == (0.01, TRIAL_SEEDS[0], 3, 16)


def test_a_run_takes_the_rate_that_is_best_on_validation(quick, tmp_path):
    # On validation data, and what a test would have said.
    scores = {1e-3: (0.5, 0.0), 3e-3: (0.7, 0.1), 1e-2: (0.6, 0.9), 3e-2: (0.2, 1.0)}
    for job in sweep("convention", "lora-8", 64):
        validation, test = scores[job.rate]
        runner.write(job.path(tmp_path), {"validation": {"score": validation}, "test": {"score": test}})
    for samples in (16, 64):
        job = Job("convention", "lora-8", samples, 0)
        assert runner.chosen_rate(job, tmp_path) == 3e-3
        runner.perform(job, tmp_path)
        record = read(job, tmp_path)
        assert record["rate"] == 3e-3
        assert "validation" not in record
        assert record["trainable_parameters"] == 43008
        assert record["training_seconds"] > 0


def test_a_rate_is_chosen_by_its_mean_over_seeds(tmp_path):
    scores = {1e-3: (0.9, 0.1), 3e-3: (0.5, 0.6), 1e-2: (0.4, 0.6), 3e-2: (0.0, 0.99)}
    for job in sweep("coarse", "lora-8", 64):
        score = dict(zip(TRIAL_SEEDS, scores[job.rate], strict=True))[job.seed]
        runner.write(job.path(tmp_path), {"validation": {"score": score}})
    assert runner.chosen_rate(Job("coarse", "lora-8", 16, 0), tmp_path) == 3e-3


def test_of_equal_rates_the_lower_is_chosen(tmp_path):
    low = METHODS["ia3"].rates[0]
    for job in sweep("coarse", "ia3", 64):
        first = job.seed == TRIAL_SEEDS[0]
        score = 0.816 if job.rate == low else 0.82 if first else 0.812  # the same mean, but not to the last bit
        runner.write(job.path(tmp_path), {"validation": {"score": score}})
    assert runner.chosen_rate(Job("coarse", "ia3", 64, 3), tmp_path) == METHODS["ia3"].rates[0]


def test_a_run_is_done_again_where_a_longer_grid_chooses_another_rate(tmp_path):
    job = Job("coarse", "ia3", 64, 3)
    low, *_, high = of = sweep("coarse", "ia3", 64)
    for each in of[:-1]:
        runner.write(each.path(tmp_path), {"validation": {"score": 0.5}})
    runner.write(job.path(tmp_path), {"rate": low.rate})
    assert not runner.is_done(job, tmp_path)  # nobody knows yet
    runner.write(high.path(tmp_path), {"validation": {"score": 0.4}})
    assert runner.is_done(job, tmp_path)
    runner.write(high.path(tmp_path), {"validation": {"score": 0.6}})
    assert not runner.is_done(job, tmp_path)


def test_ranks_take_the_rate_of_hificl(tmp_path):
    for job, score in zip(sweep("captions", "hificl", 1000), 2 * (0.1, 0.2, 0.3, 0.4), strict=True):
        runner.write(job.path(tmp_path), {"validation": {"score": score}})
    assert runner.chosen_rate(Job("captions", "hificl-r4", 1000, 0), tmp_path) == METHODS["hificl"].rates[-1]
    assert runner.chosen_rate(Job("captions", "icl-8", 1000, 0), tmp_path) is None


def test_a_sweep_that_diverges_scores_nothing(quick, tmp_path, monkeypatch):
    monkeypatch.setitem(STEPS, 64, 10)
    job = Job("convention", "lora-8", 64, TRIAL_SEEDS[0], 1e30)
    runner.perform(job, tmp_path)
    record = read(job, tmp_path)
    assert record["validation"] == {"score": 0.0}
    assert "too high" in record["diverged"]


def test_prompting_shows_training_samples_and_the_seed_draws_them(task, quick, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(runner, "measure", lambda *args: shown.append(args[3:]) or {"score": 0.5})
    for seed in (0, 0, 1):
        runner.perform(Job("convention", "icl-4", 1000, seed), tmp_path)
    runner.perform(Job("convention", "zero-shot", 0, 0), tmp_path)
    *prompted, (split, none) = shown
    assert (split, none) == ("test", None)
    first, again, other = (of for _, of in prompted)
    assert first == again != other
    assert len(first) == SMALL_SIZES["test"]
    assert all(len(set(of)) == 4 and {s for s, _ in of} == {"train"} for of in first)


def test_the_same_job_gives_the_same_record(quick, tmp_path):
    job = Job("convention", "hificl", 64, TRIAL_SEEDS[0], 0.01)
    records = []
    for name in ("a", "b"):
        runner.perform(job, tmp_path / name)
        records.append(read(job, tmp_path / name))
        del records[-1]["training_seconds"]
    assert records[0] == records[1]


def test_hardware_is_noted_once(tmp_path, monkeypatch):
    path = tmp_path / "environment.json"
    for cores in (2, 2, 4, 2):
        monkeypatch.setattr(runner, "environment", lambda cores=cores: {"cores": cores})
        runner.note_environment(path)
    assert json.loads(path.read_text()) == [{"cores": 2}, {"cores": 4}]


def test_costs_of_every_kind_of_method(task, monkeypatch):
    monkeypatch.setattr(costs, "encoded_task", lambda name: task)
    monkeypatch.setattr(costs, "QUERIES", 2)
    monkeypatch.setattr(costs, "SECONDS", 0.5)
    monkeypatch.setattr(costs, "TRAINED", ("hificl", "lora-8", "prefix-demos", "mimic"))
    monkeypatch.setattr(costs, "PROMPTED", ("zero-shot", "icl-1"))
    rows = {row["method"]: row for row in costs.measure()["rows"]}
    assert set(rows) == {*costs.TRAINED, *costs.PROMPTED}
    assert {name: row["trainable_parameters"] for name, row in rows.items()} == {
        "hificl": 15360, "lora-8": 43008, "prefix-demos": 15360, "mimic": 1560, "zero-shot": 0, "icl-1": 0,
    }  # fmt: skip
    for name, row in rows.items():
        assert ("step_seconds" in row) == (name in costs.TRAINED)
        assert row["query_seconds"] > 0 and row["query_flops"] > 0
    assert rows["mimic"]["step_flops"] > 2 * rows["hificl"]["step_flops"]
    assert rows["icl-1"]["query_flops"] > rows["zero-shot"]["query_flops"]


# -- all of them -------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_done_again(quick, tmp_path):
    prompted = [Job("convention", "zero-shot", 0, 0), Job("convention", "icl-1", 1000, 0)]
    grid = [*prompted, *sweep("convention", "lora-8", 64), Job("convention", "lora-8", 64, 0)]
    runner.run(grid, tmp_path, 1)
    paths = [job.path(tmp_path) for job in grid]
    assert all(path.exists() for path in paths)
    assert not list(tmp_path.rglob("*.part"))
    written = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    paths[1].unlink()
    runner.run(grid, tmp_path, 1)
    for path in paths:
        content, time = written[path]
        assert (path.stat().st_mtime_ns != time) == (path == paths[1])
        assert path.read_bytes() == content  # the one done again gives the same answers


def test_a_run_goes_on_where_it_broke_off(quick, tmp_path, monkeypatch):
    grid = [Job("convention", "icl-1", 1000, seed) for seed in SEEDS]
    done, broken = [], [grid[2]]

    def perform(job, results):
        if job in broken:
            raise MemoryError
        done.append(job)
        runner.write(job.path(results), {})

    monkeypatch.setattr(runner, "perform", perform)
    with pytest.raises(MemoryError):
        runner.run(grid, tmp_path, 1)
    assert done == grid[:2]
    broken.clear()
    runner.run(grid, tmp_path, 1)
    assert done == grid


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_are_done_in_their_order_but_for_those_that_wait(quick, tmp_path, monkeypatch, processes):
    run, free = Job("coarse", "lora-8", 64, 0), Job("coarse", "zero-shot", 0, 0)
    rates = sweep("coarse", "lora-8", 64)
    done = []

    def perform(job, results):
        assert all(of.path(results).exists() for of in job.waits_for)
        done.append(job)
        runner.write(job.path(results), {})

    monkeypatch.setattr(runner, "perform", perform)
    runner.run([run, *rates, free], tmp_path, processes)
    assert set(done) == {run, *rates, free}
    assert processes > 1 or done == [*rates, run, free]


def test_a_run_whose_sweep_is_nowhere_is_refused(quick, tmp_path):
    with pytest.raises(ValueError, match="hificl-r4 waits for the sweep of a method that is not among the jobs"):
        runner.run([Job("coarse", "zero-shot", 0, 0), Job("coarse", "hificl-r4", 1000, 0)], tmp_path, 1)


@pytest.mark.slow
def test_two_processes_give_the_same_as_one(tmp_path):
    grid = [Job("coarse", "zero-shot", 0, 0), Job("coarse", "icl-1", 1000, 0)]
    runner.run(grid, tmp_path / "two", 2)
    runner.run(grid, tmp_path / "one", 1)
    for job in grid:
        assert read(job, tmp_path / "one") == read(job, tmp_path / "two")
