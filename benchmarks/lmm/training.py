"""Training by transformers' `Trainer`, which resumes, and shares work among the processes of `accelerate launch`."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.progress import Progress
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..common.tables import Record
from . import recipe
from .methods import Groups
from .prompts import Encoder, Inputs
from .samples import Sample


class _Bar(TrainerCallback):
    """Steps with the time that is left; an end where the loss is not finite."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.task = progress, progress.add_task("training")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise FloatingPointError(f"the loss is {logs['loss']} at step {state.global_step}: the rate is too high")


def train(
    model: PeftModel,
    groups: Groups,
    encoder: Encoder,
    samples: Sequence[Sample],
    folder: Path,
    epochs: int,
    seed: int,
    progress: Progress,
    save_steps: int = 50,
    workers: int = 0,
    checkpointing: bool = False,
) -> Record:
    """Train, or go on from the last checkpoint in this folder; the checkpoints are removed by the caller.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: the batch cannot be shared among so many processes.
    """
    rows, accumulation = recipe.split_batch(PartialState().num_processes)
    half = next(iter(model.get_base_model().parameters())).dtype
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs, lr_scheduler_type="cosine", warmup_steps=recipe.WARMUP, max_grad_norm=recipe.CLIP,
        seed=seed, save_strategy="steps", save_steps=save_steps, save_total_limit=1, logging_steps=1,
        logging_nan_inf_filter=False, report_to=[], remove_unused_columns=False, disable_tqdm=True,
        dataloader_num_workers=workers, bf16=half is torch.bfloat16, fp16=half is torch.float16,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    # Of several cards one is used: others get processes of their own, and the batch stays as it is.
    arguments._n_gpu = min(1, arguments.n_gpu)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.WEIGHT_DECAY)

    def collate(batch: list[Sample]) -> Inputs:
        return encoder.trained(batch)

    trainer = Trainer(
        model, arguments, train_dataset=list(samples), data_collator=collate, optimizers=(optimizer, None),
        callbacks=[_Bar(progress)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=_whole_checkpoint(folder))
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
    }


def _whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end, of which the trainer's state is the last file."""
    with PartialState().main_process_first():
        for checkpoint in folder.glob("checkpoint-*"):
            if not (checkpoint / "trainer_state.json").exists():
                shutil.rmtree(checkpoint, ignore_errors=True)
    return get_last_checkpoint(folder) if folder.exists() else None
