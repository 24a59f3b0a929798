"""From a base model to adapters that are trained, saved, loaded and switched: how the package is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel, get_peft_model
from rich.progress import track
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from peft_hificl import HiFICLConfig, initialize_from_demonstrations, parameter_groups

from ..quality import methods, training
from ..quality.methods.adapters import lora, one_word_each
from ..quality.methods.learner import cross_entropy

# Of four for each method, those that the quality benchmark's sweeps choose on validation data, with 1,000 samples.
RATES = {"knowledge": {"hificl": 1e-1, "lora": 1e-2}, "captions": {"hificl": 1e-1, "lora": 1e-2}}


def attach_hificl(base: LlavaForConditionalGeneration, processor: LlavaProcessor, examples: Dataset) -> PeftModel:
    """An adapter of eight virtual pairs, which begin as words of eight demonstrations' answers."""
    model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=8, r=8))
    shown = examples.select(range(8))
    text = " ".join(f"<image> {row['question']} ? {row['answer']} <eos>" for row in shown)
    inputs = processor(text=text, images=[list(shown["image"])], return_tensors="pt")
    marks, ends = (
        (inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids(token)).nonzero().flatten().tolist()
        for token in ("?", "<eos>")
    )
    answers = [range(mark + 1, end) for mark, end in zip(marks, ends, strict=True)]
    initialize_from_demonstrations(model, inputs, tokens=one_word_each(answers))
    return model


def attach_lora(base: LlavaForConditionalGeneration, processor: LlavaProcessor, examples: Dataset) -> PeftModel:
    """LoRA on queries, keys, values and outputs, as in the paper's comparison."""
    return get_peft_model(base, lora(8)())


ATTACH = {"hificl": attach_hificl, "lora": attach_lora}


def train(model: PeftModel, setup: methods.Setup, title: str) -> float:
    """AdamW on the cross-entropy of the answers, alike for every adapter; return the seconds that it took."""
    groups: list[dict[str, Any]] = [{"params": methods.trainable(model), "lr": setup.rate}]
    if isinstance(model.active_peft_config, HiFICLConfig):
        groups = parameter_groups(model, setup.rate)  # virtual keys learn more slowly than values
    batches = track(training.batches(setup.samples, setup.steps, setup.seed), title, total=setup.steps)
    return training.fit(model, cross_entropy(model, setup), groups, iter(batches), setup.steps)


def save(model: PeftModel, folder: Path) -> int:
    """The adapter alone, without the base; return the bytes of its weights."""
    model.save_pretrained(str(folder))
    return (folder / "adapter_model.safetensors").stat().st_size


def load(base: PreTrainedModel, folder: Path, names: Sequence[str]) -> PeftModel:
    """Several adapters on one base model; `import peft_hificl` must come before."""
    first, *others = names
    model = PeftModel.from_pretrained(base, folder / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / name, adapter_name=name)
    return model


@contextmanager
def switched(model: PeftModel, name: str | None) -> Iterator[PeftModel]:
    """With this adapter, or with none: then it is the base model."""
    if name is None:
        with model.disable_adapter():
            yield model
    else:
        model.set_adapter(name)
        yield model
