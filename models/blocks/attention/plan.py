"""Who sees what: packed queries over packed events, grouped so that little is padded.

Shape suffixes: H heads, D head width, B queries, E events, R requests, S sequences, U timelines;
within a group of similar timelines: G timelines, Q queries, T events, each padded to the longest.

Where things lie (offsets, times) is structure and stays on the host; only values are on the model's device, so that
planning never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from features.batch import STRUCTURE

TIME_BUCKETS = 32
"""Buckets of the relative-time attention bias: ⌊log2(1 + seconds)⌋; 2³¹ seconds are 68 years."""


HIDDEN = TIME_BUCKETS
"""Stands in for the bucket where a query does not see an event."""


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

    timeline: Tensor = field(metadata=STRUCTURE)
    ts: Tensor = field(metadata=STRUCTURE)
    first: Tensor = field(metadata=STRUCTURE)
    last: Tensor = field(metadata=STRUCTURE)
    event_ts: Tensor = field(metadata=STRUCTURE)
    timelines: int = field(metadata=STRUCTURE)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Positions of the visible events, request after request, and the offsets of the requests [R + 1]."""
        counts = (self.last - self.first).T.flatten()  # request-major, the sequences of a request side by side
        starts = self.first.T.flatten()
        return positions(starts, counts), functional.pad((self.last - self.first).sum(0).cumsum(0), (1, 0))


def positions(first: Tensor, count: Tensor) -> Tensor:
    """``first … first + count − 1`` of each entry, one entry after the other."""
    ends = count.cumsum(0)
    return torch.arange(int(count.sum())) + torch.repeat_interleave(first - (ends - count), count)


@dataclass
class Group:
    """Timelines of similar size, padded together.

    Attributes:
        size: G.
        code: bucket of (request ts − event ts), or HIDDEN where a query does not see an event: [G, Q, T], or
            [G, 1, T] where all queries of a timeline belong to one request.
    """

    size: int
    code: Tensor


@dataclass
class Rows:
    """Packed rows to the padded rows of every group and back. A packed row has at most one padded place.

    Attributes:
        index: packed row of each padded one, per group [P_g]; padding repeats any row. None: one group, same rows.
        real: False at padding, per group [P_g].
        inverse: place of each packed row among the padded rows of all groups, [B].
        placed: False for packed rows without a place, [B], or None when all have one.
    """

    index: list[Tensor] | None
    real: list[Tensor]
    inverse: Tensor
    placed: Tensor | None

    def pad(self, x_HBD: Tensor) -> tuple[Tensor, ...]:
        """[H, B, D] → [H, P_g, D] per group."""
        if self.index is None:
            return (x_HBD,)
        padded: tuple[Tensor, ...] = _Pad.apply(x_HBD, self)  # type: ignore[no-untyped-call]
        return padded

    def unpad(self, padded: list[Tensor]) -> Tensor:
        """[H, P_g, D] per group → [H, B, D]; zero for rows without a place."""
        if self.index is None:
            return self._zero_unplaced(padded[0])
        packed: Tensor = _Unpad.apply(self, *padded)  # type: ignore[no-untyped-call]
        return packed

    def gather(self, padded: tuple[Tensor, ...]) -> Tensor:
        rows = padded[0] if len(padded) == 1 else torch.cat(padded, 1)
        return self._zero_unplaced(rows.index_select(1, self.inverse))

    def _zero_unplaced(self, packed: Tensor) -> Tensor:
        return packed if self.placed is None else packed.masked_fill(~self.placed[:, None], 0)

    def to(self, device: torch.device) -> Rows:
        index = None if self.index is None else [rows.to(device) for rows in self.index]
        placed = None if self.placed is None else self.placed.to(device)
        return Rows(index, [real.to(device) for real in self.real], self.inverse.to(device), placed)


