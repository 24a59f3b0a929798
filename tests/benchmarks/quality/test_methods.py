"""The methods of the quality benchmark: prompts as tensors, each method against its published formula, and training."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from benchmarks.base_model.language import END, IMAGE, MARK, PAD, TOKEN, VOCABULARY
from benchmarks.base_model.model import load_base
from benchmarks.quality.encoding import CHECKPOINT, IGNORED, answers, collate, demonstrated, encoded_task
from benchmarks.quality.methods import METHODS, Learner, Setup, learner, task_vector, teacher
from benchmarks.quality.methods.adapters import PREFIX_TOKENS, one_word_each
from benchmarks.quality.methods.mimic import Shift
from benchmarks.quality.methods.teacher import draw_demonstrations, recorded_states
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import batches, fit, samples
from peft_hificl import HiFICLLayer

from ...helpers import PREFIX_TUNING_GENERATES
from .helpers import SMALL_SIZES, small_tasks

ALL = list(range(SMALL_SIZES["train"]))
TRAINED = [name for name, method in METHODS.items() if method.attach]


@pytest.fixture(scope="module")
def tasks():
    with small_tasks():
        yield {name: encoded_task(name) for name in ("convention", "captions")}


@pytest.fixture
def base():
    return load_base(CHECKPOINT)[1]


def setup_of(tasks, task="convention", **changes) -> Setup:
    return Setup(**{"task": task, "splits": tasks[task], "samples": ALL, "seed": 0, "steps": 3, "rate": 0.01} | changes)


def parameters(learned: Learner) -> list[nn.Parameter]:
    return [parameter for group in learned.groups for parameter in group["params"]]


@torch.no_grad()
def disturb(learned: Learner) -> None:
    """Away from the start, where many a method is still the base."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters(learned):
        spread = 0.2 * parameter.std(unbiased=False).clamp(min=0.05)
        parameter.add_(spread * torch.randn(parameter.shape, generator=generator))


def one_by_one(model, splits, query, shown, number) -> str:
    """Greedy decoding as training sees prompts: no padding, no cache, pictures that are already encoded."""
    split, row = query
    ids, said = demonstrated(splits, shown) + splits[split].prompts[row], []
    features = [splits[s].features[r] for s, r in (*shown, query)]
    for _ in range(number):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        logits = model(**inputs, mm_encoder_outputs=encoded(features)).logits
        ids = [*ids, int(logits[0, -1].argmax())]
        said.append(VOCABULARY[ids[-1]])
        if said[-1] == END:
            return " ".join(said[:-1])
    return " ".join([*said, "..."])


def encoded(features):
    return {"image": BaseModelOutputWithPooling(pooler_output=features)}


# -- encoding ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_of_the_answer_and_the_end_token_of_the_query_alone(tasks):
    splits = tasks["captions"]
    queries = [("train", 0), ("validation", 1), ("test", 2)]
    shown = [[("train", 3), ("train", 4)], [], [("train", 5)]]
    batch = collate(splits, queries, shown)
    for row, ((split, number), before) in enumerate(zip(queries, shown, strict=True)):
        examples = splits[split].examples
        answer = [*examples["answer"][number].split(), END]
        own = [*[IMAGE] * 4, *examples["question"][number].split(), "?", *answer]
        words = [VOCABULARY[token] for token in batch["input_ids"][row].tolist()]
        length = int(batch["attention_mask"][row].sum())
        assert words[length - len(own) : length] == own
        assert words[length:] == [PAD] * (len(words) - length)
        assert length == len(own) + sum(len(demonstrated(splits, [one])) for one in before)
        labels = batch["labels"][row].tolist()
        assert [VOCABULARY[token] for token in labels if token != IGNORED] == answer
        assert all(token == IGNORED for token in labels[: length - len(answer)] + labels[length:])
    assert len(batch["mm_encoder_outputs"]["image"].pooler_output) == 6


