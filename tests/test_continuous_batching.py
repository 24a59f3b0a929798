"""Continuous batching (`generate_batch`): each request as `generate` answers it, whatever the manager has seen."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import logging
import pickle
import queue
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import (
    ContinuousBatchingManager,
    PagedAttentionCache,
    RequestState,
    continuous_api,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_hificl import hotswap_adapter, interface
from peft_hificl.block_sharing import BlockSharing, sharing_of

from .helpers import VOCAB, adapted, build, config, gemma2, gpt_oss, hificl_layers, llama, logits

PROMPT = list(range(5, 22))
PROMPTS = [PROMPT, [9, 10], [*PROMPT[:13], 40], [*PROMPT, 41, 42]]  # the first and the last share four blocks
GREEDY = tf.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
SAMPLED = tf.GenerationConfig(
    max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3, eos_token_id=-1, pad_token_id=0
)  # three times the same sequence


@pytest.fixture(autouse=True, scope="module")
def quick_and_quiet() -> Iterator[None]:
    logger = logging.getLogger("ContinuousBatchingLogger")  # it prints what is expected here
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    gc.collect()
    gc.freeze()  # a manager that stops collects garbage: a second among the objects of the libraries
    yield
    gc.unfreeze()
    logger.setLevel(level)


def mistral() -> tf.PreTrainedModel:
    return tf.MistralForCausalLM(
        tf.MistralConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=5, initializer_range=0.2, pad_token_id=0,
        )
    )  # fmt: skip


def gemma3() -> tf.PreTrainedModel:
    return tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=16, sliding_window=5, initializer_range=0.2, pad_token_id=0,
            layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip


def settings(**changes: object) -> ContinuousBatchingConfig:
    """Batches of at most seven tokens, so that prompts come in chunks, and blocks of four."""
    values = {"num_blocks": 64, "page_size": 4, "max_batch_tokens": 7, "return_logprobs": True, **changes}
    return ContinuousBatchingConfig(**values)


def batch(
    model: nn.Module, prompts: list[list[int]] = PROMPTS, generation: tf.GenerationConfig = GREEDY, **changes: object
) -> list[tuple[list[int], Tensor]]:
    results = model.generate_batch(
        inputs=prompts, generation_config=generation, continuous_batching_config=settings(**changes)
    )
    assert [result.error for result in results.values()] == [None] * len(results)
    return [(result.generated_tokens, torch.tensor(result.logprobs)) for result in results.values()]


@torch.no_grad()
def alone(model: nn.Module, prompt: list[int]) -> tuple[list[int], Tensor]:
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=GREEDY, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    tokens = output.sequences[0, len(prompt) :]
    logprobs = torch.stack(output.logits)[:, 0].log_softmax(-1)  # (T, V)
    return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0]


def assert_same(found: list[tuple[list[int], Tensor]], wanted: list[tuple[list[int], Tensor]]) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    for (_, ours), (_, theirs) in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_first_token_of_each_request_is_skipped(implementation: str) -> None:
    model = adapted("gqa", skip_first_token=True)
    model.get_base_model().set_attn_implementation(implementation)
    wanted = [alone(model, prompt) for prompt in [*PROMPTS, [9]]]
    assert_same(batch(model, [*PROMPTS, [9]]), wanted)
    other = adapted("gqa")
    assert [tokens for tokens, _ in wanted] != [alone(other, prompt)[0] for prompt in [*PROMPTS, [9]]]


class Manager:
    """A manager that lives on between requests."""

    def __init__(self, model: nn.Module) -> None:
        self.manager: ContinuousBatchingManager = model.init_continuous_batching(GREEDY, settings())
        self.manager.start()

    def __call__(self, prompt: list[int]) -> tuple[list[int], Tensor]:
        result = self.fails(prompt)
        assert result.error is None
        return result.generated_tokens, torch.tensor(result.logprobs)

    def fails(self, prompt: list[int], **options: object) -> continuous_api.GenerationOutput:
        self.manager.add_request(prompt, **options)
        result = self.manager.get_result(timeout=20)
        assert result is not None
        return result

    def begin(self, prompt: list[int], tokens: int = 200) -> None:
        """Add a request, and wait for its first token."""
        self.manager.add_request(prompt, max_new_tokens=tokens, streaming=True)
        assert self.manager.get_result(timeout=20).error is None

    def go_on(self, tokens: int = 6) -> None:
        """Wait for some more tokens of the request."""
        before = len(self.manager.get_result(timeout=20).generated_tokens)
        while not self.manager.output_router.output_queue.empty():
            before = len(self.manager.get_result(timeout=20).generated_tokens)
        while len(self.manager.get_result(timeout=20).generated_tokens) < before + tokens:
            pass

    def end(self) -> continuous_api.GenerationOutput:
        """Wait for the end of the request."""
        result = self.manager.get_result(timeout=20)
        while not result.is_finished():
            result = self.manager.get_result(timeout=20)
        return result

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.stop()
        self.manager.destroy()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each request that found blocks in a cache has taken from there."""
    found: list[int] = []
    own = PagedAttentionCache.search_prefix_match

    def search(cache: PagedAttentionCache, request_id: str, prompt_ids: list[int]) -> int:
        tokens = own(cache, request_id, prompt_ids)
        found.extend([tokens] if tokens else [])
        return tokens

    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", search)
    return found


