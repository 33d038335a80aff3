"""Event by event (3.4.1 (iii) of HyFormer)."""

from __future__ import annotations

from torch import Tensor, nn

from models.blocks.ffn import SwiGLU
from models.blocks.norms import NORMS, Norm
from models.encoders.sizes import EncoderSizes
from models.encoders.window import Window


class SwiGLUEncoding(nn.Module):
    """(iii) Decoder-style: H = SwiGLU(S), event by event, so that timelines are shared."""

    local = True

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.norm: Norm = NORMS[sizes.norm](sizes.width)
        self.ffn = SwiGLU(sizes.width, sizes.hidden)

    def forward(self, s_ED: Tensor, window: Window | None) -> Tensor:
        return self.norm.after(self.ffn(self.norm.before(s_ED)))
