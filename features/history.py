"""Features of the visible history: what a request's events say of the user, or of the user and a candidate.

They are computed from the timelines when samples are read, and when a request is asked, by this one function; so they
cost no storage and cannot differ between training and serving.

Legend: R requests, C candidates; a pair is a candidate (or a request) and an event that its request sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from features.encoding import encode_numbers, encode_value
from features.sample_table import (
    column_of,
    end_column,
    feature_column,
    list_offsets,
    sample_schema,
    timeline_column,
)
from features.schema import SECOND, Feature, History, Schema, Sequence

PAIRS = 4_000_000
"""Pairs that are looked at together; bounds memory."""


def with_history(rows: pa.Table, schema: Schema) -> pa.Table:
    """Rows of the sample table with the features of the visible history, in the place that the schema gives them.

    Args:
        rows: in the layout of :func:`features.sample_table.sample_schema` without these features; columns may be
            missing, but not the timelines that they are computed from.
    """
    if not schema.of_history:
        return rows
    rows = rows.combine_chunks()
    lists = column_of(rows, "requests")
    requests = lists.flatten()
    candidate_lists = requests.field("candidates")
    candidates = candidate_lists.flatten()
    seen = _Seen(rows, requests, list_offsets(lists), list_offsets(candidate_lists), candidates)
    of_request: dict[str, Any] = {}
    of_candidate: dict[str, Any] = {}
    for feature in schema.of_history:
        assert feature.history is not None
        column = of_request if feature.side == "user" else of_candidate
        column[feature_column(feature)] = seen.values(schema, feature, feature.history)
    layout = sample_schema(schema).field("requests").type.value_type
    inner = _with_fields(candidates, of_candidate, layout.field("candidates").type.value_type)
    of_request["candidates"] = pa.ListArray.from_arrays(pa.array(list_offsets(candidate_lists), pa.int32()), inner)
    outer = _with_fields(requests, of_request, layout)
    column = pa.ListArray.from_arrays(pa.array(list_offsets(lists), pa.int32()), outer)
    return rows.set_column(rows.schema.get_field_index("requests"), pa.field("requests", column.type), column)


def history_columns(schema: Schema) -> set[str]:
    """The timelines' columns that :func:`with_history` reads."""
    columns = set()
    for feature in schema.of_history:
        assert feature.history is not None
        sequence = next(one for one in schema.sequences if one.name == feature.history.sequence)
        read = [sequence.field(name) for name in (feature.history.field, feature.history.key) if name is not None]
        columns |= {timeline_column(sequence, field) for field in (None, *read)}
    return columns


