"""The sample builder against plain Python, incremental against whole, and its commits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import polars as pl
import polars.selectors as cs
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from features.builder import fold
from features.builder.aggregates import item_tally
from features.builder.build import build_partitions
from features.builder.log_rows import items_named, log_rows, profiles_of
from features.builder.states import (
    ITEM_AGGREGATES,
    SAMPLES,
    STATE,
    USER_AGGREGATES,
    BuildSettings,
    restore_items,
)
from features.delta.table import Table
from features.delta.write import DataFile, replace_partition, write_file
from features.encoding import bucket_of, encode
from features.errors import CorankError
from features.schema import SECOND, EventField, Feature, Grain, Schema, Sequence, partition_bounds
from features.store.query import Query
from tests.features.worlds import (
    COLORS,
    COUNTING,
    DAY,
    DAYS,
    GRAINS,
    SCHEMA,
    expected_rows,
    fold_all,
    length,
    partitions_of,
    settings,
    stretched,
    write_world,
)


def sample_rows(one: BuildSettings, day: str) -> dict[str, dict[str, Any]]:
    """Rows of a day by user."""
    rows = Table(SAMPLES, one.table_root(SAMPLES)).scan([day]).collect().drop("dt", "bucket").to_dicts()
    users = [row.pop("user_id") for row in rows]
    assert len(set(users)) == len(users)
    return dict(zip(users, rows, strict=True))


@settings_of_hypothesis(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    grain=st.sampled_from(GRAINS),
    steps=st.lists(st.sampled_from([1, 1, 2, 6]), min_size=3, max_size=3),
    log_delay=st.sampled_from([0, 3 * SECOND]),
    aggregates_delay=st.sampled_from([0, 0.25, 2.5]),
    factor=st.sampled_from([1, 3]),
    cuts=st.sets(st.integers(1, 3)),
    corrected=st.integers(0, 3),
    events_only=st.none() | st.integers(0, 3),
)
def test_samples_equal_a_plain_python_reading_of_the_rules(
    seed: int,
    grain: Grain,
    steps: list[int],
    log_delay: int,
    aggregates_delay: float,
    factor: int,
    cuts: set[int],
    corrected: int,
    events_only: int | None,
) -> None:
    """In however many runs the partitions are built, between gaps shorter and longer than the windows and the delay
    (in partitions), and again after rows came late and others were deleted."""
    days, schema, delay = partitions_of(grain, steps), stretched(factor), round(aggregates_delay * length(grain))
    with tempfile.TemporaryDirectory() as folder:
        tables = write_world(Path(folder), seed, days=days, grain=grain)
        if events_only is not None:
            tables["impressions"].delta().delete(f"dt = '{days[events_only]}'")
        one, whole = (
            settings(tables, Path(folder) / name, log_delay, 2, schema, delay, grain) for name in ("one", "whole")
        )
        for start, stop in pairwise([0, *sorted(cuts), len(days)]):
            fold_all(one, days[start:stop], days[:start])
        for again in (False, True):
            if again:
                correct(tables, days[corrected])
                fold_all(one, days[corrected:], days[:corrected])
            for day in tables["impressions"].partitions():
                assert sample_rows(one, day) == expected_rows(tables, day, log_delay, schema, delay, days, grain)
            fold_all(whole, days, [])
            assert contents(one) == contents(whole)


def contents(one: BuildSettings) -> dict[str, list[dict[str, Any]]]:
    """All rows of the builder's tables."""
    return {name: one.table(name).scan().collect().sort("dt", owner).to_dicts() for name, owner in OWNERS.items()}


def correct(tables: dict[str, Table], day: str) -> None:
    """Late rows of a day, and deletes in its files."""
    for role, key in (("events", "event_id"), ("impressions", "request_id")):
        late = tables[role].scan([day]).collect().head(3).with_columns((pl.lit("late-") + pl.col(key)).alias(key))
        if late.height:
            late.write_delta(tables[role].uri, mode="append")
        tables[role].delta().delete(f"dt = '{day}' AND item_id IN (0, 3)")


