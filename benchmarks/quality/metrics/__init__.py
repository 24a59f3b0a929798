"""The four metrics of the quality benchmark, as modules of Hugging Face `evaluate` that are loaded from this folder.

Nothing is downloaded. Each module is one script that imports nothing from this repository, so that
`evaluate.load("benchmarks/quality/metrics/cider")` gives the same metric anywhere.
"""

from __future__ import annotations

import functools
from pathlib import Path

import evaluate


@functools.cache
def load(name: str) -> evaluate.EvaluationModule:
    """The metric of that name: `exact_match`, `vqa_accuracy`, `cider` or `chair`; each is loaded once per process.

    Example:
        >>> load("exact_match").compute(predictions=["two", "red"], references=[["two", "2"], ["blue"]])
        {'exact_match': 0.5}
    """
    # In memory: a file would stay locked after a `compute` that raises, and the next one would wait for it.
    return evaluate.load(str(Path(__file__).resolve().parent / name), keep_in_memory=True)
