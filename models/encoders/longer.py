"""Cross attention of the newest events (3.4.1 (ii) of HyFormer)."""

from __future__ import annotations

from torch import Tensor, nn

from models.blocks.attention import MultiHeadAttention
from models.blocks.dropout import Dropout
from models.blocks.norms import NORMS, Norm
from models.encoders.sizes import EncoderSizes
from models.encoders.window import Window


class LongerEncoding(nn.Module):
    """(ii) LONGER-style: H = CrossAttn(S_short, S, S); S_short are the newest L_H events of the window."""

    local = False

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.norm: Norm = NORMS[sizes.norm](sizes.width)
        self.attention = MultiHeadAttention(sizes.width, sizes.attention_heads, sizes.time_bias)
        self.dropout, self.residual = Dropout(sizes.dropout), sizes.residual

    def forward(self, s_ED: Tensor, window: Window | None) -> Tensor:
        assert window is not None
        normed = self.norm.before(s_ED)
        short = normed.index_select(0, window.asking)
        attended = self.dropout(self.attention(short, *self.attention.encode(normed), window.plan))
        return self.norm.after(attended + s_ED.index_select(0, window.asking) if self.residual else attended)
