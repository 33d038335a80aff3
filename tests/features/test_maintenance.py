"""Compaction, vacuum, erasure and dropping on real Delta tables, and erasure from real online stores."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from features.builder.fold import fold_bucket
from features.builder.states import SAMPLES, state_schema
from features.delta.maintenance import (
    compact,
    derived_tables,
    drop_partitions,
    erase_users,
    find_users,
    sample_counts,
    size_in_storage,
    vacuum,
)
from features.delta.table import Table
from features.delta.write import replace_partition, write_file
from features.errors import CorankError
from features.sample_table import candidate_counts, sample_schema, timeline_column
from features.samples.source import SampleSource
from features.store.erase import erase_users as erase_online_users
from features.store.online import FeatureStoreSettings, apply, materialize
from features.store.reader import OnlineReader
from tests.features import profiles
from tests.features.worlds import DAYS, SCHEMA, settings, write_world

USER = "2"
store_settings = profiles.settings


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Table]:
    """The derived tables of a small log, every (dt, bucket) in as many files as it has rows."""
    world = settings(write_world(tmp_path / "log", seed=5, users=10), tmp_path / "tables")
    files: dict[tuple[str, str], list[Any]] = {}
    for bucket in range(2):
        for name, day, content, _ in fold_bucket(world, bucket, DAYS, []):
            for row in range(content.num_rows):
                written = write_file(
                    world.table_root(name), content.slice(row, 1), {"dt": day, "bucket": str(bucket)}, {}
                )
                files.setdefault((name, day), []).append(written)
    for (name, day), parts in files.items():
        schema = sample_schema(SCHEMA) if name == SAMPLES else state_schema(SCHEMA)
        replace_partition(world.table_root(name), day, parts, schema, {})
    return {table.name: table for table in derived_tables(str(tmp_path / "tables"))}


def rows_in_order(samples: Table) -> list[dict[str, Any]]:
    """What the reader sees, in the order in which it sees it."""
    source = SampleSource(samples.uri, SCHEMA, tuple(DAYS), 0, 2**62)
    return [row for file in source.files() for row in source.read(file).to_pylist()]


def slices(table: Table) -> list[tuple[str, str]]:
    actions = pl.DataFrame(DeltaTable(table.uri).get_add_actions(flatten=True))
    return sorted(actions.select("partition.dt", "partition.bucket").iter_rows())


def users_in_storage(table: Table) -> set[str]:
    """Users in any file below the table's root, whether a version refers to it or not."""
    return {
        user
        for path in Path(table.uri).rglob("*.parquet")
        if "_delta_log" not in path.parts
        for user in pq.read_table(path, columns=["user_id"], partitioning=None)["user_id"].to_pylist()
    }


def test_compaction_makes_a_slice_one_file_and_changes_no_row_order_or_fingerprint(tables: dict[str, Table]) -> None:
    samples = tables[SAMPLES]
    before, fingerprints, many = rows_in_order(samples), samples.fingerprints(), slices(samples)
    assert len(set(many)) < len(many)
    assert compact(samples) > 0
    assert rows_in_order(samples) == before
    assert samples.fingerprints() == fingerprints
    assert slices(samples) == sorted(set(many))
    version = DeltaTable(samples.uri).version()
    assert compact(samples) == 0
    assert DeltaTable(samples.uri).version() == version


def test_vacuum_keeps_what_is_referenced_and_what_is_younger_than_asked(tables: dict[str, Table]) -> None:
    samples = tables[SAMPLES]
    before, size = rows_in_order(samples), size_in_storage(samples)
    compact(samples)
    write_file(
        samples.uri,
        pq.read_table(next(Path(samples.uri).rglob("*.parquet")), partitioning=None).slice(0, 1),
        {"dt": DAYS[0], "bucket": "0"},
        {},
    )  # what a killed run leaves behind
    assert vacuum(samples, keep_hours=168) == 0
    assert size_in_storage(samples).files > size.files
    vacuum(samples, keep_hours=0)
    assert size_in_storage(samples).files == len(slices(samples)) < size.files
    assert rows_in_order(samples) == before


def test_a_reader_meets_the_files_that_it_began_with_or_learns_that_they_are_gone(tables: dict[str, Table]) -> None:
    samples = tables[SAMPLES]
    before = rows_in_order(samples)
    source = SampleSource(samples.uri, SCHEMA, tuple(DAYS), 0, 2**62)
    files = source.files()
    compact(samples)
    vacuum(samples)
    assert [row for file in files for row in source.read(file).to_pylist()] == before
    vacuum(samples, keep_hours=0)
    with pytest.raises(CorankError, match=rf"table samples at .*: {files[0]} is gone\. .* run again"):
        source.read(files[0])
    assert rows_in_order(samples) == before