# -- each request as if it were alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, implementation",
    [*itertools.product(["mha", "gqa", mistral, gemma3], ["sdpa", "eager"]), (gemma2, "eager"), (gpt_oss, "eager")],
)
def test_each_request_is_answered_as_by_generate(family: str | Callable[[], nn.Module], implementation: str) -> None:
    """Prompts of different lengths, in chunks and with common prefixes; full and sliding layers, soft-cap, sinks."""
    torch.manual_seed(0)
    base = build(family) if isinstance(family, str) else family().eval()
    base.set_attn_implementation(implementation)
    without = [alone(base, prompt)[0] for prompt in PROMPTS]
    model = get_peft_model(base, config())
    wanted = [alone(model, prompt) for prompt in PROMPTS]
    assert [tokens for tokens, _ in wanted] != without
    assert_same(batch(model), wanted)
    assert base.config._attn_implementation == implementation
    if family is not gemma2:  # transformers' own function leaves out the soft-cap
        with model.disable_adapter():
            assert [tokens for tokens, _ in batch(model)] == without


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_several_adapters_of_transformers_own(implementation: str) -> None:
    model = build("gqa")
    model.set_attn_implementation(implementation)
    for name in ("a", "b"):
        model.add_adapter(config(), name)
    answers = []
    for active in ("a", "b", ["a", "b"]):
        model.set_adapter(active)
        answers.append([alone(model, prompt) for prompt in PROMPTS])
        assert_same(batch(model), answers[-1])
    assert len({str([tokens for tokens, _ in answer]) for answer in answers}) == 3
    model.disable_adapters()
    assert_same(batch(model), [alone(build("gqa"), prompt) for prompt in PROMPTS])


def test_pairs_in_some_layers_alone() -> None:
    model = adapted("gqa", layers_to_transform=[1])
    assert_same(batch(model), [alone(model, prompt) for prompt in PROMPTS])


@pytest.mark.parametrize("given", [{}, {"heads": "kv"}, {"pair_weights": True}, {"factorize_keys": False}])
def test_requests_share_the_blocks_that_they_share_without_an_adapter(
    given: dict[str, object], taken: list[int]
) -> None:
    """In the first batch of a manager too."""
    prompts = [PROMPT, [9, 10], [*PROMPT[:13], 40], [*PROMPT, 41, 42]]
    batch(build("gqa"), prompts)
    without = sorted(taken)
    assert len(without) > 1
    taken.clear()
    model = adapted("gqa", **given)
    assert_same(batch(model, prompts), [alone(model, prompt) for prompt in prompts])
    assert sorted(taken) == without


def test_a_conversation_goes_on(taken: list[int]) -> None:
    """Generated tokens are in blocks as well."""
    model = adapted("gqa")
    with Manager(model) as ask:
        longer = [*PROMPT, *ask(PROMPT)[0], 7, 8]
        assert_same([ask(longer)], [alone(model, longer)])
        assert taken == [20]


