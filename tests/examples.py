"""The examples' commands, and tiny models for them: random weights in a folder, with all that a hub would have."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import string
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch
import transformers as tf
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy

from peft_hificl import HiFICLConfig

FOLDER = Path(__file__).parent.parent / "examples"
COMMANDS = re.findall(r"^python (examples/.*)$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
# Four facts are much for a random model of two layers: more steps and larger ones.
ENOUGH = "--num_train_epochs 150 --learning_rate 0.1"

PAD, END, USER, ASSISTANT, IMAGE = SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|image|>"]
TEXT = "{{ message['content'] }}"
PARTS = "{% for part in message['content'] %}{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>CONTENT<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DECODER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip


def tokenizer(**special: Any) -> tf.PreTrainedTokenizerFast:
    """Byte pairs of the examples' own data."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    pairs.train([str(path) for path in sorted(FOLDER.glob("data/*.jsonl"))], trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=pairs, pad_token=PAD, eos_token=END, **special)


def save_chat_model(folder: Path) -> None:
    words = tokenizer()
    words.chat_template = TEMPLATE.replace("CONTENT", TEXT)
    words.save_pretrained(folder)
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(words), **DECODER)).save_pretrained(folder)


def save_vision_model(folder: Path) -> None:
    words = tokenizer(extra_special_tokens={"image_token": IMAGE})
    processor = tf.LlavaProcessor(
        tf.SiglipImageProcessorPil(size={"height": 8, "width": 8}), words, patch_size=4,
        vision_feature_select_strategy="full", chat_template=TEMPLATE.replace("CONTENT", PARTS),
    )  # fmt: skip
    processor.save_pretrained(folder)
    vision = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=tf.Qwen2Config(vocab_size=len(words), **DECODER), vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_token_id=words.convert_tokens_to_ids(IMAGE), pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)


def command(words: str) -> str:
    """The one command of the README in which these words are found."""
    (found,) = [line for line in COMMANDS if words in line]
    return found


def run(line: str, folder: Path, more: str = "") -> str:
    """Run a command of the README, on models in `folder`, as a process would; return what it prints."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(FOLDER)
    arguments = shlex.split(string.Template(line).substitute(MODEL=folder / "model", VLM=folder / "vlm") + f" {more}")
    with (
        chdir(folder),
        patch.object(sys, "argv", arguments),
        patch.object(datasets.config, "HF_DATASETS_CACHE", folder / "cache"),
        redirect_stdout(io.StringIO()) as printed,
    ):
        runpy.run_path(arguments[0], run_name="__main__")
    return printed.getvalue()


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@torch.no_grad()
def first_loss(base: tf.PreTrainedModel, prompts: list[tf.BatchEncoding], answers: list[str]) -> float:
    """By definition: of the answers' tokens and the end, row by row, by a fresh adapter with the examples' seed."""
    words = tokenizer()
    tf.set_seed(42)
    model = get_peft_model(base, HiFICLConfig())
    values = []
    for inputs, answer in zip(prompts, answers, strict=True):
        of_answer = torch.tensor(words(answer + END)["input_ids"])
        ids = torch.cat([inputs["input_ids"], of_answer[None]], dim=1)
        others = {name: value for name, value in inputs.items() if value.shape != inputs["input_ids"].shape}
        logits = model(input_ids=ids, **others).logits[0, -len(of_answer) - 1 : -1]
        values.append(cross_entropy(logits, of_answer, reduction="none"))
    return torch.cat(values).mean().item()
