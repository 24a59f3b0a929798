"""What stands for PEFT's models of a few linear layers: HiFICL adapts attention, which those do not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

WIDTH, TOKENS = 16, 5
CONFIG = LlamaConfig(
    hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, head_dim=WIDTH // 4, num_hidden_layers=2,
    max_position_embeddings=64, attention_bias=True, attn_implementation="sdpa",
)  # fmt: skip


class MLP(nn.Module):
    """Two blocks of attention, `lin0` and `lin2`, and a head, `lin1`, over the ten numbers of PEFT's own `MLP`."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inputs = nn.Linear(2, WIDTH)
        self.norm0, self.norm2 = LlamaRMSNorm(WIDTH), LlamaRMSNorm(WIDTH)
        self.lin0, self.lin2 = LlamaAttention(CONFIG, 0), LlamaAttention(CONFIG, 1)
        self.rotary = LlamaRotaryEmbedding(CONFIG)
        self.lin1 = nn.Linear(WIDTH, 2, bias=bias)
        self.dtype = torch.float
        with torch.no_grad():  # attention that is not uniform, so that queries and keys have a gradient to speak of
            for attention in (self.lin0, self.lin2):
                attention.q_proj.weight.mul_(3)
                attention.k_proj.weight.mul_(3)

    def forward(self, X: Tensor) -> Tensor:
        hidden = self.inputs(X.to(self.inputs.weight.dtype).view(len(X), TOKENS, 2) / 45 - 1)
        cosine, sine = self.rotary(hidden, torch.arange(TOKENS, device=hidden.device)[None])
        positions = cosine.to(hidden.dtype), sine.to(hidden.dtype)
        for attention, norm in ((self.lin0, self.norm0), (self.lin2, self.norm2)):
            attended, _ = attention(hidden_states=norm(hidden), position_embeddings=positions, attention_mask=None)
            hidden = hidden + attended
        return self.lin1(hidden.sum(dim=1)).log_softmax(dim=-1)


class Block(nn.Module):
    def __init__(self, layer: int, bias: bool) -> None:
        super().__init__()
        self.lin0, self.lin1 = LlamaAttention(CONFIG, layer), nn.Linear(WIDTH, WIDTH, bias=bias)


class DeepMLP(nn.Module):
    """As PEFT's own: layers with a `lin0` to adapt and a `lin1` to save; it is never called."""

    def __init__(self, bias: bool = True, num_hidden_layers: int = 12, size: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(layer, bias) for layer in range(num_hidden_layers))
        self.out = nn.Linear(WIDTH, 2)
