"""The methods that are compared, by the name that results carry; another one is another entry in `METHODS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from torch import nn
from torch.optim import AdamW
from transformers import LlamaForCausalLM

from peft_hificl import (
    HiFICLConfig,
    HiFICLLayer,
    VirtualPairs,
    balance_factors,
    initialize_from_demonstrations,
    parameter_groups,
)

from ..common.tables import Record
from ..quality.methods.adapters import hificl, one_word_each
from ..quality.methods.learner import trainable
from . import task_vector
from .encoding import Row, measure
from .optimizers import MuonOfRows, Preconditioned

PREFIX_TOKENS = 27  # 311,040 parameters on this base, as many as HiFICL with n = 8, r = 8
ANSWERS = "hificl-skip-demos"  # pairs that begin as words of answers; other starts and settings are compared with it
LORA_RATIO = 0.2  # of the rates that are best for a LoRA and for HiFICL alone

Attached = tuple[PeftModel, list[dict[str, Any]]]  # a model and the groups of parameters that are trained
Attach = Callable[[LlamaForCausalLM, Sequence[Row], float], Attached]  # of a base, training samples and a rate
Start = Callable[[PeftModel, Sequence[Row]], None]  # sets what an adapter begins with, by training samples


def prompted(base: LlamaForCausalLM, rows: Mapping[str, Sequence[Row]], split: str, shown: Sequence[Row]) -> Record:
    """What `encoding.measure` tells with these demonstrations before every query."""
    return measure(base, rows[split], shown)


@dataclass(frozen=True)
class Method:
    """Demonstrations in the prompt or, with `attach`, something that is trained.

    Attributes:
        answer: without `attach`, what is measured of the base, given the rows of each split, the name of one, and the
            demonstrations.
    """

    title: str
    shots: int = 0
    answer: Callable[[LlamaForCausalLM, Mapping[str, Sequence[Row]], str, Sequence[Row]], Record] = prompted
    rates: tuple[float, ...] = ()  # as many for each method that is trained, a factor of about 3 apart
    attach: Attach | None = None


@dataclass(frozen=True)
class Adapter:
    """Attaches an adapter of PEFT; HiFICL's keys learn more slowly than its values.

    Attributes:
        config: of the adapter.
        start: makes it begin as the training samples say.
        key_lr_ratio, weight_lr_ratio: rates of HiFICL's keys and log-weights, as fractions of that of its values.
        beside: a LoRA on the same base, whose rate is `LORA_RATIO` of that of the values.
        decay: weight decay of all that is trained, if not that of every method.
        dropout: the share of HiFICL's pairs that a row and head does without in training.
        optimizer: of the parameters.
    """

    config: Callable[[], PeftConfig]
    start: Start | None = None
    key_lr_ratio: float = 0.3
    weight_lr_ratio: float = 1.0
    beside: Callable[[], PeftConfig] | None = None
    decay: float | None = None
    dropout: float = 0.0
    optimizer: type[AdamW] = AdamW

    def __call__(self, base: LlamaForCausalLM, rows: Sequence[Row], rate: float) -> Attached:
        model = get_peft_model(base, self.config())
        if self.start is not None:
            self.start(model, rows)
        if isinstance(model.active_peft_config, HiFICLConfig):
            groups = parameter_groups(model, rate, self.key_lr_ratio, self.weight_lr_ratio)
        else:
            groups = [{"params": trainable(model), "lr": rate}]
        if self.beside is not None:
            base.add_adapter(self.beside(), "beside")
            base.set_adapter(["default", "beside"])
            own = {id(parameter) for group in groups for parameter in group["params"]}
            groups.append({"params": [p for p in trainable(model) if id(p) not in own], "lr": LORA_RATIO * rate})
        if self.decay is not None:
            groups = [group | {"weight_decay": self.decay} for group in groups]
        if self.dropout:
            for layer in model.modules():
                if isinstance(layer, HiFICLLayer):
                    layer.register_forward_hook(drop_pairs(self.dropout))
        return model, groups


def drop_pairs(share: float) -> Callable[[HiFICLLayer, tuple[torch.Tensor, ...], VirtualPairs], VirtualPairs | None]:
    """A hook that takes pairs away in training; the softmax over those that are left needs no other scale."""

    def hook(layer: HiFICLLayer, inputs: tuple[torch.Tensor, ...], pairs: VirtualPairs) -> VirtualPairs | None:
        if not layer.training:
            return None
        query = inputs[0]
        kept = torch.rand(*query.shape[:2], pairs.keys.shape[2], device=query.device) >= share  # (B, H, n)
        weights = torch.zeros_like(kept, dtype=query.dtype) if pairs.log_weights is None else pairs.log_weights
        return pairs._replace(log_weights=weights.masked_fill(~kept, -torch.inf))

    return hook


def lora(r: int, targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules=list(targets))


def ia3() -> PeftConfig:
    targets = ["k_proj", "v_proj", "down_proj"]
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=["down_proj"])


def prefix() -> PeftConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_TOKENS)


def pairs_from_answers(model: PeftModel, rows: Sequence[Row]) -> None:
    """Each pair begins as a word of a demonstration's answer.

    Of more pairs than demonstrations each gives several: the words at the end of its answer, and those before it.
    """
    n = model.active_peft_config.n
    answers, ids = [], list[int]()
    for row in rows[:n]:
        answers.append(range(len(ids) + row.start, len(ids) + len(row.ids) - 1))  # the line's end is no word
        ids += row.ids
    places = one_word_each(answers)
    if n > len(rows):
        each = math.ceil(n / len(rows))
        places = [answer.stop - back for answer in answers for back in range(each, 0, -1)][:n]
    initialize_from_demonstrations(model, {"input_ids": _prompt(model, ids)}, places)


def pairs_from_first_tokens(model: PeftModel, rows: Sequence[Row]) -> None:
    """Pairs begin as the first n tokens of a prompt of demonstrations, as `prefix_from_prompt` has it."""
    ids = _first_tokens(rows, model.active_peft_config.n)
    initialize_from_demonstrations(model, {"input_ids": _prompt(model, ids)}, range(len(ids)))


def with_balanced_factors(start: Start) -> Start:
    """A start with the same pairs, whose factors are balanced."""

    def begin(model: PeftModel, rows: Sequence[Row]) -> None:
        start(model, rows)
        balance_factors(model)

    return begin


@torch.no_grad()
def tied_from_answers(model: PeftModel, rows: Sequence[Row], balanced: bool = True) -> None:
    """Answer words, balanced, but all heads of a layer share a factor A: the nearest to what they begin with.

    Without `balanced` the entries of A have variance one, as the package's.
    """
    pairs_from_answers(model, rows)
    for left, right in _factors(model):
        heads, r, _ = right.weight.shape
        whole = (left.weight @ right.weight).transpose(0, 1).flatten(1)  # (n, H d)
        vectors, values, others = torch.linalg.svd(whole, full_matrices=False)
        shared, own = vectors[:, :r], values[:r, None] * others[:r]  # (n, r), (r, H d)
        if balanced:  # with entries of A and B as large as if each head had an A
            size = values[:r].sqrt() * heads**-0.25
            shared, own = shared * size, own / size[:, None]
        else:
            rotation = torch.linalg.qr(torch.randn(r, r, device=whole.device))[0]
            size = math.sqrt(len(whole))
            shared, own = size * shared @ rotation, rotation.mT @ own / size
        left.weight = nn.Parameter(shared[None])
        right.fill(own.unflatten(1, (heads, -1)).transpose(0, 1))
        left.register_forward_hook(partial(_for_all_heads, heads=heads))


def _factors(model: PeftModel) -> Iterator[tuple[Any, Any]]:
    """A and B of the keys and of the values of each layer."""
    for layer in model.modules():
        if isinstance(layer, HiFICLLayer):
            for name in ("hificl_K", "hificl_V"):
                yield getattr(layer, f"{name}_A")["default"], getattr(layer, f"{name}_B")["default"]


def _for_all_heads(factor: nn.Module, inputs: object, value: torch.Tensor, heads: int) -> torch.Tensor:
    return value.expand(heads, -1, -1)


def pairs_from_prompt(model: PeftModel, rows: Sequence[Row]) -> None:
    """Pairs begin as the tokens and weights that come nearest to a prompt of eight demonstrations."""
    ids = [token for row in rows[:8] for token in row.ids]
    initialize_from_demonstrations(model, {"input_ids": _prompt(model, ids)})


@torch.no_grad()
def prefix_from_prompt(model: PeftModel, rows: Sequence[Row]) -> None:
    """A prefix begins as the first tokens of a prompt of demonstrations."""
    ids = _first_tokens(rows, model.active_peft_config.num_virtual_tokens)
    cache = model.get_base_model()(input_ids=_prompt(model, ids), use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


def _first_tokens(rows: Sequence[Row], number: int) -> list[int]:
    return [token for row in rows for token in row.ids][:number]


def _prompt(model: PeftModel, ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids], device=next(model.parameters()).device)


_LORA, _PAIRS, _IA3 = (1e-3, 3e-3, 1e-2), (5e-3, 1.5e-2, 5e-2), (3e-2, 1e-1, 3e-1)

_WHOLE = {"pair_weights": True, "skip_first_token": True}

_NOT_FACTORISED = {"factorize_keys": False, "factorize_values": False}


def _skipping(**changes: Any) -> Callable[[], PeftConfig]:
    return hificl(**({"skip_first_token": True} | changes))


_TITLE = "HiFICL from answer words, the first token skipped"

# `ANSWERS` with one thing changed, or a few; a change that was best on validation data was taken to the test data.
_CHANGED: dict[str, tuple[str, Adapter]] = {
    "alpha-1": ("alpha = 1", Adapter(_skipping(scale_self_attention=False), pairs_from_answers)),
    "alpha-1-whole": (
        "alpha = 1, n = 9, not factorised",
        Adapter(_skipping(n=9, scale_self_attention=False, **_NOT_FACTORISED), pairs_from_answers),
    ),
    "alpha-1-dropout": (
        "alpha = 1, a fifth of the pairs dropped in training",
        Adapter(_skipping(scale_self_attention=False), pairs_from_answers, dropout=0.2),
    ),
    "weights": ("with log-weights", Adapter(_skipping(pair_weights=True), pairs_from_answers)),
    "whole": ("n = 9, not factorised", Adapter(_skipping(n=9, **_NOT_FACTORISED), pairs_from_answers)),
    "n4": ("n = 4, r = 4", Adapter(_skipping(n=4, r=4), pairs_from_answers)),
    "kv": ("a pair for all query heads of a key/value head", Adapter(_skipping(heads="kv"), pairs_from_answers)),
    "kv-alpha-1-decay": (
        "alpha = 1, weight decay 2, a pair for all query heads of a key/value head",
        Adapter(_skipping(heads="kv", scale_self_attention=False), pairs_from_answers, decay=2.0),
    ),
    "kv-32": (
        "n = 32, r = 18, a pair for all query heads of a key/value head",
        Adapter(_skipping(heads="kv", n=32, r=18), pairs_from_answers),
    ),
    "preconditioned": ("preconditioned factors", Adapter(_skipping(), pairs_from_answers, optimizer=Preconditioned)),
    "muon": ("Muon for the factors B", Adapter(_skipping(), pairs_from_answers, optimizer=MuonOfRows)),
    "balanced": ("balanced factors at the start", Adapter(_skipping(), with_balanced_factors(pairs_from_answers))),
    "kv-balanced": (
        "balanced factors at the start, a pair for all query heads of a key/value head",
        Adapter(_skipping(heads="kv"), with_balanced_factors(pairs_from_answers)),
    ),
    **{
        f"balanced-{name}": (f"{title}, balanced factors at the start", adapter)
        for name, title, adapter in (
            ("16", "n = 16", Adapter(_skipping(n=16), with_balanced_factors(pairs_from_answers))),
            ("keys-1", "one rate", Adapter(_skipping(), with_balanced_factors(pairs_from_answers), key_lr_ratio=1.0)),
            (
                "alpha-1", "alpha = 1",
                Adapter(_skipping(scale_self_attention=False), with_balanced_factors(pairs_from_answers)),
            ),
            ("decay", "weight decay 2", Adapter(_skipping(), with_balanced_factors(pairs_from_answers), decay=2.0)),
            (
                "lora", "r = 5, beside LoRA r = 1",
                Adapter(_skipping(r=5), with_balanced_factors(pairs_from_answers), beside=lora(1)),
            ),
            (
                "kv-lora", "a pair for all query heads of a key/value head, beside LoRA r = 2",
                Adapter(_skipping(heads="kv"), with_balanced_factors(pairs_from_answers), beside=lora(2)),
            ),
        )
    },
    "tied-32": (
        "n = 32, one factor A for all heads, balanced factors at the start",
        Adapter(_skipping(n=32), tied_from_answers),
    ),
    "tied-32-unit": (
        "n = 32, one factor A for all heads", Adapter(_skipping(n=32), partial(tied_from_answers, balanced=False))
    ),
    "lower": (
        "in the lower half of the layers",
        Adapter(_skipping(layers_to_transform=list(range(15))), pairs_from_answers),
    ),
    "second": (
        "in every second layer", Adapter(_skipping(layers_to_transform=list(range(0, 30, 2))), pairs_from_answers)
    ),
    "decay": ("weight decay 2", Adapter(_skipping(), pairs_from_answers, decay=2.0)),
    "dropout": ("a fifth of the pairs dropped in training", Adapter(_skipping(), pairs_from_answers, dropout=0.2)),
    "keys-1": ("one rate", Adapter(_skipping(), pairs_from_answers, key_lr_ratio=1.0)),
    "keys-0.1": ("keys at a tenth of the rate", Adapter(_skipping(), pairs_from_answers, key_lr_ratio=0.1)),
    "random": ("random pairs", Adapter(_skipping())),
    "random-alpha-1": ("random pairs, alpha = 1", Adapter(_skipping(scale_self_attention=False))),
}  # fmt: skip

METHODS: dict[str, Method] = {
    "zero-shot": Method("zero-shot"),
    **{f"{k}-shot": Method(f"{k}-shot", shots=k) for k in (1, 4, 8)},
    "task-vector": Method("Task Vector of 16 samples", shots=16, answer=task_vector.answer),
    "lora-3": Method("LoRA, r = 3", rates=_LORA, attach=Adapter(lora(3))),
    "lora-8": Method("LoRA, r = 8", rates=_LORA, attach=Adapter(lora(8))),
    "lora-qv": Method("LoRA on q and v, r = 6", rates=_LORA, attach=Adapter(lora(6, ["q_proj", "v_proj"]))),
    "lora-3-decay": Method("LoRA, r = 3, weight decay 2", rates=_LORA, attach=Adapter(lora(3), decay=2.0)),
    "lora-mlp": Method(
        "LoRA on the MLP, r = 2", rates=_LORA, attach=Adapter(lora(2, ["gate_proj", "up_proj", "down_proj"]))
    ),
    "ia3": Method("IA3", rates=_IA3, attach=Adapter(ia3)),
    "prefix-demos": Method(
        "prefix tuning from demonstrations", rates=_PAIRS, attach=Adapter(prefix, prefix_from_prompt)
    ),
    "hificl-paper": Method("HiFICL, the paper's start", rates=_PAIRS, attach=Adapter(hificl())),
    "hificl-alpha-1": Method("HiFICL, alpha = 1", rates=_PAIRS, attach=Adapter(hificl(scale_self_attention=False))),
    "hificl-weights": Method("HiFICL with log-weights", rates=_PAIRS, attach=Adapter(hificl(pair_weights=True))),
    "hificl-demos": Method("HiFICL from answer words", rates=_PAIRS, attach=Adapter(hificl(), pairs_from_answers)),
    "hificl-skip": Method(
        "HiFICL, the first token skipped", rates=_PAIRS, attach=Adapter(hificl(skip_first_token=True))
    ),
    "hificl-skip-weights": Method(
        "HiFICL with log-weights, the first token skipped", rates=_PAIRS, attach=Adapter(hificl(**_WHOLE))
    ),
    "hificl-identity": Method(
        "HiFICL from the identity", rates=_PAIRS,
        attach=Adapter(hificl(init_weights="identity", **_WHOLE), weight_lr_ratio=30),
    ),
    ANSWERS: Method(
        _TITLE, rates=_PAIRS,
        attach=Adapter(hificl(skip_first_token=True), pairs_from_answers),
    ),
    "hificl-lora": Method(
        "HiFICL r = 5 from answer words, the first token skipped, and LoRA r = 1", rates=_PAIRS,
        attach=Adapter(hificl(r=5, skip_first_token=True), pairs_from_answers, beside=lora(1)),
    ),
    "hificl-matched": Method(
        "HiFICL from matched demonstrations", rates=_PAIRS, attach=Adapter(hificl(**_WHOLE), pairs_from_prompt)
    ),
    # The first of these pairs is an attention sink itself, so that the first token of a text may see them.
    "hificl-prompt-27": Method(
        "HiFICL from the first tokens of a prompt, n = 27, r = 7, balanced factors", rates=_PAIRS,
        attach=Adapter(hificl(n=27, r=7), with_balanced_factors(pairs_from_first_tokens)),
    ),
    "hificl-prompt-kv-27": Method(
        "HiFICL from the first tokens of a prompt, n = 27, r = 18, balanced factors, per key/value head", rates=_PAIRS,
        attach=Adapter(hificl(heads="kv", n=27, r=18), with_balanced_factors(pairs_from_first_tokens)),
    ),
    "hificl-prompt-kv-27-whole": Method(
        "HiFICL from the first tokens of a prompt, n = 27, not factorised, per key/value head", rates=_PAIRS,
        attach=Adapter(hificl(heads="kv", n=27, **_NOT_FACTORISED), pairs_from_first_tokens),
    ),
    "hificl-prompt-kv-64": Method(
        "HiFICL from the first tokens of a prompt, n = 64, r = 14, balanced factors, per key/value head", rates=_PAIRS,
        attach=Adapter(hificl(heads="kv", n=64, r=14), with_balanced_factors(pairs_from_first_tokens)),
    ),
    "hificl-prompt-kv-lora": Method(
        "HiFICL from the first tokens of a prompt, n = 27, r = 6, balanced factors, per key/value head, and LoRA r = 2",
        rates=_PAIRS,
        attach=Adapter(
            hificl(heads="kv", n=27, r=6), with_balanced_factors(pairs_from_first_tokens), beside=lora(2)
        ),
    ),
    **{
        f"{ANSWERS}-{name}": Method(f"{_TITLE}, {title}", rates=_PAIRS, attach=attach)
        for name, (title, attach) in _CHANGED.items()
    },
}  # fmt: skip
