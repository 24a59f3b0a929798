"""What a training and an evaluation need, computed from configurations, without weights: nothing here is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PreTrainedConfig

from ..common import files
from ..common.environment import environment, prepare
from ..common.tables import Record, Table, bytes_of
from ..speed.checkpoints import MODELS, without_weights
from ..speed.measure import flops
from . import recipe
from .methods import Method
from .recipe import Sizes

METHODS = ("hificl", "lora-16")
TEXT = 40  # tokens of a question, its instruction and the turns' marks; of an answer
ANSWER = 4
IMAGES = {"llava": (729, 729), "idefics2": (64, 1530), "qwen3_vl": (300, 1200)}  # tokens and patches of a COCO picture
EVAL_BATCH, SHOTS, QUESTIONS = 8, 8, 10_000
STATE = 4 * 4  # bytes of a trained parameter, its gradient and AdamW's two moments, in float32
EFFICIENCY = 0.4  # of a card's peak, that training and the reading of prompts are taken to reach
FILE = "memory.md"


class Card(NamedTuple):
    name: str
    bytes: float
    flops: float  # per second, bfloat16, dense
    bandwidth: float
    number: int = 1


CARDS = (
    Card("24 GB (RTX 4090)", 24 * 2**30, 165e12, 1.008e12),
    Card("two of 24 GB", 24 * 2**30, 165e12, 1.008e12, 2),
    Card("80 GB (A100)", 80 * 2**30, 312e12, 2.039e12),
)
METHOD = f"""**Computed, not measured**, by `python -m benchmarks.lmm memory`: models built from their configurations on
the meta device, in bfloat16. A prompt is one picture (LLaVA 729 tokens, Idefics2 64, Qwen3-VL 300, which is 640 x
480) and {TEXT} tokens of text, an answer {ANSWER} tokens; a step has {recipe.BATCH} rows on each card.

- state: adapter, its gradient, AdamW's two moments, in float32.
- activations: what the text decoder's forward pass keeps for the backward, as autograd's hooks see it, with the CPU's
  attention kernels, which keep no matrix of scores, as CUDA's do not; and the gradients of the logits.
  checkpointed, with `--checkpointing`: each layer's input, one layer's share of the rest, the logits. The frozen vision
  tower keeps nothing; what it holds for a moment is left out.
- cache: keys and values of {EVAL_BATCH} queries with the paper's beams, zero-shot or behind {SHOTS} demonstrations;
  `--eval-batch` makes it smaller.
- step: FLOPs of the decoder's forward and backward by `torch.utils.flop_counter`, and 2 per weight and patch for the
  vision tower.
- hours: {EFFICIENCY:.0%} of a card's peak for training and for reading prompts, and for every new token the time to
  read the weights once; {recipe.EPOCHS} epochs of {recipe.SAMPLES:,} samples at one rate, and {QUESTIONS:,} questions,
  zero-shot or adapted. Reading pictures from disk is left out. Two cards each hold the model and share the work.
- needs: weights, state and activations; of 8-shot prompts, weights and cache. What fits leaves 7 % of the card for
  fragmentation and the CUDA context."""


def compute(name: str) -> list[Record]:
    """What each method needs on a model of the paper (a name in `MODELS`), or of any folder or hub id."""
    config = MODELS[name]() if name in MODELS else AutoConfig.from_pretrained(name)
    return [_compute(name, config, method) for method in METHODS]


def _compute(name: str, config: PreTrainedConfig, method: str) -> Record:
    base = without_weights(config)
    with torch.device("meta"):
        model = Method.named(method).attach(base, Sizes()).train()
    with on_cpu(model):
        return _of(name, config, method, model)


@contextmanager
def on_cpu(model: nn.Module) -> Iterator[None]:
    """Let a model of the meta device, whose tensors have no memory, say that it is on the CPU.

    So the kernels of the CPU's attention are taken, and no formula that keeps matrices of scores.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        yield


def _of(name: str, config: PreTrainedConfig, method: str, model: PeftModel) -> Record:
    base: Any = model.get_base_model()
    kind = config.model_type
    tokens, patches = IMAGES.get(kind, IMAGES["llava"])
    prompt, length = tokens + TEXT, tokens + TEXT + ANSWER
    text = config.get_text_config()
    text_size = sum(p.numel() for p in _frozen(base.get_decoder())) + base.get_output_embeddings().weight.numel()
    size = sum(p.numel() for p in _frozen(base))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers, vocabulary = text.num_hidden_layers, text.vocab_size
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = _kept_by(model, length)
    logits = recipe.BATCH * length * vocabulary * (4 + 2)  # gradients of the loss, which exist when all else is kept
    inputs = layers * recipe.BATCH * length * text.hidden_size * 2
    cache = EVAL_BATCH * recipe.beams(kind) * 2 * layers * heads * dim * 2
    counted = flops(lambda: _loss(model, length).backward())
    vision = 2 * (size - text_size)
    return {
        "model": name,
        "method": method,
        "parameters": size,
        "trained": trained,
        "weights_bytes": 2 * size,
        "state_bytes": STATE * trained,
        "activations_bytes": kept + logits,
        "checkpointed_bytes": inputs + kept // layers + recipe.BATCH * length * vocabulary * (4 + 2) + logits,
        "cache_bytes": cache * (prompt + recipe.NEW_TOKENS),
        "cache_8_shot_bytes": cache * ((SHOTS + 1) * length + recipe.NEW_TOKENS),
        "step_flops": counted + recipe.BATCH * patches * vision,
        "prompt_flops": 2 * text_size * prompt + patches * vision,
    }