def test_a_compaction_killed_in_the_middle_leaves_the_table_readable_and_can_go_on(tables: dict[str, Table]) -> None:
    samples = tables[SAMPLES]
    before = rows_in_order(samples)
    code = (
        "import sys, time\nfrom features.delta.table import Table\nfrom features.delta.maintenance import compact\n"
        "def wait(done, total):\n    print(done, flush=True)\n    time.sleep(60)\n"
        "compact(Table('samples', sys.argv[1]), wait)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, samples.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"  # one partition is committed, the others are not
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert rows_in_order(samples) == before
    assert len(slices(samples)) > len(set(slices(samples)))
    compact(samples)
    assert len(slices(samples)) == len(set(slices(samples)))
    assert rows_in_order(samples) == before


def test_erasing_a_user_takes_the_rows_and_the_bytes_and_nothing_else(tables: dict[str, Table]) -> None:
    for table in tables.values():
        before = table.scan().collect().sort("dt", "user_id")
        assert USER in users_in_storage(table)
        compact(table)
        found = find_users(table, [USER, "nobody"])
        assert found.rows == {USER: before.filter(pl.col("user_id") == USER).height}
        assert found.partitions == before.filter(pl.col("user_id") == USER)["dt"].unique().sort().to_list()
        erase_users(found)
        vacuum(table, keep_hours=0)
        after = table.scan().collect().sort("dt", "user_id")
        assert after.equals(before.filter(pl.col("user_id") != USER))
        assert USER not in users_in_storage(table)
        version = DeltaTable(table.uri).version()
        assert find_users(table, [USER]).rows == {}
        erase_users(find_users(table, [USER]))
        assert DeltaTable(table.uri).version() == version


def test_a_table_without_users_is_not_searched(tmp_path: Path) -> None:
    rows = pl.DataFrame({"item_id": ["2"], "dt": ["2026-01-05"], "bucket": ["0"]})
    write_deltalake(str(tmp_path / "item_aggregates"), rows.to_arrow(), partition_by=["dt", "bucket"])
    (tmp_path / "no_table").mkdir()
    (table,) = derived_tables(str(tmp_path))
    assert find_users(table, [USER]).files == []


def test_sample_counts_are_those_of_the_rows_that_remain(tables: dict[str, Table]) -> None:
    samples, timelines = tables[SAMPLES], [timeline_column(sequence, None) for sequence in SCHEMA.sequences]
    counted = {day: sample_counts(samples, day, [USER], timelines) for day in DAYS}
    erase_users(find_users(samples, [USER]))
    for day in DAYS:
        source = SampleSource(samples.uri, SCHEMA, (day,), 0, 2**62)
        rest = [candidate_counts(source.read(file)) for file in source.files()]
        assert counted[day] == {
            "candidates": sum(one["candidates"] for one in rest),
            "requests": sum(one["requests"] for one in rest),
            "users": sum(one["rows"] for one in rest),
            "timeline_events": sum(one["events"] for one in rest),
        }
        assert counted[day]["requests"] > 0


def test_dropping_partitions_leaves_the_others_as_they_are(tables: dict[str, Table]) -> None:
    samples = tables[SAMPLES]
    rest = [row for row in samples.scan().collect().sort("dt", "user_id").to_dicts() if row["dt"] not in DAYS[:2]]
    version = DeltaTable(samples.uri).version()
    assert drop_partitions(samples, DAYS[:2]) > 0
    assert DeltaTable(samples.uri).version() == version + 1
    assert samples.partitions() == DAYS[2:]
    assert samples.scan().collect().sort("dt", "user_id").to_dicts() == rest
    assert drop_partitions(samples, DAYS[:2]) == 0


@pytest.mark.parametrize("online", ["sqlite", "redis"])
def test_a_user_erased_online_is_unknown_and_all_others_stay(
    store_settings: FeatureStoreSettings, online: str, request: pytest.FixtureRequest
) -> None:
    own = store_settings
    if online == "redis":
        own = replace(own, online="redis", redis=request.getfixturevalue("redis_address"))
    apply(own)
    materialize(own, 0, 20 * profiles.DAY)
    reader = OnlineReader(own)  # as the endpoint holds it: opened before
    others, items = [reader.user(user) for user in "bcd"], reader.items(["1", "2"], 20 * profiles.DAY)
    assert reader.user("a") is not None
    assert len(reader.sequences("a")["clicks"].ts) == 200
    removed = erase_online_users(own, ["a", "nobody"])
    assert set(removed) == {"a"}
    for seen in (reader, OnlineReader(own)):
        assert seen.user("a") is None
        assert len(seen.sequences("a")["clicks"].ts) == 0
        assert [seen.user(user) for user in "bcd"] == others
        assert seen.items(["1", "2"], 20 * profiles.DAY).equals(items)
    assert erase_online_users(own, ["a"]) == {}


def test_erased_bytes_are_gone_from_the_sqlite_file(store_settings: FeatureStoreSettings) -> None:
    apply(store_settings)
    materialize(store_settings, 0, 20 * profiles.DAY)
    path = Path(store_settings.sqlite_path)
    assert b"Bonn" in path.read_bytes()  # only user a lives there
    erase_online_users(store_settings, ["a"])
    assert b"Bonn" not in path.read_bytes()
    assert b"Rom" in path.read_bytes()
