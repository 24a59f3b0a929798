"""Answers of a model, a line of JSON for each, shared among the processes of `accelerate launch`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import Progress

from ..common import files
from . import recipe
from .prompts import Encoder
from .samples import Sample


@torch.no_grad()
def generate(model: Any, encoder: Encoder, samples: Sequence[Sample], shown: Sequence[Sequence[Sample]]) -> list[str]:
    """One answer for each sample, as the paper decodes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = encoder.asked(samples, shown)
    inputs = {
        name: value.to(base.device, base.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }
    found = model.generate(
        **inputs, max_new_tokens=recipe.NEW_TOKENS, num_beams=recipe.beams(base.config.model_type),
        length_penalty=recipe.LENGTH_PENALTY, do_sample=False, eos_token_id=encoder.stops(base.generation_config),
        pad_token_id=encoder.tokenizer.pad_token_id,
    )  # fmt: skip
    new = found[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = encoder.tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def answer_all(
    model: Any,
    encoder: Encoder,
    samples: Sequence[Sample],
    show: Callable[[Sample], list[Sample]],
    path: Path,
    batch: int,
    progress: Progress,
) -> list[str]:
    """The answers to all samples; those that the file has already are not asked for again.

    Args:
        show: the demonstrations of a query.
        path: gets a line of name and answer for each sample, in order.
        batch: queries of one process at a time.
    """
    state = PartialState()
    said = _read(path)[: len(samples)]
    state.wait_for_everyone()  # before the first process adds to the file that all have read
    bar = progress.add_task("answers", total=len(samples), completed=len(said))
    for start in range(len(said), len(samples), batch * state.num_processes):
        part = samples[start : start + batch * state.num_processes]
        with state.split_between_processes(list(part)) as own:
            texts = generate(model, encoder, own, [show(sample) for sample in own]) if own else []
        texts = gather_object(texts)
        if state.is_main_process:
            for sample, text in zip(part, texts, strict=True):
                files.append(path, {"sample": sample.name, "said": text})
        said += texts
        progress.update(bar, completed=len(said))
    return said


def _read(path: Path) -> list[str]:
    with PartialState().main_process_first():
        if not path.exists():
            return []
        if PartialState().is_main_process:
            files.drop_torn_line(path)
        return [json.loads(line)["said"] for line in files.lines(path)[0]]
