"""Standard multi-head attention.

Shape suffixes: E events, D width, H attention heads, W width of one of them, B queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.blocks.attention.kernels import attend
from models.blocks.attention.plan import TIME_BUCKETS, Plan


class MultiHeadAttention(nn.Module):
    """Multi-head attention over packed events, with keys and values projected apart from the queries."""

    def __init__(self, width: int, heads: int, time_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.time_bias = nn.Parameter(torch.zeros(heads, TIME_BUCKETS)) if time_bias else None

    def encode(self, h_ED: Tensor) -> tuple[Tensor, Tensor]:
        """K = H W_K and V = H W_V, split into heads: [H, E, W] each."""
        k_ED, v_ED = self.key_value(h_ED).chunk(2, dim=-1)
        return self._split(k_ED), self._split(v_ED)

    def forward(self, q_BD: Tensor, keys: Tensor, values: Tensor, plan: Plan | None) -> Tensor:
        z_HBW = attend(self._split(self.query(q_BD)), keys, values, plan, self.time_bias)
        out: Tensor = self.out(z_HBW.transpose(0, 1).flatten(1))
        return out

    def _split(self, x_BD: Tensor) -> Tensor:
        return x_BD.reshape(len(x_BD), self.heads, x_BD.shape[-1] // self.heads).transpose(0, 1)
