"""Many trainings in one batch: each has one sequence of it, with parameters of its own.

On a GPU, a batch of eight short rows leaves most of it idle, and a step takes as long as its launches.  So the
parameters of K trainings of one method are stacked, ``(K, ...)``, and the rows of all of them pass the frozen base
together, those of one training side by side (`packing`).  Everything else is as in `runner.perform`: attached by PEFT,
the same samples in the same order, the same losses, AdamW (which works element by element), and a gradient that is
clipped for each training by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.ia3 import Linear as IA3Linear
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, pad
from torch.optim import AdamW
from transformers import DynamicCache

from peft_hificl import HiFICLLayer
from peft_hificl.ops.formula import OF_THE_SOFTMAX, VirtualPairs

from ..common.tables import Record
from ..quality.training import fit
from .encoding import BATCH, Row
from .packing import Packed

State = dict[str, Tensor]  # what is trained, by name
Own = Mapping[str, Tensor]  # the stacked parameters of one module, by their names in it

PREFIX = "prompt_encoder.default."


def state_of(model: nn.Module) -> State:
    """A copy of what is trained."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


class Together(nn.Module):
    """A model with an adapter whose batches are K sequences, each with parameters of its own.

    Args:
        model: with the adapter attached by PEFT; its modules compute with the stacked parameters from now on.
        states: the parameters of each training.

    Raises:
        TypeError: something is trained in a module whose form is not known here.
    """

    def __init__(self, model: nn.Module, states: Sequence[State]) -> None:
        super().__init__()
        self.model = model.get_base_model()  # type: ignore[operator]
        self.number = len(states)
        device = next(self.model.parameters()).device
        self.stacked = {
            name: nn.Parameter(torch.stack([state[name] for state in states]).to(device)) for name in states[0]
        }
        model.requires_grad_(False)
        left = set(self.stacked)
        for module_name, module in model.named_modules():
            for kind, compute in FORMS.items():
                if isinstance(module, kind):
                    start = f"{module_name}."
                    own = {name.removeprefix(start): self.stacked[name] for name in left if name.startswith(start)}
                    module.forward = compute(module, own)
                    left -= {start + name for name in own}
        if unknown := sorted(name for name in left if not name.startswith(PREFIX)):
            raise TypeError(f"There is no stacked form of {unknown[0]}: train this method alone.")
        self.prefix = next((self.stacked[name] for name in left), None)  # (K, n, 2 L G d)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **inputs: Any) -> Any:
        cache = None
        if self.prefix is not None:
            cache, length = self._cache(self.prefix), self.prefix.shape[1]
            attention_mask, position_ids = pad(attention_mask, (length, 0), value=True), position_ids + length
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            **inputs,
        )

    def _cache(self, prefix: Tensor) -> DynamicCache:
        config = self.model.config
        layers, groups = config.num_hidden_layers, config.num_key_value_heads
        split = prefix.unflatten(-1, (layers, 2, groups, -1))  # (K, n, L, 2, G, d)
        parts = split.permute(2, 3, 0, 4, 1, 5)  # (L, 2, K, G, n, d)
        return DynamicCache([(keys, values) for keys, values in parts])


def _lora(module: LoraLinear, own: Own) -> Callable[[Tensor], Tensor]:
    ((adapter, scaling),) = module.scaling.items()
    down, up = own[f"lora_A.{adapter}.weight"], own[f"lora_B.{adapter}.weight"]

    def forward(x: Tensor) -> Tensor:
        update: Tensor = scaling * (x @ down.mT @ up.mT)  # (K, N, out)
        return module.base_layer(x) + update

    return forward


def _ia3(module: IA3Linear, own: Own) -> Callable[[Tensor], Tensor]:
    factors = own["ia3_l.default"].flatten(1)[:, None]  # (K, 1, in or out)
    if module.is_feedforward:
        return lambda x: module.base_layer(x * factors)
    return lambda x: module.base_layer(x) * factors


