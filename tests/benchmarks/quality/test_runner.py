"""The grid of the quality benchmark, and how it is worked through."""

import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from benchmarks.common import environment
from benchmarks.quality import costs, frame, plan, runner
from benchmarks.quality.__main__ import main
from benchmarks.quality.encoding import encoded_task
from benchmarks.quality.methods import METHODS, SHOTS, STARTS, TRIALS
from benchmarks.quality.plan import SEEDS, SIZES, TRAINED, TRIAL_SEEDS, Job, jobs, sweep, trials
from benchmarks.quality.store import Store
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


def store_of(folder, records):
    """A store with these records, which need no more than what is read of them."""
    store = Store(folder, TASKS)
    for job, record in records.items():
        store.add(job, key_of(job) | record)
    return store


def key_of(job):
    return {"task": job.task, "method": job.method, "samples": job.samples, "seed": job.seed, "rate": job.rate}


def swept(scores_by_job):
    return {job: {"validation": {"score": score}} for job, score in scores_by_job.items()}


# -- plan --------------------------------------------------------------------------------------------------------------


def test_no_job_is_there_twice():
    grid = list(jobs())
    assert len(set(grid)) == len(grid)
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
    assert not set(plan.START_SEEDS) & set(SEEDS)
    assert {job.seed for job in jobs() if job.sweeps} == set(TRIAL_SEEDS) < set(plan.START_SEEDS)
    assert {job.seed for job in trials()} == set(plan.START_SEEDS)
    assert {job.seed for job in trials() if job.method in plan.TRIED} == set(TRIAL_SEEDS)
    assert {job.seed for job in jobs() if not job.sweeps} == set(SEEDS)


def test_every_method_is_swept_by_as_many_seeds_but_the_slow_ones():
    swept = Counter((job.samples, job.task, job.method, job.rate) for job in jobs() if job.sweeps)
    for (samples, task, method, _), times in swept.items():
        assert times == (
            1 if method in plan.SLOW or (samples == 1000 and task not in plan.HARD_TASKS) else len(TRIAL_SEEDS)
        )


def test_trials_are_sweeps_that_choose_no_rate():
    tried = list(trials())
    assert all(job.sweeps for job in tried)
    assert {job.method for job in tried} == {*plan.TRIED, *plan.STARTED}
    assert set(TRIALS) < set(plan.TRIED) and set(STARTS) < set(plan.STARTED)
    assert {len(set(method.rates)) for method in (TRIALS | STARTS).values()} == {4}
    chooses = {job for job in jobs() if job.sweeps}
    assert {job.kind for job in chooses} == {"sweeps"}
    assert {job.kind for job in jobs() if not job.sweeps} == {"runs"}
    kinds = Counter()
    for job in tried:
        assert (job in chooses) == (job.kind == "sweeps")
        kinds[job.method, job.samples, job.kind] += 1
    assert kinds["hificl", 1000, "sweeps"] == kinds["hificl-keys-0.1", 1000, "trials"] == 3 * len(TRIAL_SEEDS) * 4
    assert kinds["lora-8", 64, "sweeps"] == kinds["hificl-alpha-1", 64, "trials"] == 6 * len(TRIAL_SEEDS) * 4


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


def test_a_sweep_is_measured_on_validation_data_and_never_sees_test_data(task, quick, monkeypatch):
    monkeypatch.setattr(runner, "encoded_task", lambda name: {s: of for s, of in task.items() if s != "test"})
    for method in ("lora-8", "hificl", "mimic"):
        job = Job("convention", method, 64, TRIAL_SEEDS[0], 0.01)
        record = runner.perform(job, job.rate)
        assert Job.of(record) == job
        assert 0 <= record["validation"]["score"] <= 1
        assert "test" not in record
        assert (record["rate"], record["seed"], record["steps"], record["batch"]) == (0.01, TRIAL_SEEDS[0], 3, 16)


def test_a_run_takes_the_rate_that_is_best_on_validation(quick, tmp_path):
    # On validation data, and what a test would have said.
    scores = {1e-3: (0.5, 0.0), 3e-3: (0.7, 0.1), 1e-2: (0.6, 0.9), 3e-2: (0.2, 1.0)}
    records = {rate: {"validation": {"score": v}, "test": {"score": t}} for rate, (v, t) in scores.items()}
    store = store_of(tmp_path, {job: records[job.rate] for job in sweep("convention", "lora-8", 64)})
    for samples in (16, 64):
        job = Job("convention", "lora-8", samples, 0)
        assert runner.rate_of(job, store) == 3e-3
        record = runner.perform(job, 3e-3)
        assert Job.of(record) == job
        assert record["rate"] == 3e-3
        assert "validation" not in record
        assert record["trainable_parameters"] == 43008
        assert record["training_seconds"] > 0


