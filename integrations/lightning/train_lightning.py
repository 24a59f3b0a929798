"""Train a HiFICL adapter of a chat model with Lightning; its checkpoints hold the adapter alone."""

import argparse

import lightning
import torch
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from peft_hificl import HiFICLConfig, parameter_groups


class Adapted(lightning.LightningModule):
    def __init__(self, model: str, learning_rate: float):
        super().__init__()
        self.save_hyperparameters()
        base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        self.model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8)).train()
        self.strict_loading = False  # checkpoints lack the base model

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(parameter_groups(self.model, lr=self.hparams.learning_rate), weight_decay=1e-3)

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if "hificl_" in name}


def encode(row, tokenizer):
    chat = [{"role": "user", "content": row["question"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="id or folder of a chat model")
    parser.add_argument("--data", required=True, help="JSON lines with question and answer")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_train_epochs", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--resume", help="a checkpoint of Lightning's to go on from")
    options = parser.parse_args()

    lightning.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset("json", data_files=options.data, split="train")
    encoded = data.map(encode, fn_kwargs={"tokenizer": tokenizer}, remove_columns=data.column_names)
    batches = DataLoader(encoded, batch_size=8, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    module = Adapted(options.model, options.learning_rate)
    trainer = lightning.Trainer(
        max_epochs=options.num_train_epochs, default_root_dir=options.output_dir, log_every_n_steps=1
    )
    trainer.fit(module, batches, ckpt_path=options.resume)
    if trainer.is_global_zero:
        module.model.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
