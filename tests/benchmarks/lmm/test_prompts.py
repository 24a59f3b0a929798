"""Any chat template's prompts, in training as in generation, on models of the paper's three classes."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tokenizers import normalizers
from torch.nn.functional import cross_entropy

from benchmarks.lmm.answering import generate
from benchmarks.lmm.methods import Method, normalises_queries, positioned, projections
from benchmarks.lmm.prompts import IGNORED, Encoder
from benchmarks.lmm.recipe import Sizes
from benchmarks.lmm.samples import read
from peft_hificl import HiFICLConfig, initialize_from_demonstrations

from . import tiny

each = pytest.mark.parametrize("name", tiny.MODELS)
ENDS = {"llava": "<|end|>", "idefics2": "<end_of_utterance>", "qwen3_vl": "<|end|>"}


@pytest.fixture
def of(load, root):
    def make(name):
        base, processor = load(name)
        return base, Encoder(processor, "Answer."), read("vqav2", root / "data", "train")

    return make


@each
@torch.no_grad()
def test_the_loss_is_of_answer_and_end_and_of_each_row_alone(name, of):
    base, encoder, found = of(name)
    rows = [found[0], found[3], found[1]]
    batch = encoder.trained(rows)
    said = [encoder.tokenizer.decode(labels[labels != IGNORED]) for labels in batch["labels"]]
    assert [text.strip() for text in said] == [f"{sample.target}{ENDS[name]}" for sample in rows]
    losses = []
    for sample in rows:
        inputs = encoder.asked([sample], [[]])
        ids = encoder.answer(sample)
        for token in ids:  # as in generation: what is said so far is behind the prompt
            logits = base(**inputs).logits[0, -1]
            losses.append(cross_entropy(logits, torch.tensor(token)))
            for key, value in inputs.items():
                if value.ndim == 2 and value.shape == inputs["attention_mask"].shape and key != "attention_mask":
                    new = torch.tensor([[token if key == "input_ids" else 0]])
                    inputs[key] = torch.cat([value, new], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    torch.testing.assert_close(base(**batch).loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)


@each
def test_a_prompt_is_the_same_in_training_and_evaluation(name, of):
    _, encoder, found = of(name)
    asked, trained = encoder.asked([found[3]], [[]]), encoder.trained([found[3]])
    length = asked["input_ids"].shape[1]
    assert torch.equal(trained["input_ids"][:, :length], asked["input_ids"])
    assert bool((trained["labels"][0, :length] == IGNORED).all())
    text = encoder.tokenizer.decode(asked["input_ids"][0])
    assert "What is it?\nAnswer." in text and "a dog" not in text
    shown = encoder.tokenizer.decode(encoder.asked([found[3]], [found[:2]])["input_ids"][0])
    assert shown.index("red") < shown.index("blue") < shown.rindex("What is it?")


@each
def test_answers_of_demonstrations_are_found(name, of):
    _, encoder, found = of(name)
    inputs, places = encoder.demonstrations(found[:4])
    texts = [encoder.tokenizer.decode(inputs["input_ids"][0][list(place)]).strip() for place in places]
    assert texts == ["red", "blue", "green", "a dog"]
    assert len(inputs["input_ids"][0]) >= places[-1].stop + 1  # the end follows


def test_answers_are_found_where_a_template_parts_them_otherwise(load, root):
    """LLaVA's asks with a line break, and says an answer behind a blank and a line break."""
    _, processor = load("llava")
    processor.chat_template = processor.chat_template.replace("['role'] }}\n", "['role'] }} \n")
    encoder, found = Encoder(processor, "Answer."), read("vqav2", root / "data", "train")
    inputs, places = encoder.demonstrations(found[:4])
    texts = [encoder.tokenizer.decode(inputs["input_ids"][0][list(place)]) for place in places]
    assert "assistant \nred" in encoder.tokenizer.decode(inputs["input_ids"][0])
    assert encoder.text(found[0]).endswith("assistant\n") and texts == ["red", "blue", "green", "a dog"]


def test_an_answer_has_no_blank_that_only_begins_a_text(load, root):
    """Llama's older tokenizers put a blank before every text; an answer follows a prompt."""
    _, processor = load("idefics2")
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    encoder, found = Encoder(processor, "Answer."), read("vqav2", root / "data", "train")
    assert encoder.tokenizer.decode(encoder.answer(found[0])) == " red<end_of_utterance>"
    batch, whole = encoder.trained(found[:1]), encoder.text(found[0], answered=True)
    ids = encoder._process([whole], [found[:1]], "right")["input_ids"]
    assert torch.equal(batch["input_ids"], ids[:, : batch["input_ids"].shape[1]])


