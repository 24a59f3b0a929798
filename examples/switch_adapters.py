"""Serve one base model with several adapters: load them once, then switch between them and the base model.

An adapter is called by the name of its folder.
"""

import argparse
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_hificl  # noqa: F401  (registers the method with PEFT: adapters cannot be loaded without)


def ask(model, tokenizer, question):
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="id or folder of the base model")
    parser.add_argument("--adapters", required=True, nargs="+", help="folders of adapters")
    parser.add_argument("--question", required=True)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", device_map="auto")
    first, *others = options.adapters
    model = PeftModel.from_pretrained(base, first, adapter_name=Path(first).name).eval()
    for folder in others:
        model.load_adapter(folder, adapter_name=Path(folder).name)

    for name in model.peft_config:
        model.set_adapter(name, inference_mode=True)
        print(f"{name}: {ask(model, tokenizer, options.question)}")
    with model.disable_adapter():
        print(f"base model: {ask(model, tokenizer, options.question)}")


if __name__ == "__main__":
    main()
