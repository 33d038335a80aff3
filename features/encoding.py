"""From raw values to codes, the same for builder, store and service.

A code is an int64: the xxh64 hash of an id's text, or the 1-based position in a closed vocabulary.
Code 0 is "unknown" and reads row 0 of the embedding table, which id dropout trains.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import xxhash

from features.schema import FieldSpec


def hash_id(value: object) -> int:
    """xxh64 (seed 0) of the UTF-8 text of an id as a signed 64-bit integer; 42 and "42" are one id."""
    unsigned = xxhash.xxh64_intdigest(str(value).encode(), seed=0)
    signed = unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned
    return signed or 1  # 0 is the unknown id


def _hash_column(text: pl.Series) -> pl.Series:
    return pl.Series(text.name, [None if value is None else hash_id(value) for value in text], pl.Int64)


def hash_ids(column: pl.Expr) -> pl.Expr:
    """:func:`hash_id` of a whole column; nulls become 0. Every distinct id is hashed once."""

    def of_series(values: pl.Series) -> pl.Series:
        text = values.cast(pl.String)
        distinct = text.unique()
        # replace_strict leaves a column without any value as text, hence the cast
        codes = text.replace_strict(distinct, _hash_column(distinct), return_dtype=pl.Int64).cast(pl.Int64)
        return codes.fill_null(0)

    return column.map_batches(of_series, return_dtype=pl.Int64)


def bucket_of(user_id: object, buckets: int) -> int:
    """Bucket of a user: the unsigned hash modulo the number of buckets."""
    return (hash_id(user_id) & (1 << 64) - 1) % buckets


def bucket_column(user_id: pl.Expr, buckets: int) -> pl.Expr:
    """:func:`bucket_of` of a whole column, as Int32."""
    return (hash_ids(user_id).reinterpret(signed=False) % buckets).cast(pl.Int32)


def encode(field: FieldSpec, column: pl.Expr) -> pl.Expr:
    """Codes (Int64) of an id or category column, Float32 (``scale``) of a number column.

    A number is finite or missing (null): NaN, infinities and what is beyond 32 bits read as missing.
    A list column (multi-valued feature) gives a list of codes: nulls inside it are left out, a null list is empty.
    """
    if field.kind == "number":
        number = column.cast(pl.Float32)
        value = column.cast(pl.Float64).log1p().cast(pl.Float32) if field.scale == "log" else number
        return pl.when(number.is_finite() & value.is_finite()).then(value)

    def codes(values: pl.Expr) -> pl.Expr:
        if field.vocabulary is None:
            return hash_ids(values)
        return values.cast(pl.String).replace_strict(
            list(field.vocabulary), range(1, len(field.vocabulary) + 1), default=0, return_dtype=pl.Int64
        )

    if getattr(field, "multi", False):

        def of_lists(values: pl.Series) -> pl.Series:
            filled = values.fill_null(pl.Series([[]], dtype=values.dtype)).list.drop_nulls()
            flat = pl.DataFrame({"value": filled.list.explode(empty_as_null=False, keep_nulls=False)})
            lengths = filled.list.len().cast(pl.Int64).to_numpy()
            encoded = flat.select(codes(pl.col("value"))).to_series().to_arrow()
            return _as_lists(values.name, encoded, lengths)

        return column.map_batches(of_lists, return_dtype=pl.List(pl.Int64))
    return codes(column).fill_null(0)


def encode_value(field: FieldSpec, value: Any) -> Any:
    """:func:`encode` of a single value without the cost of a frame: a code, a number or None, or a list of codes.

    Args:
        value: None, a text, number or boolean; of a multi-valued feature a list of them.
    """
    if field.kind == "number":
        return None if value is None else _number(field, value)
    if getattr(field, "multi", False):
        return [_code(field, element) for element in value or () if element is not None]
    return 0 if value is None else _code(field, value)


def encode_numbers(field: FieldSpec, values: np.ndarray) -> np.ndarray:
    """:func:`encode` of numbers, float64 [N] → float32 [N]; what is missing is NaN before and after."""
    scaled = np.array([log1p(value) for value in values.tolist()]) if field.scale == "log" else values
    with np.errstate(over="ignore"):
        number, value = values.astype(np.float32), scaled.astype(np.float32)
    return np.where(np.isfinite(number) & np.isfinite(value), value, np.float32(np.nan))


def log1p(value: float) -> float:
    """As Polars has it, bit for bit, also outside of the domain; NumPy's may differ in the last bit."""
    return math.log1p(value) if value > -1 else -math.inf if value == -1 else math.nan


def _number(field: FieldSpec, value: float) -> float | None:
    number = np.asarray(value, np.int64 if isinstance(value, int) else np.float64)  # of 64 bits, as columns are
    with np.errstate(over="ignore"):
        single = number.astype(np.float32)
        scaled = np.float32(log1p(float(value))) if field.scale == "log" else single
    return float(scaled) if np.isfinite(single) and np.isfinite(scaled) else None


def _code(field: FieldSpec, value: str | float) -> int:
    text = value if isinstance(value, str) else as_text(value)
    return hash_id(text) if field.vocabulary is None else _positions(field.vocabulary).get(text, 0)


def as_text(value: str | float) -> str:
    """A value as the text that a table's column gives when it is cast."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (float, np.float32)):
        return str(value)
    kind = pl.Float32 if isinstance(value, np.float32) else pl.Float64
    return str(pl.Series([value], dtype=kind).cast(pl.String)[0])


@lru_cache(maxsize=256)
def _positions(vocabulary: tuple[str, ...]) -> dict[str, int]:
    return {text: position for position, text in enumerate(vocabulary, start=1)}


def _as_lists(name: str, values: object, lengths: np.ndarray) -> pl.Series:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
    return pl.Series(name, lists, dtype=pl.List(pl.Int64))


def embedding_rows(field: FieldSpec, codes: np.ndarray) -> np.ndarray:
    """Rows of the embedding table for an int64 array of codes: 0 for unknown, else 1 … rows − 1."""
    if field.vocabulary is not None:
        return codes
    rows = codes.view(np.uint64) % np.uint64(field.buckets - 1) + np.uint64(1)
    return np.where(codes == 0, 0, rows.view(np.int64))