def test_a_rate_is_chosen_by_its_mean_over_seeds(tmp_path):
    scores = {1e-3: (0.9, 0.1), 3e-3: (0.5, 0.6), 1e-2: (0.4, 0.6), 3e-2: (0.0, 0.99)}
    of = {job: scores[job.rate][TRIAL_SEEDS.index(job.seed)] for job in sweep("coarse", "lora-8", 64)}
    assert runner.rate_of(Job("coarse", "lora-8", 16, 0), store_of(tmp_path, swept(of))) == 3e-3


def test_of_equal_rates_the_lower_is_chosen(tmp_path):
    low = METHODS["ia3"].rates[0]
    scores = {}
    for job in sweep("coarse", "ia3", 64):
        first = job.seed == TRIAL_SEEDS[0]
        scores[job] = 0.816 if job.rate == low else 0.82 if first else 0.812  # the same mean, but not to the last bit
    assert runner.rate_of(Job("coarse", "ia3", 64, 3), store_of(tmp_path, swept(scores))) == low


def test_a_run_is_done_again_where_a_longer_grid_chooses_another_rate(tmp_path):
    job = Job("coarse", "ia3", 64, 3)
    low, *_, high = of = sweep("coarse", "ia3", 64)
    store = store_of(tmp_path, {job: {"rate": low.rate}} | swept(dict.fromkeys(of[:-1], 0.5)))
    assert not runner.is_done(job, store)  # nobody knows yet
    for score, done in ((0.4, True), (0.6, False)):
        store.add(high, key_of(high) | {"validation": {"score": score}})
        assert runner.is_done(job, store) == done
    store.add(job, key_of(job) | {"rate": high.rate})
    assert runner.is_done(job, store)
    assert runner.is_done(job, Store(tmp_path, ["coarse"]))  # of two lines for a job the later one holds


def test_ranks_take_the_rate_of_hificl(tmp_path):
    scores = dict(zip(sweep("captions", "hificl", 1000), 2 * (0.1, 0.2, 0.3, 0.4), strict=True))
    store = store_of(tmp_path, swept(scores))
    assert runner.rate_of(Job("captions", "hificl-r4", 1000, 0), store) == METHODS["hificl"].rates[-1]
    assert runner.rate_of(Job("captions", "icl-8", 1000, 0), store) is None


def test_a_sweep_that_diverges_scores_nothing(quick, monkeypatch):
    monkeypatch.setitem(STEPS, 64, 10)
    job = Job("convention", "lora-8", 64, TRIAL_SEEDS[0], 1e30)
    record = runner.perform(job, job.rate)
    assert Job.of(record) == job
    assert record["validation"] == {"score": 0.0}
    assert "too high" in record["diverged"]


def test_prompting_shows_training_samples_and_the_seed_draws_them(task, quick, monkeypatch):
    shown = []
    monkeypatch.setattr(runner, "measure", lambda *args: shown.append(args[3:]) or {"score": 0.5})
    for seed in (0, 0, 1):
        runner.perform(Job("convention", "icl-4", 1000, seed), None)
    runner.perform(Job("convention", "zero-shot", 0, 0), None)
    *prompted, (split, none) = shown
    assert (split, none) == ("test", None)
    first, again, other = (of for _, of in prompted)
    assert first == again != other
    assert len(first) == SMALL_SIZES["test"]
    assert all(len(set(of)) == 4 and {s for s, _ in of} == {"train"} for of in first)


def test_the_same_job_gives_the_same_record(quick):
    job = Job("convention", "hificl", 64, TRIAL_SEEDS[0], 0.01)
    records = [runner.perform(job, job.rate) | {"training_seconds": None} for _ in range(2)]
    assert records[0] == records[1]


def test_hardware_is_noted_once(tmp_path, monkeypatch):
    path = tmp_path / "environment.json"
    for cores in (2, 2, 4, 2):
        monkeypatch.setattr(environment, "environment", lambda cores=cores: {"cores": cores})
        environment.note_environment(path)
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


@pytest.fixture
def performed(monkeypatch):
    """The jobs in the order in which they were performed; none of them takes any time."""
    done = []

    def perform(job, rate):
        done.append(job)
        return key_of(job) | {"rate": rate, "validation" if job.sweeps else "test": {"score": 0.5}}

    monkeypatch.setattr(runner, "perform", perform)
    return done