@torch.no_grad()
def test_encoded_pictures_are_as_good_as_the_pictures(tasks, base):
    splits = tasks["convention"]
    queries = [("train", 0), ("test", 1), ("validation", 2)]
    shown = [[("train", 3), ("train", 4)], [], [("train", 5)]]
    batch = collate(splits, queries, shown)
    pixels = [splits[s].pixels[r] for query, before in zip(queries, shown, strict=True) for s, r in (*before, query)]
    found = base(**batch)
    del batch["mm_encoder_outputs"]
    expected = base(**batch, pixel_values=torch.stack(pixels))
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    assert torch.allclose(found.loss, expected.loss, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("task", ["convention", "captions"])
def test_answers_of_the_base_do_not_depend_on_what_is_beside_them(tasks, base, task):
    splits, number = tasks[task], TASKS[task].max_new_tokens
    queries = [("test", row) for row in range(6)]
    shown = [[("train", row) for row in range(k)] for k in (0, 3, 1, 8, 0, 2)]  # prompts of different lengths
    said = answers(base, splits, queries, number, shown)
    pairs = zip(queries, shown, strict=True)
    assert said == [one_by_one(base, splits, query, before, number) for query, before in pairs]
    assert said == [answers(base, splits, [q], number, [before])[0] for q, before in zip(queries, shown, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["lora-8", "prefix", "cartridge-demos", "ia3", "hificl", "hificl-alpha-1", "live", "mimic"]
)
def test_answers_are_what_was_trained(tasks, base, name):
    """Left padding, cache and pictures against none of them, where a shift of positions would show."""
    if name in ("prefix", "cartridge-demos") and not PREFIX_TUNING_GENERATES:
        pytest.skip("prefix tuning has no effect on generate with these versions")
    learned = METHODS[name].attach(base, setup_of(tasks, "captions"))
    disturb(learned)
    model, splits, number = learned.model.eval(), tasks["captions"], 14
    queries = [("test", row) for row in range(3)]
    shown = [[("train", row) for row in range(k)] for k in (1, 0, 2)]
    said = answers(model, splits, queries, number, shown)
    pairs = zip(queries, shown, strict=True)
    assert said == [one_by_one(model, splits, query, before, number) for query, before in pairs]


def test_an_answer_that_does_not_end_is_marked(tasks, base):
    (cut,) = answers(base, tasks["captions"], [("test", 0)], 2)
    assert cut.endswith(" ...")


# -- LIVE --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_live_moves_every_token_after_every_layer_and_keeps_its_norm(tasks, base):
    learned = METHODS["live"].attach(base, setup_of(tasks))
    assert base.live.weights.tolist() == pytest.approx([0.1] * 6)
    base.live.vectors.normal_()
    base.live.weights.uniform_(-1, 1)
    raw, moved = [], []
    for layer in base.model.language_model.layers:
        layer.register_forward_hook(lambda _, args, output: raw.append(output), prepend=True)
        layer.register_forward_hook(lambda _, args, output: moved.append(output))
    base(**collate(tasks["convention"], [("train", 0), ("train", 1)]))
    assert len(raw) == len(moved) == 6
    for layer, (before, after) in enumerate(zip(raw, moved, strict=True)):
        for h, found in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True):
            shifted = h + base.live.weights[layer] * base.live.vectors[layer]
            expected = shifted / math.sqrt(sum(shifted**2)) * math.sqrt(sum(h**2))
            assert torch.allclose(found, expected, atol=1e-5)
    assert [group["lr"] for group in learned.groups] == [0.01, 1e-2]
    assert sum(parameter.numel() for parameter in parameters(learned)) == 6 * 128 + 6


# -- MimIC -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mimic_without_a_shift_is_the_base(tasks, base):
    base.double()
    batch = collate(tasks["convention"], [("train", 0), ("train", 1)], [[("train", 2)], []])
    expected = base(**batch).logits
    learned = METHODS["mimic"].attach(base, setup_of(tasks))
    base.double()
    for layer in base.model.language_model.layers:
        layer.self_attn.mimic.v.zero_()
    real = batch["attention_mask"].bool()
    assert torch.allclose(base(**batch).logits[real], expected[real], atol=1e-10)
    assert sum(parameter.numel() for parameter in parameters(learned)) == 6 * 4 * (2 * 32 + 1)  # 2dHL + HL


@torch.no_grad()
def test_mimic_is_its_formula_head_by_head(tasks, base):
    METHODS["mimic"].attach(base, setup_of(tasks))
    base.double()
    attention = base.model.language_model.layers[3].self_attn
    shift: Shift = attention.mimic
    for parameter in shift.parameters():
        parameter.normal_()
    calls = []
    attention.register_forward_hook(lambda _, a, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True)
    batch = collate(tasks["convention"], [("train", 0), ("train", 1)], [[("train", 2)], []])
    mask = batch["attention_mask"]
    mask[0, :3] = 0  # padding on the left of one row, on the right of the other
    base(**batch)
    ((kwargs, found),) = calls
    states, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
    d, rows, length = attention.head_dim, *states.shape[:2]
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (part(states).view(rows, length, -1, d).transpose(1, 2) for part in projections)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    heads, groups = q.shape[1], k.shape[1]
    for row in range(rows):
        for token in range(length):
            if not mask[row, token]:
                continue
            seen = [place for place in range(token + 1) if mask[row, place]]
            out = []
            for head in range(heads):
                query, group = q[row, head, token], head // (heads // groups)
                weights = [math.exp(query @ k[row, group, place] / math.sqrt(d)) for place in seen]
                z1, z2 = math.exp(shift.w[head] @ query + shift.b[head]), sum(weights)
                attended = sum(w * v[row, group, place] for w, place in zip(weights, seen, strict=True)) / z2
                out.append(attended + z1 / (z1 + z2) * shift.v[head])
            assert torch.allclose(attention.o_proj(torch.cat(out)), found[row, token], atol=1e-10)


# -- Task Vector -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_task_vector_is_the_mean_state_of_last_prompt_tokens(tasks, base):
    setup = setup_of(tasks)
    made = task_vector.vectors(base, setup)
    rng = np.random.default_rng([setup.seed, task_vector.DRAWS])
    dummies = rng.choice(setup.samples, task_vector.DRAWS).tolist()
    shown = draw_demonstrations(setup.samples, dummies, 8, rng)
    sums = [torch.zeros(128) for _ in made]
    for dummy, before in zip(dummies, shown, strict=True):
        assert len(before) == 8
        assert ("train", dummy) not in before
        ids = demonstrated(setup.splits, before) + setup.splits["train"].prompts[dummy]
        features = [setup.splits[s].features[r] for s, r in (*before, ("train", dummy))]
        with recorded_states(base) as states:
            base(input_ids=torch.tensor([ids]), mm_encoder_outputs=encoded(features))
        for total, state in zip(sums, states[1::2], strict=True):
            total.add_(state[0, -1])
    for vector, total in zip(made, sums, strict=True):
        assert torch.allclose(vector, total / task_vector.DRAWS, atol=1e-4)


def test_a_patch_meets_the_last_prompt_token_alone(tasks, base):
    vector, raw, patched = torch.randn(128, generator=torch.Generator().manual_seed(0)), [], []
    layer = base.model.language_model.layers[2]
    layer.register_forward_hook(lambda _, args, output: raw.append(output))
    layer.register_forward_hook(task_vector.Patch(vector))
    layer.register_forward_hook(lambda _, args, output: patched.append(output))
    base.generation_config.min_new_tokens = 4  # whatever this vector says
    answers(base, tasks["captions"], [("test", 0), ("test", 1)], 4, [[("train", 0)], []])
    assert torch.equal(patched[0][:, -1], vector.expand(2, -1))
    assert torch.equal(patched[0][:, :-1], raw[0][:, :-1])
    assert len(patched) == 4
    for before, after in zip(raw[1:], patched[1:], strict=True):
        assert torch.equal(after, before)


def test_the_layer_of_a_task_vector_is_chosen_on_validation(tasks, base, monkeypatch):
    splits = {split: tasks["convention"][split] for split in ("train", "validation")}
    scores, read = iter([0.1, 0.4, 0.2, 0.4, 0.0, 0.3]), []
    monkeypatch.setattr(task_vector, "measure", lambda *args: read.append(args[3]) or {"score": next(scores)})
    fitted = task_vector.fit(base, setup_of(tasks, splits=splits))
    patched = [
        any(isinstance(hook, task_vector.Patch) for hook in layer._forward_hooks.values())
        for layer in fitted.model.model.language_model.layers
    ]
    assert patched == [False, True, False, False, False, False]
    assert read == ["validation"] * 6
    assert (fitted.parameters, fitted.shots) == (0, 0)


# -- teachers ----------------------------------------------------------------------------------------------------------


def test_demonstrations_are_other_samples_and_none_twice():
    rows = list(range(40, 60))
    rng = np.random.default_rng(0)
    for shots in (1, 8, 16):
        shown = draw_demonstrations(rows, rows * 20, shots, rng)
        for query, before in zip(rows * 20, shown, strict=True):
            assert len(set(before)) == len(before) == shots
            assert ("train", query) not in before
            assert set(before) <= {("train", row) for row in rows}
    drawn = draw_demonstrations(rows, [None] * 30, 4, rng)
    assert len(drawn) == 30
    assert all(len(set(before)) == 4 for before in drawn)
    assert len({tuple(before) for before in drawn}) > 20  # anew for each


@torch.no_grad()
def test_states_and_logits_of_a_teacher_are_at_the_tokens_of_the_student(tasks, base):
    setup, rows = setup_of(tasks, "captions"), [5, 9, 30]
    splits = setup.splits
    shown = [[("train", row) for row in range(k)] for k in (0, 4, 2)]
    run = teacher._run(base, base, setup, rows, shown)
    states, logits = [[] for _ in range(12)], []
    for row, before in zip(rows, shown, strict=True):
        answer = splits["train"].answers[row]
        own = len(splits["train"].prompts[row]) + len(answer)
        ids = demonstrated(splits, [*before, ("train", row)])
        features = [splits[s].features[r] for s, r in (*before, ("train", row))]
        with recorded_states(base) as recorded:
            output = base(input_ids=torch.tensor([ids]), mm_encoder_outputs=encoded(features))
        logits.append(output.logits[0, -len(answer) - 1 : -1])
        for kept, state in zip(states, recorded, strict=True):
            kept.append(state[0, -own:])
    assert torch.allclose(run.logits, torch.cat(logits), atol=1e-4)
    for found, kept in zip(run.states, states, strict=True):
        assert torch.allclose(found, torch.cat(kept), atol=1e-4)


@torch.no_grad()
def test_recorded_states_are_the_stream_after_attention_and_after_the_ffn(tasks, base):
    batch = collate(tasks["convention"], [("train", 0)])
    with recorded_states(base) as states:
        hidden = base(**batch, output_hidden_states=True).hidden_states
    layers = base.model.language_model.layers
    for number, layer in enumerate(layers):
        attended, after = states[2 * number], states[2 * number + 1]
        assert torch.allclose(attended + layer.mlp(layer.post_attention_layernorm(attended)), after, atol=1e-5)
        if number < len(layers) - 1:  # behind the last there is a norm
            assert torch.equal(after, hidden[number + 1])
    base(**batch)
    assert len(states) == 2 * len(layers)  # no longer recorded


@torch.no_grad()
@pytest.mark.parametrize("drawn", [teacher.drawn_to_states, teacher.drawn_to_answers])
def test_without_demonstrations_there_is_nothing_to_learn_from_a_teacher(tasks, base, monkeypatch, drawn):
    monkeypatch.setattr(teacher, "SHOTS", 0)
    setup, rows = setup_of(tasks, "captions"), [3, 17, 40]
    loss = drawn(base, base, setup, teacher.Teacher(base, setup))(rows)
    assert loss.item() == pytest.approx(0.5 * learner.cross_entropy(base, setup)(rows).item(), abs=1e-6)


@torch.no_grad()
def test_losses_of_a_teacher_are_their_formulas(tasks, base):
    setup, rows = setup_of(tasks, "captions"), [3, 17, 40]
    shown = teacher.Teacher(base, setup).read(rows)
    mine = teacher._run(base, base, setup, rows)
    half = 0.5 * learner.cross_entropy(base, setup)(rows).item()
    errors = [((s - t) ** 2).sum().item() / s.numel() for s, t in zip(mine.states, shown.states, strict=True)]
    found = teacher.drawn_to_states(base, base, setup, teacher.Teacher(base, setup))(rows).item()
    assert sum(errors) / 12 > 0.01
    assert found == pytest.approx(half + sum(errors) / 12, rel=1e-4)
    p, q = shown.logits.double().softmax(dim=-1), mine.logits.double().softmax(dim=-1)
    divergence = (p * (p.log() - q.log())).sum().item() / len(p)
    found = teacher.drawn_to_answers(base, base, setup, teacher.Teacher(base, setup))(rows).item()
    assert divergence > 0.01
    assert found == pytest.approx(half + divergence, rel=1e-4)


def test_a_teacher_stays_the_base_while_its_student_learns(tasks, base):
    read = teacher.Teacher(base, setup_of(tasks))
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    METHODS["mimic"].fit(base, setup_of(tasks))
    with torch.no_grad():
        base.lm_head.weight.zero_()
    assert base.config.text_config._attn_implementation == "mimic" != read.base.config.text_config._attn_implementation
    assert all(torch.equal(value, kept[name]) for name, value in read.base.state_dict().items())


# -- adapters that begin as demonstrations -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("task", ["captions", "convention"])
def test_hificl_begins_as_words_of_its_demonstrations_answers(tasks, base, task):
    setup = setup_of(tasks, task, samples=ALL[10:])
    ids = demonstrated(setup.splits, [("train", row) for row in setup.samples[:8]])
    marks, ends = ([place for place, token in enumerate(ids) if token == TOKEN[of]] for of in (MARK, END))
    if task == "convention":  # answers of one word
        words = [end - 1 for end in ends]
    else:  # eighths of the way from the first word to the end
        words = [
            math.floor(mark + 1 + (end - mark - 1) * i / 8)
            for i, (mark, end) in enumerate(zip(marks, ends, strict=True))
        ]
        assert words[0] == marks[0] + 1 and words[7] > marks[7] + 5
    assert all(mark < word < end for mark, word, end in zip(marks, words, ends, strict=True))
    features = [setup.splits["train"].features[row] for row in setup.samples[:8]]
    places = torch.arange(-len(ids), 0)[None]  # right before the query
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": places, "mm_encoder_outputs": encoded(features)}
    cache = base(**inputs, use_cache=True).past_key_values
    model = METHODS["hificl"].attach(base, setup).model
    layers = [module for module in model.modules() if isinstance(module, HiFICLLayer)]
    assert len(layers) == len(cache) == 6
    for layer, (keys, values, *_) in zip(layers, cache, strict=True):
        pairs = layer._pairs("default")
        for found, expected in ((pairs.keys, keys), (pairs.values, values)):
            assert torch.allclose(found, expected[:, :, words].repeat_interleave(2, dim=1), atol=1e-4)


@pytest.mark.parametrize("words", [1, 2, 7, 8, 16])
@pytest.mark.parametrize("number", [1, 2, 8, 32])
def test_one_word_of_each_answer(number, words):
    answers = [range(100 * i, 100 * i + words) for i in range(number)]
    places = [place - 100 * i for i, place in enumerate(one_word_each(answers))]
    assert places[0] == 0 and places == sorted(places)
    assert len(set(places)) == min(number, words)
    assert places[-1] < words <= places[-1] + max(1, words / number) + 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["prefix-demos", "cartridge-demos"])
