"""The command line: ``python -m peft_hificl COMMAND``."""

from __future__ import annotations

import argparse

from . import convert
from .inspection import command

COMMANDS = {"convert": convert, "inspect": command}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_hificl")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run, error=command.error)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        options.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
