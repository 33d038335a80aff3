"""Sequence Representation Encoding of HyFormer (3.4.1): what a layer makes of a behaviour sequence.

Shape suffixes: E events, D width, H attention heads, W width of one of them, B queries.
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
        return x_BD.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # type: ignore[no-any-return]


@dataclass
class Window:
    """Each request's own visible events, request after request, and what of them is attended to.

    Attributes:
        short: rows of the newest events of each window, the queries of the LONGER encoding.
        every: plan by which each event attends to its window.
        newest: plan by which the ``short`` events do.
        seen: of all events; short_seen: of the short ones.
    """

    short: Tensor
    every: Plan | None
    newest: Plan | None
    seen: Seen
    short_seen: Seen


def make_window(seen: Seen, event_ts: Tensor, offsets: Tensor, short_length: int, device: torch.device) -> Window:
    """Windows packed by ``seen.rows()``.

    Args:
        event_ts: of the packed events; offsets: of the requests' windows, [R + 1].
    """
    counts = offsets.diff()
    R = len(counts)
    # the windows of several sequences lie side by side in a merged one: newest is by time, not by place
    request = torch.repeat_interleave(torch.arange(R), counts)
    by_time = torch.arange(len(event_ts))
    if len(seen.first) > 1:
        by_time = by_time[event_ts.argsort(stable=True)]
        by_time = by_time[request[by_time].argsort(stable=True)]
    place = torch.arange(len(event_ts)) - offsets[request]
    short = by_time[place >= (counts - short_length)[request]]
    short_counts = counts.clamp(max=short_length)
    alone = _windows(seen.ts, event_ts, offsets)
    return Window(
        short=short.to(device),
        every=plan_attention(_events_ask(alone, event_ts, request), None, device),
        newest=plan_attention(_events_ask(alone, event_ts[short], request[short]), None, device),
        seen=alone,
        short_seen=_windows(seen.ts, event_ts[short], torch.cat([offsets[:1], short_counts.cumsum(0)])),
    )


def _windows(ts: Tensor, event_ts: Tensor, offsets: Tensor) -> Seen:
    """Requests that see all of their own window."""
    R = len(ts)
    return Seen(torch.arange(R), ts, offsets[None, :-1], offsets[None, 1:], event_ts, R)


def _events_ask(seen: Seen, ts: Tensor, request: Tensor) -> Seen:
    """Events in the place of requests: each sees the whole window of its request."""
    return Seen(request, ts, seen.first[:, request], seen.last[:, request], seen.event_ts, seen.timelines)


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
        attended = self.attention(normed, *self.attention.encode(normed), window.every)
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
        short = normed.index_select(0, window.short)
        attended = self.dropout(self.attention(short, *self.attention.encode(normed), window.newest))
        return self.norm.after(attended + s_ED.index_select(0, window.short) if self.residual else attended)


Encoding = SwiGLUEncoding | TransformerEncoding | LongerEncoding
ENCODINGS: dict[str, type[SwiGLUEncoding | TransformerEncoding | LongerEncoding]] = {
    "swiglu": SwiGLUEncoding,
    "transformer": TransformerEncoding,
    "longer": LongerEncoding,
}
