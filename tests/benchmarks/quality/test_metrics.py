"""The metrics of the quality benchmark, each against its definition."""

from __future__ import annotations

import doctest
import itertools
import math
import socket
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from benchmarks.quality import metrics

FOLDER = Path(metrics.__file__).parent
NAMES = ["exact_match", "vqa_accuracy", "cider", "chair"]
GOOD = {  # two rows that the metric accepts, and their value
    "exact_match": (["two", "red"], [["two", "2"], ["blue"]], {"exact_match": 0.5}),
    "vqa_accuracy": (["two", "red"], [["two"] * 10, ["blue"] * 10], {"vqa_accuracy": 0.5}),
    "cider": (["red dog", "a"], [["red dog"], ["blue cat"]], {"cider": 2.5}),
    "chair": ([["dog"], ["cat"]], [["dog"], ["cup"]], {"chair_i": 0.5, "chair_s": 0.5, "recall": 0.5}),
}


def compute(name: str, predictions: list, references: list) -> dict[str, float]:
    return metrics.load(name).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("path", [lambda name: name, lambda name: f"{name}/{name}.py"], ids=["folder", "script"])
@pytest.mark.parametrize("name", NAMES)
def test_loads_by_path_without_network(
    name: str, path: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    for function in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, function, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    module = evaluate.load(str(FOLDER / path(name)), cache_dir=str(tmp_path))
    predictions, references, expected = GOOD[name]
    assert module.compute(predictions=predictions, references=references) == pytest.approx(expected)


def test_load_keeps_what_it_loaded() -> None:
    assert metrics.load("chair") is metrics.load("chair")
    with pytest.raises(FileNotFoundError, match="bleu"):
        metrics.load("bleu")


def test_docstring_example() -> None:
    assert doctest.testmod(metrics) == doctest.TestResults(failed=0, attempted=1)


def test_exact_match() -> None:
    assert compute("exact_match", ["2", "two", "Two", "red "], [["two", "2"], ["two"], ["two"], ["red"]]) == {
        "exact_match": 0.5
    }


def test_vqa_accuracy_of_ten_answers() -> None:
    """By hand: with 3 of 10 equal, three of the subsets have 2 of them and seven have 3."""
    values = {0: 0.0, 1: 9 / 10 / 3, 2: (2 * 1 / 3 + 8 * 2 / 3) / 10, 3: (3 * 2 / 3 + 7 * 1) / 10, 4: 1.0, 10: 1.0}
    for equal, value in values.items():
        assert compute("vqa_accuracy", ["yes"], [["yes"] * equal + ["no"] * (10 - equal)]) == pytest.approx(
            {"vqa_accuracy": value}
        )


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.sampled_from("abcd"), min_size=2, max_size=12)), min_size=1)
)
def test_vqa_accuracy_is_the_mean_over_all_subsets(rows: list[tuple[str, list[str]]]) -> None:
    naive = [
        np.mean([min(subset.count(said) / 3, 1) for subset in itertools.combinations(answers, len(answers) - 1)])
        for said, answers in rows
    ]
    found = compute("vqa_accuracy", [said for said, _ in rows], [answers for _, answers in rows])
    assert found == pytest.approx({"vqa_accuracy": np.mean(naive)})


def test_cider_by_hand() -> None:
    """A word of one picture of two weighs log 2, and a caption of two words has no 3-grams or 4-grams."""
    references = [["red dog"], ["blue cat"]]
    one_word_short = math.exp(-1 / 72) / math.sqrt(2)  # penalty for the length, times the cosine
    for said, value in {
        "red dog": (1 + 1) / 4,
        "red cat": (1 / 2) / 4,
        "red": one_word_short / 4,
        "": 0,
    }.items():
        assert compute("cider", [said, "nothing"], references) == pytest.approx({"cider": 10 * value / 2})
    assert compute("cider", ["red dog"], references[:1]) == {"cider": 0}


def test_cider_prefers_the_true_caption_and_is_the_scorers() -> None:
    words = ["one", "two", "red", "blue", "dog", "cat", "left", "right"]
    rng = np.random.default_rng(0)
    references = [[" ".join(rng.choice(words, 6)) for _ in range(3)] for _ in range(20)]
    true = [captions[0] for captions in references]
    changed = [caption.rsplit(" ", 1)[0] + " cup" for caption in true]
    wrong = [*true[1:], true[0]]
    scores = [compute("cider", captions, references)["cider"] for captions in (true, changed, wrong)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    for captions, score in zip((true, changed, wrong), scores, strict=True):
        expected, _ = Cider().compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(captions)})
        assert score == expected


def test_chair_by_hand() -> None:
    """Of 5 mentions 2 are false (the dog, twice), in 1 caption of 3; of 4 objects the cat and one cup are found."""
    mentions = [["dog", "cat", "dog"], ["cup", "cup"], []]
    objects = [["cat", "mat", "cat"], ["cup"], ["cup"]]
    assert compute("chair", mentions, objects) == {"chair_i": 2 / 5, "chair_s": 1 / 3, "recall": 2 / 4}


def test_chair_of_an_empty_picture_and_of_no_mention() -> None:
    assert compute("chair", [["dog"], ["cup"]], [[], ["cup"]]) == {"chair_i": 0.5, "chair_s": 0.5, "recall": 1}
    assert compute("chair", [[], []], [[], ["cup"]]) == {"chair_i": 0, "chair_s": 0, "recall": 0}


@pytest.mark.parametrize("name", NAMES)
def test_wrong_input_is_refused_and_leaves_nothing_behind(name: str) -> None:
    predictions, references, expected = GOOD[name]
    one = predictions[:1]
    for bad_predictions, bad_references, message in [
        ([], [], f"{name} got 0 predictions"),
        (one, references, r"predictions \(1\) and references \(2\)"),
        (predictions, references[:1], r"predictions \(2\) and references \(1\)"),
        (one, ["red"], "Got a string but expected a list instead: 'red'"),
        (one, [[1, 2]], "don't match the expected format"),
        (one, [[]], r"references\[0\] (is empty|has 0 human)|none of the 1 references has an object"),
    ]:
        with pytest.raises(ValueError, match=message):
            compute(name, bad_predictions, bad_references)
        assert compute(name, predictions, references) == pytest.approx(expected)


def test_vqa_accuracy_refuses_a_single_annotator() -> None:
    with pytest.raises(ValueError, match=r"references\[1\] has 1 human answers.* or use exact_match"):
        compute("vqa_accuracy", ["yes", "no"], [["yes"] * 10, ["no"]])
