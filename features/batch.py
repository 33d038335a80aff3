"""RequestBatch, the one shape that every model reads, and how rows of the sample table become a batch.

Legend: U timelines, E events, R requests, C candidates, K tasks. Everything is packed: offsets say where a
timeline's events and a request's candidates lie; padding exists only inside kernels, never as an id.
Two levels of sharing: candidates share a request, requests share a timeline (docs/design.md#the-one-shape).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from features.encoding import embedding_rows
from features.sample_table import column_of, end_column, feature_column, label_column, list_offsets, timeline_column
from features.schema import Feature, FieldSpec, Schema

T = TypeVar("T")


STRUCTURE = {"structure": True}
"""Metadata of a dataclass's field that says where things lie: it stays on the host when the values move."""


@dataclass
class Ids:
    """A compressed field: value i is embedding row ``unique[index[i]]`` (:func:`compress`, HyFormer 3.8.1).

    Attributes:
        unique: row 0, which id dropout reads, then every other row of the field, ascending, [V].
        index: int64, as long as the field.
    """

    unique: Tensor
    index: Tensor


@dataclass
class Jagged:
    """A multi-valued field: row i holds ``values[offsets[i]:offsets[i + 1]]``."""

    values: Tensor | Ids
    offsets: Tensor


Values = Tensor | Ids | Jagged
"""Embedding rows (int64) or numbers (float32), one per row; the same ids compressed; or several ids per row."""


@dataclass
class Timeline:
    """Events of one sequence, timeline after timeline, each ordered by (ts, event_id).

    Attributes:
        fields: :data:`Values`, [E].
        ts: microseconds UTC, [E].
        offsets: [U + 1].
    """

    fields: dict[str, Values]
    ts: Tensor = field(metadata=STRUCTURE)
    offsets: Tensor = field(metadata=STRUCTURE)


@dataclass
class Users:
    """What is known of requests without their candidates.

    Attributes:
        fields: user and context features, [R].
        timeline: index of the request's timeline, [R].
        end: per sequence, events of the timeline that the request sees, [R]: ``timeline[max(0, end − L):end]``.
        ts: time of the request, microseconds UTC, [R].
    """

    fields: dict[str, Values]
    timeline: Tensor = field(metadata=STRUCTURE)
    end: dict[str, Tensor] = field(metadata=STRUCTURE)
    ts: Tensor = field(metadata=STRUCTURE)


