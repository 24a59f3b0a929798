"""The model with random weights and its processor: LLaVA of a SigLIP vision tower and a Qwen2 decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from .language import END, IMAGE, PAD, TOKEN, UNKNOWN
from .scenes import CELL, GRID, IMAGE_SIZE


def make_processor() -> LlavaProcessor:
    backend = Tokenizer(WordLevel(TOKEN, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE},
    )
    image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return LlavaProcessor(image_processor, tokenizer, patch_size=CELL, vision_feature_select_strategy="full")


def make_model() -> LlavaForConditionalGeneration:
    special = {"pad_token_id": TOKEN[PAD], "eos_token_id": TOKEN[END], "bos_token_id": None}
    vision = SiglipVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=CELL,  # a corner of the scene is an image token
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(TOKEN),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},  # 1e3 hides far demonstrations
        initializer_range=0.08,  # about 1/sqrt(hidden_size)
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=TOKEN[IMAGE],
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,  # before SigLIP's last norm, so training must take the model's own forward
        vision_feature_select_strategy="full",
        **special,
    )
    model = LlavaForConditionalGeneration(config)
    # A word must still be readable from its place after some layers, for later words to copy it: words as large as what
    # is added to them, and less added.  With Qwen2's own scales the last layers could not tell one label from another.
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
        for layer in model.model.language_model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_((2 * text.num_hidden_layers) ** -0.5)
    return model


def load_base(folder: Path | str) -> tuple[LlavaProcessor, LlavaForConditionalGeneration]:
    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
