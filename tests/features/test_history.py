"""Features of the visible history against a plain reading of their rules, however rows are packed."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from features import history as module
from features.batch import collate
from features.encoding import encode_value, hash_id
from features.history import history_columns, with_history
from features.sample_table import between, cut, feature_column, sample_schema
from features.schema import SECOND, EventField, Feature, History, Schema, Sequence, Task

GENRES = ("drama", "comedy", "war")


def told(name: str, side: str = "user", scale: str = "linear", **history: Any) -> Feature:
    return Feature(name=name, side=side, scale=scale, history=History(sequence="rated", **history))  # type: ignore[arg-type]


HISTORY = (
    told("events"),
    told("events_log", scale="log"),
    told("dramas", field="genre", values=("drama",)),
    told("likes", function="rate", field="stars_shown", values=("4", "5")),
    told("likes_prior", function="rate", field="stars_shown", values=("4", "5"), prior=0.5, prior_weight=2.0),
    told("stars", function="mean", field="stars"),
    told("idle", function="age", scale="log"),
    told("again", side="cross", key="item_id"),
    told("same_genre", side="cross", key="genre", feature="genres"),
    told("same_genre_stars", side="cross", function="mean", field="stars", key="genre", feature="genres", prior=3.0),
    told(
        "same_genre_likes",
        side="cross",
        function="rate",
        field="stars_shown",
        values=("5",),
        key="genre",
        feature="genres",
    ),
    told("same_genre_age", side="cross", function="age", key="genre", feature="genres"),
)
SCHEMA = Schema(
    features=(
        Feature(name="age", side="user", kind="number"),
        *HISTORY[:3],
        Feature(name="item_id", side="item"),
        Feature(name="genres", side="item", kind="category", vocabulary=GENRES, multi=True),
        *HISTORY[3:],
    ),
    sequences=(
        Sequence(
            name="rated",
            events="events",
            length=5,
            fields=(
                EventField(name="item_id"),
                EventField(name="genre", kind="category", vocabulary=GENRES),
                EventField(name="stars", kind="number"),
                EventField(name="stars_shown", column="stars", kind="id"),
            ),
        ),
        Sequence(name="other", events="events", fields=(EventField(name="item_id"),)),
    ),
    tasks=(Task(name="click"),),
)


def make_rows(seed: int, users: int = 8) -> pa.Table:
    """Rows as they are stored: ragged timelines, requests that see none, some or more than L events."""
    draw, rows = random.Random(seed), []
    for user in range(users):
        count = draw.choice([0, 1, 4, 12])
        stars = [draw.choice([1.0, 4.0, 5.0, None]) for _ in range(count)]
        row: dict[str, Any] = {
            "user_id": f"u{user}",
            "dt": "d",
            "bucket": "0",
            "rated__ts": sorted(draw.randrange(50) * SECOND for _ in range(count)),
            "rated__item_id": [hash_id(str(draw.randrange(6))) for _ in range(count)],
            "rated__genre": [draw.randrange(4) for _ in range(count)],
            "rated__stars": stars,
            "rated__stars_shown": [0 if star is None else hash_id(f"{star:g}") for star in stars],
            "other__ts": [1],
            "other__item_id": [2],
            "requests": [],
        }
        for number in range(draw.randint(1, 3)):
            candidates = [
                {
                    "item_id": str(item),
                    "item_known": True,
                    "feature__item_id": hash_id(str(item)),
                    "feature__genres": draw.sample(range(4), draw.randrange(4)),
                    "label__click": 0,
                    "weight": 1.0,
                }
                for item in draw.sample(range(8), draw.randint(1, 4))
            ]
            row["requests"].append(
                {
                    "request_id": f"{user}-{number}",
                    "ts": (100 + number) * SECOND,
                    "user_known": True,
                    "end__rated": draw.randint(0, count),
                    "end__other": 1,
                    "feature__age": 1.0,
                    "candidates": candidates,
                }
            )
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=sample_schema(SCHEMA, stored=True))


def plain(feature: Feature, row: dict[str, Any], request: dict[str, Any], candidate: dict[str, Any]) -> float:
    """A feature by its rules; NaN where it is missing."""
    history, sequence = feature.history, SCHEMA.sequences[0]
    assert history is not None
    end = request["end__rated"]
    events = [
        {name: row[f"rated__{name}"][place] for name in ("ts", "item_id", "genre", "stars", "stars_shown")}
        for place in range(max(0, end - sequence.length), end)
    ]
    if history.key is not None:
        item = candidate[f"feature__{history.feature or history.key}"]
        keys = [key for key in (item if isinstance(item, list) else [item]) if key]
        events = [event for event in events if event[history.key] in keys]
    wanted = [encode_value(sequence.field(str(history.field)), value) for value in history.values or ()]
    if history.function == "count":
        number: float = sum(not wanted or event[str(history.field)] in wanted for event in events)
    elif history.function == "age":
        number = (request["ts"] - events[-1]["ts"]) / SECOND if events else math.nan
    else:
        values = [event["stars"] for event in events if event["stars"] is not None]
        if history.function == "rate":
            values = [float(event[str(history.field)] in wanted) for event in events]
        weight = 0.0 if history.prior is None else history.prior_weight
        known = len(values) + weight
        number = (sum(values) + (history.prior or 0.0) * weight) / known if known else math.nan
    return math.log1p(number) if feature.scale == "log" else number


@pytest.mark.parametrize("seed", range(4))
def test_every_feature_is_what_its_rules_say(seed: int) -> None:
    stored = make_rows(seed)
    rows = with_history(stored, SCHEMA)
    assert rows.schema == sample_schema(SCHEMA)
    compared = 0
    for row in rows.to_pylist():
        for request in row["requests"]:
            for candidate in request["candidates"]:
                for feature in HISTORY:
                    found = (request if feature.side == "user" else candidate)[feature_column(feature)]
                    expected = plain(feature, row, request, candidate)
                    where = (feature.name, request["request_id"], candidate["item_id"])
                    assert (found is None) == math.isnan(expected), where
                    assert found is None or found == pytest.approx(expected, rel=1e-6), where
                    compared += found not in (None, 0.0)
    assert compared > 100
    without = rows.drop(["requests"]).append_column("requests", rows["requests"])
    assert without["rated__ts"] == stored["rated__ts"]  # nothing else has changed


def test_values_do_not_depend_on_what_is_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = make_rows(7, users=30)
    together = with_history(stored, SCHEMA)
    apart = pa.concat_tables(with_history(stored.slice(place, 1), SCHEMA) for place in range(stored.num_rows))
    assert apart.combine_chunks().equals(together)
    monkeypatch.setattr(module, "PAIRS", 3)
    assert with_history(stored, SCHEMA).equals(together)
    # and batches that are cut out of rows have them
    whole = collate(together, SCHEMA)
    parts = [collate(part, SCHEMA) for part in cut(together, 3, 10**6, SCHEMA.sequences)]
    for name in ("same_genre", "same_genre_age"):
        values = np.concatenate([part.items.fields[name].numpy() for part in parts])  # type: ignore[union-attr]
        np.testing.assert_array_equal(values, whole.items.fields[name].numpy())  # type: ignore[union-attr]


def test_rows_of_which_no_request_is_in_the_cut_are_no_rows() -> None:
    rows = with_history(between(make_rows(1), 0, 1), SCHEMA)
    assert rows.num_rows == 0
    assert rows.schema == sample_schema(SCHEMA)
    assert pa.concat_tables([rows, with_history(make_rows(1), SCHEMA)]).num_rows == 8


def test_a_schema_without_them_reads_rows_as_they_are() -> None:
    bare = SCHEMA.model_copy(update={"features": tuple(one for one in SCHEMA.features if one.history is None)})
    rows = make_rows(1)
    assert with_history(rows, bare) is rows
    assert sample_schema(bare) == sample_schema(bare, stored=True) == sample_schema(SCHEMA, stored=True)
    assert history_columns(bare) == set()
    assert history_columns(SCHEMA) == {f"rated__{name}" for name in ("ts", "item_id", "genre", "stars", "stars_shown")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence": "seen"}, "there is no 'seen'; there are"),
        ({"function": "mean"}, "mean needs a field"),
        ({"function": "mean", "field": "genre"}, "'genre' is a category, of which there is no mean"),
        ({"function": "rate", "field": "genre"}, "what a rate, or a count of a field, counts"),
        ({"function": "rate", "field": "genre", "values": ["opera"]}, "'opera' is not in the vocabulary of 'genre'"),
        ({"field": "genre", "values": [None]}, "None is no value of a column"),
        ({"function": "age", "field": "stars"}, "age takes no field"),
        ({"prior": 1.0}, "only a mean or a rate has one"),
        ({"key": "item_id"}, "side cross needs it, user has none"),
        ({"field": "nothing", "function": "mean"}, "the sequence has no field 'nothing'"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    described = {"name": "x", "side": "user", "history": {"sequence": "rated"} | changes}
    with pytest.raises(ValidationError, match=message):
        SCHEMA.model_validate(SCHEMA.model_dump() | {"features": [*SCHEMA.model_dump()["features"], described]})


def test_a_key_must_be_coded_as_the_candidates_feature() -> None:
    for key, feature, message in (
        ("stars", "item_id", "differ in kind or vocabulary"),
        ("genre", "item_id", "differ in kind or vocabulary"),
        ("genre", None, "there is no feature 'genre' of side item"),
    ):
        described = {"name": "x", "side": "cross", "history": {"sequence": "rated", "key": key, "feature": feature}}
        with pytest.raises(ValidationError, match=message):
            SCHEMA.model_validate(SCHEMA.model_dump() | {"features": [*SCHEMA.model_dump()["features"], described]})