def test_a_prefix_begins_as_the_first_tokens_of_its_demonstrations(tasks, base, name):
    setup = setup_of(tasks)
    splits, rows = setup.splits, setup.samples
    before = demonstrated(splits, [("train", row) for row in rows[:8]])[:PREFIX_TOKENS]
    ids = [*before, *splits["test"].prompts[0]]
    pictures = torch.cat([splits["train"].features[row] for row in rows[:8]])[: before.count(TOKEN[IMAGE])]
    query = splits["test"].features[0]
    expected = base(input_ids=torch.tensor([ids]), mm_encoder_outputs=encoded([pictures, query])).logits
    model = METHODS[name].attach(base, setup).model.eval()
    own = torch.tensor([splits["test"].prompts[0]])
    found = model(input_ids=own, attention_mask=torch.ones_like(own), mm_encoder_outputs=encoded([query])).logits
    assert torch.allclose(found, expected[:, PREFIX_TOKENS:], atol=1e-4)


# -- training ----------------------------------------------------------------------------------------------------------


def test_each_epoch_has_every_sample_once():
    rows = list(range(100, 140))
    seen = list(itertools.chain.from_iterable(batches(rows, steps=10, seed=3)))
    assert len(seen) == 160
    epochs = [seen[i : i + 40] for i in range(0, 160, 40)]
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # shuffled anew
    assert seen == list(itertools.chain.from_iterable(batches(rows, steps=10, seed=3)))
    assert all(len(batch) == 16 for batch in batches([1, 2, 3], steps=5, seed=0))


