"""The tasks' files become samples, and splits share no picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pictures

from benchmarks.lmm import samples
from benchmarks.lmm.samples import Sample, draw, first, read, split_training, stream


def test_official_files_become_samples(root):
    vqa = read("vqav2", root / "data", "train")
    assert len(vqa) == 16 and vqa[3].target == "a dog" and len(vqa[0].answers) == 10 and vqa[0].name == "10"
    assert vqa[0].picture.size == (11, 9) and vqa[0].picture.getpixel((0, 0))[0] > 200
    assert [s.answers for s in read("okvqa", root / "data", "val")] == [
        s.answers for s in read("vqav2", root / "data", "val")
    ]
    coco = read("coco", root / "data", "val")
    assert (coco[0].name, coco[0].question) == ("1001", "")
    assert coco[0].answers == ("A picture of red.", "This is red, and a cat.")


def test_what_is_missing_is_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*v2_OpenEnded_mscoco_train2014_questions\.json: put"):
        read("vqav2", tmp_path, "train")
    for file in root.glob("data/*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    with pytest.raises(FileNotFoundError, match=r"no picture .*COCO_val2014_000000001001\.jpg: put COCO's"):
        read("coco", tmp_path, "val")
    (tmp_path / "mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": []}))
    with pytest.raises(ValueError, match="6 questions of val, such as 10010, have no answers"):
        read("okvqa", tmp_path, "val")
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="no sample of the split 'train'"):
        read("coco", tmp_path, "train")


def asked(number, pictures):
    return [Sample(str(n), Path(f"{n % pictures}.jpg"), "?", (str(n),)) for n in range(number)]


def test_validation_is_the_same_for_every_seed_and_shares_no_picture():
    found = asked(60, pictures=20)
    one, two = (split_training(found, 6, 20, seed) for seed in (0, 1))
    assert one["validation"] == two["validation"] and len(one["validation"]) == 6
    assert one["train"] != two["train"] and len(one["train"]) == 20
    assert not {s.image for s in one["train"]} & {s.image for s in one["validation"]}
    assert one == split_training(found, 6, 20, 0)
    with pytest.raises(ValueError, match="60 training samples, of which 6 are for validation, leave"):
        split_training(found, 6, 59, 0)
    assert first(found, 5) == first(found, 9)[:5] != found[:5]


def test_questions_about_one_picture_of_a_hub_stay_together():
    """Each row holds its picture anew: 20 pictures, three questions about each."""
    found = [Sample(str(n), Pictures.new("RGB", (4, 4), (n % 20, 0, 0)), "?", ("x",)) for n in range(60)]
    splits = split_training(found, 6, 20, 0)
    held, trained = ({int(sample.name) % 20 for sample in splits[name]} for name in ("validation", "train"))
    assert not held & trained and len(splits["train"]) == 20


def test_demonstrations_are_drawn_anew_for_each_query():
    pool = asked(30, 30)
    drawn = [draw(pool, 4, Sample(str(n), Path("x"), "?", ("a",)), 7) for n in range(3)]
    assert len({tuple(s.name for s in of) for of in drawn}) == 3 and all(len({*of}) == 4 for of in drawn)
    assert drawn[0] == draw(pool, 4, Sample("0", Path("x"), "?", ("a",)), 7) != draw(pool, 4, pool[0], 8)


@pytest.mark.parametrize("kind", ["records", "texts", "captions"])
def test_a_hubs_data_are_streamed(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    text, pictures = Value("string"), [Pictures.new("RGB", (4, 4), (n, 0, 0)) for n in range(9)]
    said = {"records": ("answers", [{"answer": text}], [{"answer": "x"}, {"answer": "y"}]),
            "texts": ("answers", Sequence(text), ["x", "y"]),
            "captions": ("sentences_raw", Sequence(text), ["x", "y"])}[kind]  # fmt: skip
    column, feature, value = said
    rows = {"image": pictures, column: [value] * 9, "question_id": list(range(9))}
    features = Features({"image": Image(), column: feature, "question_id": Value("int64")})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    found = stream(str(tmp_path / "data"), "train", 5, 0)
    assert len(found) == 5 and {s.answers for s in found} == {("x", "y")} and found[0].question == ""
    assert all(s.picture.getpixel((0, 0))[0] == int(s.name) for s in found)
    assert len({s.name for s in split_training(found, 2, 3, 0)["train"]}) == 3


def test_a_row_without_answers_is_refused():
    with pytest.raises(ValueError, match=r"image and one of .* wanted, found \['image', 'text'\]"):
        samples._row(0, {"image": None, "text": "x"})
