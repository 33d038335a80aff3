"""The states that the first two calls hand on, with ``append``, ``take``, ``concat`` and ``nbytes``.

A state is a dataclass of tensors, so that ``features.batch.move`` takes it to a device. ``take`` and
``concat`` copy: their result does not keep the memory of its source alive.

Shape suffixes: U timelines, E events, S sequences, R requests.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from features.batch import STRUCTURE, Users, nbytes
from features.schema import Sequence
from models.blocks.attention import Seen, positions


def compact(x: Tensor) -> Tensor:
    """x for a state to keep: a copy where x is a view of more memory, so that the rest is not kept alive.

    In training nothing is kept for later requests, and x stays the view that it is.
    """
    return x if x.requires_grad or x.untyped_storage().nbytes() == x.nbytes else x.clone()


@dataclass
class EncodedEvents:
    """What a model keeps of the events of some sequences, one sequence after the other.

    Attributes:
        layers: per layer the tensors kept, [..., E, width] each.
        ts: microseconds UTC, [E].
        offsets: where each sequence's timelines begin and end among the events, [S, U + 1].
    """

    layers: list[tuple[Tensor, ...]]
    ts: Tensor = field(metadata=STRUCTURE)
    offsets: Tensor = field(metadata=STRUCTURE)

    @property
    def timelines(self) -> int:
        """U."""
        return self.offsets.shape[1] - 1

    def starts(self, timeline: Tensor) -> Tensor:
        """Where the events of these timelines begin, [S, len(timeline)]; timeline U begins where all events end."""
        return self.offsets[:, timeline] if len(self.offsets) else self.offsets.new_zeros(0, len(timeline))

    def append(self, later: EncodedEvents) -> EncodedEvents:
        """The state of the timelines with later events at their ends; the same as when it is computed whole."""
        counts = torch.stack([self.offsets.diff(), later.offsets.diff()])  # [2, S, U]
        timeline = torch.arange(counts[0].numel())
        of_event = torch.cat([torch.repeat_interleave(timeline, counts_SU.flatten()) for counts_SU in counts])
        order = of_event.argsort(stable=True)
        joined: dict[tuple[int, int], Tensor] = {}
        for pairs in zip(self.layers, later.layers, strict=True):
            for pair in zip(*pairs, strict=True):
                if (id(pair[0]), id(pair[1])) not in joined:  # what layers share stays shared
                    whole = torch.cat(pair, -2)
                    joined[id(pair[0]), id(pair[1])] = whole.index_select(-2, order.to(whole.device))
        layers = [
            tuple(joined[id(old), id(new)] for old, new in zip(*pairs, strict=True))
            for pairs in zip(self.layers, later.layers, strict=True)
        ]
        return EncodedEvents(layers, torch.cat([self.ts, later.ts])[order], offsets_of(counts.sum(0)))

    def since(self, skipped: Tensor) -> EncodedEvents:
        """The state of the timelines without so many events at their beginnings, [S, U]."""
        counts = self.offsets.diff() - skipped
        rows = positions((self.offsets[:, :-1] + skipped).flatten(), counts.flatten())
        return EncodedEvents(self._rows(rows), self.ts[rows], offsets_of(counts))

    def take(self, timelines: Tensor) -> EncodedEvents:
        """The state of these timelines, in this order, with repeats."""
        first, last = self.starts(timelines), self.starts(timelines + 1)
        rows = positions(first.flatten(), (last - first).flatten())
        return EncodedEvents(self._rows(rows), self.ts[rows], offsets_of(last - first))

    def _rows(self, rows: Tensor) -> list[tuple[Tensor, ...]]:
        """These events of every layer; what layers share stays shared."""
        taken: dict[int, Tensor] = {}
        for tensor in (tensor for layer in self.layers for tensor in layer):
            if id(tensor) not in taken:
                taken[id(tensor)] = tensor.index_select(-2, rows.to(tensor.device))
        return [tuple(taken[id(tensor)] for tensor in layer) for layer in self.layers]

    @classmethod
    def concat(cls, states: Several[EncodedEvents]) -> EncodedEvents:
        """The state of the timelines of all these states, one state after the other."""
        spans = [
            (index, slice(int(ends[0]), int(ends[-1])))
            for ends_of_sequence in zip(*(state.offsets for state in states), strict=True)
            for index, ends in enumerate(ends_of_sequence)
        ]

        def joined(tensors: Several[Tensor]) -> Tensor:
            return torch.cat([tensors[index][..., span, :] for index, span in spans] or list(tensors), -2)

        layers = [
            tuple(joined(kind) for kind in zip(*layer, strict=True))
            for layer in zip(*(state.layers for state in states), strict=True)
        ]
        ts = joined([state.ts[:, None] for state in states])[:, 0]
        return EncodedEvents(layers, ts, offsets_of(torch.cat([state.offsets.diff() for state in states], 1)))

    def seen(self, sequences: tuple[Sequence, ...], users: Users) -> SeenEvents:
        """These events with what each request sees of them: ``timeline[max(0, end − L):end]`` of every sequence."""
        ends = [users.end[sequence.name] for sequence in sequences]
        end = torch.stack(ends) if ends else users.ts.new_zeros(0, len(users.ts))
        length = torch.tensor([sequence.length for sequence in sequences], dtype=torch.long)
        start, first = self.starts(users.timeline), (end - length[:, None]).clamp(min=0)
        seen = Seen(users.timeline, users.ts, start + first, start + end, self.ts, self.timelines)
        return SeenEvents(self, seen)


@dataclass
class SeenEvents:
    """Encoded events, and which of them each request sees; what the queries of a request attend to."""

    events: EncodedEvents
    seen: Seen

    def take(self, requests: Tensor) -> SeenEvents:
        """What these requests see, in this order, with repeats, and the events of their timelines alone."""
        before = self.seen.timeline[requests]
        taken, timeline = torch.unique_consecutive(before, return_inverse=True)  # requests lie by timeline
        events = self.events.take(taken)
        shift = events.starts(timeline) - self.events.starts(before)
        first, last = self.seen.first[:, requests] + shift, self.seen.last[:, requests] + shift
        return SeenEvents(events, Seen(timeline, self.seen.ts[requests], first, last, events.ts, events.timelines))

    @classmethod
    def concat(cls, states: Several[SeenEvents]) -> SeenEvents:
        """What the requests of all these states see, one state after the other."""
        events, timelines, parts = EncodedEvents.concat([state.events for state in states]), 0, []
        for state in states:
            timeline = state.seen.timeline + timelines
            shift = events.starts(timeline) - state.events.starts(state.seen.timeline)
            parts.append((timeline, state.seen.ts, state.seen.first + shift, state.seen.last + shift))
            timelines += state.events.timelines
        timeline, ts, first, last = (torch.cat(kind, -1) for kind in zip(*parts, strict=True))
        return SeenEvents(events, Seen(timeline, ts, first, last, events.ts, events.timelines))


@dataclass
class TimelineState:
    """What depends on nothing but the events, shared by all requests of a timeline.

    Attributes:
        events: one entry for every group of sequences that is encoded together.
    """

    events: list[EncodedEvents]

    @property
    def nbytes(self) -> int:
        """Bytes of all memory that this state keeps alive; what its tensors share counts once."""
        return nbytes(self)

    def append(self, later: TimelineState) -> TimelineState:
        """The state with later events, encoded on their own, at the ends of the same timelines."""
        return TimelineState([old.append(new) for old, new in zip(self.events, later.events, strict=True)])

    def since(self, skipped: Several[Tensor]) -> TimelineState:
        """The state without so many events at the beginnings of the timelines, [S, U] per entry of ``events``."""
        return TimelineState([events.since(of_entry) for events, of_entry in zip(self.events, skipped, strict=True)])

    def take(self, timelines: Tensor) -> TimelineState:
        """The state of these timelines, in this order, with repeats."""
        return TimelineState([events.take(timelines) for events in self.events])

    @classmethod
    def concat(cls, states: Several[TimelineState]) -> TimelineState:
        """The state of the timelines of all these states, one state after the other."""
        return TimelineState(
            [EncodedEvents.concat(parts) for parts in zip(*(state.events for state in states), strict=True)]
        )


def requests_along(axis: int) -> dict[str, int]:
    """Metadata of a :class:`UserState`'s field: along which axis of its tensor or tensors requests lie."""
    return {"requests": axis}


