"""Train an adapter of a chat model on questions and answers, save it, load it again and ask.

The data are JSON lines with "question" and "answer". The loss is on the answer alone. Every option of
`TrainingArguments` may be given; the defaults below are the paper's recipe, except that virtual keys learn at 0.3 of
the rate (`parameter_groups`). Models that normalise queries and keys, as Qwen3 does, want `--learning_rate 5e-4`.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_hificl import HiFICLConfig, parameter_groups


@dataclass
class Options:
    model: str = field(metadata={"help": "id or folder of a chat model"})
    data: str = field(metadata={"help": "JSON lines with question and answer"})


def encode(row, tokenizer):
    chat = [{"role": "user", "content": row["question"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def ask(model, tokenizer, questions):
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.eval().generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    parser = HfArgumentParser((Options, TrainingArguments))
    parser.set_defaults(learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=1e-3)
    parser.set_defaults(num_train_epochs=20, logging_strategy="epoch", save_strategy="no")
    options, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")  # generation continues at the right
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8))
    model.print_trainable_parameters()

    data = load_dataset("json", data_files=options.data, split="train")
    encoded = data.map(encode, fn_kwargs={"tokenizer": tokenizer}, remove_columns=data.column_names)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=args.learning_rate), weight_decay=args.weight_decay)
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads the labels, too
    trainer = Trainer(model, args, collator, encoded, optimizers=(optimizer, None))
    trainer.train()
    trainer.save_state()  # the losses, in trainer_state.json
    model.save_pretrained(args.output_dir)

    model = PeftModel.from_pretrained(model.unload(), args.output_dir)
    questions = data[:4]["question"]
    for question, answer in zip(questions, ask(model, tokenizer, questions), strict=True):
        print(f"{question} {answer}")


if __name__ == "__main__":
    main()