class _Pad(torch.autograd.Function):
    """Rows by index. The gradient is a gather by the inverse index, where autograd would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        ctx.rows = rows
        return tuple(x.index_select(1, index) for index in rows.index or [])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.gather(gradients), None


class _Unpad(torch.autograd.Function):
    """The way back, from padded rows to packed ones; padding receives no gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, *padded: Tensor) -> Tensor:
        ctx.rows = rows
        return rows.gather(padded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.rows.placed is not None:  # a query that sees nothing gave zero, whatever its place held
            gradients = (gradients[0].masked_fill(~ctx.rows.placed[:, None], 0),)
        pairs = zip(ctx.rows.index, ctx.rows.real, strict=True)
        return None, *(gradients[0].index_select(1, index).masked_fill_(~real[:, None], 0) for index, real in pairs)


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
    if not bool((seen.last > seen.first).any()):
        return None
    S, U, R = len(seen.first), seen.timelines, len(seen.timeline)
    queries = torch.ones_like(seen.timeline) if queries is None else queries
    requests_U = torch.bincount(seen.timeline, minlength=U)
    queries_U = torch.zeros(U, dtype=torch.long).index_add_(0, seen.timeline, queries)
    sees = (seen.last > seen.first) & (queries > 0)
    # The span of a timeline: from the first to the last event that any of its queries sees, per sequence.
    far = torch.iinfo(torch.long).max
    timeline_SR = seen.timeline.expand(S, R)
    start_SU = torch.full((S, U), far).scatter_reduce_(1, timeline_SR, seen.first.where(sees, far), "amin")
    stop_SU = torch.zeros(S, U, dtype=torch.long).scatter_reduce_(1, timeline_SR, seen.last.where(sees, 0), "amax")
    span_SU = (stop_SU - start_SU).where(stop_SU > 0, 0)
    start_SU = start_SU.where(stop_SU > 0, 0)
    active = torch.nonzero((queries_U > 0) & (span_SU.sum(0) > 0)).flatten()
    if not len(active):
        return None
    first_query, first_request = queries_U.cumsum(0) - queries_U, requests_U.cumsum(0) - requests_U
    request_of_query = torch.repeat_interleave(torch.arange(R), queries)
    groups, query_rows, event_rows = [], [], []
    for members in _similar(active, queries_U, span_SU.sum(0)):
        query, query_real = _padded(first_query[members], queries_U[members])
        several = int(requests_U[members].max()) > 1
        request = request_of_query[query] if several else first_request[members, None]
        events, reals, visible = [], [], []
        for sequence in range(S):
            event, real = _padded(start_SU[sequence, members], span_SU[sequence, members])
            first, last = seen.first[sequence][request], seen.last[sequence][request]
            visible.append((event[:, None] >= first[..., None]) & (event[:, None] < last[..., None]) & real[:, None])
            events.append(event)
            reals.append(real)
        event, real = torch.cat(events, 1), torch.cat(reals, 1)
        age = age_bucket(seen.ts[request][..., None] - seen.event_ts[event][:, None])
        groups.append(Group(len(members), age.where(torch.cat(visible, -1), HIDDEN).to(device)))
        query_rows.append((query.flatten(), query_real.flatten()))
        event_rows.append((event.flatten(), real.flatten()))
    sighted = sees.any(0)[request_of_query]
    return Plan(
        groups, _rows(query_rows, len(sighted), sighted).to(device), _rows(event_rows, len(seen.event_ts)).to(device)
    )


def _similar(active: Tensor, queries_U: Tensor, span_U: Tensor) -> Iterator[Tensor]:
    """Timelines whose numbers of queries and of events fall between the same powers of two."""
    size = torch.stack([queries_U[active], span_U[active]]).double().log2().ceil().long()
    for key in torch.unique(size, dim=1).T:
        yield active[(size == key[:, None]).all(0)]


def _padded(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ``first … first + count − 1`` of each row, padded with ``first`` to the longest; and which are real."""
    step = torch.arange(int(count.max()))
    real = step < count[:, None]
    return first[:, None] + step.where(real, 0), real


def _rows(parts: list[tuple[Tensor, Tensor]], packed: int, wanted: Tensor | None = None) -> Rows:
    """Rows of these (index, real) per group; ``wanted``: packed rows that are to have a place."""
    index, real = [rows for rows, _ in parts], [are_real for _, are_real in parts]
    all_index, all_real = torch.cat(index), torch.cat(real)
    inverse = torch.zeros(packed, dtype=torch.long)
    placed = torch.zeros(packed, dtype=torch.bool)
    inverse[all_index[all_real]] = torch.nonzero(all_real).flatten()
    placed[all_index[all_real]] = True
    if wanted is not None:
        placed &= wanted
    same = len(parts) == 1 and len(all_index) == packed and bool((all_index == torch.arange(packed)).all())
    return Rows(None if same else index, real, inverse, None if bool(placed.all()) else placed)
