"""What kind of token each position of a batch holds: the first, of an image, of the question, of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..rows import placeholders

Kinds = Sequence[Sequence[str]]  # one per row and token


def token_kinds(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    **others: Any,
) -> Kinds:
    """The kind of each token of a batch: "padding", "first", "image", "answer" or "question".

    Args:
        model: the model, whose configuration knows the ids that stand for images, videos and sounds.
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``; zeros are padding.
        labels: ``(B, T)``; tokens with a label other than -100 are the answer.  (Tokens that `generate` adds are taken
            for the answer later on.)
        others: other inputs of the model, so that ``token_kinds(model, **batch)`` can be written.

    Returns:
        A list of kinds for each row.  "first" is the first token that is no padding, which may be an attention sink;
        "question" is whatever is nothing else.

    Example:

        >>> import torch
        >>> labels = torch.tensor([[-100, -100, -100, 4]])
        >>> token_kinds(torch.nn.Identity(), torch.tensor([[1, 2, 3, 4]]), labels=labels)
        [['first', 'question', 'question', 'answer']]
    """
    images = placeholders(model)
    kinds = []
    for row, ids in enumerate(input_ids.tolist()):
        visible = [True] * len(ids) if attention_mask is None else attention_mask[row].bool().tolist()
        answer = [False] * len(ids) if labels is None else (labels[row] != -100).tolist()
        first = visible.index(True) if any(visible) else -1
        kinds.append(
            [
                "padding" if not seen
                else "first" if place == first
                else "image" if token in images
                else "answer" if said
                else "question"
                for place, (token, seen, said) in enumerate(zip(ids, visible, answer, strict=True))
            ]
        )  # fmt: skip
    return kinds


def of_seen(seen: Tensor) -> list[list[str]]:
    """Kinds of tokens of which nothing is known but which of them are no padding, (B, T): "first" and "other"."""
    return [
        ["padding" if not here else "first" if place == row.index(True) else "other" for place, here in enumerate(row)]
        for row in seen.tolist()
    ]


def checked(kinds: Kinds, rows: int, length: int) -> list[list[str]]:
    """Kinds for so many rows and tokens: those given and, for tokens that came after them, "answer".

    Raises:
        ValueError: they are of another batch.
    """
    if len(kinds) != rows or any(len(row) > length for row in kinds):
        raise ValueError(
            f"kinds has {len(kinds)} rows of up to {max(map(len, kinds), default=0)} tokens, but {rows} rows of "
            f"{length} tokens were recorded: give the kinds of the recorded inputs."
        )
    return [[*row, *["answer"] * (length - len(row))] for row in kinds]
