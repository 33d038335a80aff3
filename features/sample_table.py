"""The sample table: the names of its columns, its Arrow layout, and how its rows are cut and joined.

One row per user and partition: timelines once, requests with candidates inside (docs/design.md#the-one-shape).
Nothing here needs torch, so that a build worker does not load it; :mod:`features.batch` makes tensors of these rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from features.schema import Feature, FieldSpec, Schema, Sequence, Task


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


def sample_schema(schema: Schema, stored: bool = False) -> pa.Schema:
    """Arrow schema of the sample table: one row per user and partition (docs/design.md#the-one-shape).

    Args:
        stored: as it is stored, without what is computed when it is read (:mod:`features.history`).
    """
    user_side, item_side = (
        (schema.stored_user_side, schema.stored_item_side) if stored else (schema.user_side, schema.item_side)
    )
    candidate = pa.struct(
        [
            pa.field("item_id", pa.string()),
            pa.field("item_known", pa.bool_()),
            *[pa.field(feature_column(feature), code_type(feature)) for feature in item_side],
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
            *[pa.field(feature_column(feature), code_type(feature)) for feature in user_side],
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
    if not rows.num_rows:
        return rows
    ts = column_of(rows, "requests").flatten().field("ts")
    return _kept(rows, pc.and_(pc.greater_equal(ts, low), pc.less(ts, high)))


def sampled_before(rows: pa.Table, moment: int, share: float, seed: int) -> pa.Table:
    """Rows with all requests from a moment on, and about this share of those before it; the same for the same seed."""
    if not rows.num_rows:
        return rows
    requests = column_of(rows, "requests").flatten()
    ids = requests.field("request_id").to_pylist()
    drawn = np.fromiter(
        (xxhash.xxh64_intdigest(str(identifier).encode(), seed=seed) for identifier in ids), np.uint64, len(ids)
    )
    is_new = pc.greater_equal(requests.field("ts"), moment)
    return _kept(rows, pc.or_(is_new, pa.array(drawn < share * 2.0**64)))


def fewer_negatives(rows: pa.Table, tasks: tuple[Task, ...], share: float, seed: int) -> pa.Table:
    """Rows with about this share of the candidates of which a label is known and none is positive.

    The draw is the same for the same seed. Those that are left weigh as much more, so that the expected loss, and with
    it calibration, stays what it was.

    Requests and rows of which no candidate is left are left out.
    """
    if not rows.num_rows or share >= 1:
        return rows
    lists = column_of(rows, "requests")
    requests = lists.flatten()
    candidate_lists = requests.field("candidates")
    candidates, offsets = candidate_lists.flatten(), list_offsets(candidate_lists)
    labels = [candidates.field(label_column(task)) for task in tasks]
    known = np.any([label.is_valid().to_numpy(zero_copy_only=False) for label in labels], axis=0)
    positive = np.any([label.fill_null(0).to_numpy(zero_copy_only=False) > 0 for label in labels], axis=0)
    of_request = pa.array(np.repeat(np.arange(len(requests)), np.diff(offsets)))
    names = pc.binary_join_element_wise(requests.field("request_id").take(of_request), candidates.field("item_id"), " ")
    drawn = pl.Series(names).hash(seed).to_numpy() < share * 2.0**64
    negative = known & ~positive
    kept = ~negative | drawn
    weight = candidates.field("weight").to_numpy(zero_copy_only=False)
    columns = {field.name: candidates.field(field.name) for field in candidates.type}
    columns["weight"] = pa.array(np.where(negative, weight / share, weight), pa.float32())
    fields = list(candidates.type)
    left = pa.StructArray.from_arrays([columns[field.name] for field in fields], fields=fields).filter(pa.array(kept))
    ends = np.concatenate([[0], np.cumsum(kept)])[offsets]
    parts = {field.name: requests.field(field.name) for field in requests.type}
    parts["candidates"] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), left, type=candidate_lists.type)
    whole = pa.StructArray.from_arrays([parts[field.name] for field in requests.type], fields=list(requests.type))
    return _kept(_with_requests(rows, list_offsets(lists), whole), pa.array(np.diff(ends) > 0))


def _kept(rows: pa.Table, wanted: Any) -> pa.Table:
    """Rows with only the wanted requests of all, without rows that have none."""
    lists = column_of(rows, "requests")
    kept = np.concatenate([[0], np.cumsum(wanted.to_numpy(zero_copy_only=False))])
    offsets = kept[list_offsets(lists)]
    rows = _with_requests(rows, offsets, lists.flatten().filter(wanted))
    return rows.filter(pa.array(np.diff(offsets) > 0))


def cut(rows: pa.Table, candidates: int, events: int, sequences: tuple[Sequence, ...] = ()) -> Iterator[pa.Table]:
    """Cut rows into consecutive batches within a budget of candidates and events.

    A row above the budget of candidates is split by request. A single request or timeline above the
    budget makes a batch of its own; nothing is dropped.

    Args:
        sequences: where a row is split, the parts keep only those events of these sequences that their requests see.
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


def column_of(rows: pa.Table, name: str) -> Any:
    column = rows[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # of no rows there is no chunk


def list_offsets(lists: Any) -> np.ndarray:
    """Offsets of a list array from 0, whatever slice of a larger array it is."""
    offsets: np.ndarray = np.asarray(lists.offsets).astype(np.int64)
    offsets -= offsets[0]
    return offsets


def _sizes(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and events of every row."""
    if not rows.num_rows:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    lists = column_of(rows, "requests")
    per_request = list_offsets(lists.flatten().field("candidates"))
    candidates = np.diff(per_request[list_offsets(lists)])
    events = np.zeros(rows.num_rows, np.int64)
    for name in rows.schema.names:
        if name.endswith("__ts"):
            events += np.diff(list_offsets(column_of(rows, name)))
    return candidates, events


def _split_large_rows(rows: pa.Table, budget: int, sequences: tuple[Sequence, ...]) -> pa.Table:
    sizes, _ = _sizes(rows)
    if not (sizes > budget).any():
        return rows
    lists = column_of(rows, "requests")
    bounds, flat = list_offsets(lists), lists.flatten()
    before = list_offsets(flat.field("candidates"))  # candidates before each request
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
    lists = column_of(rows, "requests")
    bounds, requests = list_offsets(lists), lists.flatten()
    end = requests.field(end_column(sequence)).to_numpy()
    first = np.minimum.reduceat(np.maximum(end - sequence.length, 0), bounds[:-1])
    counts = np.maximum.reduceat(end, bounds[:-1]) - first
    offsets = np.concatenate([[0], np.cumsum(counts)])
    for field in (None, *sequence.fields):
        name = timeline_column(sequence, field)
        column = column_of(rows, name)
        kept = np.arange(offsets[-1]) + np.repeat(list_offsets(column)[:-1] + first - offsets[:-1], counts)
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
        "requests": int(list_offsets(column_of(rows, "requests"))[-1]),
        "candidates": int(candidates.sum()),
        "events": int(events.sum()),
    }


def request_times(rows: pa.Table) -> list[int]:
    """ts of every request in these rows, microseconds UTC."""
    return [] if not rows.num_rows else list(column_of(rows, "requests").flatten().field("ts").to_pylist())
