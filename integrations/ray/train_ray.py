"""Train a HiFICL adapter of a chat model with Ray Train, on one or several workers."""

import argparse
import os
import shutil
import tempfile

import ray.train.torch
import torch
from datasets import load_dataset
from peft import get_peft_model
from ray.train import Checkpoint, RunConfig, ScalingConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

from peft_hificl import HiFICLConfig, parameter_groups


def encode(row, tokenizer):
    chat = [{"role": "user", "content": row["question"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def train(options):
    set_seed(0)  # every worker starts from the same adapter
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(options["model"], dtype="auto")
    model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=options["learning_rate"]), weight_decay=1e-3)
    wrapped = ray.train.torch.prepare_model(model)  # with the adapter, whose gradients it averages

    data = load_dataset("json", data_files=options["data"], split="train")
    encoded = data.map(encode, fn_kwargs={"tokenizer": tokenizer}, remove_columns=data.column_names)
    batches = DataLoader(encoded, batch_size=2, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    batches = ray.train.torch.prepare_data_loader(batches)
    context = ray.train.get_context()
    for epoch in range(options["num_train_epochs"]):
        if context.get_world_size() > 1:
            batches.sampler.set_epoch(epoch)
        for batch in batches:
            loss = wrapped(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with tempfile.TemporaryDirectory() as folder:
            last = epoch == options["num_train_epochs"] - 1 and context.get_world_rank() == 0
            if last:
                model.save_pretrained(folder)
            ray.train.report({"loss": loss.item()}, checkpoint=Checkpoint.from_directory(folder) if last else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="id or folder of a chat model")
    parser.add_argument("--data", required=True, help="JSON lines with question and answer")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_train_epochs", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--num_workers", type=int, default=1)
    options = parser.parse_args()
    # Workers run in folders of their own.
    options.data = os.path.abspath(options.data)
    options.model = os.path.abspath(options.model) if os.path.exists(options.model) else options.model

    with tempfile.TemporaryDirectory() as storage:  # seen by all workers; on several machines, a shared folder
        trainer = ray.train.torch.TorchTrainer(
            train,
            train_loop_config=vars(options),
            scaling_config=ScalingConfig(num_workers=options.num_workers, use_gpu=torch.cuda.is_available()),
            run_config=RunConfig(storage_path=storage),
        )
        with trainer.fit().checkpoint.as_directory() as folder:
            shutil.copytree(folder, options.output_dir, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
