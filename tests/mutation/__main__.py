"""Deliberate faults in the package: how many of them do its tests find?

    python -m tests.mutation [MODULE[.FUNCTION] ...] [--sample N] [--seed S] [--again] [--report]

Each mutant is a copy of the package with one change (see `mutants`), on which the tests of the module run (`TESTS`),
in a fork of this process, so that torch and transformers are imported once.  Results are appended to `results.jsonl`;
what is there for a function as it stands is not run anew (`--again`: but for the survivors).  `README.md` is written
from them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .mutants import apply, mutants_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, EQUIVALENT, REPORT = HERE / "results.jsonl", HERE / "equivalent.json", HERE / "README.md"

WITHOUT_COMPILER = ("-k", "not compiles and not exports")  # minutes of torch.compile, which tell whether it can trace
LONG = ("compil", "process", "snippet", "the_import", "family", "zoo", "tower", "image", "fuzz")
WITHOUT_ZOO = ("-k", " and ".join(f"not {word}" for word in LONG))
WHICH_COMPILERS = "tests/test_export.py::test_which_compilers_run_kernels"
OFFLOADED = [
    f"tests/test_offload.py::test_{name}"
    for name in (
        "an_offloaded_adapter_that_would_not_learn_is_refused",
        "an_adapter_that_is_dispatched_but_not_offloaded_learns",
        "a_later_adapter_has_the_dtype_that_the_base_has_by_then",
        "a_load_that_fails_leaves_nothing_in_the_device_map",
    )
]
# What pytest is given for each module: the quickest finders first, as the first failure ends the run.
TESTS: dict[str, list[str]] = {
    "ops/formula": ["tests/test_formula.py"],
    "ops/merged": ["tests/test_merged.py", "tests/test_kernels.py", *WITHOUT_COMPILER],
    "ops/calls": ["tests/test_merged.py", "tests/test_kernels.py", WHICH_COMPILERS, *WITHOUT_COMPILER],
    "ops/kernels": ["tests/test_kernels.py", "tests/test_merged.py", *WITHOUT_COMPILER],
    "ops/packages": ["tests/test_flash_packages.py", *WITHOUT_COMPILER],
    "layer": [
        "tests/test_pair_weights.py",
        "tests/test_adapter_names.py",
        "tests/test_demonstrations.py",
        "tests/test_watch.py",
        "tests/test_peft_api.py",
        "tests/test_loading.py",
        *OFFLOADED,
        *WITHOUT_ZOO,
    ],
    "model": [
        "tests/test_loading.py",
        "tests/test_peft_api.py",
        "tests/test_adapter_names.py",
        *OFFLOADED,
        *WITHOUT_ZOO,
    ],
    "checkpoint": [
        "tests/test_loading.py",
        "tests/test_bad_input.py",
        "tests/test_peft_api.py::test_an_adapter_from_the_hub",
        *WITHOUT_ZOO,
    ],
}

Row = dict[str, Any]

INTRODUCTION = """
Would the tests notice? Each mutant is the package with one fault: an operator, a comparison or a constant exchanged, a
condition negated or a part of it dropped, a statement, a keyword argument, a decorator, a `with` or a bound of a slice
dropped, two arguments swapped, None returned. Annotations, docstrings, imports, f-strings and the words of errors and
log messages are left alone. A mutant is found if one of its module's tests fails (or takes three times as long); the
tests are named in `__main__.py`, and leave out what `torch.compile` and `torch.export` make of the code. CUDA's kernels
and flash attention packages run as stand-ins that have the real signatures and compute the definition
(`tests/cuda_kernels.py`, `tests/flash_packages.py`).

Equivalent mutants change nothing that can be observed; `equivalent.json` lists each with the reason. They are not
counted in the share of survivors. A result holds as long as the function that the fault is in stays as it is, letter by
letter; when it is edited, its mutants run anew.

The table says how many mutants of each module have run: samples, where not all have, drawn with `--seed 1`, beside
what earlier runs left of functions that have stayed the same.

    make mutation                                                # all mutants of all modules, niced; may be stopped
    python -m tests.mutation ops/merged --sample 100 --seed 1         # a sample of one module
    python -m tests.mutation ops/merged --again                       # the survivors, after a test was added
