"""vLLM's CPU attention with virtual pairs.

vLLM's kernel returns no log-sum-exp, and keeps keys in an order of its own.  So a layer with pairs keeps keys and
values in the cache as they come, and computes its attention with PyTorch's kernel, one request after another: exact,
and plain rather than fast.  A layer without pairs is vLLM's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from peft_hificl.ops.formula import Scoring
from peft_hificl.ops.merged import attention

from .adapter import pairs_of


class HiFICLCPUImpl(CPUAttentionBackendImpl):
    """Attention of one layer; `loader` has checked that it is one that is computed here."""

    def forward(
        self, layer: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None, output: Tensor, output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention over the cache and the pairs, written to `output`; shapes as in vLLM's class.

        Raises:
            ValueError: the batch is not causal.
        """
        pairs = pairs_of(layer)
        scaled = output_scale is not None or output_block_scale is not None  # refused by vLLM's class
        if pairs is None or attn_metadata is None or scaled:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if attn_metadata.causal is not True or attn_metadata.dynamic_causal is not None:
            raise ValueError("HiFICL's attention backend takes causal batches: run without bidirectional attention.")
        starts, sizes = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for request, size in enumerate(sizes):
            begin, end = starts[request : request + 2]
            if begin == end:
                continue
            blocks = attn_metadata.block_table[request, : -(-size // kv_cache.shape[2])]
            cached = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :size]  # (1, G, S, 2d)
            keys, values = cached.split(self.head_size, dim=-1)
            queries = query[begin:end].transpose(0, 1)[None]  # (1, H, T, d)
            mixed = attention(queries, keys, values, pairs, self._scoring(end - begin, size))
            output[begin:end] = mixed[0].transpose(0, 1)
        return output

    def _scoring(self, length: int, size: int) -> Scoring:
        """Scale and mask of the last `length` of `size` tokens."""
        position = torch.arange(size - length, size)[:, None]
        distance = position - torch.arange(size)
        visible = distance >= 0
        if self.sliding_window > 0:
            visible &= distance < self.sliding_window
        return Scoring(self.scale, mask=None if length == 1 and visible.all() else visible[None, None])

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write keys and values, (T, G, d), into the cache, (blocks, G, block size, 2d); a negative slot is padding."""
        if pairs_of(layer) is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        real = slot_mapping >= 0
        slots, size = slot_mapping[real], kv_cache.shape[2]
        both = torch.cat([key[: len(real)][real], value[: len(real)][real]], dim=-1)
        kv_cache[slots // size, :, slots % size] = both.to(kv_cache.dtype)


class HiFICLCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend, with `HiFICLCPUImpl`."""

    @staticmethod
    def get_impl_cls() -> type[HiFICLCPUImpl]:
        return HiFICLCPUImpl
