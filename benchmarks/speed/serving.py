"""Continuous batching: many requests at once, with prompts of their own and with a common beginning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from ..common.colors import GREY
from ..common.tables import Record, Table, decimal, duration, tabulate
from .measure import interleave, ratio, summary
from .presets import HIFICL, LORA, Preset, adapt, build
from .report import COLORS, Bar, spread

REQUESTS, PROMPT, COMMON, TOKENS, BLOCK = 8, 64, 48, 16, 16
BASE = "base"
WORKLOADS = {"prompts of their own": 0, "a common beginning": COMMON}

TITLE = "Serving"
METHOD = f"""transformers' continuous batching: {REQUESTS} requests at once, each with a prompt of {PROMPT} random
tokens, new in each round, answered greedily with {TOKENS} tokens; a manager for each variant, which lives on; blocks of
{BLOCK} tokens. With a common beginning, the first {COMMON} tokens are those of all requests, of earlier rounds too, and
are taken from the cache. No CUDA graphs. HiFICL n = 8, r = 8; LoRA r = 16 on q, k, v and o."""


def run(preset: Preset, device: torch.device, compiled: bool) -> list[Record]:
    base = build(preset.model, device)
    models: dict[str, nn.Module] = {BASE: base, **{method: adapt(base, method).eval() for method in (LORA, HIFICL)}}
    records: list[Record] = []
    with ExitStack() as stack:
        managers = {name: stack.enter_context(manager(model)) for name, model in models.items()}
        for workload, common in WORKLOADS.items():
            prompts = make_prompts(preset.model.vocabulary, common)
            variants = {name: partial(answer, managers[name], prompts) for name in models}
            samples = interleave(variants, device, preset.seconds)
            for name in models:
                timing = summary(samples, name)
                records.append(
                    {
                        "workload": workload,
                        "variant": name,
                        **timing,
                        "tokens_per_second": REQUESTS * TOKENS / timing["seconds"],
                        "speed_of_base": 1 / ratio(samples, name, BASE),
                        "speed_of_lora": 1 / ratio(samples, name, LORA),
                    }
                )
    return records


@contextmanager
def manager(model: Any) -> Iterator[Any]:
    """A manager of the model, while it runs."""
    found = model.init_continuous_batching(
        GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0),
        # Without what HiFICL has to do without: CUDA graphs, and a switch to another attention.
        ContinuousBatchingConfig(
            num_blocks=16 * REQUESTS,
            page_size=BLOCK,
            max_batch_tokens=REQUESTS * PROMPT,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        ),
    )
    found.start()
    try:
        yield found
    finally:
        found.stop()
        found.destroy()


def make_prompts(vocabulary: int, common: int) -> Iterator[list[list[int]]]:
    """The prompts of each round; all of them begin with the same `common` tokens."""
    generator = torch.Generator().manual_seed(0)
    beginning = torch.randint(3, vocabulary, (common,), generator=generator).tolist()
    while True:
        rest = torch.randint(3, vocabulary, (REQUESTS, PROMPT - common), generator=generator).tolist()
        yield [beginning + own for own in rest]


def answer(manager: Any, prompts: Iterator[list[list[int]]]) -> list[list[int]]:
    waiting = manager.add_requests(next(prompts), max_new_tokens=TOKENS)
    found: dict[str, list[int]] = {}
    while len(found) < len(waiting):
        result = manager.get_result(timeout=60)
        if result is None or result.error is not None:
            raise RuntimeError(f"A request was not answered: {result and result.error}.")
        found[result.request_id] = result.generated_tokens
    return [found[name] for name in waiting]


def tables(records: list[Record]) -> list[Table]:
    return [
        tabulate(
            "Generated tokens per second",
            records,
            {
                "prompts": "workload",
                "variant": "variant",
                "tokens/s": lambda r: decimal(r["tokens_per_second"]),
                "of the base's": lambda r: decimal(r["speed_of_base"]),
                "of LoRA's": lambda r: decimal(r["speed_of_lora"]),
                f"{REQUESTS} requests": lambda r: duration(r["seconds"]),
                "quartiles": spread,
            },
        )
    ]


def bars(records: list[Record]) -> list[Bar]:
    return []


def draw(records: list[Record], figure: Figure) -> None:
    axes = figure.subplots()
    drawn = axes.barh(
        [f"{record['variant']}, {record['workload']}" for record in records],
        [record["tokens_per_second"] for record in records],
        color=[COLORS.get(str(record["variant"]), GREY) for record in records],
    )
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("generated tokens/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Continuous batching of {REQUESTS} requests")
