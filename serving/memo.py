"""Remembers the user side of requests: what no candidate changes is computed once and kept for later requests.

Two levels (docs/design.md#serving): a ``TimelineState`` under the digest of its events, a ``UserState`` under that of
the events, the user's features, the context and the time of the request. A digest has 128 bits, so a hit is exact.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from features.batch import Ids, Jagged, RequestBatch, Values, collate
from features.sample_table import cut
from models.protocol import RankingModel
from models.scoring import UNLIMITED
from models.state import TimelineState, UserState

S = TypeVar("S", TimelineState, UserState)
Level = Literal["user", "timeline", "none"]
"""The part of a request that was remembered: all of its user side, its timeline, or nothing."""

DIGEST_BYTES = 16


class Memo(Generic[S]):
    """The most recently used states, in at most so many bytes; all memory that a state keeps alive counts."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self._states: OrderedDict[bytes, tuple[S, int]] = OrderedDict()
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

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
    """

    scores: np.ndarray
    remembered: Level
    user_seconds: float
    item_seconds: float


class MemoisedModel:
    """A model that remembers the user sides that it computed.

    Args:
        most_bytes: for both levels together, half for each. 0: nothing is remembered.
    """

    def __init__(self, model: RankingModel, most_bytes: int) -> None:
        self.model = model
        self.timelines: Memo[TimelineState] = Memo(most_bytes // 2)
        self.users: Memo[UserState] = Memo(most_bytes // 2)

    def forget(self) -> None:
        """Whatever is remembered of anybody."""
        self.timelines.clear()
        self.users.clear()

    @torch.inference_mode()
    def rank(self, rows: pa.Table, candidates: int) -> Iterator[Ranked]:
        """Score requests, each one row of the sample table's layout, merged into batches of so many candidates."""
        for part in cut(rows, candidates, UNLIMITED):
            batch = collate(part, self.model.schema)
            started = time.perf_counter()
            states, levels = self._user_side(part, batch)
            encoded = time.perf_counter()
            logits = self.model.score(_joined(states), batch.items)
            scores = logits.float().sigmoid().cpu().numpy()
            ended = time.perf_counter()
            for request_scores, level in zip(np.split(scores, batch.items.offsets[1:-1].numpy()), levels, strict=True):
                yield Ranked(request_scores, level, encoded - started, ended - encoded)

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
                if events[place] in known:
                    levels[whole[place]] = "timeline"
            users = batch.users if len(missing) == rows.num_rows else self._part(rows, missing).users
            state = self.model.encode_users(users, encoded)
            for place, state_of_user in zip(missing, _apart(state, len(missing)), strict=True):
                states[whole[place]] = state_of_user
                self.users.put(whole[place], state_of_user)
        return [states[key] for key in whole], [levels[key] for key in whole]

    def _timelines(
        self, rows: pa.Table, batch: RequestBatch, events: Sequence[bytes], places: Sequence[int]
    ) -> tuple[TimelineState, set[bytes]]:
        """The state of these rows' timelines, in order, and the digests of those that were remembered."""
        states = {key: state for key in events if (state := self.timelines.get(key)) is not None}
        known = set(states)
        missing = {key: places[index] for key, index in _first_places(events).items() if key not in known}
        if missing:
            new = list(missing.values())
            part = batch if len(new) == rows.num_rows else self._part(rows, new)
            state = self.model.encode_timelines(part.timelines)
            for key, timeline_state in zip(missing, _apart(state, len(new)), strict=True):
                states[key] = timeline_state
                self.timelines.put(key, timeline_state)
        return _joined([states[key] for key in events]), known

    def _part(self, rows: pa.Table, places: Sequence[int]) -> RequestBatch:
        return collate(rows.take(pa.array(places)), self.model.schema)


def _apart(state: S, count: int) -> list[S]:
    return [state] if count == 1 else [state.take(torch.tensor([place])) for place in range(count)]


def _joined(states: Sequence[S]) -> S:
    return states[0] if len(states) == 1 else type(states[0]).concat(states)


def _first_places(keys: Sequence[bytes]) -> dict[bytes, int]:
    """Where every key appears first, in that order."""
    first: dict[bytes, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    return first


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
