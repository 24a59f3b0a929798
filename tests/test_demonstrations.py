"""Adapters that begin as demonstrations, and the other initialisations."""

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EsmConfig,
    EsmForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from peft_hificl import HiFICLConfig, HiFICLLayer, initialize_from_demonstrations
from peft_hificl.ops.matching import match_attention

from . import architectures
from .helpers import build, pairs_for
from .zoo import recorded_attention

DEMONSTRATIONS = torch.tensor([[5, 6, 7, 8, 9]])
QUERY = torch.tensor([[3, 4, 11]])


def adapted(kind, **settings):
    torch.manual_seed(0)
    return get_peft_model(build(kind), HiFICLConfig(task_type="CAUSAL_LM", **settings)).eval()


def layers(model):
    return [module for module in model.modules() if isinstance(module, HiFICLLayer)]


@torch.no_grad()
def in_context(model):
    """The logits of the query with the demonstrations in the prompt."""
    with model.disable_adapter():
        return model(input_ids=torch.cat([DEMONSTRATIONS, QUERY], dim=1)).logits[:, -QUERY.shape[1] :]


@pytest.mark.parametrize("kind", ["mha", "gqa"])
@pytest.mark.parametrize("settings", [{"r": 5}, {"r": 7}, {"factorize_keys": False, "factorize_values": False}])
def test_all_tokens_as_pairs_give_the_logits_of_the_prompt(kind, settings):
    model = adapted(kind, n=5, **settings)
    wanted = in_context(model)
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, range(5))
    with torch.no_grad():
        found = model(input_ids=QUERY).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_all_tokens_with_weights_do_too_and_fewer_come_nearer_than_any_others(kind):
    model = adapted(kind, n=5, r=5, pair_weights=True)
    wanted = in_context(model)
    errors = initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS})
    assert list(errors) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert max(errors.values()) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=QUERY).logits, wanted, rtol=1e-3, atol=1e-3)
    few = adapted(kind, n=2, r=2, pair_weights=True)
    chosen = initialize_from_demonstrations(few, {"input_ids": DEMONSTRATIONS})
    weights = [layer.hificl_W["default"].weight for layer in layers(few)]
    assert all((weight != 0).all() for weight in weights)
    for tokens in ([0, 1], [0, 4], [2, 3], [-1, 1]):
        given = initialize_from_demonstrations(few, {"input_ids": DEMONSTRATIONS}, tokens)
        assert all(chosen[name] < given[name] < 1 for name in given)
        assert not any(weight.any() for weight in weights)


def test_each_head_gets_the_keys_and_values_of_its_own_tokens():
    model = adapted("gqa", n=2, r=2, pair_weights=True)
    with torch.no_grad(), recorded_attention() as calls:
        initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS})
    for layer, call in zip(layers(model), calls, strict=True):
        key, value = (t[0].repeat_interleave(2, dim=0) for t in (call.key, call.value))
        match = match_attention(call.query[0][:, [2, 3, 4]], key, value, call.options["scaling"], 2)
        pairs = pairs_for(layer)
        for head in range(4):
            torch.testing.assert_close(pairs.keys[0, head], key[head, match.places[head]], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pairs.values[0, head], value[head, match.places[head]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pairs.log_weights[0], match.log_weights.float())


def test_query_heads_that_share_pairs_choose_together():
    model = adapted("gqa", n=2, r=2, heads="kv", pair_weights=True)
    with torch.no_grad(), recorded_attention() as calls:
        errors = initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS})
    for layer, call, error in zip(layers(model), calls, errors.values(), strict=True):
        query = torch.stack([torch.cat([call.query[0, 2 * g, 2:], call.query[0, 2 * g + 1, 2:]]) for g in (0, 1)])
        match = match_attention(query, call.key[0], call.value[0], call.options["scaling"], 2)
        pairs = pairs_for(layer)
        for head in range(2):
            torch.testing.assert_close(pairs.keys[0, head], call.key[0, head, match.places[head]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pairs.log_weights[0, ::2], match.log_weights.float())
        assert error == pytest.approx(float(match.error.mean()))


def test_without_the_first_token_where_every_row_keeps_its_own():
    model = adapted("gqa", n=4, r=4, pair_weights=True, skip_first_token=True)
    assert max(initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}).values()) < 1e-5
    with torch.no_grad(), recorded_attention() as calls, model.disable_adapter():
        model(input_ids=DEMONSTRATIONS, position_ids=torch.arange(-5, 0)[None])
    for layer, call in zip(layers(model), calls, strict=True):
        rest = call.key[0].repeat_interleave(2, dim=0)[:, 1:]
        distances = torch.cdist(pairs_for(layer).keys[0], rest)
        assert distances.min(dim=1).values.max() < 1e-4  # each of the other tokens is a pair


