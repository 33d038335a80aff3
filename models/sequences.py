"""Sequence Representation Encoding of HyFormer (3.4.1): what a layer makes of a behaviour sequence.

Shape suffixes: E events, A of them that ask, D width, H attention heads, W width of one of them, B queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention import TIME_BUCKETS, Plan, Seen, attend, plan_attention
from models.config import HyFormerConfig
from models.layers import NORMS, Dropout, FeedForward, Norm, SwiGLU


class MultiHeadAttention(nn.Module):
    """Standard multi-head attention over packed events, with keys and values projected apart from the queries."""

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


@dataclass
class Window:
    """Each request's own visible events, request after request.

    Attributes:
        rows: positions of the windows' events among the events of the timelines, [E].
        asking: of these rows, the newest of each window, which attend to all of it and become H, [A].
        plan: by which they attend.
        seen: H as events: each request sees its own.
    """

    rows: Tensor
    asking: Tensor
    plan: Plan | None
    seen: Seen


def make_window(seen: Seen, newest: int | None, device: torch.device) -> Window:
    """Windows of these requests; ``newest``: how many events of each become H, None: all."""
    rows, offsets = seen.rows()
    event_ts, counts = seen.event_ts[rows], offsets.diff()
    request = torch.repeat_interleave(torch.arange(len(counts)), counts)
    asking, asking_counts = torch.arange(len(rows)), counts
    if newest is not None:
        # the windows of merged sequences lie side by side: newest is by time, not by place
        by_time = event_ts.argsort(stable=True)
        by_time = by_time[request[by_time].argsort(stable=True)]
        asking = by_time[asking - offsets[request] >= (counts - newest)[request]]
        asking_counts = counts.clamp(max=newest)
    all_of_it = Seen(
        timeline=request[asking],
        ts=event_ts[asking],
        first=offsets[None, request[asking]],
        last=offsets[None, request[asking] + 1],
        event_ts=event_ts,
        timelines=len(counts),
    )
    ends = asking_counts.cumsum(0)
    own = Seen(
        timeline=torch.arange(len(counts)),
        ts=seen.ts,
        first=(ends - asking_counts)[None],
        last=ends[None],
        event_ts=event_ts[asking],
        timelines=len(counts),
    )
    return Window(rows.to(device), asking.to(device), plan_attention(all_of_it, None, device), own)


class SwiGLUEncoding(nn.Module):
    """(iii) Decoder-style: H = SwiGLU(S), event by event, so that timelines are shared."""

    local = True

    def __init__(self, config: HyFormerConfig) -> None:
        super().__init__()
        self.norm: Norm = NORMS[config.norm](config.width)
        self.ffn = SwiGLU(config.width, round(config.sequence_ffn * config.width))

    def forward(self, s_ED: Tensor, window: Window | None) -> Tensor:
        return self.norm.after(self.ffn(self.norm.before(s_ED)))


class TransformerEncoding(nn.Module):
    """(i) Full Transformer: H = TransformerEnc(S), bidirectional self-attention and SwiGLU FFN with residuals."""

    local = False

    def __init__(self, config: HyFormerConfig) -> None:
        super().__init__()
        self.norm: Norm = NORMS[config.norm](config.width)
        self.attention = MultiHeadAttention(config.width, config.attention_heads, config.time_bias)
        ffn = SwiGLU(config.width, round(config.sequence_ffn * config.width))
        self.ffn = FeedForward(NORMS[config.norm](config.width), ffn, config.dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, s_ED: Tensor, window: Window | None) -> Tensor:
        assert window is not None
        normed = self.norm.before(s_ED)
        attended = self.attention(normed, *self.attention.encode(normed), window.plan)
        h_ED: Tensor = self.ffn(self.norm.after(self.dropout(attended) + s_ED))
        return h_ED


class LongerEncoding(nn.Module):
    """(ii) LONGER-style: H = CrossAttn(S_short, S, S); S_short are the newest L_H events of the window."""

    local = False

    def __init__(self, config: HyFormerConfig) -> None:
        super().__init__()
        self.norm: Norm = NORMS[config.norm](config.width)
        self.attention = MultiHeadAttention(config.width, config.attention_heads, config.time_bias)
        self.dropout, self.residual = Dropout(config.dropout), config.attention_residual

    def forward(self, s_ED: Tensor, window: Window | None) -> Tensor:
        assert window is not None
        normed = self.norm.before(s_ED)
        short = normed.index_select(0, window.asking)
        attended = self.dropout(self.attention(short, *self.attention.encode(normed), window.plan))
        return self.norm.after(attended + s_ED.index_select(0, window.asking) if self.residual else attended)


Encoding = SwiGLUEncoding | TransformerEncoding | LongerEncoding
ENCODINGS: dict[str, type[SwiGLUEncoding | TransformerEncoding | LongerEncoding]] = {
    "swiglu": SwiGLUEncoding,
    "transformer": TransformerEncoding,
    "longer": LongerEncoding,
}
