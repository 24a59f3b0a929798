"""Records how much of each token's attention virtual pairs take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import sharding
from ..backends import dense
from ..layer import HiFICLLayer
from ..listeners import Call, heard_by
from ..names import MODULE, plain
from ..ops.formula import HIDDEN, without_autocast
from ..rows import running
from .kinds import Kinds, checked, of_seen

if TYPE_CHECKING:
    import pandas


class Column(NamedTuple):
    """The virtual pair of one column of beta."""

    adapter: str
    pair: int


Columns = list[list[Column | None]]


class Weights(NamedTuple):
    """The weights of one attention call with virtual pairs, or of several that follow one another.

    Attributes:
        alpha: ``(B, H, T)``, the factor of the self-attention; 1 where ``scale_self_attention=False``.
        beta: ``(B, H, T, n)``, the weight of each virtual pair.
        seen: ``(B, T)``, False for a token that is padding, as the mask has it: it sees nothing or, where the queries
            are all there is to see, none of them sees it.
        columns: for each row of the batch, adapter and number of the pair of each column of beta.  None: a column that
            pads this row, whose adapter has fewer pairs than another's; its beta is 0.
    """

    alpha: Tensor
    beta: Tensor
    seen: Tensor
    columns: Columns

    @property
    def mass(self) -> Tensor:
        """``(B, H, T)``, the share of the softmax that all pairs take together: 1 - alpha, if alpha is not set to 1."""
        return self.beta.sum(dim=-1)


class Record:
    """What was recorded of one attention module.

    Attributes:
        calls: the weights of each call that saw virtual pairs, in order.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[Weights] = []

    @property
    def weights(self) -> Weights:
        """All calls, joined along T: of `generate` with a cache, the prompt and then one token after another.

        Raises:
            ValueError: the calls differ in their rows or pairs, so that they do not continue one another.
        """
        first = self.calls[0]
        if any(len(call.alpha) != len(first.alpha) or call.columns != first.columns for call in self.calls):
            raise ValueError(
                f"The {len(self.calls)} recorded calls of {self.name!r} have different rows or pairs, and cannot be "
                "joined: record one forward or generate at a time, or read each of .calls."
            )
        alphas, betas, seen, _ = zip(*self.calls, strict=True)
        return Weights(torch.cat(alphas, dim=2), torch.cat(betas, dim=2), torch.cat(seen, dim=1), first.columns)

    alpha = property(lambda self: self.weights.alpha, doc="`Weights.alpha` of all calls, joined along T.")
    beta = property(lambda self: self.weights.beta, doc="`Weights.beta` of all calls, joined along T.")
    mass = property(lambda self: self.weights.mass, doc="`Weights.mass` of all calls, joined along T.")
    columns = property(lambda self: self.weights.columns, doc="`Weights.columns`, the same in all calls.")


