"""How columns of a user's own table are read: as which type, and how columns that the table lacks are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa

from features.schema import EPOCH_MONDAY, GRAIN_LENGTH, PARTITION_FORMATS, SECOND, Grain

MOMENTS = ("ts", "updated_at")
"""Columns of times: integers are taken as microseconds UTC, and timestamps and dates become them."""

INT64_DIGITS = 18
"""Whole decimals of up to so many digits fit into 64 bits; larger ones are read as text."""

WIDER = (("int8", "int16", "int32", "int64"), ("float32", "float64"))
"""Types; each can be read as any later one of its row without a loss."""

SAME_TYPES = {
    "large_string": "string",
    "string_view": "string",
    "large_binary": "binary",
    "binary_view": "binary",
    "float": "float32",
    "double": "float64",
}
"""Arrow's other names of one Delta type."""

FIELD = "\x1f"
"""Separator of the columns in a row's text; no log has it in a value."""


def read_type(name: str, kind: pa.DataType) -> pa.DataType:
    """The Arrow type that a column is read as (:func:`read`)."""
    if pa.types.is_dictionary(kind):
        return read_type(name, kind.value_type)
    if name in MOMENTS and (pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_integer(kind)):
        return pa.int64()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind):
        inner = kind.value_type
        return pa.list_(pa.string() if pa.types.is_boolean(inner) else read_type("", inner))
    if pa.types.is_date(kind):
        return pa.string()
    if pa.types.is_decimal(kind):
        if kind.scale:
            return pa.float64()
        return pa.int64() if kind.precision <= INT64_DIGITS else pa.string()
    return kind


def read(name: str, column: pl.Expr, kind: Any) -> pl.Expr:
    """A column of Polars type ``kind`` as :func:`read_type` says: a date is its ISO text, a decimal a number.

    A decimal without digits after the point is a whole number, so that it may be an id.
    """
    if name in MOMENTS and isinstance(kind, pl.Datetime):
        return column.dt.cast_time_unit("us").dt.timestamp("us")
    if name in MOMENTS and kind == pl.Date:
        return column.cast(pl.Datetime("us")).dt.timestamp("us")
    wanted = pl.Int64 if name in MOMENTS and kind.is_integer() and kind != pl.Int64 else _read_as(kind)
    return column if wanted is None else column.cast(wanted)


def _read_as(kind: Any) -> Any:
    if isinstance(kind, pl.List):
        inner = pl.String if kind.inner == pl.Boolean else _read_as(kind.inner)
        return None if inner is None else pl.List(inner)
    if isinstance(kind, pl.Categorical | pl.Enum):
        return pl.String
    if kind == pl.Date:
        return pl.String
    if isinstance(kind, pl.Decimal):
        if kind.scale:
            return pl.Float64
        return pl.Int64 if (kind.precision or 38) <= INT64_DIGITS else pl.String
    return None


def partition_column(ts: pl.Expr, grain: Grain) -> pl.Expr:
    """Name of the partition that holds ``ts`` (microseconds UTC): :func:`features.schema.partition_of` of a column."""
    length = round(GRAIN_LENGTH[grain].total_seconds()) * SECOND
    anchor = round(EPOCH_MONDAY.timestamp()) * SECOND if grain == "week" else 0
    opening = ts - (ts - anchor) % length
    return opening.cast(pl.Datetime("us")).dt.strftime(PARTITION_FORMATS[grain])


def row_text(kinds: Mapping[str, Any]) -> pl.Expr:
    """The whole row as one text, the same for equal rows in any order of columns; nulls are left out.

    Where a log has no event ids it is an event's id: a row delivered twice is one event.
    """
    parts: list[pl.Expr] = []
    for name in sorted(kinds):
        text: pl.Expr = pl.col(name).cast(pl.String)
        if isinstance(kinds[name], pl.List | pl.Struct | pl.Array):
            text = pl.when(pl.col(name).is_not_null()).then(pl.struct(name).struct.json_encode())
        parts.append(pl.lit(f"{name}=") + text)
    return pl.concat_str(parts, separator=FIELD, ignore_nulls=True)


def type_name(kind: pa.DataType) -> str:
    """Name of a type as Delta tells types apart: encodings, list layouts and time units do not count."""
    if pa.types.is_dictionary(kind):
        return type_name(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind):
        return f"list<{type_name(kind.value_type)}>"
    if pa.types.is_nested(kind):
        return "map" if pa.types.is_map(kind) else "struct"
    if pa.types.is_timestamp(kind):
        return "timestamp"
    name = str(kind)
    return SAME_TYPES.get(name, name)


def reads_as(stored: str, wanted: str) -> bool:
    """Whether values of one type (:func:`type_name`) read as another without a loss."""
    if stored in (wanted, "null"):
        return True
    if stored.startswith("list<") and wanted.startswith("list<"):
        return reads_as(stored[5:-1], wanted[5:-1])
    return any(stored in row and wanted in row[row.index(stored) :] for row in WIDER)
