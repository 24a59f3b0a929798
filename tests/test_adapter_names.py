"""One adapter per row (`adapter_names`): each row of a batch equals the row alone under its own adapter."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from peft_hificl import HiFICLConfig, HiFICLLayer, VirtualPairs, concatenate_pairs, select_rows, support
from peft_hificl.ops.formula import Scoring, virtual_attention

from . import architectures, oracle
from .architectures import Family
from .helpers import IMAGE, VOCAB, build, inputs_for, logits

Inputs = dict[str, Tensor]


def config(**kwargs: object) -> HiFICLConfig:
    return HiFICLConfig(**{"n": 3, "r": 2, "init_weights": False, **kwargs})


def with_two(base: nn.Module, **kwargs: object) -> PeftModel:
    """Adapters "a" and "b" of different sizes; "a" is active."""
    torch.manual_seed(1)
    model = get_peft_model(base, config(**kwargs), adapter_name="a").eval()
    torch.manual_seed(2)
    model.add_adapter("b", config(**{"n": 5, **kwargs}))
    return model


@contextmanager
def only(model: PeftModel, name: str) -> Iterator[PeftModel]:
    """The model with one adapter for all rows, or with none."""
    if name == "__base__":
        with model.disable_adapter():
            yield model
        return
    before = model.active_adapters
    model.set_adapter(name)
    try:
        yield model
    finally:
        model.set_adapter(before[0])


def family(model: str) -> Family:
    return next(f for f in architectures.FAMILIES if f.model == model)


def row(inputs: Inputs, i: int, rows: int) -> Inputs:
    """One prompt of a batch, with its part of what has more rows than there are prompts."""
    return {k: v[len(v) // rows * i : len(v) // rows * (i + 1)] for k, v in inputs.items()}


def assert_each_row_alone(model: PeftModel, inputs: Inputs, names: list[str], alone: list[Inputs]) -> None:
    got = logits(model, **inputs, adapter_names=names)
    for i, name in enumerate(names):
        with only(model, name):
            torch.testing.assert_close(got[i : i + 1], logits(model, **alone[i]), rtol=1e-4, atol=1e-5)


def rows_of(inputs: Inputs, rows: int) -> list[Inputs]:
    return [row(inputs, i, rows) for i in range(rows)]


# -- a forward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_each_row_equals_the_row_alone(kind: str, task: str | None) -> None:
    inputs = inputs_for(kind, rows=4)
    model = with_two(build(kind), task_type=task)
    assert_each_row_alone(model, inputs, ["b", "__base__", "a", "b"], rows_of(inputs, 4))


def test_a_batch_without_names_runs_the_active_adapter_before_and_after() -> None:
    model, inputs = with_two(build("gqa")), inputs_for("gqa")
    want = logits(model, **inputs)
    assert not torch.equal(logits(model, **inputs, adapter_names=["b", "__base__"]), want)
    with pytest.raises(IndexError):
        model(input_ids=inputs["input_ids"] + VOCAB, adapter_names=["b", "b"])  # fails on the way
    assert torch.equal(logits(model, **inputs), want)


def test_disabled_adapters_stay_disabled() -> None:
    base, inputs = build("gqa"), inputs_for("gqa")
    want = logits(base, **inputs)
    model = with_two(base, modules_to_save=["lm_head"])
    with model.disable_adapter():
        assert torch.equal(logits(model, **inputs, adapter_names=["a", "b"]), want)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, **inputs, adapter_names=["a", "b"]), want)


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7, 9]}], ids=str)
def test_heads_and_tokens_of_each_adapters_own(extra: dict[str, object]) -> None:
    """ "c" has none: its rows get the base model's."""
    inputs = inputs_for("gqa", rows=4)
    inputs["input_ids"][:, 2] = 7
    model = with_two(build("gqa"), **extra)
    torch.manual_seed(3)
    model.add_adapter("c", config())
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(parameter)
    assert_each_row_alone(model, inputs, ["b", "c", "a", "__base__"], rows_of(inputs, 4))
    model.set_adapter("c")
    assert_each_row_alone(model, inputs, ["b", "c", "a", "__base__"], rows_of(inputs, 4))


