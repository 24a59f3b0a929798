"""The same on a real language model: SmolLM2-135M-Instruct, two tasks with a HiFICL adapter each.

`python -m benchmarks.quickstart.real --out out/quickstart_real` shows three validation questions of each task, answered
by the base model and by the adapter; reloads the adapters on a fresh base, and switches between them.  The model and
the tasks are those that `python -m benchmarks.real_base prepare` leaves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from transformers import LlamaForCausalLM, set_seed

from peft_hificl import HiFICLConfig, parameter_groups

from ..common import files
from ..common.environment import command, environment, prepare
from ..common.tables import Record, Table
from ..quality import training
from ..real_base.__main__ import CACHE
from ..real_base.base import load_base, load_tokenizer
from ..real_base.encoding import Row, encode, loss_of, measure
from ..real_base.methods import pairs_from_answers, with_balanced_factors
from ..real_base.runner import BATCH, STEPS
from ..real_base.tasks import Sample, load_task
from . import adapters

CHOSEN = {"past": "past tense", "kind": "kind of thing"}
SAMPLES, RATE, SHOWN = 64, 1.5e-2, 3
LONGEST = 12  # tokens of an answer
MINIMUM_GAIN = 0.20  # in exact answers on validation data, on each task


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/quickstart_real"), help="folder to write to")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the model and the tasks")
    parser.add_argument("--seed", type=int, default=0, help="of training samples, weights and batches")
    args = parser.parse_args(arguments)
    prepare(threads=2)
    console = Console()
    try:
        base, tokenizer = load_base(args.cache / "model"), load_tokenizer(args.cache / "model")
        tasks = {name: load_task(args.cache / "tasks", name) for name in CHOSEN}
    except FileNotFoundError as error:
        parser.error(str(error))
    console.print(f"Base model, {base.num_parameters():,} parameters: {args.cache / 'model'}")

    questions = {name: splits["validation"][:SHOWN] for name, splits in tasks.items()}
    said: dict[str, dict[str, list[str]]] = {"base": {}, "HiFICL": {}}
    records: list[Record] = []
    for name, title in CHOSEN.items():
        said["base"][name] = ask(base, tokenizer, questions[name])
        rows = {split: encode(tokenizer, samples) for split, samples in tasks[name].items()}
        before = measure(base, rows["validation"])["score"]
        model, seconds = teach(base, rows["train"], args.seed, title)
        said["HiFICL"][name] = ask(model, tokenizer, questions[name])
        record = {"task": name, "before": before, "after": measure(model, rows["validation"])["score"]}
        record |= {"trainable_parameters": model.get_nb_trainable_parameters()[0], "training_seconds": seconds}
        records.append(record | {"file_bytes": adapters.save(model, args.out / name)})
        base = model.unload()
    console.print(_answers(questions, said).rich())
    console.print(_scores(records, [len(splits["validation"]) for splits in tasks.values()]).rich())

    model = adapters.load(load_base(args.cache / "model"), args.out, list(CHOSEN))
    unchanged = True
    # Twice each: switching back changes nothing either.  Without an adapter it is the base again.
    for adapter, task in [(task, task) for task in (*CHOSEN, *CHOSEN)] + [(None, task) for task in CHOSEN]:
        with adapters.switched(model, adapter):
            unchanged &= ask(model, tokenizer, questions[task]) == said["HiFICL" if adapter else "base"][task]

    seconds = time.perf_counter() - start
    results = {
        "command": command(),
        **environment(),
        "seed": args.seed,
        "training_samples": SAMPLES,
        "steps": STEPS,
        "batch": BATCH,
        "rate": RATE,
        "rows": records,
        "questions": questions,
        "answers": said,
        "unchanged_after_reload": unchanged,
        "seconds": seconds,
    }
    files.write(args.out / "results.json", results)
    if not unchanged:
        sys.exit("the reloaded adapters answer differently from those that were saved")
    console.print("Reloaded and switched, each adapter gives the same answers, and without one it is the base again.")
    console.print(f"{seconds:.0f} s. Adapters and results.json are in {args.out}")
    for record in records:
        if (gain := record["after"] - record["before"]) < MINIMUM_GAIN:
            sys.exit(f"HiFICL gains only {gain:.1%} on {record['task']}; expected at least {MINIMUM_GAIN:.0%}")


def teach(base: LlamaForCausalLM, rows: Sequence[Row], seed: int, title: str) -> tuple[PeftModel, float]:
    """An adapter trained by the recommended recipe on some of the rows, and the seconds that training took."""
    chosen = [rows[number] for number in training.samples(len(rows), SAMPLES, seed)]
    set_seed(seed)
    model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8, skip_first_token=True))
    with_balanced_factors(pairs_from_answers)(model, chosen)
    batches = track(training.batches(range(len(chosen)), STEPS, seed, BATCH), title, total=STEPS)

    def loss(numbers: list[int]) -> torch.Tensor:
        return loss_of(model, [chosen[number] for number in numbers])

    return model, training.fit(model, loss, parameter_groups(model, RATE), iter(batches), STEPS)


@torch.no_grad()
def ask(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> list[str]:
    """What the model generates, greedily, to the end of the line."""
    end = tokenizer("\n")["input_ids"][-1]
    answers = []
    for question, _ in samples:
        inputs = tokenizer(f"Q: {question}\nA:", return_tensors="pt").to(model.device)
        options = {"max_new_tokens": LONGEST, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
        output = model.generate(**inputs, **options, use_cache=True)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(output).strip())
    return answers


def _answers(questions: dict[str, list[Sample]], said: dict[str, dict[str, list[str]]]) -> Table:
    rows = [
        (CHOSEN[name], question, answer, *(of[name][number] for of in said.values()))
        for name, samples in questions.items()
        for number, (question, answer) in enumerate(samples)
    ]
    return Table("The first validation questions", ("task", "question", "answer", *said), rows)


def _scores(records: Sequence[Record], numbers: Sequence[int]) -> Table:
    rows = [
        (
            CHOSEN[record["task"]],
            f"{number}",
            f"{record['before']:.1%}",
            f"{record['after']:.1%}",
            f"{record['trainable_parameters']:,}",
            f"{record['file_bytes'] / 2**20:.2f} MiB",
            f"{record['training_seconds']:.1f} s",
        )
        for record, number in zip(records, numbers, strict=True)
    ]
    columns = ("task", "questions", "base", "HiFICL", "trainable", "file", "training")
    return Table(f"Exact answers on validation data; {SAMPLES} training samples, one seed", columns, rows)


if __name__ == "__main__":
    main()
