"""Flash attention packages as kernels that return their log-sum-exp, over rows or over sequences of unequal length.

A package's public functions (`flash_attn_func`, `flash_attn_varlen_func`) return the log-sum-exp (LSE) of the scores if
they are asked to, and its autograd calls a backward that takes output and LSE; called with those of an attention over
*more* keys, that backward returns the exact gradients of its own part (see `kernels`).  Packages and their versions
differ in how they name and order arguments, so arguments are given by the names in each function's own signature.

These functions take no mask.  What a mask says otherwise is said by which tokens belong to one sequence, by causality
and by a window: a `Packing`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import Call, Gradients, Kernel, State

# What the LSE of a token is set to that is no part of any sequence (padding): its output is zero, and no pair counts.
# Kernels multiply it by log2(e) in float32, so it is less than the maximum.
_ABSENT = torch.finfo(torch.float32).max / 4

# What an argument without a default is given where a call says nothing about it.
_NEUTRAL = {
    "dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None, "window_size": (-1, -1), "window_size_left": -1,
    "window_size_right": -1, "rng_state": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": None,
    "max_seqlen_k": None, "seqused_q": None, "seqused_k": None, "sequed_q": None, "sequed_k": None,
}  # fmt: skip
# What a call needs to say; where packages have several names for it, with a stroke between them.
_SEQUENCES = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
_FORWARD = ["q", "k", "v", "softmax_scale", "causal", "window_size"]
_BACKWARD = [
    "dout", "q", "k", "v", "out", "softmax_lse|lse", "dq", "dk", "dv", "softmax_scale", "causal|is_causal",
    "window_size|window_size_left", "deterministic",
]  # fmt: skip


class Function(NamedTuple):
    """A function of a package.

    Attributes:
        call: the function.
        names: the names of its parameters.
        neutral: values for those without a default, unless a call gives others.
    """

    call: Callable[..., Any]
    names: frozenset[str]
    neutral: dict[str, Any]

    def __call__(self, **values: Any) -> Any:
        """Call it with those of the values that it has a parameter for."""
        return self.call(**self.neutral | {name: value for name, value in values.items() if name in self.names})


class Package(NamedTuple):
    """What one flash attention package has, for rows of equal length and for sequences.

    Attributes:
        name: the module that its functions come from.
        rows: `flash_attn_func`.
        sequences: `flash_attn_varlen_func`.
        of_rows: the backward of `rows`.
        of_sequences: the backward of `sequences`.
    """

    name: str
    rows: Function
    sequences: Function
    of_rows: Function
    of_sequences: Function


def package_of(rows: Callable[..., Any] | None, sequences: Callable[..., Any] | None) -> Package:
    """A package, from its `flash_attn_func` and `flash_attn_varlen_func`.

    Its backward is the one that its own autograd calls, found among the globals of these functions.

    Raises:
        ValueError: it has no such functions, or they do not take what HiFICL has to tell them.
    """
    name = getattr(sequences or rows, "__module__", "?")
    if rows is None or sequences is None:
        raise ValueError(f"{name} has no flash_attn_func or no flash_attn_varlen_func")
    scope = getattr(inspect.unwrap(sequences), "__globals__", {})
    of_rows = next((scope[f] for f in ("_flash_attn_backward", "_flash_attn_bwd") if f in scope), None)
    of_sequences = scope.get("_flash_attn_varlen_backward", of_rows)
    if of_rows is None:
        raise ValueError(f"{name} has no backward that takes a log-sum-exp (_flash_attn_backward)")
    return Package(
        name,
        _function(name, rows, _FORWARD),
        _function(name, sequences, _FORWARD + _SEQUENCES),
        _function(name, of_rows, _BACKWARD),
        _function(name, of_sequences, _BACKWARD + _SEQUENCES),
    )


def _function(package: str, function: Any, wanted: list[str]) -> Function:
    # torch's custom operators (CustomOpDef) hide the signature of the function that they were made from.
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    missing = [names.replace("|", " or ") for names in wanted if not parameters.keys() & set(names.split("|"))]
    unknown = sorted(needed - set("|".join(wanted).split("|")) - _NEUTRAL.keys())
    if missing or unknown:
        does = f"does not take {', '.join(missing)}" if missing else f"wants {', '.join(unknown)}"
        raise ValueError(f"{package}.{getattr(function, '__name__', function)} {does}")
    return Function(function, frozenset(parameters), {name: _NEUTRAL[name] for name in needed & _NEUTRAL.keys()})


class Sequences(NamedTuple):
    """The sequences that the visible tokens of a batch form, laid one after another.

    Attributes:
        queries: ``(N,)``, the places of their queries among all ``B * T``; None: all of them.
        keys: ``(M,)``, the places of their keys among all ``B * S``; None: all of them.
        query_starts: ``(sequences + 1,)``, int32: where the queries of each begin, and the end of the last.
        key_starts: the same for keys.  The queries of a sequence are its last tokens.
        most_queries: the largest number of queries that a sequence has.
        most_keys: the same for keys.
        whole: all of these places are in a sequence; else there may be padding behind the last one.
    """

    queries: Tensor | None
    keys: Tensor | None
    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int
    whole: bool = True


def sequences_of_mask(mask: Tensor, length: int) -> Sequences:
    """Each row of a mask ``(B, S)`` as a sequence, without its padding; the queries are its last ``length`` columns.

    >>> sequences_of_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]), length=3).key_starts
    tensor([0, 2, 5], dtype=torch.int32)
    """
    keys = mask.bool()
    size = keys.shape[1]
    # As transformers has it: a single new token is never padding.
    queries = keys[:, :1].new_ones(len(keys), 1) if length == 1 < size else keys[:, -length:]
    (query_places, query_starts, most_queries), (key_places, key_starts, most_keys) = map(_rows_of, (queries, keys))
    return Sequences(query_places, key_places, query_starts, key_starts, most_queries, most_keys)


def _rows_of(chosen: Tensor) -> tuple[Tensor, Tensor, int]:
    """Places of the chosen tokens (B, T), where each row begins among them, and the length of the longest."""
    lengths = chosen.sum(dim=1, dtype=torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return chosen.flatten().nonzero().flatten(), starts, int(lengths.max())


def sequences_of_starts(query_starts: Tensor, key_starts: Tensor, most_queries: Any, most_keys: Any) -> Sequences:
    """Sequences that the caller has laid one after another, given where they begin and how long the longest is."""
    return Sequences(None, None, query_starts.int(), key_starts.int(), int(most_queries), int(most_keys), whole=False)


def sequences_of_positions(positions: Tensor) -> Sequences | None:
    """The documents of one row, each of which begins where its positions ``(T,)`` do; None if there is one alone.

    >>> sequences_of_positions(torch.tensor([0, 1, 2, 0, 1])).query_starts
    tensor([0, 3, 5], dtype=torch.int32)
    """
    positions = positions.flatten()
    first = positions.min()
    if bool((positions - first == torch.arange(len(positions), device=positions.device)).all()):
        return None
    begin = (positions == first).nonzero().flatten()
    if int(begin[0]) > 0:  # the row begins within a document
        begin = torch.nn.functional.pad(begin, (1, 0))
    starts = torch.nn.functional.pad(begin, (0, 1), value=len(positions)).int()
    most = int(starts.diff().max())
    return Sequences(None, None, starts, starts, most, most)


class Packing(NamedTuple):
    """Which keys the queries of a call see, said as flash attention packages want it: in the place of a mask.

    With T queries and S keys of a row or sequence, query t stands at position ``t + S - T``.

    Attributes:
        package: the package that computes it.
        sequences: None: every row is a sequence.
        is_causal: a query sees no key behind its own position.
        window: the largest distance of a key that a query sees; None: any.
        deterministic: asks for a backward that always adds up in the same order.
    """

    package: Package
    sequences: Sequences | None = None
    is_causal: bool = True
    window: int | None = None
    deterministic: bool = False

    @property
    def kernel(self) -> Kernel:
        """The package as a kernel for the context; what it is called with has no mask and is not causal by itself."""
        return Kernel(self.forward, self.backward, self.limits)

    def limits(self, call: Call) -> str | None:
        if call.query.dtype not in (torch.float16, torch.bfloat16):
            return "flash attention packages want float16 or bfloat16"
        return "flash attention packages want a head dimension up to 256" if call.query.shape[3] > 256 else None

    def forward(self, call: Call) -> tuple[Tensor, Tensor, State]:
        batch, heads, length, dim = call.query.shape
        found, function = self.sequences, self.package.rows if self.sequences is None else self.package.sequences
        # Where a package has both names, the second asks for the weights instead.
        ask = next((name for name in ("return_lse", "return_attn_probs") if name in function.names), "")
        result = function(
            **self._tokens(call), **self._options(call), causal=self.is_causal, **({ask: True} if ask else {})
        )
        shape = (batch, heads, length) if found is None else (heads, self._number(found.queries, batch * length))
        lse = result[1] if isinstance(result, tuple) else None
        if lse is None or lse.shape != shape:
            raise ValueError(
                f"{self.package.name} gives no log-sum-exp of shape {shape} (it gave "
                f"{None if lse is None else tuple(lse.shape)}), without which HiFICL cannot mix its pairs in: use a "
                "newer version of it, or model.set_attn_implementation('sdpa')."
            )
        output = self._laid(result[0], found and found.queries, batch, length)[..., :dim]
        if found is None:
            return output, lse, ()
        if found.queries is not None:
            everywhere = lse.new_full((heads, batch * length), _ABSENT)
            # A query that sees no key has an infinite LSE in some packages.
            lse = everywhere.index_copy_(1, found.queries, lse.clamp_max(_ABSENT))
        elif not found.whole:  # a package writes nothing there
            padding = torch.arange(batch * length, device=lse.device) >= found.query_starts[-1]
            lse = lse.masked_fill(padding, _ABSENT)
            output = output.masked_fill(padding.view(batch, 1, length, 1), 0)
        return output, lse.unflatten(1, (batch, length)).transpose(0, 1), ()

    def backward(self, call: Call, grad: Tensor, output: Tensor, lse: Tensor, state: State) -> Gradients:
        batch, _, length, dim = call.query.shape
        found, function = self.sequences, self.package.of_rows if self.sequences is None else self.package.of_sequences
        queries, keys = (None, None) if found is None else (found.queries, found.keys)
        tokens = self._tokens(call)
        # A package writes nothing where there is no sequence.
        wanted = [(torch.empty_like if found is None else torch.zeros_like)(tokens[name]) for name in ("q", "k", "v")]
        if found is not None:
            lse = lse.transpose(0, 1).flatten(1)
            lse = lse if queries is None else lse[:, queries]
        lse = lse.contiguous()
        function(
            **tokens, **self._options(call), **dict(zip(("dq", "dk", "dv"), wanted, strict=True)),
            dout=self._cut(grad, queries), out=self._cut(output, queries), softmax_lse=lse, lse=lse,
            causal=self.is_causal, is_causal=self.is_causal, deterministic=self.deterministic,
        )  # fmt: skip
        of_query = self._laid(wanted[0], queries, batch, length)
        of_key, of_value = (self._laid(g, keys, batch, call.key.shape[2]) for g in wanted[1:])
        return of_query[..., :dim], of_key[..., :dim], of_value[..., :dim]

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """The same as a boolean mask ``(B, 1, T, S)``, for a query ``(B, H, T, d)`` and a key ``(B, G, S, d)``."""
        (batch, _, length, _), size, device = query.shape, key.shape[2], query.device
        row, place, _ = self._queries(batch, length, size, device)
        key_row, key_place = self._keys(batch, size, device)
        distance = place[:, :, None] - key_place[:, None]
        visible = (row[:, :, None] == key_row[:, None]) & (row >= 0)[:, :, None]
        if self.is_causal:
            visible = visible & (distance >= 0)
        if self.window is not None:
            visible = visible & (distance.abs() <= self.window)
        return visible[:, None]

    def sees_one_key(self, query: Tensor, key: Tensor) -> Tensor:
        """Which queries see a single key, ``(B, 1, T)``; as `formula.sees_one_key` of the mask, without making it."""
        _, place, keys = self._queries(len(query), query.shape[2], key.shape[2], query.device)
        first, last = torch.zeros_like(place), place if self.is_causal else keys - 1
        if self.window is not None:
            first = (place - self.window).clamp_min(0)
            last = torch.minimum(last, place + self.window)
        return (first == last)[:, None]  # never for padding, whose place is -1

    def _queries(self, batch: int, length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence, position and number of keys of each query, (B, T); sequence -1: padding."""
        found = self.sequences
        if found is None:
            rows = torch.arange(batch, device=device)[:, None].expand(-1, length)
            return rows, torch.arange(size - length, size, device=device).expand(batch, -1), torch.full_like(rows, size)
        keys = found.key_starts.diff()
        row, place, within = _numbered(found.query_starts, self._number(found.queries, batch * length))
        place = place + (keys - found.query_starts.diff())[row]
        row, place, keys = (
            _spread(torch.where(within, t, -1), found.queries, batch, length) for t in (row, place, keys[row])
        )
        return row, place, keys

    def _keys(self, batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sequence and position of each key, (B, S); sequence -1: padding."""
        found = self.sequences
        if found is None:
            rows = torch.arange(batch, device=device)[:, None].expand(-1, size)
            return rows, torch.arange(size, device=device).expand(batch, -1)
        row, place, within = _numbered(found.key_starts, self._number(found.keys, batch * size))
        row, place = (_spread(torch.where(within, t, -1), found.keys, batch, size) for t in (row, place))
        return row, place

    @staticmethod
    def _number(places: Tensor | None, every: int) -> int:
        return every if places is None else len(places)

    def _tokens(self, call: Call) -> dict[str, Tensor]:
        found = self.sequences
        queries, keys = (None, None) if found is None else (found.queries, found.keys)
        return {"q": self._cut(call.query, queries), "k": self._cut(call.key, keys), "v": self._cut(call.value, keys)}

    def _options(self, call: Call) -> dict[str, Any]:
        options: dict[str, Any] = {"softmax_scale": call.scaling}
        if self.window is not None:
            both = (self.window, self.window)
            options |= {"window_size": both, "window_size_left": both[0], "window_size_right": both[1]}
        if self.sequences is not None:
            _, _, query_starts, key_starts, most_queries, most_keys, _ = self.sequences
            options |= {
                "cu_seqlens_q": query_starts, "cu_seqlens_k": key_starts,
                "max_seqlen_q": most_queries, "max_seqlen_k": most_keys,
            }  # fmt: skip
        return options

    def _cut(self, tensor: Tensor, places: Tensor | None) -> Tensor:
        """(B, H, T, d) as packages want it: (B, T, H, d), or the tokens of sequences (N, H, d); d a multiple of 8."""
        tensor = tensor.transpose(1, 2)
        if tensor.shape[-1] % 8:
            tensor = torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % 8))
        if self.sequences is None:
            return tensor
        tensor = tensor.flatten(0, 1)
        return tensor if places is None else tensor[places]

    def _laid(self, tensor: Tensor, places: Tensor | None, batch: int, length: int) -> Tensor:
        """The other way; zero where there is no token."""
        if self.sequences is not None:
            if places is not None:
                everywhere = tensor.new_zeros(batch * length, *tensor.shape[1:])
                tensor = everywhere.index_copy_(0, places, tensor)
            tensor = tensor.unflatten(0, (batch, length))
        return tensor.transpose(1, 2)


def _numbered(starts: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of so many tokens, the number of its sequence, its place in it, and whether it is in one at all."""
    tokens = torch.arange(number, device=starts.device)
    row = torch.searchsorted(starts[1:].long(), tokens, right=True).clamp_max(len(starts) - 2)
    return row, tokens - starts[row], tokens < starts[-1]


def _spread(values: Tensor, places: Tensor | None, batch: int, length: int) -> Tensor:
    """Values of the tokens of sequences, (B, T); -1 for padding."""
    if places is not None:
        values = values.new_full((batch * length,), -1).index_copy_(0, places, values)
    return values.unflatten(0, (batch, length))
