"""Our offline store for Delta against pandas: as-of joins, windows, slices, deletes."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from deltalake import DeltaTable, write_deltalake
from feast.data_source import DataSource

from features.delta.table import Table
from features.errors import CorankError
from features.store.definitions import sequence_view
from features.store.delta import DeltaOfflineStore, DeltaSource, delta_source, moment
from features.store.online import FeatureStoreSettings, apply, materialize, open_store
from features.store.query import SLICE_BYTES, Partitions, Query
from features.store.reader import OnlineReader
from tests.features import profiles
from tests.features.profiles import BIG, DAY, SCHEMA, USERS, user_row, write

settings = profiles.settings


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
    times = found[f"{sequence_view(SCHEMA.sequences[0])}__clicks__ts"].to_pylist()
    assert [one and len(one) for one in times] == [200, None]


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