def test_tokens_of_its_own_need_weights_and_enough_tokens():
    with pytest.raises(ValueError, match=r"does not have: attach it with HiFICLConfig\(pair_weights=True\)"):
        initialize_from_demonstrations(adapted("gqa", n=2, r=2), {"input_ids": DEMONSTRATIONS})
    for skip, words in ((False, "5 tokens for n=6"), (True, r"5 tokens \(the first is left out\) for n=5")):
        model = adapted("gqa", n=5 if skip else 6, r=2, pair_weights=True, skip_first_token=skip)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS})
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_sliding_window_hides_no_pair():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    wide, narrow = (
        get_peft_model(
            MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=window)),
            HiFICLConfig(task_type="CAUSAL_LM", n=5, r=5),
        ).eval()
        for window in (8, 5)
    )
    narrow.load_state_dict(wide.state_dict())
    wanted = in_context(wide)  # 5 + 3 tokens
    for model in (wide, narrow):
        initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, range(5))
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=QUERY).logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):  # unlike tokens of the prompt
        torch.testing.assert_close(in_context(narrow), wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_of_the_base_is_read_and_pairs_stay_in_float32():
    model = get_peft_model(build("gqa").bfloat16(), HiFICLConfig(task_type="CAUSAL_LM", n=5, r=5)).eval()
    exact = get_peft_model(build("gqa").bfloat16().float(), HiFICLConfig(task_type="CAUSAL_LM", n=5, r=5)).eval()
    for each in (model, exact):
        initialize_from_demonstrations(each, {"input_ids": DEMONSTRATIONS}, range(5))
    for mine, theirs in zip(pairs_of(model, "default"), pairs_of(exact, "default"), strict=True):
        torch.testing.assert_close(mine.keys.float(), theirs.keys, rtol=0.05, atol=0.02)
        torch.testing.assert_close(mine.values.float(), theirs.values, rtol=0.05, atol=0.02)
    assert {parameter.dtype for layer in layers(model) for parameter in layer.parameters()} == {torch.float32}
    wanted = in_context(model)
    with torch.no_grad():
        found = model(input_ids=QUERY).logits
        with model.disable_adapter():
            without = model(input_ids=QUERY).logits
    assert (found - wanted).abs().mean() < 0.1 * (without - wanted).abs().mean()  # as near as rounding lets it be


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_without_rotary_embeddings_the_prompt_is_read_where_any_other_is(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        base, attention = GPT2LMHeadModel(GPT2Config(**sizes)), "transformer.h.1.attn"
    else:
        base = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16))
        attention = "bert.encoder.layer.1.attention.self"
    model = get_peft_model(base, HiFICLConfig(n=2, r=2)).eval()
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [1, 4])
    with model.disable_adapter(), torch.no_grad():
        states = model(input_ids=DEMONSTRATIONS, output_hidden_states=True).hidden_states[1]
        module = model.get_base_model().get_submodule(attention)
        if kind == "gpt2":
            states = base.transformer.h[1].ln_1(states)
            keys, values = module.c_attn(states).split(16, dim=-1)[1:]
        else:
            keys, values = module.key(states), module.value(states)
    found = pairs_of(model, "default")[1]
    for mine, theirs in ((found.keys, keys), (found.values, values)):
        heads = theirs[:, [1, 4]].unflatten(-1, (4, 4)).transpose(1, 2)  # (1, H, n, d)
        torch.testing.assert_close(mine, heads, rtol=1e-4, atol=1e-4)


def test_rotary_embeddings_are_found_without_a_configuration_of_them():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = EsmConfig(**sizes, intermediate_size=16, position_embedding_type="rotary", pad_token_id=1)
    assert not hasattr(config, "rope_parameters")
    model = get_peft_model(EsmForSequenceClassification(config), HiFICLConfig(n=2, r=2)).eval()
    read = {}
    for name, more in {
        "found": {},
        "before": {"position_ids": torch.arange(-5, 0)[None]},
        "from 0": {"position_ids": torch.arange(5)[None]},
    }.items():
        initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS, **more}, [1, 4])
        read[name] = pairs_of(model, "default")[1].keys
    torch.testing.assert_close(read["found"], read["before"])
    assert not torch.allclose(read["found"], read["from 0"], rtol=1e-2)