@dataclass
class UserState:
    """What no candidate can change. A model derives a class of its own, each field of which is a tensor, or a list or
    mapping of tensors, and has :func:`requests_along` as its metadata.

    Attributes:
        streams: what the queries of each stream attend to.
    """

    streams: list[SeenEvents]

    @property
    def nbytes(self) -> int:
        """Bytes of all memory that this state keeps alive, its timelines' included."""
        return nbytes(self)

    def take(self, requests: Tensor) -> Self:
        """The state of these requests, in this order, with repeats; it keeps their timelines alone."""
        return type(self)(
            *(_take(getattr(self, declared.name), requests, _axis(declared)) for declared in fields(self))
        )

    @classmethod
    def concat(cls, states: Several[Self]) -> Self:
        """The state of the requests of all these states, one state after the other."""
        return cls(
            *(_concat([getattr(state, declared.name) for state in states], _axis(declared)) for declared in fields(cls))
        )


def _axis(declared: Any) -> int:
    return int(declared.metadata.get("requests", 0))


def _take(part: Any, requests: Tensor, axis: int) -> Any:
    if isinstance(part, Tensor):
        return part.index_select(axis, requests.to(part.device))
    if isinstance(part, list):
        return [_take(inner, requests, axis) for inner in part]
    if isinstance(part, dict):
        return {name: _take(inner, requests, axis) for name, inner in part.items()}
    return None if part is None else part.take(requests)


def _concat(parts: list[Any], axis: int) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts, axis)
    if isinstance(first, list):
        return [_concat(list(same), axis) for same in zip(*parts, strict=True)]
    if isinstance(first, dict):
        return {name: _concat([part[name] for part in parts], axis) for name in first}
    return None if first is None else type(first).concat(parts)


def offsets_of(counts_SU: Tensor) -> Tensor:
    """Offsets [S, U + 1] among all events from the number of events per timeline."""
    S, U = counts_SU.shape
    ends = functional.pad(counts_SU.flatten().cumsum(0), (1, 0))
    return ends[torch.arange(S)[:, None] * U + torch.arange(U + 1)]
