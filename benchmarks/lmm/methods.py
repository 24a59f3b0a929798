"""The methods: prompts of k demonstrations, HiFICL as in the paper and as recommended, LoRA of any rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_hificl import HiFICLConfig, initialize_from_demonstrations, parameter_groups
from peft_hificl.targets import find_self_attention

from ..quality.methods.adapters import one_word_each
from ..quality.methods.learner import trainable
from . import recipe
from .prompts import Encoder, Inputs
from .recipe import Sizes
from .samples import Sample

Groups = list[dict[str, Any]]

_LORA = (1.7e-4, 5e-4, 1.5e-3, 5e-3)  # the paper's comparison has the second
_HIFICL = (1.5e-3, 5e-3, 1.5e-2, 5e-2)  # the paper has the second
KNOWN = "zero-shot, K-shot, hificl-paper, hificl, lora-R (K and R are numbers: 8-shot, lora-16)"


@dataclass(frozen=True)
class Method:
    """A number of demonstrations in the prompt, or something that is trained."""

    name: str
    shots: int = 0
    rank: int = 0  # of LoRA

    @classmethod
    def named(cls, name: str) -> Method:
        """The method of that name.

        Raises:
            ValueError: there is none.

        Example:
            >>> Method.named("8-shot").shots, Method.named("lora-16").rank, Method.named("hificl").trained
            (8, 16, True)
        """
        if shots := re.fullmatch(r"([1-9]\d*)-shot", name):
            return cls(name, shots=int(shots[1]))
        if rank := re.fullmatch(r"lora-([1-9]\d*)", name):
            return cls(name, rank=int(rank[1]))
        if name not in ("zero-shot", "hificl-paper", "hificl"):
            raise ValueError(f"No method {name!r}: known are {KNOWN}.")
        return cls(name)

    @property
    def trained(self) -> bool:
        return bool(self.rank) or self.name.startswith("hificl")

    def rates(self, normalises_queries: bool) -> tuple[float, ...]:
        """The rates that validation data choose from; the paper's HiFICL has its own one."""
        if self.name == "hificl-paper":
            return (recipe.RATE_OF_QK_NORM if normalises_queries else recipe.RATE,)
        if self.name == "hificl":
            factor = recipe.RATE_OF_QK_NORM / recipe.RATE if normalises_queries else 1
            return tuple(float(f"{factor * rate:.2g}") for rate in _HIFICL)
        return _LORA if self.trained else ()

    def attach(self, base: PreTrainedModel, sizes: Sizes) -> PeftModel:
        """The adapter, on every self-attention of the text decoder and nowhere else."""
        if not self.rank:
            skip = self.name == "hificl"
            return get_peft_model(base, HiFICLConfig(n=sizes.n, r=sizes.r, skip_first_token=skip))
        targets = projections(base)
        return get_peft_model(
            base, LoraConfig(r=self.rank, lora_alpha=2 * self.rank, lora_dropout=0.05, target_modules=targets)
        )

    def start(self, model: PeftModel, encoder: Encoder, samples: Sequence[Sample]) -> None:
        """Let the recommended HiFICL begin as words of the answers of its first training samples."""
        if self.name == "hificl":
            inputs, answers = encoder.demonstrations(samples[: model.active_peft_config.n])
            inputs = positioned(model, inputs)
            initialize_from_demonstrations(model, inputs, one_word_each(answers))

    def groups(self, model: PeftModel, rate: float) -> Groups:
        """What is trained at which rate: the keys of the recommended HiFICL at 0.3 of its rate."""
        if self.name == "hificl":
            return parameter_groups(model, rate)
        return [{"params": trainable(model), "lr": rate}]


def projections(base: PreTrainedModel) -> list[str]:
    """Names of every linear layer of the self-attentions that HiFICL adapts: queries, keys, values and outputs."""
    return [
        f"{attention}.{name}"
        for attention in find_self_attention(base)
        for name, module in base.get_submodule(attention).named_modules()
        if isinstance(module, nn.Linear)
    ]


def normalises_queries(base: PreTrainedModel) -> bool:
    """Whether these attentions normalise queries and keys."""
    return hasattr(base.get_submodule(find_self_attention(base)[0]), "q_norm")


def positioned(model: PeftModel, inputs: Inputs) -> Inputs:
    """Inputs on the model's device; where positions have several dimensions (M-RoPE), with those that end at -1."""
    base: Any = model.get_base_model()
    inputs = {name: value.to(base.device) for name, value in inputs.items()}
    if "mrope_section" in str(getattr(base.config.get_text_config(), "rope_parameters", None)):
        known = {
            name: inputs[name] for name in ("image_grid_thw", "attention_mask", "mm_token_type_ids") if name in inputs
        }
        positions, _ = base.model.get_rope_index(inputs["input_ids"], **known)
        inputs["position_ids"] = positions - positions.max() - 1
    return inputs
