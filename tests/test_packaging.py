"""What is published: its metadata, its files, and that it installs and works where nothing else is."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from email.parser import Parser
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import peft_hificl

ROOT = Path(__file__).parent.parent
VERSION = peft_hificl.__version__


def requirements() -> dict[str, list[Requirement]]:
    """Of the package itself ("") and of its extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    return {extra: [Requirement(line) for line in text.split("\n") if line] for extra, text in texts.items()}


def test_changelog_and_citation_name_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    assert headings[0] == ("Unreleased", "") and headings[1][0] == VERSION
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {VERSION}\ndate-released: {headings[1][1]}\n" in citation


def test_the_extra_dev_has_all_others() -> None:
    extras = requirements()
    (own,) = [r for r in extras["dev"] if r.name == "peft-hificl"]
    assert own.extras == extras.keys() - {"", "dev", "frameworks"}  # which has an environment of its own


def test_every_requirement_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)  # none twice
    for requirement in chain(*requirements().values()):
        if requirement.name != "peft-hificl":
            assert versions[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


# -- what is built ----------------------------------------------------------------------------------------------------


def run(*command: str | Path, cwd: Path | None = None) -> str:
    result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, the wheel built from the sdist; both from a copy of the sources."""
    folder = tmp_path_factory.mktemp("packaging")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out", "results")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source")
    return folder / "dist"


@pytest.fixture
def wheel(built: Path) -> Path:
    return built / f"peft_hificl-{VERSION}-py3-none-any.whl"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """The interpreter of an environment without packages."""
    venv.create(tmp_path / "venv", symlinks=True)
    return tmp_path / "venv" / "bin" / "python"


def install(interpreter: Path, *arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", *arguments)


def package() -> set[str]:
    files = (path for path in (ROOT / "peft_hificl").rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package_and_nothing_else(built: Path, wheel: Path) -> None:
    about = f"peft_hificl-{VERSION}.dist-info"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if not name.startswith(f"{about}/")} == package()
    assert {"peft_hificl/__init__.py", "peft_hificl/py.typed", f"{about}/licenses/LICENSE"} <= names

    with tarfile.open(built / f"peft_hificl-{VERSION}.tar.gz") as archive:
        files = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    documents = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg"}
    made = {"PKG-INFO", *(f for f in files if f.startswith("peft_hificl.egg-info/"))}
    assert files == package() | documents | made


@pytest.mark.slow
def test_an_index_would_take_them_and_show_the_readme(built: Path, wheel: Path) -> None:
    from readme_renderer.markdown import render

    files = sorted(built.iterdir())
    assert run(sys.executable, "-m", "twine", "check", "--strict", *files).count("PASSED") == len(files) == 2
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(f"peft_hificl-{VERSION}.dist-info/METADATA").decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    assert description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    shown = render(description)
    assert shown is not None and shown.count("<h2") == len(re.findall("^## ", description, re.MULTILINE))
    assert "<table>" in shown and "<pre" in shown


@pytest.mark.slow
def test_installs_into_an_empty_environment(wheel: Path, empty: Path, tmp_path: Path) -> None:
    install(empty, "--no-index", "--no-deps", wheel)
    code = """
        import json, importlib.metadata, importlib.util
        [found] = importlib.metadata.distributions()
        meta, origin = found.metadata, importlib.util.find_spec("peft_hificl").origin
        print(json.dumps([meta["Name"], meta["Version"], meta["Requires-Python"], found.requires, origin]))
    """
    name, version, python, requires, origin = json.loads(run(empty, "-I", "-c", textwrap.dedent(code), cwd=tmp_path))
    assert (name, version, python) == ("peft-hificl", VERSION, ">=3.11")
    assert Path(origin).is_relative_to(tmp_path)
    needed = [Requirement(text) for text in requires if "extra ==" not in text]
    assert {r.name: r.specifier for r in needed} == {r.name: r.specifier for r in requirements()[""]}


@pytest.mark.slow
def test_works_with_its_dependencies_alone(wheel: Path, empty: Path, tmp_path: Path) -> None:
    install(empty, "--constraint", ROOT / "constraints.txt", wheel)
    code = """
        import torch
        from peft import PeftModel, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
        from peft_hificl import HiFICLConfig

        sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), HiFICLConfig(init_weights=False))
        ids = torch.tensor([[3, 4, 5]])
        model(input_ids=ids, labels=ids).loss.backward()
        want = model.eval()(input_ids=ids).logits
        model.save_pretrained("adapter")
        model = PeftModel.from_pretrained(model.unload(), "adapter")
        print(torch.equal(model(input_ids=ids).logits, want))
    """
    assert run(empty, "-I", "-c", textwrap.dedent(code), cwd=tmp_path) == "True\n"
