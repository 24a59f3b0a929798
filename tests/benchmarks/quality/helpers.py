"""Tasks of a few examples, for tests that train or answer."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.quality import encoding, tasks

SMALL_SIZES = {"train": 64, "validation": 16, "test": 24}
SMALL_SCENES = {"train": 1000, "validation": 600, "test": 600}


@contextmanager
def small_tasks() -> Iterator[None]:
    """Tasks of few examples; nothing that is kept for the process outlives it."""
    kept = (tasks._scenes, encoding.encoded_task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "SIZES", SMALL_SIZES)
        patch.setattr(tasks, "SCENES", SMALL_SCENES)
        for function in kept:
            function.cache_clear()
        yield
    for function in kept:
        function.cache_clear()
