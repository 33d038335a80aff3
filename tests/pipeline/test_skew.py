"""The replay of a partition lets time run as it ran: each event meets the profiles of its own time."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from features.builder.states import ITEM_AGGREGATES, USER_AGGREGATES, BuildSettings
from features.delta.table import Table
from features.samples.source import SampleSource
from features.schema import SECOND, partition_bounds
from pipeline.deployment.skew import SkewReport, replay
from tests.features.stores import store_settings
from tests.features.worlds import (
    COLORS,
    COUNTING,
    DAY,
    DAYS,
    fold_all,
    partitions_of,
    settings,
    stretched,
    write_world,
)

SECONDS = 12
"""The world's days have so many in which anything happens."""


@pytest.mark.parametrize("seed", [4, 5, 7])
@pytest.mark.parametrize("log_delay", [0, 3 * SECOND])
@pytest.mark.parametrize("every", [1, 3])
def test_events_around_changes_of_their_items_read_online_what_the_samples_hold(
    tmp_path: Path, seed: int, log_delay: int, every: int
) -> None:
    tables = write_world(tmp_path, seed, users=2)
    opening = partition_bounds(DAYS[1], "day")[0]
    changes = tables["items"].scan().collect().unique("item_id", keep="first", maintain_order=True)
    for second in range(0, SECONDS, every):  # at the time of events, and half a second before others
        changed = changes.with_columns(
            pl.lit(COLORS[second // every % 2]).alias("shade"),
            pl.lit(opening + second * SECOND - (second % 2) * SECOND // 2).alias("updated_at"),
        )
        changed.write_delta(tables["items"].uri, mode="append")
    build = settings(tables, tmp_path, log_delay, schema=COUNTING)
    fold_all(build, DAYS, [])
    for day in DAYS[1:]:
        found = replayed(build, day)
        assert found.features["watched.shade"].compared == found.requests > 0


@pytest.mark.parametrize("delay", [0, 2 * DAY + DAY // 2])
def test_after_a_gap_counts_have_left_their_windows_online_as_in_the_samples(tmp_path: Path, delay: int) -> None:
    days = partitions_of("day", [1, 2, 5])
    tables = write_world(tmp_path, 4, users=6, days=days)
    build = settings(tables, tmp_path, schema=stretched(2), aggregates_delay=delay)
    fold_all(build, days, [])
    for day in days[1:]:
        found = replayed(build, day)
        assert found.features["watched_seconds"].compared == found.requests > 0


def replayed(build: BuildSettings, day: str) -> SkewReport:
    """The replay of a day's requests, none of whose values differs."""
    root, schema = Path(build.root), build.schema
    counts = {name: Table(name, build.table_root(name)) for name in (USER_AGGREGATES, ITEM_AGGREGATES)}
    store = store_settings(dict(build.tables), root, "skewed", schema=schema, **counts)
    samples = SampleSource(build.table_root("samples"), schema, (day,), 0, 2**62)
    found = replay(build, store, samples, day, 0, root / "scratch", lambda *_: None)
    assert {name: (one.differ, one.example) for name, one in found.features.items() if one.differ} == {}
    return found
