"""The paper's recipe, and the decoding of its evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RATE, RATE_OF_QK_NORM = 5e-3, 5e-4  # HiFICL's, for models without and with normalised queries and keys
WEIGHT_DECAY, WARMUP, CLIP = 1e-3, 0.1, 1.0
BATCH, ACCUMULATION = 2, 2
EPOCHS, SAMPLES = 3, 1000  # the authors' runs have 3 to 5 epochs
NEW_TOKENS, LENGTH_PENALTY = 20, 0.0


@dataclass(frozen=True)
class Sizes:
    """HiFICL's size."""

    n: int = 8
    r: int = 8


def beams(model_type: str) -> int:
    """Beams of the paper's evaluation: 1 for Idefics2, 3 for the others."""
    return 1 if model_type == "idefics2" else 3


def split_batch(processes: int) -> tuple[int, int]:
    """Rows of a process and steps to accumulate, so that any number of processes makes the paper's batch of four.

    Raises:
        ValueError: four rows cannot be shared among so many.
    """
    whole = BATCH * ACCUMULATION
    if whole % processes:
        raise ValueError(f"A batch of {whole} cannot be shared among {processes} processes: use 1, 2 or 4.")
    rows = min(BATCH, whole // processes)
    return rows, whole // processes // rows


def as_record() -> dict[str, Any]:
    return {
        "optimizer": "AdamW", "weight_decay": WEIGHT_DECAY, "schedule": "cosine", "warmup": WARMUP, "clip": CLIP,
        "batch": BATCH, "accumulation": ACCUMULATION, "max_new_tokens": NEW_TOKENS, "length_penalty": LENGTH_PENALTY,
    }  # fmt: skip