@pytest.mark.parametrize(
    "added, active",
    [
        (LoraConfig(target_modules=["q_proj"], init_lora_weights=False), ["a", "b"]),
        (config(modules_to_save=["lm_head"]), "b"),
    ],
)
def test_nothing_is_shared_beside_what_else_was_trained(
    added: PeftConfig, active: str | list[str], taken: list[int]
) -> None:
    """The digest does not know it; it may come while the manager lives."""
    model = build("gqa")
    torch.manual_seed(1)
    model.add_adapter(config(), "a")
    with Manager(model) as ask:
        assert_same([ask(PROMPT)] * 2, [alone(model, PROMPT)] * 2)
        taken.clear()
        model.add_adapter(added, "b")
        model.set_adapter(active)
        assert_same([ask(PROMPT), ask(PROMPT)], [alone(model, PROMPT)] * 2)
    assert_same(batch(model), [alone(model, prompt) for prompt in PROMPTS])
    assert taken == []


@pytest.mark.parametrize("elsewhere", [lambda weight: weight.to("meta"), lambda weight: weight[:0]])
def test_nothing_is_shared_where_weights_are_elsewhere(elsewhere: Callable[[Tensor], Tensor], taken: list[int]) -> None:
    """Offloaded by accelerate, and divided by ZeRO-3; DTensors are no plain parameters."""
    model = adapted("gqa")
    base = model.get_base_model()
    with Manager(model) as ask:
        assert_same([ask(PROMPT), ask(PROMPT)], [alone(model, PROMPT)] * 2)
        assert taken == [16]
        factor = hificl_layers(model)[1].hificl_K_A["default"]
        weight = factor.weight
        factor.weight = nn.Parameter(elsewhere(weight))
        factor.register_forward_pre_hook(lambda *_: setattr(factor, "weight", weight))  # until it is called
        assert_same([ask(PROMPT), ask(PROMPT)], [alone(base, PROMPT)] * 2)
        assert taken == [16]


def test_nothing_is_shared_by_an_older_or_an_unknown_cache() -> None:
    model = adapted("gqa")
    manager = model.init_continuous_batching(GREEDY, settings())
    manager.warmup()  # makes the cache
    older = SimpleNamespace(use_prefix_sharing=True, allow_block_sharing=True)
    unknown, manager.batch_processor.cache = manager.batch_processor.cache, older
    for cache in (older, unknown):
        assert sharing_of(cache, begun=False) is None
        assert not cache.use_prefix_sharing and not cache.allow_block_sharing


@pytest.mark.parametrize("sharing", [True, False])
def test_sequences_of_one_request_share_its_prompt(sharing: bool) -> None:
    model = adapted("gqa")
    wanted = [alone(model, prompt)[0] for prompt in PROMPTS for _ in range(3)]
    assert [tokens for tokens, _ in batch(model, generation=SAMPLED, allow_block_sharing=sharing)] == wanted