def test_demonstrations_lie_too_far_off_where_positions_begin_at_1():
    """PaliGemma's prompts begin at 1, and what comes right before them ends at 0, not at -1."""
    entry = next(family for family in architectures.FAMILIES if family.name == "paligemma")
    torch.manual_seed(0)
    model = get_peft_model(architectures.build(entry), HiFICLConfig(n=2, r=2)).eval()
    read = {}
    for name, more in {
        "found": {},
        "one too far": {"position_ids": torch.arange(-5, 0)[None]},
        "before the prompt": {"position_ids": torch.arange(-4, 1)[None]},
    }.items():
        initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS, **more}, [1, 4])
        read[name] = pairs_of(model, "default")[1].keys
    torch.testing.assert_close(read["found"], read["one too far"])
    assert not torch.allclose(read["found"], read["before the prompt"], rtol=1e-2)
    with model.disable_adapter(), torch.no_grad():
        prompt, first = model(input_ids=QUERY).logits, torch.arange(1, 4)[None]
        torch.testing.assert_close(prompt, model(input_ids=QUERY, position_ids=first).logits)


def test_a_lower_rank_keeps_the_best_approximation():
    model = adapted("gqa", n=5, r=5)
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, range(5))
    whole = [layer._pairs("default") for layer in layers(model)]
    model = adapted("gqa", n=5, r=2)
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, range(5))
    for layer, exact in zip(layers(model), whole, strict=True):
        for mine, theirs in zip(layer._pairs("default")[:2], exact[:2], strict=True):
            lost = torch.linalg.svdvals(theirs[0])[:, 2:].square().sum(dim=-1)
            torch.testing.assert_close((mine - theirs)[0].square().sum(dim=(-1, -2)), lost, rtol=1e-3, atol=1e-5)


def test_the_chosen_tokens_and_no_others_matter_and_nothing_else_changes():
    model = adapted("gqa", n=2)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    model.train()
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [1, -1])
    first = [layer._pairs("default") for layer in layers(model)]
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in layers(model))
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [1, 4])
    for layer, before in zip(layers(model), first, strict=True):
        torch.testing.assert_close(layer._pairs("default").keys, before.keys)
    for name, value in model.named_parameters():
        assert name not in frozen or torch.equal(value, frozen[name])
    assert all(p.requires_grad for layer in layers(model) for p in layer.parameters())


@pytest.mark.parametrize(
    ("tokens", "inputs", "name", "message"),
    [
        ([0], DEMONSTRATIONS, None, "1 tokens for an adapter of n=2"),
        ([0, 5], DEMONSTRATIONS, None, r"tokens=\[0, 5\] for a prompt of 5 tokens"),
        ([0, 1], DEMONSTRATIONS.expand(2, -1), None, "batch of 2"),
        ([0, 1], DEMONSTRATIONS, "nope", "no HiFICL adapter 'nope'"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(tokens, inputs, name, message):
    model = adapted("gqa", n=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialize_from_demonstrations(model, {"input_ids": inputs}, tokens, adapter_name=name)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in layers(model))


def pairs_of(model, adapter):
    return [layer._pairs(adapter) for layer in layers(model) if adapter in layer.n]


@pytest.mark.parametrize("other", ["hificl", "lora"])
def test_other_adapters_have_no_part_in_what_is_read(other):
    clean = adapted("gqa", n=2, r=2, layers_to_transform=[1])
    initialize_from_demonstrations(clean, {"input_ids": DEMONSTRATIONS}, [1, 4])
    model = adapted("gqa", n=2, r=2, layers_to_transform=[1])
    if other == "hificl":
        config = HiFICLConfig(task_type="CAUSAL_LM", n=2, layers_to_transform=[0], init_weights=False)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    else:
        config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model.base_model.model.add_adapter(config, "other")
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [1, 4], adapter_name="default")
    for mine, theirs in zip(pairs_of(model, "default"), pairs_of(clean, "default"), strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)
    assert gradients == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(getattr(module, "_disable_adapters", False) for module in model.modules())


def test_layers_that_were_compiled_before_are_read():
    """torch.compile does not look for hooks that are registered after it has compiled a call."""
    model, other = adapted("gqa", n=2, r=2), adapted("gqa", n=2, r=2)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager")
    read = {"input_ids": DEMONSTRATIONS, "position_ids": torch.arange(-5, 0)[None], "use_cache": False}
    with torch.no_grad(), model.disable_adapter():
        model.get_base_model()(**read)
    for each in (model, other):
        torch.manual_seed(1)
        initialize_from_demonstrations(each, {"input_ids": DEMONSTRATIONS}, tokens=[1, 3])
    for layer, like in zip(layers(model), layers(other), strict=True):
        torch.testing.assert_close(list(layer.parameters()), list(like.parameters()))


def test_each_module_keeps_its_mode():
    model = adapted("gqa", n=2).train()
    trained, frozen = model.get_base_model().model.layers
    frozen.eval()
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [0, 1])
    assert all(module.training for module in (model, model.get_base_model(), *trained.modules()))
    assert not any(module.training for module in frozen.modules())


def test_a_merged_adapter_is_refused():
    model = adapted("gqa", n=2)
    model.get_base_model().add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "other")
    model.get_base_model().model.layers[0].self_attn.q_proj.merge()
    with pytest.raises(ValueError, match="merged into the base weights"):
        initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [0, 1], adapter_name="default")


