"""README and docs: their Python runs as written, and the site has every page, link and public name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mkdocstrings import Inventory

import peft_hificl
from benchmarks.quality.frame import load
from benchmarks.quality.statistics import interval
from benchmarks.real_base import report as real_base_report
from benchmarks.real_base import runner as real_base_runner
from benchmarks.real_base.__main__ import CACHE
from benchmarks.real_base.tasks import TASKS
from docs.figures import head, pairs
from peft_hificl import inspection

from .helpers import PREFIX_TUNING_GENERATES, byte_tokenizer, llama

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def is_fence(token: Token, language: str) -> bool:
    return token.type == "fence" and token.info == language


PARSED = {page.relative_to(ROOT).as_posix(): MarkdownIt().parse(page.read_text()) for page in PAGES}
ELSEWHERE = {"docs/guides/hub.md"}  # run by test_hub.py, which has a hub
WITH_PYTHON = [
    page
    for page, tokens in PARSED.items()
    if page not in ELSEWHERE and any(is_fence(token, "python") for token in tokens)
]


REAL_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of README's example: a folder of this name is taken before the Hub


def run_blocks(page: str, capsys: pytest.CaptureFixture[str], printing: bool) -> None:
    """In order, in one namespace; with `printing`, a block of text right after one is what it prints."""
    namespace: dict[str, object] = {"__name__": page}
    tokens = PARSED[page]
    for index, block in enumerate(tokens):
        if is_fence(block, "python"):
            line = block.map[0] + 1  # so that a traceback names the page's own lines
            exec(compile("\n" * line + block.content, page, "exec"), namespace)
            printed = capsys.readouterr().out
            if printing and index + 1 < len(tokens) and is_fence(tokens[index + 1], "text"):
                assert printed == tokens[index + 1].content, f"{page}, the block of line {line}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run_as_written(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In README a tiny model stands for the real one, so it prints something else: see the next test."""
    if page == "docs/guides/export.md" and not PREFIX_TUNING_GENERATES:
        pytest.skip("prefix tuning has no effect on generate with these versions")
    monkeypatch.chdir(tmp_path)
    real = REAL_BASE in (ROOT / page).read_text()
    if real:
        llama(vocab_size=256).save_pretrained(tmp_path / REAL_BASE)
        byte_tokenizer(pad_token="!").save_pretrained(tmp_path / REAL_BASE)
    run_blocks(page, capsys, printing=not real)


@pytest.mark.slow
@pytest.mark.skipif(not (CACHE / "model").exists(), reason="needs `make real-base`")
@pytest.mark.filterwarnings("ignore")
def test_readme_shows_what_the_real_model_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / REAL_BASE).parent.mkdir()
    (tmp_path / REAL_BASE).symlink_to(CACHE / "model")
    run_blocks("README.md", capsys, printing=True)


SCORES = {
    "lora-3": "LoRA, r = 3",
    "lora-8": "LoRA, r = 8",
    "lora-16": "LoRA, r = 16",
    "prefix-demos": "prefix tuning, from demonstrations",
    "hificl": "HiFICL, from demonstrations, slower keys",
    "hificl-n16": "the same with n = 16",
    "hificl-paper": "HiFICL, the paper's start and one rate",
    "hificl-paper-keys": "HiFICL, the paper's start, slower keys",
}


TRAINED_LANGUAGE_MODEL = {
    "lora-8": "LoRA, r = 8",
    "lora-mlp": "LoRA on the MLP, r = 2",
    "lora-3": "LoRA, r = 3",
    "lora-qv": "LoRA on q and v, r = 6",
    "ia3": "IA3",
    "prefix-demos": "prefix tuning, from demonstrations",
    "hificl-skip-demos-balanced": "HiFICL as in the example, n = 8, r = 8",
    "hificl-skip-demos": "the same without `balance_factors`",
    "hificl-skip-demos-balanced-keys-1": "the example with one rate",
    "hificl-skip-demos-kv-balanced": 'the example with `heads="kv"`',
    "hificl-skip-demos-balanced-kv-lora": 'the example with `heads="kv"`, and LoRA r = 2',
    "hificl-paper": "HiFICL, the paper's start",
}
IN_README = [
    "lora-8", "lora-3", "prefix-demos", "hificl-skip-demos-balanced", "hificl-skip-demos-kv-balanced",
    "hificl-skip-demos-balanced-kv-lora", "hificl-paper",
]  # fmt: skip
SEEDS = range(10, 15)  # those that every method was trained with; some have more with 16 samples


