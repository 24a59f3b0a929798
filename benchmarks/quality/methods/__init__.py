"""The methods that are compared, by the name that results carry.

`learner` says what a method is; what PEFT has comes from PEFT (`adapters`), the others are here and nowhere else:
`task_vector`, `live` and `mimic`, the latter two with a `teacher`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import LlavaForConditionalGeneration

from . import live, mimic, task_vector
from .adapters import adapter, cartridge, hificl, ia3, lora, prefix
from .learner import Attach, Fitted, Learner, Method, Setup, trainable, trained
from .teacher import Teacher, drawn_to_states

SHOTS = (1, 2, 4, 8, 16)
RANKS, PAIRS = (1, 2, 4, 16), (1, 2, 4, 16, 32)  # beside HiFICL's own r = 8, n = 8


def _prompting(base: LlavaForConditionalGeneration, setup: Setup, shots: int) -> Fitted:
    return Fitted(base, shots=shots)


def _own(*, key_lr_ratio: float = 0.3, **changes: Any) -> Attach:
    """HiFICL as it did best on validation data: pairs begin as demonstrations, and keys learn at 0.3 of the rate."""
    return adapter(hificl(**changes), from_demonstrations=True, key_lr_ratio=key_lr_ratio)


def _paper(*, weight_lr_ratio: float = 1.0, **changes: Any) -> Attach:
    """HiFICL without demonstrations, and keys that learn at 0.3 of the rate."""
    return adapter(hificl(**changes), key_lr_ratio=0.3, weight_lr_ratio=weight_lr_ratio)


def _hificl_with_teacher(base: LlavaForConditionalGeneration, setup: Setup) -> Learner:
    teacher = Teacher(base, setup)
    learner = _own()(base, setup)
    return Learner(learner.model, learner.groups, drawn_to_states(learner.model, base, setup, teacher))


# Four rates for each method: three about the one that was best in trials on validation data, and a larger one, as the
# largest of the three was chosen often by each.  With keys that learn more slowly HiFICL's grid is one step higher.
_LORA, _ONE_RATE, _LARGE = (1e-3, 3e-3, 1e-2, 3e-2), (3e-3, 1e-2, 3e-2, 1e-1), (3e-2, 1e-1, 3e-1, 1.0)
_HIFICL = (1e-2, 3e-2, 1e-1, 3e-1)

METHODS = {
    "zero-shot": Method("zero-shot", partial(_prompting, shots=0)),
    **{f"icl-{k}": Method(f"{k}-shot", partial(_prompting, shots=k)) for k in SHOTS},
    "task-vector": Method("Task Vector", task_vector.fit),
    "live": trained("LIVE", _LARGE, live.attach),
    "mimic": trained("MimIC", _LARGE, mimic.attach),
    "lora-8": trained("LoRA, r = 8", _LORA, adapter(lora(8))),
    "lora-3": trained("LoRA, r = 3", _LORA, adapter(lora(3))),
    "lora-16": trained("LoRA, r = 16", _LORA, adapter(lora(16))),
    "prefix": trained("prefix tuning", _LARGE, adapter(prefix)),
    "prefix-demos": trained("prefix tuning from demonstrations", _LARGE, adapter(prefix, from_demonstrations=True)),
    "cartridge": trained("CARTRIDGE", _LARGE, adapter(cartridge)),
    "cartridge-demos": trained("CARTRIDGE from demonstrations", _LARGE, adapter(cartridge, from_demonstrations=True)),
    "ia3": trained("IA3", _LARGE, adapter(ia3)),
    "hificl": trained("HiFICL", _HIFICL, _own()),
    "hificl-one-rate": trained("HiFICL, one rate", _ONE_RATE, adapter(hificl(), from_demonstrations=True)),
    "hificl-paper": trained("HiFICL, the paper's start and one rate", _ONE_RATE, adapter(hificl())),
    "hificl-paper-keys": trained("HiFICL, the paper's start, slower keys", _HIFICL, _paper()),
    "hificl-unit": trained("HiFICL, unit keys and one rate", _ONE_RATE, adapter(hificl(init_weights="unit_keys"))),
    "hificl-teacher": trained("+ teacher", _HIFICL, _hificl_with_teacher),
    "hificl-whole-k": trained("- LoRA on K", _HIFICL, _own(factorize_keys=False)),
    "hificl-whole-v": trained("- LoRA on V", _HIFICL, _own(factorize_values=False)),
    "hificl-alpha-1": trained("w/o SA scaling (alpha = 1)", _HIFICL, _own(scale_self_attention=False)),
    **{f"hificl-r{r}": trained(f"HiFICL, r = {r}", _HIFICL, _own(r=r)) for r in RANKS},
    **{f"hificl-n{n}": trained(f"HiFICL, n = {n}", _HIFICL, _own(n=n)) for n in PAIRS},
}

# Settings of HiFICL that are compared on validation data only (`plan.trials`).
TRIALS = {"hificl-keys-0.1": trained("HiFICL, keys at 0.1 of the rate", _HIFICL, _own(key_lr_ratio=0.1))}
_SKIP = {"pair_weights": True, "skip_first_token": True}
STARTS = {
    "start-alpha-1": trained("the paper's start, alpha = 1", _HIFICL, _paper(scale_self_attention=False)),
    "start-weights": trained("the paper's start with log-weights, the first token skipped", _HIFICL, _paper(**_SKIP)),
    "start-identity": trained(
        "the identity by log-weights", _HIFICL, _paper(init_weights="identity", weight_lr_ratio=30, **_SKIP)
    ),
    "start-demos": trained("demonstrations, the first token skipped", _HIFICL, _own(skip_first_token=True)),
    "start-balanced": trained(
        "demonstrations, the first token skipped, balanced factors",
        _HIFICL,
        adapter(hificl(skip_first_token=True), from_demonstrations=True, key_lr_ratio=0.3, balanced=True),
    ),
}
ALL_METHODS = METHODS | TRIALS | STARTS

__all__ = [
    "ALL_METHODS", "METHODS", "PAIRS", "RANKS", "SHOTS", "STARTS", "TRIALS", "Fitted", "Learner", "Setup", "trainable",
]  # fmt: skip
