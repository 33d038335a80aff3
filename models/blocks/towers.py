"""From heads to logits.

Shape suffixes: N heads, D their width; B rows (requests or candidates); K tasks; H hidden width of a tower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.heads import ALL
from models.blocks.norms import PreRMSNorm


class TaskTowers(nn.Module):
    """One small MLP per task over all heads: norm, one hidden layer with SiLU, one logit.

    The first layer is a sum over heads, so the part of user heads is computed once per request.
    """

    def __init__(self, heads: int, width: int, tasks: int, hidden: int) -> None:
        super().__init__()
        self.norm = PreRMSNorm(heads, width)
        self.weight = nn.Parameter(torch.randn(heads, width, tasks, hidden) * (heads * width) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(tasks, hidden))
        self.out = nn.Parameter(torch.randn(tasks, hidden) * hidden**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(tasks))

    def first_layer(self, x_NBD: Tensor, heads: slice = ALL) -> Tensor:
        """These heads' part of the first layer, without the bias: [B, K, H]."""
        x_BX = self.norm.before(x_NBD, heads).transpose(0, 1).flatten(1)
        return torch.mm(x_BX, self.weight[heads].flatten(0, 1).flatten(1)).view(-1, *self.bias.shape)

    def forward(self, first_BKH: Tensor) -> Tensor:
        """Logits [B, K] from the whole first layer."""
        return (functional.silu(first_BKH + self.bias) * self.out).sum(-1) + self.out_bias
