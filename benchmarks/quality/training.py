"""One way to train for every method: the paper's recipe, on the same samples in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import get_cosine_schedule_with_warmup

BATCH = 16
STEPS = {16: 100, 64: 150, 256: 200, 1000: 300}  # by number of training samples
WEIGHT_DECAY, CLIP, WARMUP = 1e-3, 1.0, 0.1


def samples(of: int, number: int, seed: int) -> list[int]:
    """The training samples of a seed; fewer are a part of more."""
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:number].tolist()


def batches(rows: Sequence[int], steps: int, seed: int, size: int = BATCH) -> Iterator[list[int]]:
    """Batches of shuffled samples, epoch after epoch."""
    generator, left = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(steps):
        while len(left) < size:
            left += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        yield left[:size]
        left = left[size:]


def fit(
    model: nn.Module,
    loss: Callable[[list[int]], Tensor],
    groups: list[dict[str, Any]],
    data: Iterator[list[int]],
    steps: int,
    clip: Callable[[list[nn.Parameter], float], object] = clip_grad_norm_,
    optimizer_type: type[AdamW] = AdamW,
) -> float:
    """Train these groups of parameters; return the seconds that it took.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = optimizer_type(groups, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    start = time.perf_counter()
    model.train()
    for rows in data:
        value = loss(rows)
        if not value.isfinite():
            raise FloatingPointError(f"the loss is {value.item()}: the rate is too high")
        value.backward()
        clip(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start
