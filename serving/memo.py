"""Remembers the user side of requests: what no candidate changes is computed once and kept for later requests.

Two levels (docs/design.md#serving): a ``TimelineState`` under the digest of its events, a ``UserState`` under that of
the events, the user's features, the context and the time of the request. A digest has 128 bits, so a hit is exact.
Where a user's timeline has lost its oldest events and got new ones since the last request, the new ones alone are
encoded and appended to what is left of its state.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from features.batch import Ids, Jagged, RequestBatch, Timeline, Values, collate
from features.sample_table import cut
from models.config import Precision
from models.protocol import RankingModel
from models.scoring import UNLIMITED
from models.selfcheck import computed_in
from models.state import TimelineState, UserState


class Sized(Protocol):
    """What a memo remembers."""

    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=Sized)
T = TypeVar("T", TimelineState, UserState)
Level = Literal["user", "timeline", "events", "none"]
"""The part of a request that was remembered: all of its user side, its timeline, some of its events, or nothing."""

DIGEST_BYTES = 16


class Memo(Generic[S]):
    """The most recently used states, in at most so many bytes; all memory that a state keeps alive counts."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self._states: OrderedDict[bytes, tuple[S, int]] = OrderedDict()
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: bytes) -> bool:
        return key in self._states

    def get(self, key: bytes) -> S | None:
        with self._changing:
            if key not in self._states:
                return None
            self._states.move_to_end(key)
            return self._states[key][0]

    def put(self, key: bytes, state: S) -> None:
        size = state.nbytes
        with self._changing:
            if key in self._states or size > self.most_bytes:
                return
            self._states[key] = state, size
            self.nbytes += size
            while self.nbytes > self.most_bytes:
                _, (_, size_of_oldest) = self._states.popitem(last=False)
                self.nbytes -= size_of_oldest

    def clear(self) -> None:
        with self._changing:
            self._states.clear()
            self.nbytes = 0


@dataclass(frozen=True)
class Ranked:
    """What a ranker gives for one request.

    Attributes:
        scores: probabilities [C, K].
        remembered: the part that was not computed anew.
        user_seconds, item_seconds: what the two sides of its whole batch took.
        memo_bytes: what the ranker remembers with this model now.
    """

    scores: np.ndarray
    remembered: Level
    user_seconds: float
    item_seconds: float
    memo_bytes: int


def in_order(parts: Sequence[Ranked]) -> Ranked:
    """What a ranker gives for a request that was scored in parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Ranked(
        np.concatenate([part.scores for part in parts]),
        parts[0].remembered,
        sum(part.user_seconds for part in parts),
        sum(part.item_seconds for part in parts),
        parts[-1].memo_bytes,
    )


@dataclass(frozen=True)
class KnownTimeline:
    """A timeline's state, and the events of every sequence as rows of integers, [E, 1 + fields], that it is of."""

    state: TimelineState
    events: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + sum(rows.nbytes for rows in self.events.values())


