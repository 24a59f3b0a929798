"""One command a row: trained, measured, resumed after a kill, and recorded once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as Picture
from PIL import Image
from safetensors.torch import load_file

from benchmarks.lmm import __main__, answering, memory, recipe, report, runner, training
from benchmarks.lmm.runner import Job, best_rate
from benchmarks.speed.measure import peak_bytes

from . import tiny

JOB = Job("m", "vqav2", "lora-2", 8, 8, 8, 4, 2, 0, "validation", 4, "float32", "official files", 0.1)


def command(root, folder, name, task, method, *more):
    return [
        "run", "--model", str(root / name), "--task", task, "--method", method, "--data", str(root / "data"),
        "--samples", "8", "--validation-samples", "4", "--dtype", "float32", "--limit", "8", "--workers", "0",
        "--results", str(folder / "results"), "--work", str(folder / "work"), "--epochs", "2", *more,
    ]  # fmt: skip


@pytest.fixture
def call(root, tmp_path, load, monkeypatch):
    def run(*args, folder=tmp_path):
        monkeypatch.setattr(sys, "argv", ["lmm", *command(root, folder, *args)])
        __main__.main()
        return [json.loads(line) for line in (folder / "results" / runner.RUNS).read_text().splitlines()]

    return run


@pytest.mark.parametrize("method", ["zero-shot", "2-shot", "hificl-paper"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_row_of_each_model(name, method, call):
    (record,) = call(name, "vqav2", method)
    assert Job.of(record).method == method and record["questions"] == 6 and 0 <= record["vqa_accuracy"] <= 1
    assert record["recipe"]["beams"] == (1 if name == "idefics2" else 3)
    assert {"peft-hificl", "accelerate", "transformers"} <= record["versions"].keys() and record["hardware"]
    assert len(record["git"]["commit"]) == 40 and record["command"].startswith("python")
    if method == "hificl-paper":
        assert record["rate"] == (5e-4 if name == "qwen3_vl" else 5e-3) and record["steps"] == 4
        assert record["adapter"]["skip_first_token"] is False and record["parameters"] > 0
    else:
        assert record["rate"] is None and "steps" not in record


def test_a_rate_is_chosen_on_validation_data_and_nothing_is_done_twice(call, tmp_path, capsys, monkeypatch):
    records = call("llava", "okvqa", "hificl", "--rates", "0.01", "0.3", "--n", "4", "--r", "2")
    assert [(r["split"], r["questions"], r["rate"]) for r in records[:2]] == [
        ("validation", 4, 0.01), ("validation", 4, 0.3),
    ]  # fmt: skip
    jobs = {Job.of(record): record for record in records}
    assert records[2]["split"] == "test" and records[2]["rate"] == best_rate(jobs, list(jobs)[:2])
    assert records[2]["losses"] == next(r for r in records[:2] if r["rate"] == records[2]["rate"])["losses"]
    assert all(record["adapter"]["skip_first_token"] for record in records)
    monkeypatch.setattr(runner, "perform", None)
    assert call("llava", "okvqa", "hificl", "--rates", "0.01", "0.3", "--n", "4", "--r", "2") == records
    assert "hificl: " in capsys.readouterr().out
    written = report.write(tmp_path / "results").read_text()
    assert "**OK-VQA, accuracy: " in written and "| hificl | 4, 2 |" in written and "not measured here" in written


def test_training_learns(call):
    """Four answers to one question, told apart by the picture's color or by nothing: the loss falls."""
    record = call("llava", "vqav2", "hificl-paper", "--rates", "0.1", "--epochs", "40")[-1]
    assert record["steps"] == 80 and record["losses"][-1] < 0.5 * record["losses"][0]


def test_recomputed_activations_change_nothing_in_half_precision(call, tmp_path):
    row = ("qwen3_vl", "coco", "hificl", "--dtype", "bfloat16", "--rates", "0.01", "--n", "4")
    kept, recomputed = (call(*row, *more, folder=tmp_path / "".join(more))[0] for more in ((), ("--checkpointing",)))
    assert kept["losses"] == recomputed["losses"] and len(set(kept["losses"])) > 1


