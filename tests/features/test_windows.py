"""Windows of aggregates move with the calendar, whatever partitions exist: in samples, in states and online."""

from __future__ import annotations

import random
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from features.builder.aggregates import counts_column, until_column
from features.builder.fold import rows_after
from features.builder.states import ITEM_AGGREGATES, USER_AGGREGATES, BuildSettings
from features.delta.table import Table
from features.delta.write import replace_partition, write_file
from features.sample_table import feature_column
from features.schema import Grain, partition_bounds, partition_of
from features.store.definitions import aggregates_view
from features.store.delta import EVENT_TIMESTAMP, moment
from features.store.online import FeatureStoreSettings, apply, materialize, open_store
from features.store.reader import OnlineReader
from tests.features.stores import store_settings
from tests.features.worlds import (
    COUNTING,
    DAYS,
    GRAINS,
    World,
    fold_all,
    length,
    partitions_of,
    settings,
    stretched,
    write_world,
)

USERS, ITEMS = 4, 8
"""Of the generated worlds; one more of each is unknown."""


def states(one: BuildSettings) -> dict[str, list[dict[str, Any]]]:
    tables = {USER_AGGREGATES: "user_id", ITEM_AGGREGATES: "item_id"}
    return {name: one.table(name).scan().collect().sort("dt", owner).to_dicts() for name, owner in tables.items()}


def online_settings(one: BuildSettings, root: Path) -> FeatureStoreSettings:
    counts = {name: Table(name, one.table_root(name)) for name in (USER_AGGREGATES, ITEM_AGGREGATES)}
    return store_settings(dict(one.tables), root, "online", schema=one.schema, **counts)


def asked(times: list[int]) -> pl.DataFrame:
    """Impressions of a request of every user for every item at some moments."""
    rows = pl.DataFrame({"user_id": range(USERS + 1)}).join(pl.DataFrame({"item_id": range(ITEMS + 1)}), how="cross")
    rows = rows.join(pl.DataFrame({"ts": times}), how="cross").with_columns(position=pl.col("item_id"))
    return rows.with_columns(
        pl.col("user_id", "item_id").cast(pl.String),
        request_id=pl.format("{}-{}", "user_id", "ts"),
        device=pl.lit(None, pl.String),
        click=pl.lit(None, pl.Int8),
    )


@settings_of_hypothesis(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    grain=st.sampled_from(GRAINS),
    steps=st.lists(st.sampled_from([1, 2, 6]), min_size=2, max_size=2),
    delay=st.sampled_from([0, 0.25, 2.5]),
    factor=st.sampled_from([1, 3]),
    seconds=st.sampled_from([(1.0, 2.5, None), (0.1, 0.7, 1 / 3)]),
)
def test_online_counts_leave_their_windows_by_themselves_and_equal_the_builders_bit_for_bit(
    seed: int, grain: Grain, steps: list[int], delay: float, factor: int, seconds: tuple[float | None, ...]
) -> None:
    """In gaps and after them; one reader, which keeps items in memory, and nothing is materialised meanwhile."""
    partitions, schema = partitions_of(grain, steps), stretched(factor)
    span, delayed = length(grain), round(delay * length(grain))
    users, items = ([str(one) for one in range(count + 1)] for count in (USERS, ITEMS))
    with tempfile.TemporaryDirectory() as folder:
        tables = write_world(Path(folder), seed, USERS, days=partitions, grain=grain, seconds=seconds)
        for name, key in (("users", "user_id"), ("items", "item_id")):  # profiles that do not change
            rows = tables[name].scan().collect().unique(key, keep="first", maintain_order=True)
            rows.with_columns(updated_at=pl.lit(0, pl.Int64)).write_delta(tables[name].uri, mode="overwrite")
        one = settings(tables, Path(folder), 0, 2, schema, delayed, grain)
        store, start = online_settings(one, Path(folder)), 0
        for index, partition in enumerate(partitions):
            built = partitions[: index + 1]
            fold_all(one, [partition], built[:-1])
            apply(store)
            known = one.known_at(partition)
            materialize(store, start, known)
            reader, world, start = OnlineReader(store), World(tables, built, delayed, grain), known
            # after the last one nobody hears of any for as long as a window can be
            until = known + 10 * span if built == partitions else one.known_at(partitions[index + 1])
            times = [known, *[ts for change in range(known + span, until, span) for ts in (change - 1, change)]]
            random.Random(seed).shuffle(times)  # a reader may be asked in any order
            rows = rows_after(one, built, asked(times)).to_pylist()
            offline = {(row["user_id"], request["ts"]): request for row in rows for request in row["requests"]}
            for ts, user in product(times, users):
                expected = offline[user, ts]
                known = reader.request(user, items, ts)
                assert known.user == expected["user_known"]
                assert known.items["item_known"].tolist() == [item["item_known"] for item in expected["candidates"]]
                for feature in schema.aggregates("user", "item", "cross"):
                    name = feature_column(feature)
                    if feature.side == "user":
                        online, counted = [known.codes[name]], [expected[name]]
                    else:
                        online = [None if np.isnan(value) else value for value in known.items[name].tolist()]
                        counted = [item[name] for item in expected["candidates"]]
                    assert online == counted, (feature.name, ts)
                    if None in seconds:  # sums that are exact in any order
                        assert online == [world.value(feature, user, item, ts) for item in items[: len(online)]]


