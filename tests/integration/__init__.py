"""With the code of neighbouring packages: the extra `integration`, and `make test-integration`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reports() -> Iterator[list[str]]:
    """The warnings about adapters that get no gradient or have no effect."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(w.message) for w in caught if re.search("no (gradient|effect)", str(w.message), re.IGNORECASE)]
