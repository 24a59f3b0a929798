"""vLLM's FlashAttention with virtual pairs: the kernel is asked for its log-sum-exp, and the pairs are mixed in."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
)

from peft_hificl.ops.formula import Scoring
from peft_hificl.ops.merged import add_pairs

from .adapter import pairs_of

_TOKENS = 1024  # mixed in at once: queries and outputs are float32 meanwhile, which vLLM has reserved no memory for


class HiFICLFlashImpl(FlashAttentionImpl):
    """Attention of one layer; `loader` has checked that it is one that is computed here."""

    def forward(
        self, layer: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: FlashAttentionMetadata | None, output: Tensor, output_scale: Tensor | None = None,
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
        batch = attn_metadata
        if batch.causal is not True or batch.mm_prefix_query_range_tensor is not None:
            raise ValueError("HiFICL's attention backend takes causal batches: run without bidirectional attention.")
        tokens = batch.num_actual_tokens
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)  # (blocks, block size, G, d)
        attended, lse = fa_utils.flash_attn_varlen_func(
            q=query[:tokens],
            k=canonicalize_singleton_dim_strides(keys),
            v=canonicalize_singleton_dim_strides(values),
            out=output[:tokens],
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=batch.max_query_len,
            seqused_k=batch.seq_lens,
            max_seqlen_k=batch.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            window_size=list(self.sliding_window),
            block_table=batch.block_table,
            return_softmax_lse=True,
            scheduler_metadata=batch.scheduler_metadata,
            num_splits=batch.max_num_splits,
            fa_version=self.vllm_flash_attn_version,
        )  # (T, H, d) and (H, T)
        first = first_tokens(batch.query_start_loc, batch.seq_lens, tokens) if pairs.skip_first_token else None
        for begin in range(0, tokens, _TOKENS):
            part = slice(begin, begin + _TOKENS)
            mixed = add_pairs(
                attended[part].transpose(0, 1)[None],
                lse[None, :, part],
                query[:tokens][part].transpose(0, 1)[None],
                pairs,
                Scoring(self.scale),
                None if first is None else first[part],
            )
            output[:tokens][part] = mixed[0].transpose(0, 1)
        return output


def first_tokens(query_start_loc: Tensor, seq_lens: Tensor, tokens: int) -> Tensor:
    """Which of the tokens of a batch are the first of their sequence, (T,); without a copy from the device.

    Args:
        query_start_loc: ``(requests + 1,)``, where the tokens of each request begin.
        seq_lens: ``(requests,)``, how many tokens each request has, with those that are in the cache.
        tokens: T.

    >>> first_tokens(torch.tensor([0, 3, 4, 6]), torch.tensor([3, 5, 2]), 6).tolist()
    [True, False, False, False, True, False]
    """
    index = torch.arange(tokens, dtype=query_start_loc.dtype, device=query_start_loc.device)
    ends = query_start_loc[1:]
    request = torch.searchsorted(ends, index, right=True).clamp_max(len(seq_lens) - 1)
    return seq_lens[request] - (ends[request] - index) == 0


class HiFICLFlashBackend(FlashAttentionBackend):
    """vLLM's FlashAttention backend, with `HiFICLFlashImpl`."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HiFICLFlashImpl]:
        return HiFICLFlashImpl
