"""The models of the paper, and two larger, built from their published configurations without any weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers as tf


def _llava_interleave() -> tf.LlavaConfig:
    text = tf.Qwen2Config(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008,
        vocab_size=152000,
    )  # fmt: skip
    vision = tf.SiglipVisionConfig(
        hidden_size=1152, num_hidden_layers=26, num_attention_heads=16, intermediate_size=4304, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    return tf.LlavaConfig(
        text_config=text, vision_config=vision, vision_feature_layer=-1, vision_feature_select_strategy="full"
    )


def _idefics2() -> tf.Idefics2Config:
    text = tf.MistralConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        vocab_size=32003,
    )  # fmt: skip
    vision = {
        "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304,
        "image_size": 980, "patch_size": 14,
    }  # fmt: skip
    return tf.Idefics2Config(text_config=text, vision_config=vision)


def _qwen3_vl() -> tf.Qwen3VLConfig:
    text = {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    }  # fmt: skip
    return tf.Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": 4096})


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> tf.LlamaConfig:
    return tf.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
    )  # fmt: skip


MODELS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "LLaVA-Interleave-Qwen-7B": _llava_interleave,
    "Idefics2-8B": _idefics2,
    "Qwen3-VL-8B": _qwen3_vl,
    "Llama-2-13B": partial(_llama, 5120, 40, 40, 40, 13824),
    "Llama-2-70B": partial(_llama, 8192, 80, 64, 8, 28672),
}
IMAGE_AND_TEXT = {"LLaVA-Interleave-Qwen-7B": (729, 30), "Idefics2-8B": (64, 30)}  # tokens of a demonstration


def without_weights(config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    vision = hasattr(config, "vision_config")
    auto = tf.AutoModelForImageTextToText if vision else tf.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
