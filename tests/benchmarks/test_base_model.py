"""The base model of the benchmarks: its pictures, its rules, its training."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.base_model import train
from benchmarks.base_model.episodes import Block, Episodes, collate, split_of_rule
from benchmarks.base_model.evaluate import SERIES, TARGETS, draw, evaluate, measure_series
from benchmarks.base_model.language import END, HIDDEN, IMAGE, LABELS, PAD, QUESTION_TYPES, TOKEN, ask, caption
from benchmarks.base_model.model import load_base, make_model, make_processor
from benchmarks.base_model.scaffold import pointing
from benchmarks.base_model.scenes import ATTRIBUTES, EMPTY, OBJECTS, SPLITS, digit_rows, make_scenes

CHECKPOINT = Path(train.__file__).parent / "checkpoint"


@pytest.fixture(scope="module")
def scenes():
    return make_scenes("test", 1500)


def test_the_same_arguments_give_the_same_pictures(scenes):
    again = make_scenes("test", 1500)
    assert torch.equal(scenes.pixels, again.pixels)
    assert all(np.array_equal(getattr(scenes, name), getattr(again, name)) for name in ("kind", "color", "size"))
    assert not torch.equal(make_scenes("test", 1500, seed=1).pixels, scenes.pixels)
    assert not torch.equal(make_scenes("validation", 1500).pixels, scenes.pixels)


def test_no_digit_is_in_two_splits():
    rows = np.concatenate([digit_rows()[split] for split in SPLITS])
    assert len(rows) == 1797 == len(np.unique(rows))


def test_scenes_hold_up_to_three_different_objects_and_every_value(scenes):
    assert set(scenes.attributes["kinds"]) == {0, 1, 2}
    for name, words in ATTRIBUTES.items():
        assert set(scenes.attributes[name]) >= set(range(len(words)))
    drawn = scenes.draw_with("color", np.arange(8), np.random.default_rng(0))
    assert scenes.attributes["color"][drawn].tolist() == list(range(8))


def test_an_empty_corner_is_background_and_a_full_one_is_not(scenes):
    tiles = scenes.pixels.float().unfold(2, 16, 16).unfold(3, 16, 16)  # (N, 3, 2, 2, 16, 16)
    spread = tiles.std(dim=(-1, -2)).mean(dim=1).flatten(1).numpy()
    assert spread[scenes.kind == EMPTY].max() < spread[scenes.kind != EMPTY].min()


def test_questions_are_answered_from_the_scene():
    scenes = make_scenes("test", 1)
    scenes = dataclasses.replace(
        scenes,
        kind=np.array([[3, EMPTY, 12, 3]]),  # a three, nothing; a circle, a three
        color=np.array([[0, 8, 6, 2]]),  # red; blue, yellow
        background=np.array([0]),
    )
    choose = Episodes(scenes, "test", 0).choose

    def answers(kind_of_question):
        return {ask(scenes, 0, kind_of_question, choose) for _ in range(200)} - {None}

    assert answers("count") == {("count", "three")}
    assert answers("object") == answers("corner") == set()
    assert answers("kinds") == {("kinds", "two")}
    assert answers("corner of") == {("corner of circle", "southwest")}
    assert answers("which is") == {("which is red", "three"), ("which is blue", "circle"), ("which is yellow", "three")}
    expected = {"left": "nothing", "right": "three", "above": "three", "below": "nothing"}
    assert answers("next to") == {(f"{side} of circle", answer) for side, answer in expected.items()}
    present = {"is there three", "is there circle", "is there red", "is there blue", "is there yellow"}
    assert {question for question, answer in answers("is there") if answer == "yes"} == present
    assert not present & {question for question, answer in answers("is there") if answer == "no"}
    assert caption(scenes, 0) == "red three and blue circle and yellow three on black"


def test_there_are_at_least_eight_types_of_questions(scenes):
    choose = Episodes(scenes, "test", 0).choose
    asked = Counter(kind for row in range(200) for kind in QUESTION_TYPES if ask(scenes, row, kind, choose))
    assert len(asked) == len(QUESTION_TYPES) >= 8


# -- rules


def rules_in(episode, scenes, attribute):
    return attribute, {int(scenes.attributes[attribute][block.scene]): block.answer for block in episode}


def test_a_rule_belongs_to_one_split_whatever_the_order_of_its_classes():
    words = {3: "dax", 1: "wug", 7: "blick"}
    assert split_of_rule("color", words) == split_of_rule("color", dict(sorted(words.items())))
    choose = random.Random(0)
    rules = [dict(zip(choose.sample(range(8), 2), choose.sample(LABELS, 2), strict=True)) for _ in range(5000)]
    shares = Counter(split_of_rule("color", rule) for rule in rules)
    assert shares["test"] / 5000 == pytest.approx(0.1, abs=0.02)
    assert shares["validation"] / 5000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("hidden", [False, True], ids=["named", "hidden"])
def test_episodes_follow_rules_of_their_own_split_alone(scenes, split, hidden):
    source = Episodes(scenes, split, 0)
    for _ in range(100):
        attribute = source.choose.choice(["object", "color", "count"])
        episode = source.rename(16, 2, hidden=hidden, attribute=attribute)
        name, words = rules_in(episode, scenes, attribute)
        if len(words) == 2:
            assert split_of_rule(name, words) == split


@pytest.mark.parametrize("phase", ["speak", "rules", "hide", "settle"])
def test_every_phase_of_training_draws_train_rules_alone(scenes, phase, monkeypatch):
    asked = []

    def recorded(attribute, words):
        asked.append((attribute, dict(words), split_of_rule(attribute, words)))
        return asked[-1][2]

    monkeypatch.setattr("benchmarks.base_model.episodes.split_of_rule", recorded)
    used = []
    rule = Episodes.rule
    monkeypatch.setattr(Episodes, "rule", lambda *args: used.append(rule(*args)) or used[-1])
    for step in range(20):
        train.draw_episodes(Episodes(scenes, "train", [0, step]), phase, 288)
    assert {split_of_rule(*rule) for rule in used} == ({"train"} if phase != "speak" else set())
    # exactly the held-out ones were refused
    assert used == [(attribute, words) for attribute, words, split in asked if split == "train"]
    assert phase == "speak" or {split for *_, split in asked} == set(SPLITS)


def test_an_unknown_split_is_refused(scenes):
    with pytest.raises(ValueError, match="no split 'tset'"):
        Episodes(scenes, "tset", 0)


def test_only_answers_that_can_be_known_are_trained(scenes):
    episode = Episodes(scenes, "train", 0).rename(16, 3)
    seen = set()
    for block in episode:
        assert block.known == (block.answer in seen)
        seen.add(block.answer)
    batch = collate([episode])
    answers = batch.labels[0] > 0
    assert batch.input_ids[0][answers].tolist() == [TOKEN[block.answer] for block in episode]
    assert (batch.weights[0][answers] > 0).tolist() == [block.known for block in episode]
    assert (batch.weights[0][batch.input_ids[0] == TOKEN[END]] > 0).all()
    assert not batch.weights[0][batch.input_ids[0] == TOKEN[IMAGE]].any()


def test_the_scaffold_points_at_earlier_labels_of_the_same_class(scenes):
    episode = Episodes(scenes, "train", 0).rename(9, 2)
    batch = collate([episode])
    matches = batch.matches[0]
    for place, block in enumerate(episode):  # `<image> x 4, question, ?, label, <eos>`
        expected = [8 * other + 6 for other in range(place) if episode[other].answer == block.answer]
        assert matches[8 * place + 5].nonzero()[:, 0].tolist() == expected
        assert batch.meanings[0, 8 * place + 5 : 8 * place + 7].tolist() == [TOKEN[block.means]] * 2
    assert matches.any(dim=1).sum() == sum(block.known for block in episode)
    hidden = [Episodes(scenes, "train", 0).rename(9, 2, hidden=True)]
    assert not collate(hidden).meanings.any()
    assert (collate(hidden, tell_hidden=True).meanings > 0).sum() == 2 * sum(block.known for block in hidden[0])


def test_the_scaffold_points_from_an_objects_name_to_where_it_is(scenes):
    source = Episodes(scenes, "train", 0)
    first, second = (int(row) for row in np.flatnonzero(scenes.attributes["kinds"] == 0)[:2])
    kinds = scenes.kind[[first, second]]
    names = [OBJECTS[kind.min()] for kind in kinds]
    episode = [
        Block(first, f"color of {names[0]}", "red"),
        Block(None, "object", names[0]),  # in an answer, the name is not told where to look
        Block(second, f"is there {names[1]}", "yes"),
    ]
    points = pointing(collate([episode]), scenes)[0]
    # 4 image tokens, `color of X ? red <eos>`, `object ? X <eos>`, 4 image tokens, `is there Y ? yes <eos>`
    expected = {6: np.flatnonzero(kinds[0] != EMPTY).tolist(), 20: (14 + np.flatnonzero(kinds[1] != EMPTY)).tolist()}
    pointed = points.any(dim=1).nonzero()[:, 0].tolist()
    assert {place: points[place].nonzero()[:, 0].tolist() for place in pointed} == expected
    assert not pointing(collate([source.rename(9, 2, attribute="color")]), scenes).any()


# -- inputs, training, files


def test_the_processor_gives_what_the_loop_trains_on(scenes):
    source, processor = Episodes(scenes, "train", 0), make_processor()
    episodes = [source.rename(5, 2), source.direct(3), source.captions(2), source.choice(4)]
    texts = [" ".join(block.text() for block in episode) for episode in episodes]
    images = [[scenes.image(b.scene) for b in episode if b.scene is not None] for episode in episodes]
    batch = collate(episodes)
    inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], batch.input_ids)
    assert torch.equal(inputs["attention_mask"] == 0, batch.input_ids == TOKEN[PAD])
    torch.testing.assert_close(inputs["pixel_values"], scenes.pixel_values(batch.scenes), rtol=0, atol=1e-6)


def test_the_model_is_of_one_to_five_million_parameters():
    assert 1e6 < make_model().num_parameters() < 5e6


def smoke(out, **changes):
    return train.Training(dataclasses.replace(train.SMOKE, **changes), 0, out)


def test_training_resumes_to_the_same_weights_and_the_saved_model_is_the_trained_one(tmp_path, scenes):
    whole = smoke(tmp_path / "whole")
    whole.run()
    killed = smoke(tmp_path / "killed")
    killed.run(stop_at=12)  # the last checkpoint is of step 10, in the phase with the scaffold
    resumed = smoke(tmp_path / "killed")
    resumed.resume()
    assert (killed.step, resumed.step) == (12, 10)
    resumed.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name

    other = smoke(tmp_path / "killed", learning_rate=1.0)
    with pytest.raises(ValueError, match="another recipe or seed"):
        other.resume()

    whole.save_model()
    processor, loaded = load_base(tmp_path / "whole" / "model")
    episode = Episodes(scenes, "train", 0).rename(9, 2)
    text, images = " ".join(block.text() for block in episode), [scenes.image(block.scene) for block in episode]
    inputs = processor(text=text, images=images, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, whole.model(**inputs).logits, rtol=0, atol=0)
    assert loaded.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]

    results = evaluate(loaded, scenes, 20)
    assert set(results["targets"]) == set(TARGETS)
    assert set(results["series"]) == set(SERIES)
    json.dumps(results)
    draw(tmp_path / "evaluation.png", results["series"])
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000


def test_training_starts_from_a_model_that_lacks_the_last_words(tmp_path):
    _, small = load_base(CHECKPOINT)
    small.resize_token_embeddings(len(TOKEN) - len(HIDDEN) + 1)
    small.save_pretrained(tmp_path / "small")
    make_processor().save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "training.json").write_text(json.dumps({"steps": 5}))
    training = train.Training(dataclasses.replace(train.SMOKE, see=0), 0, tmp_path, tmp_path / "small")
    known = small.state_dict()
    for name, value in training.model.state_dict().items():
        assert torch.equal(value[: len(known[name])], known[name]), name
    training.run()
    training.save_model()
    assert json.loads((tmp_path / "model" / "training.json").read_text())["started from"] == {"steps": 5}


def test_the_shipped_model_knows_the_words_and_is_what_its_card_says():
    _, model = load_base(CHECKPOINT)
    assert model.get_input_embeddings().num_embeddings == len(TOKEN)
    assert f"{model.num_parameters():,} parameters" in (CHECKPOINT / "README.md").read_text()
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 12e6
    scenes = make_scenes("validation", 1000)
    right = measure_series(model, scenes, "validation", "rename 4, named", 8, 100)
    assert right["accuracy"] > 0.95 * right["ceiling"]


def test_training_moves_every_weight(tmp_path):
    training = smoke(tmp_path)
    before = {name: value.clone() for name, value in training.model.named_parameters()}
    training.run()
    still = {name for name, value in training.model.named_parameters() if torch.equal(value, before[name])}
    # LLaVA reads the features before the tower's last norm.
    assert {name for name in still if "post_layernorm" not in name} == set()


def test_the_phases_and_the_rate_of_learning():
    recipe = train.Recipe()
    phases = [recipe.phase(step) for step in range(recipe.steps)]
    assert Counter(phases) == {name: getattr(recipe, name) for name in ("see", "speak", "rules", "hide", "settle")}
    assert recipe.rate(recipe.warmup) == recipe.rate(recipe.see + recipe.warmup) == recipe.learning_rate
    assert 0 < recipe.rate(recipe.see - 1) < recipe.learning_rate / 100
    assert 0 < recipe.rate(recipe.steps - 1) < recipe.learning_rate / 100


def test_a_block_reads_as_the_prompt_of_a_user():
    assert Block(0, "color of three", "red").text() == "<image> color of three ? red <eos>"
    assert Block(None, "count", "two").text(answered=False) == "count ?"
