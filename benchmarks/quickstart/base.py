"""The base model: a small LLaVA (SigLIP vision tower, Qwen2 text decoder with grouped queries), made on the spot.

It learns to name the digit in a picture, to tell whether a picture shows a given digit and, without a picture, to say a
given word.  The last is how it has met every answer word without having seen a new task.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
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
    set_seed,
)

from .data import DIGITS, IMAGE_SIZE, NAMING, NEW_TASKS
from .training import END, PAD, Table, batches, encode, encode_task, fit

PATCH_SIZE = 16  # four image tokens
STEPS, BATCH_SIZE, LEARNING_RATE = 1200, 32, 2e-3

CHECKING = "<image> is it {} ?"
SAYING = "can you say {} ?"


def make_processor() -> LlavaProcessor:
    """Image processor and tokenizer; the vocabulary is every word of every question and answer."""
    texts = [PAD, END, "<unk> <image>", CHECKING.format("yes no"), SAYING.format("")]
    for task in (NAMING, *NEW_TASKS.values()):
        texts += [task.question, *task.answers]
    words = dict.fromkeys(" ".join(texts).split())
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return LlavaProcessor(image_processor, tokenizer, patch_size=PATCH_SIZE, vision_feature_select_strategy="full")


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A LLaVA of 0.7 million random weights."""
    tokenizer = processor.tokenizer
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    vision = SiglipVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.08,  # about 1/sqrt(hidden_size); 0.02, made for wide models, learns far more slowly here
        **special,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=processor.image_token_id,
            image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            **special,
        )
    )


def lessons(processor: LlavaProcessor, split: Dataset, seed: int) -> Iterator[Table]:
    """The batches that the base model is trained on: three of four about pictures, the fourth without."""
    choose = random.Random(seed)
    texts = [f"{NAMING.question} {DIGITS[digit]}" for digit in split["digit"]]
    for digit in split["digit"]:
        right = choose.random() < 0.5
        asked = digit if right else choose.choice([other for other in range(10) if other != digit])
        texts.append(f"{CHECKING.format(DIGITS[asked])} {'yes' if right else 'no'}")
    pictures = batches(encode(processor, texts, split["image"][:] * 2), BATCH_SIZE, seed)

    words = sorted({word for task in (NAMING, *NEW_TASKS.values()) for word in task.answers})
    sayings = batches(encode(processor, [f"{SAYING.format(word)} {word}" for word in words]), len(words), seed)

    generator = torch.Generator().manual_seed(seed)
    for step in itertools.count():
        if step % 4 == 3:
            yield next(sayings)
        else:
            batch = next(pictures)
            yield {**batch, "pixel_values": jitter(batch["pixel_values"], generator)}


def jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate (up to 0.2 rad), scale (10 %) and shift (an eighth) each image (B, C, H, W) at random."""
    angle, scale, x, y = torch.empty(4, len(pixels)).uniform_(-1, 1, generator=generator)
    angle, scale, x, y = 0.2 * angle, 1 + 0.1 * scale, 0.25 * x, 0.25 * y
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(-1, 2, 3)
    grid = affine_grid(maps, list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def train_base(folder: Path, split: Dataset, seed: int) -> float:
    """Train the base model and save it with its processor; return the seconds of training.

    Raises:
        RuntimeError: the saved model is not the trained one.
    """
    set_seed(seed)
    processor = make_processor()
    model = make_model(processor)
    seconds = fit(model, lessons(processor, split, seed), STEPS, LEARNING_RATE, "base model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    # LLaVA reads the tower's features before its last norm: training it by another path gives another model.
    sample = split.select(range(32))
    with torch.no_grad():
        before = model(**encode_task(processor, NAMING, sample)).logits
        processor, model = load_base(folder)
        after = model(**encode_task(processor, NAMING, sample)).logits
    if not torch.equal(before, after):
        raise RuntimeError(f"the base model in {folder} differs from the trained one by {(before - after).abs().max()}")
    return seconds


def load_base(folder: Path) -> tuple[LlavaProcessor, LlavaForConditionalGeneration]:
    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
