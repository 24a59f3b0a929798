"""Shared models, small enough for one CPU core, built offline from their configuration classes."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Outputs are compared bit by bit. Without this, MKL's AVX-512 products round by where their arguments lie in memory.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

VOCAB = 99
IMAGE = 98  # the id that stands for one image patch


def llama(kv_heads: int = 2, layers: int = 2, **kwargs: object) -> tf.PreTrainedModel:
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=128, initializer_range=0.2,
        pad_token_id=0, bos_token_id=None, eos_token_id=None, **kwargs,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def llava() -> tf.PreTrainedModel:
    vision = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = tf.Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "gqa": llama,
    "mha": lambda: llama(kv_heads=4),
    "vlm": llava,
}


def build(kind: str) -> tf.PreTrainedModel:
    """The same model, with the same weights, at every call."""
    torch.manual_seed(0)
    return BUILDERS[kind]().eval()


def inputs_for(kind: str, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB - 2, (rows, length), generator=generator)
    if kind != "vlm":
        return {"input_ids": ids}
    ids[:, 1:5] = IMAGE  # 4 patches
    return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}


@torch.no_grad()
def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


@pytest.fixture(params=list(BUILDERS))
def kind(request: pytest.FixtureRequest) -> str:
    """A grouped-query decoder, a multi-head decoder and a vision-language model."""
    return request.param
