"""Run a program that loads adapters and does not know HiFICL: ``python -m peft_hificl.run PROGRAM ...``.

PROGRAM is a module, as after ``python -m``, or a script: a path with a slash, or one that ends with ``.py``.  All that
follows is the program's own command line.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys


def main(arguments: list[str]) -> None:
    """Run the program in this process.  HiFICL is registered: the package of this module has been imported."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_hificl.run", usage="%(prog)s PROGRAM ...", description=__doc__
    )
    parser.add_argument("program", metavar="PROGRAM", help="a module, or the path of a script")
    program = parser.parse_args(arguments[:1]).program
    sys.argv = arguments
    if os.path.dirname(program) or program.endswith(".py"):
        if not os.path.exists(program):
            parser.error(f"there is no file {program!r}.")
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(program))  # in the place of the current folder
        runpy.run_path(program, run_name="__main__")
    elif executable(program):
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        parser.error(
            f"there is no module {program!r} that can be executed. For a command give its path: $(which {program})"
        )


def executable(module: str) -> bool:
    """Whether ``python -m`` would find a module, or the `__main__` of a package."""
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError:  # a package that it would be in
        return False
    return spec is not None


if __name__ == "__main__":
    main(sys.argv[1:])
