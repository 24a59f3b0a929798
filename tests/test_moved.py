"""Module paths of before 0.1.0 are still importable, and say where their contents went."""

from __future__ import annotations

import importlib

import pytest

import peft_hificl


@pytest.mark.parametrize(
    ("path", "name", "now"),
    [
        ("functional", "virtual_attention", "peft_hificl.ops.formula"),
        ("fused", "attention_path", "peft_hificl.ops.merged"),
        ("kernels", "KERNELS", "peft_hificl.ops.kernels"),
        ("attention", "hificl_attention_forward", "peft_hificl.interface"),
        ("attention", "why_unsupported", "peft_hificl.support"),
    ],
)
def test_an_old_path_leads_to_the_new_one(path: str, name: str, now: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"peft_hificl\.{path}\.{name} has moved to {now}\.{name}"):
        found = getattr(importlib.import_module(f"peft_hificl.{path}"), name)
    assert found is getattr(importlib.import_module(now), name)
    with pytest.warns(DeprecationWarning):
        exec(f"from peft_hificl.{path} import {name}")
    assert getattr(peft_hificl, path).__name__ == f"peft_hificl.{path}"


def test_what_was_never_there_is_not_found() -> None:
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from peft_hificl.functional import nothing")