class Records(Mapping[str, Record]):
    """What was recorded of a model, by the name of the attention module, in the order of its modules."""

    def __init__(self, layers: Mapping[str, HiFICLLayer]) -> None:
        self._names = {layer: name for name, layer in layers.items()}
        self._records = {name: Record(name) for name in layers}

    def __getitem__(self, name: str) -> Record:
        if name not in self._records:
            raise KeyError(f"there is no adapted attention {name!r}; there are {', '.join(self._records)}")
        if not self._records[name].calls:
            raise KeyError(
                f"no call of {name!r} with virtual pairs was recorded: run the model within the block, in the same "
                "thread, with an adapter that is active"
            )
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, record in self._records.items() if record.calls)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def hear(self, call: Call) -> None:
        name = self._names.get(call.layer)
        if name is not None:
            self._records[name].calls.append(weights_of(call))

    def by_kind(self, kinds: Kinds | None = None) -> dict[str, Tensor]:
        """The mean mass of the pairs by kind of token: a tensor (modules, heads) for each kind that occurs.

        Args:
            kinds: as `token_kinds` returns them.  None: the first token of each row that is no padding, and all others.
        """
        return {
            kind: torch.stack([mass[chosen].mean(dim=0) for mass in self._masses()])
            for kind, chosen in self._chosen(kinds).items()
        }

    def _masses(self) -> list[Tensor]:
        if not self:
            raise ValueError(
                "Nothing was recorded: run the model within the block, in the same thread, with an adapter that is "
                "active."
            )
        return [record.mass.movedim(1, -1) for record in self.values()]  # (B, T, H) each

    def _known(self, kinds: Kinds | None) -> list[list[str]]:
        """The kinds of all recorded tokens: those given, or what the masks tell."""
        rows, length = self._masses()[0].shape[:2]
        seen = next(iter(self.values())).weights.seen
        return of_seen(seen) if kinds is None else checked(kinds, rows, length)

    def _chosen(self, kinds: Kinds | None) -> dict[str, Tensor]:
        known = self._known(kinds)
        return {
            kind: torch.tensor([[found == kind for found in row] for row in known])
            for kind in dict.fromkeys(found for row in known for found in row)
            if kind != "padding"
        }

    def table(self, kinds: Kinds | None = None) -> pandas.DataFrame:
        """A tidy pandas table, a row for each attention module, row of the batch, head and token that is no padding.

        Columns: module, layer (number of the module among those recorded), row, head, token, kind, alpha, mass.

        Args:
            kinds: as `token_kinds` returns them.  None: the first token of each row that is no padding, and all others.
        """
        import pandas  # noqa: PLC0415  # an extra of the package, not needed for the tensors

        rows, length = self._masses()[0].shape[:2]
        known = self._known(kinds)
        parts = []
        for number, (name, record) in enumerate(self.items()):
            weights = record.weights
            heads = weights.alpha.shape[1]
            index = pandas.MultiIndex.from_product(
                [range(rows), range(heads), range(length)], names=["row", "head", "token"]
            )
            part = pandas.DataFrame({"module": name, "layer": number}, index=index).reset_index()
            part = part[["module", "layer", "row", "head", "token"]]
            part["kind"] = [kind for row in known for kind in row * heads]
            part["alpha"], part["mass"] = weights.alpha.flatten().numpy(), weights.mass.flatten().numpy()
            parts.append(part[part["kind"] != "padding"])
        return pandas.concat(parts, ignore_index=True)

    def summary(self, kinds: Kinds | None = None) -> str:
        """Plain sentences on how much attention the pairs take, with a warning if it may harm the model.

        Args:
            kinds: as `token_kinds` returns them.  None: the first token of each row that is no padding, and all others.
        """
        lines = []
        for kind, masses in self.by_kind(kinds).items():
            means = masses.mean(dim=1)
            many = means > 0.5
            tokens = "the first token's" if kind == "first" else f"the {kind} tokens'"
            line = f"The pairs take {_percent(means.mean())} of {tokens} attention, averaged over {len(means)} layers"
            if many.any():
                line += f"; in {many.sum()} of them more than half, {_percent(means[many].mean())} on average"
            lines.append(line + ".")
            scaled = any(bool((record.alpha < 1).any()) for record in self.values())
            if kind == "first" and many.any() and scaled:
                lines.append(
                    "Its own attention is scaled down by as much. That damages a model whose first token is an "
                    "attention sink: before training, compare the loss with that of the base model "
                    "(model.disable_adapter()). With skip_first_token=True it stays whole."
                )
        weights = [record.weights for record in self.values()]
        known = self._known(kinds)
        seen = torch.tensor([[kind != "padding" for kind in row] for row in known])
        largest = [w.beta.movedim(1, 2)[seen].amax(dim=0) for w in weights]  # (H, n) each
        idle, number = sum(int((most < 0.01).sum()) for most in largest), sum(most.numel() for most in largest)
        lines.append(f"{idle:,} of {number:,} pairs never take 1 % of any token's attention.")
        return "\n".join(lines)


