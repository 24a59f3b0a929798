"""Flash attention packages without a GPU: modules with the signatures of the real ones that compute the definition.

The parameters, their order and their defaults are those of flash-attn 2.8.3 ("fa2"), the same before 2.7 ("fa2-old"),
FlashAttention-3 ("fa3"), vLLM's fork of it ("fa3-vllm") and flash-attn-4 ("fa4").  Each stand-in insists on what the
real ones insist on, and is a loop over sequences and heads otherwise.  Queries that see no key have an infinite LSE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Optional

import torch
from torch import Tensor

_T, _O = "Tensor", "Optional[Tensor] = None"
_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_FA2_TAIL = "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False"
_FA2_BACK = ", ".join(
    [*(f"{name}: Tensor" for name in ("dout", "q", "k", "v", "out", "softmax_lse"))]
    + [f"{name}: Optional[Tensor]" for name in ("dq", "dk", "dv")]
)
_FA2_BACK_TAIL = (
    "dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, "
    "softcap: float, alibi_slopes: Optional[Tensor], deterministic: bool, rng_state: Optional[Tensor] = None"
)
_FA3_TAIL = "softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0"
_FA3_SCALES = "qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1)"
_FA4 = (
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, return_lse=False"
)

SIGNATURES: dict[str, dict[str, str]] = {
    "fa2": {
        "flash_attn_func": f"q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, {_FA2_TAIL}",
        "flash_attn_varlen_func": f"q, k, v, {_LENGTHS}, dropout_p=0.0, softmax_scale=None, causal=False, {_FA2_TAIL}, "
        "block_table=None",
        "_flash_attn_backward": f"{_FA2_BACK}, {_FA2_BACK_TAIL}",
        "_flash_attn_varlen_backward": f"{_FA2_BACK}, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, "
        f"max_seqlen_k: int, {_FA2_BACK_TAIL}, zero_tensors: bool = False",
    },
    "fa2-old": {
        "flash_attn_func": f"q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, {_FA2_TAIL}",
        "flash_attn_varlen_func": f"q, k, v, {_LENGTHS}, dropout_p=0.0, softmax_scale=None, causal=False, {_FA2_TAIL}",
        "_flash_attn_backward": "dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, "
        "window_size, softcap, alibi_slopes, deterministic, rng_state=None",
        "_flash_attn_varlen_backward": f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {_LENGTHS}, dropout_p, "
        "softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, rng_state=None",
    },
    "fa3": {
        "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, {_FA3_SCALES}, attention_chunk=0, {_FA3_TAIL}, "
        "return_attn_probs=False",
        "flash_attn_varlen_func": f"q, k, v, {_LENGTHS}, seqused_q=None, seqused_k=None, softmax_scale=None, "
        f"causal=False, {_FA3_SCALES}, attention_chunk=0, {_FA3_TAIL}, return_attn_probs=False",
        "_flash_attn_backward": "dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, "
        f"cu_seqlens_q: {_O}, cu_seqlens_k: {_O}, sequed_q: {_O}, sequed_k: {_O}, max_seqlen_q: Optional[int] = None, "
        f"max_seqlen_k: Optional[int] = None, dq: {_O}, dk: {_O}, dv: {_O}, softmax_scale: Optional[float] = None, "
        "is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, "
        "deterministic: bool = False, sm_margin: int = 0",
    },
    "fa3-vllm": {
        "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, {_FA3_SCALES}, {_FA3_TAIL}, s_aux=None",
        "flash_attn_varlen_func": f"q, k, v, {_LENGTHS}, seqused_q=None, seqused_k=None, softmax_scale=None, "
        f"causal=False, {_FA3_SCALES}, {_FA3_TAIL}, s_aux=None",
        "_flash_attn_backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, "
        "max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, "
        "deterministic=False, sm_margin=0",
    },
    "fa4": {
        "flash_attn_func": f"q, k, v, qv=None, gather_kv_indices=None, {_FA4}",
        "flash_attn_varlen_func": "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
        f"max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, page_table=None, {_FA4}",
        "_flash_attn_bwd": "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, "
        "window_size_left=None, window_size_right=None, m_block_size=64, cu_seqlens_q=None, cu_seqlens_k=None, "
        "seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, "
        "dv=None, dlse=None, learnable_sink=None",
    },
}


def package(family: str, changes: dict[str, str | None] | None = None) -> ModuleType:
    """A stand-in for the packages of a family; `calls` lists the functions that were called, with their arguments.

    `changes`: other signatures for some of its functions; None leaves one out.
    """
    module: Any = ModuleType(f"{family}_stand_in")
    module.__dict__.update(
        Tensor=Tensor, Optional=Optional, run=torch.compiler.disable(partial(_run, module)), calls=[]
    )
    for name, signature in (SIGNATURES[family] | (changes or {})).items():
        if signature is None:
            continue
        returned = " -> Tensor" if ": Tensor" in signature else ""
        source = f"def {name}({signature}){returned}:\n    return run({name!r}, dict(locals()))\n"
        exec(compile(source, f"{family}.py", "exec", dont_inherit=True), module.__dict__)
        if returned:  # a custom operator of torch, as the real one is
            _OPERATORS.append(name)
            operator = f"{family.replace('-', '_')}_stand_in::{name}_{len(_OPERATORS)}"
            vars(module)[name] = torch.library.custom_op(operator, vars(module)[name], mutates_args=("dq", "dk", "dv"))
    return module


_OPERATORS: list[str] = []


def _run(module: Any, name: str, x: dict[str, Any]) -> Any:
    module.calls.append((name, x))
    backward = "dout" in x
    rows = x.get("cu_seqlens_q") is None
    assert name.count("varlen") == (not rows) or (backward and "varlen" not in name), name
    q, k, v = x["q"], x["k"], x["v"]
    assert q.dtype == k.dtype == v.dtype and q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    assert all(t.stride(-1) == 1 and t.dim() == (4 if rows else 3) for t in (q, k, v))
    assert not x.get("dropout_p") and not x.get("softcap") and x["softmax_scale"] is not None
    assert all(x.get(other) is None for other in ("alibi_slopes", "s_aux", "learnable_sink", "rng_state", "seqused_q"))
    if rows:
        parts = [(row, slice(None), row, slice(None)) for row in range(len(q))]
    else:
        starts = [x[f"cu_seqlens_{of}"] for of in "qk"]
        assert all(s.dtype == torch.int32 and s.dim() == 1 for s in starts) and len(starts[0]) == len(starts[1])
        assert int(starts[0][-1]) <= len(q) and int(starts[1][-1]) <= len(k)  # behind that, nothing is written
        for start, of in zip(starts, "qk", strict=True):
            assert isinstance(x[f"max_seqlen_{of}"], int) and x[f"max_seqlen_{of}"] == int(start.diff().max())
        (a, b), (c, d) = ((s[:-1].tolist(), s[1:].tolist()) for s in starts)
        parts = [(..., slice(a[i], b[i]), ..., slice(c[i], d[i])) for i in range(len(a))]
    return (_backward if backward else _forward)(name, x, parts, rows)


def _scores(x: dict[str, Any], q: Tensor, k: Tensor) -> Tensor:
    """(T, S) of one head of one sequence."""
    scores = q @ k.mT * x["softmax_scale"]
    left, right = x["window_size"] if "window_size" in x else (x["window_size_left"], x["window_size_right"])
    if x.get("causal", x.get("is_causal")):
        right = 0
    for t in range(len(q)):
        place = t + len(k) - len(q)
        for s in range(len(k)):
            if (right is not None and 0 <= right < s - place) or (left is not None and 0 <= left < place - s):
                scores[t, s] = -torch.inf
    return scores


def _forward(name: str, x: dict[str, Any], parts: list[Any], rows: bool) -> Any:
    q, k, v = (_wide(x[of]) for of in "qkv")
    out, lse = torch.zeros_like(q), q.new_full((q.shape[-2], q[..., 0, 0].numel()), torch.inf)
    if rows:
        lse = lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
    if not rows:
        end = int(x["cu_seqlens_q"][-1])
        out[end:], lse[:, end:] = torch.nan, torch.nan
    for row, queries, key_row, keys in parts:
        for h in range(q.shape[-2]):
            g = h // (q.shape[-2] // k.shape[-2])
            scores = _scores(x, q[row][queries][:, h], k[key_row][keys][:, g])
            seen = (scores > -torch.inf).any(-1)
            out[row][queries][seen, h] = scores[seen].softmax(-1) @ v[key_row][keys][:, g]
            (lse[row] if rows else lse)[h, queries][seen] = scores[seen].logsumexp(-1)
    out = out.to(x["q"].dtype)
    if "return_attn_probs" in x:
        if not x["return_attn_probs"]:
            return out
        return (out, lse, None) if "alibi_slopes" in x else (out, lse)
    return out, (None if x.get("return_lse") is False else lse)


def _wide(tensor: Tensor) -> Tensor:
    """Within, packages compute in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _backward(name: str, x: dict[str, Any], parts: list[Any], rows: bool) -> Any:
    assert x["out"].dtype == x["dout"].dtype == x["q"].dtype
    q, k, v, out, dout = (_wide(x[of]) for of in ("q", "k", "v", "out", "dout"))
    lse = x["softmax_lse" if "softmax_lse" in x else "lse"]
    assert isinstance(x["deterministic"], bool)
    assert lse.is_contiguous() and lse.shape == ((q.shape[0], q.shape[2], q.shape[1]) if rows else (q.shape[1], len(q)))
    assert out.shape == dout.shape == q.shape and lse.dtype == q.dtype
    wanted = {of: torch.zeros_like(t) for of, t in zip("qkv", (q, k, v), strict=True)}
    for row, queries, key_row, keys in parts:
        for h in range(q.shape[-2]):
            g = h // (q.shape[-2] // k.shape[-2])
            query, key, value = q[row][queries][:, h], k[key_row][keys][:, g], v[key_row][keys][:, g]
            grad, output = dout[row][queries][:, h], out[row][queries][:, h]
            p = torch.exp(_scores(x, query, key) - (lse[row] if rows else lse)[h, queries][:, None])
            ds = p * (grad @ value.mT - (grad * output).sum(-1, keepdim=True)) * x["softmax_scale"]
            wanted["q"][row][queries][:, h] += ds @ key
            wanted["k"][key_row][keys][:, g] += ds.mT @ query
            wanted["v"][key_row][keys][:, g] += p.mT @ grad
    for of, found in wanted.items():
        assert x[f"d{of}"].shape == found.shape and x[f"d{of}"].dtype == x["q"].dtype
        end = None if rows else int(x["cu_seqlens_q" if of == "q" else "cu_seqlens_k"][-1])
        x[f"d{of}"][:end].copy_(found[:end])
    return torch.zeros(1)


def functions(module: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return module.flash_attn_func, module.flash_attn_varlen_func
