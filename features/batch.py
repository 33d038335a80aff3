"""RequestBatch: the one shape every model reads, and how rows of the sample table become one.

Legend: U timelines, E events, R requests, C candidates, K tasks. Everything is packed: offsets say where a
timeline's events and a request's candidates lie; padding exists only inside kernels, never as an id.
Two levels of sharing: candidates share a request, requests share a timeline (DESIGN §2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from features.encoding import embedding_rows
from features.schema import Feature, FieldSpec, Schema, Sequence, Task

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
    """What is known of a request before any candidate is.

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
        timelines={name: replace(one, fields=_compress(one.fields)) for name, one in batch.timelines.items()},
        users=replace(batch.users, fields=_compress(batch.users.fields)),
        items=replace(batch.items, fields=_compress(batch.items.fields)),
    )


def _compress(values: Mapping[str, Values]) -> dict[str, Values]:
    compressed: dict[str, Values] = {}
    for name, one in values.items():
        inner = one.values if isinstance(one, Jagged) else one
        if not isinstance(inner, Tensor) or inner.is_floating_point():  # compressed already, or a number
            compressed[name] = one
            continue
        unique, index = torch.unique(torch.cat([inner.new_zeros(1), inner]), return_inverse=True)
        ids = Ids(unique, index[1:])
        compressed[name] = Jagged(ids, one.offsets) if isinstance(one, Jagged) else ids
    return compressed


def nbytes(state: Any) -> int:
    """Bytes of the tensors in a dataclass, dict, list or tuple; memory that several tensors share counts once."""
    sizes: dict[int, int] = {}

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
        elif is_dataclass(part) and not isinstance(part, type):
            for one in fields(part):
                visit(getattr(part, one.name))
        elif isinstance(part, dict):
            visit(list(part.values()))
        elif isinstance(part, (list, tuple)):
            for one in part:
                visit(one)

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


# --- the sample table ---------------------------------------------------------------------------------


def timeline_column(sequence: Sequence, field: FieldSpec | None) -> str:
    """Column of one field (None: ts) of a sequence's timeline."""
    return f"{sequence.name}__{field.name if field is not None else 'ts'}"


def event_id_column(sequence: Sequence) -> str:
    """Column of the hashed event ids of a sequence's stored events: state table and online store, not samples."""
    return f"{sequence.name}__event_id"


def end_column(sequence: Sequence) -> str:
    """Key of the request's end offset into a sequence's timeline."""
    return f"end__{sequence.name}"


def label_column(task: Task) -> str:
    """Key of a candidate's label: 0, 1, or null while it is not known."""
    return f"label__{task.name}"


def feature_column(feature: Feature) -> str:
    """Key of a feature in a request or a candidate; the prefix keeps it apart from the text ids."""
    return f"feature__{feature.name}"


def code_type(field: FieldSpec) -> pa.DataType:
    """Arrow type of an encoded field in the sample table."""
    code = pa.float32() if field.kind == "number" else pa.int64()
    return pa.list_(code) if isinstance(field, Feature) and field.multi else code


def sample_schema(schema: Schema) -> pa.Schema:
    """Arrow schema of the sample table: one row per user and partition (DESIGN §2)."""
    candidate = pa.struct(
        [
            pa.field("item_id", pa.string()),
            pa.field("item_known", pa.bool_()),
            *[pa.field(feature_column(feature), code_type(feature)) for feature in schema.item_side],
            *[pa.field(label_column(task), pa.int8()) for task in schema.tasks],
            pa.field("weight", pa.float32()),
        ]
    )
    request = pa.struct(
        [
            pa.field("request_id", pa.string()),
            pa.field("ts", pa.int64()),
            pa.field("user_known", pa.bool_()),
            *[pa.field(end_column(sequence), pa.int32()) for sequence in schema.sequences],
            *[pa.field(feature_column(feature), code_type(feature)) for feature in schema.user_side],
            pa.field("candidates", pa.list_(candidate)),
        ]
    )
    return pa.schema(
        [
            pa.field("user_id", pa.string()),
            *[
                pa.field(timeline_column(sequence, field), pa.list_(code_type(field) if field else pa.int64()))
                for sequence in schema.sequences
                for field in (None, *sequence.fields)
            ],
            pa.field("requests", pa.list_(request)),
            pa.field("dt", pa.string()),
            pa.field("bucket", pa.string()),
        ]
    )


