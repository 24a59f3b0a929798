"""`inspection.plots`: the figures show the recorded numbers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from peft_hificl import inspection
from peft_hificl.inspection import plots

from .helpers import adapted, config, inputs_for, logits


def recorded(kind: str = "vlm") -> tuple[inspection.Records, list[list[str]]]:
    model, inputs = adapted(kind), inputs_for(kind)
    with inspection.record(model) as records:
        logits(model, **inputs)
    return records, inspection.token_kinds(model, **inputs)


def shown(figure: Figure) -> list[np.ndarray]:
    """The arrays of a figure's images, colour bars left out."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.get_images()]


def test_the_heatmap_shows_the_mass_by_kind() -> None:
    records, kinds = recorded()
    figure = plots.heatmap(records, kinds)
    masses = records.by_kind(kinds)
    titles = [axes.get_title() for axes in figure.axes if axes.get_images()]
    assert titles == ["first token", "image tokens", "question tokens"] and list(masses) == [
        "first",
        "image",
        "question",
    ]
    for found, mass in zip(shown(figure), masses.values(), strict=True):
        assert np.array_equal(found, mass.numpy())


def test_a_sequence() -> None:
    records, _ = recorded()
    record = records["model.language_model.layers.1.self_attn"]
    words = [f"${i}\n" for i in range(9)]
    figure = plots.sequence(record, row=1, head=2, tokens=words)
    assert np.array_equal(shown(figure)[0], record.beta[1, 2].T.numpy())
    assert figure.axes[0].get_xticklabels()[3].get_text() == r"\$3\n"
    figure.canvas.draw()
    (mean,) = shown(plots.sequence(record))
    assert np.allclose(mean, record.beta[0].mean(dim=0).T.numpy())


def test_a_union_names_the_adapters_and_rows_their_own() -> None:
    model = adapted("gqa", name="a")
    model.add_adapter("b", config(n=2))
    inputs = inputs_for("gqa")
    with inspection.record(model) as records:
        logits(model, **inputs, adapter_names=["b", "__base__"])
    record = records["model.layers.0.self_attn"]
    assert shown(plots.sequence(record))[0].shape == (2, 9)
    with pytest.raises(ValueError, match="Row 1 of 'model.layers.0.self_attn' saw no virtual pairs"):
        plots.sequence(record, row=1)
    model.base_model.set_adapter(["a", "b"])
    with inspection.record(model) as records:
        logits(model, **inputs)
    labels = plots.sequence(records["model.layers.0.self_attn"]).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["a 0", "a 1", "a 2", "b 0", "b 1"]


def test_a_picture_has_its_patches_in_rows() -> None:
    records, kinds = recorded()
    record = records["model.language_model.layers.0.self_attn"]
    image = np.zeros((8, 8, 3))
    arrays = shown(plots.picture(record, image, kinds, head=1))
    assert len(arrays) == 2 * 3
    for pair in range(3):
        assert np.array_equal(arrays[2 * pair], image)
        assert np.array_equal(arrays[2 * pair + 1], record.beta[0, 1, 1:5, pair].reshape(2, 2).numpy())
    wide = shown(plots.picture(record, image, kinds, grid=(1, 4)))
    assert wide[1].shape == (1, 4)


def test_what_cannot_be_drawn_is_refused() -> None:
    records, kinds = recorded()
    record = records["model.language_model.layers.0.self_attn"]
    with pytest.raises(ValueError, match="Row 0 has 4 image tokens, which are no grid of 3 x 2"):
        plots.picture(record, np.zeros((8, 8, 3)), kinds, grid=(3, 2))
    with pytest.raises(ValueError, match="Row 0 has 0 image tokens"):
        plots.picture(record, np.zeros((8, 8, 3)), [["question"] * 9])
    with pytest.raises(ValueError, match="8 tokens for 9 that were recorded"):
        plots.sequence(record, tokens=["a"] * 8)
    with pytest.raises(ValueError, match="row=0, head=4 .* of which 2 rows and 4 heads were recorded"):
        plots.sequence(record, head=4)
    with pytest.raises(ValueError, match="row=2, head=None"):
        plots.sequence(record, row=2)


def test_pyplot_is_not_used() -> None:
    code = "import sys; from peft_hificl.inspection import plots, report; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
