"""A value alone is coded as a column of it is: the service codes values, the sample builder columns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.builder.aggregates import aggregate_value, aggregate_values
from features.encoding import as_text, encode, encode_numbers, encode_value
from features.schema import Aggregate, Feature

WHOLE = st.integers(-(2**63), 2**63 - 1)
REAL = st.floats(width=64)
VOCABULARY = ("a", "true", "7", "", "ä", "NULL")
KINDS: dict[Any, st.SearchStrategy[Any]] = {
    pl.String: st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(VOCABULARY),
    pl.Int64: WHOLE,
    pl.Boolean: st.booleans(),
}


def same(one: Any, other: Any) -> bool:
    return bool(one == other and type(one) is type(other))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(data=st.data())
def test_an_id_or_category_alone_is_coded_as_in_a_column(kind: Any, data: st.DataObject) -> None:
    value = data.draw(st.none() | KINDS[kind])
    several = data.draw(st.none() | st.lists(st.none() | KINDS[kind], max_size=4))
    for field in (
        Feature(name="x", side="item"),
        Feature(name="x", side="item", kind="category", vocabulary=VOCABULARY),
    ):
        (column,) = pl.DataFrame({"x": [value]}, schema={"x": kind}).select(encode(field, pl.col("x")))
        assert same(encode_value(field, value), column[0])
        multi = field.model_copy(update={"multi": True})
        (lists,) = pl.DataFrame({"x": [several]}, schema={"x": pl.List(kind)}).select(encode(multi, pl.col("x")))
        assert encode_value(multi, several) == lists.to_list()[0]


@pytest.mark.parametrize("scale", [None, "log"])
@given(whole=WHOLE, real=st.none() | REAL, logical=st.booleans())
def test_a_number_alone_is_coded_as_in_a_column(scale: Any, whole: int, real: float | None, logical: bool) -> None:
    field = Feature(name="x", side="item", kind="number", **({"scale": scale} if scale else {}))
    for value, kind in ((whole, pl.Int64), (real, pl.Float64), (logical, pl.Boolean), (-1.0, pl.Float64)):
        (column,) = pl.DataFrame({"x": [value]}, schema={"x": kind}).select(encode(field, pl.col("x")))
        assert column.dtype == pl.Float32
        assert same(encode_value(field, value), column[0]), (value, kind)
    (column,) = pl.DataFrame({"x": [real]}, schema={"x": pl.Float64}).select(encode(field, pl.col("x")))
    (coded,) = encode_numbers(field, np.array([math.nan if real is None else real]))
    assert (math.isnan(coded) and column[0] is None) or same(float(coded), column[0])


@given(value=REAL | st.booleans())
def test_a_number_is_the_text_that_a_column_gives(value: float) -> None:
    assert as_text(value) == pl.Series([value]).cast(pl.String)[0]
    if isinstance(value, float):
        with np.errstate(over="ignore"):
            single = np.float32(value)
        assert as_text(single) == pl.Series([single], dtype=pl.Float32).cast(pl.String)[0]


@pytest.mark.parametrize("scale", [None, "log"])
@pytest.mark.parametrize(
    "aggregate",
    [
        {},
        {"function": "sum", "column": "x"},
        {"function": "mean", "column": "x"},
        {"function": "rate", "column": "x", "prior": 0.1, "prior_weight": 7.3},
    ],
    ids=str,
)
@given(count=st.integers(0, 2**53), total=REAL)
def test_an_aggregate_is_made_of_arrays_as_of_columns(
    aggregate: dict[str, Any], scale: Any, count: int, total: float
) -> None:
    more = {"scale": scale} if scale else {}
    feature = Feature(name="f", side="item", kind="number", aggregate=Aggregate(of="events", **aggregate), **more)
    frame = pl.DataFrame({"count": [count, 0], "total": [total, 0.0]})
    (column,) = frame.select(aggregate_value(feature, pl.col("count"), pl.col("total")))
    values = aggregate_values(feature, frame["count"].to_numpy(), frame["total"].to_numpy())
    assert [None if math.isnan(value) else value for value in values.tolist()] == column.to_list()
