"""`python -m tests.peer_suite [-k EXPRESSION ...]`: see the package's docstring. Further arguments are pytest's."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import pytest

from . import models, plugin

FOLDER = Path(__file__).parents[2] / ".peer-suite"
MODULES = (
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_custom_models",
    "test_config",
)


def unpack() -> Path:
    """PEFT's tests of the installed version, as a package whose name is not that of this project's tests."""
    release = f"peft-{version('peft')}"
    package = FOLDER / release / plugin.PACKAGE
    if not package.exists():
        archive = FOLDER / f"{release}.tar.gz"
        if not archive.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
            subprocess.run([*pip, "--dest", str(FOLDER), release.replace("-", "==")], check=True)
        with tarfile.open(archive) as contents:
            contents.extractall(FOLDER, filter="data")
        tests = FOLDER / release / "tests"
        (tests / "__init__.py").touch()
        tests.rename(package)
    return package


def main(arguments: list[str]) -> int:
    package = unpack()
    sys.path.insert(0, str(package.parent))
    os.chdir(models.build(FOLDER / "models"))  # a model's name on a hub is a folder here
    options = ["--quiet", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-p", "no:randomly", "-W", "ignore"]
    options += ["--rootdir", str(package.parent), "--override-ini", "addopts="]
    return pytest.main([*options, *(str(package / f"{name}.py") for name in MODULES), *arguments], plugins=[plugin])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
