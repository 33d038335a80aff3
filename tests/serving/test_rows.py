"""Request rows: what the online store knows of a request, in the layout of the sample table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from features.batch import collate
from features.encoding import hash_id
from features.sample_table import concatenate, feature_column, sample_schema
from features.schema import Feature
from features.store.reader import History, OnlineReader
from serving.inline import InvalidRequestError
from serving.rows import build_row, encode_context, serving_schema, visible
from serving.settings import ServingSettings
from tests.serving.worlds import CONTEXT, NOW, SCHEMA


def test_row_has_the_layout_of_the_sample_table(settings: ServingSettings) -> None:
    row = build_row(OnlineReader(settings.store), 2, "7", ["2", "9", "1"], CONTEXT, NOW)
    assert row.rows.schema == serving_schema(SCHEMA)
    full = {field.name: field.type for field in sample_schema(SCHEMA)}
    assert full["clicks__ts"] == row.rows.schema.field("clicks__ts").type
    assert row.user_known
    assert row.item_known == [True, False, True]
    (values,) = row.rows.to_pylist()
    (request,) = values["requests"]
    assert values["clicks__ts"] == [105, 106, 107, 108, 109]
    assert request["end__clicks"] == 5
    assert values["clicks__item"] == [hash_id(one) for one in values["clicks__ts"]]
    assert (values["user_id"], request["ts"], request["user_known"]) == ("7", NOW, True)
    assert request["feature__user_id"] == hash_id(7)
    assert request["feature__tags"] == [hash_id("a"), hash_id("b")]
    assert request["feature__modes"] == [hash_id("dark"), hash_id(7)]
    assert request["feature__hour"] == 3.0
    assert request["candidates"] == [
        {"item_id": "2", "item_known": True, "feature__item_id": hash_id(2), "feature__price": None},
        {"item_id": "9", "item_known": False, "feature__item_id": 0, "feature__price": None},
        {"item_id": "1", "item_known": True, "feature__item_id": hash_id(1), "feature__price": 1.0},
    ]
    batch = collate(concatenate([row.rows, row.rows]), SCHEMA)
    assert (batch.requests, batch.candidates) == (2, 6)


def test_only_events_before_the_delay_are_visible() -> None:
    history = History(np.array([1, 2, 2, 3, 4]), {"item": np.arange(5)})
    assert visible(history, 3, 10).fields["item"].tolist() == [0, 1, 2]  # a tie is not visible
    assert visible(history, 9, 2).ts.tolist() == [3, 4]
    assert visible(history, 1, 2).ts.tolist() == []


def test_unknown_by_the_time_of_the_request_reads_as_unknown(settings: ServingSettings) -> None:
    row = build_row(OnlineReader(settings.store), 0, "8", ["3"], CONTEXT, 2 * NOW - 1)
    assert not row.user_known
    assert row.item_known == [False]
    (request,) = row.rows.to_pylist()[0]["requests"]
    assert request["feature__user_id"] == 0
    assert request["feature__tags"] == []
    assert build_row(OnlineReader(settings.store), 0, "8", ["3"], CONTEXT, 2 * NOW).item_known == [True]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"device": ["ios"]}, "context.device"),
        ({"hour": "3"}, "context.hour"),
        ({"hour": 1e300}, "context.hour"),
        ({"modes": "dark"}, "context.modes"),
        ({"modes": ["dark", {}]}, "context.modes.1"),
        ({"other": 1}, "context.other"),
    ],
)
def test_context_of_the_wrong_kind_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        encode_context(SCHEMA, CONTEXT | change)
    assert caught.value.field == field


def test_context_codes() -> None:
    codes = encode_context(SCHEMA, {"device": 42, "hour": None, "modes": None})
    names = [feature_column(feature) for feature in SCHEMA.side("context")]
    assert codes == dict(zip(names, [hash_id("42"), None, []], strict=True))
    as_columns = encode_context(SCHEMA, {"device": True, "hour": True, "modes": ["dark", None]})
    assert as_columns == dict(zip(names, [hash_id("true"), 1.0, [hash_id("dark")]], strict=True))


@pytest.mark.parametrize("order", [1, -1])
def test_a_context_column_may_be_of_several_kinds_at_once(order: int) -> None:
    features = (
        Feature(name="hour", side="context", kind="number"),
        Feature(name="hour_id", column="hour", side="context"),
        Feature(name="part", column="hour", side="context", kind="category", vocabulary=("3", "true")),
    )
    schema = SCHEMA.model_copy(update={"features": features[::order]})
    for value, codes in ((3, [3.0, hash_id("3"), 1]), (True, [1.0, hash_id("true"), 2])):
        found = encode_context(schema, {"hour": value})
        assert [found[feature_column(feature)] for feature in features] == codes
