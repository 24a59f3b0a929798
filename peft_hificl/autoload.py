"""Stored adapters load without `import peft_hificl`, in an environment where that is asked for.

``python -m peft_hificl.autoload on`` writes one file, `peft_hificl_autoload.pth`, into the site-packages of the running
environment; ``off`` removes it; ``status`` says what a new interpreter makes of it.  Python executes the line in this
file at every start.  The line imports no package: it installs a finder that waits for `import peft`, and then imports
`peft_hificl`.
"""

from __future__ import annotations

import argparse
import inspect
import os
import site
import subprocess
import sys
import sysconfig
import uuid
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FILE = "peft_hificl_autoload.pth"


def install() -> None:
    """Import `peft_hificl` right after `peft`.  The source of this function is what the file holds."""
    import sys  # noqa: PLC0415

    class PeftHificlAfterPeft:
        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
            if name != "peft":
                return None
            others = [finder for finder in sys.meta_path if finder is not cls and hasattr(finder, "find_spec")]
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
            loader: Any = spec and spec.loader
            if hasattr(loader, "exec_module"):
                execute = loader.exec_module

                def execute_and_follow(module: ModuleType) -> None:
                    execute(module)
                    if module.__name__ == "peft":  # the loader of an archive is that of all its modules
                        cls.follow()

                loader.exec_module = execute_and_follow
            return spec

        @staticmethod
        def follow() -> None:
            try:
                import peft_hificl  # noqa: F401, PLC0415
            except Exception as error:  # `import peft` is not to fail by this
                if getattr(error, "name", None) != "peft_hificl":  # else it has been uninstalled
                    import warnings  # noqa: PLC0415

                    text = f"peft_hificl cannot be imported, so PEFT does not know HiFICL: {error!r}"
                    warnings.warn(text, stacklevel=2)

    sys.meta_path.insert(0, PeftHificlAfterPeft)


def line() -> str:
    """The content of the file.  Python reports a line that fails at every start, so this one never does."""
    source = f"{inspect.getsource(install)}try:\n    install()\nexcept Exception:\n    pass\n"
    # Python may execute a file twice, and the user's site-packages may have one, too: the first one installs.
    installed = "'PeftHificlAfterPeft' in [getattr(f, '__name__', '') for f in sys.meta_path]"
    flags = annotations.compiler_flag  # as `from __future__ import annotations`, without that import
    return f"import sys; {installed} or exec(compile({source!a}, {FILE!r}, 'exec', {flags}), {{}})\n"


def folders() -> list[Path]:
    """Where this interpreter looks for such files: in the environment's site-packages, then in the user's if at all."""
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [Path(folder) for folder in (sysconfig.get_path("purelib"), *user)]


def switch_on(user: bool = False) -> Path:
    """Write the file into the environment's or the user's site-packages; return its path.

    Raises:
        ValueError: the folder cannot be written to, or is the user's and not read by this interpreter.
    """
    found = folders()
    if user and len(found) == 1:
        raise ValueError(
            f"{sys.executable} does not read the user's site-packages (it belongs to a virtual environment, "
            "or the user's packages are switched off): leave out --user."
        )
    path = found[user] / FILE
    temporary = path.with_name(f".{FILE}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(line(), encoding="ascii")
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): use an environment of your own (python -m venv)"
            f"{', or --user' if len(found) == 2 and not user else ''}."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def switch_off() -> list[Path]:
    """Remove the file wherever this interpreter reads it; return what has been removed.

    Raises:
        ValueError: a file cannot be removed.
    """
    removed = []
    for path in written():
        try:
            path.unlink()
        except OSError as error:
            raise ValueError(f"{path} cannot be removed ({error.strerror}).") from error
        removed.append(path)
    return removed


def written() -> list[Path]:
    return [folder / FILE for folder in folders() if (folder / FILE).is_file()]


def described(path: Path) -> str:
    current = path.read_bytes() == line().encode()
    return f"on: {path}" if current else f"on: {path}, by another version of peft-hificl: call `on` again"


def trial() -> str:
    """Whether PEFT knows HiFICL in a new interpreter that imports `peft` alone."""
    code = "import peft; print('HIFICL' in peft.PeftType.__members__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    if done.stdout.endswith("True\n"):  # whatever else that import prints
        return "A new interpreter: `import peft` registers HiFICL."
    return f"A new interpreter: `import peft` does not register HiFICL.\n{done.stderr}".rstrip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_hificl.autoload", description=__doc__)
    parser.add_argument("command", choices=("on", "off", "status"))
    parser.add_argument("--user", action="store_true", help="with `on`: into the user's site-packages")
    options = parser.parse_args(arguments)
    try:
        if options.command == "on":
            print(f"on: {switch_on(options.user)}")
        elif options.command == "off":
            print("\n".join(f"off: {path} removed" for path in switch_off()) or "off")
        else:
            print("\n".join(map(described, written())) or "off", trial(), sep="\n")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
