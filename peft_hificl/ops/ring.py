"""Attention kernels over keys that several ranks share: torch's ring attention, whose merge has a log-sum-exp, too.

Under torch's `context_parallel` each rank has the queries, keys and values of some tokens of a row.  The keys and
values go round the ranks; each rank runs an attention kernel on those that have come, and merges the outputs by their
log-sum-exps (LSE).  What comes of it is an output and an LSE of attention over *all* keys, and the backward takes
those of attention over *more* keys as a kernel's own does.  So a ring of kernels is a kernel, and `merged` adds the
virtual pairs to it on each rank, as every rank has all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernels import Call, Gradients, Kernel, State


def ring_of(kernel: Kernel, group: torch.distributed.ProcessGroup) -> Kernel:
    """A kernel that attends to the keys of all ranks of a group, of which each call has this rank's.

    Which tokens a rank has follows from torch's own option: the r-th of N parts of the row or, with load balancing,
    the r-th and the r-th last of 2 N parts.
    """
    # Private, and needed only where `context_parallel` runs, which has imported it.
    from torch.distributed.tensor.experimental._context_parallel import _attention  # noqa: PLC0415

    torchs: Any = _attention

    def forward(call: Call) -> tuple[Tensor, Tensor, State]:
        def op(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> tuple[Tensor, ...]:
            output, lse, state = kernel.forward(call._replace(query=query, key=key, value=value, is_causal=is_causal))
            return output, lse, *state

        output, lse, *state = torchs._templated_ring_attention(
            group, 2, op, call.query, call.key, call.value, is_causal=call.is_causal
        )
        # With one tensor more than without a ring, so that a recomputation without it (gradient checkpointing whose
        # backward runs after `context_parallel` has ended) is not taken for this one.  Its shape tells which tokens the
        # rank has: torch's option may be another one when the backward runs.
        return output, lse, (*state, lse.new_empty(0, 1 + torchs._cp_options.enable_load_balance))

    def backward(call: Call, grad: Tensor, output: Tensor, lse: Tensor, state: State) -> Gradients:
        def op(
            query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, *, is_causal: bool, grad: Tensor
        ) -> Gradients:
            part = call._replace(query=query, key=key, value=value, is_causal=is_causal)
            return kernel.backward(part, grad, out, logsumexp, state[:-1])

        options = torchs._cp_options
        now, options.enable_load_balance = options.enable_load_balance, state[-1].shape[1] == 2
        try:
            gradients: Gradients = torchs._templated_ring_attention_backward(
                group, 2, op, grad, "grad", call.query, call.key, call.value, output, lse, is_causal=call.is_causal
            )
        finally:
            options.enable_load_balance = now
        return gradients

    def limits(call: Call) -> str | None:
        obstacles = {
            "ring attention takes no mask": call.mask is not None,
            "ring attention wants as many keys as queries": call.query.shape[2] != call.key.shape[2],
            "torch's load balancing is for causal attention alone": not call.is_causal
            and torchs._cp_options.enable_load_balance,
        }
        return next((reason for reason, holds in obstacles.items() if holds), kernel.limits(call))

    return Kernel(forward, backward, limits, kernel.groups)
