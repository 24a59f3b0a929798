"""The picture of the guide on inspection: what the virtual pairs of two tasks of the quickstart learned.

``python -m docs.figures.pairs`` trains an adapter for each task on the shipped small base, looks at its pairs on test
pictures, writes ``benchmarks/results/inspection/results.json`` and draws ``docs/figures/pairs.png`` from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import PeftModel
from torch import Tensor
from transformers import set_seed

from benchmarks.base_model.model import load_base
from benchmarks.common import files
from benchmarks.common.environment import command, environment, prepare
from benchmarks.quality.encoding import CHECKPOINT, collate
from benchmarks.quality.methods import Setup
from benchmarks.quality.scoring import score
from benchmarks.quality.training import STEPS
from benchmarks.quickstart import adapters, asking
from peft_hificl import inspection, prune_pairs
from peft_hificl.inspection.effects import adapter_of, weighed

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "inspection" / "results.json"
OUT = Path("out/inspection")
ROWS, NUMBERS = 32, (2, 4, 6, 8)
KINDS = {"first": "#595959", "image": "#e08214", "question": "#5aa655", "answer": "#2171b5"}


def measure() -> dict[str, Any]:
    prepare()
    found: dict[str, Any] = {"command": command(), **environment(), "rows": ROWS, "queries": asking.QUERIES}
    found["tasks"] = {task: measure_task(task) for task in asking.CHOSEN}
    _, base = load_base(CHECKPOINT)
    model = adapters.load(base, OUT, asking.CHOSEN)
    cosines = inspection.pair_similarity(model, *asking.CHOSEN).values()
    for part in ("keys", "values"):
        best = [getattr(layer, part).amax(dim=2).mean() for layer in cosines]
        found[f"nearest {part}"] = torch.stack(best).mean().item()
    layer = next(iter(adapter_of(model, None).layers.values()))
    random = torch.nn.functional.normalize(torch.randn(1000, NUMBERS[-1], layer.head_shape.key_dim), dim=-1)
    found["nearest random"] = random[..., 0].amax(dim=1).mean().item()
    return found


def measure_task(task: str) -> dict[str, Any]:
    set_seed(0)
    processor, base = load_base(CHECKPOINT)
    splits = asking.load(task, base, 0, asking.QUERIES)
    kept = collate(splits, [("train", row) for row in range(ROWS)])
    test = collate(splits, [("test", row) for row in range(ROWS)])
    kinds = inspection.token_kinds(base, **test)

    def right(model: Any) -> float:
        return score(task, asking.ask(model, task, splits), splits["test"].examples)["score"]

    def masses(model: PeftModel) -> dict[str, list[float]]:
        with torch.no_grad(), inspection.record(model.eval()) as records:
            model(**test)
        return {kind: mass.mean(dim=1).tolist() for kind, mass in records.by_kind(kinds).items()}

    found: dict[str, Any] = {"base score": right(base)}
    model = adapters.attach_hificl(base, processor, splits["train"].examples)
    found["mass at the start"] = masses(model)
    rate = adapters.RATES[task]["hificl"]
    adapters.train(model, Setup(task, splits, list(range(asking.SAMPLES)), 0, STEPS[asking.SAMPLES], rate), task)
    adapters.save(model, OUT / task)
    found["mass"] = masses(model)
    loss, effects = inspection.pair_effects(model, [test])
    found["loss"], found["effects"] = loss, {name: effect.tolist() for name, effect in effects.items()}
    found["order by derivatives"] = _rank_correlation(_derivatives(model, test), torch.stack(list(effects.values())))
    found["readings"] = [tuple(reading) for reading in inspection.read_pairs(model, [test], processor.tokenizer)]
    found["duplicates"] = len(inspection.duplicate_pairs(model, "default"))
    found["pruned"] = {NUMBERS[-1]: {"loss": loss, "score": right(model)}}
    for number in NUMBERS[-2::-1]:  # from the one before, so that each is measured with fewer pairs
        prune_pairs(model, [kept], n=number)
        with torch.no_grad():
            found["pruned"][number] = {"loss": model(**test).loss.item(), "score": right(model)}
    return found


def _derivatives(model: PeftModel, batch: dict[str, Any]) -> Tensor:
    """-dL/dw of every log-weight, (layers, H, n): to first order, the rise of the loss when a pair is removed."""
    layers = adapter_of(model, None).layers
    gates = {name: torch.zeros(layer.head_shape.heads, layer.n["default"]) for name, layer in layers.items()}
    for gate in gates.values():
        gate.requires_grad = True
    with weighed(layers, gates):
        return -torch.stack(torch.autograd.grad(model(**batch).loss, list(gates.values())))


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([values.flatten().argsort().argsort().float() for values in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def draw(found: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for (task, of_task), axes in zip(
        found["tasks"].items(), figure.subplots(2, 3, width_ratios=(1, 1.5, 1)), strict=True
    ):
        mass, effects, pruned = axes
        for kind, color in KINDS.items():
            start, after = of_task["mass at the start"][kind], of_task["mass"][kind]
            mass.plot(after, color=color, marker="o", label=f"{kind} token" + "s" * (kind != "first"))
            mass.plot(start, color=color, linestyle=":")
        mass.set(title=f"{task}: share of attention", xlabel="layer", ylabel="taken by the pairs", ylim=(-0.25, 1))
        of_pairs = torch.tensor(list(of_task["effects"].values())).flatten(1)  # (layers, heads * pairs)
        image = effects.imshow(of_pairs.clamp_min(0.001).log10(), cmap="Blues", aspect="auto", vmin=-3, vmax=0)
        heads = len(next(iter(of_task["effects"].values())))
        width = of_pairs.shape[1] // heads
        effects.set_xticks(
            [width * head + width / 2 - 0.5 for head in range(heads)], [f"head {h}" for h in range(heads)]
        )
        for head in range(1, heads):
            effects.axvline(width * head - 0.5, color="#888888", linewidth=0.8)
        effects.set(title=f"{task}: the loss without one pair", ylabel="layer")
        bar = figure.colorbar(image, ax=effects, ticks=[-3, -2, -1, 0], label="rise")
        bar.ax.set_yticklabels(["< 0.001", "0.01", "0.1", "> 1"])
        numbers = sorted(map(int, of_task["pruned"]))
        pruned.plot(numbers, [100 * of_task["pruned"][str(n)]["score"] for n in numbers], color="#2171b5", marker="o")
        pruned.axhline(100 * of_task["base score"], color="#595959", linestyle="--", label="base model")
        pruned.set(title=f"{task}: pruned", xlabel="pairs per head", ylabel="test score, %", ylim=(0, 100))
        mass.legend(frameon=False, fontsize=8, loc="lower center", ncol=2)
        pruned.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    files.write(RESULTS, measure())
    draw(json.loads(RESULTS.read_text()), HERE / "pairs.png")