@contextmanager
def record(model: nn.Module) -> Iterator[Records]:
    """Record the weights of virtual pairs in all attention calls that this thread makes within the block.

    For each query of each call, with ``s(k) = scaling * q.k`` (plus mask, bias, soft-cap, sinks and log-weights, where
    there are any),

        alpha  = Z_SA / (Z_SA + Z_D)                the factor of the self-attention
        beta_i = exp s(k_D,i) / (Z_SA + Z_D)        the weight of virtual pair i

    They are computed by the attention implementation that is in use, from a second call whose context values are zero
    and whose i-th virtual value is the i-th unit vector: its output is beta.  So a recorded forward costs up to two
    attentions; without a block that records nothing is computed.  Weights are kept on the CPU, in float32 at least,
    detached; attention dropout does not touch them.

    Args:
        model: a model with HiFICL adapters, or a part of one.

    Returns:
        The records by the name that the attention module has in the base model.  Calls without virtual pairs (a
        disabled adapter) are left out; with gradient checkpointing, a backward within the block repeats calls.

    Raises:
        ValueError: no module of the model has an adapter.

    Compiled code is recorded, too, but is traced anew for it, with a break at each attention, which it keeps until
    ``torch.compiler.reset()``; compiled with ``fullgraph=True``, it raises an error.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, inspection
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=4, r=2))
        >>> with inspection.record(model) as records:
        ...     output = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> found = records["model.layers.0.self_attn"]
        >>> found.alpha.shape, found.beta.shape, found.columns[0][3]
        (torch.Size([1, 2, 3]), torch.Size([1, 2, 3, 4]), Column(adapter='default', pair=3))
        >>> bool(torch.allclose(found.alpha + found.beta.sum(-1), torch.ones(1, 2, 3)))
        True
    """
    sharding.check_whole(model, "inspection.record")
    layers = {
        plain(name).removesuffix(f".{MODULE}"): module
        for name, module in model.named_modules()
        if isinstance(module, HiFICLLayer)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no HiFICL adapter: attach one, or record the model that has it.")
    records = Records(layers)
    with heard_by(records.hear):
        yield records


@torch.no_grad()
def weights_of(call: Call) -> Weights:
    """The weights of one attention call, from its own backend."""
    pairs, n = call.pairs, call.pairs.keys.shape[2]
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, keys = call.query.to(dtype), call.key.to(dtype), call.pairs.keys.to(dtype)
    width = max(n, query.shape[-1])  # kernels want equal head dimensions
    units = torch.eye(n, width, dtype=dtype, device=keys.device).expand(*keys.shape[:2], n, width)
    nothing = key.new_zeros(*key.shape[:-1], width)
    with without_autocast(query.device):
        output, _ = call.attend(
            call.module,
            query,
            key,
            nothing,
            pairs._replace(keys=keys, values=units),
            call.scoring._replace(dropout=0.0),
        )
    beta = output[..., :n]
    alpha = 1 - beta.sum(dim=-1) if pairs.scale_self_attention else torch.ones_like(beta[..., 0])
    return Weights(alpha.cpu(), beta.contiguous().cpu(), _seen(call).cpu(), _columns(call.layer, len(query), n))


def _seen(call: Call) -> Tensor:
    """`Weights.seen` of one call."""
    rows, _, length, _ = call.query.shape
    size, mask = call.key.shape[2], call.scoring.mask
    if mask is None:
        return torch.ones(rows, length, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        mask = dense(mask, call.query, call.key)
    visible = (mask if mask.dtype == torch.bool else mask > HIDDEN)[..., :size].any(dim=1)  # (B, T, S), or 1 for B, T
    seen = visible.any(dim=-1).expand(rows, length)
    return seen & visible.any(dim=-2) if length == size else seen


def _percent(share: Tensor) -> str:
    return f"{100 * share.item():.0f} %"


def _columns(layer: HiFICLLayer, rows: int, n: int) -> Columns:
    chosen = running.modules.get(layer)
    if chosen is None:
        names = layer.active_names
        if sum(layer.n[name] for name in names) != n:  # compiled code, in which those of strength 0 take part, too
            names = [name for name in layer.active_adapters if layer.has(name) and not layer.awaits_weights[name]]
        return [[Column(name, pair) for name in names for pair in range(layer.n[name])]] * rows
    each: Columns = []
    for name in chosen.spread(rows):
        own: list[Any] = [Column(name, pair) for pair in range(layer.n.get(name, 0))][:n]
        each.append(own + [None] * (n - len(own)))
    return each
