"""Feed-forward networks, shared or per head, and their sublayer.

Shape suffixes: N heads (or tokens), D their width; B rows (requests or candidates).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from models.blocks.dropout import Dropout
from models.blocks.heads import ALL, PerHeadLinear
from models.blocks.norms import Norm


class SwiGLU(nn.Module):
    """SwiGLU feed-forward network shared by all rows and heads: W_out (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # gate and up are two maps: the halves of a single one would not lie together in memory
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, heads: slice = ALL) -> Tensor:
        out: Tensor = self.out(functional.silu(self.gate(x)) * self.up(x))
        return out


class PerHeadSwiGLU(nn.Module):
    """A SwiGLU FFN of its own for every head or token (eq. 4 and 9 of MixFormer, 3.5 of HyFormer)."""

    def __init__(self, heads: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = PerHeadLinear(heads, width, hidden), PerHeadLinear(heads, width, hidden)
        self.out = PerHeadLinear(heads, hidden, width)

    def forward(self, x_NBD: Tensor, heads: slice = ALL) -> Tensor:
        out: Tensor = self.out(functional.silu(self.gate(x_NBD, heads)) * self.up(x_NBD, heads), heads)
        return out


class FeedForward(nn.Module):
    """A feed-forward sublayer with its norm and residual: FFN(Norm(x)) + x."""

    def __init__(self, norm: Norm, ffn: PerHeadSwiGLU | SwiGLU, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.ffn, self.dropout = norm, ffn, Dropout(dropout)

    def forward(self, x: Tensor, heads: slice = ALL) -> Tensor:
        changed = self.dropout(self.ffn(self.norm.before(x, heads), heads)) + x
        return self.norm.after(changed, heads)


class NoFeedForward(nn.Module):
    """The sublayer left out."""

    def forward(self, x: Tensor, heads: slice = ALL) -> Tensor:
        return x
