"""Attention of packed queries over packed events: who sees what, and the softmax (eq. 8 of MixFormer).

Shape suffixes: H heads, D head width, B queries, E events, R requests, S sequences, U timelines;
within a group of similar timelines: G timelines, Q queries, T events, each padded to the longest.

Where things lie (offsets, times) is structure and stays on the host; only values are on the model's device, so that
planning never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from features.batch import structure

TIME_BUCKETS = 32
"""Buckets of the relative-time attention bias: ⌊log2(1 + seconds)⌋; 2³¹ seconds are 68 years."""


def age_bucket(microseconds: Tensor) -> Tensor:
    """Bucket of the time between a query and an event; negative differences count as 0."""
    return ((microseconds.clamp(min=0).double() / 1e6 + 1).log2().long()).clamp_(max=TIME_BUCKETS - 1)


@dataclass
class Seen:
    """What every request sees: events ``first … last − 1`` of each sequence. All of it lies on the host.

    Attributes:
        timeline: of each request, ascending, [R].
        ts: of each request, microseconds UTC, [R].
        first, last: positions among the packed events, [S, R].
        event_ts: of the packed events, [E].
        timelines: U.
    """

    timeline: Tensor = structure()
    ts: Tensor = structure()
    first: Tensor = structure()
    last: Tensor = structure()
    event_ts: Tensor = structure()
    timelines: int = structure()

    def rows(self) -> tuple[Tensor, Tensor]:
        """Positions of the visible events, request after request, and the offsets of the requests [R + 1]."""
        counts = (self.last - self.first).T.flatten()  # request-major, the sequences of a request side by side
        starts = self.first.T.flatten()
        ends = counts.cumsum(0)
        position = torch.arange(int(counts.sum())) + torch.repeat_interleave(starts - (ends - counts), counts)
        return position, functional.pad((self.last - self.first).sum(0).cumsum(0), (1, 0))


@dataclass
class Group:
    """Timelines of similar size, padded together.

    Attributes:
        queries, events: where its padded queries [G · Q] and events [G · T] lie among those of all groups.
        size: G.
        hidden: True where a request does not see an event, [G, requests, T].
        age: bucket of (request ts − event ts), [G, requests, T].
        request: row of ``hidden`` that each query reads, [G · Q]; None: one for all, or one each.
    """

    queries: slice
    events: slice
    size: int
    hidden: Tensor
    age: Tensor
    request: Tensor | None


@dataclass
class Rows:
    """Packed rows to padded rows and back. A packed row has at most one padded place.

    Attributes:
        index: packed row of each padded one, [P]; padding repeats any row. None: they are the same rows.
        real: False at padding, [P].
        inverse: padded place of each packed row, [B].
        placed: False for packed rows without a place, [B], or None when all have one.
    """

    index: Tensor | None
    real: Tensor
    inverse: Tensor
    placed: Tensor | None

    def pad(self, x: Tensor) -> Tensor:
        """[H, B, D] → [H, P, D]."""
        if self.index is None:
            return x
        padded: Tensor = _Move.apply(x, self.index, None, self.inverse, self.placed)
        return padded

    def unpad(self, x: Tensor) -> Tensor:
        """[H, P, D] → [H, B, D]; zero for rows without a place."""
        if self.index is None:
            return x if self.placed is None else x * self.placed[:, None]
        packed: Tensor = _Move.apply(x, self.inverse, self.placed, self.index, self.real)
        return packed

    def to(self, device: torch.device) -> Rows:
        index, placed = (None if one is None else one.to(device) for one in (self.index, self.placed))
        return Rows(index, self.real.to(device), self.inverse.to(device), placed)


class _Move(torch.autograd.Function):
    """Rows by index. The gradient is a gather by the inverse index, where autograd would add row by row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, kept: Tensor | None, inverse: Tensor, inverse_kept: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inverse, inverse_kept)
        moved = x.index_select(1, index)
        return moved if kept is None else moved.mul_(kept[:, None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, kept = ctx.saved_tensors
        moved = gradients[0].index_select(1, inverse)
        return moved if kept is None else moved.mul_(kept[:, None]), None, None, None, None


@dataclass
class Plan:
    """How packed queries attend to packed events; on the model's device."""

    groups: list[Group]
    queries: Rows
    events: Rows


def plan_attention(seen: Seen, queries: Tensor | None, device: torch.device) -> Plan | None:
    """Group the timelines that have queries and visible events by size, so that little is padded.

    Args:
        queries: number of queries of each request, [R]; None: one each. Queries are ordered by request.

    Returns:
        the plan, or None when no query sees any event.
    """
    one_each = queries is None
    queries = torch.ones_like(seen.timeline) if queries is None else queries
    U = seen.timelines
    timeline_requests = torch.bincount(seen.timeline, minlength=U)
    timeline_queries = torch.zeros(U, dtype=torch.long).index_add_(0, seen.timeline, queries)
    asking = queries > 0
    visible = (seen.last > seen.first) & asking
    # The span of a timeline: from the first to the last event that any of its queries sees, per sequence.
    S = len(seen.first)
    far = torch.iinfo(torch.long).max
    timeline = seen.timeline.expand(S, -1)
    start = torch.full((S, U), far).scatter_reduce_(1, timeline, seen.first.where(visible, far), "amin")
    stop = torch.zeros(S, U, dtype=torch.long).scatter_reduce_(1, timeline, seen.last.where(visible, 0), "amax")
    span = (stop - start).where(stop > 0, 0)
    start = start.where(stop > 0, 0)
    active = torch.nonzero((timeline_queries > 0) & (span.sum(0) > 0)).flatten()
    if not len(active):
        return None
    first_query = timeline_queries.cumsum(0) - timeline_queries
    first_request = timeline_requests.cumsum(0) - timeline_requests
    request_of_query = torch.repeat_interleave(torch.arange(len(queries)), queries)
    groups, query_rows, event_rows = [], [], []
    for members in _similar(active, timeline_queries, span):
        query, query_real = _padded(first_query[members], timeline_queries[members])
        request, _ = _padded(first_request[members], timeline_requests[members])
        events, reals, sees = [], [], []
        for sequence in range(S):
            event, real = _padded(start[sequence, members], span[sequence, members], clamp=False)
            position, first, last = event[:, None], seen.first[sequence][request], seen.last[sequence][request]
            sees.append((position >= first[..., None]) & (position < last[..., None]))
            events.append(event.where(real, start[sequence, members, None].clamp(max=len(seen.event_ts) - 1)))
            reals.append(real)
        event, real = torch.cat(events, 1), torch.cat(reals, 1)
        age = age_bucket(seen.ts[request][..., None] - seen.event_ts[event][:, None])
        # One request per timeline: its row serves all queries. One query per request: row and query coincide.
        row = None
        if request.shape[1] > 1 and not one_each:
            own = request_of_query[query] - first_request[members, None]
            row = (own + torch.arange(len(members))[:, None] * request.shape[1]).flatten()
        taken = [sum(map(len, rows)) for rows in ([one for one, _ in query_rows], [one for one, _ in event_rows])]
        groups.append(
            Group(
                queries=slice(taken[0], taken[0] + query.numel()),
                events=slice(taken[1], taken[1] + event.numel()),
                size=len(members),
                hidden=~torch.cat(sees, -1).to(device),
                age=age.to(device),
                request=None if row is None else row.to(device),
            )
        )
        query_rows.append((query.flatten(), query_real.flatten()))
        event_rows.append((event.flatten(), real.flatten()))
    sighted = visible.any(0)[request_of_query]
    return Plan(
        groups, _rows(query_rows, len(sighted), sighted).to(device), _rows(event_rows, len(seen.event_ts)).to(device)
    )


def _similar(active: Tensor, queries: Tensor, span: Tensor) -> Iterator[Tensor]:
    """Timelines whose numbers of queries and of events fall between the same powers of two."""
    size = torch.stack([queries[active], span.sum(0)[active]]).double().log2().ceil().long()
    for key in torch.unique(size, dim=1).T:
        yield active[(size == key[:, None]).all(0)]


def _padded(first: Tensor, count: Tensor, clamp: bool = True) -> tuple[Tensor, Tensor]:
    """Positions ``first … first + count − 1`` of each row, padded to the longest (with ``first``), and which are real."""
    step = torch.arange(int(count.max()))
    real = step < count[:, None]
    position = first[:, None] + step
    return position.where(real, first[:, None]) if clamp else position, real


def _rows(parts: list[tuple[Tensor, Tensor]], packed: int, wanted: Tensor | None = None) -> Rows:
    index, real = (torch.cat(one) for one in zip(*parts, strict=True))
    inverse = torch.zeros(packed, dtype=torch.long)
    placed = torch.zeros(packed, dtype=torch.bool)
    inverse[index[real]] = torch.nonzero(real).flatten()
    placed[index[real]] = True
    if wanted is not None:
        placed &= wanted
    same = len(index) == packed and bool((index == torch.arange(packed)).all())
    return Rows(None if same else index, real, inverse, None if bool(placed.all()) else placed)


def attend(q_HBD: Tensor, k_HED: Tensor, v_HED: Tensor, plan: Plan | None, bias_HA: Tensor | None) -> Tensor:
    """Softmax attention of every query over what it sees; zero for a query that sees nothing (eq. 8).

    Args:
        bias_HA: relative-time bias per head and bucket of age, [H, TIME_BUCKETS], or None.

    Returns:
        [H, B, D].
    """
    if plan is None:
        return q_HBD.new_zeros(*q_HBD.shape[:2], v_HED.shape[-1])
    q_HPD, k_HPD, v_HPD = plan.queries.pad(q_HBD), plan.events.pad(k_HED), plan.events.pad(v_HED)
    outs = []
    for group in plan.groups:
        q_GHQD, k_GHTD, v_GHTD = (
            x[:, rows].unflatten(1, (group.size, -1)).transpose(0, 1)
            for x, rows in ((q_HPD, group.queries), (k_HPD, group.events), (v_HPD, group.events))
        )
        mask = _mask(group, bias_HA, q_GHQD)
        out_GHQD = functional.scaled_dot_product_attention(q_GHQD, k_GHTD, v_GHTD, attn_mask=mask)
        outs.append(out_GHQD.transpose(0, 1).flatten(1, 2))
    return plan.queries.unpad(outs[0] if len(outs) == 1 else torch.cat(outs, 1))


def _mask(group: Group, bias_HA: Tensor | None, q_GHQD: Tensor) -> Tensor:
    """What is added to the attention's logits: [G, H or 1, Q, T]."""
    G, H, Q, _ = q_GHQD.shape
    lowest = torch.finfo(q_GHQD.dtype).min
    hidden = group.hidden[:, None]
    if bias_HA is None:
        mask = torch.zeros_like(hidden, dtype=q_GHQD.dtype).masked_fill_(hidden, lowest)
    else:
        bias_HGRT = functional.embedding(group.age, bias_HA.T.to(q_GHQD.dtype)).permute(0, 3, 1, 2)
        mask = bias_HGRT.masked_fill(hidden, lowest)
    if group.request is not None:
        rows = mask.transpose(1, 2).flatten(0, 1).index_select(0, group.request)  # [G · Q, H, T]
        return rows.unflatten(0, (G, Q)).transpose(1, 2)
    return mask.expand(-1, H if bias_HA is not None else 1, Q, -1)


def attend_reference(q_HBD: Tensor, k_HED: Tensor, v_HED: Tensor, sees_BE: Tensor, bias_HBE: Tensor | None) -> Tensor:
    """What :func:`attend` computes, over all events at once; ``sees_BE`` tells what each query sees."""
    logits_HBE = q_HBD @ k_HED.transpose(1, 2) / q_HBD.shape[-1] ** 0.5
    if bias_HBE is not None:
        logits_HBE = logits_HBE + bias_HBE
    weights_HBE = logits_HBE.masked_fill(~sees_BE, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights_HBE @ v_HED