def _frozen(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if not parameter.requires_grad]


def _loss(model: PeftModel, length: int) -> Tensor:
    """Of a batch whose pictures have been seen."""
    base: Any = model.get_base_model()
    embedded = torch.zeros(recipe.BATCH, length, base.config.get_text_config().hidden_size, dtype=base.dtype)
    targets = torch.zeros(recipe.BATCH * length, dtype=torch.long)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)  # given, as its values would be looked at to make one
    hidden = base.get_decoder()(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
    return cross_entropy(base.get_output_embeddings()(hidden).flatten(0, 1).float(), targets)


def _kept_by(model: PeftModel, length: int) -> int:
    """Bytes that a forward pass keeps for its backward, but for weights."""
    weights = {id(p) for p in model.parameters()}
    storages: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and (tensor._base is None or id(tensor._base) not in weights):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = (tensor, storage.nbytes())  # the tensor, so that no other takes its place
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss(model, length)
    del loss
    return sum(size for _, size in storages.values())


def hours(record: Record, card: Card, new_tokens: int = recipe.NEW_TOKENS) -> tuple[float, float]:
    """Of a training at one rate, and of an evaluation."""
    steps = recipe.EPOCHS * recipe.SAMPLES / recipe.BATCH
    training = steps * record["step_flops"] / (card.flops * EFFICIENCY)
    reading = QUESTIONS * record["prompt_flops"] / (card.flops * EFFICIENCY)
    saying = QUESTIONS / EVAL_BATCH * new_tokens * record["weights_bytes"] / card.bandwidth
    return training / card.number / 3600, (reading + saying) / card.number / 3600


def write(results: Path, models: Sequence[str]) -> Path:
    """Write records and tables."""
    prepare()
    chosen = list(models) or [name for name in MODELS if name not in ("Llama-2-13B", "Llama-2-70B")]
    records = [record for name in chosen for record in compute(name)]
    files.write(results / "memory.json", {"computed": True, **environment(), "rows": records})
    lines = ["# Memory and time", "", METHOD]
    for table in (_needs(records), _cards(records)):
        lines += ["", *table.markdown()]
    path = results / FILE
    path.write_text("\n".join(lines) + "\n")
    return path


def _needs(records: Sequence[Record]) -> Table:
    names = ("weights", "state", "activations", "checkpointed", "cache", "cache_8_shot")
    columns = [
        "model",
        "method",
        "parameters",
        "trained",
        *(name.replace("_", ", ", 1).replace("_", "-") for name in names),
    ]
    rows = [
        [r["model"], r["method"], f"{r['parameters']:,}", f"{r['trained']:,}",
         *(bytes_of(r[f"{name}_bytes"]) for name in names), f"{r['step_flops'] / 1e12:.1f}"]
        for r in records
    ]  # fmt: skip
    return Table("Computed: bytes, and FLOPs of a step in 10^12", [*columns, "step"], rows)


def _cards(records: Sequence[Record]) -> Table:
    columns = ["model", "method", "cards", "training needs", "with --checkpointing", "8-shot needs", "fits"]
    rows: list[list[object]] = []
    for record in records:
        for card in CARDS:
            whole, small = (
                record["weights_bytes"] + record["state_bytes"] + record[f"{kind}_bytes"]
                for kind in ("activations", "checkpointed")
            )
            prompts = record["weights_bytes"] + record["cache_8_shot_bytes"]
            room = 0.93 * card.bytes  # the rest for fragmentation and context
            fits = [
                name
                for name, need in (("training", whole), ("--checkpointing", small), ("8-shot", prompts))
                if need < room
            ]
            rows.append(
                [record["model"], record["method"], card.name, *map(bytes_of, (whole, small, prompts)),
                 ", ".join(fits) or "none", *(f"{value:.2f}" for value in hours(record, card))]
            )  # fmt: skip
    return Table(
        "Computed: cards, and hours of a training and an evaluation", [*columns, "training, h", "evaluation, h"], rows
    )
