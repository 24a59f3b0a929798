"""One page of HTML on what adapters do with one prompt; its pictures are within it, and it loads nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from itertools import combinations
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import PeftModel

from ..names import MODULE
from . import plots
from .kinds import Kinds, token_kinds
from .reading import Reading, read_pairs
from .recording import Records, record
from .similarity import duplicate_pairs, pair_similarity

_STYLE = """
body { font-family: sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5 }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% } pre { white-space: pre-wrap }
"""
_READ = 12  # pairs in the table
_SHOWN = 3  # heads over the sequence and the picture


def page(
    model: PeftModel, titles: dict[str, str], batch: dict[str, Any], tokenizer: Any, prompt: str, image: Any = None
) -> str:
    """The report of each adapter of `titles` (its name in the model, its title) on one row with labels.

    Args:
        batch: one prompt with its answer, whose labels are the answer alone.
        tokenizer: turns token ids into words.
        prompt: what the model was asked, to be shown.
        image: its picture, if there is one.
    """
    kinds = token_kinds(model, **batch)
    words = [tokenizer.decode([token]) for token in batch["input_ids"][0].tolist()]
    answer = "".join(word for word, kind in zip(words, kinds[0], strict=True) if kind == "answer")
    parts = [
        "<h1>What the virtual pairs do</h1>",
        f"<h2>Prompt</h2><pre>{escape(prompt)}</pre><p>Answer, which the losses are of:</p><pre>{escape(answer)}</pre>",
    ]
    if image is not None:
        figure = Figure(figsize=(2, 2))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(image)
        axes.set_axis_off()
        parts.append(_embedded(figure, "the picture"))
    for name, title in titles.items():
        model.set_adapter(name)
        with torch.no_grad(), record(model) as records:
            loss = model(**batch).loss.item()
        with torch.no_grad(), model.disable_adapter():
            base = model(**batch).loss.item()
        parts += [
            f"<h2>{escape(title)}</h2>",
            f"<p>Loss of the answer: {loss:.3f} with the adapter, {base:.3f} without it.</p>",
            *(f"<p>{escape(line)}</p>" for line in records.summary(kinds).splitlines()),
            "<h3>Share of the attention</h3>",
            _embedded(plots.heatmap(records, kinds), "share of the attention by layer and head"),
            *_pairs(read_pairs(model, [batch], tokenizer), records, kinds, words, image),
            *_duplicates(model, name),
        ]
    parts += _similarities(model, titles)
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>What the virtual pairs do</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _pairs(
    readings: Sequence[Reading], records: Records, kinds: Kinds, words: Sequence[str], image: Any
) -> Iterable[str]:
    yield "<h3>What single pairs write and do</h3>"
    yield (
        "<p>The pairs of the heads without whose pairs the loss of the answer rises most. Effect: how much it rises "
        "when this pair alone is removed, measured. Words: the nearest words to what the pair writes, read through the "
        "output projection, the final norm and the unembedding; they leave out what later layers make of it.</p>"
    )
    yield _table(
        ("module", "head", "pair", "effect", "words"),
        [(r.module, r.head, r.pair, f"{r.effect:+.4f}", " ".join(map(repr, r.words))) for r in readings[:_READ]],
    )
    yield "<h3>Where these heads look at their pairs</h3>"
    places = list(dict.fromkeys((reading.module, reading.head) for reading in readings))[:_SHOWN]
    for module, head in places:
        yield _embedded(plots.sequence(records[module], head=head, tokens=words), f"beta of {module}, head {head}")
        if image is not None:
            try:
                figure = plots.picture(records[module], image, kinds, head=head)
            except ValueError as error:  # tokens of several crops, or with marks between them
                yield f"<p>Not drawn over the picture: {escape(str(error))}</p>"
            else:
                yield _embedded(figure, f"beta of {module}, head {head}, over the picture")


def _duplicates(model: PeftModel, name: str) -> Iterable[str]:
    found = duplicate_pairs(model, name)
    yield "<h3>Near-duplicate pairs</h3>"
    yield f"<p>Within a head, {len(found)} times two pairs have keys and values with cosines of at least 0.95.</p>"
    if found:
        rows = [(d.module, d.head, *d.pairs, f"{d.keys:.3f}", f"{d.values:.3f}") for d in found[:10]]
        yield _table(("module", "head", "pair", "pair", "keys", "values"), rows)


def _similarities(model: PeftModel, titles: dict[str, str]) -> Iterable[str]:
    """For each two adapters, the cosine with the most similar pair of the other one, averaged over all pairs."""
    rows = []
    for first, second in combinations(titles, 2):
        found = pair_similarity(model, first, second)
        layer: Any = model.get_base_model().get_submodule(f"{next(iter(found))}.{MODULE}")
        for i, part in enumerate(("keys", "values")):
            best = torch.stack([cosines[i].amax(dim=2).mean() for cosines in found.values()]).mean()
            chance = _chance(layer.n[second], layer.head_shape[i + 1])
            rows.append((titles[first], titles[second], part, f"{best:.3f}", f"{chance:.3f}"))
    if rows:
        yield "<h2>Similarity of the adapters</h2>"
        yield (
            "<p>The cosine of each pair of the first with the most similar one of the second in its head, averaged; "
            "and the same of random directions.</p>"
        )
        yield _table(("first", "second", "of", "cosine", "random"), rows)


def _chance(n: int, dim: int) -> float:
    """The mean of the largest of n cosines between random directions."""
    directions = torch.randn(1000, n, dim, generator=torch.Generator().manual_seed(0))
    return (directions[..., 0] / directions.norm(dim=-1)).amax(dim=1).mean().item()


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        number = isinstance(value, int) or value[:1] in "+-0123456789"
        return f'<td class="number">{value}</td>' if number else f"<td>{escape(value)}</td>"

    head = "".join(f"<th>{name}</th>" for name in names)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _embedded(figure: Figure, description: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{data}"></p>'
