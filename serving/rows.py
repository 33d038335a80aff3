"""A request as one row of the sample table, so that serving and training read the same batch.

What is not yet known at the time of the request is coded as unknown, as in the sample builder.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from features.encoding import encode_value
from features.history import with_history
from features.sample_table import column_of, end_column, feature_column, label_column, sample_schema, timeline_column
from features.schema import Schema
from features.store.reader import History, Known, OnlineReader
from serving.inline import Inline, InvalidRequestError, raw, with_inline
from serving.settings import MissingContext

NOTHING = Inline()


@dataclass(frozen=True)
class RequestRow:
    """One request, ready to be scored.

    Attributes:
        request_id: of the request.
        degraded: why nothing was read from the store; None: all was.
        rows: one row in the layout of :func:`features.sample_table.sample_schema`, without labels and partition.
        item_known: [C].
    """

    request_id: str
    rows: pa.Table
    user_known: bool
    item_known: list[bool]
    degraded: str | None = None


def build_row(
    reader: OnlineReader,
    log_delay: int,
    user_id: str,
    item_ids: list[str],
    context: Mapping[str, Any],
    ts: int,
    missing_context: MissingContext = "error",
    inline: Inline = NOTHING,
    request_id: str | None = None,
    degraded: str | None = None,
    read: Callable[[], Known] | None = None,
) -> RequestRow:
    """Read the features of a request and lay them out.

    Args:
        log_delay: microseconds; the request sees events with ``event.ts < ts − log_delay``.
        item_ids: the candidates [C].
        context: source column → value.
        ts: time of the request, microseconds UTC.
        missing_context: whether a column that the context lacks is an error or unknown.
        inline: what the request brings along in place of what is stored.
        request_id: default: a new one.
        degraded: why nothing is to be read: user and items are unknown then.
        read: reads what is known; default: from ``reader``.

    Raises:
        InvalidRequestError: the context, or what is sent along, is not what the schema declares.
    """
    schema, request_id = reader.schema, request_id or uuid.uuid4().hex
    context_codes = encode_context(schema, context, missing_context)
    if degraded is not None:
        known = reader.unknown(item_ids)
    else:
        known = read() if read is not None else reader.request(user_id, item_ids, ts)
    if inline:
        known = with_inline(schema, known, inline, user_id, item_ids)
    timelines = {
        sequence.name: visible(known.histories[sequence.name], ts - log_delay, sequence.length)
        for sequence in schema.sequences
    }
    layout = serving_schema(schema, stored=True)
    request_type = layout.field("requests").type.value_type
    candidate_type = request_type.field("candidates").type.value_type
    candidates = _struct(candidate_type, {"item_id": item_ids, **known.items})
    request = {
        "request_id": [request_id],
        "ts": [ts],
        "user_known": [known.user],
        **{end_column(sequence): [len(timelines[sequence.name].ts)] for sequence in schema.sequences},
        **{name: [code] for name, code in {**known.codes, **context_codes}.items()},
        "candidates": pa.ListArray.from_arrays(pa.array([0, len(item_ids)], pa.int32()), candidates),
    }
    columns: dict[str, Any] = {
        "user_id": [user_id],
        "requests": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), _struct(request_type, request)),
    }
    for sequence in schema.sequences:
        timeline = timelines[sequence.name]
        columns[timeline_column(sequence, None)] = [timeline.ts]
        for field in sequence.fields:
            columns[timeline_column(sequence, field)] = [timeline.fields[field.name]]
    rows = pa.table([_array(columns[field.name], field.type) for field in layout], schema=layout)
    rows = with_history(rows, schema)
    return RequestRow(request_id, rows, known.user, known.items["item_known"].tolist(), degraded)


@lru_cache(maxsize=16)
def serving_schema(schema: Schema, stored: bool = False) -> pa.Schema:
    """Layout of the sample table without the columns of training only: labels, weight and partition columns.

    Args:
        stored: without the features of the visible history.
    """
    full = sample_schema(schema, stored)
    request = full.field("requests").type.value_type
    candidate = request.field("candidates").type.value_type
    left_out = {"weight", *[label_column(task) for task in schema.tasks]}
    candidate = pa.struct([field for field in candidate if field.name not in left_out])
    request = pa.struct(
        [pa.field("candidates", pa.list_(candidate)) if field.name == "candidates" else field for field in request]
    )
    return pa.schema(
        [
            pa.field("requests", pa.list_(request)) if field.name == "requests" else field
            for field in full
            if field.name not in ("dt", "bucket")
        ]
    )


def chunks(row: pa.Table, most: int) -> Iterator[pa.Table]:
    """A request's row in parts of at most so many of its candidates, in their order."""
    requests = column_of(row, "requests")
    request = requests.flatten()
    candidates = request.field("candidates").flatten()
    if len(candidates) <= most:
        yield row
        return
    place = row.schema.get_field_index("requests")
    for start in range(0, len(candidates), most):
        part = candidates.slice(start, most)
        fields = {field.name: request.field(field.name) for field in request.type}
        fields["candidates"] = pa.ListArray.from_arrays(pa.array([0, len(part)], pa.int32()), part)
        whole = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), _struct(request.type, fields))
        yield row.set_column(place, row.schema.field(place), whole)


def visible(history: History, before: int, length: int) -> History:
    """The last ``length`` events with ``event.ts < before`` (microseconds UTC), oldest first."""
    end = int(np.searchsorted(history.ts, before, side="left"))
    seen = slice(max(0, end - length), end)
    return History(history.ts[seen], {name: values[seen] for name, values in history.fields.items()})


def encode_context(schema: Schema, context: Mapping[str, Any], missing: MissingContext = "error") -> dict[str, Any]:
    """Codes of the context features, by ``feature_column``.

    Args:
        context: source column → text, number, boolean, null or (multi-valued) a list of them; as in the log's columns
            a boolean is a number where one is read, and nulls in a list are left out.
        missing: whether a column that it lacks is an error or unknown.

    Raises:
        InvalidRequestError: a column is missing, unknown, or its value is of the wrong kind.
    """
    features = schema.side("context")
    sources = list(dict.fromkeys(feature.source for feature in features))
    for key in context:
        if key not in sources:
            raise InvalidRequestError(f"context.{key}", f"the model reads no such context; it reads {sources}")
    codes = {}
    for feature in features:
        if feature.source not in context and missing == "error":
            raise InvalidRequestError(f"context.{feature.source}", "is missing; send null if it is not known")
        codes[feature_column(feature)] = encode_value(
            feature, raw(feature, context.get(feature.source), f"context.{feature.source}")
        )
    return codes


def _struct(kind: pa.StructType, columns: Mapping[str, Any]) -> pa.StructArray:
    return pa.StructArray.from_arrays([_array(columns[field.name], field.type) for field in kind], fields=list(kind))


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    return pa.array(values, kind, from_pandas=True)  # a NaN is a missing number
