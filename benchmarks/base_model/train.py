"""Train the base model from nothing: `python -m benchmarks.base_model.train --out out/base_model`.

Five phases, under one optimizer and one schedule:

1. see: the tower and projector alone, read by linear probes (thrown away) that name what is in each corner;
2. speak: direct questions and captions;
3. rules: episodes, which without the scaffold would long stay at copying any word of the context;
4. hide: more rules of a hidden attribute, whose values the scaffold now tells too;
5. settle: the same without the scaffold, which holds in the three phases before (see `scaffold`).

`--start FOLDER` begins with the weights of a model instead, which may lack the last words of the vocabulary, and takes
a share of the last two phases at half the rate.

A step's data depends on the seed and the step alone, so a run that was killed continues from its last checkpoint to the
weights that it would have reached.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, set_seed

from ..common import files
from ..common.environment import prepare
from ..common.tables import Record
from .episodes import Batch, Episode, Episodes, collate
from .evaluate import measure_series
from .model import load_base, make_model, make_processor
from .scaffold import Probes, scaffold_loss
from .scenes import Scenes, make_scenes


@dataclass(frozen=True)
class Recipe:
    see: int = 1200
    speak: int = 2000
    rules: int = 1300
    hide: int = 2100
    settle: int = 1500
    scenes: int = 60_000
    batch_images: int = 288  # and as many blocks of a rule
    see_images: int = 256
    learning_rate: float = 2e-3
    warmup: int = 200
    tower_rate: float = 0.25  # of the tower, once it sees, as a share of the others' rate
    decay: float = 0.45  # share of the steps after seeing over which the rate falls to nothing
    scaffold: float = 0.5  # what it counts beside the answers
    checkpoint_every: int = 500
    validate_every: int = 500
    validation_questions: int = 200

    @property
    def steps(self) -> int:
        return self.see + self.speak + self.rules + self.hide + self.settle

    def phase(self, step: int) -> str:
        for name in ("see", "speak", "rules", "hide"):
            if step < getattr(self, name):
                return name
            step -= getattr(self, name)
        return "settle"

    def rate(self, step: int) -> float:
        """Up, level, and down: once for seeing, once for all that follows."""
        start, end, decay = (0, self.see, 0.5) if step < self.see else (self.see, self.steps, self.decay)
        falling = (end - step) / max(1, round(decay * (end - start)))
        return self.learning_rate * min(1, (step + 1 - start) / self.warmup, falling)


SMOKE = Recipe(
    see=4, speak=3, rules=3, hide=2, settle=3, scenes=2000, batch_images=34, see_images=32, warmup=3,
    checkpoint_every=5, validate_every=7, validation_questions=8,
)  # fmt: skip


def start_from(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Take the weights of a model that knows the first of the words, or all."""
    _, trained = load_base(folder)
    known = trained.get_input_embeddings().num_embeddings
    state, fresh = trained.state_dict(), model.state_dict()
    for name, value in fresh.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            state[name] = torch.cat([state[name], value[known:]])
    model.load_state_dict(state)


