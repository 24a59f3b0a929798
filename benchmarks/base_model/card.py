"""The model card: what the base is, how it was made, and what was measured, all taken from the files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .language import QUESTION_TYPES
from .scenes import ATTRIBUTES, digit_rows

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---

# A small vision-language base that learns in context

A LLaVA (SigLIP vision tower, Qwen2 decoder with grouped queries) of {parameters:,} parameters, trained from nothing to
test fine-tuning methods where no weights can be downloaded. It answers questions about 32 x 32 pictures of digits and
shapes, captions them, and takes up rules from demonstrations. It is of no use for photographs or for real text.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
inputs = processor(text="<image> color ? red <eos> <image> color ?", images=[[first, second]], return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]))
```

A prompt is a block `<image> question ? answer <eos>` for each demonstration, then one without its answer. Words are
separated by blanks; an answer ends with `<eos>`.

## Data

Pictures made by the program, of up to three different objects in four corners, with {digits} of scikit-learn's 1,797
handwritten digits for training and others for validation and test; {types} types of questions ({questions}), captions,
and episodes whose rule (an attribute, and new words for its values) only the demonstrations tell. A tenth of all rules
is held out for test and a tenth for validation, by a hash of the whole rule.

## Training

{training}

## Figures

On {images:,} test pictures and on test rules, {episodes:,} questions for each figure; renaming and choosing with the
share of the ceiling (the chance that the query's class is among the demonstrations) at 8 shots.

| test | reached | target |
|---|---|---|
{targets}

| accuracy (ceiling), by shots | {shots} |
|---|{rules}
{series}

| direct question | accuracy |
|---|---|
{direct}

Captions exactly right: {captions}.
"""


def write_card(folder: Path) -> None:
    """Write README.md from training.json and evaluation.json."""
    training: dict[str, Any] = json.loads((folder / "training.json").read_text())
    results: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    series = results["series"]
    shots = list(next(iter(series.values())))
    rows = {
        "targets": [f"| {name} | {r['reached']:.3f} | {r['target']:.2f} |" for name, r in results["targets"].items()],
        "series": [
            f"| {name} | " + " | ".join(f"{r['accuracy']:.1%} ({r['ceiling']:.1%})" for r in by_shots.values()) + " |"
            for name, by_shots in series.items()
        ],
        "direct": [f"| {name} | {row['accuracy']:.1%} |" for name, row in results["direct"].items()],
    }
    rows["direct"].append(f"| object, single digits | {results['digits']['accuracy']:.1%} |")
    text = CARD.format(
        parameters=training["parameters"],
        digits=len(digit_rows()["train"]),
        types=len(QUESTION_TYPES),
        questions=", ".join(f"`{name}`" for name in (*ATTRIBUTES, *QUESTION_TYPES[len(ATTRIBUTES) :])),
        training="\n".join(_stages(training)),
        images=results["images"],
        episodes=results["episodes"],
        shots=" | ".join(shots),
        rules="---|" * len(shots),
        captions=", ".join(
            [f"{results['captions']['accuracy']:.1%}"]
            + [f"{value:.1%} with {name}" for name, value in results["captions"].items() if name.endswith("objects")]
        ),
        **{name: "\n".join(lines) for name, lines in rows.items()},
    )
    (folder / "README.md").write_text(text)


def _stages(training: dict[str, Any]) -> list[str]:
    """One line for each training that led here, the first one first."""
    before = _stages(training["started from"]) if "started from" in training else []
    start = " --start (the model of the line above)" if before else ""
    recipe = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in training["recipe"].items())
    line = (
        f"{len(before) + 1}. `python -m benchmarks.base_model.train --seed {training['seed']}{start}`: "
        f"{training['steps']:,} steps in {training['seconds'] / 60:.0f} minutes, CPU threads: {training['threads']}, "
        f"torch {training['torch']}, transformers {training['transformers']}. The recipe: {recipe}."
    )
    if "note" in training:
        line += f" {training['note']}"
    return [*before, line]
