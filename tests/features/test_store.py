"""The feature store on real Delta tables and a real SQLite online store."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from deltalake import DeltaTable, write_deltalake
from feast.data_source import DataSource

from features.batch import feature_column
from features.encoding import encode, hash_id
from features.errors import ConfigError, CorankError
from features.lake import Table
from features.schema import Feature, FieldSpec, Schema, Sequence, Task
from features.store.delta import DeltaSource, moment
from features.store.online import FeatureStoreSettings, OnlineReader, apply, materialize, open_store

DAY = 86_400_000_000
BIG = 2**62 + 1  # changes when it passes through a float

SCHEMA = Schema(
    features=(
        Feature(name="user_id", side="user"),
        Feature(name="city", side="user"),
        Feature(name="segment", column="segment_id", side="user"),
        Feature(name="age", kind="number", side="user"),
        Feature(name="tags", side="user", multi=True),
        Feature(name="groups", side="user", multi=True),
        Feature(name="score", side="user", kind="id"),
        Feature(name="item_id", side="item"),
        Feature(name="genre", side="item", kind="category", vocabulary=("drama", "action")),
        Feature(name="price", side="item", kind="number"),
    ),
    sequences=(
        Sequence(
            name="clicks",
            events="events",
            length=200,
            fields=(FieldSpec(name="item", column="item_id"), FieldSpec(name="dwell", kind="number")),
        ),
    ),
    tasks=(Task(name="click"),),
)
USERS = {"uid": pl.String, "city": pl.String, "segment_id": pl.Int64, "age": pl.Float64, "tags": pl.List(pl.String)} | {
    "groups": pl.List(pl.Int64),
    "score": pl.Float32,
    "updated_at": pl.Int64,
}
STATE = {"user_id": pl.String, "ts": pl.Int64, "clicks__ts": pl.List(pl.Int64), "clicks__item": pl.List(pl.Int64)} | {
    "clicks__dwell": pl.List(pl.Float32),
    "clicks__event_id": pl.List(pl.Int64),
}


def user_row(uid: str, updated_at: int, **values: Any) -> dict[str, Any]:
    return dict.fromkeys(USERS) | {"uid": uid, "updated_at": updated_at} | values


def write(path: Path, rows: list[dict[str, Any]], schema: dict[str, Any], **options: Any) -> None:
    frame = pl.DataFrame(rows, schema=schema)
    write_deltalake(str(path), frame.to_arrow(), mode="append", **options)


@pytest.fixture
def settings(tmp_path: Path) -> FeatureStoreSettings:
    users = [
        user_row("a", 0, city="Köln", segment_id=BIG, age=31.5, tags=["x", "y"], groups=[BIG, 2], score=0.1),
        user_row("b", 5 * DAY),
        user_row("c", 5 * DAY, tags=[], groups=[]),
        user_row("d", 6 * DAY, city="Rom"),
        user_row("a", 9 * DAY, city="Bonn", segment_id=7),
    ]
    items: list[dict[str, Any]] = [
        {"item_id": 1, "genre": "drama", "price": 2.5, "updated_at": 0},
        {"item_id": 2, "genre": None, "price": None, "updated_at": 3 * DAY},
    ]
    long = list(range(200))
    state: list[dict[str, Any]] = [
        {
            "user_id": "a",
            "ts": 2 * DAY,
            "clicks__ts": [DAY + one for one in long],
            "clicks__item": [hash_id(one) for one in long],
            "clicks__dwell": [None if one == 3 else one / 7 for one in long],
            "clicks__event_id": [hash_id(f"e{one}") for one in long],
        },
        {
            "user_id": "b",
            "ts": 2 * DAY,
            "clicks__ts": [],
            "clicks__item": [],
            "clicks__dwell": [],
            "clicks__event_id": [],
        },
    ]
    write(tmp_path / "users", users, USERS)
    write(
        tmp_path / "items",
        items,
        {"item_id": pl.Int64, "genre": pl.String, "price": pl.Float64, "updated_at": pl.Int64},
    )
    write(tmp_path / "state", state, STATE)
    return FeatureStoreSettings(
        project="test",
        registry=str(tmp_path / "feast" / "registry.db"),
        schema=SCHEMA,
        users=Table("users", str(tmp_path / "users"), {"user_id": "uid"}),
        items=Table("items", str(tmp_path / "items")),
        state_uri=str(tmp_path / "state"),
        sqlite_path=str(tmp_path / "feast" / "online.db"),
    )


def test_source_round_trip() -> None:
    source = DeltaSource(name="users", uri="s3://bucket/users", clock="updated_at", columns={"user_id": "uid"})
    back = DataSource.from_proto(source.to_proto())
    assert back == source
    assert isinstance(back, DeltaSource)
    assert (back.uri, back.clock, back.columns) == (
        source.uri,
        source.clock,
        source.columns,
    )


def test_values_arrive_online_unchanged(settings: FeatureStoreSettings) -> None:
    apply(settings)
    apply(settings)  # twice changes nothing
    seen: list[tuple[str, int]] = []
    rows = materialize(settings, 0, 5 * DAY, lambda view, count: seen.append((view, count)))
    assert rows == {"user_features": 3, "item_features": 2, "user_sequences_clicks": 2}
    assert seen == list(rows.items())
    reader = OnlineReader(settings)
    profile = reader.user("a")
    assert profile is not None
    assert np.float32(profile.pop("score")) == np.float32(0.1)
    assert profile == {
        "user_id": "a",
        "city": "Köln",
        "segment_id": BIG,
        "age": 31.5,
        "tags": ["x", "y"],
        "groups": [BIG, 2],
        "updated_at": 0,
    }
    empty = reader.user("b")
    assert empty is not None
    assert empty.pop("updated_at") == 5 * DAY
    assert empty.pop("user_id") == "b"
    assert set(empty.values()) == {None}
    history = reader.sequences("a")["clicks"]
    assert history.ts.tolist() == [DAY + one for one in range(200)]
    assert history.fields["item"].tolist() == [hash_id(one) for one in range(200)]
    dwell = np.array([np.nan if one == 3 else one / 7 for one in range(200)], np.float32)
    np.testing.assert_array_equal(history.fields["dwell"], dwell)
    for nobody in ("b", "nobody"):
        history = reader.sequences(nobody)["clicks"]
        assert len(history.ts) == len(history.fields["item"]) == len(history.fields["dwell"]) == 0
    assert reader.user("nobody") is None
    assert reader.user("d") is None  # not yet materialised


def test_encoded_users_equal_the_offline_encoding(settings: FeatureStoreSettings) -> None:
    apply(settings)
    materialize(settings, 0, 5 * DAY)
    reader = OnlineReader(settings)
    table = settings.users.scan().filter(pl.col("updated_at") <= 5 * DAY).collect()
    user_features = SCHEMA.side("user")
    offline = table.select(
        encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in user_features
    )
    for user_id, row in zip(table["user_id"], offline.iter_rows(named=True), strict=True):
        assert reader.encoded_user(user_id, 5 * DAY) == (True, row)
    codes: dict[str, Any] = {"user_id": 0, "city": 0, "segment": 0, "age": None, "tags": [], "groups": [], "score": 0}
    unknown = {f"feature__{name}": code for name, code in codes.items()}
    assert reader.encoded_user("nobody", 5 * DAY) == (False, unknown)
    assert reader.encoded_user("b", 5 * DAY - 1) == (False, unknown)  # not yet true at that time


def test_items_are_read_through(settings: FeatureStoreSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(settings)
    materialize(settings, 0, 5 * DAY)
    reader = OnlineReader(settings)
    rows = reader.items(["2", "9", "1", "2"], 4 * DAY)
    assert rows.columns == ["feature__item_id", "feature__genre", "feature__price", "item_known"]
    assert rows["item_known"].to_list() == [True, False, True, True]
    assert rows["feature__item_id"].to_list() == [hash_id(2), 0, hash_id(1), hash_id(2)]
    assert rows["feature__genre"].to_list() == [0, 0, 1, 0]
    assert rows["feature__price"].to_list() == [None, None, 2.5, None]
    earlier = reader.items(["2", "1"], 3 * DAY - 1)
    assert earlier["item_known"].to_list() == [False, True]
    assert earlier["feature__item_id"].to_list() == [0, hash_id(1)]
    # A changed profile shows after the maximum age, not before.
    write(
        Path(settings.items.uri),
        [{"item_id": 1, "genre": "action", "price": 1.0, "updated_at": 5 * DAY}],
        {"item_id": pl.Int64, "genre": pl.String, "price": pl.Float64, "updated_at": pl.Int64},
    )
    materialize(settings, 5 * DAY, 6 * DAY)
    assert reader.items(["1"], 6 * DAY)["feature__genre"].to_list() == [1]
    monkeypatch.setattr(reader._items, "_max_age", -1.0)
    for _ in range(5):  # replaced rows are dropped along the way
        assert reader.items(["1", "2"], 6 * DAY)["feature__genre"].to_list() == [2, 0]
    assert len(reader._items._table) <= 2 * len(reader._items._rows) + 1
    monkeypatch.setattr(reader._items, "_max_items", 1)
    assert reader.items(["9", "1"], 6 * DAY)["feature__genre"].to_list() == [0, 2]
    assert set(reader._items._rows) == {"9", "1"}


def test_deleted_rows_do_not_come_back(settings: FeatureStoreSettings) -> None:
    apply(settings)
    DeltaTable(settings.users.uri).delete("uid = 'a' AND city = 'Bonn'")
    DeltaTable(settings.users.uri).delete("uid = 'c'")
    materialize(settings, 0, 10 * DAY)
    reader = OnlineReader(settings)
    profile = reader.user("a")
    assert profile is not None
    assert profile["city"] == "Köln"
    assert reader.user("c") is None


def test_consecutive_windows_equal_one(settings: FeatureStoreSettings, tmp_path: Path) -> None:
    def content(path: str, windows: list[tuple[int, int]]) -> list[Any]:
        own = replace(settings, sqlite_path=str(tmp_path / path / "online.db"), registry=str(tmp_path / path / "r.db"))
        apply(own)
        for window in windows:
            materialize(own, *window)
        reader = OnlineReader(own)
        users = [reader.user(user_id) for user_id in "abcd"]
        events = [reader.sequences(user_id)["clicks"].ts.tolist() for user_id in "abcd"]
        return [users, events, reader.items(["1", "2"], 10 * DAY).rows()]

    borders = [0, 2 * DAY, 5 * DAY, 6 * DAY, 9 * DAY, 10 * DAY]
    windows = list(itertools.pairwise(borders))
    whole = content("one", [(0, 10 * DAY)])
    assert content("many", windows) == whole
    assert content("twice", [window for window in windows for _ in range(2)]) == whole
    assert whole[0][0]["city"] == "Bonn"
    assert None not in whole[0]


def test_historical_features_equal_merge_asof(settings: FeatureStoreSettings) -> None:
    apply(settings)
    rng = np.random.default_rng(0)
    users = rng.choice(["a", "b", "c", "d", "nobody"], 200)
    times = rng.integers(0, 11, 200) * DAY
    entities = pd.DataFrame({"event_timestamp": [moment(int(one)) for one in times], "user_id": users, "n": range(200)})
    assert entities.duplicated(["event_timestamp", "user_id"]).any()
    entities.index = pd.Index(range(200, 0, -1))
    job = open_store(settings).get_historical_features(
        entities, ["user_features:city", "user_features:updated_at"], full_feature_names=True
    )
    found = job.to_df()
    table = settings.users.scan().select("user_id", "city", "updated_at").collect().to_pandas()
    expected = (
        pd.merge_asof(
            pd.DataFrame({"user_id": users, "time": times, "n": range(200)}).sort_values("time", kind="stable"),
            table.sort_values("updated_at", kind="stable").assign(time=lambda frame: frame["updated_at"]),
            on="time",
            by="user_id",
        )
        .sort_values("n")
        .reset_index(drop=True)
    )
    assert found["n"].tolist() == list(range(200))
    assert found["user_id"].tolist() == users.tolist()
    assert list(found["event_timestamp"]) == list(entities["event_timestamp"])
    blank = "-"
    assert found["user_features__city"].fillna(blank).tolist() == expected["city"].fillna(blank).tolist()
    assert found["user_features__updated_at"].fillna(-1).tolist() == expected["updated_at"].fillna(-1).tolist()
    assert found.columns.tolist() == [*entities.columns, "user_features__city", "user_features__updated_at"]


def test_several_views_at_once(settings: FeatureStoreSettings) -> None:
    apply(settings)
    entities = pd.DataFrame(
        {"event_timestamp": [moment(10 * DAY), moment(DAY)], "user_id": ["a", "a"], "item_id": ["2", "1"]}
    )
    store = open_store(settings)
    found = store.get_historical_features(
        entities, store.get_feature_service("ranking"), full_feature_names=True
    ).to_arrow()
    assert found["user_features__segment_id"].to_pylist() == [7, BIG]
    assert found["item_features__genre"].to_pylist() == [None, "drama"]
    assert [one and len(one) for one in found["user_sequences_clicks__clicks__ts"].to_pylist()] == [200, None]


def test_errors_say_what_to_do(settings: FeatureStoreSettings) -> None:
    with pytest.raises(CorankError, match="Run the pipeline first"):
        OnlineReader(settings)
    with pytest.raises(CorankError, match="Run the pipeline first"):
        materialize(settings, 0, DAY)
    wrong = SCHEMA.model_copy(update={"features": (*SCHEMA.features, Feature(name="nope", side="user"))})
    with pytest.raises(ConfigError, match="no column 'nope'"):
        apply(replace(settings, schema=wrong))
    apply(settings)
    with pytest.raises(CorankError, match=r"lacks \['nope'\]"):
        OnlineReader(replace(settings, schema=wrong))
