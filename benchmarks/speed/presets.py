"""The sizes that are measured, the models, and the adapters on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peft_hificl import HiFICLConfig

N, R = 8, 8  # virtual pairs per head and their rank: the paper's, and the number of prefix tuning's virtual tokens
SHOTS = 8  # demonstrations of in-context learning
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]

HIFICL, LORA, PREFIX = "HiFICL", "LoRA", "prefix tuning"

# Without LoRA's dropout, which would only make it slower.
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    LORA: lambda: LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=list(PROJECTIONS)),
    PREFIX: lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
    HIFICL: lambda: HiFICLConfig(task_type="CAUSAL_LM", n=N, r=R),
}


@dataclass(frozen=True)
class Shape:
    """A Llama with grouped queries; its weights are random, which changes no cost."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=16384,
        )


@dataclass(frozen=True)
class Preset:
    """What is measured, and how long."""

    model: Shape
    lifecycle_model: Shape  # 32 layers, which the bar is set for
    lengths: tuple[int, ...]  # of the attention operation
    training_lengths: tuple[int, ...]
    heads: int  # of the attention operation with as many key/value heads
    kv_heads: int  # of the same with grouped queries
    head_dim: int
    image_tokens: int  # of each image in a prompt
    text_tokens: int  # of each question with its answer
    new_tokens: int  # decoded
    seconds: float  # per comparison


_TINY = Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=256)
_SMALL = Shape(hidden=768, layers=12, heads=12, kv_heads=4, intermediate=2304, vocabulary=16384)  # 107M
_1B = Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=128256, tied=True)
_8B = Shape(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256)
_DEEP = Shape(hidden=512, layers=32, heads=8, kv_heads=4, intermediate=1024, vocabulary=8192)

# Idefics2 has 64 tokens an image, LLaVA-1.5 576.
PRESETS = {
    "quick": Preset(
        model=_TINY,
        lifecycle_model=Shape(hidden=32, layers=32, heads=4, kv_heads=2, intermediate=32, vocabulary=64),
        lengths=(64, 128, 256),
        training_lengths=(64,),
        heads=4,
        kv_heads=2,
        head_dim=16,
        image_tokens=8,
        text_tokens=4,
        new_tokens=8,
        seconds=0.1,
    ),
    "cpu": Preset(
        model=_SMALL,
        lifecycle_model=_DEEP,
        lengths=(256, 512, 1024, 2048, 4096),
        training_lengths=(512, 1024),
        heads=8,
        kv_heads=2,
        head_dim=128,
        image_tokens=64,
        text_tokens=16,
        new_tokens=64,
        seconds=10,
    ),
}
PRESETS["1b"] = replace(
    PRESETS["cpu"],
    model=_1B,
    lengths=(256, 512, 1024, 2048, 4096, 8192),
    training_lengths=(512, 1024, 2048),
    heads=32,
    kv_heads=8,
    image_tokens=576,
    text_tokens=30,
    new_tokens=128,
    seconds=2,
)
PRESETS["8b"] = replace(PRESETS["1b"], model=_8B, lifecycle_model=_8B)


def dtype_for(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build(shape: Shape, device: torch.device) -> PreTrainedModel:
    """A frozen model with random weights, made on the device it stays on."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(shape.config(), dtype=dtype_for(device))
    return model.eval().requires_grad_(False)


def adapt(base: PreTrainedModel, method: str) -> PeftModel:
    """An adapted model that shares every weight of the base with it, and no module."""
    memo = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return get_peft_model(copy.deepcopy(base, memo), CONFIGS[method]())
