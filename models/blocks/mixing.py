"""Mixing: how heads exchange information.

Shape suffixes: N heads (or tokens), of them U user-side and G item-side; D their width; B rows (requests or
candidates), R requests, C candidates; S slice width D / N; X other widths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks.heads import ALL


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
        from_users = self.exchange(x_URD, self.user_side)
        return functional.pad(from_users, (0, self.width - from_users.shape[-1])), self.exchange(x_URD, self.item_side)

    def items(self, x_GCD: Tensor, received_GCX: Tensor | None) -> Tensor:
        """HeadMixing of the item heads, [G, C, D]; ``received``: what the users sent, per candidate."""
        from_items = self.exchange(x_GCD, self.item_side)
        return from_items if received_GCX is None else torch.cat([received_GCX, from_items], dim=-1)


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
        key_value = self.key_value(x_GCD)
        return self._attend(x_GCD, key_value if received_UCX is None else torch.cat([received_UCX, key_value]))

    def _attend(self, x_NBD: Tensor, key_value: Tensor) -> Tensor:
        q, k, v = (
            projected.permute(1, 0, 2).unflatten(-1, (self.attention_heads, -1)).transpose(1, 2)
            for projected in (self.query(x_NBD), *key_value.chunk(2, dim=-1))
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
