"""Write a page of HTML on what the virtual pairs of trained adapters do with one prompt.

The page has the share of the attention that the pairs take by layer, head and kind of token, what the pairs with the
largest effects write and how much the loss rises without each, and where their heads look at them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import nn

HELP = "a page on what the virtual pairs of an adapter do with one prompt"
_LONGEST = 20  # tokens of an answer that the model makes up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", nargs="+", help="folder or id of a trained adapter; several are compared, too")
    parser.add_argument("--base", required=True, help="folder or id of the base model")
    parser.add_argument(
        "--text", required=True, help="the prompt as the model reads it, with its chat template and place of the image"
    )
    parser.add_argument("--image", type=Path, help="the prompt's picture")
    parser.add_argument(
        "--answer", help="the answer whose loss shows what a pair does; without it, what the first adapter answers"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (report.html)")


def run(options: argparse.Namespace) -> None:
    options.out.write_text(_page(options), encoding="utf-8")
    print(options.out)


def _page(options: argparse.Namespace) -> str:
    try:
        from . import report  # noqa: PLC0415  # needs matplotlib, which other commands do not
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'peft-hificl[inspection]'") from None
    image = _image(options.image)
    model, titles = _adapted(options.base, options.adapter)
    processor = (transformers.AutoTokenizer if image is None else transformers.AutoProcessor).from_pretrained(
        options.base
    )
    tokenizer: Any = processor if image is None else processor.tokenizer
    inputs = processor(text=options.text, return_tensors="pt", **({} if image is None else {"images": image}))
    batch = _with_answer(model, dict(inputs), tokenizer, options.answer)
    return report.page(model, titles, batch, tokenizer, options.text, image)


def _image(path: Path | None) -> Any:
    if path is None:
        return None
    from PIL import Image  # noqa: PLC0415  # matplotlib brings it

    return Image.open(path).convert("RGB")


def _adapted(base: str, adapters: list[str]) -> tuple[PeftModel, dict[str, str]]:
    """The model with all adapters, and what each is called on the page, by its name in the model."""
    configs = [PeftConfig.from_pretrained(adapter) for adapter in adapters]
    for adapter, config in zip(adapters, configs, strict=True):
        if config.peft_type != "HIFICL":
            raise ValueError(
                f"{adapter} is a {config.peft_type.value} adapter, not a HiFICL one: its pairs cannot be shown."
            )
    kind = (configs[0].auto_mapping or {}).get("base_model_class", "AutoModelForCausalLM")
    cls: Any = getattr(transformers, kind, None)
    if not hasattr(cls, "from_pretrained"):
        raise ValueError(
            f"{adapters[0]} was trained on a {kind}, which transformers {transformers.__version__} does not have: "
            "install a version that has it, or name a class of transformers as base_model_class in the "
            "auto_mapping of its adapter_config.json."
        )
    base_model: nn.Module = cls.from_pretrained(base, dtype=torch.float32)
    titles = {f"adapter_{number}": adapter for number, adapter in enumerate(adapters)}
    first, *others = titles
    model = PeftModel.from_pretrained(base_model, adapters[0], adapter_name=first)
    for name in others:
        model.load_adapter(titles[name], adapter_name=name)
    return model.eval(), titles


@torch.no_grad()
def _with_answer(model: PeftModel, inputs: dict[str, Any], tokenizer: Any, answer: str | None) -> dict[str, Any]:
    """One row of prompt and answer, whose labels are the answer's."""
    ids = inputs["input_ids"]
    length = ids.shape[1]
    if length == 0:
        raise ValueError("--text has no tokens.")
    if answer is None:
        whole = model.generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
        added = whole[:, length:]
    else:
        added = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"].to(ids.dtype)
    if added.shape[1] == 0:
        raise ValueError("The answer has no tokens: give another --answer.")
    batch = {**inputs, "input_ids": torch.cat([ids, added], dim=1)}
    for name in [name for name, value in inputs.items() if name != "input_ids" and value.shape == ids.shape]:
        of_answer = torch.ones_like(added) if name == "attention_mask" else torch.zeros_like(added)  # type 0: text
        batch[name] = torch.cat([inputs[name], of_answer], dim=1)
    batch["labels"] = torch.cat([torch.full_like(ids, -100), added], dim=1)
    return batch
