"""Train an adapter of a chat model with TRL's SFTTrainer, which attaches it, and load it together with its base model.

The data are JSON lines with "question" and "answer"; as prompt and completion, the loss is on the answer alone. Every
option of `SFTConfig` may be given. Needs `pip install trl`.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from peft_hificl import HiFICLConfig


@dataclass
class Options:
    model: str = field(metadata={"help": "id or folder of a chat model"})
    data: str = field(metadata={"help": "JSON lines with question and answer"})


def conversation(row):
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def main():
    parser = TrlParser((Options, SFTConfig))
    parser.set_defaults(learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=1e-3)
    parser.set_defaults(num_train_epochs=20, logging_strategy="epoch", save_strategy="no")
    options, args = parser.parse_args_and_config()

    data = load_dataset("json", data_files=options.data, split="train")
    trainer = SFTTrainer(
        options.model,
        args,
        train_dataset=data.map(conversation, remove_columns=data.column_names),
        peft_config=HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8),
    )
    trainer.train()
    trainer.save_state()  # the losses, in trainer_state.json
    trainer.save_model()  # the adapter, in args.output_dir

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")  # generation continues at the right
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoPeftModelForCausalLM.from_pretrained(args.output_dir, dtype="auto").eval()
    questions = data[:4]["question"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for question, answer in zip(questions, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
        print(f"{question} {answer}")


if __name__ == "__main__":
    main()
