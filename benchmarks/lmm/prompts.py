"""Samples as the inputs of any vision-language model that has a chat template, in training and in evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .samples import Sample

IGNORED = -100
_MARK = "ANSWER"

Inputs = dict[str, Any]


class Encoder:
    """Makes prompts of a processor's chat template: a user's turn with a picture, and the assistant's answer.

    Args:
        processor: what `AutoProcessor` gives, with a chat template.
        instruction: stands after each question.

    Raises:
        ValueError: the processor has no chat template.
    """

    def __init__(self, processor: Any, instruction: str) -> None:
        if not processor.chat_template:
            raise ValueError(f"{type(processor).__name__} has no chat template: give a model that has one.")
        images = processor.image_processor
        if getattr(images, "do_image_splitting", False):
            images.do_image_splitting = False  # as in the paper: one picture is one picture
        self.processor, self.tokenizer, self.instruction = processor, processor.tokenizer, instruction
        question = Sample("", "", "?", (_MARK,))  # type: ignore[arg-type]
        before, whole = self.text(question), self.text(question, answered=True)
        self.lead = whole[len(before) : whole.rindex(_MARK)] if whole.startswith(before) else ""
        self.ask = before.splitlines(keepends=True)[-1]  # the line that an answer follows
        self.end = whole[whole.rindex(_MARK) + len(_MARK) :].strip() or self.tokenizer.eos_token

    def text(self, sample: Sample, shown: Sequence[Sample] = (), answered: bool = False) -> str:
        """The prompt that asks for an answer, or the same with it, behind demonstrations."""
        turns = [turn for demonstration in shown for turn in self._turns(demonstration)]
        turns += self._turns(sample)[: 2 if answered else 1]
        text: str = self.processor.apply_chat_template(turns, add_generation_prompt=not answered, tokenize=False)
        return text.removeprefix(self.tokenizer.bos_token or "")  # the tokenizer adds it

    def _turns(self, sample: Sample) -> list[dict[str, Any]]:
        asked = {"type": "text", "text": f"{sample.question}\n{self.instruction}".strip()}
        user = {"role": "user", "content": [{"type": "image"}, asked]}
        return [user, {"role": "assistant", "content": [{"type": "text", "text": sample.target}]}]

    def _process(self, texts: list[str], pictures: list[list[Sample]], side: str) -> Inputs:
        images = [[sample.picture for sample in of] for of in pictures]
        return dict(self.processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt"))

    def asked(self, samples: Sequence[Sample], shown: Sequence[Sequence[Sample]]) -> Inputs:
        """Prompts that want an answer, each behind its demonstrations, padded on the left."""
        pairs = list(zip(samples, shown, strict=True))
        return self._process(
            [self.text(*pair) for pair in pairs], [[*before, query] for query, before in pairs], "left"
        )

    def trained(self, samples: Sequence[Sample]) -> Inputs:
        """Prompts and their answers, padded on the right; labels are the answer and the end token alone.

        The answer's tokens follow those of the prompt as they do in generation, whatever the two texts would make
        together.
        """
        inputs = self._process([self.text(sample) for sample in samples], [[sample] for sample in samples], "right")
        kept = inputs["attention_mask"].bool()
        answers = [torch.tensor(self.answer(sample)) for sample in samples]
        for name, value in inputs.items():
            if value.shape == kept.shape and not value.is_floating_point():
                added = {"input_ids": lambda a: a, "attention_mask": torch.ones_like}.get(name, torch.zeros_like)
                padding = self.tokenizer.pad_token_id if name == "input_ids" else 0
                inputs[name] = _right(
                    [torch.cat([row[mask], added(a)]) for row, mask, a in zip(value, kept, answers, strict=True)],
                    padding,
                )
        labels = [
            torch.cat([torch.full((int(mask.sum()),), IGNORED), answer])
            for mask, answer in zip(kept, answers, strict=True)
        ]
        return inputs | {"labels": _right(labels, IGNORED)}

    def answer(self, sample: Sample, end: bool = True) -> list[int]:
        """The tokens of an answer, as they follow a prompt: some tokenizers would begin a text with another blank."""
        text = self.lead + sample.target + (self.end if end else "")
        before, whole = self._ids(self.ask), self._ids(self.ask + text)
        return whole[len(before) :] if whole[: len(before)] == before else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def demonstrations(self, samples: Sequence[Sample]) -> tuple[Inputs, list[range]]:
        """One prompt of demonstrations without a query, and where each answer stands in it."""
        samples = list(samples)
        *before, last = samples
        inputs = self._process([self.text(last, before, answered=True)], [samples], "right")
        ids, places = inputs["input_ids"][0], []
        for number, sample in enumerate(samples):
            prompt = self._process([self.text(sample, samples[:number])], [samples[: number + 1]], "right")[
                "input_ids"
            ][0]
            same = ids[: len(prompt)] == prompt
            start = int(same.long().cumprod(0).sum())  # the last token of the prompt may be joined to the answer
            answer = torch.tensor(self.answer(sample, end=False))
            # A template may also part an answer from its mark by other blanks than it asks with, as LLaVA's does.
            found = [n for n in range(start, start + 4) if torch.equal(ids[n : n + len(answer)], answer)]
            start = found[0] if found else start
            places.append(range(start, start + len(answer)))
        return inputs, places

    def stops(self, generation_config: Any) -> list[int]:
        """The tokens that end an answer: the model's own, and the template's if it is one token."""
        own = generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else list(own or [])
        ids = self._ids(self.end)
        return sorted({*ends, *(ids if len(ids) == 1 else [])})


def _right(rows: list[Tensor], padding: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=padding)