def between(rows: pa.Table, low: int, high: int) -> pa.Table:
    """Rows with only the requests of ``low ≤ ts < high``; rows without any are left out."""
    requests = pa.concat_arrays(rows["requests"].chunks) if rows.num_rows else None
    if requests is None:
        return rows
    flat = requests.flatten()
    inside = pc.and_(pc.greater_equal(flat.field("ts"), low), pc.less(flat.field("ts"), high))
    kept = np.concatenate([[0], np.cumsum(inside.to_numpy(zero_copy_only=False))])
    offsets = kept[_offsets(requests)]
    rows = _with_requests(rows, offsets, flat.filter(inside))
    return rows.filter(pa.array(np.diff(offsets) > 0))


def cut(rows: pa.Table, candidates: int, events: int, sequences: tuple[Sequence, ...] = ()) -> Iterator[pa.Table]:
    """Cut rows into consecutive batches within a budget of candidates and events.

    A row above the budget of candidates is split by request. A single request or timeline above the
    budget makes a batch of its own; nothing is dropped.

    Args:
        sequences: where a row is split, these lose the events that none of its requests see any more.
    """
    rows = _split_large_rows(rows.combine_chunks(), candidates, sequences)
    sums = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in _sizes(rows)]
    start = 0
    while start < rows.num_rows:
        fitting = [
            np.searchsorted(total, total[start] + budget, "right") - 1
            for total, budget in zip(sums, (candidates, events), strict=True)
        ]
        stop = max(start + 1, int(min(fitting)))
        yield rows.slice(start, stop - start)
        start = stop


