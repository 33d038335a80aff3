"""The sample builder killed at random moments, and with the longest history that a sequence can have."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.builder.build import build_partitions
from features.builder.states import ITEM_AGGREGATES, SAMPLES, STATE, USER_AGGREGATES, BuildSettings
from features.delta.table import Table
from features.errors import CorankError
from features.schema import SECOND, partition_bounds
from features.store.online import apply, materialize
from features.store.reader import OnlineReader
from tests.features.stores import store_settings
from tests.features.worlds import COUNTING, DAY, DAYS, SCHEMA, fold_all, settings, write_world

OWNERS = {SAMPLES: "user_id", STATE: "user_id", USER_AGGREGATES: "user_id", ITEM_AGGREGATES: "item_id"}
KILLS = 3
LONGEST = 10_000

BUILD = """
import logging, pickle, sys
import ray
from features.builder.build import build_partitions
with open(sys.argv[1], "rb") as file:
    arguments = pickle.load(file)
ray.init(address=sys.argv[2], log_to_driver=False, logging_level=logging.ERROR)
build_partitions(*arguments, progress=lambda *_: None)
"""


def content(one: BuildSettings) -> dict[tuple[str, str], Any]:
    """Rows by (table, partition) of all that is visible."""
    found = {}
    for name, owner in OWNERS.items():
        if one.table(name).exists():
            rows = one.table(name).scan().collect().sort(owner)
            found |= {(name, str(day)): part.to_dicts() for (day,), part in rows.group_by("dt")}
    return found


def written(one: BuildSettings) -> int:
    """Files of data and commits, visible or not; folders come and go meanwhile, which os.walk does not mind."""
    return sum(name.endswith((".parquet", ".json")) for _, _, names in os.walk(one.root) for name in names)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_builder_killed_at_random_moments_shows_whole_partitions_and_ends_the_same(
    tmp_path: Path, local_ray: None
) -> None:
    import ray

    tables = write_world(tmp_path, seed=6, users=12, buckets=4)
    whole, killed = (settings(tables, tmp_path / name, buckets=4, schema=COUNTING) for name in ("whole", "killed"))
    impressions = {day: tables["impressions"].scan([day]).collect().height for day in DAYS}
    build_partitions(whole, DAYS, [], impressions, lambda *_: None)
    right, files = content(whole), written(whole)
    (tmp_path / "arguments").write_bytes(pickle.dumps((killed, DAYS, [], impressions)))
    command = [sys.executable, "-c", BUILD, str(tmp_path / "arguments"), ray.get_runtime_context().gcs_address]
    random_ = random.Random(7)
    for _ in range(KILLS):
        moment = written(killed) + random_.randrange(files)
        process = subprocess.Popen(command)
        while written(killed) < moment and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait(30)
        visible = content(killed)
        assert visible == {part: right[part] for part in visible}
    build_partitions(killed, DAYS, [], impressions, lambda *_: None)
    assert content(killed) == right


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_build_that_fails_shows_nothing_and_leaves_no_task_that_writes(tmp_path: Path, local_ray: None) -> None:
    tables = write_world(tmp_path, seed=6, users=12, buckets=4)
    one = settings(tables, tmp_path / "out", buckets=4, schema=COUNTING)
    impressions = {day: tables["impressions"].scan([day]).collect().height for day in DAYS}

    def fail(what: str, done: int, total: int) -> None:
        if what == "buckets of users":
            raise CorankError("the disk is full")

    with pytest.raises(CorankError, match="the disk is full"):
        build_partitions(one, DAYS, [], impressions, fail)
    files = written(one)
    assert {name for name, _ in content(one)} == {ITEM_AGGREGATES}
    time.sleep(2)
    assert written(one) == files
    assert not (tmp_path / "out" / "laid_out").exists()


def test_the_longest_history_is_kept_read_and_shown_whole(tmp_path: Path) -> None:
    (watched, _) = SCHEMA.sequences
    longest = SCHEMA.model_copy(update={"sequences": (watched.model_copy(update={"length": LONGEST}),)})
    opening, close = partition_bounds(DAYS[0], "day")
    events = LONGEST + 50
    steps = range(events)
    tables = write_world(tmp_path, seed=1, users=1)
    rows = pl.DataFrame({"event_id": [f"{one:06d}" for one in steps], "item_id": [one % 7 for one in steps]})
    rows = rows.with_columns(
        user_id=pl.lit(0),
        action=pl.lit("watch"),
        seconds=pl.int_range(pl.len()).cast(pl.Float64),
        ts=opening + pl.int_range(pl.len(), dtype=pl.Int64) * SECOND,
        dt=pl.lit(DAYS[0]),
        bucket=pl.lit(tables["impressions"].scan().select("bucket").first().collect().item()),
    )
    shown = tables["impressions"].scan().collect().head(1).with_columns(ts=pl.lit(close + SECOND), dt=pl.lit(DAYS[1]))
    for name, frame in (("events", rows), ("impressions", shown)):
        frame.write_delta(
            str(tmp_path / "long" / name), delta_write_options={"partition_by": ["dt", "bucket"]}, mode="overwrite"
        )
        tables[name] = Table(name, str(tmp_path / "long" / name))
    one = settings(tables, tmp_path / "out", schema=longest)
    fold_all(one, DAYS[:2], [])
    (row,) = one.table(SAMPLES).scan([DAYS[1]]).collect().to_dicts()
    assert row["watched__seconds"] == [float(step) for step in steps][-LONGEST:]
    assert row["requests"][0]["end__watched"] == LONGEST
    online = store_settings(tables, tmp_path / "out", "long", schema=longest)
    apply(online)
    materialize(online, 0, close + DAY)
    history = OnlineReader(online).sequences("0")["watched"]
    assert history.fields["seconds"].tolist() == row["watched__seconds"]
    assert history.ts.tolist() == row["watched__ts"]