@each
def test_answers_of_a_batch_are_those_of_each_query_alone(name, of):
    base, encoder, found = of(name)
    shown = [found[4:6], [], found[6:7]]
    alone = [generate(base, encoder, [sample], [before])[0] for sample, before in zip(found[:3], shown, strict=True)]
    assert generate(base, encoder, found[:3], shown) == alone


@each
def test_decoding_is_the_papers(name, of, monkeypatch):
    base, encoder, found = of(name)
    seen = {}
    monkeypatch.setattr(base, "generate", lambda **options: seen.update(options) or options["input_ids"])
    generate(base, encoder, found[:1], [[]])
    assert (seen["max_new_tokens"], seen["length_penalty"], seen["do_sample"]) == (20, 0, False)
    assert seen["num_beams"] == (1 if name == "idefics2" else 3)
    assert encoder.tokenizer.convert_tokens_to_ids(ENDS[name]) in seen["eos_token_id"]


@each
def test_every_method_adapts_the_text_decoder_alone(name, of):
    base, encoder, found = of(name)
    assert normalises_queries(base) == (name == "qwen3_vl")
    layers = "model.text_model" if name == "idefics2" else "model.language_model"
    parts = {f"{layers}.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"}
    assert set(projections(base)) == parts
    for method in ("hificl-paper", "hificl", "lora-2"):
        model = Method.named(method).attach(base, Sizes(n=4, r=2))
        trained = [key for key, p in model.named_parameters() if p.requires_grad]
        assert trained and all(f".{layers.removeprefix('model.')}.layers." in key for key in trained)
        groups = Method.named(method).groups(model, 0.5)
        assert [group["lr"] for group in groups] == ([0.5, 0.15] if method == "hificl" else [0.5])
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        Method.named(method).start(model, encoder, found)
        changed = [
            not torch.equal(a, b)
            for a, b in zip(before, (p for p in model.parameters() if p.requires_grad), strict=True)
        ]
        assert all(changed) if method == "hificl" else not any(changed)
        base = model.unload()


@each
@torch.no_grad()
def test_demonstrations_stand_right_before_a_query(name, of):
    """With every token as a pair, a fresh adapter is in-context learning: so positions, M-RoPE's too, are right."""
    base, encoder, found = of(name)
    inputs, _ = encoder.demonstrations(found[:2])
    query = encoder.asked([found[2]], [[]])
    length = inputs["input_ids"].shape[1]
    whole = {}
    for key, value in query.items():
        tokens = value.ndim == 2 and value.shape == query["attention_mask"].shape
        whole[key] = torch.cat([inputs[key], value], dim=1 if tokens or name == "idefics2" else 0)
    want = base(**whole).logits[:, length:]
    model = get_peft_model(base, HiFICLConfig(n=length, r=length)).eval()
    initialize_from_demonstrations(model, positioned(model, inputs), range(length))
    torch.testing.assert_close(model(**query).logits, want, rtol=2e-3, atol=2e-3)
    with model.disable_adapter():
        assert not torch.allclose(model(**query).logits, want, atol=0.05)


def test_methods_and_their_rates():
    for name in ("1-shot", "zero-shot", "8-shot"):
        assert not Method.named(name).trained and not Method.named(name).rates(False)
    assert Method.named("hificl-paper").rates(False) == (5e-3,)
    assert Method.named("hificl-paper").rates(True) == (5e-4,)
    assert Method.named("hificl").rates(False) == (1.5e-3, 5e-3, 1.5e-2, 5e-2)
    assert Method.named("hificl").rates(True) == (1.5e-4, 5e-4, 1.5e-3, 5e-3)
    assert len(Method.named("lora-16").rates(False)) == 4 and 5e-4 in Method.named("lora-3").rates(True)
    for name in ("lora", "0-shot", "hificl-other", "lora-0"):
        with pytest.raises(ValueError, match=f"No method '{name}': known are zero-shot, K-shot"):
            Method.named(name)


def test_a_processor_without_a_chat_template_is_refused(load):
    _, processor = load("llava")
    processor.chat_template = None
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template"):
        Encoder(processor, "x")
