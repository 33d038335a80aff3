"""Layers shared by the models.

Shape suffixes: B rows (requests or candidates), N heads, D head width, F hidden width of an FFN,
U timelines, E events, Q queries, G group of timelines, T events of a group, H heads of one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

TIME_BUCKETS = 32
"""Buckets of the relative-time attention bias: ⌊log2(1 + seconds)⌋; 2³¹ seconds are 68 years."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; ``shape`` is that of the learned scale.

    With shape (N, D) every head has its own scale and its own norm of width D.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor, heads: slice = slice(None)) -> Tensor:
        scale = self.scale[heads] if self.scale.dim() == 2 else self.scale
        return functional.rms_norm(x, x.shape[-1:]) * scale


class SwiGLU(nn.Module):
    """SwiGLU feed-forward network: W_out (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.out(functional.silu(gate) * up)
        return out


class PerHeadLinear(nn.Module):
    """A linear map of its own for every head, as one batched matmul: [B, N, in] → [B, N, out]."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs))
        nn.init.uniform_(self.weight, -(inputs**-0.5), inputs**-0.5)

    def forward(self, x_BNI: Tensor, heads: slice = slice(None)) -> Tensor:
        return torch.bmm(x_BNI.transpose(0, 1), self.weight[heads]).transpose(0, 1)


class PerHeadSwiGLU(nn.Module):
    """A SwiGLU FFN of its own for every head (eq. 4 and 9 of MixFormer)."""

    def __init__(self, heads: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = PerHeadLinear(heads, width, 2 * hidden)
        self.out = PerHeadLinear(heads, hidden, width)

    def forward(self, x_BND: Tensor, heads: slice = slice(None)) -> Tensor:
        gate_BNF, up_BNF = self.gate_up(x_BND, heads).chunk(2, dim=-1)
        out: Tensor = self.out(functional.silu(gate_BNF) * up_BNF, heads)
        return out


@dataclass
class AttentionGroup:
    """Timelines of similar size, padded together.

    Attributes:
        query: index into the queries, [G, Q]; padded entries point at any query.
        query_valid: [G, Q].
        event: index into the packed events, [G, T].
        visible: what each query sees, [G, Q, T].
        age: bucket of (request ts − event ts), [G, Q, T].
    """

    query: Tensor
    query_valid: Tensor
    event: Tensor
    visible: Tensor
    age: Tensor


@dataclass
class SequenceEvents:
    """Where the events of one sequence lie, and what the queries see of them.

    Attributes:
        offsets: of its timelines within the packed events of all sequences, [U + 1].
        end: per query, events of its timeline before it, [Q].
        length: L; a query sees ``timeline[max(0, end − L):end]``.
    """

    offsets: Tensor
    end: Tensor
    length: int


def plan_attention(
    query_timeline: Tensor, query_ts: Tensor, event_ts: Tensor, sequences: list[SequenceEvents]
) -> list[AttentionGroup]:
    """How packed queries attend to the packed events of their own timelines.

    Timelines without queries or visible events are left out; the others are grouped by the powers of four
    of their sizes, so that little is padded.

    Args:
        query_timeline, query_ts: [Q], ordered by timeline.
        event_ts: events of all sequences, one sequence after the other, [E].
    """
    device = query_timeline.device
    if not sequences or not len(query_timeline) or not len(event_ts):
        return []
    timelines = len(sequences[0].offsets) - 1
    counts = torch.bincount(query_timeline, minlength=timelines)
    first_query = counts.cumsum(0) - counts
    windows = [_visible_span(query_timeline, sequence, timelines) for sequence in sequences]
    spans = torch.stack([span for _, span in windows])
    active = torch.nonzero((counts > 0) & (spans.sum(0) > 0)).flatten()
    size = (torch.stack([counts[active], spans.sum(0)[active]]).double().log2() / 2).ceil().long()
    groups = []
    for key in torch.unique(size, dim=1).T:
        members = active[(size == key[:, None]).all(0)]
        query_step = torch.arange(int(counts[members].max()), device=device)
        query_valid = query_step < counts[members, None]
        query = first_query[members, None] + torch.where(query_valid, query_step, 0)
        events, visibles = [], []
        for sequence, (first, span) in zip(sequences, windows, strict=True):
            step = torch.arange(int(span[members].max()), device=device)
            inside = step < span[members, None]
            position = first[members, None] + torch.where(inside, step, 0)
            events.append(torch.where(inside, sequence.offsets[members, None] + position, 0))
            end, position, inside = sequence.end[query][..., None], position[:, None], inside[:, None]
            visibles.append(inside & (position < end) & (position >= end - sequence.length))
        event = torch.cat(events, dim=-1)
        seconds = (query_ts[query][..., None] - event_ts[event][:, None]).clamp(min=0).double() / 1e6
        age = (seconds + 1).log2().long().clamp(max=TIME_BUCKETS - 1)
        groups.append(AttentionGroup(query, query_valid, event, torch.cat(visibles, dim=-1), age))
    return groups


def _visible_span(query_timeline: Tensor, sequence: SequenceEvents, timelines: int) -> tuple[Tensor, Tensor]:
    """First event that any query of a timeline sees, and how many from it to the last; [U] each."""
    zeros = torch.zeros(timelines, dtype=torch.long, device=query_timeline.device)
    last = zeros.scatter_reduce(0, query_timeline, sequence.end, "amax")
    earliest = (sequence.end - sequence.length).clamp(min=0)
    first = last.scatter_reduce(0, query_timeline, earliest, "amin")
    return first, last - first


def attend(q_BHD: Tensor, k_EHD: Tensor, v_EHD: Tensor, plan: list[AttentionGroup], bias_HA: Tensor | None) -> Tensor:
    """Softmax attention of every query over what it sees; zero for a query that sees nothing (eq. 8).

    Args:
        bias_HA: relative-time bias per head and bucket of age, [H, TIME_BUCKETS], or None.

    Returns:
        [B, H, D].
    """
    out_BHD = torch.zeros_like(q_BHD)
    for group in plan:
        q = q_BHD[group.query].transpose(1, 2)  # [G, H, Q, D]
        k = k_EHD[group.event].transpose(1, 2)  # [G, H, T, D]
        v = v_EHD[group.event].transpose(1, 2)
        mask = torch.zeros_like(group.visible, dtype=q.dtype).masked_fill_(~group.visible, torch.finfo(q.dtype).min)
        mask = mask[:, None]  # [G, 1, Q, T]
        if bias_HA is not None:
            mask = mask + functional.embedding(group.age, bias_HA.T.to(q.dtype)).permute(0, 3, 1, 2)
            mask = mask.clamp(min=torch.finfo(q.dtype).min)
        z = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)  # [G, Q, H, D]
        kept = group.query_valid & group.visible.any(-1)
        out_BHD = out_BHD.index_put((group.query[kept],), z[kept])
    return out_BHD
