"""Train an adapter of a vision-language model on questions about images, save it, load it again and ask.

The data are JSON lines with "image" (a file, relative to theirs), "question" and "answer". The loss is on the answer
alone. Every option of `TrainingArguments` may be given; the defaults below are the paper's recipe.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_hificl import HiFICLConfig


@dataclass
class Options:
    model: str = field(metadata={"help": "id or folder of a vision-language model"})
    data: Path = field(metadata={"help": "JSON lines with image, question and answer"})


def prompts(processor, rows, folder):
    chats = []
    for row in rows:
        content = [{"type": "image", "path": str(folder / row["image"])}, {"type": "text", "text": row["question"]}]
        chats.append([{"role": "user", "content": content}])
    tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    return processor.apply_chat_template(chats, add_generation_prompt=True, **tensors)


def samples(processor, rows, folder):
    """Prompts as when the model is asked, padded at the left, and behind them the answers, padded at the right."""
    batch, tokenizer = prompts(processor, rows, folder), processor.tokenizer
    texts, right = [row["answer"] + tokenizer.eos_token for row in rows], {"padding": True, "padding_side": "right"}
    answers = tokenizer(texts, add_special_tokens=False, return_tensors="pt", **right)
    ids, shape = answers["input_ids"], batch["input_ids"].shape
    for name in [name for name, value in batch.items() if value.shape == shape]:  # ids, mask, types of tokens
        batch[name] = torch.cat([batch[name], answers.get(name, torch.zeros_like(ids))], dim=1)  # type 0: text
    labels = ids.masked_fill(answers["attention_mask"] == 0, -100)
    return {**batch, "labels": torch.cat([torch.full(shape, -100), labels], dim=1)}


def main():
    parser = HfArgumentParser((Options, TrainingArguments))
    parser.set_defaults(learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=1e-3)
    parser.set_defaults(num_train_epochs=20, logging_strategy="epoch", save_strategy="no", remove_unused_columns=False)
    options, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)

    processor = AutoProcessor.from_pretrained(options.model, padding_side="left")  # generation continues at the right
    base = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    model = get_peft_model(base, HiFICLConfig(n=8, r=8))
    model.print_trainable_parameters()

    data, folder = load_dataset("json", data_files=str(options.data), split="train"), options.data.parent
    trainer = Trainer(model, args, lambda rows: samples(processor, rows, folder), data)
    trainer.train()
    trainer.save_state()  # the losses, in trainer_state.json
    model.save_pretrained(args.output_dir)

    model = PeftModel.from_pretrained(model.unload(), args.output_dir).eval()
    rows = data.to_list()[:4]
    inputs = prompts(processor, rows, folder).to(model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, answer in zip(rows, processor.batch_decode(output, skip_special_tokens=True), strict=True):
        print(f"{row['image']} {row['question']} {answer}")


if __name__ == "__main__":
    main()
