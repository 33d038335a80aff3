"""The replay of a partition lets time run as it ran: each event meets the profiles of its own time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from features.builder.states import ITEM_AGGREGATES, USER_AGGREGATES, BuildSettings
from features.delta.table import Table
from features.encoding import bucket_of
from features.errors import CorankError
from features.samples.source import SampleSource
from features.schema import SECOND, Feature, History, partition_bounds
from pipeline.deployment import skew
from pipeline.deployment.skew import SkewReport, replay, served_skew
from serving.api import ModelDescription, RankRequest
from serving.memo import Ranked
from serving.request_log import LogSettings, RequestLog, ServedRequest
from serving.rows import RequestRow
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

TOLD = COUNTING.model_copy(
    update={
        "features": (
            *COUNTING.features,
            Feature(name="seen", side="user", history=History(sequence="watched")),
            Feature(name="idle", side="user", scale="log", history=History(sequence="bought", function="age")),
            Feature(
                name="seconds_of_it",
                side="cross",
                history=History(sequence="watched", function="mean", field="seconds", key="item_id"),
            ),
        )
    }
)
"""With features of the visible history."""

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


def test_served_features_are_those_that_the_log_gives_later_and_what_came_late_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a replay reads online is logged as the endpoint logs it, and compared as what it served."""
    tables = write_world(tmp_path, 4, users=6)
    build = settings(tables, tmp_path, 3 * SECOND, schema=TOLD)
    fold_all(build, DAYS, [])
    log, read = RequestLog(LogSettings(str(tmp_path / "served"), "day", seconds=600.0), lambda *_: None), skew.build_row
    numbers = iter(range(10**6))

    def logged(reader: Any, delay: int, user: str, items: list[str], context: Any, ts: int) -> RequestRow:
        row = read(reader, delay, user, items, context, ts, request_id=f"served-{next(numbers)}")
        request = RankRequest(user_id=user, candidates=[*items], context=context, ts=ts)
        ranked = Ranked(np.zeros((len(items), 1)), "none", 0.0, 0.0, 0)
        order = list(reversed(range(len(items))))[:2]  # not all are answered
        log.request(ServedRequest.of(request, row, ts, ranked, order, ModelDescription("1", TOLD, {})))
        return row

    monkeypatch.setattr(skew, "build_row", logged)
    requests = {day: replayed(build, day).requests for day in DAYS[1:]}
    log.close()
    folder, earlier = str(tmp_path / "served"), DAYS[:1]
    found = served_skew(build, folder, DAYS[1], earlier, 0, lambda *_: None)
    assert (found.requests, found.left_out) == (requests[DAYS[1]], 0)
    assert {name: one.example for name, one in found.features.items() if one.differ} == {}
    assert found.features["clicked"].compared > found.features["age"].compared == found.requests
    assert served_skew(build, folder, DAYS[1], earlier, 3, lambda *_: None).requests < found.requests

    events, opening = tables["events"].scan().collect(), partition_bounds(DAYS[1], "day")[0]
    late = events.head(1).with_columns(
        pl.lit("late").alias("event_id"),
        pl.lit(opening).alias("ts"),
        pl.lit("watch").alias("action"),
        dt=pl.lit(DAYS[1]),
    )
    users = events["user_id"].unique()
    late = pl.concat([late.with_columns(pl.lit(user).alias("user_id")) for user in users])
    late = late.with_columns(bucket=pl.col("user_id").map_elements(lambda u: str(bucket_of(u, 2)), pl.String))
    late.write_delta(tables["events"].uri, mode="append")
    found = served_skew(build, folder, DAYS[1], earlier, 0, lambda *_: None)
    differ = {name: (one.differ, one.missing, one.extra) for name, one in found.features.items() if one.differ}
    assert {"watched.ts", "watched.item_id", "watched.seconds", "watched.shade"} <= set(differ)
    assert set(differ) <= {
        *(f"watched.{name}" for name in ("ts", "item_id", "seconds", "shade")),
        "seen",
        "seconds_of_it",
    }
    counts = differ["watched.ts"]
    assert 0 < counts[1] <= counts[0]  # of whom nothing else was seen
    assert counts[2] == 0

    other = replace(build, schema=TOLD.model_copy(update={"features": TOLD.features[1:]}))
    with pytest.raises(CorankError, match=r"of \d+ logged requests none was answered by a model of the config"):
        served_skew(other, folder, DAYS[1], earlier, 0, lambda *_: None)
    with pytest.raises(CorankError, match="turns the log on"):
        served_skew(build, str(tmp_path / "nowhere"), DAYS[1], earlier, 0, lambda *_: None)
