"""Scale on paper: counts are those of the formulas, and the stored tables those of the stored records."""

import json

import pytest

from benchmarks.scale import __main__ as scale

TINY = {"tiny": lambda: scale._llama(64, 2, 4, 2, 32, 100)}  # heads of 16 dimensions


def test_counts_are_those_of_the_formulas(monkeypatch):
    monkeypatch.setattr(scale, "MODELS", TINY)
    record = scale.compute("tiny")
    layers, hidden, words = 2, 64, 100
    projections = hidden * (64 + 32 + 32 + 64)
    matrices = layers * (projections + 3 * hidden * 32) + words * hidden
    assert record["weights"] == matrices + words * hidden + (2 * layers + 1) * hidden
    assert record["token"] == 2 * (matrices + (2 * layers + 1) * hidden) + 2 * layers * 4 * 2 * 16 * scale.CONTEXT
    hificl, lora = record["methods"].values()
    assert hificl["parameters"] == layers * 2 * 4 * 8 * (8 + 16)
    assert hificl["token"] == 2 * layers * 4 * 8 * (16 + 16)  # H n (d + e) multiply-adds
    assert hificl["adapter"] == 2 * layers * 4 * 8 * 8 * (16 + 16)  # H n r (d + e)
    assert lora["parameters"] == layers * scale.LORA_R * (128 + 96 + 96 + 128)
    assert lora["token"] == 2 * lora["parameters"] and lora["adapter"] == 0
    forward = 2 * scale.TOKENS * matrices  # without attention; the backward through a frozen base is as much again
    assert 2 * forward < record["step"] < 2.2 * forward + 20 * layers * scale.TOKENS**2 * hidden


def test_what_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "MODELS", TINY)
    text = scale.write(tmp_path).read_text()
    assert "Computed, not measured" in text
    (record,) = json.loads((tmp_path / "scale.json").read_text())["records"]
    lines = text.splitlines()
    # 2 bytes for each of 3,072 parameters; two ranks divide 4 query and 2 key/value heads.
    assert any(
        line.startswith("| tiny | HiFICL, n = 8, r = 8 | 3,072 | 6.00 KiB | 174762.7 | 58.59 MiB |") for line in lines
    )
    assert any(line.startswith("| tiny |") and line.endswith("| 1, 2 |") for line in lines)
    reduced = 2 * 7 / 8 * 4 * 3072
    assert any(f"| 48.00 KiB | {reduced / 1024:.2f} KiB |" in line for line in lines)  # 16 bytes of state for each
    assert record["methods"]["HiFICL, n = 8, r = 8"]["parameters"] == 3072


def test_the_stored_tables_are_those_of_the_stored_records():
    stored = json.loads((scale.RESULTS / "scale.json").read_text())
    text = (scale.RESULTS / "scale.md").read_text()
    assert [record["model"] for record in stored["records"]] == list(scale.MODELS)
    for table in scale.tables(stored["records"]):
        assert "\n".join(table.markdown()) in text


@pytest.mark.parametrize("name", scale.MODELS)
def test_shapes_have_the_published_sizes(name):
    (record,) = [r for r in json.loads((scale.RESULTS / "scale.json").read_text())["records"] if r["model"] == name]
    published = {"7B (Llama 2)": 6.74e9, "70B (Llama 3)": 70.6e9, "405B (Llama 3.1)": 405.9e9}[name]
    assert record["weights"] == pytest.approx(published, rel=0.002)
