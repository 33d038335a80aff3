"""Norms: where a sublayer is normalised."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.heads import ALL

NORM_EPSILON = 1e-6
"""The same in every precision; PyTorch's default for a norm in bf16 is large enough to change a model."""


class PreRMSNorm(nn.Module):
    """Root-mean-square norm before a sublayer, over the last dimension; shape (N, D) gives every head its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def before(self, x: Tensor, heads: slice = ALL) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], eps=NORM_EPSILON) * _of_heads(self.scale, heads)

    def after(self, x: Tensor, heads: slice = ALL) -> Tensor:
        return x


class PostLayerNorm(nn.Module):
    """Layer norm after a sublayer and its residual (the ablation of figure 3 of MixFormer)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def before(self, x: Tensor, heads: slice = ALL) -> Tensor:
        return x

    def after(self, x: Tensor, heads: slice = ALL) -> Tensor:
        normed = functional.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)
        return normed * _of_heads(self.scale, heads) + _of_heads(self.shift, heads)


class NoNorm(nn.Module):
    """Leaves x as it is: the equations as printed, which name no norm."""

    def __init__(self, *shape: int) -> None:
        super().__init__()

    def before(self, x: Tensor, heads: slice = ALL) -> Tensor:
        return x

    def after(self, x: Tensor, heads: slice = ALL) -> Tensor:
        return x


Norm = PreRMSNorm | PostLayerNorm | NoNorm
NORMS: dict[str, type[PreRMSNorm | PostLayerNorm | NoNorm]] = {
    "pre_rms": PreRMSNorm,
    "post_layer": PostLayerNorm,
    "none": NoNorm,
}


def _of_heads(parameter: Tensor, heads: slice) -> Tensor:
    """[N, D] → [heads, 1, D], to meet rows of heads; a parameter without heads as it is."""
    return parameter[heads, None] if parameter.dim() == 2 else parameter
