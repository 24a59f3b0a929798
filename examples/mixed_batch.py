"""Answer one batch in which each row has an adapter of its own, or none: `__base__`.

An adapter is called by the name of its folder.
"""

import argparse
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_hificl  # noqa: F401  (registers the method with PEFT: adapters cannot be loaded without)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="id or folder of the base model")
    parser.add_argument("--adapters", required=True, nargs="+", help="folders of adapters")
    parser.add_argument("--ask", required=True, nargs=2, action="append", metavar=("ADAPTER", "QUESTION"))
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")  # generation continues at the right
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", device_map="auto")
    first, *others = options.adapters
    model = PeftModel.from_pretrained(base, first, adapter_name=Path(first).name).eval()
    for folder in others:
        model.load_adapter(folder, adapter_name=Path(folder).name)

    names, questions = zip(*options.ask, strict=True)
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, adapter_names=list(names), max_new_tokens=32, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for name, question, answer in zip(names, questions, answers, strict=True):
        print(f"{name}: {question} {answer}")


if __name__ == "__main__":
    main()