@dataclass
class _Seen:
    """Requests and candidates of some rows, and which events they see."""

    rows: pa.Table
    requests: Any
    row_offsets: np.ndarray
    candidate_offsets: np.ndarray
    candidates: Any

    @cached_property
    def row(self) -> np.ndarray:
        """Row of each request, [R]."""
        return np.repeat(np.arange(self.rows.num_rows), np.diff(self.row_offsets))

    @cached_property
    def request(self) -> np.ndarray:
        """Request of each candidate, [C]."""
        return np.repeat(np.arange(len(self.requests)), np.diff(self.candidate_offsets))

    @cached_property
    def asked(self) -> np.ndarray:
        """Time of each request, microseconds UTC, [R]."""
        return np.asarray(self.requests.field("ts").to_numpy(zero_copy_only=False), np.int64)

    def window(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """First event that each request sees, among the events of all rows, and how many, [R] each."""
        offsets = list_offsets(column_of(self.rows, timeline_column(sequence, None)))
        end = np.asarray(self.requests.field(end_column(sequence)).to_numpy(zero_copy_only=False), np.int64)
        first = np.maximum(end - sequence.length, 0)
        return offsets[self.row] + first, end - first

    def values(self, schema: Schema, feature: Feature, history: History) -> pa.Array:
        """A feature of all requests [R] or candidates [C]."""
        sequence = next(one for one in schema.sequences if one.name == history.sequence)
        first, count = self.window(sequence)
        owner = np.arange(len(self.requests)) if feature.side == "user" else self.request
        said = _Said.of(self.rows, sequence, history)
        keys = None
        if history.key is not None:
            of_event = _codes(self.rows, sequence, history.key)
            of_candidate = self.candidates.field(feature_column(schema.keyed_by(history)))
            keys = of_event, of_candidate
        total = [np.zeros(len(owner)) for _ in range(2)]
        newest = np.full(len(owner), -1)
        for start, stop in _portions(count[owner], PAIRS):
            counts = count[owner[start:stop]]
            who = np.repeat(np.arange(start, stop), counts)
            ends = np.cumsum(counts)
            begin = np.repeat(first[owner[start:stop]] - (ends - counts), counts)
            event = np.arange(len(begin)) + begin
            if keys is not None:
                met = _meet(keys[0][event], keys[1], who, start, stop)
                who, event = who[met], event[met]
            counted = said.known[event]
            who, event = who[counted], event[counted]
            # one after the other in the order of time, so that the sums do not depend on what is computed together
            total[0][start:stop] += np.bincount(who - start, minlength=stop - start)
            total[1][start:stop] += np.bincount(who - start, said.value[event], minlength=stop - start)
            newest[who] = event  # the last one stays
        return pa.array(
            encode_numbers(feature, self._result(sequence, history, owner, total, newest)), from_pandas=True
        )

    def _result(
        self, sequence: Sequence, history: History, owner: np.ndarray, total: list[np.ndarray], newest: np.ndarray
    ) -> np.ndarray:
        count, summed = total
        if history.function == "count":
            return count
        if history.function == "age":
            ts = np.asarray(column_of(self.rows, timeline_column(sequence, None)).flatten(), np.int64)
            seconds = (self.asked[owner] - ts[newest]) / SECOND if len(ts) else np.zeros(len(owner))
            return np.where(newest < 0, np.nan, seconds)
        if history.prior is not None:
            return (summed + history.prior * history.prior_weight) / (count + history.prior_weight)
        with np.errstate(invalid="ignore"):
            return summed / np.where(count > 0, count, np.nan)


@dataclass(frozen=True)
class _Said:
    """What the events of a sequence say: whether each counts, and its value, [E] each."""

    known: np.ndarray
    value: np.ndarray

    @classmethod
    def of(cls, rows: pa.Table, sequence: Sequence, history: History) -> _Said:
        events = len(column_of(rows, timeline_column(sequence, None)).flatten())
        if history.field is None:
            return cls(np.ones(events, bool), np.ones(events))
        codes = _codes(rows, sequence, history.field)
        if history.function == "mean":
            known = np.isfinite(codes)
            return cls(known, np.where(known, codes, 0.0))
        field = sequence.field(history.field)
        wanted = np.isin(codes, [encode_value(field, value) for value in history.values or ()])
        return cls(wanted if history.function == "count" else np.ones(events, bool), wanted.astype(float))


def _codes(rows: pa.Table, sequence: Sequence, name: str) -> np.ndarray:
    """Codes of one field of all events, [E]; a number that is missing is NaN."""
    field = sequence.field(name)
    values = column_of(rows, timeline_column(sequence, field)).flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64 if field.kind == "number" else np.int64)


def _meet(of_event: np.ndarray, of_candidate: Any, who: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Whether the event of each pair has the candidate's key, or one of its keys; nobody has the unknown one."""
    if not pa.types.is_list(of_candidate.type):
        codes = np.asarray(of_candidate.to_numpy(zero_copy_only=False), np.int64)
        same: np.ndarray = (of_event == codes[who]) & (of_event != 0)
        return same
    offsets, codes = list_offsets(of_candidate), np.asarray(of_candidate.flatten(), np.int64)
    counts = np.diff(offsets)
    met = np.zeros(len(who), bool)
    for place in range(int(counts[start:stop].max(initial=0))):
        there = counts[who] > place
        met[there] |= of_event[there] == codes[offsets[who[there]] + place]
    met &= of_event != 0
    return met


def _portions(sizes: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of owners whose pairs are at most so many, or those of one."""
    ends, start = np.cumsum(sizes), 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield start, stop
        start = stop


def _with_fields(struct: Any, columns: Mapping[str, Any], layout: pa.StructType) -> Any:
    """A struct with these fields, too, in the order of a layout of which some may be missing."""
    every = {field.name: struct.field(field.name) for field in struct.type} | dict(columns)
    names = [field.name for field in layout if field.name in every]
    return pa.StructArray.from_arrays([every[name] for name in names], names)
