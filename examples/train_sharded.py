"""Train an adapter on several GPUs that share the base model, and save it whole.

`accelerate launch` decides how they share it: DDP, FSDP of both versions (hybrid, too), ZeRO. The commands are in
docs/guides/parallel.md. The data are those of train_text.py, and so is the rate of virtual keys. What is saved is an
adapter like any other: load it on one process, or here with `--adapter`, to go on.
"""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator, DistributedType
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser, set_seed

from peft_hificl import HiFICLConfig, parameter_groups


@dataclass
class Options:
    model: str = field(metadata={"help": "id or folder of a chat model"})
    data: str = field(metadata={"help": "JSON lines with question and answer"})
    output_dir: str = field(metadata={"help": "where to save the adapter"})
    adapter: str | None = field(default=None, metadata={"help": "folder of an adapter to go on with"})
    batch_size: int = field(default=8, metadata={"help": "rows of a process in a step"})
    epochs: int = 20
    learning_rate: float = 5e-3


def encode(row, tokenizer):
    chat = [{"role": "user", "content": row["question"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def trained(accelerator, model):
    """What has been trained, whole, on the first process; every process must call this.

    FSDP1 can only give the whole model, in the first process's CPU memory.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        import deepspeed  # noqa: PLC0415

        names = {name: p for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
        with deepspeed.zero.GatheredParameters(list(names.values())):
            return {name: p.detach().cpu().clone() for name, p in names.items()}
    if accelerator.is_fsdp2:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(model, options=options)
    return accelerator.get_state_dict(model)


def main():
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    accelerator = Accelerator()
    set_seed(42)  # so that a fresh adapter begins the same on every process

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset("json", data_files=options.data, split="train")
    encoded = data.map(encode, fn_kwargs={"tokenizer": tokenizer}, remove_columns=data.column_names)
    collator = DataCollatorForSeq2Seq(tokenizer)  # pads the labels, too
    batches = DataLoader(encoded, batch_size=options.batch_size, shuffle=True, collate_fn=collator)

    # The adapter comes first: what is added after sharding may be left out.
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    if options.adapter:
        model = PeftModel.from_pretrained(base, options.adapter, is_trainable=True)
    else:
        model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=options.learning_rate), weight_decay=1e-3)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    model.train()
    for _ in range(options.epochs):
        for batch in batches:
            answers = accelerator.reduce((batch["labels"][:, 1:] != -100).sum().float(), "mean")
            loss = model(**batch, num_items_in_batch=answers).loss  # gradients are averaged over the processes
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}")

    adapter = trained(accelerator, model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output_dir, state_dict=adapter)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
