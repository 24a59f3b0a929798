"""Answers and captions are worth what their definitions say."""

from __future__ import annotations

import math
import shutil
from collections import Counter

import numpy as np
import pytest

from benchmarks.lmm import captions, samples
from benchmarks.lmm.answers import cut, normalise, spellings, stem
from benchmarks.lmm.samples import Sample
from benchmarks.lmm.scoring import score

# What the evaluation script of VQA v2 makes of each.
OFFICIAL = {
    "Yes.": "yes", "The Red, bus": "red bus", "1,000 people (about)": "1000 people about", "10.5 mph": "10.5 mph",
    "two-story": "2 story", "It isnt": "it isn't", "dont know!": "don't know", "a": "", "No/Yes": "no yes",
    "hot-dog , bun": "hot dog bun", "$1.50.": "$1.50", "U.S.A.": "usa", "The\tEnd\n": "end", "none": "0",
    "theyre at 3.30 p.m.": "they're at 3.30 pm", "'twas": "'twas", "ten  feet": "10 feet",
    "well-lit - yes": "welllit yes", "St. Louis": "st louis", "what?!": "what",
}  # fmt: skip


@pytest.mark.parametrize("said", OFFICIAL)
def test_answers_are_spelled_as_the_official_script_spells_them(said):
    assert normalise(said) == OFFICIAL[said]


def test_apostrophes_are_put_back():
    known = spellings()
    assert (known["couldnt've"], known["couldn'tve"], known["maam"]) == ("couldn't've", "couldn't've", "ma'am")
    assert "couldntve" not in known and "its" not in known and known["somebody'd"] == "somebodyd"
    assert len(known) == 114


def test_an_answer_ends_where_the_next_turn_begins():
    assert [cut(text) for text in (" two\nQuestion: x", "two Question:", "a bus Image", "short", "no Short")] == [
        "two", "two", "a bus", "short", "no",
    ]  # fmt: skip


def sample(*answers, name="1"):
    return Sample(name, None, "?", answers)


def test_vqa_accuracy_by_hand():
    """Of ten answers, three equal: leaving each out in turn, 3 x 2/3 and 7 x 1; both sides normalised."""
    of_ten = sample(*["Two dogs."] * 3, *["cat"] * 7)
    assert score("vqav2", [of_ten], ["2 dogs\nQuestion"], None)["vqa_accuracy"] == pytest.approx((3 * 2 / 3 + 7) / 10)
    both = score("vqav2", [of_ten, sample(*["yes"] * 10)], ["The dog", "Yes."], None)
    assert both["vqa_accuracy"] == pytest.approx(0.5)


def test_ok_vqa_predictions_are_stemmed_as_its_annotations_are(root):
    known = samples.stems(root / "data")
    assert known == {"reds": "red", "blues": "blue", "greens": "green", "a dogs": "a dog"}
    assert stem("reds", known) == "red" and stem("reds and blues", known) == "red and blue"
    people = [sample(*["red"] * 10), sample(*["dog"] * 10)]
    assert score("okvqa", people, ["Reds", "dogs"], root / "data") == {"vqa_accuracy": 0.5 + 0.5, "stems": 4}
    assert score("okvqa", people, ["Reds", "dog"], None) == {"vqa_accuracy": 0.5, "stems": 0}


TEXTS = ["A man rides a two-story bus; he isn't happy.", "This is RED, and a (big) cat!", ""]


def test_captions_are_tokenised_as_the_penn_treebank_is():
    if not shutil.which("java"):
        pytest.skip("no Java")
    assert captions.tokenise(TEXTS) == [
        "a man rides a two-story bus he is n't happy", "this is red and a -lrb- big -rrb- cat", "",
    ]  # fmt: skip
    assert captions.tokenizer() == "PTB"


def test_captions_without_java(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda _: None)
    assert captions.tokenise(TEXTS) == [
        "a man rides a two-story bus he isn't happy", "this is red and a big cat", "",
    ]  # fmt: skip
    assert captions.tokenizer().startswith("words")
    assert score("coco", [sample("a cat"), sample("a dog")], ["a cat", "x"], None)["tokenizer"].startswith("words")


def cider(said, references):
    """From the paper's definition: n-grams of 1 to 4 words, weighted by rarity among pictures, clipped, by length."""
    grams = lambda text, n: Counter(zip(*(text.split()[i:] for i in range(n)), strict=False))
    seen = [Counter({g for r in of for g in grams(r, n)}) for of in references for n in (1, 2, 3, 4)]
    frequency = Counter(g for of in seen for g in of)

    def vector(text, n):
        weight = {g: math.log(len(references)) - math.log(max(1, frequency[g])) for g in grams(text, n)}
        return {g: count * weight[g] for g, count in grams(text, n).items()}

    def similar(a, b, n):
        u, v = vector(a, n), vector(b, n)
        norms = math.sqrt(sum(x * x for x in u.values())) * math.sqrt(sum(x * x for x in v.values()))
        dot = sum(min(u[g], v.get(g, 0.0)) * v.get(g, 0.0) for g in u)
        # The scorer measures length by the pairs of words.
        length = sum(grams(a, 2).values()) - sum(grams(b, 2).values())
        return (dot / norms if norms else 0.0) * math.exp(-(length**2) / (2 * 6**2))

    each = [
        10 * np.mean([[similar(a, b, n) for b in of] for n in (1, 2, 3, 4)])
        for a, of in zip(said, references, strict=True)
    ]
    return float(np.mean(each))


def test_cider_is_that_of_the_definition():
    people = [
        sample("A red bus on a street.", "The bus is red!", name="1"), sample("Two dogs, playing.", name="2"),
        sample("A small cat sits here.", "A cat on a mat", name="3"),
    ]  # fmt: skip
    said = ["A red bus on the road.", "two dogs playing", "A cat sits on a mat\nQuestion: what?"]
    words = captions.tokenise([cut(text) for text in said])
    want = cider(words, list(captions.group({s.name: s.answers for s in people}).values()))
    found = score("coco", people, said, None)
    assert found["cider"] == pytest.approx(want) and want > 1
    assert found["chair"].startswith("not computed")


def test_chair_by_hand(root):
    """Picture 1 has a marked bottle, and people name a cat; picture 2 a cat alone."""
    people = [sample("A cat.", "Two kittens!", name="1"), sample("A cat sits.", name="2")]
    said = ["A bottle, two puppies and a teddy bear.", "A baby dog and a cat on the home plate"]
    found = score("coco", people, said, root / "data")
    assert {name: found[name] for name in ("chair_i", "chair_s", "recall")} == {
        "chair_i": 3 / 5,  # dog, teddy bear; dog ("baby dog" is no person)
        "chair_s": 1.0,
        "recall": 2 / 3,  # of bottle and cat the bottle; the cat
    }


def test_a_seat_is_no_chair_beside_a_toilet(root):
    objects = captions.Objects(root / "data")
    assert objects.mentions("A toilet with its seat up") == ["toilet"] == objects.mentions("A toilet seat")
    assert objects.mentions("Two seats on a train") == ["chair"]


def test_chair_names_the_file_that_is_missing(root, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data", ignore=shutil.ignore_patterns("synonyms.txt"))
    people = [sample("a cat", name="1"), sample("a dog", name="2")]
    found = score("coco", people, ["a cat", "a dog"], tmp_path / "data")
    assert "There is no synonyms.txt in" in found["chair"] and "chair_i" not in found
