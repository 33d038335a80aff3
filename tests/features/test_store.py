"""The feature store on real Delta tables and a real SQLite online store."""

from __future__ import annotations

import base64
import itertools
import json
import struct
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
from features.errors import ConfigError, CorankError, UnreadableError
from features.lake import Table
from features.schema import EventField, Feature, Schema, Sequence, Task
from features.store.delta import DeltaOfflineStore, DeltaSource, delta_source, moment
from features.store.online import FeatureStoreSettings, apply, materialize, open_store
from features.store.query import SLICE_BYTES, Partitions, Query
from features.store.reader import OnlineReader

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
            fields=(EventField(name="item", column="item_id"), EventField(name="dwell", kind="number")),
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
    assert dict(seen) == rows
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
    assert len(reader._items._read_at) <= 2 * len(reader._items._rows) + 1
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


def test_entity_ids_that_pandas_made_fractional_are_refused(settings: FeatureStoreSettings) -> None:
    apply(settings)
    service = [f"user_features:{one.source}" for one in SCHEMA.side("user") if one.source != "user_id"]
    rows = pd.DataFrame({"user_id": [1, None], "event_timestamp": pd.to_datetime([0, 1], utc=True)})
    with pytest.raises(CorankError, match=r"join keys \['user_id'\] are fractional numbers"):
        open_store(settings).get_historical_features(rows, service).to_df()


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


WHERE = [
    pytest.param(False, id="in-process"),
    pytest.param(True, id="on-ray", marks=[pytest.mark.slow, pytest.mark.timeout(120)]),
]
HEX = [f"{one:x}" for one in range(400)]