@dataclass
class Items:
    """The candidates: item features [C] and ``offsets`` [R + 1] of each request's candidates."""

    fields: dict[str, Values]
    offsets: Tensor = field(metadata=STRUCTURE)

    @property
    def request(self) -> Tensor:
        """Index of each candidate's request, [C]."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(counts)), counts)


@dataclass
class RequestBatch:
    """Requests with their timelines and candidates.

    Attributes:
        labels, label_mask: [C, K]; a masked label (not known) is 0 in ``labels``.
        weight: [C].
        user_id, request_id: [R] and item_id [C], as text, for metrics and answers.
    """

    timelines: dict[str, Timeline]
    users: Users
    items: Items
    labels: Tensor
    label_mask: Tensor
    weight: Tensor
    user_id: np.ndarray
    request_id: np.ndarray
    item_id: np.ndarray

    @property
    def requests(self) -> int:
        return len(self.users.ts)

    @property
    def candidates(self) -> int:
        return len(self.weight)

    def to(self, device: torch.device | str) -> RequestBatch:
        return move(self, device)


def compress(batch: RequestBatch) -> RequestBatch:
    """The batch with every id and category field as :class:`Ids`, for training.

    A step then looks every distinct row of a field up once, and its sparse gradient has one row per distinct id
    instead of one per occurrence. Fields are compressed one by one, so that each part of a batch stays complete.
    """
    return replace(
        batch,
        timelines={
            name: replace(timeline, fields=_compress(timeline.fields)) for name, timeline in batch.timelines.items()
        },
        users=replace(batch.users, fields=_compress(batch.users.fields)),
        items=replace(batch.items, fields=_compress(batch.items.fields)),
    )


def _compress(values: Mapping[str, Values]) -> dict[str, Values]:
    compressed: dict[str, Values] = {}
    for name, field_values in values.items():
        inner = field_values.values if isinstance(field_values, Jagged) else field_values
        if not isinstance(inner, Tensor) or inner.is_floating_point():  # it is compressed already, or holds numbers
            compressed[name] = field_values
            continue
        unique, index = torch.unique(torch.cat([inner.new_zeros(1), inner]), return_inverse=True)
        ids = Ids(unique, index[1:])
        compressed[name] = Jagged(ids, field_values.offsets) if isinstance(field_values, Jagged) else ids
    return compressed


def nbytes(state: Any) -> int:
    """Bytes of the tensors in a dataclass, dict, list or tuple; memory that several tensors share counts once."""
    sizes: dict[int, int] = {}

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
        elif is_dataclass(part) and not isinstance(part, type):
            for declared in fields(part):
                visit(getattr(part, declared.name))
        elif isinstance(part, dict):
            visit(list(part.values()))
        elif isinstance(part, (list, tuple)):
            for element in part:
                visit(element)

    visit(state)
    return sum(sizes.values())


def move(state: T, device: torch.device | str) -> T:
    """A dataclass, dict, list or tuple of tensors on another device; its structure and everything else as it is."""
    moved: Any
    if isinstance(state, Tensor):
        moved = state.to(device, non_blocking=True)
    elif is_dataclass(state) and not isinstance(state, type):
        parts = {part.name: getattr(state, part.name) for part in fields(state)}
        kept = {part.name for part in fields(state) if part.metadata.get("structure")}
        moved = type(state)(**{name: part if name in kept else move(part, device) for name, part in parts.items()})
    elif isinstance(state, dict):
        moved = {key: move(value, device) for key, value in state.items()}
    elif isinstance(state, (list, tuple)):
        moved = type(state)(move(value, device) for value in state)
    else:
        moved = state
    return moved  # type: ignore[no-any-return]


def collate(rows: pa.Table, schema: Schema) -> RequestBatch:
    """Rows of the sample table as one packed batch.

    Args:
        rows: in the layout of :func:`features.sample_table.sample_schema`; labels may be absent (serving).
    """
    rows = rows.combine_chunks()
    lists = column_of(rows, "requests")
    requests = lists.flatten()
    candidate_lists = requests.field("candidates")
    candidates = candidate_lists.flatten()
    timelines = {
        sequence.name: Timeline(
            fields={
                field.name: _values(field, column_of(rows, timeline_column(sequence, field)).flatten())
                for field in sequence.fields
            },
            ts=_tensor(column_of(rows, timeline_column(sequence, None)).flatten(), np.int64),
            offsets=torch.from_numpy(list_offsets(column_of(rows, timeline_column(sequence, None)))),
        )
        for sequence in schema.sequences
    }
    users = Users(
        fields={
            feature.name: _values(feature, requests.field(feature_column(feature))) for feature in schema.user_side
        },
        timeline=torch.from_numpy(np.repeat(np.arange(rows.num_rows), np.diff(list_offsets(lists)))),
        end={sequence.name: _tensor(requests.field(end_column(sequence)), np.int64) for sequence in schema.sequences},
        ts=_tensor(requests.field("ts"), np.int64),
    )
    items = Items(
        fields={
            feature.name: _values(feature, candidates.field(feature_column(feature))) for feature in schema.item_side
        },
        offsets=torch.from_numpy(list_offsets(candidate_lists)),
    )
    count = len(candidates)
    present = {field.name for field in candidates.type}
    labels, mask = np.zeros((count, len(schema.tasks)), np.float32), np.zeros((count, len(schema.tasks)), bool)
    for index, task in enumerate(schema.tasks):
        if label_column(task) in present:
            label = candidates.field(label_column(task))
            labels[:, index] = label.fill_null(0).to_numpy(zero_copy_only=False)
            mask[:, index] = label.is_valid().to_numpy(zero_copy_only=False)
    weight = candidates.field("weight") if "weight" in present else pa.array(np.ones(count, np.float32))
    user_id = np.asarray(rows["user_id"].to_numpy(), dtype=object)
    return RequestBatch(
        timelines=timelines,
        users=users,
        items=items,
        labels=torch.from_numpy(labels),
        label_mask=torch.from_numpy(mask),
        weight=_tensor(weight, np.float32),
        user_id=user_id[users.timeline.numpy()],
        request_id=np.asarray(requests.field("request_id").to_numpy(zero_copy_only=False), dtype=object),
        item_id=np.asarray(candidates.field("item_id").to_numpy(zero_copy_only=False), dtype=object),
    )


def _tensor(array: Any, dtype: Any) -> Tensor:
    return torch.from_numpy(np.array(array.to_numpy(zero_copy_only=False), dtype=dtype))


def _values(field: FieldSpec, array: Any) -> Values:
    if field.kind == "number":
        return _tensor(array, np.float32)  # null becomes NaN: the model reads it as the mean
    if isinstance(field, Feature) and field.multi:
        values = torch.from_numpy(embedding_rows(field, np.array(array.flatten(), dtype=np.int64)))
        return Jagged(values, torch.from_numpy(list_offsets(array)))
    return torch.from_numpy(embedding_rows(field, np.array(array, dtype=np.int64)))