def draw_episodes(source: Episodes, phase: str, batch_images: int) -> Batch:
    """A batch of one length: short episodes, or half as many long ones."""
    choose = source.choose
    pictures = 9 if phase == "speak" or choose.random() < 0.6 else 17

    def draw() -> Episode:
        kind = choose.random() if phase != "speak" else choose.random() * 0.37
        if kind < 0.25:
            return source.direct(pictures // 2 + 1, questions=3)
        if kind < 0.37:
            return source.captions(pictures // 2 + 1)
        if kind < 0.45:
            return source.choice(pictures)
        classes = choose.choice((2, 2, 3, 4, 5) if pictures == 9 else (2, 3, 4, 6, 8, 8, 10))
        return source.rename(pictures, classes, hidden=kind > (0.77 if phase == "rules" else 0.55))

    return collate([draw() for _ in range(batch_images // pictures)], length=8 * pictures, tell_hidden=phase == "hide")


def episode_loss(
    model: LlavaForConditionalGeneration, probes: Probes, scenes: Scenes, batch: Batch, scaffold: float
) -> tuple[Tensor, dict[str, float]]:
    output = model(
        input_ids=batch.input_ids,
        pixel_values=scenes.pixel_values(batch.scenes),
        output_attentions=scaffold > 0,
        output_hidden_states=scaffold > 0,
        use_cache=False,
    )
    targets, weights = batch.input_ids[:, 1:], batch.weights[:, 1:]
    losses = cross_entropy(output.logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    looked_up = (batch.labels[:, 1:] > 0) & (weights > 0)
    log = {"loss": loss.item(), "renaming": losses[looked_up].mean().item()}
    if scaffold > 0:
        extra, seen = scaffold_loss(output, batch, scenes, probes)
        loss, log = loss + scaffold * extra, log | seen
    return loss, log


class Training:
    """The state of a run; everything in it is in the checkpoint or follows from seed and step."""

    def __init__(self, recipe: Recipe, seed: int, out: Path, start: Path | None = None) -> None:
        self.recipe, self.seed, self.out, self.step, self.seconds = recipe, seed, out, 0, 0.0
        self.start = start
        # Where the processor must emulate it, bfloat16 takes ten times as long as float32.
        self.half = torch.cpu.get_capabilities().get("avx512_bf16", False)
        set_seed(seed)
        self.scenes = make_scenes("train", recipe.scenes, seed)
        self.validation = make_scenes("validation", max(500, recipe.scenes // 20), seed)
        self.model = make_model()
        if start is not None:
            start_from(self.model, start)
        self.model.set_attn_implementation("eager")  # gives the attention, and is the faster at these sizes
        self.probes = Probes(self.model.get_input_embeddings())
        self.parameters = [*self.model.parameters(), *self.probes.parameters()]
        tower = set(self.model.model.vision_tower.parameters())
        groups = [
            {"params": [p for p in self.parameters if (p in tower) == of_tower], "tower": of_tower}
            for of_tower in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    @property
    def checkpoint(self) -> Path:
        return self.out / "training.pt"

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("model", "probes", "optimizer")}
        state |= {"step": self.step, "seconds": self.seconds, "seed": self.seed, "recipe": asdict(self.recipe)}
        torch.save(state, self.checkpoint.with_suffix(".part"))
        os.replace(self.checkpoint.with_suffix(".part"), self.checkpoint)  # never half a checkpoint

    def resume(self) -> None:
        """Continue a run of the same recipe and seed, if there is one.

        Raises:
            ValueError: the checkpoint is of another run.
        """
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        if (state["recipe"], state["seed"]) != (asdict(self.recipe), self.seed):
            raise ValueError(f"{self.checkpoint} is of another recipe or seed; remove it or choose another folder")
        for name in ("model", "probes", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]

    def take_step(self) -> dict[str, float]:
        recipe = self.recipe
        phase = recipe.phase(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.step) * (recipe.tower_rate if group["tower"] and phase != "see" else 1)
        source = Episodes(self.scenes, "train", [self.seed, self.step])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            if phase == "see":
                rows = source.rng.integers(len(self.scenes), size=recipe.see_images)
                features = self.model.get_image_features(pixel_values=self.scenes.pixel_values(rows)).pooler_output
                loss = self.probes.loss(torch.stack(list(features)), self.scenes, rows)
                log = {"loss": loss.item()}
            else:
                batch = draw_episodes(source, phase, recipe.batch_images)
                scaffold = recipe.scaffold if phase != "settle" else 0
                loss, log = episode_loss(self.model, self.probes, self.scenes, batch, scaffold)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return log

    def validate(self) -> dict[str, float]:
        """Accuracy at 8 shots over its ceiling, on validation images and the rules held out for validation."""
        names = ("rename 2, named", "rename 4, named", "rename 8, named", "rename 2, hidden", "choose an attribute")
        number, result = self.recipe.validation_questions, {}
        for name in names:
            row = measure_series(self.model, self.validation, "validation", name, 8, number)
            result[name] = round(row["accuracy"] / row["ceiling"], 3)
        return result

    def run(self, stop_at: int | None = None) -> None:
        """Train to the end, or as if killed after `stop_at` steps."""
        recipe, averages, averages_of = self.recipe, dict[str, float](), ""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), speed_estimate_period=300) as bar:
            task = bar.add_task("base model", total=recipe.steps, completed=self.step)
            while self.step < recipe.steps and self.step != stop_at:
                start, phase = time.perf_counter(), recipe.phase(self.step)
                if phase != averages_of:
                    averages, averages_of = {}, phase
                for name, value in self.take_step().items():
                    if not math.isnan(value):  # no rule in the batch: no loss of renaming
                        averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
                self.seconds += time.perf_counter() - start
                shown = ", ".join(f"{name} {value:.3f}" for name, value in averages.items())
                bar.update(task, completed=self.step, description=f"{phase}: {shown}")
                if self.step % recipe.validate_every == 0 or self.step == recipe.steps:
                    valid = self.validate() if phase in ("rules", "hide", "settle") else {}
                    line: Record = {"step": self.step, "phase": phase, "seconds": round(self.seconds, 1)}
                    line |= {name: round(value, 4) for name, value in averages.items()} | valid
                    files.append(self.out / "log.jsonl", line)
                if self.step % recipe.checkpoint_every == 0 or self.step == recipe.steps:
                    self.save()

    def save_model(self) -> None:
        folder = self.out / "model"
        self.model.set_attn_implementation("sdpa")
        self.model.eval().save_pretrained(folder)
        make_processor().save_pretrained(folder)
        about: Record = {"seed": self.seed, "steps": self.step, "seconds": self.seconds}
        about |= {"threads": torch.get_num_threads(), "parameters": self.model.num_parameters()}
        about |= {"recipe": asdict(self.recipe), **{name: version(name) for name in ("torch", "transformers")}}
        if self.start is not None:
            about["started from"] = json.loads((self.start / "training.json").read_text())
        files.write(folder / "training.json", about)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.base_model.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/base_model"), help="folder to write to, and resume from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--start", type=Path, help="folder of a model to begin with; the phases up to `rules` are left out"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    prepare(args.threads)
    recipe = SMOKE if args.smoke else Recipe()
    if args.start is not None:
        recipe = replace(recipe, see=0, speak=0, rules=0, hide=recipe.hide * 2 // 3, settle=recipe.settle // 2)
        recipe = replace(recipe, learning_rate=recipe.learning_rate / 2)
    training = Training(recipe, args.seed, args.out, args.start)
    training.resume()
    training.run()
    training.save_model()
    print(f"{training.step} steps in {training.seconds:.0f} s of training; the model is in {args.out / 'model'}")


if __name__ == "__main__":
    main()
