"""Layers shared by the models.

Shape suffixes: N heads (or tokens), of them U user-side and G item-side; D their width; B rows (requests or
candidates), R requests, C candidates; S slice width D / N; K tasks; H hidden width of a tower; W, X other widths.
Heads come first: a map of its own for every head is one batched matmul. ``heads`` tells which of the N heads the
rows of x are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

ALL = slice(None)

NORM_EPSILON = 1e-6
"""The same in every precision; PyTorch's default for a norm in bf16 is large enough to change a model."""


# --- norms: where a sublayer is normalised ------------------------------------------------------------


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


# --- dropout ------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """Dropout whose mask on a CPU takes 16 random bits per value, which are drawn seven times as fast as a float.

    The rate is rounded to 1/65,536 and the scale made to fit, so that the expectation is exact.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        if x.device.type != "cpu":
            return functional.dropout(x, self.rate)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = round(self.rate * 2**16)
        return x * ((bits >= dropped - 2**15) * (2**16 / (2**16 - dropped)))


# --- feed-forward networks ----------------------------------------------------------------------------


class PerHeadLinear(nn.Module):
    """A linear map of its own for every head, as one batched matmul: [N, B, in] → [N, B, out]."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs))
        nn.init.uniform_(self.weight, -(inputs**-0.5), inputs**-0.5)

    def forward(self, x_NBI: Tensor, heads: slice = ALL) -> Tensor:
        return torch.bmm(x_NBI, self.weight[heads])


class SwiGLU(nn.Module):
    """SwiGLU feed-forward network shared by all rows and heads: W_out (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # gate and up are maps of their own: halves of one would leave their rows scattered
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


# --- mixing: how heads exchange information -----------------------------------------------------------


class HeadMixing(nn.Module):
    """HeadMixing (eq. 3 of MixFormer; token mixing in 3.5 of HyFormer): head i receives slice i of every head.

    It reshapes [N, D] to [N, N, S] and transposes, and has no parameters. Decoupled (eq. 10, 11), user heads
    receive from user heads only, zeros stand in for the items' slices, and what user heads send to item heads is
    the same for all candidates of a request.
    """

    def __init__(self, heads: int, width: int, user_heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.user_side, self.item_side = slice(0, user_heads), slice(user_heads, heads)

    def exchange(self, x_NBD: Tensor, receivers: slice = ALL) -> Tensor:
        """What ``receivers`` get from these heads, [receivers, B, N · S]."""
        x_NBNS = x_NBD.reshape(*x_NBD.shape[:2], self.heads, self.width // self.heads)
        return x_NBNS[:, :, receivers].permute(2, 1, 0, 3).flatten(2)

    def users(self, x_URD: Tensor) -> tuple[Tensor, Tensor]:
        """HeadMixing of the user heads under the mask of eq. 10, [U, R, D], and what they send to the item heads:
        [G, R, U · S]."""
        own = self.exchange(x_URD, self.user_side)
        return functional.pad(own, (0, self.width - own.shape[-1])), self.exchange(x_URD, self.item_side)

    def items(self, x_GCD: Tensor, received_GCX: Tensor | None) -> Tensor:
        """HeadMixing of the item heads, [G, C, D]; ``received``: what the users sent, per candidate."""
        own = self.exchange(x_GCD, self.item_side)
        return own if received_GCX is None else torch.cat([received_GCX, own], dim=-1)


class SelfAttentionMixing(nn.Module):
    """Self-attention over the heads instead of HeadMixing (figure 3): user heads attend to user heads only."""

    def __init__(self, width: int, attention_heads: int) -> None:
        super().__init__()
        self.attention_heads = attention_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def users(self, x_URD: Tensor) -> tuple[Tensor, Tensor]:
        """Self-attention of the user heads, [U, R, D]; their keys and values, [U, R, 2 D]."""
        key_value: Tensor = self.key_value(x_URD)
        return self._attend(x_URD, key_value), key_value

    def items(self, x_GCD: Tensor, received_UCX: Tensor | None) -> Tensor:
        own = self.key_value(x_GCD)
        return self._attend(x_GCD, own if received_UCX is None else torch.cat([received_UCX, own]))

    def _attend(self, x_NBD: Tensor, key_value: Tensor) -> Tensor:
        q, k, v = (
            one.permute(1, 0, 2).unflatten(-1, (self.attention_heads, -1)).transpose(1, 2)
            for one in (self.query(x_NBD), *key_value.chunk(2, dim=-1))
        )
        z = functional.scaled_dot_product_attention(q, k, v)  # [B, attention heads, N, width]
        out: Tensor = self.out(z.permute(2, 0, 1, 3).flatten(2))
        return out


class NoMixing(nn.Module):
    """Heads exchange nothing (figure 3): p = x."""

    def users(self, x_URD: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x_URD), x_URD[:0]

    def items(self, x_GCD: Tensor, received: Tensor | None) -> Tensor:
        return torch.zeros_like(x_GCD)


Mixing = HeadMixing | SelfAttentionMixing | NoMixing


# --- in and out ---------------------------------------------------------------------------------------


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
