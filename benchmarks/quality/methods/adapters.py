"""Methods that are adapters of PEFT: HiFICL with its ablations, LoRA, IA3, prefix tuning and CARTRIDGE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import CartridgeConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from transformers import LlavaForConditionalGeneration

from peft_hificl import HiFICLConfig, balance_factors, initialize_from_demonstrations, parameter_groups

from ..encoding import Row, collate
from .learner import Attach, Learner, Setup, cross_entropy, trainable

DECODER = r".*language_model\..*\."  # the vision tower has projections of the same names
PREFIX_TOKENS = 20  # as many parameters as HiFICL with n = 8, r = 8 has on the shipped base


def adapter(
    config: Callable[[], PeftConfig],
    *,
    from_demonstrations: bool = False,
    key_lr_ratio: float = 1.0,
    weight_lr_ratio: float = 1.0,
    balanced: bool = False,
) -> Attach:
    """An adapter that is trained by cross-entropy alone; HiFICL's keys and log-weights may have rates of their own."""

    def attach(base: LlavaForConditionalGeneration, setup: Setup) -> Learner:
        model = get_peft_model(base, config())
        if from_demonstrations:
            read_demonstrations(model, setup)
        if balanced:
            balance_factors(model)
        one_rate: list[dict[str, Any]] = [{"params": trainable(model), "lr": setup.rate}]
        groups = parameter_groups(model, setup.rate, key_lr_ratio, weight_lr_ratio) if key_lr_ratio != 1 else one_rate
        return Learner(model, groups, cross_entropy(model, setup))

    return attach


@torch.no_grad()
def read_demonstrations(model: PeftModel, setup: Setup) -> None:
    """Let an adapter begin as what training samples add to attention.

    A prefix begins as the first tokens of a prompt, as PEFT has it; each of HiFICL's pairs as one word of a
    demonstration's answer.
    """
    config = model.active_peft_config
    if not isinstance(config, HiFICLConfig):
        inputs = _prompt(setup, [("train", row) for row in setup.samples[: config.num_virtual_tokens]])
        cache = model.get_base_model()(**inputs, use_cache=True).past_key_values
        initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        return
    rows: list[Row] = [("train", row) for row in setup.samples[: config.n]]
    answers, start = [], 0
    for split, row in rows:
        first = start + len(setup.splits[split].prompts[row])
        start = first + len(setup.splits[split].answers[row])
        answers.append(range(first, start - 1))  # the end token is no word
    initialize_from_demonstrations(model, _prompt(setup, rows), one_word_each(answers))


def one_word_each(answers: Sequence[range]) -> list[int]:
    """A place in each answer: the first in the first, and further on in each of the others.

    So pairs of long answers spread over them, and of answers of one word each is that word.
    """
    return [answer[number * len(answer) // len(answers)] for number, answer in enumerate(answers)]


def _prompt(setup: Setup, rows: list[Row]) -> dict[str, Any]:
    """Demonstrations and no query."""
    inputs = collate(setup.splits, rows[-1:], [rows[:-1]])
    del inputs["labels"]
    return inputs


def hificl(**changes: Any) -> Callable[[], PeftConfig]:
    return lambda: HiFICLConfig(**{"task_type": "CAUSAL_LM", "n": 8, "r": 8, **changes})


def lora(r: int) -> Callable[[], PeftConfig]:
    """As in the paper's comparison: queries, keys, values and outputs, alpha = 2 r, dropout 0.05."""
    targets = DECODER + r"[qkvo]_proj"
    return lambda: LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, lora_dropout=0.05, target_modules=targets)


def ia3() -> PeftConfig:
    targets, feedforward = DECODER + "(k_proj|v_proj|down_proj)", DECODER + "down_proj"
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward)


def prefix() -> PeftConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_TOKENS)


def cartridge() -> PeftConfig:
    return CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_TOKENS, num_frozen_tokens=1)