"""
TABLE = (
    "| module | mutants | run | found | by timeout | equivalent | survived | of those not equivalent | CPU minutes |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
)


def source_of(module: str) -> str:
    return (ROOT / "peft_hificl" / f"{module}.py").read_text()


def preload() -> None:
    """Everything that the tests import but the package under test."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in (
        "accelerate", "functorch.compile", "hypothesis", "onnxruntime", "peft", "safetensors.torch",
        "torch._dynamo.testing", "torch.export", "transformers.exporters", "transformers.integrations.executorch",
    ):  # fmt: skip
        importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    for name in ("LlamaForCausalLM", "LlavaForConditionalGeneration", "Qwen2ForCausalLM", "SiglipVisionModel"):
        getattr(transformers, name)  # it imports its models when they are asked for
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "peft_hificl")]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # pytest collects garbage at its end: seconds for what torch and transformers have made


class FirstFailure:
    """A pytest plugin that writes down which test failed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.path.write_text(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.path.write_text("import")


def run(tree: Path, arguments: list[str], limit: int, write_bytecode: bool = False) -> tuple[str, str, float]:
    """Whether the fault "survived", was "killed" or took more than `limit` CPU seconds; by which test; CPU seconds."""
    import pytest

    first = tree / "first-failure"
    first.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        signal.alarm(20 * limit)  # it may wait for ever
        # Mutants of one length, made within one second, look the same to Python's cache.
        sys.dont_write_bytecode = not write_bytecode
        os.environ["PYTHONDONTWRITEBYTECODE"] = "" if write_bytecode else "1"
        output = os.open(tree / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
        os._exit(pytest.main([*options, *arguments], plugins=[FirstFailure(first)]))
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what a test may have started
    test = first.read_text() if first.exists() else ""
    if os.WIFSIGNALED(status):
        slow = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
        return "timeout" if slow else "killed", test, seconds
    return "survived" if status == 0 else "killed", test, seconds


def known() -> list[Row]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def key_of(row: Row) -> tuple[str, ...]:
    return row["module"], row["function"], row["line"], row["change"], row["nth"]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last result of each mutant whose function is still what it was."""
    results = {(*key_of(row), row["of"]): row for row in rows}
    mutants = [(module, *mutant.key, mutant.of) for module in TESTS for mutant in mutants_of(source_of(module))]
    return [results[mutant] for mutant in mutants if mutant in results]


