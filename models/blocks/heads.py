"""Linear maps per head. Heads are the first dimension, so that a map per head is one batched matmul.

Shape suffixes: N heads (or tokens), D their width; B rows (requests or candidates); I, W other widths. ``heads`` tells
which of the N heads the rows of x are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

ALL = slice(None)


class PerHeadLinear(nn.Module):
    """A linear map of its own for every head, as one batched matmul: [N, B, in] → [N, B, out]."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs))
        nn.init.uniform_(self.weight, -(inputs**-0.5), inputs**-0.5)

    def forward(self, x_NBI: Tensor, heads: slice = ALL) -> Tensor:
        return torch.bmm(x_NBI, self.weight[heads])


class HeadSplit(nn.Module):
    """Eq. 2 of MixFormer: concatenated features, split evenly into heads, each projected to width D.

    A width that does not divide by the heads is padded with zeros; ``padding`` says by how many.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.padding = heads, -width % heads
        self.project = PerHeadLinear(heads, (width + self.padding) // heads, head_width)

    def forward(self, e_BW: Tensor) -> Tensor:
        padded = functional.pad(e_BW, (0, self.padding))
        x_NBD: Tensor = self.project(padded.unflatten(-1, (self.heads, -1)).transpose(0, 1))
        return x_NBD
