"""The environment of the tests, and the fixture of three kinds of model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Outputs are compared bit by bit. Without this, MKL's AVX-512 products round by where their arguments lie in memory.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest

from .helpers import BUILDERS


@pytest.fixture(params=list(BUILDERS))
def kind(request: pytest.FixtureRequest) -> str:
    """A grouped-query decoder, a multi-head decoder and a vision-language model."""
    return request.param