@pytest.fixture
def large(settings: FeatureStoreSettings, tmp_path: Path, request: pytest.FixtureRequest) -> FeatureStoreSettings:
    """400 users with up to 12,000 profiles in several files, ties in time included; some rows have been deleted.

    The parameter says whether Ray reads them, in slices of a file or two.
    """
    rng = np.random.default_rng(7)
    rows = 12_000
    profiles = pl.DataFrame(
        {
            "uid": rng.choice(HEX, rows),
            "city": rng.choice(["Köln", "Rom", "gone", None], rows),
            "segment_id": rng.integers(0, 2**62, rows),
            "updated_at": rng.integers(0, 40, rows) * DAY,
        }
    )
    users = tmp_path / "large"
    profiles = pl.concat([pl.DataFrame(schema=USERS), profiles], how="diagonal")
    first, later = profiles[: rows // 2], profiles[rows // 2 :].filter(pl.col("city").ne_missing("gone"))
    write_deltalake(str(users), first.to_arrow())
    DeltaTable(str(users)).delete("city = 'gone'")  # writes its rows again as one file
    for part in later.iter_slices(rows // 8):
        write_deltalake(str(users), part.to_arrow(), mode="append")
    own = replace(settings, users=Table("users", str(users), {"user_id": "uid"}))
    if not request.param:
        return own
    request.getfixturevalue("local_ray")
    query = Query(own.users, "updated_at", {"user_id": "user_id"}, {}, 10 * DAY, 35 * DAY)
    assert Partitions(query, 10_000).count > 2
    return replace(own, slice_bytes=10_000)


def tables_of(large: FeatureStoreSettings) -> pd.DataFrame:
    """The rows that the log holds, in the order of the table, oldest first."""
    table: pl.DataFrame = large.users.scan().select("user_id", "city", "segment_id", "updated_at").collect()
    assert table.height < 12_000
    assert "gone" not in table["city"]
    return table.to_pandas().sort_values("updated_at", kind="stable")


@pytest.mark.parametrize("large", WHERE, indirect=True)
def test_every_entity_row_comes_back_once_in_order_with_what_merge_asof_finds(large: FeatureStoreSettings) -> None:
    apply(large)
    rng = np.random.default_rng(1)
    rows = 20_000
    users = rng.choice([*HEX, *[f"nobody-{one}" for one in range(40)]], rows)
    times = rng.integers(0, 42, rows) * DAY
    items = rng.choice(["1", "2", "3"], rows)
    entities = pd.DataFrame(
        {"user_id": users, "n": range(rows), "event_timestamp": pd.to_datetime(times, unit="us", utc=True)}
    )
    entities["item_id"] = items
    assert entities.duplicated(["user_id", "event_timestamp"]).sum() > 1_000
    features = ["user_features:city", "user_features:segment_id", "item_features:price"]
    found = open_store(large).get_historical_features(entities, features).to_arrow()
    profiles = tables_of(large)
    expected = pd.merge_asof(
        pd.DataFrame({"user_id": users, "time": times, "n": range(rows)}).sort_values("time", kind="stable"),
        profiles.assign(time=profiles["updated_at"], segment_id=profiles["segment_id"].astype("Int64")),
        on="time",
        by="user_id",
    ).sort_values("n")
    assert found["n"].to_pylist() == list(range(rows))
    assert found["user_id"].to_pylist() == users.tolist()
    assert found["city"].to_pylist() == [one if isinstance(one, str) else None for one in expected["city"]]
    segments = [None if one is pd.NA else int(one) for one in expected["segment_id"]]
    assert found["segment_id"].to_pylist() == segments
    assert 1_000 < segments.count(None) < 5_000
    assert found["price"].to_pylist() == [2.5 if item == "1" else None for item in items]


@pytest.mark.parametrize("large", WHERE, indirect=True)
def test_pulled_rows_are_those_of_the_log_within_the_window(large: FeatureStoreSettings) -> None:
    apply(large)
    view = open_store(large).get_feature_view("user_features")
    columns = ["city", "segment_id", "updated_at"]
    start, end = 10 * DAY, 35 * DAY
    window = (moment(start), moment(end))
    config = open_store(large).config
    everything = DeltaOfflineStore.pull_all_from_table_or_query(
        config, delta_source(view), ["user_id"], columns, "event_timestamp", None, *window
    ).to_arrow()
    newest = DeltaOfflineStore.pull_latest_from_table_or_query(
        config, delta_source(view), ["user_id"], columns, "event_timestamp", None, *window
    ).to_arrow()
    assert everything.column_names == newest.column_names == ["user_id", *columns, "event_timestamp"]
    table = large.users.scan().select("user_id", *columns).collect()
    inside = table.filter(pl.col("updated_at").is_between(start, end))
    assert inside.height < table.height
    assert pl.DataFrame(pl.from_arrow(everything)).drop("event_timestamp").equals(inside)
    assert everything["event_timestamp"].cast("int64").equals(everything["updated_at"])
    ordered = tables_of(large)
    ordered = ordered[ordered["updated_at"].between(start, end)]
    last = ordered.drop_duplicates("user_id", keep="last")[["user_id", *columns]]
    tied = ordered.duplicated(["user_id", "updated_at"], keep="first")
    assert last.index.isin(ordered.index[tied]).sum() > 20
    assert sorted(newest.drop(["event_timestamp"]).to_pylist(), key=str) == sorted(
        [{**row, "city": row["city"] or None} for row in last.to_dict("records")], key=str
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("large", [True], indirect=True)
def test_materialising_by_slices_on_ray_writes_what_one_process_writes(
    large: FeatureStoreSettings, tmp_path: Path
) -> None:
    apply(large)
    view = open_store(large).get_feature_view("user_features")
    query = Query(
        delta_source(view).table(open_store(large).config), "updated_at", {"user_id": "user_id"}, {}, 0, 50 * DAY
    )
    slices = Partitions(query, large.slice_bytes).slices
    assert len(slices) > 2
    assert sum(part.scan().collect().height for part in slices) == len(tables_of(large))
    alone = replace(
        large, slice_bytes=SLICE_BYTES, sqlite_path=str(tmp_path / "alone.db"), registry=str(tmp_path / "r.db")
    )
    apply(alone)
    seen: list[tuple[str, int]] = []
    rows = materialize(large, 0, 50 * DAY, lambda name, done: seen.append((name, done)))
    assert rows == materialize(alone, 0, 50 * DAY)
    assert rows["user_features"] == tables_of(large)["user_id"].nunique()
    counts = [done for name, done in seen if name == "user_features"]
    assert len(counts) > 2  # portion by portion
    assert counts == sorted(counts)
    readers = [OnlineReader(one) for one in (large, alone)]
    for user in HEX:
        assert readers[0].user(user) == readers[1].user(user)


def test_a_window_reads_only_the_files_that_may_hold_its_rows(settings: FeatureStoreSettings, tmp_path: Path) -> None:
    path = tmp_path / "days"
    for day in range(6):
        write(path, [user_row("a", day * DAY)], USERS)
    query = Query(
        Table("users", str(path), {"user_id": "uid"}), "updated_at", {"user_id": "user_id"}, {}, 2 * DAY, 3 * DAY
    )
    assert [one.scan().collect()["updated_at"].to_list() for one in query.slices(1)] == [[3 * DAY], [2 * DAY]]
    assert len(query.slices(SLICE_BYTES)) == 1
    assert replace(query, start=7 * DAY, end=None).slices(1) == []


def test_a_slice_honours_deletion_vectors(tmp_path: Path) -> None:
    for part in (["a", "b", "c", "d"], ["e", "f"]):
        write(tmp_path / "users", [user_row(uid, 0) for uid in part], USERS)
    mark_deleted(tmp_path / "users", version=0, rows=[1, 3])
    query = Query(Table("users", str(tmp_path / "users"), {"user_id": "uid"}), "updated_at", {"user_id": "user_id"}, {})
    parts = query.slices(1)
    assert [len(part.files) for part in parts] == [1, 1]
    assert sorted(user for part in parts for user in query.read(part)["user_id"]) == ["a", "c", "e", "f"]


def mark_deleted(path: Path, version: int, rows: list[int]) -> None:
    """Commit a deletion vector for an even number of rows of the file that a version added (Delta protocol)."""
    log = path / "_delta_log"
    entries = [json.loads(line) for line in (log / f"{version:020d}.json").read_text().splitlines()]
    add = next(entry["add"] for entry in entries if "add" in entry)
    # a RoaringBitmapArray of one bitmap with one array container
    container = struct.pack("<IIHHI", 12346, 1, 0, len(rows) - 1, 16) + struct.pack(f"<{len(rows)}H", *rows)
    bitmap = struct.pack("<IQI", 1681511377, 1, 0) + container
    ours = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
    z85 = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
    inline = base64.b85encode(bitmap).translate(bytes.maketrans(ours, z85)).decode()
    vector = {"storageType": "i", "pathOrInlineDv": inline, "sizeInBytes": len(bitmap), "cardinality": len(rows)}
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    commit = [
        {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}},
        {"remove": {"path": add["path"], "deletionTimestamp": 1, "dataChange": True}},
        {"add": {**add, "deletionVector": vector}},
    ]
    newest = DeltaTable(str(path)).version()
    (log / f"{newest + 1:020d}.json").write_text("\n".join(json.dumps(action) for action in commit))


def test_a_damaged_profile_file_is_named_when_it_is_materialised(settings: FeatureStoreSettings) -> None:
    apply(settings)
    for path in Path(settings.users.uri).rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableError, match=r"table users: file .*parquet has .* bytes, but the Delta log says"):
        materialize(settings, 0, 2**50)


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