def test_fewer_samples_are_a_part_of_more():
    for seed in range(5):
        drawn = {size: samples(1000, size, seed) for size in (16, 64, 256, 1000)}
        assert all(len(set(rows)) == size for size, rows in drawn.items())
        for few, more in itertools.pairwise(drawn):
            assert drawn[more][:few] == drawn[few]
    assert samples(1000, 16, 0) != samples(1000, 16, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training(bad):
    weight = nn.Parameter(torch.ones(1))
    data = iter([[0], [0], [1], [0]])
    with pytest.raises(FloatingPointError, match="the rate is too high"):
        fit(
            nn.Linear(1, 1),
            lambda rows: (weight * (bad if rows[0] else 1)).sum(),
            [{"params": [weight], "lr": 0.1}],
            data,
            4,
        )
    assert weight.isfinite().all()


def test_every_trained_method_reads_the_same_samples_in_the_same_order_and_with_the_same_recipe(tasks, monkeypatch):
    read = {}
    monkeypatch.setattr(
        learner, "fit", lambda model, loss, groups, data, steps: read[name].append((list(data), steps)) or 0.0
    )
    for name in TRAINED:
        read[name] = []
        METHODS[name].fit(load_base(CHECKPOINT)[1], setup_of(tasks, steps=6, seed=2))
    expected = (list(batches(ALL, 6, 2)), 6)
    assert read == {name: [expected] for name in TRAINED}


@pytest.mark.parametrize("name", ["live", "mimic", "lora-8", "prefix", "ia3", "hificl", "hificl-teacher"])
def test_training_changes_what_the_method_has_and_leaves_the_base(tasks, base, name, monkeypatch):
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    attached = []

    def recorded(model, loss, groups, data, steps):
        attached.extend((p, p.detach().clone()) for group in groups for p in group["params"])
        return fit(model, loss, groups, data, steps)

    monkeypatch.setattr(learner, "fit", recorded)
    set_seed(0)
    fitted = METHODS[name].fit(base, setup_of(tasks))
    assert all(not torch.equal(parameter, start) for parameter, start in attached)
    assert fitted.parameters == sum(parameter.numel() for parameter, _ in attached)
    assert fitted.seconds > 0
    assert not fitted.model.training
    left = {key.replace(".base_layer", ""): value for key, value in base.state_dict().items()}
    assert all(torch.equal(left[key], value) for key, value in kept.items())


def test_no_method_touches_the_vision_tower(tasks):
    """Its pictures are encoded once, without any adapter."""
    for name in TRAINED:
        base = load_base(CHECKPOINT)[1]
        learned = METHODS[name].attach(base, setup_of(tasks))
        frozen = {id(parameter) for parameter in base.model.vision_tower.parameters()}
        frozen |= {id(parameter) for parameter in base.model.multi_modal_projector.parameters()}
        assert not frozen & {id(parameter) for parameter in parameters(learned)}
        tower = [type(module).__module__ for module in base.model.vision_tower.modules()]
        assert not any(module.startswith(("peft", "benchmarks")) for module in tower)
        assert not any(parameter.requires_grad for parameter in base.model.vision_tower.parameters())