def collate(rows: pa.Table, schema: Schema) -> RequestBatch:
    """Rows of the sample table as one packed batch.

    Args:
        rows: in the layout of :func:`sample_schema`; labels may be absent (serving).
    """
    rows = rows.combine_chunks()
    lists = _column(rows, "requests")
    requests = lists.flatten()
    candidate_lists = requests.field("candidates")
    candidates = candidate_lists.flatten()
    timelines = {
        sequence.name: Timeline(
            fields={
                field.name: _values(field, _column(rows, timeline_column(sequence, field)).flatten())
                for field in sequence.fields
            },
            ts=_tensor(_column(rows, timeline_column(sequence, None)).flatten(), np.int64),
            offsets=torch.from_numpy(_offsets(_column(rows, timeline_column(sequence, None)))),
        )
        for sequence in schema.sequences
    }
    users = Users(
        fields={
            feature.name: _values(feature, requests.field(feature_column(feature))) for feature in schema.user_side
        },
        timeline=torch.from_numpy(np.repeat(np.arange(rows.num_rows), np.diff(_offsets(lists)))),
        end={sequence.name: _tensor(requests.field(end_column(sequence)), np.int64) for sequence in schema.sequences},
        ts=_tensor(requests.field("ts"), np.int64),
    )
    items = Items(
        fields={
            feature.name: _values(feature, candidates.field(feature_column(feature))) for feature in schema.item_side
        },
        offsets=torch.from_numpy(_offsets(candidate_lists)),
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


def _column(rows: pa.Table, name: str) -> Any:
    column = rows[name]
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _offsets(lists: Any) -> np.ndarray:
    """Offsets of a list array from 0, whatever slice of a larger array it is."""
    offsets: np.ndarray = np.asarray(lists.offsets).astype(np.int64)
    offsets -= offsets[0]
    return offsets


def _tensor(array: Any, dtype: Any) -> Tensor:
    return torch.from_numpy(np.array(array.to_numpy(zero_copy_only=False), dtype=dtype))


def _values(field: FieldSpec, array: Any) -> Values:
    if field.kind == "number":
        return _tensor(array, np.float32)  # null becomes NaN: the model reads it as the mean
    if isinstance(field, Feature) and field.multi:
        values = torch.from_numpy(embedding_rows(field, np.array(array.flatten(), dtype=np.int64)))
        return Jagged(values, torch.from_numpy(_offsets(array)))
    return torch.from_numpy(embedding_rows(field, np.array(array, dtype=np.int64)))


def _sizes(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and events of every row."""
    if not rows.num_rows:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    lists = _column(rows, "requests")
    per_request = _offsets(lists.flatten().field("candidates"))
    candidates = np.diff(per_request[_offsets(lists)])
    events = np.zeros(rows.num_rows, np.int64)
    for name in rows.schema.names:
        if name.endswith("__ts"):
            events += np.diff(_offsets(_column(rows, name)))
    return candidates, events


def _split_large_rows(rows: pa.Table, budget: int, sequences: tuple[Sequence, ...]) -> pa.Table:
    sizes, _ = _sizes(rows)
    if not (sizes > budget).any():
        return rows
    lists = _column(rows, "requests")
    bounds, flat = _offsets(lists), lists.flatten()
    before = _offsets(flat.field("candidates"))  # candidates before each request
    origin: list[int] = []
    ends: list[int] = [0]
    for row in range(rows.num_rows):
        start, stop = int(bounds[row]), int(bounds[row + 1])
        while before[stop] - before[start] > budget and stop - start > 1:
            fits = int(np.searchsorted(before, before[start] + budget, "right")) - 1
            start = max(start + 1, min(fits, stop - 1))
            origin.append(row)
            ends.append(start)
        origin.append(row)
        ends.append(stop)
    rows = rows.take(pa.array(origin)).combine_chunks()
    rows = _with_requests(rows, np.array(ends), flat)
    for sequence in sequences:
        rows = _trim(rows, sequence)
    return rows


def _trim(rows: pa.Table, sequence: Sequence) -> pa.Table:
    """Rows, each with a request, without the events of a sequence that none of their requests see."""
    lists = _column(rows, "requests")
    bounds, requests = _offsets(lists), lists.flatten()
    end = requests.field(end_column(sequence)).to_numpy()
    first = np.minimum.reduceat(np.maximum(end - sequence.length, 0), bounds[:-1])
    counts = np.maximum.reduceat(end, bounds[:-1]) - first
    offsets = np.concatenate([[0], np.cumsum(counts)])
    for one in (None, *sequence.fields):
        name = timeline_column(sequence, one)
        column = _column(rows, name)
        kept = np.arange(offsets[-1]) + np.repeat(_offsets(column)[:-1] + first - offsets[:-1], counts)
        events = column.flatten().take(pa.array(kept))
        trimmed = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), events, type=column.type)
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), trimmed)
    shifted = pa.array(end - np.repeat(first, np.diff(bounds)), pa.int32())
    children = [shifted if part.name == end_column(sequence) else requests.field(part.name) for part in requests.type]
    return _with_requests(rows, bounds, pa.StructArray.from_arrays(children, fields=list(requests.type)))


def _with_requests(rows: pa.Table, bounds: np.ndarray, requests: Any) -> pa.Table:
    """Rows with other requests: row i has ``requests[bounds[i]:bounds[i + 1]]``."""
    field = rows.schema.field("requests")
    column = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), requests, type=field.type)
    return rows.set_column(rows.schema.get_field_index("requests"), field, column)


def concatenate(rows: list[pa.Table]) -> pa.Table:
    """Rows of several tables as one table with one chunk per column."""
    return pa.concat_tables(rows).combine_chunks()


def candidate_counts(rows: pa.Table) -> Mapping[str, int]:
    """Rows, requests, candidates and events in these rows, for the counts that every stage reports."""
    if not rows.num_rows:
        return {"rows": 0, "requests": 0, "candidates": 0, "events": 0}
    rows = rows.combine_chunks()
    candidates, events = _sizes(rows)
    return {
        "rows": rows.num_rows,
        "requests": int(_offsets(_column(rows, "requests"))[-1]),
        "candidates": int(candidates.sum()),
        "events": int(events.sum()),
    }


def request_times(rows: pa.Table) -> list[int]:
    """ts of every request in these rows, microseconds UTC."""
    return [] if not rows.num_rows else list(_column(rows, "requests").flatten().field("ts").to_pylist())
