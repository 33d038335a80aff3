"""A batch as impression-level systems see it: every candidate with its own copy of the request and its history."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from features.batch import Items, Jagged, RequestBatch, Timeline, Users, Values
from features.schema import Schema


def take(values: Values, rows: Tensor) -> Values:
    """Rows of a field, in this order, with repeats."""
    if isinstance(values, Tensor):
        return values[rows]
    lengths = values.offsets.diff()[rows]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    inside = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], lengths)
    return Jagged(values.values[torch.repeat_interleave(values.offsets[:-1][rows], lengths) + inside], offsets)


def unshared(batch: RequestBatch, schema: Schema, chosen: Tensor | None = None) -> RequestBatch:
    """These candidates as requests of their own, each with a timeline of just what it sees: no padding, no sharing."""
    chosen = torch.arange(batch.candidates) if chosen is None else chosen.sort().values
    request = batch.items.request[chosen]
    one_each = torch.arange(len(chosen) + 1)
    timelines, ends = {}, {}
    for sequence in schema.sequences:
        packed = batch.timelines[sequence.name]
        end = batch.users.end[sequence.name][request]
        first = (end - sequence.length).clamp(min=0)
        count = end - first
        offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
        start = packed.offsets[batch.users.timeline[request]] + first
        rows = torch.arange(int(offsets[-1])) + torch.repeat_interleave(start - offsets[:-1], count)
        fields = {name: take(values, rows) for name, values in packed.fields.items()}
        timelines[sequence.name], ends[sequence.name] = Timeline(fields, packed.ts[rows], offsets), count
    user_fields = {name: take(values, request) for name, values in batch.users.fields.items()}
    item_fields = {name: take(values, chosen) for name, values in batch.items.fields.items()}
    return RequestBatch(
        timelines=timelines,
        users=Users(user_fields, one_each[:-1], ends, batch.users.ts[request]),
        items=Items(item_fields, one_each),
        labels=batch.labels[chosen],
        label_mask=batch.label_mask[chosen],
        weight=batch.weight[chosen],
        user_id=np.asarray(batch.user_id)[request.numpy()],
        request_id=np.asarray(batch.request_id)[request.numpy()],
        item_id=np.asarray(batch.item_id)[chosen.numpy()],
    )
