"""The package's imports run one way, and its maths knows torch alone."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import peft_hificl

ROOT = Path(peft_hificl.__file__).parent
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """The modules of the package that a module imports, for types too, and the packages outside."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            folder = module.split(".")[: -node.level]
            start = ".".join([*folder, *([node.module] if node.module else [])])
            names = {f"{start}.{alias.name}".lstrip(".") for alias in node.names} & MODULES.keys()
            inside |= names or {start}
    return inside, outside


def test_imports_run_one_way() -> None:
    order = list(TopologicalSorter({module: imports_of(module)[0] for module in MODULES}).static_order())
    assert order.index("__init__") > order.index("model") > order.index("ops.formula")


def test_the_maths_imports_torch_alone() -> None:
    for module in MODULES:
        if module.startswith("ops."):
            inside, outside = imports_of(module)
            assert all(name.startswith("ops.") for name in inside)
            assert outside <= {"__future__", "collections", "contextlib", "itertools", "logging", "torch", "typing"}
