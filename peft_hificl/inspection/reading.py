"""What each virtual pair writes, read as words of the vocabulary, and what the loss is without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..layer import HiFICLLayer
from ..listeners import Call, heard_by
from .effects import Data, adapter_of, at_rest, head_effects, loss_without, pairs_of, pairs_removed


class Reading(NamedTuple):
    """One virtual pair: what it writes, and what it does.

    Attributes:
        module: the name of the attention module.
        head: the query head.
        pair: the number of the pair.
        words: what it writes, as the nearest words of the vocabulary (token ids, if there is no tokenizer); none, if
            its virtual value is zero.
        effect: how much the measured loss rises when this pair alone is removed; negative: the pair does harm.
    """

    module: str
    head: int
    pair: int
    words: list[Any]
    effect: float


def read_pairs(
    model: nn.Module,
    data: Data,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    heads: int = 4,
    words: int = 6,
) -> list[Reading]:
    """Read the pairs of the heads that matter most: their nearest words, beside their measured effect.

    The heads are those without whose pairs the loss rises most (`head_effects`).

    A pair of head h adds ``beta_i * W_h v_i`` to the residual stream, v_i being its virtual value and W_h the part of
    the attention's output projection for this head.  That vector goes through the model's final norm and unembedding,
    as if it were the whole stream; the words are those of the largest logits.  This leaves out whatever later layers
    make of it, so words and effect may disagree: trust the effect, which is measured, by one forward over the data for
    each head of the model, and one for each pair that is read.

    Output projection, norm and unembedding are found by running the first batch: the projection is the module that is
    called with the attention's output, the norm the last one whose output the unembedding is called with.

    Args:
        model: the adapted model.
        data: batches with labels, for which the model returns its loss.
        tokenizer: turns token ids into words (its ``decode``).  None: ids are returned.
        adapter_name: which adapter; it must be the only active one.  None: the active one.
        heads: of how many heads the pairs are read.
        words: how many words for each.

    Returns:
        The readings, the largest measured effect first.

    Raises:
        ValueError: as `pair_effects`, or a model without output embeddings, or whose attention output or last hidden
            state goes through something else than one linear projection, or one norm.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_hificl import HiFICLConfig, inspection
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> model = get_peft_model(base, HiFICLConfig(task_type="CAUSAL_LM", n=4, r=2, init_weights=False))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> readings = inspection.read_pairs(model, [{"input_ids": ids, "labels": ids}], heads=1, words=2)
        >>> len(readings), len(readings[0].words), readings[0].effect >= readings[3].effect
        (4, 2, True)
    """
    adapter = adapter_of(model, adapter_name)
    loss, effects = head_effects(model, data, adapter.name)
    path = _path_to_words(model, data[0], adapter.layers)
    every = [
        (effect, name, head) for name, of_module in effects.items() for head, effect in enumerate(of_module.tolist())
    ]
    readings = []
    for _, name, head in sorted(every, reverse=True)[:heads]:
        layer = adapter.layers[name]
        for pair in range(layer.n[adapter.name]):
            effect = loss_without(model, data, adapter, {name: pairs_removed(layer, head, pair)}) - loss
            scores = path.logits(name, layer, head, pair)
            ids = scores.topk(words).indices.tolist() if scores.any() else []
            found = ids if tokenizer is None else [tokenizer.decode([token]) for token in ids]
            readings.append(Reading(name, head, pair, found, effect))
    return sorted(readings, key=lambda reading: -reading.effect)


class _Path(NamedTuple):
    """The way from an attention's output to the vocabulary."""

    projections: dict[str, nn.Module]
    norm: nn.Module
    unembedding: nn.Module

    @torch.no_grad()
    def logits(self, name: str, layer: HiFICLLayer, head: int, pair: int) -> Tensor:
        values = pairs_of(layer).values[0]  # (H or G, n, e)
        heads, _, width, _ = layer.head_shape
        value = values[head * len(values) // heads, pair]
        projection = self.projections[name]
        like = next(projection.parameters())
        inputs = torch.zeros(1, 1, heads * width, dtype=like.dtype if like.is_floating_point() else None)
        inputs[..., head * width : (head + 1) * width] = value
        inputs = inputs.to(like.device)
        written = projection(inputs) - projection(torch.zeros_like(inputs))
        normed = self.norm(written) - self.norm(torch.zeros_like(written))
        scores: Tensor = self.unembedding(normed) - self.unembedding(torch.zeros_like(normed))
        return scores.flatten().float().cpu()


def _path_to_words(model: nn.Module, batch: Any, layers: dict[str, HiFICLLayer]) -> _Path:
    """Run a batch, and see which modules are called with what."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    unembedding = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if unembedding is None:
        raise ValueError(
            f"{type(base).__name__} has no output embeddings: what its pairs write cannot be read as words."
        )
    names = {layer: name for name, layer in layers.items()}
    projections: dict[str, nn.Module] = {}
    waiting: dict[str, Tensor] = {}  # outputs of attentions that no module has been called with yet
    last: list[tuple[nn.Module, Tensor]] = []
    norms: list[nn.Module] = []

    def hear(call: Call) -> None:
        if call.layer in names:
            waiting[names[call.layer]] = call.output.transpose(1, 2)

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        for name, output in list(waiting.items()):
            if args[0].numel() == output.numel() and torch.equal(args[0].reshape(output.shape), output):
                del waiting[name]  # first, as a LoRA calls modules of its own
                if _is_linear(module, args[0]):
                    projections[name] = module
        if module is unembedding and last:
            norm, output = last[-1]
            if output.shape[-1] == args[0].shape[-1] and torch.equal(output[:, -1], args[0][:, -1]):
                norms.append(norm)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not unembedding and isinstance(output, Tensor) and output.ndim == 3:
            last[:] = [(module, output)]

    units = [module for module in base.modules() if _has_weights_of_its_own(module)]
    hooks = [module.register_forward_pre_hook(before) for module in units]
    hooks += [module.register_forward_hook(after) for module in units]
    try:
        with at_rest(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), heard_by(hear):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name in layers:
        if name not in projections:
            raise ValueError(
                f"The output projection of {name!r} was not found: its output goes through something else than one "
                "linear module, so that what its pairs write cannot be read as words."
            )
    if not norms:
        raise ValueError(
            f"The final norm of {type(base).__name__} was not found: the input of its output embeddings is not the "
            "output of one module, so that what its pairs write cannot be read as words."
        )
    return _Path(projections, norms[0], unembedding)


def _has_weights_of_its_own(module: nn.Module) -> bool:
    """Whether a module is one step of the computation: it has no modules within, except those that PEFT has added."""
    if isinstance(module, BaseTunerLayer):
        return not isinstance(module, HiFICLLayer)
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _is_linear(module: nn.Module, inputs: Tensor) -> bool:
    """Whether doubling the input doubles the output, apart from a bias; a norm does not."""
    forward: Callable[[Tensor], Tensor] = module.forward
    bias, once, twice = (forward(factor * inputs) for factor in (0, 1, 2))
    return torch.allclose(twice - bias, 2 * (once - bias), rtol=1e-2, atol=1e-2 * float((once - bias).abs().max()))
