"""One training step without a teacher and one with: what HiFICL's end-to-end training saves.

The models keep their key/value cache, as they do by default: without one transformers reads the position ids' values to
look for packed sequences, which tensors on the meta device do not have.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel

from .presets import SHOTS


def make_prompts(vocabulary: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A query of so many tokens, and the same query behind `SHOTS` demonstrations of the same length."""
    prompt = torch.randint(vocabulary, (1, (SHOTS + 1) * tokens), generator=torch.Generator().manual_seed(0)).to(device)
    return prompt[:, -tokens:], prompt


def step_alone(student: PeftModel, query: Tensor) -> None:
    """Cross-entropy on the query, and nothing else."""
    student.zero_grad(set_to_none=True)
    student(input_ids=query, labels=query).loss.backward()


def step_with_teacher(student: PeftModel, teacher: PreTrainedModel, query: Tensor, prompt: Tensor) -> None:
    """MimIC's loss: half the cross-entropy, and the hidden states of every layer drawn to a teacher's.

    The teacher is the base model with the demonstrations in its prompt.  MimIC also aligns what comes out of each
    attention, which would change neither time nor FLOPs by anything that shows here.
    """
    with torch.no_grad():
        shown = teacher(input_ids=prompt, output_hidden_states=True, logits_to_keep=1).hidden_states
    student.zero_grad(set_to_none=True)
    output = student(input_ids=query, labels=query, output_hidden_states=True)
    length = query.shape[1]
    pairs = zip(output.hidden_states[1:], shown[1:], strict=True)
    alignment = sum(mse_loss(mine, theirs[:, -length:]) for mine, theirs in pairs)
    (0.5 * output.loss + alignment).backward()
