"""The faults that `python -m tests.mutation` makes."""

from __future__ import annotations

import ast

import pytest

from .mutation.mutants import apply, mutants_of

SOURCE = '''"""A module."""
from __future__ import annotations
import torch

LIMITS: dict[str, int] = {"low": 0}


@decorated
def f(x: int | None = None, *, flag: bool = True) -> int:
    """Not to be changed: 1 == 1."""
    if x is None and not flag:
        raise ValueError("not to be changed: " + str(1 + 1))
    logger.debug("not to be changed")
    y = g(x, 2, scale=0.5)
    y = y * -3 if x < (3) else y[1:]
    with torch.no_grad():
        h(f"not to be changed: {x}")
    return [z for z in y if z in (x, flag)]
'''

CHANGES = [
    ("", '"low"', "'low_'"),
    ("", "0", "1"),
    ("f", "drop @decorated", ""),
    ("f", "None", "1"),
    ("f", "True", "False"),
    ("f", "x is None and not flag", "x is None or not flag"),
    ("f", "x is None", "x is not None"),
    ("f", "drop the operand x is None", ""),
    ("f", "not flag", "flag"),
    ("f", "x is None and not flag", "not (x is None and not flag)"),
    ("f", "swap x, 2", ""),
    ("f", "drop scale=0.5", ""),
    ("f", "2", "3"),
    ("f", "0.5", "1.5"),
    ("f", "y * -3", "y / -3"),
    ("f", "-3", "3"),
    ("f", "x < (3)", "x <= (3)"),
    ("f", "x < (3)", "x >= (3)"),
    ("f", "drop the bound of 1:", ""),
    ("f", "drop with torch.no_grad()", ""),
    ("f", "return [z for z in y if z in (x, flag)]", "None"),
    ("f", "z in (x, flag)", "z not in (x, flag)"),
]


def test_every_kind_of_fault_is_made() -> None:
    found = {(mutant.function, mutant.change) for mutant in mutants_of(SOURCE)}
    wanted = {(function, f"{before} -> {after}" if after else before) for function, before, after in CHANGES}
    assert wanted <= found
    dropped = [mutant.line for mutant in mutants_of(SOURCE) if mutant.change == "drop the statement"]
    assert [line.partition("(")[0] for line in dropped] == [
        "raise ValueError",
        "logger.debug",
        "y = y * -3 if x < ",
        "h",
    ]


def test_each_is_another_module_that_parses_and_leaves_messages_alone() -> None:
    mutants = mutants_of(SOURCE)
    texts = [apply(SOURCE, mutant) for mutant in mutants]
    trees = {ast.dump(ast.parse(text)) for text in texts}
    assert len(trees) == len({mutant.key for mutant in mutants}) == len(mutants)
    assert ast.dump(ast.parse(SOURCE)) not in trees
    for mutant, text in zip(mutants, texts, strict=True):
        gone = SOURCE.count("not to be changed") - text.count("not to be changed")
        assert gone == (mutant.change == "drop the statement" and "not to be changed" in mutant.line + "h(f"), mutant


@pytest.mark.parametrize("edit", ["\n\nOTHER = 3\n", "\n\ndef before():\n    return 1\n"])
def test_a_fault_keeps_its_name_when_the_module_is_edited_elsewhere(edit: str) -> None:
    edited = SOURCE.replace("import torch\n", "import torch\n" + edit)
    assert {m.key for m in mutants_of(SOURCE)} < {m.key for m in mutants_of(edited)}
