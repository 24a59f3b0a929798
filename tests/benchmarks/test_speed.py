"""The speed benchmark: its measuring tools, the paper's figures, and one quick run of all of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common.tables import NOT_MEASURED
from benchmarks.speed import measure, paper, presets, report, variants
from benchmarks.speed.__main__ import PARTS

RESULTS = Path(report.__file__).parents[1] / "results"
CPU = torch.device("cpu")


def test_parameters_of_the_paper() -> None:
    llava = paper.parameters("LLaVA-Interleave-Qwen-7B")
    assert llava["hificl"] == 2_228_224  # 2.2M
    assert llava["lora_decoder"] == 16_777_216
    assert llava["lora_everywhere"] == 19_652_608  # 19.7M
    assert llava["mimic"] == 263_168  # 0.26M
    assert llava["mimic_projection"] == 17_040_384  # 17.0M
    assert llava["mimic_projection_read"] == 131_072


@pytest.mark.parametrize("padded", [False, True], ids=["causal", "padded"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_variants_compute_the_same(kv_heads: int, padded: bool) -> None:
    x = variants.make_inputs(presets.PRESETS["quick"], kv_heads, 32, padded, CPU)
    leaves = (x.query, x.key, x.value, x.pairs.keys, x.pairs.values)
    expected = None
    for name, attend in variants.VARIANTS.items():
        if name == variants.PLAIN:
            continue
        output = attend(x)
        found = (output, *torch.autograd.grad(output.square().sum(), leaves))
        expected = expected or found
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine - theirs).abs().max() < 1e-4, name


def test_flops_sees_attention_on_the_cpu() -> None:
    query, key, value = (torch.randn(1, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2))

    def forward() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    products = 2 * 4 * 16 * 16 * 8  # of one product of queries and keys
    assert measure.flops(forward) == 2 * products
    assert measure.flops(lambda: forward().sum().backward()) == 7 * products  # backward forms the scores once more


def test_peak_bytes_counts_what_lives_at_one_time() -> None:
    def one_at_a_time() -> None:
        for _ in range(3):
            torch.zeros(1 << 20)

    assert measure.peak_bytes(one_at_a_time, CPU) == 4 << 20
    assert measure.peak_bytes(lambda: [torch.zeros(1 << 20) for _ in range(3)], CPU) == 12 << 20


def test_growth_exponent() -> None:
    assert measure.growth_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_adapters_share_the_weights_of_the_base() -> None:
    base = presets.build(presets.PRESETS["quick"].model, CPU)
    weights = {parameter.data_ptr() for parameter in base.parameters()}
    for method in presets.CONFIGS:
        frozen = [p for p in presets.adapt(base, method).parameters() if not p.requires_grad]
        assert weights <= {parameter.data_ptr() for parameter in frozen}
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_bars() -> None:
    assert report.Bar("x", "<=", 1.1, 1.05).row()[3] == "yes"
    assert report.Bar("x", ">=", 0.93, 0.9).row()[3] == "NO"
    assert report.Bar("x", "<=", 1.1, None).row()[2] == NOT_MEASURED


@pytest.mark.parametrize("name", ["speed-cpu", "speed-h100"])
def test_the_report_is_that_of_the_results_beside_it(name: str, tmp_path: Path) -> None:
    for path in (RESULTS / name).glob("*.json"):
        shutil.copy(path, tmp_path)
    report.write(tmp_path, PARTS, Console(quiet=True))
    assert (tmp_path / "speed.md").read_text() == (RESULTS / name / "speed.md").read_text()


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    text = (tmp_path / "speed.md").read_text()
    for part in ("attention", "training", "inference", "lifecycle", "rows", "serving", "paper"):
        result = json.loads((tmp_path / f"{part}.json").read_text())
        assert result["records"] and result["hardware"]["cpu"] and result["versions"]["torch"] == torch.__version__
        assert result["command"].startswith("python -m benchmarks.speed --quick")
        assert (tmp_path / f"{part}.png").stat().st_size > 10_000
        assert f"({part}.png)" in text
    for figure in ("2,228,224", "19,652,608", "263,168", "17,040,384", "14.3x", "7.5x"):
        assert figure in text
    assert f"| {NOT_MEASURED} |" in text  # bars are set for lengths that are not among the toy sizes