def test_copies_have_rows_of_their_own() -> None:
    inputs, names = inputs_for("gqa"), ["b", "a"]
    model = with_two(build("gqa"), modules_to_save=["lm_head"])
    pickled = pickle.dumps(model)  # before its first forward, after which transformers' own hooks cannot be pickled
    want = logits(model, **inputs, adapter_names=names)
    for clone in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(logits(clone, **inputs, adapter_names=names), want)
        nn.init.zeros_(clone.get_base_model().lm_head.modules_to_save["a"].weight)
        assert not torch.equal(logits(clone, **inputs, adapter_names=names), want)
    assert torch.equal(logits(model, **inputs, adapter_names=names), want)


def test_pairs_per_row_in_the_second_set_of_a_union() -> None:
    """One set for all rows beside one for each, with and without log-weights."""
    torch.manual_seed(0)

    def pairs(n: int) -> VirtualPairs:
        return VirtualPairs(*torch.randn(2, 1, 4, n, 8))

    shared, own = pairs(2), [pairs(3), pairs(1)]
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    for union in (
        concatenate_pairs([shared, select_rows(own, [1, 0])]),  # type: ignore[list-item]
        concatenate_pairs([select_rows(own, [1, 0]), shared]),  # type: ignore[list-item]
    ):
        got, _ = virtual_attention(query, key, value, union, Scoring(0.3))
        for i, choice in enumerate((own[1], own[0])):
            keys, values = (torch.cat(both, dim=2) for both in zip(shared[:2], choice[:2], strict=True))
            want, _ = oracle.hificl(*(t[i : i + 1] for t in (query, key, value)), keys, values, 0.3)
            torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-5)
    equal = select_rows([pairs(3), pairs(3)], [1, 0])
    assert equal is not None
    plain = equal._replace(log_weights=None)
    union = concatenate_pairs([shared, plain])
    assert union.log_weights is None
    got, _ = virtual_attention(query, key, value, union, Scoring(0.3))
    for i in (0, 1):
        keys, values = (
            torch.cat([one, each[i : i + 1]], dim=2) for one, each in zip(shared[:2], plain[:2], strict=True)
        )
        want, _ = oracle.hificl(*(t[i : i + 1] for t in (query, key, value)), keys, values, 0.3)
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-5)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_names_that_do_not_fit_are_refused(task: str | None) -> None:
    model, inputs = with_two(build("gqa"), task_type=task), inputs_for("gqa", rows=2)
    model.generation_config.num_beams = 2  # a forward has no beams
    for names, message in (
        (["a"], r"1 entries for a batch of 2 rows"),
        (["a", "b", "a"], r"3 entries for a batch of 2 rows"),
        (["a", "b"] * 2, r"4 entries for a batch of 2 rows"),
        (["a", "nope"], r"non-existing adapter\(s\): nope; there are a, b and __base__"),
        ([], r"must be a list, one name per row"),
        ("a", r"must be a list, one name per row"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, adapter_names=names)
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, adapter_names=names, max_new_tokens=2)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match=message):
            model(inputs_embeds=embeds, adapter_names=names)
        with pytest.raises(ValueError, match=message):
            model(inputs["input_ids"], adapter_names=names)
        with pytest.raises(ValueError, match=message):
            model.generate(inputs=inputs["input_ids"], adapter_names=names, max_new_tokens=2)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**inputs, adapter_names=["a", "a"])


def test_adapters_that_disagree_about_alpha_share_no_batch() -> None:
    model, inputs = with_two(build("gqa")), inputs_for("gqa")
    model.add_adapter("c", config(scale_self_attention=False))
    with pytest.raises(ValueError, match="scale_self_attention"):
        model(**inputs, adapter_names=["a", "c"])


def test_a_model_without_ids_refuses_a_wrong_number_too() -> None:
    whisper = family("WhisperForConditionalGeneration")
    model, inputs = with_two(architectures.build(whisper)), whisper.inputs()
    model.generation_config.num_beams = 2
    ids = torch.tensor([[1, 5, 6]] * 2)
    with pytest.raises(ValueError, match="1 entries for a batch of 2 rows"):
        model(**inputs, decoder_input_ids=ids, adapter_names=["a"])
    with pytest.raises(ValueError, match="3 entries for a batch of 2 rows"):
        model.generate(**inputs, adapter_names=["a", "b", "a"])


def test_a_wrong_number_is_refused_where_the_prompts_are_not_given() -> None:
    """The decoder alone, over what the encoder said before."""
    model, inputs = generator("t5", 3)
    model.generation_config.num_beams = 2
    said = model.get_base_model().encoder(**inputs)
    for names, message in ((["a"], "1 entries for a batch of 3 rows"), (["a", "b"], "2 entries for a batch of 3 rows")):
        with pytest.raises(ValueError, match=message):
            model(encoder_outputs=said, decoder_input_ids=inputs["input_ids"], adapter_names=names)