def shown(tables: dict[str, Table]) -> dict[str, int]:
    return {day: tables["impressions"].scan([day]).collect().height for day in DAYS}


OWNERS = {SAMPLES: "user_id", STATE: "user_id", USER_AGGREGATES: "user_id", ITEM_AGGREGATES: "item_id"}


def test_a_request_never_sees_an_event_of_its_own_time(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=3)
    one = settings(tables, tmp_path / "out")
    fold_all(one, DAYS, [])
    for day in DAYS:
        for row in sample_rows(one, day).values():
            for request in row["requests"]:
                visible = row["watched__ts"][: request["end__watched"]]
                assert all(ts < request["ts"] for ts in visible)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_day_by_day_builds_the_same_tables_as_all_at_once(tmp_path: Path, local_ray: None) -> None:
    tables = write_world(tmp_path, seed=1, users=12)
    whole, steps = (settings(tables, tmp_path / name, schema=COUNTING) for name in ("whole", "steps"))
    steps = replace(steps, at_once=1)
    counts = build_partitions(whole, DAYS, [], shown(tables), lambda *_: None)
    for index, day in enumerate(DAYS):
        counts_of_day = build_partitions(steps, [day], DAYS[:index], shown(tables), lambda *_: None)
        assert counts_of_day[day] == counts[day]
    assert contents(whole) == contents(steps)
    assert all(contents(whole).values())
    for day in DAYS:
        assert counts[day].impressions == shown(tables)[day] == counts[day].candidates + counts[day].quarantined


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_building_a_partition_again_replaces_it_in_one_commit(tmp_path: Path, local_ray: None) -> None:
    tables = write_world(tmp_path, seed=2)
    one = settings(tables, tmp_path / "out")
    build_partitions(one, DAYS, [], shown(tables), lambda *_: None)
    root = one.table_root(SAMPLES)
    before = Table(SAMPLES, root).scan().collect().sort("dt", "user_id").to_dicts()
    version = DeltaTable(root).version()
    build_partitions(one, [DAYS[1]], [DAYS[0]], shown(tables), lambda *_: None)
    assert DeltaTable(root).version() == version + 1
    assert Table(SAMPLES, root).scan().collect().sort("dt", "user_id").to_dicts() == before


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("buckets", [1, 4])
def test_another_number_of_buckets_than_the_layout_is_an_error(tmp_path: Path, local_ray: None, buckets: int) -> None:
    tables = write_world(tmp_path, seed=2, users=8, buckets=2)
    one = settings(tables, tmp_path / "out", buckets=buckets)
    with pytest.raises(CorankError, match="Set `buckets` in the config"):
        build_partitions(one, DAYS, [], shown(tables), lambda *_: None)
    assert not Table(SAMPLES, one.table_root(SAMPLES)).exists()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_tables_laid_out_otherwise_give_the_same_samples(tmp_path: Path, local_ray: None) -> None:
    tables = write_world(tmp_path, seed=4, users=8)
    flat = dict(tables)
    for role in ("impressions", "events"):
        rows = tables[role].scan().collect().drop("bucket")
        rows = rows.with_columns(pl.from_epoch("ts", time_unit="us").dt.replace_time_zone("UTC"))
        root = str(tmp_path / "flat" / role)
        rows.rename({"user_id": "member"}).write_delta(root, delta_write_options={"partition_by": ["dt"]})
        flat[role] = Table(role, root, {"user_id": "member"})
    one, other = settings(tables, tmp_path / "one"), settings(flat, tmp_path / "other", buckets=3)
    build_partitions(one, DAYS, [], shown(tables), lambda *_: None)
    build_partitions(other, DAYS, [], shown(tables), lambda *_: None)
    for day in DAYS:
        assert sample_rows(other, day) == sample_rows(one, day)
    assert not (tmp_path / "other" / "laid_out").exists()