def test_padding_is_refused():
    model, mask = adapted("gqa", n=2), torch.tensor([[1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="attention_mask has zeros"):
        initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS, "attention_mask": mask}, [0, 1])


def test_positions_in_several_dimensions_are_refused_unless_given():
    model = adapted("gqa", n=2)
    model.get_base_model().config.rope_parameters["mrope_section"] = [2, 3, 3]
    with pytest.raises(ValueError, match="M-RoPE"):
        initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [0, 1])
    positions = torch.arange(-5, 0)[None]
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS, "position_ids": positions}, [0, 1])


def test_an_offloaded_adapter_is_refused():
    model = adapted("gqa", n=2)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [0, 1])


def test_several_active_adapters_need_a_name():
    model = adapted("gqa", n=2)
    model.add_adapter("other", HiFICLConfig(task_type="CAUSAL_LM", n=3))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"\['default', 'other'\] as active"):
        initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [0, 1])
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [0, 1, 2], adapter_name="other")


@pytest.mark.parametrize("factorize", [True, False])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize(("init", "spread"), [("unit_keys", lambda r: 1.0), (True, lambda r: 0.01 * r**0.5)])
def test_keys_begin_with_the_same_spread_whole_or_in_factors_and_values_at_zero(init, spread, rank, factorize):
    whole = {"factorize_keys": factorize, "factorize_values": factorize}
    model = adapted("mha", n=256, r=rank, init_weights=init, **whole)
    keys = torch.cat([layer._pairs("default").keys.flatten() for layer in layers(model)])
    assert keys.std().item() == pytest.approx(spread(rank), rel=0.1)
    assert abs(keys.mean().item()) < 0.1 * spread(rank)
    assert not any(layer._pairs("default").values.any() for layer in layers(model))


@pytest.mark.parametrize("factorize", [True, False])
def test_without_an_initialisation_every_factor_is_normal(factorize):
    whole = {"factorize_keys": factorize, "factorize_values": factorize}
    model = adapted("mha", n=256, r=16, init_weights=False, **whole)
    parameters = [p for layer in layers(model) for p in layer.parameters()]
    assert len(parameters) == (8 if factorize else 4)
    assert all(p.std().item() == pytest.approx(1, rel=0.1) for p in parameters)


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(ValueError, match="init_weights must be True, False, 'unit_keys' or 'identity', found 'svd'"):
        HiFICLConfig(init_weights="svd")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_an_error_in_a_late_layer_leaves_the_early_ones_as_they_were(error, monkeypatch):
    model = adapted("gqa", n=3, r=2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    set_pairs, calls = HiFICLLayer.set_pairs, 0

    def fails_in_the_second(layer, *args):
        nonlocal calls
        calls += 1
        set_pairs(layer, *args)
        if calls == 2:
            raise error("half-way")

    with monkeypatch.context() as patch:
        patch.setattr(HiFICLLayer, "set_pairs", fails_in_the_second)
        with pytest.raises(error, match="half-way"):
            initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [0, 2, 4])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    initialize_from_demonstrations(model, {"input_ids": DEMONSTRATIONS}, [0, 2, 4])
    assert not all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_rank_above_the_pairs_own_leaves_over_can_learn(device):
    """Factors that had come to nothing begin anew."""
    layer = layers(adapted("gqa", n=2, r=64))[0].to(device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    keys, values = torch.randn(2, 2, 2, 16, device=device)
    layer.set_pairs("default", keys, values)
    for found, pairs, kind in zip(pairs_for(layer)[:2], (keys, values), "KV", strict=True):
        assert found.shape == (1, 4, 2, 16) and found.device.type == device
        if device == "cpu":
            torch.testing.assert_close(found[0], pairs.repeat_interleave(2, dim=0), rtol=1e-4, atol=1e-5)
            left, right = (getattr(layer, f"hificl_{kind}_{factor}")["default"].weight for factor in "AB")
            assert left[:, :, 2:].std().item() == pytest.approx(1, rel=0.2) and not right[:, 2:].any()
