"""Self-attention over the whole window (3.4.1 (i) of HyFormer)."""

from __future__ import annotations

from torch import Tensor, nn

from models.blocks.attention import MultiHeadAttention
from models.blocks.dropout import Dropout
from models.blocks.ffn import FeedForward, SwiGLU
from models.blocks.norms import NORMS, Norm
from models.encoders.sizes import EncoderSizes
from models.encoders.window import Window


class TransformerEncoding(nn.Module):
    """(i) Full Transformer: H = TransformerEnc(S), bidirectional self-attention and SwiGLU FFN with residuals."""

    local = False

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.norm: Norm = NORMS[sizes.norm](sizes.width)
        self.attention = MultiHeadAttention(sizes.width, sizes.attention_heads, sizes.time_bias)
        ffn = SwiGLU(sizes.width, sizes.hidden)
        self.ffn = FeedForward(NORMS[sizes.norm](sizes.width), ffn, sizes.dropout)
        self.dropout = Dropout(sizes.dropout)

    def forward(self, s_ED: Tensor, window: Window | None) -> Tensor:
        assert window is not None
        normed = self.norm.before(s_ED)
        attended = self.attention(normed, *self.attention.encode(normed), window.plan)
        h_ED: Tensor = self.ffn(self.norm.after(self.dropout(attended) + s_ED))
        return h_ED
