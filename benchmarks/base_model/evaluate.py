"""Accuracy by number of shots on test images and on rules that training never showed.

`python -m benchmarks.base_model.evaluate --model FOLDER` writes `evaluation.json`, `evaluation.png` and the model card
beside the model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from transformers import LlavaForConditionalGeneration

from ..common import files
from ..common.colors import GREY, HIFICL
from ..common.tables import Record, Table
from .card import write_card
from .episodes import Block, Episode, Episodes, collate
from .language import CAPTION, END, MARK, QUESTION_TYPES, TOKEN, VOCABULARY, ask, caption
from .model import load_base
from .scenes import DIGITS, EMPTY, Scenes, make_scenes

SHOTS = (0, 1, 2, 4, 8, 16)
BATCH_TOKENS = 8192

# What is asked after k demonstrations; the ceiling is the share of queries whose class is among them.
SERIES: dict[str, Callable[[Episodes, int], Episode]] = {
    "rename 2, named": lambda episodes, pictures: episodes.rename(pictures, 2),
    "rename 4, named": lambda episodes, pictures: episodes.rename(pictures, 4),
    "rename 8, named": lambda episodes, pictures: episodes.rename(pictures, 8),
    "rename 2, hidden": lambda episodes, pictures: episodes.rename(pictures, 2, hidden=True),
    "rename 4, hidden": lambda episodes, pictures: episodes.rename(pictures, 4, hidden=True),
    "choose an attribute": lambda episodes, pictures: episodes.choice(pictures),
}
# At 8 shots, as a share of the ceiling, or of all answers.
TARGETS = {
    "rename 2, named": 0.97,
    "rename 4, named": 0.97,
    "rename 8, named": 0.90,
    "rename 2, hidden": 0.85,
    "rename 4, hidden": 0.85,
    "direct": 0.97,
    "digits": 0.95,
    "captions": 0.85,
    "ends": 0.99,
}


@torch.no_grad()
def last_answers(
    model: LlavaForConditionalGeneration, scenes: Scenes, episodes: list[Episode]
) -> tuple[np.ndarray, np.ndarray]:
    """For each episode whether the last answer (one word) is right, and whether the end token comes after that word.

    A right word followed by the end token is what greedy generation gives, read from one forward pass.
    """
    order = sorted(range(len(episodes)), key=lambda i: len(episodes[i]))
    right, ends = np.zeros(len(episodes), bool), np.zeros(len(episodes), bool)
    size = max(1, BATCH_TOKENS // (8 * len(episodes[order[-1]])))
    for part in (order[i : i + size] for i in range(0, len(order), size)):
        batch = collate([episodes[i] for i in part])
        logits = model(input_ids=batch.input_ids, pixel_values=scenes.pixel_values(batch.scenes)).logits
        said = logits.argmax(dim=-1)
        mark = (batch.input_ids == TOKEN[MARK]).long().cumsum(dim=1).argmax(dim=1)  # the last question mark
        rows = torch.arange(len(part))
        right[part] = (said[rows, mark] == batch.input_ids[rows, mark + 1]).numpy()
        ends[part] = (said[rows, mark + 1] == TOKEN[END]).numpy()
    return right, ends


def measure_series(
    model: LlavaForConditionalGeneration, scenes: Scenes, split: str, name: str, shots: int, number: int, seed: int = 0
) -> dict[str, float]:
    source = Episodes(scenes, split, [seed, shots, list(SERIES).index(name)])
    episodes = [SERIES[name](source, shots + 1) for _ in range(number)]
    right, ends = last_answers(model, scenes, episodes)
    ceiling = float(np.mean([episode[-1].known for episode in episodes]))
    return {"accuracy": float(right.mean()), "ceiling": ceiling, "ends": float(ends.mean())}


def measure_direct(
    model: LlavaForConditionalGeneration, scenes: Scenes, number: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Accuracy of each type of direct question, and of naming a single digit."""
    source = Episodes(scenes, "test", seed)
    single_digits = np.flatnonzero((scenes.attributes["corner"] >= 0) & (scenes.attributes["object"] < len(DIGITS)))
    results = {}
    for name in (*QUESTION_TYPES, "digits"):
        rows = source.rng.permutation(single_digits if name == "digits" else len(scenes))
        answered = ((row, ask(scenes, row, "object" if name == "digits" else name, source.choose)) for row in rows)
        episodes = [[Block(int(row), *pair)] for row, pair in answered if pair is not None][:number]
        right, ends = last_answers(model, scenes, episodes)
        results[name] = {"accuracy": float(right.mean()), "ends": float(ends.mean()), "questions": len(episodes)}
    return results


