"""The site is the pages of the repository, each where it lies there, with the files that they show or link to."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PATTERNS = (
    "*.md", "*.cff", "*.toml", "LICENSE", "Makefile", "docs/**/*.md", "docs/**/*.png", "docs/*.css", "examples/*",
    "integrations/*/*", "benchmarks/*/**/*.md", "benchmarks/**/*.png", "benchmarks/results/*/*.json", "tests/**/*.py",
)  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    ours = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern) if path.is_file())
    places = (config.site_dir, config.use_directory_urls)
    of_repository = [File(path.relative_to(ROOT).as_posix(), str(ROOT), *places) for path in ours]
    return Files([*of_repository, *(file for file in files if file.src_dir != config.docs_dir)])