def test_a_historical_retrieval_gives_what_partitions_added_and_until_when_it_counts(tmp_path: Path) -> None:
    partitions = partitions_of("day", [1, 1, 6])
    tables = write_world(tmp_path, 3, USERS, days=partitions)
    one = settings(tables, tmp_path, schema=COUNTING)
    fold_all(one, partitions, [])
    store, world = online_settings(one, tmp_path), World(tables, partitions, 0)
    apply(store)
    (feature,) = [one for one in COUNTING.aggregates("item") if one.name == "clicked"]
    names = [until_column(feature), counts_column(feature)]
    times = [partition_bounds(partitions[2], "day")[1] + day * length("day") + 1 for day in range(4)]
    entities = pd.DataFrame([(str(item), moment(ts)) for item in range(ITEMS) for ts in times])
    entities.columns = pd.Index(["item_id", EVENT_TIMESTAMP])
    found = (
        open_store(store)
        .get_historical_features(entities, [f"{aggregates_view(COUNTING, 'item')}:{name}" for name in names])
        .to_df()
    )
    counts = []
    for row, (item, ts) in zip(found.to_dict("records"), [(i, t) for i in range(ITEMS) for t in times], strict=True):
        until, added = ([] if row[name] is None else list(row[name]) for name in names)
        counts.append(sum(count for end, count in zip(until, added, strict=True) if end > ts))
        clicks = [
            row
            for row in world.rows["impressions"]
            if str(row["item_id"]) == str(item) and row["click"] is not None and row["dt"] in partitions[:3]
        ]
        first = partition_of(ts - 2 * length("day"), "day")
        assert counts[-1] == sum(row["dt"] >= first for row in clicks)
    assert len(set(counts)) > 3


def test_states_that_an_earlier_version_laid_out_otherwise_are_built_anew(tmp_path: Path) -> None:
    tables = write_world(tmp_path, 3)
    old, new = (settings(tables, tmp_path / name, schema=COUNTING) for name in ("old", "new"))
    root, names = old.table_root(ITEM_AGGREGATES), ["item_id", "dt", "bucket"]
    before = pa.schema([*[pa.field(name, pa.string()) for name in names], pa.field("delta_count__clicked", pa.int64())])
    rows = pa.table({"item_id": ["1"], "delta_count__clicked": [1]})
    for day in DAYS:
        replace_partition(root, day, [write_file(root, rows, {"dt": day, "bucket": "0"}, {})], before, {})
    for one in (old, new):
        for index, day in enumerate(DAYS):
            fold_all(one, [day], DAYS[:index])
    assert states(old) == states(new)