@torch.no_grad()
def measure_captions(model: LlavaForConditionalGeneration, scenes: Scenes, number: int) -> dict[str, float]:
    """Captions as `generate` writes them; right where every word is and the end token follows."""
    rows = np.arange(min(number, len(scenes)))
    said: list[str] = []
    for part in np.array_split(rows, -(-len(rows) // 250)):
        ids = collate([[Block(0, CAPTION, "")]]).input_ids[:, :-1].expand(len(part), -1)  # all but the end token
        sequences = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=scenes.pixel_values(part),
            max_new_tokens=20,
            do_sample=False,
        )
        words = [[VOCABULARY[i] for i in row] for row in sequences[:, ids.shape[1] :].tolist()]
        said += [" ".join(row[: row.index(END) + 1] if END in row else row) for row in words]
    kinds = (scenes.kind != EMPTY).sum(axis=1)
    right = np.array([text == f"{caption(scenes, row)} {END}" for text, row in zip(said, rows.tolist(), strict=True)])
    by_objects = {f"{n} objects": float(right[kinds[rows] == n].mean()) for n in range(1, 5)}
    return {"accuracy": float(right.mean()), "ends": float(np.mean([END in text for text in said]))} | by_objects


def evaluate(model: LlavaForConditionalGeneration, scenes: Scenes, number: int) -> Record:
    """All of it, on the test split."""
    start = time.perf_counter()
    direct = measure_direct(model, scenes, number)
    digits = direct.pop("digits")
    captions = measure_captions(model, scenes, 2 * number)
    runs: Iterator[tuple[str, int]] = ((name, shots) for name in SERIES for shots in SHOTS)
    series: dict[str, dict[str, dict[str, float]]] = {name: {} for name in SERIES}
    for name, shots in track(runs, "shots", total=len(SERIES) * len(SHOTS)):
        series[name][str(shots)] = measure_series(model, scenes, "test", name, shots, number)
    reached = {name: series[name]["8"]["accuracy"] / series[name]["8"]["ceiling"] for name in SERIES if name in TARGETS}
    reached["direct"] = float(np.mean([row["accuracy"] for row in direct.values()]))
    reached["digits"] = digits["accuracy"]
    reached["captions"] = captions["accuracy"]
    reached["ends"] = min(row["ends"] for row in (*direct.values(), captions, *(series[name]["8"] for name in SERIES)))
    return {
        "images": len(scenes),
        "episodes": number,
        "targets": {name: {"target": target, "reached": reached[name]} for name, target in TARGETS.items()},
        "series": series,
        "direct": direct,
        "digits": digits,
        "captions": captions,
        "seconds": time.perf_counter() - start,
    }


def draw(path: Path, series: dict[str, dict[str, dict[str, float]]]) -> None:
    """Accuracy against shots, beside the ceiling."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, (name, by_shots) in zip(figure.subplots(2, 3, sharey=True).flat, series.items(), strict=True):
        places = range(len(by_shots))
        axes.plot(places, [100 * row["ceiling"] for row in by_shots.values()], "--", color=GREY, label="ceiling")
        axes.plot(places, [100 * row["accuracy"] for row in by_shots.values()], "o-", color=HIFICL, label="base")
        axes.set_xticks(places, list(by_shots))
        axes.set_title(name)
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
    for axes in figure.axes[3:]:
        axes.set_xlabel("demonstrations")
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.base_model.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "checkpoint", help="folder of the model")
    parser.add_argument("--out", type=Path, help="folder to write to; the model's own if left out")
    parser.add_argument("--number", type=int, default=1000, help="questions for each figure")
    args = parser.parse_args()
    out = args.out or args.model
    out.mkdir(parents=True, exist_ok=True)
    _, model = load_base(args.model)
    results = evaluate(model, make_scenes("test", 6000), args.number)
    files.write(out / "evaluation.json", results)
    draw(out / "evaluation.png", results["series"])
    if out == args.model:
        write_card(out)

    rows = [(name, f"{row['reached']:.3f}", f"{row['target']:.2f}") for name, row in results["targets"].items()]
    title = f"{args.number} test questions each, rules never seen"
    Console().print(Table(title, ("test", "reached", "target"), rows).rich())


if __name__ == "__main__":
    main()