PROMPTED = [Job("convention", "icl-1", 1000, seed) for seed in SEEDS]


def test_what_is_there_is_not_done_again(quick, tmp_path):
    grid = [PROMPTED[0], *sweep("convention", "lora-8", 64), Job("convention", "lora-8", 64, 0)]
    runner.run(grid, tmp_path, 1)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["convention.jsonl"] * 2 + ["environment.json"]
    assert all(job in Store(tmp_path, ["convention"]) for job in grid)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    runner.run(grid, tmp_path, 1)
    assert written == {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    # Of what is lost, the same is written again.
    path = tmp_path / "runs" / "convention.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(rest)
    runner.run(grid, tmp_path, 1)
    assert path.read_bytes() == rest + first + b"\n"


@pytest.mark.parametrize("left", [1, 40, -1], ids=["its first byte", "a part", "all but its end"])
def test_a_torn_last_line_is_dropped_and_its_job_done_again(left, quick, tmp_path, performed):
    runner.run(PROMPTED, tmp_path, 1)
    path = tmp_path / "runs" / "convention.jsonl"
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    torn = whole[start:][:left]
    path.write_bytes(whole[:start] + torn)
    assert frame.load(tmp_path).unusable == ["runs/convention.jsonl: the last line, which was written in part"]
    performed.clear()
    with pytest.warns(UserWarning, match="convention.jsonl: dropped the last line, which was written in part"):
        runner.run(PROMPTED, tmp_path, 1)
    assert performed == PROMPTED[-1:]
    assert path.read_bytes() == whole


def test_a_torn_line_of_another_task_is_left_to_whoever_writes_it(quick, tmp_path, performed):
    other = tmp_path / "runs" / "coarse.jsonl"
    other.parent.mkdir()
    other.write_bytes(b'{"task": "coa')
    runner.run(PROMPTED, tmp_path, 1)
    assert other.read_bytes() == b'{"task": "coa'


def test_a_run_goes_on_where_it_broke_off(quick, tmp_path, performed, monkeypatch):
    perform, broken = runner.perform, [PROMPTED[2]]

    def fails_once(job, rate):
        if job in broken:
            raise MemoryError
        return perform(job, rate)

    monkeypatch.setattr(runner, "perform", fails_once)
    with pytest.raises(MemoryError):
        runner.run(PROMPTED, tmp_path, 1)
    assert performed == PROMPTED[:2]
    broken.clear()
    runner.run(PROMPTED, tmp_path, 1)
    assert performed == PROMPTED


def test_what_runs_beside_a_job_that_fails_is_kept(quick, tmp_path, performed, monkeypatch):
    perform, failed = runner.perform, Event()

    def one_fails(job, rate):
        if job == PROMPTED[0]:
            failed.set()
            raise MemoryError
        failed.wait()
        time.sleep(0.2)
        return perform(job, rate)

    monkeypatch.setattr(runner, "perform", one_fails)
    with pytest.raises(MemoryError):
        runner.run(PROMPTED[:2], tmp_path, 2)
    assert PROMPTED[1] in Store(tmp_path, ["convention"])


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_are_done_in_their_order_but_for_those_that_wait(quick, tmp_path, performed, processes):
    run, free = Job("coarse", "lora-8", 64, 0), Job("coarse", "zero-shot", 0, 0)
    rates = sweep("coarse", "lora-8", 64)
    runner.run([run, *rates, free], tmp_path, processes)
    assert set(performed) == {run, *rates, free}
    assert performed.index(run) > max(map(performed.index, rates))
    assert processes > 1 or performed == [*rates, run, free]


def test_a_run_whose_sweep_is_nowhere_is_refused(quick, tmp_path):
    with pytest.raises(ValueError, match="hificl-r4 waits for the sweep of a method that is not among the jobs"):
        runner.run([Job("coarse", "zero-shot", 0, 0), Job("coarse", "hificl-r4", 1000, 0)], tmp_path, 1)


@pytest.mark.slow
def test_two_processes_give_the_same_as_one(tmp_path):
    grid = [Job("coarse", "zero-shot", 0, 0), Job("coarse", "icl-1", 1000, 0)]
    stores = []
    for processes in (1, 2):
        runner.run(grid, tmp_path / str(processes), processes)
        stores.append(Store(tmp_path / str(processes), ["coarse"]))
    for job in grid:
        assert stores[0][job] == stores[1][job]
