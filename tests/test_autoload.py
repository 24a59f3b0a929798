"""`peft_hificl.autoload` and `peft_hificl.run`: adapters load in programs that do not import the package."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_hificl import autoload, run

from .examples import save_chat_model
from .helpers import config, logits

ROOT = Path(__file__).parent.parent
IDS = torch.tensor([[5, 6, 7, 8]])


class Environment:
    """A virtual environment of its own, without pip."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def see(self, *folders: Path | str) -> None:
        (self.site / "packages.pth").write_text("".join(f"{folder}\n" for folder in folders))

    def run(self, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(argument) for argument in (self.python, *arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=cwd)


# -- what the file does, with packages that stand in for peft and peft_hificl -----------------------------------------

PEFT = "print('peft begins')\nready = True\nprint('peft ends')\n"
HIFICL = "from peft import ready\nprint('peft_hificl')\n"


@pytest.fixture
def stand_ins(tmp_path: Path) -> tuple[Environment, Path]:
    environment, packages = Environment(tmp_path / "venv"), tmp_path / "packages"
    packages.mkdir()
    (packages / "peft.py").write_text(PEFT)
    (packages / "peft_hificl.py").write_text(HIFICL)
    environment.see(packages)
    (environment.site / autoload.FILE).write_text(autoload.line())
    return environment, packages


def printed(environment: Environment, code: str, *, errors: str = "") -> list[str]:
    done = environment.run("-P", "-c", code)
    assert done.returncode == 0 and (errors in done.stderr if errors else not done.stderr), done.stderr
    return done.stdout.splitlines()


BOTH = ["peft begins", "peft ends", "peft_hificl"]


@pytest.mark.parametrize(
    "code",
    [
        "import peft",
        "from peft import ready; import peft_hificl",
        "import peft_hificl",
        "import peft, importlib; importlib.import_module('peft')",
        "from importlib.util import find_spec; assert find_spec('peft') and find_spec('peft'); print('-'); import peft",
    ],
)
def test_it_is_imported_right_after_peft_and_once(code: str, stand_ins: tuple[Environment, Path]) -> None:
    assert [line for line in printed(stand_ins[0], code) if line != "-"] == BOTH


def test_a_finder_without_find_spec_is_passed_over(stand_ins: tuple[Environment, Path]) -> None:
    """As Python does with those of old packages."""
    code = "import sys; sys.meta_path.insert(0, type('Old', (), {'find_module': lambda *_: None})()); import peft"
    assert printed(stand_ins[0], code) == BOTH


def test_a_start_imports_nothing_and_leaves_one_finder(stand_ins: tuple[Environment, Path]) -> None:
    environment, _ = stand_ins
    code = "import sys; print(*sorted(sys.modules), sep='\\n')"
    with_it = printed(environment, code)
    (environment.site / autoload.FILE).rename(environment.site / "kept")
    assert printed(environment, code) == with_it
    line = f"{autoload.line()}" * 2
    code = f"{line}print([f.__name__ for f in sys.meta_path].count('PeftHificlAfterPeft'))\nimport peft"
    assert printed(environment, code) == ["1", *BOTH]


def test_a_package_that_was_removed_is_not_missed(stand_ins: tuple[Environment, Path]) -> None:
    environment, packages = stand_ins
    (packages / "peft_hificl.py").unlink()
    assert printed(environment, "import peft; print(peft.ready)") == [*BOTH[:2], "True"]
    (packages / "peft.py").unlink()
    code = "try:\n    import peft\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert printed(environment, code) == ["No module named 'peft'"]


@pytest.mark.parametrize("line", ["import nowhere", "raise RuntimeError('broken')", "1 / 0", "from peft import gone"])
def test_a_package_that_cannot_be_imported_is_told_by_a_warning(line: str, stand_ins: tuple[Environment, Path]) -> None:
    environment, packages = stand_ins
    (packages / "peft_hificl.py").write_text(line)
    found = printed(environment, "import peft; print(peft.ready)", errors="UserWarning: peft_hificl cannot be imported")
    assert found == [*BOTH[:2], "True"]


def test_an_error_of_peft_itself_passes(stand_ins: tuple[Environment, Path]) -> None:
    environment, packages = stand_ins
    (packages / "peft.py").write_text("1 / 0")
    code = "try:\n    import peft\nexcept ZeroDivisionError:\n    print('passed')"
    assert printed(environment, code) == ["passed"]


def test_peft_in_an_archive_and_a_folder_of_that_name(stand_ins: tuple[Environment, Path]) -> None:
    environment, packages = stand_ins
    with zipfile.ZipFile(packages / "all.zip", "w") as archive:
        archive.writestr("peft/__init__.py", f"import peft.part\n{PEFT}")
        archive.writestr("peft/part.py", "")
        archive.writestr("peft_hificl.py", HIFICL)
    environment.see(packages / "all.zip")
    assert printed(environment, "import peft") == BOTH
    (packages / "elsewhere" / "peft").mkdir(parents=True)
    environment.see(packages / "elsewhere")
    assert printed(environment, "import peft; print(peft.__path__)")[0].startswith("_NamespacePath")


def test_no_error_at_a_start_is_shown(stand_ins: tuple[Environment, Path]) -> None:
    """Whatever another file has made of `sys.meta_path` before."""
    environment, _ = stand_ins
    (environment.site / "a.pth").write_text("import sys; sys.meta_path = (*sys.meta_path,)\n")
    assert printed(environment, "print('started')") == ["started"]


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment's site-packages are an empty folder, and the user's are not read."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(autoload, "trial", lambda: "-")
    (tmp_path / "site").mkdir()
    return tmp_path / "site" / autoload.FILE


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    autoload.main(list(arguments))
    return capsys.readouterr().out


def test_on_status_off(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "status") == "off\n-\n"
    for _ in range(2):
        assert said(capsys, "on") == f"on: {here}\n"
        assert here.read_text() == autoload.line() and list(here.parent.iterdir()) == [here]
    assert said(capsys, "status") == f"on: {here}\n-\n"
    here.write_text("import sys")
    assert said(capsys, "status") == f"on: {here}, by another version of peft-hificl: call `on` again\n-\n"
    said(capsys, "on")
    assert said(capsys, "off") == f"off: {here} removed\n" and not here.exists()
    assert said(capsys, "off") == "off\n"


def test_the_users_site_packages(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        autoload.main(["on", "--user"])
    assert "does not read the user's site-packages" in capsys.readouterr().err and not here.exists()
    users = here.parent.parent / "user" / "site"
    monkeypatch.setattr(site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(users))
    assert said(capsys, "on", "--user") == f"on: {users / autoload.FILE}\n" and not here.exists()
    said(capsys, "on")
    assert said(capsys, "off").count("removed") == 2 and not here.exists() and not list(users.iterdir())


def test_a_folder_that_cannot_be_written_to(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    said(capsys, "on")
    before = here.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(ValueError, match=r"cannot be removed \(Permission denied\)"):
            autoload.switch_off()
    for user_site, remedy in ((False, r"\(python -m venv\)\.$"), (True, r"\(python -m venv\), or --user\.$")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            patch.setattr(site, "ENABLE_USER_SITE", user_site)
            with pytest.raises(ValueError, match=rf"cannot be written \(Permission denied\).*{remedy}"):
                autoload.switch_on()
    assert here.read_text() == before and list(here.parent.iterdir()) == [here]


def test_the_folder_is_one_that_this_interpreter_reads() -> None:
    assert autoload.folders()[0].as_posix() in site.getsitepackages()


# -- with the real packages, in processes of their own ----------------------------------------------------------------

WAYS = {
    "PeftModel": """
        from peft import PeftModel
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    """,
    "AutoPeftModel": """
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained("adapter")
    """,
    "transformers": """
        model = AutoModelForCausalLM.from_pretrained("adapter")
    """,
    "pipeline": """
        model = pipeline("text-generation", model="adapter", tokenizer="base").model
    """,
}
BEFORE = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, pipeline
"""
AFTER = """
with torch.no_grad():
    save_file({"logits": model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """An environment that sees this project and this interpreter's packages; and a base model with an adapter."""
    folder = tmp_path_factory.mktemp("real")
    environment = Environment(folder / "venv")
    environment.see(ROOT, *site.getsitepackages())
    save_chat_model(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(1)
    model = get_peft_model(base, config(task_type="CAUSAL_LM")).eval()
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(folder / "adapter")
    save_file({"logits": logits(model, input_ids=IDS)}, folder / "want")
    for way, code in WAYS.items():
        (folder / f"load_{way}.py").write_text(BEFORE + textwrap.dedent(code) + AFTER)
    return environment, folder


def check(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    found, want = (load_file(folder / name)["logits"] for name in ("found", "want"))
    (folder / "found").unlink()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_without_it_every_way_fails(real: tuple[Environment, Path]) -> None:
    environment, folder = real
    done = environment.run("load_transformers.py", "found", cwd=folder)
    assert done.returncode == 1 and "KeyError: 'HIFICL'" in done.stderr


@pytest.mark.slow
def test_autoload_of_the_real_package(real: tuple[Environment, Path]) -> None:
    environment, folder = real
    done = environment.run("-m", "peft_hificl.autoload", "on", cwd=folder)
    path = environment.site / autoload.FILE
    try:
        assert (done.returncode, done.stdout) == (0, f"on: {path}\n"), done.stderr
        for way in WAYS:
            check(folder, environment.run(f"load_{way}.py", "found", cwd=folder))
        done = environment.run("-m", "peft_hificl.autoload", "status", cwd=folder)
        assert done.stdout == f"on: {path}\nA new interpreter: `import peft` registers HiFICL.\n"
    finally:
        path.unlink()


def test_the_launcher_runs_a_script(real: tuple[Environment, Path]) -> None:
    environment, folder = real
    check(folder, environment.run("-m", "peft_hificl.run", "load_transformers.py", "found", cwd=folder))


def test_status_tells_why_it_is_without_effect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = Environment(tmp_path / "venv")
    monkeypatch.setattr(sys, "executable", str(empty.python))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert autoload.trial().startswith("A new interpreter: `import peft` does not register HiFICL.\nTraceback")
    assert autoload.trial().endswith("No module named 'peft'")


# -- what the launcher runs -------------------------------------------------------------------------------------------

SHOW = """
import os, sys
print(__name__, __spec__ and __spec__.name, sys.argv, os.path.abspath(sys.path[0]), os.path.abspath(sys.argv[0]))
assert sys.modules["__main__"].__dict__ is globals() and os.path.samefile(__file__, sys.argv[0])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    programs = ("program.py", "box/__main__.py", "box/part.py", "scripts/tool")
    for name in (*programs, "box/__init__.py", "bare/__init__.py", "peft_hificl/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SHOW if name in programs else "")
    return tmp_path


@pytest.mark.parametrize(
    ("program", "file", "first", "name"),
    [
        ("program", "program.py", ".", "program"),
        ("program.py", "program.py", ".", None),
        ("box", "box/__main__.py", ".", "box.__main__"),
        ("box.part", "box/part.py", ".", "box.part"),
        ("scripts/tool", "scripts/tool", "scripts", None),
    ],
)
def test_a_program_sees_what_python_would_show_it(
    program: str, file: str, first: str, name: str | None, folder: Path
) -> None:
    """As Python itself runs the same program, with options that the launcher is not to read."""
    shutil.copy(run.__file__, folder / "peft_hificl" / "run.py")  # in a package that imports nothing
    arguments = [program, "--help", "-m", "x", "--", "a b"]

    def printed(*start: str) -> str:
        command = [sys.executable, *start, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout

    theirs, ours = printed(*(["-m"] if name else [])), printed("-m", "peft_hificl.run")
    assert ours == theirs
    assert theirs.startswith(f"__main__ {name} ") and theirs.endswith(f"{folder / first} {folder / file}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PROGRAM"),
        (["gone.py"], "there is no file 'gone.py'"),
        (["gone"], r"there is no module 'gone' that can be executed. For a command give its path: \$\(which gone\)"),
        (["bare"], "there is no module 'bare' that can be executed"),
        (["box.gone"], "there is no module 'box.gone'"),
        (["gone.part"], "there is no module 'gone.part'"),
    ],
)
def test_what_cannot_be_run_is_told(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        run.main(arguments)
    assert error.value.code == 2 and re.search(message, capsys.readouterr().err)


# -- the proposal to PEFT ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_proposed_change_of_peft(real: tuple[Environment, Path], tmp_path: Path) -> None:
    """Applied to a copy of the installed PEFT; a package's metadata name the entry point."""
    _, folder = real
    page = (ROOT / "docs" / "peft-entry-points.md").read_text()
    change, entry_point = (page.split(f"```{language}\n")[1].split("```")[0] for language in ("diff", "toml"))
    shutil.copytree(Path(peft.__file__).parent, tmp_path / "src" / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply"], input=change, text=True, check=True, cwd=tmp_path)
    environment = Environment(tmp_path / "venv")
    environment.see(tmp_path / "src", ROOT, *site.getsitepackages())

    done = environment.run("load_transformers.py", "found", cwd=folder)
    assert done.returncode == 1 and "There is no PEFT method 'HIFICL'. It may be newer" in done.stderr

    metadata = tmp_path / "src" / "plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: plugin\nVersion: 1\n")
    ((group, entries),) = tomllib.loads(entry_point)["project"]["entry-points"].items()
    (metadata / "entry_points.txt").write_text(
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
    )
    for way in WAYS:
        check(folder, environment.run(f"load_{way}.py", "found", cwd=folder))