def mutate(module: str, function: str, sample: int | None, seed: int, again: bool, tree: Path) -> None:
    source = source_of(module)
    mutants = [mutant for mutant in mutants_of(source) if f"{mutant.function}.".startswith(function)]
    chosen = mutants
    if sample is not None and sample < len(mutants):
        chosen = random.Random(seed).sample(mutants, sample)
    rows = latest(known())
    judge(rows)
    done = {key_of(row) for row in rows}
    once_more = {key_of(row) for row in rows if again and row["outcome"] == "survived"}
    wanted = once_more | ({(module, *mutant.key) for mutant in chosen} - done)
    todo = [mutant for mutant in mutants if (module, *mutant.key) in wanted]
    if not todo:
        return
    outcome, test, base = run(tree, TESTS[module], 3600, write_bytecode=True)
    if outcome != "survived":
        sys.exit(f"The tests of {module} fail without any fault: {test}\n{(tree / 'output').read_text()[-3000:]}")
    path = tree / "peft_hificl" / f"{module}.py"
    shutil.rmtree(path.parent / "__pycache__")
    print(f"{module}: {len(todo)} mutants to run; its tests take {base:.0f} s without a fault", flush=True)
    # The tests that found the last faults, most of which find the next one too.
    found = [row["test"] for row in reversed(known()) if row["module"] == module and "::" in row["test"]]
    finders = list(dict.fromkeys(found))[:12]
    for i, mutant in enumerate(todo, 1):
        path.write_text(apply(source, mutant))
        limit, seconds, outcome = int(3 * base + 30), 0.0, "survived"
        for tests in filter(None, (finders, TESTS[module])):
            outcome, test, more = run(tree, tests, limit)
            seconds += more
            if outcome != "survived":
                break
        if "::" in test:
            finders = [test, *(finder for finder in finders if finder != test)][:12]
        row = {
            "module": module,
            "function": mutant.function,
            "line": mutant.line,
            "change": mutant.change,
            "nth": mutant.nth,
            "of": mutant.of,
            "outcome": outcome,
            "test": test,
            "seconds": round(seconds, 1),
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if outcome != "killed" or i % 20 == 0:
            print(f"{i}/{len(todo)} {outcome}: {mutant.function}: {mutant.line}: {mutant.change}", flush=True)
    path.write_text(source)


def judge(rows: list[Row]) -> None:
    """Mark what survived because it changes nothing that can be seen, or cannot be seen here."""
    reasons = {}
    for entry in json.loads(EQUIVALENT.read_text()):
        for change in entry["changes"]:
            reasons[entry["module"], entry["function"], entry["line"], change] = entry["reason"]
    mutants = [(module, *mutant.key[:3]) for module in TESTS for mutant in mutants_of(source_of(module))]
    for stale in sorted(reasons.keys() - set(mutants)):
        print("equivalent.json has an entry for what is not in the source any more:", *stale, sep="\n    ")
    for row in rows:
        row["reason"] = reasons.get(key_of(row)[:4])
        if row["outcome"] == "survived" and row["reason"] is not None:
            row["outcome"] = "equivalent"


def line_of(name: str, mutants: int, rows: list[Row]) -> str:
    counts = Counter(row["outcome"] for row in rows)
    counted = len(rows) - counts["equivalent"]
    cells = [
        name, mutants, len(rows), counts["killed"] + counts["timeout"], counts["timeout"], counts["equivalent"],
        counts["survived"], f"{counts['survived'] / counted:.1%}" if counted else "",
        round(sum(row["seconds"] for row in rows) / 60),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def report() -> None:
    rows = latest(known())
    judge(rows)
    sizes = {module: len(mutants_of(source_of(module))) for module in TESTS}
    text = ["# Deliberate faults", "", *INTRODUCTION.strip().splitlines(), "", *TABLE]
    text += [line_of(f"`{m}`", size, [row for row in rows if row["module"] == m]) for m, size in sizes.items()]
    text.append(line_of("all", sum(sizes.values()), rows))
    for outcome, title in (("survived", "Survivors"), ("equivalent", "Equivalent")):
        text += ["", f"## {title}", ""]
        for row in rows:
            if row["outcome"] == outcome:
                why = f": {row['reason']}" if row["reason"] else ""
                where = f"`{row['module']}.{row['function']}`"
                text.append(f"- {where}: `{row['line']}`: {row['change']}{why}")
    REPORT.write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    names = f"of {', '.join(TESTS)}, or one of its functions or classes; all if left out"
    parser.add_argument("modules", nargs="*", metavar="MODULE[.FUNCTION]", help=names)
    parser.add_argument("--sample", type=int, help="so many mutants of each module, not all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--again", action="store_true", help="run what survived, of all, once more")
    parser.add_argument("--report", action="store_true", help="write the report and run nothing")
    arguments = parser.parse_args()
    if unknown := {name for name in arguments.modules if name.partition(".")[0] not in TESTS}:
        parser.error(f"no such module: {', '.join(sorted(unknown))}")
    if not arguments.report:
        preload()
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder)
            ignore = shutil.ignore_patterns("__pycache__", "mutation")
            for name in ("peft_hificl", "tests"):
                shutil.copytree(ROOT / name, tree / name, ignore=ignore)
            shutil.copy(ROOT / "pyproject.toml", tree)
            for name in arguments.modules or TESTS:
                module, dot, function = name.partition(".")
                mutate(module, function + dot, arguments.sample, arguments.seed, arguments.again, tree)
    report()


if __name__ == "__main__":
    main()
