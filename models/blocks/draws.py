"""Random draws that depend on the step and the row, not on which rows are computed together, by whom, or in what order.

So one step of training has the same dropout for any number of workers, and whether a request's candidates share what
they have in common or not. A draw is a hash of the seed, the number of the call within the forward pass, the row's own
key, and the place within the row.

Shape suffixes: B rows, U timelines, E events, R requests, C candidates, W words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from torch import Tensor

from features.batch import Ids, Jagged, RequestBatch, Values

GOLDEN = -7046029254386353131
"""2⁶⁴ divided by the golden ratio, as a signed integer; odd, so that multiples of it do not repeat."""


@dataclass
class RowKeys:
    """What the rows of a batch are called, however they are packed.

    Attributes:
        events: per sequence, [E]: of the user, the time and the fields.
        requests: [R]; candidates: [C].
    """

    events: Mapping[str, Tensor]
    requests: Tensor
    candidates: Tensor


@dataclass
class Draws:
    """The draws of one forward pass.

    Attributes:
        seed: of the step.
        rows: keys of the rows that are computed now, [B].
        calls: draws so far.
    """

    seed: int
    keys: RowKeys
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    calls: int = 0

    def words(self, count: int) -> Tensor:
        """Random bits for every row, [B, count]; another call gives others."""
        self.calls += 1
        number = self.seed * 1_000_003 + self.calls
        call = _mixed(torch.tensor([(number + 2**63) % 2**64 - 2**63]))  # of 64 bits, as a tensor holds them
        of_row = _mixed(self.rows ^ call.to(self.rows.device))
        place = torch.arange(1, count + 1, device=self.rows.device) * GOLDEN
        return _mixed(of_row[:, None] + place)


_CURRENT: ContextVar[Draws | None] = ContextVar("draws", default=None)


def current_draws() -> Draws | None:
    """Those of the forward pass that is computed now; None: draws come from PyTorch's generator."""
    return _CURRENT.get()


@contextmanager
def drawing(seed: int, keys: RowKeys) -> Iterator[None]:
    """Key the draws of a forward pass in the block.

    Args:
        seed: of the step; the same for all workers.
        keys: of the rows of the batch that is passed.
    """
    token = _CURRENT.set(Draws(seed, keys))
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def rows_are(keys: Tensor | None) -> Iterator[None]:
    """In the block these are the keys of the rows, in their order; None: nothing changes."""
    draws = _CURRENT.get()
    if draws is None or keys is None:
        yield
        return
    before, draws.rows = draws.rows, keys
    try:
        yield
    finally:
        draws.rows = before


def row_keys(batch: RequestBatch) -> RowKeys:
    """The keys of a batch's rows, on its device."""
    device = batch.weight.device
    users, requests, items = (_hashed(ids) for ids in (batch.user_id, batch.request_id, batch.item_id))
    timelines = batch.users.timeline
    of_timeline = torch.zeros(int(timelines.max()) + 1 if len(timelines) else 0, dtype=torch.long)
    of_timeline[timelines] = users
    events = {}
    for name, timeline in batch.timelines.items():
        counts = timeline.offsets.diff()
        key_E = _mixed(torch.repeat_interleave(_padded(of_timeline, len(counts)), counts) + timeline.ts * GOLDEN)
        key_E = key_E.to(device)
        for values in timeline.fields.values():
            key_E = _mixed(key_E ^ _integers(values))
        events[name] = key_E
    of_request = _mixed(users ^ _mixed(requests))
    of_candidate = _mixed(of_request[batch.items.request] + items * GOLDEN)
    return RowKeys(events, of_request.to(device), of_candidate.to(device))


def per_value(keys: Tensor, values: Jagged) -> Tensor:
    """Keys of the values of a multi-valued field, of which a row has several."""
    counts = values.offsets.diff().to(keys.device)
    place = torch.arange(int(counts.sum()), device=keys.device) - torch.repeat_interleave(
        values.offsets[:-1].to(keys.device), counts
    )
    return _mixed(torch.repeat_interleave(keys, counts) + place * GOLDEN)


def joined_keys(first: Tensor, second: Tensor) -> Tensor:
    """Keys of pairs of rows."""
    return _mixed(first ^ _mixed(second))


def _padded(keys: Tensor, count: int) -> Tensor:
    """Timelines that no request sees have no key of their own."""
    return torch.cat([keys, keys.new_zeros(count - len(keys))])


def _hashed(ids: np.ndarray) -> Tensor:
    """A hash of texts; all workers have the same version of Polars, on which it depends."""
    return torch.from_numpy(pl.Series(ids, dtype=pl.String).hash().to_numpy().view(np.int64).copy())


def _integers(values: Values) -> Tensor:
    if isinstance(values, Ids):
        return values.unique[values.index]
    assert isinstance(values, Tensor)  # events have no multi-valued fields
    return values.view(torch.int32).long() if values.dtype == torch.float32 else values


def _mixed(x: Tensor) -> Tensor:
    """A hash of 64 bits: equal for equal numbers, and else as good as independent (the finalizer of SplitMix64)."""
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
