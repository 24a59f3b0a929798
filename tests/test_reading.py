"""`inspection.read_pairs` and `pair_similarity`: words by hand, effects by removal, cosines one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_hificl import inspection
from peft_hificl.inspection.effects import pairs_of

from .helpers import VOCAB, adapted, build, config, gpt_oss, hificl_layers, inputs_for, logits, unchanged


def data_for(kind: str) -> list[dict[str, Tensor]]:
    inputs = inputs_for(kind)
    return [{**inputs, "labels": inputs["input_ids"]}]


def gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    )


def by_hand(norm: nn.Module, unembedding: Tensor, written: Tensor) -> Tensor:
    """Logits of a vector in the residual stream; a norm's bias and the unembedding's are the same for all vectors."""
    bias = getattr(norm, "bias", None)
    normed = norm(written) - (0 if bias is None else bias)
    return unembedding @ normed


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gqa", "vlm", "gpt2"])
def test_words_are_those_that_the_pair_writes(kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(gpt2(), config()) if kind == "gpt2" else adapted(kind)
    data = data_for("gqa" if kind == "gpt2" else kind)
    readings = inspection.read_pairs(model.eval(), data, heads=2, words=5)
    assert len(readings) == 6
    base = model.get_base_model()
    for reading in readings:
        attention = base.get_submodule(reading.module)
        value = pairs_of(attention.virtual_pairs).values[0, reading.head, reading.pair]
        place = slice(len(value) * reading.head, len(value) * (reading.head + 1))
        if kind == "gpt2":
            written, norm = value @ attention.c_proj.weight[place], base.transformer.ln_f
        else:
            text = base.model.language_model if kind == "vlm" else base.model
            written, norm = attention.o_proj.weight[:, place] @ value, text.norm
        want = by_hand(norm, base.lm_head.weight, written).topk(5).indices.tolist()
        assert reading.words == want


def test_the_pairs_of_the_heads_that_matter_most(kind: str) -> None:
    model, data = adapted(kind), data_for(kind)
    readings = inspection.read_pairs(model, data, heads=3)
    heads, pairs = inspection.head_effects(model, data).effects, inspection.pair_effects(model, data).effects
    largest = sorted(((e, name, h) for name, of in heads.items() for h, e in enumerate(of.tolist())), reverse=True)[:3]
    found = {(reading.module, reading.head, reading.pair) for reading in readings}
    assert found == {(name, head, pair) for _, name, head in largest for pair in range(3)}
    effects = [reading.effect for reading in readings]
    assert effects == sorted(effects, reverse=True)
    for reading in readings:
        assert reading.effect == pytest.approx(pairs[reading.module][reading.head, reading.pair].item(), abs=1e-5)


def test_words_by_a_tokenizer_and_a_projection_with_a_lora() -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return f"word {ids[0]}"

    model, data = adapted("gqa"), data_for("gqa")
    ids = inspection.read_pairs(model, data, heads=1)
    words = inspection.read_pairs(model, data, Words(), heads=1)
    assert [r.words for r in words] == [[f"word {token}" for token in r.words] for r in ids]
    base = model.unload()
    base.add_adapter(LoraConfig(target_modules=["o_proj"]), adapter_name="lora")  # without effect at its start
    torch.manual_seed(1)
    base.add_adapter(config(), adapter_name="default")
    base.set_adapter(["lora", "default"])
    assert [r.words for r in inspection.read_pairs(base, data, heads=1)] == [r.words for r in ids]


def test_the_model_is_left_as_it_was() -> None:
    model = adapted("gqa")
    with unchanged(model):
        inspection.read_pairs(model, data_for("gqa"), heads=1)
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Linear))


def test_what_cannot_be_read_is_refused() -> None:
    classifier = tf.LlamaForSequenceClassification(build("gqa").config)
    model = get_peft_model(classifier, config(task_type="SEQ_CLS")).eval()
    data = [{"input_ids": inputs_for("gqa")["input_ids"], "labels": torch.tensor([0, 1])}]
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no output embeddings"):
        inspection.read_pairs(model, data)

    model = adapted("gqa")
    attention = model.get_base_model().model.layers[1].self_attn
    attention.o_proj = nn.Sequential(nn.RMSNorm(64), attention.o_proj)  # as in BitNet
    with pytest.raises(ValueError, match=r"The output projection of 'model.layers.1.self_attn' was not found"):
        inspection.read_pairs(model, data_for("gqa"))

    model = adapted("gqa")
    base = model.get_base_model()
    forward = base.model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 0.5
        return output

    base.model.forward = scaled
    with pytest.raises(ValueError, match="The final norm of LlamaForCausalLM was not found"):
        inspection.read_pairs(model, data_for("gqa"))


# -- similarity --------------------------------------------------------------------------------------------------------


def two_adapters() -> PeftModel:
    model = adapted("gqa", name="a")
    torch.manual_seed(7)
    model.add_adapter("b", config(n=2))
    return model


def test_cosines_one_by_one() -> None:
    model = two_adapters()
    found = inspection.pair_similarity(model, "a", "b")
    assert list(found) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for layer, cosines in zip(hificl_layers(model), found.values(), strict=True):
        a, b = pairs_of(layer, "a"), pairs_of(layer, "b")
        assert cosines.keys.shape == cosines.values.shape == (4, 3, 2)
        for head, i, j in [(0, 0, 0), (3, 2, 1), (1, 1, 0)]:
            for part in ("keys", "values"):
                x, y = getattr(a, part)[0, head, i], getattr(b, part)[0, head, j]
                want = torch.dot(x, y) / (x.norm() * y.norm())
                torch.testing.assert_close(getattr(cosines, part)[head, i, j], want)


def test_strengths_do_not_matter_and_shared_pairs_stand_for_each_of_their_heads() -> None:
    model = adapted("gqa", name="a", heads="kv")
    model.add_adapter("b", config(n=2))
    before = inspection.pair_similarity(model, "a", "b")
    for layer in hificl_layers(model):
        layer.set_scale("a", 0)
    for layer, cosines, old in zip(
        hificl_layers(model), inspection.pair_similarity(model, "a", "b").values(), before.values(), strict=True
    ):
        torch.testing.assert_close(cosines, old)
        x, y = layer.pairs_of("a").keys[0, 1, 2], layer.pairs_of("b").keys[0, 3, 1]  # heads 2 and 3 share pairs 1
        torch.testing.assert_close(cosines.keys[3, 2, 1], torch.cosine_similarity(x, y, dim=0))
    assert inspection.pair_similarity(model, "a")["model.layers.0.self_attn"].keys.shape == (2, 3, 3)


def test_duplicates() -> None:
    model = adapted("gqa")
    assert inspection.duplicate_pairs(model, "default", threshold=0.999) == []
    with torch.no_grad():
        for factor in ("K", "V"):
            weight = getattr(hificl_layers(model)[1], f"hificl_{factor}_A")["default"].weight
            weight[2, 2] = 3 * weight[2, 0]  # longer, in the same direction
        hificl_layers(model)[0].hificl_K_A["default"].weight[1] = 1.0  # the same keys, other values
    (found,) = inspection.duplicate_pairs(model, "default", threshold=0.999)
    assert found[:3] == ("model.layers.1.self_attn", 2, (0, 2))
    assert found.keys == pytest.approx(1) == found.values


def test_what_cannot_be_compared_is_refused() -> None:
    model = two_adapters()
    with pytest.raises(ValueError, match="There is no HiFICL adapter 'c'"):
        inspection.pair_similarity(model, "a", "c")
    model = adapted("gqa", name="a", layers_to_transform=[0])
    model.add_adapter("b", config(layers_to_transform=[1]))
    with pytest.raises(ValueError, match="No attention has both adapters, 'a' and 'b'"):
        inspection.pair_similarity(model, "a", "b")


def test_sinks_and_eager() -> None:
    torch.manual_seed(0)
    model = get_peft_model(gpt_oss(), config()).eval()
    assert len(inspection.read_pairs(model, data_for("gqa"), heads=1)) == 3
    assert logits(model, **inputs_for("gqa")).isfinite().all()
