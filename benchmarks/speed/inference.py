"""Prefill and greedy decoding, token by token, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from ..common.colors import GREY
from ..common.tables import Record, Table, count, decimal, duration, tabulate
from .measure import Samples, ratio, stopwatch, summary
from .presets import CONFIGS, HIFICL, PREFIX, SHOTS, Preset, adapt, build
from .report import COLORS, Bar, spread

BASE, ICL = "base", f"base, {SHOTS}-shot prompt"
EAGER, COMPILED = "eager", "compiled"
ROUNDS = 5

TITLE = "Inference"
METHOD = f"""Batch 1, greedy, as `generate` does it: prefill, then the base model's forward for each token with a
key/value cache; adapters frozen, LoRA unmerged. The prompt is one image and its question; with {SHOTS} shots it is
{SHOTS} times as many in front. Image tokens are random text tokens, which cost the decoder the same; the vision tower,
which would run for each image, is not counted. Every decoded token is one sample, and the variants take turns token by
token. Compiled: `torch.compile(fullgraph=True)` of the decoding step with a static cache (with CUDA graphs on a GPU);
prefill stays eager."""


@dataclass
class Session:
    """One variant while it generates."""

    model: nn.Module  # what prefills
    decoder: PreTrainedModel  # what decodes: the base model's forward, with the adapter inside it
    prompt: Tensor
    decode: Callable[..., Any]
    cache: Any = None  # what the last forward returned
    static: StaticCache | None = None
    token: Tensor = field(default_factory=lambda: torch.empty(0))

    @torch.no_grad()
    def prefill(self) -> None:
        output = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1)
        self.cache, self.token = output.past_key_values, output.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def next_token(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        output = self.decode(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.token = output.logits[:, -1:].argmax(-1).clone()

    @torch.no_grad()
    def make_static(self, new_tokens: int) -> None:
        """Move the cache to one of a fixed size, which a compiled step needs; the same one every time."""
        if self.static is None:
            self.static = StaticCache(self.decoder.config, max_cache_len=self.cache.get_seq_length() + new_tokens)
        self.static.reset()
        for index, layer in enumerate(self.cache.layers):
            self.static.update(layer.keys, layer.values, index)
        self.cache = self.static


def make_sessions(preset: Preset, device: torch.device) -> dict[str, Session]:
    base = build(preset.model, device)
    generator = torch.Generator().manual_seed(0)
    one = preset.image_tokens + preset.text_tokens
    long = torch.randint(preset.model.vocabulary, (1, (SHOTS + 1) * one), generator=generator).to(device)
    prompt = long[:, -one:]
    sessions = {BASE: Session(base, base, prompt, base.forward)}
    for method in CONFIGS:
        model = adapt(base, method).eval().requires_grad_(False)
        # Prefix tuning only fills the cache; the base model decodes from there.
        decoder = model.base_model if method == PREFIX else model.get_base_model()
        sessions[method] = Session(model, decoder, prompt, decoder.forward)
    sessions[ICL] = Session(base, base, long, base.forward)
    return sessions


def run(preset: Preset, device: torch.device, compiled: bool) -> list[Record]:
    sessions = make_sessions(preset, device)
    compile_step: Any = torch.compile  # its type lacks `isolate_recompiles`
    records: list[Record] = []
    for mode in (EAGER, COMPILED) if compiled else (EAGER,):
        if mode == COMPILED:
            for session in sessions.values():
                # Each with a cache of its own: all run the same code, and would wait for each other's guards.
                session.decode = compile_step(
                    session.decoder.forward,
                    fullgraph=True,
                    dynamic=False,
                    mode="reduce-overhead" if device.type == "cuda" else None,
                    isolate_recompiles=True,
                )
        prefill, decode = generate_all(sessions, mode, preset, device)
        for name, session in sessions.items():
            timing = summary(decode, name)
            records.append(
                {
                    "mode": mode,
                    "variant": name,
                    "prompt_tokens": session.prompt.shape[1],
                    "prefill_seconds": summary(prefill, name)["seconds"],
                    "prefill_of_base": ratio(prefill, name, BASE),
                    **timing,
                    "tokens_per_second": 1 / timing["seconds"],
                    "speed_of_base": 1 / ratio(decode, name, BASE),
                }
            )
    return records


def generate_all(
    sessions: dict[str, Session], mode: str, preset: Preset, device: torch.device
) -> tuple[Samples, Samples]:
    """Seconds of each prefill and of each decoded token; the first round is not counted."""
    prefill: Samples = {name: [] for name in sessions}
    decode: Samples = {name: [] for name in sessions}
    for turn in track(range(ROUNDS + 1), f"{TITLE}, {mode}"):
        for name, session in sessions.items():
            prefill[name].append(stopwatch(session.prefill, device))
            if mode == COMPILED:
                session.make_static(preset.new_tokens)
        for _ in range(preset.new_tokens):
            for name, session in sessions.items():
                decode[name].append(stopwatch(session.next_token, device))
        if turn == 0:
            for samples in (*prefill.values(), *decode.values()):
                samples.clear()
    return prefill, decode


def tables(records: list[Record]) -> list[Table]:
    return [
        tabulate(
            "Prefill",
            [r for r in records if r["mode"] == EAGER],
            {
                "variant": "variant",
                "prompt tokens": lambda r: count(r["prompt_tokens"]),
                "time": lambda r: duration(r["prefill_seconds"]),
                "of the base's": lambda r: decimal(r["prefill_of_base"]),
            },
        ),
        tabulate(
            "Decoding",
            records,
            {
                "mode": "mode",
                "variant": "variant",
                "tokens/s": lambda r: decimal(r["tokens_per_second"]),
                "of the base's": lambda r: f"{r['speed_of_base']:.3f}",
                "time a token": lambda r: duration(r["seconds"]),
                "quartiles": spread,
            },
        ),
    ]


def bars(records: list[Record]) -> list[Bar]:
    speeds = {r["mode"]: r["speed_of_base"] for r in records if r["variant"] == HIFICL}
    return [
        Bar(f"decode, {mode}: tokens/s over base", ">=", bound, speeds.get(mode))
        for mode, bound in ((EAGER, 0.93), (COMPILED, 0.98))
    ]


def draw(records: list[Record], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(str(r["variant"]) for r in records))
    colors = [COLORS.get(name, GREY) for name in names]
    eager = [r for r in records if r["mode"] == EAGER]
    drawn = left.bar(names, [r["prefill_seconds"] * 1e3 for r in eager], color=colors)
    left.bar_label(drawn, fmt="{:,.4g}", fontsize=9)
    left.set_ylabel("prefill, ms")
    modes = list(dict.fromkeys(r["mode"] for r in records))
    for place, mode in enumerate(modes):
        speeds = [r["tokens_per_second"] for r in records if r["mode"] == mode]
        places = [index + 0.42 * (place - (len(modes) - 1) / 2) for index in range(len(names))]
        drawn = right.bar(places, speeds, width=0.4, color=colors, alpha=0.55 if mode == COMPILED else 1)
        right.bar_label(drawn, fmt="{:,.4g}", fontsize=8)
    right.set_xticks(range(len(names)), names)
    right.set_ylabel("tokens/s, eager" + (" and compiled (pale)" if COMPILED in modes else ""))
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Inference, batch 1")
