"""What holds the model up while it learns, and is taken away before the end.

Left alone, small models come to copy any word of the context and stay there.  Four hints lead on, each measured on
intermediate states of the model's own forward pass: image tokens say what is in their corner; a head of the first layer
looks from an object's name to where the object is; the states before the last two layers tell what a label stands for;
and a head in each of those two looks from a question mark to the labels of matching demonstrations.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from .episodes import Batch
from .language import IMAGE, NOTHING, PAD, TOKEN
from .scenes import ATTRIBUTES, GRID, OBJECTS, Scenes


class Probes(nn.Module):
    """What reads intermediate states, linearly, while the model learns.

    An image token is read by the model's own word embeddings, so that a word finds what it names in the picture.
    """

    READ = {
        "kind": (*OBJECTS, NOTHING),
        "color": (*ATTRIBUTES["color"], NOTHING),
        "size": ATTRIBUTES["size"],
        "background": ATTRIBUTES["background"],
        "corner": ATTRIBUTES["corner"],
    }

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.words = [words]  # in a list: it is the model's, not a part of the probes
        self.meaning = nn.Linear(words.embedding_dim, len(TOKEN))

    def loss(self, features: Tensor, scenes: Scenes, rows: np.ndarray | list[int]) -> Tensor:
        """Cross-entropy of naming, from features (N, 4, width), what is in each corner."""
        total = features.new_zeros((), dtype=torch.float32)
        for name, words in self.READ.items():
            read = self.words[0].weight[[TOKEN[word] for word in words]]
            logits = (features @ read.T).float() / read.shape[1] ** 0.5
            target = np.arange(GRID * GRID)[None] if name == "corner" else getattr(scenes, name)[rows]
            target = torch.from_numpy(target if target.ndim == 2 else target[:, None]).expand(features.shape[:2])
            total = total + cross_entropy(logits.flatten(0, 1), target.flatten())
        return total


def pointing(batch: Batch, scenes: Scenes) -> Tensor:
    """(B, T, T): from an object's name in a question to the image tokens of its picture where the object is."""
    ids, tokens = batch.input_ids, torch.tensor([TOKEN[word] for word in (*OBJECTS, PAD)])
    image = ids == TOKEN[IMAGE]
    picture = (image.cumsum(dim=1) - 1) // (GRID * GRID)  # the last picture so far
    shown = torch.zeros_like(ids)
    shown[image] = tokens[torch.from_numpy(scenes.kind[batch.scenes]).flatten()]
    named = ids.where(torch.isin(ids, tokens) & (batch.weights == 0) & (batch.labels == 0), 0)
    same = (named[:, :, None] == shown[:, None, :]) & (picture[:, :, None] == picture[:, None, :])
    return same & (named[:, :, None] > 0) & image[:, None, :]


def scaffold_loss(
    output: LlavaCausalLMOutputWithPast, batch: Batch, scenes: Scenes, probes: Probes
) -> tuple[Tensor, dict[str, float]]:
    """The four hints as one loss, from an output with attentions and hidden states."""
    features = output.image_hidden_states
    if isinstance(features, list):  # since transformers 5.24
        features = torch.cat(features)
    seen = probes.loss(features.view(-1, GRID * GRID, features.shape[-1]), scenes, batch.scenes)
    loss, log = 0.6 * seen, {"seen": seen.item()}
    matches, points = batch.matches, pointing(batch, scenes)
    for name, layer, there in (("pointing", 0, points), ("matching", -2, matches), ("matching", -1, matches)):
        found = there.any(dim=-1)
        if found.any():
            mass = (output.attentions[layer][:, 0].float() * there).sum(dim=-1)[found]
            loss = loss - (mass + 1e-6).log().mean() / 2
            log[name] = mass.mean().item()
    told = batch.meanings > 0
    if told.any():
        meaning = cross_entropy(probes.meaning(output.hidden_states[-3][told]).float(), batch.meanings[told])
        loss, log["meaning"] = loss + meaning, meaning.item()
    return loss, log