@pytest.mark.parametrize("name", ["user_id", "event_id", "ts"])
def test_a_field_of_a_sequence_needs_a_name_of_its_own(name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be called '{name}': choose another name, with `column: {name}`"):
        Sequence(name="watched", events="events", fields=(EventField(name=name),))
    with pytest.raises(ValueError, match="declared 2 times"):
        Sequence(name="watched", events="events", fields=(EventField(name="item_id"), EventField(name="item_id")))


@pytest.mark.parametrize("name", ["position", "start", "stop", "row", "key", "rule", "before", "window"])
def test_a_field_of_a_sequence_may_have_any_other_name(tmp_path: Path, name: str) -> None:
    def named(called: str) -> Schema:
        watched, *others = SCHEMA.sequences
        fields = (*watched.fields[:1], EventField(name=called, column="seconds", kind="number"))
        return SCHEMA.model_copy(update={"sequences": (watched.model_copy(update={"fields": fields}), *others)})

    tables = write_world(tmp_path, seed=3)
    found = []
    for called in ("seconds", name):
        one = settings(tables, tmp_path / called, schema=named(called))
        fold_all(one, DAYS, [])
        rows = [row for day in DAYS for row in sample_rows(one, day).values()]
        found.append([(row["watched__ts"], row[f"watched__{called}"], row["requests"]) for row in rows])
    assert found[0] == found[1]
    assert any(seconds for _, seconds, _ in found[0])


def test_booleans_in_a_vocabulary_are_coded_as_a_table_spells_them() -> None:
    feature = Feature.model_validate({"name": "vip", "side": "user", "kind": "category", "vocabulary": [True, False]})
    values = pl.DataFrame({"vip": [True, False, None]})
    assert values.select(encode(feature, pl.col("vip"))).to_series().to_list() == [1, 2, 0]


def test_an_event_delivered_again_in_a_later_partition_counts_once(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=3)
    events = tables["events"].scan([DAYS[0]]).collect()
    again = events.with_columns(ts=pl.col("ts") + DAY, dt=pl.lit(DAYS[1]))
    one = settings(tables, tmp_path / "once")
    fold_all(one, DAYS, [])
    again.write_delta(str(tmp_path / "events"), mode="append")
    twice = settings(tables, tmp_path / "twice")
    fold_all(twice, DAYS, [])
    assert again.height > 5
    for day in DAYS:
        rows = sample_rows(one, day)
        assert rows
        for user, row in sample_rows(twice, day).items():
            # what the state still holds, the last L events, is known to have been delivered
            assert row["watched__ts"][-1:] == rows[user]["watched__ts"][-1:]
            assert len(set(zip(row["bought__ts"], row["bought__item_id"], strict=True))) == len(row["bought__ts"])


@settings_of_hypothesis(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10_000), log_delay=st.sampled_from([0, DAY // 2]), again=st.lists(st.integers(0, 3)))
def test_events_delivered_again_count_alike_in_however_many_runs(seed: int, log_delay: int, again: list[int]) -> None:
    """Whether an earlier state holds an event hangs on its length, and on what was visible at each close."""
    days = partitions_of("day", [1, 1, 2])
    with tempfile.TemporaryDirectory() as folder:
        tables = write_world(Path(folder), seed, days=days)
        openings = [partition_bounds(day, "day")[0] for day in days]
        first = tables["events"].scan([days[0]]).collect()
        for delivery in again:
            moved = first.with_columns(ts=pl.col("ts") - openings[0] + openings[delivery], dt=pl.lit(days[delivery]))
            moved.write_delta(tables["events"].uri, mode="append")
        together, alone = (settings(tables, Path(folder) / name, log_delay, schema=COUNTING) for name in ("one", "two"))
        fold_all(together, days, [])
        for index, day in enumerate(days):
            fold_all(alone, [day], days[:index])
        assert contents(together) == contents(alone)


def test_partitions_that_are_too_large_together_are_folded_group_by_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = partitions_of("day", [1, 1, 1, 3, 1])
    tables = write_world(tmp_path, seed=7, users=8, days=days)
    one, other = (settings(tables, tmp_path / name, 3 * SECOND, schema=COUNTING) for name in ("one", "other"))
    fold_all(one, days, [])
    per_day = sum(sum(tables[role].sizes(days).values()) for role in ("impressions", "events")) // len(days)
    monkeypatch.setattr("features.builder.fold.TOGETHER_BYTES", 2 * per_day // one.buckets)
    monkeypatch.setattr("features.builder.fold.TOGETHER_ITEMS", 10)
    groups = fold._together(other, days)
    assert 1 < len(groups) < len(days)
    assert [day for group in groups for day in group] == days
    fold_all(other, days, [])
    assert contents(one) == contents(other)


def test_a_bucket_reads_the_profiles_and_counts_of_the_items_that_its_rows_name(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=3, users=8)
    others = tables["items"].scan().collect().with_columns(item_id=pl.col("item_id") + 1_000)
    others.write_delta(tables["items"].uri, mode="append")
    one = settings(tables, tmp_path / "out", schema=COUNTING)
    fold_all(one, DAYS, [])
    for bucket in range(one.buckets):
        named = items_named(one, DAYS[:1], bucket)
        rows, _ = log_rows(one, DAYS[:1], bucket)
        assert set(named["item_id"]) == {item for role in rows.values() for item in role["item_id"]}
        assert set(profiles_of(one, "items", "item_id", (), named)["item_id"]) <= set(named["item_id"])
        few, counted = named.head(2), item_tally(COUNTING, "day")
        restore_items(one, counted, few, DAYS, one.known_at(DAYS[-1]))
        assert set(counted.rows["item_id"]) == set(few["item_id"])


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300])
def test_a_value_that_is_no_number_does_not_stay_in_a_sum(tmp_path: Path, value: float) -> None:
    tables = write_world(tmp_path, seed=3)
    events = tables["events"].scan().collect()
    spoiled = events.with_columns(seconds=pl.when(pl.col("dt") == DAYS[0]).then(value).otherwise(pl.col("seconds")))
    clean = events.with_columns(seconds=pl.when(pl.col("dt") != DAYS[0]).then(pl.col("seconds")))
    found = []
    for name, rows in (("spoiled", spoiled), ("clean", clean)):
        rows.write_delta(str(tmp_path / name), delta_write_options={"partition_by": ["dt", "bucket"]})
        one = settings(
            tables | {"events": Table("events", str(tmp_path / name))}, tmp_path / f"{name}-out", schema=COUNTING
        )
        fold_all(one, DAYS, [])
        rows = one.table(USER_AGGREGATES).scan().collect().sort("dt", "user_id")
        found.append(rows.select("dt", "user_id", cs.contains("seconds")).to_dicts())
    assert found[0] == found[1]


def test_users_laid_out_with_another_number_of_buckets_are_an_error(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=3, users=8)
    users = tables["users"].scan().collect()
    users = users.with_columns(bucket=pl.Series([str(bucket_of(user, 8)) for user in users["user_id"]]))
    users.write_delta(str(tmp_path / "own"), delta_write_options={"partition_by": ["bucket"]})
    one = settings(tables | {"users": Table("users", str(tmp_path / "own"))}, tmp_path / "out")
    with pytest.raises(CorankError, match=r"table users .* not the user hash modulo 2"):
        build_partitions(one, DAYS, [], shown(tables), lambda *_: None)


@pytest.mark.parametrize("bucket", [pl.Series(["3"]), pl.Series([None], dtype=pl.String)])
def test_rows_that_lie_in_no_bucket_of_the_config_are_an_error(tmp_path: Path, bucket: pl.Series) -> None:
    """Of events, which nobody counts again: they would be missing in histories."""
    tables = write_world(tmp_path, seed=3, users=8)
    stray = tables["events"].scan([DAYS[1]]).collect().head(1).with_columns(bucket=bucket)
    stray.write_delta(tables["events"].uri, mode="append")
    one = settings(tables, tmp_path / "out")
    with pytest.raises(CorankError, match=r"table events .* not the user hash modulo 2"):
        build_partitions(one, DAYS, [], shown(tables), lambda *_: None)
    assert not Table(ITEM_AGGREGATES, one.table_root(ITEM_AGGREGATES)).exists()


def test_a_new_partitions_window_lists_only_its_own_files_of_the_states(tmp_path: Path) -> None:
    one = settings(write_world(tmp_path, seed=3, users=8), tmp_path / "out", schema=COUNTING)
    fold_all(one, DAYS, [])
    for name, key in ((STATE, "user_id"), (USER_AGGREGATES, "user_id"), (ITEM_AGGREGATES, "item_id")):
        close = partition_bounds(DAYS[2], "day")[1]
        newest = Query(one.table(name), "ts", {key: key}, {}, close, close)
        files = [file for part in newest.slices(1) for file in part.files]
        assert len(files) == one.buckets
        assert all(DAYS[2] in file for file in files)


def test_of_two_writers_of_a_partition_one_wins_whole_and_the_other_is_told(tmp_path: Path) -> None:
    root, schema = str(tmp_path / "table"), pa.schema({name: pa.string() for name in ("row", "dt", "bucket")})
    both_opened = Barrier(2)

    def files(writer: str, wait: bool) -> Iterator[DataFile]:
        """Asked for once the table was opened."""
        if wait:
            both_opened.wait(timeout=30)
        for bucket in "012":
            rows = pa.table({"row": [f"{writer}-{bucket}"]})
            yield write_file(root, rows, {"dt": DAYS[0], "bucket": bucket}, {})

    replace_partition(root, DAYS[0], files("first", False), schema, {})
    with ThreadPoolExecutor(2) as pool:
        done = {name: pool.submit(replace_partition, root, DAYS[0], files(name, True), schema, {}) for name in "ab"}
        failures = {name: one.exception() for name, one in done.items()}
    (loser,) = [name for name, failure in failures.items() if failure is not None]
    assert isinstance(failures[loser], CorankError)
    assert "another writer changed it meanwhile" in str(failures[loser])
    (winner,) = {"a", "b"} - {loser}
    rows = Table("table", root).scan().collect()["row"].sort().to_list()
    assert rows == [f"{winner}-{bucket}" for bucket in "012"]


def test_a_column_called_like_a_time_may_be_of_any_type(tmp_path: Path) -> None:
    rows = pa.table({"seen__ts": ["yesterday"], "ts": [1], "own__event_id": [None], "at__ts": [[1, None]]})
    rows = rows.set_column(2, "own__event_id", pa.array([None], pa.int64()))
    file = write_file(str(tmp_path), rows, {"dt": DAYS[0]}, {})
    assert pl.read_parquet(tmp_path / file.path, hive_partitioning=False).to_dicts() == rows.to_pylist()


def test_a_sequence_may_be_called_as_the_keys_that_features_cross(tmp_path: Path) -> None:
    tables, rows = write_world(tmp_path, seed=3), {}
    shade = EventField(name="colors", column="shade", of="item", kind="category", vocabulary=COLORS)
    for name in ("plain", "cross"):
        sequence = COUNTING.sequences[0].model_copy(update={"name": name, "fields": (shade,)})
        schema = Schema.model_validate({**COUNTING.model_dump(), "sequences": [sequence.model_dump()]})
        one = settings(tables, tmp_path / name, schema=schema)
        fold_all(one, DAYS, [])
        samples = one.table(SAMPLES).scan().collect().sort("dt", "user_id")
        rows[name] = [samples["requests"].to_list(), samples[f"{name}__colors"].to_list()]
    assert str(rows["cross"]).replace("end__cross", "end__plain") == str(rows["plain"])
