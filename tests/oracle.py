"""The definition, written out: one loop per row, head and query, straight from the paper's formula.

Slow and naive on purpose; it shares no code and no tensor trick with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hificl(
    query: Tensor,  # (B, H, T, d)
    key: Tensor,  # (B, G, S, d)
    value: Tensor,  # (B, G, S, e)
    virtual_keys: Tensor,  # (B or 1, H, n, d)
    virtual_values: Tensor,  # (B or 1, H, n, e)
    scaling: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    log_weights: Tensor | None = None,  # (B or 1, H, n)
    alpha_one: bool = False,
    skip_first_token: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, e) and alpha (B, H, T)."""
    batch, heads, length, _ = query.shape
    per_group = heads // key.shape[1]
    size = key.shape[2]
    full = (batch, heads, length, size)
    if mask is None:
        visible, additive = torch.ones(full, dtype=torch.bool), torch.zeros(full, dtype=query.dtype)
    elif mask.dtype == torch.bool:
        visible, additive = mask.expand(full), torch.zeros(full, dtype=query.dtype)
    else:
        visible, additive = mask.expand(full) > -1e30, mask.to(query.dtype).expand(full)
    if bias is not None:
        additive = additive + bias.expand(full)

    def score(q: Tensor, k: Tensor) -> Tensor:
        s = scaling * torch.dot(q, k)
        return s if softcap is None else softcap * torch.tanh(s / softcap)

    out, alphas = [], []
    for b in range(batch):
        for h in range(heads):
            k_d = virtual_keys[b if len(virtual_keys) > 1 else 0, h]
            v_d = virtual_values[b if len(virtual_values) > 1 else 0, h]
            for t in range(length):
                q = query[b, h, t]
                columns = [j for j in range(size) if visible[b, h, t, j]]
                context = {j: torch.exp(score(q, key[b, h // per_group, j]) + additive[b, h, t, j]) for j in columns}
                weights = [1.0] * len(k_d)
                if log_weights is not None:
                    weights = [torch.exp(w) for w in log_weights[b if len(log_weights) > 1 else 0, h]]
                if skip_first_token and len(columns) == 1:
                    weights = [0.0] * len(k_d)
                virtual = [w * torch.exp(score(q, k)) for w, k in zip(weights, k_d, strict=True)]
                z_sa = sum(context.values()) + (0.0 if sinks is None else torch.exp(sinks[h]))
                z_d = sum(virtual)
                attended = torch.zeros_like(value[b, 0, 0])
                for j, e in context.items():
                    attended = attended + e / z_sa * value[b, h // per_group, j]
                alpha = z_sa / (z_sa + z_d)
                mixed = attended if alpha_one else alpha * attended
                for e, v in zip(virtual, v_d, strict=True):
                    mixed = mixed + e / (z_sa + z_d) * v
                out.append(mixed)
                alphas.append(torch.as_tensor(alpha))
    return (
        torch.stack(out).reshape(batch, heads, length, -1),
        torch.stack(alphas).reshape(batch, heads, length),
    )