def rows_of_the_language_model(methods: Iterable[str]) -> set[str]:
    """Mean scores by number of samples, and the divergence from the base model, of the test data."""
    folder = ROOT / "benchmarks" / "results" / "real_base-gpu"
    found = real_base_report.Results(real_base_runner.load(folder, TASKS), "test")
    rows = set()
    for method in methods:
        scores, kls = [], []
        for size in (16, 64, 256):
            cells = [[found.cell(task, method, size)[seed] for seed in SEEDS] for task in TASKS]
            mean = interval([fmean(record["score"] for record in of) for of in zip(*cells, strict=True)])
            scores.append(f"{100 * mean.mean:.1f} ± {100 * mean.half:.1f}")
            records = [record for cell in cells for record in cell]
            kls.append(f"{fmean(record['general_kl'] for record in records):.1f}")
        title = TRAINED_LANGUAGE_MODEL[method]
        rows.add(f"| {title} | {records[0]['parameters']:,} | {' | '.join(scores)} | {', '.join(kls)} |")
    prompts = interval(list(real_base_report.by_task(found, real_base_report.PROMPTS, "8-shot")[-1].values()))
    return rows | {f"| 8-shot prompt | 0 | {100 * prompts.mean:.1f} ± {100 * prompts.half:.1f} | - | - | 0 |"}


def test_tables_and_picture_show_the_stored_results(tmp_path: Path) -> None:
    results = load(head.RESULTS)
    found = [(method, [interval(results.means(method, size)) for size in head.SIZES]) for method in SCORES]
    rows = {
        f"| {SCORES[method]} | {results.parameters(method)[-1]:,} | "
        + " | ".join(f"{100 * point.mean:.1f} ± {100 * point.half:.1f}" if point else "-" for point in points)
        + " |"
        for method, points in found
    }
    rows |= rows_of_the_language_model(TRAINED_LANGUAGE_MODEL)
    for page, methods in (("README.md", IN_README), ("docs/results.md", list(TRAINED_LANGUAGE_MODEL))):
        starts = tuple(
            f"| {title} | " for title in (*SCORES.values(), *TRAINED_LANGUAGE_MODEL.values(), "8-shot prompt")
        )
        shown = {line for line in (ROOT / page).read_text().splitlines() if line.startswith(starts)}
        assert shown >= rows_of_the_language_model(methods) and shown <= rows, page
    head.draw(tmp_path / "head.png")
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_the_pairs_is_drawn_from_the_stored_results(tmp_path: Path) -> None:
    pairs.draw(json.loads(pairs.RESULTS.read_text()), tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a link or an anchor that leads nowhere is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_api_reference_has_every_public_name(site: Path) -> None:
    with (site / "objects.inv").open("rb") as file:
        described = set(Inventory.parse_sphinx(file))
    assert {f"peft_hificl.{name}" for name in peft_hificl.__all__} <= described
    assert {f"peft_hificl.inspection.{name}" for name in inspection.__all__} <= described


class Loads(HTMLParser):
    """The addresses that a page has a browser load."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            value for name, value in attrs if value and (name == "src" or (tag == "link" and name == "href"))
        ]


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """Links may lead elsewhere; scripts, styles, fonts and pictures may not."""
    loaded = [address for page in site.rglob("*.html") for address in Loads(page).found]
    loaded += [
        found for style in site.rglob("*.css") for found in re.findall(r"""url\(["']?([^"')]+)""", style.read_text())
    ]
    assert any(address.endswith("head.png") for address in loaded)
    assert not [address for address in loaded if re.match(r"\w+://|//", address)]