# -- generate ---------------------------------------------------------------------------------------------------------


def generator(kind: str, rows: int, task: bool = False) -> tuple[PeftModel, Inputs]:
    """A decoder, a vision-language model, or T5 with its encoder adapted, too."""
    if kind != "t5":
        return with_two(build(kind), task_type="CAUSAL_LM" if task else None), inputs_for(kind, rows)
    torch.manual_seed(0)
    small = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}
    base = tf.T5ForConditionalGeneration(tf.T5Config(**small, **ids)).eval()
    targets, task_type = r".*(SelfAttention|EncDecAttention)", "SEQ_2_SEQ_LM" if task else None
    return with_two(base, target_modules=targets, task_type=task_type), inputs_for("gqa", rows)


WHERE = {
    "keyword": lambda model, options: options,
    "configuration": lambda model, options: {"generation_config": tf.GenerationConfig(**options)},
    "model's own": lambda model, options: model.generation_config.update(**options) or {},
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", ["gqa", "vlm", "t5"])
def test_beams(kind: str, where: str) -> None:
    """Of decoders, and of encoders, whose rows are not repeated."""
    (model, inputs), names = generator(kind, 3, task=where != "keyword"), ["b", "__base__", "a"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": 0}
    options = WHERE[where](model, options)
    got = model.generate(**inputs, **options, adapter_names=names)
    assert len(got) == 6
    for i, name in enumerate(names):
        with only(model, name):
            assert torch.equal(got[2 * i : 2 * i + 2], model.generate(**row(inputs, i, 3), **options))


def test_beams_given_override_the_models_own() -> None:
    model, inputs = with_two(build("gqa")), inputs_for("gqa")
    model.generation_config.update(num_beams=2)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    got = model.generate(**inputs, **options, num_beams=3, adapter_names=["b", "a"])
    given = tf.GenerationConfig(**options, num_beams=3)
    assert torch.equal(model.generate(inputs["input_ids"], given, adapter_names=["b", "a"]), got)
    for i, name in enumerate("ba"):
        with only(model, name):
            assert torch.equal(got[i : i + 1], model.generate(**row(inputs, i, 2), **options, num_beams=3))


@pytest.mark.parametrize("kind", ["gqa", "vlm", "t5"])
def test_several_samples_per_prompt(kind: str) -> None:
    """The logits that each was drawn from are those of its prompt's adapter."""
    (model, inputs), names = generator(kind, 2), ["b", "a"]
    torch.manual_seed(0)
    got = model.generate(
        **inputs, adapter_names=names, do_sample=True, num_return_sequences=3, max_new_tokens=4, output_logits=True,
        return_dict_in_generate=True, suppress_tokens=[IMAGE],
    )  # fmt: skip
    drawn = torch.stack(got.logits, dim=1)  # (6, 4, V)
    assert len({tuple(sequence) for sequence in got.sequences.tolist()}) > 2
    for i, sequence in enumerate(got.sequences):
        one = row(inputs, i // 3, 2)
        one |= {"decoder_input_ids" if kind == "t5" else "input_ids": sequence[None, :-1]}
        with only(model, names[i // 3]):
            torch.testing.assert_close(logits(model, **one)[0, -4:], drawn[i], rtol=1e-4, atol=1e-4)


def test_classifier_free_guidance() -> None:
    """Its unconditional forward has the same rows."""
    model, inputs, names = with_two(build("gqa")), inputs_for("gqa", rows=3), ["b", "__base__", "a"]
    negative = inputs_for("gqa", rows=6)["input_ids"][3:, :5]
    options = {"max_new_tokens": 4, "do_sample": False, "guidance_scale": 1.5, "pad_token_id": 0}
    got = model.generate(**inputs, **options, negative_prompt_ids=negative, adapter_names=names)
    for i, name in enumerate(names):
        with only(model, name):
            one = model.generate(**row(inputs, i, 3), **options, negative_prompt_ids=negative[i : i + 1])
            assert torch.equal(got[i : i + 1], one)


# -- images and sounds ------------------------------------------------------------------------------------------------

TOWERS = r".*layers\.\d+\.self_attn"  # and the text decoder


def all_attentions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if support.why_unsupported(module) is None]


@torch.no_grad()
def everywhere(entry: Family) -> tuple[PeftModel, Inputs]:
    """A model of the zoo, adapted wherever it can be: decoder, encoder, towers, projectors."""
    base = architectures.build(entry)
    inputs = architectures.forward_inputs(entry, base)
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"][1] += 1  # prompts differ there, too
    return with_two(base, target_modules=all_attentions(base)), inputs


# Their towers take the patches of all images as one row.
FLAT = {"ernie4_5_vl_moe", "glm4v", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe"}
NOT_RUN = {
    "granite_speech",  # its projector has one row of queries for all sounds
    "paligemma",  # without token types, padding of one row changes the others in the base model, too
}
WITH_MEDIA = [
    f for f in architectures.FAMILIES
    if f.media != "text" and f.kind not in (architectures.DUAL, architectures.ENCODER)
    and f.name not in NOT_RUN
]  # fmt: skip


@pytest.mark.parametrize("entry", WITH_MEDIA, ids=lambda f: f.name)
@pytest.mark.filterwarnings("ignore")
def test_towers_of_the_zoo(entry: Family) -> None:
    model, inputs = everywhere(entry)
    alone = rows_of(inputs, 2)
    with torch.no_grad():
        single = []
        for name, one in zip("ba", alone, strict=True):
            with only(model, name):
                single.append(model(**one)[0])
        if entry.name in FLAT:
            with pytest.raises(
                ValueError, match=r"'.*(vis|attention).*' works on images or sounds.*1 rows for 2 prompts"
            ):
                model(**inputs, adapter_names=["b", "a"])
            got = model(**inputs, adapter_names=["b", "b"])[0][:1]
            single = single[:1]
        else:
            got = model(**inputs, adapter_names=["b", "a"])[0]
    torch.testing.assert_close(got, torch.cat(single), rtol=1e-4, atol=1e-5 * float(got.abs().max()))


def images(*per_prompt: int, kind: str = "vlm") -> tuple[Inputs, list[Inputs]]:
    """Prompts with so many images each, and each prompt alone with its own."""
    generator = torch.Generator().manual_seed(1)
    length = 3 + 4 * max(per_prompt)
    ids = torch.randint(5, VOCAB - 2, (len(per_prompt), length), generator=generator)
    for i, number in enumerate(per_prompt):
        ids[i, 1 : 1 + 4 * number] = IMAGE
    pixels = torch.randn(sum(per_prompt), 3, 8, 8, generator=generator)
    parts = pixels.split(list(per_prompt))
    alone = [
        {"input_ids": ids[i : i + 1], **({"pixel_values": part} if len(part) else {})} for i, part in enumerate(parts)
    ]
    return {"input_ids": ids, "pixel_values": pixels}, alone


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_images_go_with_their_prompts(task: str | None) -> None:
    model = with_two(build("vlm"), target_modules=TOWERS, task_type=task)
    inputs, alone = images(2, 2, 2)
    assert_each_row_alone(model, inputs, ["a", "b", "__base__"], alone)
    for number in ((2, 0), (0, 1), (2, 0, 0)):  # as many images as prompts, or fewer, and all of one
        inputs, alone = images(*number)
        names = ["b" if n else "a" for n in number]
        assert_each_row_alone(model, inputs, names, alone)
    inputs, alone = images(2, 1)  # of one adapter
    assert_each_row_alone(model, inputs, ["b", "b"], alone)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_images_that_may_belong_to_another_prompt_are_refused(task: str | None) -> None:
    model = with_two(build("vlm"), target_modules=TOWERS, task_type=task)
    inputs, _ = images(2, 0, 1)  # as many images as prompts
    message = r"'model\.vision_tower\.\S*' works on images or sounds.*8, 0, 4 placeholders.*one adapter, or leave"
    with pytest.raises(ValueError, match=message):
        model(**inputs, adapter_names=["a", "b", "b"])
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, adapter_names=["a", "b", "b"], max_new_tokens=2)
    inputs, alone = images(1, 1)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for unknown in (
        {"inputs_embeds": embeds},
        {"input_ids": inputs["input_ids"], "past_key_values": tf.DynamicCache()},
        {"input_ids": inputs["input_ids"], "cache": tf.DynamicCache()},  # its name since transformers 5.24
    ):
        with pytest.raises(ValueError, match="ids of the prompts are not given, or those before them are in a cache"):
            model(**unknown, pixel_values=inputs["pixel_values"], adapter_names=["a", "b"])
    assert_each_row_alone(model, inputs, ["a", "b"], alone)
    unknown = {"inputs_embeds": embeds, "pixel_values": inputs["pixel_values"]}
    assert_each_row_alone(model, unknown, ["b", "b"], alone)  # of one adapter, wherever they belong


def test_the_text_decoder_does_not_mind_where_the_images_are() -> None:
    """With the default targets, whole heads included."""
    model = with_two(build("vlm"), modules_to_save=["lm_head"])
    nn.init.normal_(model.get_base_model().lm_head.modules_to_save["b"].weight)
    inputs, alone = images(2, 0, 1)
    assert_each_row_alone(model, inputs, ["a", "b", "b"], alone)


def first_image_only(inputs: Inputs) -> tuple[Inputs, list[Inputs]]:
    """Two prompts, of which the second loses its image, and each alone."""
    pixels, ids = inputs.pop("pixel_values")[:1], inputs["input_ids"]
    ids[1] = ids[1].where(ids[1] != architectures.MEDIA, 10)
    first, second = rows_of(inputs, 2)
    return {**inputs, "pixel_values": pixels}, [{**first, "pixel_values": pixels}, second]


def test_a_classifier_of_each_adapters_own_over_images() -> None:
    """A head has one row per prompt, also where one prompt alone has an image."""
    vlm, cls = family("Gemma3ForConditionalGeneration"), tf.Gemma3ForSequenceClassification
    torch.manual_seed(0)
    model = with_two(cls(cls.config_class(**vlm.config, num_labels=3)).eval(), task_type="SEQ_CLS")
    nn.init.normal_(model.get_base_model().score.modules_to_save["b"].weight)
    inputs, alone = first_image_only(vlm.inputs())
    assert_each_row_alone(model, inputs, ["b", "a"], alone)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_more_images_than_prompts_as_a_models_main_input(task: str | None) -> None:
    base = architectures.build(family("Blip2ForConditionalGeneration"))
    assert base.main_input_name == "pixel_values"
    model, one = with_two(base, task_type=task), architectures.prompt(6)()  # placeholders of two images
    inputs = {**one, "pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    assert_each_row_alone(model, inputs, ["b", "a"], rows_of(inputs, 2))


def test_images_of_different_sizes_are_refused() -> None:
    """Equally many placeholders, but the first image was cut into one tile and the second into three."""
    llava_next = family("LlavaNextForConditionalGeneration")
    model = with_two(architectures.build(llava_next), target_modules=TOWERS)
    inputs = {**llava_next.inputs(), "image_sizes": torch.tensor([[8, 8], [8, 4]])}
    with pytest.raises(ValueError, match="differ in image_sizes"):
        model(**inputs, adapter_names=["a", "b"])


@pytest.mark.parametrize("name", ["Florence2ForConditionalGeneration", "T5Gemma2ForConditionalGeneration"])
def test_an_encoder_beside_a_tower(name: str) -> None:
    """Or around it: the encoder has one row per prompt, also where one prompt alone has an image."""
    model, inputs = everywhere(family(name))
    assert any("encoder" in target for target in model.targeted_module_names)
    inputs, alone = first_image_only(inputs)
    assert_each_row_alone(model, inputs, ["b", "a"], alone)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_several_images_per_prompt(beams: int) -> None:
    model = with_two(build("vlm"), target_modules=TOWERS)
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
        "suppress_tokens": [IMAGE],
    }
    inputs, alone = images(2, 2)
    got = model.generate(**inputs, **options, adapter_names=["b", "a"])
    for i, name in enumerate("ba"):
        with only(model, name):
            assert torch.equal(got[i : i + 1], model.generate(**alone[i], **options))


# -- threads, models within models, compiled models --------------------------------------------------------------------


@contextmanager
def inside(model: PeftModel, action: Callable[[], None]) -> Iterator[None]:
    """Do something while a forward of the model runs, between its first two layers; once."""
    todo = [action]
    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(lambda *_: todo.pop()() if todo else None)
    try:
        yield
    finally:
        handle.remove()


def in_a_thread(action: Callable[[], Any]) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(action()))
    thread.start()
    thread.join()
    return result[0]


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_call_within_a_call(task: str | None) -> None:
    """On another thread or the same, of the same model or another, without names or with others."""
    model = with_two(build("gqa"), modules_to_save=["lm_head"], task_type=task)
    other, inputs = with_two(build("mha")), inputs_for("gqa")
    calls: list[Callable[[], Tensor]] = [
        lambda: logits(model, **inputs),
        lambda: logits(model, **inputs, adapter_names=["__base__", "b"]),
        lambda: in_a_thread(lambda: logits(model, **inputs)),
        lambda: in_a_thread(lambda: logits(model, **inputs, adapter_names=["__base__", "b"])),
        lambda: logits(other, **inputs),
        lambda: logits(other, **inputs, adapter_names=["__base__", "b"]),
    ]
    want, outer = [call() for call in calls], logits(model, **inputs, adapter_names=["b", "a"])
    for call, expected in zip(calls, want, strict=True):
        seen: list[Tensor] = []
        with inside(model, lambda: seen.append(call())):
            assert torch.equal(logits(model, **inputs, adapter_names=["b", "a"]), outer)
        assert torch.equal(seen[0], expected)


def test_no_hook_comes_or_goes_with_a_call() -> None:
    """torch forgets that a removed hook takes keywords while another thread is about to call it."""
    model = with_two(build("gqa"), modules_to_save=["lm_head"])

    def hooks() -> list[list[int]]:
        return [list(m._forward_pre_hooks) for m in model.modules() if isinstance(m, HiFICLLayer) or m is head]

    head = model.get_base_model().lm_head
    before, during = hooks(), []
    with inside(model, lambda: during.append(hooks())):
        logits(model, **inputs_for("gqa"), adapter_names=["b", "a"])
    assert during == [before] and hooks() == before


def test_threads_do_not_meet() -> None:
    model = with_two(build("gqa"))
    rows = [None, ["a", "b"], ["b", "b"], None, ["b", "__base__"], ["__base__", "a"]]
    jobs = [
        (inputs_for("gqa", rows=2, length=4 + i), {} if n is None else {"adapter_names": n}) for i, n in enumerate(rows)
    ]
    want = [logits(model, **inputs, **names) for inputs, names in jobs]
    got: dict[int, list[Tensor]] = {}
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        inputs, names = jobs[i]
        start.wait()
        got[i] = [logits(model, **inputs, **names) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(want):
        assert len(got[i]) == 5 and all(torch.equal(result, expected) for result in got[i])


@pytest.mark.parametrize(
    "how", ["whole", *(pytest.param(how, marks=pytest.mark.slow) for how in ("base", "base-fullgraph"))]
)
def test_a_compiled_model_sees_names_that_come_and_go(how: str) -> None:
    torch._dynamo.reset()
    model, inputs = with_two(build("gqa"), modules_to_save=["lm_head"]), inputs_for("gqa")
    nn.init.normal_(model.get_base_model().lm_head.modules_to_save["b"].weight)
    calls: list[dict[str, Any]] = [{}, {"adapter_names": ["b", "a"]}, {"adapter_names": ["a", "__base__"]}]
    want = [logits(model, **inputs, **call) for call in calls]
    counter = CompileCounter()
    run: Any = model
    if how == "whole":
        run = torch.compile(model, backend=counter)
    else:
        model.get_base_model().compile(backend=counter, fullgraph=how == "base-fullgraph")
    for i in (0, 1, 0, 2, 1, 0):
        torch.testing.assert_close(logits(run, **inputs, **calls[i]), want[i], rtol=1e-5, atol=1e-5)
    got = in_a_thread(lambda: [logits(run, **inputs, **calls[i]) for i in (0, 2)])
    torch.testing.assert_close(got, [want[0], want[2]], rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 4  # one per list of names, and none for coming back to one


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_heads_that_are_wrapped_after_attaching(task: str) -> None:
    """PEFT wraps the heads of these tasks last; a row of the base must have the base's head, with one adapter too."""
    torch.manual_seed(0)
    sizes = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    cls = tf.BertForTokenClassification if task == "TOKEN_CLS" else tf.BertForQuestionAnswering
    model = get_peft_model(cls(sizes), config(task_type=task), adapter_name="a").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
        inputs = inputs_for("gqa")
        mixed = model(**inputs, adapter_names=["a", "__base__"])
        own = model(**inputs)
        with model.disable_adapter():
            base = model(**inputs)
    for key in mixed:
        torch.testing.assert_close(mixed[key][0], own[key][0])
        torch.testing.assert_close(mixed[key][1], base[key][1])
        assert not torch.allclose(own[key][1], base[key][1], atol=1e-3)