def test_other_validation_samples_leave_others_to_train_on(call):
    first, second = (call("llava", "vqav2", "hificl-paper", "--validation-samples", n)[-1] for n in ("4", "2"))
    assert (first["held"], second["held"]) == (4, 2) and first["losses"] != second["losses"]


def test_a_hubs_splits_are_rows_of_their_own(call, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    for split, number in (("train", 30), ("validation", 5), ("test", 6)):
        rows = {
            "image": [Image.new("RGB", (9, 9), (n, 0, 0)) for n in range(number)],
            "question": ["What?"] * number,
            "answers": [["x", "y"]] * number,
        }
        features = Features({"image": Picture(), "question": Value("string"), "answers": Sequence(Value("string"))})
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub" / f"{split}.parquet")
    hub = ("llava", "vqav2", "1-shot", "--hub", str(tmp_path / "hub"))
    call(*hub)
    records = call(*hub, "--hub-splits", "train", "test")
    assert [record["questions"] for record in records] == [5, 6]
    assert [record["data"].split()[1:] for record in records] == [["train", "validation"], ["train", "test"]]


def test_one_process_trains_on_one_card(call, monkeypatch):
    """Where there are two, the batch stays the paper's."""
    original = training.TrainingArguments.__post_init__

    def of_two(self):
        original(self)
        self._n_gpu = 2

    monkeypatch.setattr(training.TrainingArguments, "__post_init__", of_two)
    assert call("llava", "vqav2", "hificl-paper")[0]["steps"] == 4


class KilledError(Exception):
    pass


def test_a_killed_training_goes_on_from_its_checkpoint(call, tmp_path, monkeypatch):
    """To the very adapter that an uninterrupted one gives."""
    row = ("llava", "vqav2", "lora-2", "--rates", "0.01", "--epochs", "4", "--save-steps", "3")
    whole = call(*row, folder=tmp_path / "whole")
    original, seen = training._Bar.on_step_end, []

    def kill(self, args, state, control, **kwargs):
        seen.append(state.global_step)
        if len(seen) == 5:
            raise KilledError
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(training._Bar, "on_step_end", kill)
    with pytest.raises(KilledError):
        call(*row)
    (work,) = (tmp_path / "work").iterdir()
    torn = work / "checkpoint-4"  # a later one that was not written to its end
    torn.mkdir()
    found = call(*row)
    assert seen == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert not list(work.glob("checkpoint-*"))
    for key in ("vqa_accuracy", "steps", "parameters"):
        assert found[0][key] == whole[0][key]
    weights = [next((tmp_path / part).rglob("adapter_model.safetensors")) for part in ("work", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_answers_that_are_there_are_not_asked_for_again(call, tmp_path, monkeypatch):
    row = ("idefics2", "coco", "1-shot", "--eval-batch", "2")
    whole = call(*row, folder=tmp_path / "whole")
    original, asked = answering.generate, []

    def kill(model, encoder, samples, shown):
        if len(asked) == 2:
            asked.append([])
            raise KilledError
        asked.append([sample.name for sample in samples])
        return original(model, encoder, samples, shown)

    monkeypatch.setattr(answering, "generate", kill)
    with pytest.raises(KilledError):
        call(*row)
    (file,) = (tmp_path / "work").rglob("test-6.jsonl")
    lines = file.read_bytes()
    file.write_bytes(lines[:-9])
    found = call(*row)
    assert [len(names) for names in asked] == [2, 2, 0, 2, 1] and asked[3][0] == asked[1][1]
    assert found[0]["cider"] == whole[0]["cider"]
    assert file.read_text() == next((tmp_path / "whole").rglob("test-6.jsonl")).read_text()


def test_a_rate_that_diverges_scores_nothing(call):
    (record,) = call("llava", "vqav2", "lora-2", "--rates", "1e30", "--epochs", "8")
    assert record["vqa_accuracy"] == 0 and "too high" in record["diverged"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--method", "lora"), "No method 'lora'"),
        (("--method", "hificl", "--n", "9"), "hificl reads 9 demonstrations, and there are 8 samples"),
        (("--method", "hificl", "--limit", "4"), "hificl reads 8 demonstrations, and there are 4 samples"),
        (("--method", "9-shot"), "9-shot reads 9 demonstrations, and there are 8 samples"),
        (("--data", "nowhere"), "There is no nowhere/v2_OpenEnded"),
        (("--samples", "16", "--limit", "16"), "are to be trained on"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(change, message, call, capsys, monkeypatch):
    monkeypatch.setattr(runner, "load_model", None)
    with pytest.raises(SystemExit):
        call("llava", "vqav2", "zero-shot", *change)
    assert message in capsys.readouterr().err


def test_the_best_rate_is_the_lower_of_equals():
    sweep = [replace(JOB, rate=rate) for rate in (0.3, 0.1, 0.2)]
    done = {job: {"vqa_accuracy": score} for job, score in zip(sweep, (0.5, 0.7, 0.7), strict=True)}
    assert best_rate(done, sweep) == 0.1


def test_the_batch_is_the_papers_on_any_number_of_processes():
    assert [recipe.split_batch(n) for n in (1, 2, 4)] == [(2, 2), (2, 1), (1, 1)]
    with pytest.raises(ValueError, match="A batch of 4 cannot be shared among 3"):
        recipe.split_batch(3)


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(root, tmp_path):
    row = ["vqav2", "hificl-paper", "--rates", "0.05"]
    root_of_code = Path(__file__).parents[3]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root_of_code)}
    # As `accelerate launch` starts processes on GPUs; on CPUs it starts only one.
    launch = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1", "--standalone"]
    for number, folder in (("1", "one"), ("2", "two")):
        words = [
            *launch,
            "--nproc-per-node",
            number,
            "-m",
            "benchmarks.lmm",
            *command(root, tmp_path / folder, "llava", *row),
        ]
        done = subprocess.run(words, cwd=root_of_code, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f / "results" / runner.RUNS).read_text()) for f in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and one["steps"] == two["steps"] == 4
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
    weights = [load_file(next((tmp_path / f).rglob("adapter_model.safetensors"))) for f in ("one", "two")]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-2, atol=1e-3)
    said = [next((tmp_path / f).rglob("test-6.jsonl")).read_text() for f in ("one", "two")]
    assert said[0] == said[1]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_formulas():
    """HiFICL 2 H r (n + d) a layer; LoRA r (in + out) a projection."""
    layers, heads, dim, hidden = 32, 32, 128, 4096
    hificl, lora = memory.compute("LLaVA-Interleave-Qwen-7B")
    assert hificl["trained"] == layers * 2 * heads * 8 * (8 + dim)
    assert lora["trained"] == layers * 4 * 16 * 2 * hidden
    assert hificl["state_bytes"] == 16 * hificl["trained"] and hificl["weights_bytes"] == 2 * hificl["parameters"]
    assert hificl["cache_bytes"] == 8 * 3 * layers * 2 * heads * dim * 2 * (729 + memory.TEXT + 20)
    decoder = layers * (4 * hidden**2 + 3 * hidden * 11008) + 152_000 * hidden  # products of the forward pass
    tokens = 2 * (729 + memory.TEXT + memory.ANSWER)
    assert hificl["step_flops"] == pytest.approx(4 * decoder * tokens, rel=0.1)


@pytest.mark.parametrize("method", ["hificl-paper", "lora-2"])
def test_what_a_step_keeps_is_what_it_holds_with_weights(method, load):
    """Counted without weights, and measured when the same model runs."""
    base, _ = load("llava")
    model, length = runner.Method.named(method).attach(base, recipe.Sizes()), 150
    with torch.device("meta"):
        twin = runner.Method.named(method).attach(type(base)(base.config).requires_grad_(False), recipe.Sizes())
    with memory.on_cpu(twin):
        counted = memory._kept_by(twin, length)
    held = []
    measured = peak_bytes(lambda: held.append(memory._loss(model, length)), torch.device("cpu"))
    assert counted < measured < 1.5 * counted  # what lives for a moment comes on top


def test_tables_of_memory_are_written(root, tmp_path):
    text = memory.write(tmp_path, [str(root / "idefics2")]).read_text()
    assert "**Computed, not measured**" in text and text.count("idefics2 | hificl |") == 1 + len(memory.CARDS)
    assert json.loads((tmp_path / "memory.json").read_text())["computed"] is True
