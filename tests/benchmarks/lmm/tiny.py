"""Models of the paper's classes, tiny and random, with processors; and tiny files in the formats of the tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

START, END, IMAGE, PAD = "<|start|>", "<|end|>", "<image>", "<|pad|>"
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CONTENT = "{% for part in message['content'] %}{{ IMAGE if part['type'] == 'image' else part['text'] }}{% endfor %}"
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n" + CONTENT + "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
IDEFICS_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}" + CONTENT + "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 2048, "pad_token_id": 0,
    "bos_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def tokenizer(**special: object) -> tf.PreTrainedTokenizerFast:
    """A token for each byte, and the marks of chats and pictures."""
    marks = [PAD, END, START, IMAGE, "<end_of_utterance>", "<fake_token_around_image>", *QWEN]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={s: n for n, s in enumerate([*marks, *alphabet])}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(marks)
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=END, **special)


def llava(folder: Path) -> None:
    words = tokenizer(extra_special_tokens={"image_token": IMAGE})
    processor = tf.LlavaProcessor(
        tf.SiglipImageProcessorPil(size={"height": 8, "width": 8}), words, patch_size=4,
        vision_feature_select_strategy="full", chat_template=TEMPLATE.replace("IMAGE", f"'{IMAGE}'"),
    )  # fmt: skip
    config = tf.LlavaConfig(
        text_config=tf.Qwen2Config(vocab_size=len(words), eos_token_id=1, **TEXT),
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False), vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_token_id=words.convert_tokens_to_ids(IMAGE),
    )  # fmt: skip
    _save(tf.LlavaForConditionalGeneration, config, processor, folder)


def idefics2(folder: Path) -> None:
    words = tokenizer()
    processor = tf.Idefics2Processor(
        tf.Idefics2ImageProcessorPil(size={"shortest_edge": 8, "longest_edge": 8}, do_image_splitting=True), words,
        image_seq_len=3, chat_template=IDEFICS_TEMPLATE.replace("IMAGE", f"'{IMAGE}'"),
    )  # fmt: skip
    config = tf.Idefics2Config(
        text_config={"model_type": "mistral", "vocab_size": len(words), "eos_token_id": 1, **TEXT},
        vision_config=VISION, image_token_id=words.convert_tokens_to_ids(IMAGE),
        perceiver_config={"hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4,
                          "resampler_head_dim": 8, "num_key_value_heads": 2},
    )  # fmt: skip
    _save(tf.Idefics2ForConditionalGeneration, config, processor, folder)


def qwen3_vl_processor() -> tf.Qwen3VLProcessor:
    """Without its part for videos, which needs torchvision; so it cannot be saved and loaded."""
    tokens = dict(zip(("vision_bos_token", "vision_eos_token", "image_token", "video_token"), QWEN, strict=True))
    images = tf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 256})
    template = TEMPLATE.replace("IMAGE", f"'{QWEN[0]}{QWEN[2]}{QWEN[1]}'")
    with patch.object(tf.Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None):
        return tf.Qwen3VLProcessor(images, tokenizer(extra_special_tokens=tokens), None, chat_template=template)


def qwen3_vl(folder: Path) -> None:
    words = qwen3_vl_processor().tokenizer
    start, end, image, video = words.convert_tokens_to_ids(QWEN)
    config = tf.Qwen3VLConfig(
        text_config={
            **TEXT, "vocab_size": len(words), "eos_token_id": 1, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    _save(tf.Qwen3VLForConditionalGeneration, config, words, folder)


MODELS: dict[str, Callable[[Path], None]] = {"llava": llava, "idefics2": idefics2, "qwen3_vl": qwen3_vl}


def _save(kind: type[tf.PreTrainedModel], config: tf.PreTrainedConfig, processor: object, folder: Path) -> None:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)


COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30), "a dog": (120, 90, 30)}


def save_data(folder: Path, train: int = 16, val: int = 6) -> None:
    """The official files of the three tasks, with pictures of one color, and CHAIR's files."""
    names, karpathy = list(COLORS), []
    for split, number, first in (("train", train, 1), ("val", val, 1001)):
        (folder / f"{split}2014").mkdir(parents=True)
        questions, annotations = [], []
        for place in range(number):
            image, color = first + place, names[place % len(names)]
            name = f"COCO_{split}2014_{image:012d}.jpg"
            pixels = np.full((9, 11, 3), COLORS[color], dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}2014" / name)
            questions.append({"question_id": 10 * image, "image_id": image, "question": "What is it?"})
            said = [{"answer_id": n, "answer": color, "raw_answer": f"{color}s"} for n in range(1, 11)]
            annotations.append({"question_id": 10 * image, "image_id": image, "answers": said})
            sentences = [{"raw": f"A picture of {color}."}, {"raw": f"This is {color}, and a cat."}]
            karpathy.append(
                {"cocoid": image, "split": split, "filepath": f"{split}2014", "filename": name, "sentences": sentences}
            )
        for prefix in ("v2_", ""):
            _write(folder / f"{prefix}OpenEnded_mscoco_{split}2014_questions.json", {"questions": questions})
            _write(folder / f"{prefix}mscoco_{split}2014_annotations.json", {"annotations": annotations})
        categories = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 44, "name": "bottle"}]
        marked = [{"image_id": first, "category_id": 44}]
        _write(folder / f"instances_{split}2014.json", {"categories": categories, "annotations": marked})
    _write(folder / "dataset_coco.json", {"images": karpathy})
    lines = ("dog, puppy, terrier", "cat, kitten", "bottle", "teddy bear, teddy", "person, baby", "chair, seat")
    (folder / "synonyms.txt").write_text("\n".join((*lines, "toilet")))


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
