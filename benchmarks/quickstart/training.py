"""What base model and adapters share: encoding, the training loop, answers by `generate` and their accuracy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from datasets import Dataset
from PIL.Image import Image
from rich.progress import track
from sklearn.metrics import accuracy_score
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import LlavaProcessor, PreTrainedModel, get_cosine_schedule_with_warmup
from transformers.utils import logging

from .data import Task

Table = dict[str, Tensor]  # the inputs of a model, one row per example

PAD, END = "<pad>", "<eos>"


def prepare_process() -> None:
    # One thread: on two shared cores, two threads took from 0.8 to 6 times as long over the same steps of an adapter,
    # because with matrices this small they mostly wait for each other.
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # of transformers, for saving and loading a model of 3 MB
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT reads it, not this code


def encode(processor: LlavaProcessor, texts: Sequence[str], images: Sequence[Image] | None = None) -> Table:
    """Texts "question ? answer" as inputs and labels; the loss is on the answer and the end token alone."""
    inputs = processor(text=[f"{text} {END}" for text in texts], images=images, padding=True, return_tensors="pt")
    ids = inputs["input_ids"]
    question_mark = (ids == processor.tokenizer.convert_tokens_to_ids("?")).long()  # each text has exactly one
    after_it = question_mark.cumsum(dim=1) > question_mark
    return {**inputs, "labels": ids.where(after_it & inputs["attention_mask"].bool(), -100)}


def encode_task(processor: LlavaProcessor, task: Task, split: Dataset) -> Table:
    return encode(processor, [f"{task.question} {task.answers[digit]}" for digit in split["digit"]], split["image"][:])


def batches(table: Table, size: int, seed: int) -> Iterator[Table]:
    """Shuffled batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(table["input_ids"]), generator=generator).split(size):
            yield {name: tensor[rows] for name, tensor in table.items()}


def fit(model: PreTrainedModel, data: Iterator[Table], steps: int, learning_rate: float, description: str) -> float:
    """Train whatever requires a gradient, by the paper's recipe; return the seconds that it took."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    start = time.perf_counter()
    model.train()
    for batch in track(islice(data, steps), description, total=steps):
        model(**batch).loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start


def ask(model: PreTrainedModel, processor: LlavaProcessor, task: Task, split: Dataset) -> list[str]:
    """What the model generates for each image, end token included."""
    inputs = processor(text=[task.question] * len(split), images=split["image"][:], return_tensors="pt")
    sequences = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answers = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :])
    return [answer.replace(PAD, "").strip() for answer in answers]


def accuracy(answers: list[str], task: Task, split: Dataset) -> float:
    """Share of exact matches; an answer that does not stop after its word is wrong."""
    return float(accuracy_score([f"{task.answers[digit]} {END}" for digit in split["digit"]], answers))
