"""Task Vector (arXiv 2310.15916): the state of a prompt's last token, in the place of a query's without a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ..common.tables import Record
from .encoding import Batch, Row, measure

SHOTS = 8
EVERY = 3  # of the layers, one is tried


class Patch:
    """Exchanges what a layer makes of the last token before each answer."""

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector
        self.places: Tensor | None = None  # of the batch that comes next, (B)

    def before(self, model: nn.Module, args: object, keywords: dict[str, Tensor]) -> None:
        """Called with the model's arguments: the first token whose successor has to be said."""
        self.places = keywords["logits_to_keep"].long().argmax(dim=1)

    def __call__(self, layer: nn.Module, args: object, output: Tensor) -> Tensor:
        assert self.places is not None
        patched = output.clone()
        patched[torch.arange(len(output)), self.places] = self.vector
        return patched


@torch.no_grad()
def vectors(base: LlamaForCausalLM, shown: Sequence[Row]) -> list[Tensor]:
    """The mean state of the last token before an answer after each layer, (D).

    Each sample is the query once, behind the `SHOTS` that follow it in their order, round and round.
    """
    prompts = []
    for number, query in enumerate(shown):
        others = [shown[(number + place) % len(shown)] for place in range(1, SHOTS + 1)]
        ids = [token for row in others for token in row.ids] + query.ids[: query.start]
        prompts.append(Row([*ids, query.ids[query.start]], len(ids)))
    batch = Batch.of(prompts, next(base.parameters()).device)
    states = base(input_ids=batch.ids, output_hidden_states=True, logits_to_keep=1).hidden_states
    assert states is not None
    places = torch.tensor([row.start - 1 for row in prompts])
    # The last of them has passed the final norm: that layer has no state of its own here, and is left out.
    return [state[torch.arange(len(prompts)), places].mean(dim=0) for state in states[1:-1]]


def answer(base: LlamaForCausalLM, rows: Mapping[str, Sequence[Row]], split: str, shown: Sequence[Row]) -> Record:
    """Patch the best layer on validation data, of every third: what `encoding.measure` tells, and that layer."""
    made = vectors(base, shown)
    scores = {number: _patched(base, number, made[number], rows["validation"])["score"] for number in _tried(made)}
    best = max(scores, key=lambda number: scores[number])
    return _patched(base, best, made[best], rows[split]) | {"layer": best}


def _tried(made: Sequence[Tensor]) -> range:
    return range(EVERY - 1 if len(made) >= EVERY else 0, len(made), EVERY)


def _patched(base: LlamaForCausalLM, number: int, vector: Tensor, rows: Sequence[Row]) -> Record:
    patch = Patch(vector)
    handles = [
        base.register_forward_pre_hook(patch.before, with_kwargs=True),
        base.model.layers[number].register_forward_hook(patch),
    ]
    try:
        return measure(base, rows)
    finally:
        for handle in handles:
            handle.remove()
