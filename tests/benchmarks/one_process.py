"""What the sample builder makes of a log, made by one Polars program over the whole log in memory.

``python -m tests.benchmarks.one_process LOG OUTPUT``: no buckets, no state carried along, no checks. Every user's
whole timeline is made once; a sample row and a state are slices of it. Files: ``OUTPUT/<table>/<dt>.parquet``. Prints
seconds and CPU seconds of the work (without imports) and peak resident bytes.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import polars as pl

from features.builder.states import SAMPLES, STATE
from features.delta.table import Table
from features.encoding import encode, hash_ids
from features.sample_table import end_column, event_id_column, feature_column, label_column, timeline_column
from features.schema import Feature, partition_bounds
from tests.benchmarks.worlds import LOG_DELAY, SCHEMA

SEQUENCE = SCHEMA.sequences[0]
TIMELINE = [timeline_column(SEQUENCE, field) for field in (None, *SEQUENCE.fields)]
EVENT_IDS = event_id_column(SEQUENCE)


def build(log: Path, output: Path) -> None:
    """Samples and states of all partitions of a log of :mod:`tests.benchmarks.worlds`."""
    tables = {name: Table(name, str(log / name)) for name in ("events", "impressions", "users", "items")}
    for name in (SAMPLES, STATE):
        (output / name).mkdir(parents=True)
    # users as numbers in the order of their text: sorts, groups and joins need no text
    users = pl.Enum(
        pl.concat([tables[name].scan().select("user_id") for name in ("events", "impressions", "users")])
        .unique()
        .sort("user_id")
        .collect(engine="streaming")
        .to_series()
    )
    events = (
        tables["events"]
        .scan()
        .select(
            pl.col("user_id").cast(users),
            pl.col("dt"),
            "event_id",
            pl.col("ts"),
            *[encode(field, pl.col(field.source)).alias(field.name) for field in SEQUENCE.fields],
        )
        .sort("user_id", "ts", "event_id")
        .collect()
        .with_columns(
            pl.int_range(pl.len(), dtype=pl.Int64).over("user_id").alias("before"),
            hash_ids(pl.col("event_id")).alias(EVENT_IDS),
        )
    )
    timelines = events.group_by("user_id", maintain_order=True).agg(
        pl.col("ts").alias(TIMELINE[0]),
        *[pl.col(field.name).alias(name) for field, name in zip(SEQUENCE.fields, TIMELINE[1:], strict=True)],
        EVENT_IDS,
    )
    moments = events.select("user_id", "ts", upto=pl.col("before") + 1)
    active = events.select("user_id", "dt").unique()
    del events
    _write_samples(tables, users, moments, timelines, output / SAMPLES)
    _write_states(active, moments, timelines, output / STATE)


def _write_samples(
    tables: dict[str, Table], users: pl.Enum, moments: pl.DataFrame, timelines: pl.DataFrame, output: Path
) -> None:
    item, user, context = (SCHEMA.side(side) for side in ("item", "user", "context"))
    profiles, catalogue = _profiles(tables["users"], "user_id", user), _profiles(tables["items"], "item_id", item)
    candidates = (
        tables["impressions"]
        .scan()
        .select(
            pl.col("user_id").cast(users),
            "request_id",
            "item_id",
            "ts",
            "dt",
            "position",
            pl.lit(1.0, pl.Float32).alias("weight"),
            *[pl.col(task.source).alias(label_column(task)) for task in SCHEMA.tasks],
            *[encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in context],
        )
        .sort("ts")
        .join_asof(catalogue, left_on="ts", right_on="updated_at", by="item_id", check_sortedness=False)
        .with_columns(*_filled(item), pl.col("known").fill_null(False).alias("item_known"))
        .sort("user_id", "ts", "request_id", "position", "item_id")
    )
    requests = (
        candidates.group_by("dt", "user_id", "ts", "request_id", maintain_order=True)
        .agg(
            pl.struct(
                "item_id", "item_known", *map(feature_column, item), *map(label_column, SCHEMA.tasks), "weight"
            ).alias("candidates"),
            *[pl.col(feature_column(feature)).first() for feature in context],
        )
        .with_columns(pl.col("ts") - LOG_DELAY - 1, ts_of_request="ts")
        .sort("ts")
        .join_asof(moments.lazy(), on="ts", by="user_id", check_sortedness=False)  # moments: in order for each user
        .with_columns(pl.col("upto").fill_null(0), ts="ts_of_request")
        .sort("ts")
        .join_asof(
            profiles.with_columns(pl.col("user_id").cast(users)),
            left_on="ts",
            right_on="updated_at",
            by="user_id",
            check_sortedness=False,
        )
        .with_columns(*_filled(user), pl.col("known").fill_null(False).alias("user_known"))
        .sort("user_id", "ts", "request_id")
    )
    length = SEQUENCE.length
    first = (pl.col("upto").min() - length).clip(0)
    request = pl.struct(
        "request_id",
        "ts",
        "user_known",
        (pl.col("upto") - first).cast(pl.Int32).alias(end_column(SEQUENCE)),
        *map(feature_column, (*user, *context)),
        "candidates",
    )
    rows = requests.group_by("dt", "user_id", maintain_order=True).agg(
        request.alias("requests"), start=first, stop=pl.col("upto").max()
    )
    for (partition,), part in rows.collect().group_by("dt", maintain_order=True):
        part.join(timelines, on="user_id", how="left", maintain_order="left").select(
            pl.col("user_id").cast(pl.String),
            *[pl.col(name).list.slice(pl.col("start"), pl.col("stop") - pl.col("start")) for name in TIMELINE],
            "requests",
        ).with_columns(_no_nulls()).write_parquet(output / f"{partition}.parquet", compression="zstd")


def _write_states(active: pl.DataFrame, moments: pl.DataFrame, timelines: pl.DataFrame, output: Path) -> None:
    """Of users with events in a partition: the last L visible events at its close, and those not visible yet."""
    partitions = sorted(active["dt"].unique())
    closes = pl.DataFrame({"dt": partitions, "close": [partition_bounds(one, "day")[1] for one in partitions]})
    active = active.join(closes, on="dt")
    for count, delay in (("visible", LOG_DELAY), ("happened", 0)):
        at = active.with_columns(ts=pl.col("close") - delay - 1).sort("ts")
        active = at.join_asof(moments, on="ts", by="user_id", check_sortedness=False).rename({"upto": count}).drop("ts")
    start = (pl.col("visible").fill_null(0) - SEQUENCE.length).clip(0)
    for (partition,), part in active.group_by("dt"):
        part.sort("user_id").join(timelines, on="user_id", how="left", maintain_order="left").select(
            pl.col("user_id").cast(pl.String),
            pl.col("close").alias("ts"),
            *[pl.col(name).list.slice(start, pl.col("happened") - start) for name in (*TIMELINE, EVENT_IDS)],
        ).write_parquet(output / f"{partition}.parquet", compression="zstd")


def _profiles(table: Table, key: str, features: tuple[Feature, ...]) -> pl.LazyFrame:
    columns = [encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in features]
    return table.scan().select(key, "updated_at", pl.lit(True).alias("known"), *columns).sort("updated_at")


def _filled(features: tuple[Feature, ...]) -> list[pl.Expr]:
    return [pl.col(feature_column(feature)).fill_null(0) for feature in features if feature.kind != "number"]


def _no_nulls() -> list[pl.Expr]:
    return [pl.col(name).fill_null([]) for name in TIMELINE]


if __name__ == "__main__":
    started, cpu = time.perf_counter(), time.process_time()
    build(Path(sys.argv[1]), Path(sys.argv[2]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(time.perf_counter() - started, time.process_time() - cpu, peak)