@pytest.mark.parametrize("space", [0.0, 0.001])
def test_a_cache_too_small_for_all_requests(space: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are put back, and begin again, or go on with what was copied away for them."""
    own = torch.empty

    def pageable(*args: object, pin_memory: bool = False, **kwargs: object) -> Tensor:  # the other kind needs a GPU
        return own(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", pageable)
    model = adapted("gqa")
    found = batch(model, num_blocks=8, max_batch_tokens=32, cpu_offload_space=space)
    assert_same(found, [alone(model, prompt) for prompt in PROMPTS])


@pytest.mark.slow
def test_compiled() -> None:
    """Padded batches; a graph break where the cache is written, as in transformers' own functions."""
    torch.manual_seed(0)
    model = get_peft_model(llama(layers=1).eval(), config())
    compiled = tf.CompileConfig(backend="eager", mode=None, fullgraph=False, dynamic=True)
    padded = {"q_padding_interval_size": 8, "kv_padding_interval_size": 64}
    found = batch(model, PROMPTS[:2], varlen_compile_config=compiled, **padded)
    assert_same(found, [alone(model, prompt) for prompt in PROMPTS[:2]])


def test_generate_with_a_paged_cache() -> None:
    model = adapted("gqa")
    paged = model.generate(
        input_ids=torch.tensor([PROMPT]), generation_config=GREEDY, cache_implementation="paged",
        continuous_batching_config=settings(),
    )  # fmt: skip
    assert paged.flatten().tolist() == PROMPT + alone(model, PROMPT)[0]


# -- a manager that outlives an adapter ------------------------------------------------------------------------------


def switch(model: PeftModel) -> None:
    model.set_adapter("b")


def disable(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def weaken(model: PeftModel) -> None:
    for layer in hificl_layers(model):
        layer.set_scale("default", 0.5)


def use_otherwise(model: PeftModel) -> None:
    """The same weights."""
    model.add_adapter("c", config(scale_self_attention=False))
    load(model, "default", "c")
    model.set_adapter("c")


@torch.no_grad()
def edit(model: PeftModel) -> None:
    for layer in hificl_layers(model):
        for parameter in layer.parameters():
            parameter.mul_(-1.5)


def edit_data(model: PeftModel) -> None:
    for layer in hificl_layers(model):
        for parameter in layer.parameters():
            parameter.data.mul_(-1.5)


def edit_memory(model: PeftModel) -> None:
    for layer in hificl_layers(model):
        for parameter in layer.parameters():
            parameter.detach().numpy()[...] *= -1.5


def load(model: PeftModel, source: str = "b", target: str = "default") -> None:
    state = get_peft_model_state_dict(model, adapter_name=source)
    set_peft_model_state_dict(model, {key: value.clone() for key, value in state.items()}, adapter_name=target)


def swap(model: PeftModel) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["b"])
        hotswap_adapter(model, Path(folder, "b"), "default")


def delete(model: PeftModel) -> None:
    model.delete_adapter("default")


def add_again(model: PeftModel) -> None:
    model.delete_adapter("default")
    model.add_adapter("default", config())
    model.set_adapter("default")


def unload(model: PeftModel) -> None:
    model.unload()


@pytest.mark.parametrize(
    "change",
    [switch, disable, weaken, use_otherwise, edit, edit_data, edit_memory, load, swap, delete, add_again, unload],
)
def test_no_block_of_another_adapter_is_served(change: Callable[[PeftModel], None], taken: list[int]) -> None:
    model = adapted("gqa")
    torch.manual_seed(2)
    model.add_adapter("b", config())
    base = model.get_base_model()
    before = alone(base, PROMPT)
    with Manager(model) as ask:
        assert_same([ask(PROMPT), ask(PROMPT)], [before, before])
        assert taken == [16]
        change(model)
        after = alone(base, PROMPT)
        assert after[0] != before[0]
        assert_same([ask(PROMPT), ask([*PROMPT, 41, 42])], [after, alone(base, [*PROMPT, 41, 42])])
        assert taken == [16, 16]


def test_each_adapter_finds_its_own_blocks_again(taken: list[int]) -> None:
    model = adapted("gqa")
    torch.manual_seed(2)
    model.add_adapter("b", config())
    model.add_adapter("copy of b", config())
    load(model, "b", "copy of b")
    base = model.get_base_model()
    wanted = {}
    with Manager(model) as ask:
        for name in ("default", "b"):
            model.set_adapter(name)
            wanted[name] = alone(base, PROMPT)
            assert_same([ask(PROMPT)], [wanted[name]])
        with model.disable_adapter():
            without = alone(base, PROMPT)
            assert_same([ask(PROMPT)], [without])
        assert taken == []
        for name in ("default", "b", "default"):
            model.set_adapter(name)
            assert_same([ask(PROMPT)], [wanted[name]])
        model.set_adapter("copy of b")  # the digest is of the weights, not of a name
        assert_same([ask(PROMPT)], [wanted["b"]])
        with model.disable_adapter():
            assert_same([ask(PROMPT)], [without])
        assert taken == [16] * 5


def test_a_kept_manager(taken: list[int]) -> None:
    """It is kept on the model from call to call; one of the time before the adapter is not."""
    base = build("gqa")
    keep = {"inputs": [PROMPT], "generation_config": GREEDY, "continuous_batching_config": settings()}
    base.generate_batch(**keep, persistent_manager=True)
    model = get_peft_model(base, config())
    torch.manual_seed(2)
    model.add_adapter("b", config())
    for name in ("default", "b", "default"):
        model.set_adapter(name)
        (result,) = model.generate_batch(**keep, persistent_manager=True).values()
        assert result.generated_tokens == alone(model, PROMPT)[0]
    assert taken == [16]
    base.destroy_cached_continuous_batching_manager()


def test_a_kept_manager_after_an_error(taken: list[int]) -> None:
    """The request had been given blocks, and its forward has not reached an adapter."""
    model = adapted("gqa")
    model.add_adapter("b", config())
    with Manager(model) as ask:
        ask(PROMPT)
        broken = model.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
        assert "division by zero" in ask.fails(PROMPT).error
        assert taken == [16]
        broken.remove()
        ask.manager.stop(keep_for_next_session=True)
        switch(model)
        ask.manager.start()
        assert_same([ask(PROMPT)], [alone(model, PROMPT)])
        assert taken == [16]
    model.destroy_cached_continuous_batching_manager()


def test_a_running_manager_of_the_time_before_the_adapter(taken: list[int]) -> None:
    base = build("gqa")
    with Manager(base) as ask:
        ask(PROMPT)
        model = get_peft_model(base, config())
        assert "without its HiFICL adapter" in ask.fails(PROMPT).error
    assert_same(batch(model), [alone(model, prompt) for prompt in PROMPTS])
    base = build("gqa")
    taken.clear()
    with Manager(base) as ask:
        block = PROMPT[:4]
        ask(block)
        model = get_peft_model(base, config())
        assert_same([ask(block), ask(PROMPT), ask(PROMPT)], [alone(model, p) for p in (block, PROMPT, PROMPT)])
    assert taken == []


@pytest.mark.parametrize("change", [switch, disable, delete, weaken])
def test_a_switch_while_requests_are_running_ends_them(change: Callable[[PeftModel], None]) -> None:
    model = adapted("gqa")
    model.add_adapter("b", config())
    with Manager(model) as ask:
        ask.begin(PROMPT)
        with ask.manager.pause():
            change(model)
        error = ask.end().error
        assert "have changed from {'default': 1.0} to" in error and "let the manager finish" in error
        ask.manager._generation_thread.join(20)
        assert not ask.manager.is_running()
    assert_same(batch(model), [alone(model, prompt) for prompt in PROMPTS])


def test_an_adapter_on_further_layers_while_requests_are_running_ends_them() -> None:
    model = adapted("gqa", layers_to_transform=[0])
    with Manager(model) as ask:
        ask.begin(PROMPT)
        with ask.manager.pause():
            model.add_adapter("b", config(layers_to_transform=[1]))
            model.base_model.set_adapter(["default", "b"])  # layer 0 is what it was
        assert "have changed from {} to {'b': 1.0}" in ask.end().error


def test_a_switch_while_a_request_is_running_that_shares_no_blocks() -> None:
    torch.manual_seed(0)
    model = get_peft_model(mistral().eval(), config())
    model.add_adapter("b", config())
    with Manager(model) as ask:
        ask.begin(PROMPT)
        with ask.manager.pause():
            switch(model)
        assert "have changed from" in ask.end().error


def test_weights_edited_while_requests_are_running(taken: list[int]) -> None:
    """They go on with the keys and values that they have, and do not begin again; others take nothing from them."""
    model = adapted("gqa")
    before = alone(model, PROMPT)[0]
    with Manager(model) as ask:
        ask.begin(PROMPT)
        with ask.manager.pause():
            edit_data(model)
        result = ask.end()
        assert result.error is None and len(result.generated_tokens) == 200
        assert result.generated_tokens[0] == before[0] != alone(model, PROMPT)[0][0]
        longer = PROMPT + result.generated_tokens
        assert_same([ask(longer)], [alone(model, longer)])
        assert taken == []


@pytest.mark.parametrize("detached", [False, True])
def test_other_weights_for_a_while(detached: bool, taken: list[int]) -> None:
    """A request is running while weights are edited, or the adapter is gone, and come back: not all of it is theirs."""
    model = adapted("gqa")
    state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    with Manager(model) as ask:
        ask.begin(PROMPT, tokens=150)
        with ask.manager.pause():
            base = model.unload() if detached else edit_data(model)
        ask.go_on()
        with ask.manager.pause():
            if detached:
                model = get_peft_model(base, config())
            set_peft_model_state_dict(model, state)
        result = ask.end()
        assert result.error is None
        longer = PROMPT + result.generated_tokens
        assert_same([ask(longer), ask(longer)], [alone(model, longer)] * 2)
        assert taken[-1] == 164  # the second of these two


def test_a_batch_whose_blocks_are_registered_after_the_next_has_begun() -> None:
    """As asynchronous batching does it, which needs a GPU."""
    model = adapted("gqa")
    base = model.get_base_model()
    manager = model.init_continuous_batching(GREEDY, settings())
    manager.warmup()  # makes the cache
    cache = manager.batch_processor.cache
    sharing = BlockSharing(cache, base, begun=False)

    def admit(name: str) -> tuple[RequestState, int]:
        """A request, and how many of its tokens are there."""
        state = RequestState(name, list(PROMPT))
        state.position_offset = cache.search_prefix_match(name, state.initial_tokens)
        assert cache.can_store_request_tokens(state, len(PROMPT) - state.position_offset)
        return state, state.position_offset

    first, there = admit("first")
    assert there == 0
    sharing.begin_forward()
    edit_data(model)
    second, there = admit("second")
    assert there == 0
    sharing.begin_forward()
    cache.mark_complete_blocks(first, {"full_attention": 4})
    assert admit("third")[1] == 0
    cache.mark_complete_blocks(second, {"full_attention": 4})
    assert admit("fourth")[1] == 16
    for name in ("first", "second", "third"):
        cache.free_blocks(name)
    sharing.begin_forward()
    assert sharing._pure == {"fourth"}  # no name of a request that is over is kept


# -- what is refused, in the thread of the caller ----------------------------------------------------------------------


def transformers_own(model: PeftModel) -> nn.Module:
    return model.get_base_model()


@pytest.mark.parametrize("of", [lambda model: model, transformers_own])
def test_what_is_refused_is_refused_by_the_call(of: Callable[[PeftModel], nn.Module]) -> None:
    model = adapted("gqa")
    called = of(model)
    with pytest.raises(ValueError, match="adapter_names.*once per adapter"):
        called.generate_batch(inputs=PROMPTS, adapter_names=["default"] * 4)
    with pytest.raises(ValueError, match="use_cuda_graph=True.*Leave use_cuda_graph out"):
        batch(called, use_cuda_graph=True)
    with pytest.raises(ValueError, match="use_cuda_graph"):
        called.init_continuous_batching(GREEDY, settings(use_cuda_graph=(False, True)))
    model.get_base_model().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*LlamaAttention.*set_attn_implementation"):
        batch(called)
    with (
        pytest.raises(ValueError, match="flash_attention_2"),
        called.continuous_batching_context_manager(GREEDY, continuous_batching_config=settings()),
    ):
        pass
    model.get_base_model().config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention is not supported for continuous batching"):
        batch(called)
    called.set_attn_implementation("sdpa")
    assert_same(batch(called), [alone(model, prompt) for prompt in PROMPTS])


@pytest.mark.parametrize("implementation, used", [("sdpa", "sdpa"), ("eager", "paged|eager")])
def test_a_replaced_attention_is_refused_by_the_call(
    implementation: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("gqa")
    model.get_base_model().set_attn_implementation(implementation)
    own = ALL_ATTENTION_FUNCTIONS[used]
    monkeypatch.setitem(AttentionInterface._global_mapping, used, functools.partial(own))
    with pytest.raises(ValueError, match=f"has taken the place.*{re.escape(used)}"):
        batch(model)
    with model.disable_adapter():
        assert_same(batch(model), [alone(build("gqa"), prompt) for prompt in PROMPTS])


def test_adapter_names_are_refused_wherever_they_are_given() -> None:
    model = adapted("gqa")
    inputs = {"input_ids": torch.tensor([PROMPT]), "generation_config": GREEDY, "cache_implementation": "paged"}
    with pytest.raises(ValueError, match="adapter_names.*once per adapter"):
        model.generate(**inputs, adapter_names=["__base__"])
    with pytest.raises(ValueError, match="adapter_names.*once per adapter"):
        model.get_base_model().generate(**inputs, adapter_names=["__base__"])
    with pytest.raises(TypeError, match="adapter_names"):
        model.init_continuous_batching(GREEDY, settings(), adapter_names=["__base__"])
    with Manager(model) as ask:
        assert "adapter_names" in ask.fails(PROMPT, adapter_names=["__base__"]).error


def test_a_list_of_layers_is_adapted(taken: list[int]) -> None:
    """There is no model below the tuner, whose forward would be told of the cache."""
    base, part = build("gqa"), config(target_modules=r".*self_attn")
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        inject_adapter_in_model(copy.deepcopy(part), base.model.layers, name)
    base.eval()
    wanted = []
    with Manager(base) as ask:
        for name in ("a", "b"):
            for layer in hificl_layers(base):
                layer.set_adapter([name])
            wanted.append(alone(base, PROMPT))
            assert_same([ask(PROMPT)], [wanted[-1]])
        ask.begin(PROMPT)
        with ask.manager.pause():
            for layer in hificl_layers(base):
                layer.set_adapter(["a"])
        assert "have changed from {'b': 1.0} to {'a': 1.0}" in ask.end().error
    assert wanted[0][0] != wanted[1][0] and taken == []


def test_a_model_around_the_adapted_one_does_not_know(monkeypatch: pytest.MonkeyPatch, taken: list[int]) -> None:
    """It finds errors in the results, passes over `adapter_names`, and shares no blocks."""
    base = build("gqa")
    get_peft_model(base.model, config())
    wanted = [alone(base, prompt) for prompt in PROMPTS]
    assert wanted[0][0] != alone(build("gqa"), PROMPT)[0]
    assert_same(batch(base), wanted)
    assert taken == []
    given = {"inputs": PROMPTS, "generation_config": GREEDY, "continuous_batching_config": settings()}
    named = base.generate_batch(**given, adapter_names=["__base__"] * 4)
    assert [result.generated_tokens for result in named.values()] == [tokens for tokens, _ in wanted]
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", functools.partial(own))
    results = base.generate_batch(**given).values()
    assert results and all("has taken the place" in result.error for result in results)


def test_flash_attention_is_not_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed, transformers switches to it by itself."""
    switched: queue.Queue[object] = queue.Queue()
    for version in (2, 3):
        monkeypatch.setattr(continuous_api, f"is_flash_attn_{version}_available", lambda **_: True)
    model = adapted("gqa")
    monkeypatch.setattr(type(model.get_base_model()), "set_attn_implementation", lambda self, name: switched.put(name))
    given = settings()
    results = model.generate_batch(inputs=PROMPTS, generation_config=GREEDY, continuous_batching_config=given)
    assert switched.empty() and given.auto_switch_to_flash
    assert [result.generated_tokens for result in results.values()] == [alone(model, prompt)[0] for prompt in PROMPTS]
    model.init_continuous_batching(GREEDY)  # without a configuration
    assert switched.empty()


def test_paged_eager_is_for_continuous_batching_alone() -> None:
    base = build("gqa")
    base.set_attn_implementation("paged|eager")
    model = get_peft_model(base, config())
    found = batch(model)
    with pytest.raises(ValueError, match=r"paged\|eager.*set_attn_implementation\('eager'\)"):
        logits(model, input_ids=torch.tensor([PROMPT]), attention_mask=torch.zeros(1, 1, 17, 17))
    base.set_attn_implementation("eager")
    assert_same(found, [alone(model, prompt) for prompt in PROMPTS])


def test_keys_that_the_attention_module_has_written_are_taken_as_they_are() -> None:
    """As since transformers 5.24: the attention function gets no cache, but those of all requests."""
    base = build("gqa")
    base.set_attn_implementation("paged|eager")
    layer, _ = hificl_layers(get_peft_model(base, config()))
    key, value = torch.randn(2, 1, 2, 5, 8)
    attention = base.model.layers[0].self_attn
    found = interface._with_paged_past(attention, layer, key, value, {"write_index": []})
    assert found[0] is key and found[1] is value
    base.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="reads no paged cache under 'flex_attention'"):
        interface._with_paged_past(attention, layer, key, value, {"write_index": []})


def test_copies_check_themselves_and_unload_leaves_nothing() -> None:
    model = adapted("gqa")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for layer in hificl_layers(copied):
            for parameter in layer.parameters():
                parameter.data.mul_(-1.5)
        assert_same(batch(copied), [alone(copied, prompt) for prompt in PROMPTS])
        assert alone(copied, PROMPT)[0] != alone(model, PROMPT)[0]
        with pytest.raises(ValueError, match="adapter_names"):
            copied.generate_batch(inputs=PROMPTS, adapter_names=["default"] * 4)
    base = model.unload()
    assert not {"generate_batch", "init_continuous_batching"} & set(vars(base))
    assert_same(batch(base), [alone(build("gqa"), prompt) for prompt in PROMPTS])
