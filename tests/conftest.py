"""The fixture of three kinds of model."""

from __future__ import annotations

import pytest

from .helpers import BUILDERS


@pytest.fixture(params=list(BUILDERS))
def kind(request: pytest.FixtureRequest) -> str:
    """A grouped-query decoder, a multi-head decoder and a vision-language model."""
    return request.param