def _pairs(layer: HiFICLLayer, own: Own) -> Callable[..., VirtualPairs]:
    weights = {name.removesuffix(".default.weight"): value for name, value in own.items()}
    flags = {name: getattr(layer, name)["default"] for name in OF_THE_SOFTMAX}

    def product(name: str) -> Tensor:  # (K, H, n, d)
        return weights[name] if name in weights else weights[f"{name}_A"] @ weights[f"{name}_B"]

    def forward(query: Tensor, *_: object) -> VirtualPairs:
        layer.calls += 1  # else the package warns of an adapter without effect
        keys, values, logs = product("hificl_K"), product("hificl_V"), weights.get("hificl_W")
        if logs is not None:
            logs = logs.repeat_interleave(query.shape[1] // logs.shape[1], dim=1)
        return VirtualPairs(keys, values, logs, **flags)

    return forward


FORMS: Mapping[type[nn.Module], Callable[[Any, Own], Callable[..., Any]]] = {
    HiFICLLayer: _pairs,
    LoraLinear: _lora,
    IA3Linear: _ia3,
}


def losses(model: Together, blocks: Sequence[Sequence[Row]]) -> Tensor:
    """(K), the mean cross-entropy of the answers' tokens of each block."""
    batch = Packed.of(blocks, next(model.model.parameters()).device)
    values = cross_entropy(batch.logits(model), batch.targets, reduction="none")  # (M)
    owner = batch.said.nonzero()[:, 0]
    zeros = values.new_zeros(len(blocks))
    return zeros.index_add(0, owner, values) / zeros.index_add(0, owner, torch.ones_like(values))


def train(
    model: Together,
    groups: Sequence[Mapping[str, Any]],
    rows: Sequence[Sequence[Row]],
    data: Sequence[Iterator[list[int]]],
    steps: int,
    optimizer_type: type[AdamW] = AdamW,
) -> list[bool]:
    """Train, each block on its own rows; return which have a loss that is not finite.

    Args:
        model: what is trained.
        groups: as an optimizer takes them, with the names of parameters in their place.
        rows: the samples of each training.
        data: the batches of each training, as places in its rows.
        steps: how many.
        optimizer_type: what takes them.
    """
    diverged = torch.zeros(model.number, dtype=torch.bool, device=next(model.model.parameters()).device)

    def loss(numbers: Any) -> Tensor:
        blocks = [[own[number] for number in of] for own, of in zip(rows, numbers, strict=True)]
        each = losses(model, blocks)
        diverged.logical_or_(~each.isfinite())
        return each[each.isfinite()].sum()

    parameters = [{**group, "params": [model.stacked[name] for name in group["params"]]} for group in groups]
    fit(model, loss, parameters, map(list, zip(*data, strict=True)), steps, clip_each, optimizer_type)
    return diverged.tolist()


@torch.no_grad()
def clip_each(parameters: Sequence[Tensor], most: float) -> None:
    """`clip_grad_norm_` of each training by itself: the first dimension of all parameters counts trainings."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)  # (K)
    factors = (most / (norms + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


@torch.no_grad()
def measure(model: Together, rows: Sequence[Sequence[Row]]) -> list[Record]:
    """Of each training what `encoding.measure` tells of a model alone."""
    device = next(model.model.parameters()).device
    right, loss, tokens = torch.zeros(3, model.number, device=device, dtype=torch.float64)
    for start in range(0, max(map(len, rows)), BATCH):
        parts = [own[start : start + BATCH] for own in rows]
        sizes = torch.tensor([len(part) for part in parts])
        found = Packed.of(parts, device).answered(model, int(sizes.sum()))
        block = torch.arange(model.number).repeat_interleave(sizes).to(device)  # of each row
        for total, of_row in zip((right, loss, tokens), found, strict=True):
            total.index_add_(0, block, of_row.double())
    return [
        {"score": float(score) / len(own), "loss": float(mean)}
        for score, mean, own in zip(right, loss / tokens, rows, strict=True)
    ]


@torch.no_grad()
def forgetting(model: Together, rows: Sequence[Row], before: Sequence[Tensor]) -> list[Record]:
    """Of each training what `encoding.forgetting` tells of a model alone.

    Args:
        model: the trained models.
        rows: sentences, the same for all.
        before: the base model's `log_probabilities` of them.
    """
    sums = torch.zeros(3, model.number, dtype=torch.float64)
    tokens = 0
    for part, old in zip(_sentences(rows), before, strict=True):
        batch = Packed.of([part] * model.number, old.device)
        new = batch.logits(model).log_softmax(dim=-1).view(model.number, *old.shape)  # (K, N, V)
        targets = batch.targets.view(model.number, -1, 1)
        sums[0] -= old.gather(1, targets[0]).sum().cpu()
        sums[1] -= new.gather(2, targets).sum(dim=(1, 2)).cpu()
        sums[2] += torch.stack([kl_div(own, old, log_target=True, reduction="sum") for own in new]).cpu()
        tokens += len(old)
    return [
        dict(zip(("loss_before", "loss", "kl"), (each / tokens).tolist(), strict=True)) for each in sums.unbind(dim=1)
    ]


@torch.no_grad()
def log_probabilities(base: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
    """Of the tokens of a few rows at a time, (N, V)."""
    device = next(base.parameters()).device
    return [Packed.of([part], device).logits(base).log_softmax(dim=-1) for part in _sentences(rows)]


def _sentences(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Few at a time: all their tokens are asked, and each has a logit for every word, of each training."""
    return [rows[start : start + 4] for start in range(0, len(rows), 4)]