class MemoisedModel:
    """A model that remembers the user sides that it computed.

    Args:
        most_bytes: for both levels together, half for each. 0: nothing is remembered.
        precision: of the products.
    """

    def __init__(self, model: RankingModel, most_bytes: int, precision: Precision = "float32") -> None:
        self.model, self._precision = model, precision
        self.timelines: Memo[KnownTimeline] = Memo(most_bytes // 2)
        self.users: Memo[UserState] = Memo(most_bytes // 2)
        self._newest: dict[str, bytes] = {}  # digest of a user's last timeline

    def forget(self) -> None:
        """Whatever is remembered of anybody."""
        self.timelines.clear()
        self.users.clear()
        self._newest = {}  # another thread may read the one before

    @torch.inference_mode()
    def rank(self, rows: pa.Table, candidates: int) -> Iterator[Ranked]:
        """Score requests, each one row of the sample table's layout, merged into batches of so many candidates."""
        for part in cut(rows, candidates, UNLIMITED):
            batch = collate(part, self.model.schema)
            started = time.perf_counter()
            with computed_in(self._precision):
                states, levels = self._user_side(part, batch)
                encoded = time.perf_counter()
                logits = self.model.score(_joined(states), batch.items)
            scores = logits.float().sigmoid().cpu().numpy()
            ended = time.perf_counter()
            memo_bytes = self.users.nbytes + self.timelines.nbytes
            for request_scores, level in zip(np.split(scores, batch.items.offsets[1:-1].numpy()), levels, strict=True):
                yield Ranked(request_scores, level, encoded - started, ended - encoded, memo_bytes)

    def _user_side(self, rows: pa.Table, batch: RequestBatch) -> tuple[list[UserState], list[Level]]:
        """The state of every request, and which part of it was remembered."""
        events = [_digest_of_timeline(batch, place) for place in range(rows.num_rows)]
        whole = [_digest_of_user(batch, place, events[place]) for place in range(rows.num_rows)]
        states = {key: state for key in dict.fromkeys(whole) if (state := self.users.get(key)) is not None}
        levels: dict[bytes, Level] = {key: "user" if key in states else "none" for key in whole}
        missing = [place for key, place in _first_places(whole).items() if key not in states]
        if missing:
            encoded, known = self._timelines(rows, batch, [events[place] for place in missing], missing)
            for place in missing:
                levels[whole[place]] = known.get(events[place], "none")
            users = batch.users if len(missing) == rows.num_rows else self._part(rows, missing).users
            state = self.model.encode_users(users, encoded)
            for place, state_of_user in zip(missing, _apart(state, len(missing)), strict=True):
                states[whole[place]] = state_of_user
                self.users.put(whole[place], state_of_user)
        return [states[key] for key in whole], [levels[key] for key in whole]

    def _timelines(
        self, rows: pa.Table, batch: RequestBatch, events: Sequence[bytes], places: Sequence[int]
    ) -> tuple[TimelineState, dict[bytes, Level]]:
        """The state of these rows' timelines, in order, and the digests of those that were remembered, at least in
        part."""
        states = {key: known.state for key in events if (known := self.timelines.get(key)) is not None}
        levels: dict[bytes, Level] = dict.fromkeys(states, "timeline")
        missing = {key: places[index] for key, index in _first_places(events).items() if key not in states}
        if missing:
            names = [sequence.name for sequence in self.model.schema.sequences]
            content = {name: _rows_of(batch.timelines[name]) for name in names}
            own_events = [
                {name: content[name][_span(batch.timelines[name], place)].copy() for name in names}
                for place in missing.values()
            ]
            users = [rows["user_id"][place].as_py() for place in missing.values()]
            overlaps = [self._overlap(user, own) for user, own in zip(users, own_events, strict=True)]
            tails = _tails(batch.timelines, list(missing.values()), [kept for _, _, kept in overlaps])
            encoded = _apart(self.model.encode_timelines(tails), len(missing))
            for key, own, (earlier, skipped, _), new in zip(missing, own_events, overlaps, encoded, strict=True):
                if earlier is not None:
                    left = [torch.tensor([[skipped[one.name]] for one in stream]) for stream in self.model.streams]
                    new = earlier.since(left).append(new)
                    levels[key] = "events"
                states[key] = new
                self.timelines.put(key, KnownTimeline(new, own))
            self._newest |= dict(zip(users, missing, strict=True))
            if len(self._newest) > 2 * len(self.timelines) + 1_000:
                self._newest = {user: key for user, key in self._newest.items() if key in self.timelines}
        return _joined([states[key] for key in events]), levels

    def _overlap(
        self, user: str, own: Mapping[str, np.ndarray]
    ) -> tuple[TimelineState | None, dict[str, int], dict[str, int]]:
        """The state of the user's last timeline, how many of its first events are gone and how many others it shares
        with this one, per sequence; None where it shares none."""
        known = self.timelines.get(self._newest.get(user, b""))
        skipped, kept = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
        if known is None:
            return None, skipped, kept
        for name, rows in own.items():
            skipped[name] = _gone(known.events[name], rows)
            kept[name] = len(known.events[name]) - skipped[name]
        return (known.state if any(kept.values()) else None), skipped, kept

    def _part(self, rows: pa.Table, places: Sequence[int]) -> RequestBatch:
        return collate(rows.take(pa.array(places)), self.model.schema)


def _apart(state: T, count: int) -> list[T]:
    return [state] if count == 1 else [state.take(torch.tensor([place])) for place in range(count)]


def _joined(states: Sequence[T]) -> T:
    return states[0] if len(states) == 1 else type(states[0]).concat(states)


def _first_places(keys: Sequence[bytes]) -> dict[bytes, int]:
    """Where every key appears first, in that order."""
    first: dict[bytes, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    return first


def _span(timeline: Timeline, place: int) -> slice:
    return slice(int(timeline.offsets[place]), int(timeline.offsets[place + 1]))


def _rows_of(timeline: Timeline) -> np.ndarray:
    """Events with their fields as integers, [E, 1 + fields]: equal rows are equal bits."""
    columns = [timeline.ts, *(_plain(values) for values in timeline.fields.values())]
    return np.stack(
        [
            column.numpy().view(np.int32).astype(np.int64) if column.dtype == torch.float32 else column.numpy()
            for column in columns
        ],
        1,
    )


def _gone(before: np.ndarray, now: np.ndarray) -> int:
    """How many of the first events of ``before`` are gone, if the others are the first of ``now``; else all."""
    if len(now):
        for first in np.flatnonzero((before == now[0]).all(1)):
            left = len(before) - int(first)
            if left <= len(now) and (before[first:] == now[:left]).all():
                return int(first)
    return len(before)


def _tails(
    timelines: Mapping[str, Timeline], places: Sequence[int], kept: Sequence[Mapping[str, int]]
) -> dict[str, Timeline]:
    """The events of these timelines after the first ``kept`` of every sequence."""
    tails = {}
    for name, timeline in timelines.items():
        spans = [_span(timeline, place) for place in places]
        starts = [span.start + own[name] for span, own in zip(spans, kept, strict=True)]
        counts = torch.tensor([span.stop - start for span, start in zip(spans, starts, strict=True)])
        rows = torch.cat([torch.arange(start, span.stop) for span, start in zip(spans, starts, strict=True)])
        fields: dict[str, Values] = {field: _plain(values)[rows] for field, values in timeline.fields.items()}
        tails[name] = Timeline(fields, timeline.ts[rows], functional.pad(counts.cumsum(0), (1, 0)))
    return tails


def _digest_of_timeline(batch: RequestBatch, place: int) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, timeline in batch.timelines.items():
        first, last = int(timeline.offsets[place]), int(timeline.offsets[place + 1])
        digest.update(f"{name} {last - first} ".encode())
        digest.update(_bytes(timeline.ts[first:last]))
        _update(digest.update, timeline.fields, first, last)
    return digest.digest()


def _digest_of_user(batch: RequestBatch, place: int, events: bytes) -> bytes:
    users = batch.users
    digest = hashlib.blake2b(events, digest_size=DIGEST_BYTES)
    digest.update(_bytes(users.ts[place : place + 1]))
    for end in users.end.values():
        digest.update(_bytes(end[place : place + 1]))
    _update(digest.update, users.fields, place, place + 1)
    return digest.digest()


def _update(update: Callable[[bytes], None], fields: Mapping[str, Values], first: int, last: int) -> None:
    for name, values in fields.items():
        update(name.encode())
        if isinstance(values, Jagged):
            lengths = values.offsets[first : last + 1].diff()
            update(_bytes(lengths))
            low, high = int(values.offsets[first]), int(values.offsets[last])
            update(_bytes(_plain(values.values)[low:high]))
        else:
            update(_bytes(_plain(values)[first:last]))


def _plain(values: Any) -> Tensor:
    assert not isinstance(values, Ids), "serving compresses nothing"
    assert isinstance(values, Tensor)
    return values


def _bytes(values: Tensor) -> bytes:
    return bytes(values.contiguous().numpy().tobytes())
