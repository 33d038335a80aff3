"""Small generated logs, and the sample table of one as plain Python would build it."""

from __future__ import annotations

import random
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.builder.fold import fold_bucket, fold_items, item_deltas
from features.builder.states import (
    ITEM_AGGREGATES,
    SAMPLES,
    STATE,
    USER_AGGREGATES,
    BuildSettings,
    item_aggregates_schema,
    state_schema,
    user_aggregates_schema,
)
from features.delta.table import Table
from features.delta.write import DataFile, replace_partition, write_file
from features.encoding import bucket_of, hash_id
from features.sample_table import end_column, feature_column, label_column, sample_schema, timeline_column
from features.schema import (
    GRAIN_LENGTH,
    SECOND,
    Aggregate,
    EventField,
    Feature,
    Grain,
    Schema,
    Sequence,
    Task,
    partition_bounds,
    partition_number,
    partition_of,
)

DAYS = ["2026-01-05", "2026-01-06", "2026-01-07"]
DAY = 86_400 * SECOND
COLORS = ("red", "blue")

SCHEMA = Schema(
    features=(
        Feature(name="user_id", side="user", buckets=100),
        Feature(name="age", side="user", kind="number"),
        Feature(name="device", side="context", kind="category", vocabulary=("tv", "phone")),
        Feature(name="item_id", side="item", buckets=100),
        Feature(name="colors", side="item", kind="category", vocabulary=COLORS, multi=True),
    ),
    sequences=(
        Sequence(
            name="watched",
            events="events",
            where="action = 'watch'",
            length=3,
            fields=(
                EventField(name="item_id", buckets=100),
                EventField(name="seconds", kind="number"),
                EventField(name="shade", of="item", kind="category", vocabulary=COLORS),
            ),
        ),
        Sequence(
            name="bought",
            events="events",
            where="action = 'buy'",
            length=2,
            fields=(EventField(name="item_id", buckets=100),),
        ),
    ),
    tasks=(Task(name="click"),),
)

COUNTING = SCHEMA.model_copy(
    update={
        "features": (
            *SCHEMA.features,
            Feature(name="clicked", side="item", aggregate=Aggregate(function="rate", column="click", window=2)),
            Feature(name="shown", side="item", scale="log", aggregate=Aggregate()),
            Feature(
                name="watched_seconds",
                side="user",
                aggregate=Aggregate(of="events", function="sum", column="seconds", where="action = 'watch'", window=1),
            ),
            Feature(
                name="mean_seconds",
                side="user",
                aggregate=Aggregate(of="events", function="mean", column="seconds", prior=2.0, prior_weight=3.0),
            ),
            Feature(
                name="color_clicks",
                side="cross",
                aggregate=Aggregate(function="rate", column="click", key="colors", window=3),
            ),
            Feature(name="item_events", side="cross", aggregate=Aggregate(of="events", key="item_id", window=2)),
        )
    }
)
"""The same with windowed aggregates of every side and function."""


GRAINS: tuple[Grain, ...] = ("hour", "day", "week")


def length(grain: Grain) -> int:
    """Of a partition, microseconds."""
    return GRAIN_LENGTH[grain] // timedelta(microseconds=1)


def partitions_of(grain: Grain, steps: list[int]) -> list[str]:
    """Partitions that lie so many steps apart."""
    opening = partition_bounds(DAYS[0], "day")[0]
    return [partition_of(opening + number * length(grain), grain) for number in accumulate([0, *steps])]


def stretched(factor: int) -> Schema:
    """``COUNTING`` with windows so many times as long as its own of 1 to 3 partitions."""
    features = []
    for one in COUNTING.features:
        if one.aggregate is not None and one.aggregate.window is not None:
            longer = one.aggregate.model_copy(update={"window": factor * one.aggregate.window})
            one = one.model_copy(update={"aggregate": longer})
        features.append(one)
    return COUNTING.model_copy(update={"features": tuple(features)})


def write_world(
    root: Path,
    seed: int,
    users: int = 4,
    buckets: int = 2,
    days: list[str] = DAYS,
    grain: Grain = "day",
    seconds: tuple[float | None, ...] = (1.0, 2.5, None),
) -> dict[str, Table]:
    """Some partitions of a log with ties in time, users and items without profile, and changing profiles.

    Args:
        seconds: values of the events' number; sums of the default ones are exact in any order.
    """
    rng = random.Random(seed)
    opening = partition_bounds(days[0], grain)[0]
    moments = [partition_bounds(day, grain)[0] + second * SECOND for day in days for second in range(12)]
    impressions: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for user in range(users):
        for number in range(rng.randint(1, 8)):
            ts = rng.choice(moments)
            for position, item in enumerate(rng.sample(range(8), rng.randint(1, 4))):
                impressions.append(
                    {
                        "request_id": f"r{user}-{number}",
                        "user_id": user,
                        "item_id": item,
                        "ts": ts,
                        "position": position,
                        "device": rng.choice(["tv", "phone", "watch", None]),
                        "click": rng.choice([0, 1, None]),
                    }
                )
        for number in range(rng.randint(0, 20)):
            events.append(
                {
                    "event_id": f"{rng.randint(0, 9)}-{user}-{number}",
                    "user_id": user,
                    "item_id": rng.randint(0, 7),
                    "action": rng.choice(["watch", "buy"]),
                    "seconds": rng.choice(seconds),
                    "ts": rng.choice(moments),
                }
            )
    profiles = [{"user_id": user, "age": 20 + user, "updated_at": 0} for user in range(1, users)]
    profiles += [{"user_id": 1, "age": 50, "updated_at": opening + DAY + 5 * SECOND}]
    items = [
        {"item_id": item, "colors": rng.sample(COLORS, rng.randint(0, 2)), "updated_at": rng.choice([0, moments[14]])}
        for item in range(7)
    ]
    # two changes of a shade, between events and in another partition
    items = [{**item, "shade": COLORS[item["item_id"] % 2]} for item in items]
    items += [{**items[item], "shade": COLORS[1 - item % 2], "updated_at": moments[18] + item} for item in (1, 4)]
    kinds: dict[str, dict[str, Any]] = {
        "impressions": {"click": pl.Int8, "device": pl.String},
        "events": {
            "event_id": pl.String,
            "user_id": pl.Int64,
            "item_id": pl.Int64,
            "action": pl.String,
            "seconds": pl.Float64,
            "ts": pl.Int64,
        },
        "users": {},
        "items": {"colors": pl.List(pl.String)},
    }
    tables = {}
    for name, rows in (("impressions", impressions), ("events", events), ("users", profiles), ("items", items)):
        overrides = kinds[name]
        if name == "events":
            frame = pl.DataFrame(rows, schema=overrides)
        else:
            frame = pl.DataFrame(rows, schema_overrides=overrides, infer_schema_length=None)
        options: dict[str, Any] = {}
        if "ts" in frame.columns:
            days = [partition_of(ts, grain) for ts in frame["ts"]]
            hashed = [str(bucket_of(user, buckets)) for user in frame["user_id"]]
            frame = frame.with_columns(pl.Series("dt", days, pl.String), pl.Series("bucket", hashed, pl.String))
            options = {"delta_write_options": {"partition_by": ["dt", "bucket"]}}
        frame.write_delta(str(root / name), **options)
        tables[name] = Table(name, str(root / name))
    return tables


def settings(
    tables: dict[str, Table],
    root: Path,
    log_delay: int = 0,
    buckets: int = 2,
    schema: Schema = SCHEMA,
    aggregates_delay: int = 0,
    grain: Grain = "day",
) -> BuildSettings:
    return BuildSettings(
        tables, schema, grain, buckets, log_delay, str(root), now=2**60, aggregates_delay=aggregates_delay
    )


def expected_rows(
    tables: dict[str, Table],
    day: str,
    log_delay: int,
    schema: Schema = SCHEMA,
    aggregates_delay: int = 0,
    days: list[str] = DAYS,
    grain: Grain = "day",
) -> dict[str, dict[str, Any]]:
    """Rows of one partition by user, read off docs/design.md#point-in-time sentence by sentence."""
    world = World(tables, days, aggregates_delay, grain)
    impressions, events = world.rows["impressions"], world.rows["events"]
    result: dict[str, dict[str, Any]] = {}
    shown = [row for row in impressions if row["dt"] == day]
    for user in sorted({str(row["user_id"]) for row in shown}):
        requests: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for row in shown:
            if str(row["user_id"]) == user:
                requests.setdefault((row["ts"], row["request_id"]), []).append(row)
        row: dict[str, Any] = {"requests": []}
        ends: dict[str, list[int]] = {}
        for sequence in SCHEMA.sequences:
            action = "watch" if sequence.name == "watched" else "buy"
            own = [event for event in events if str(event["user_id"]) == user and event["action"] == action]
            own.sort(key=lambda event: (event["ts"], event["event_id"]))
            counts = [sum(event["ts"] < ts - log_delay for event in own) for ts, _ in sorted(requests)]
            first = max(0, counts[0] - sequence.length)
            ends[sequence.name] = [count - first for count in counts]
            kept = own[first : counts[-1]]
            row[timeline_column(sequence, None)] = [event["ts"] for event in kept]
            for field in sequence.fields:
                if field.of == "item":
                    profiles = [world.profile("item_id", str(event["item_id"]), event["ts"]) for event in kept]
                    values = [COLORS.index(one[field.name]) + 1 if one else 0 for one in profiles]
                else:
                    values = [event[field.name] for event in kept]
                if field.kind == "id":
                    values = [hash_id(value) for value in values]
                row[timeline_column(sequence, field)] = values
        for index, (ts, request_id) in enumerate(sorted(requests)):
            profile = world.profile("user_id", user, ts)
            known = profile is not None or world.seen("user_id", user, ts)
            counted = [one for one in schema.features if one.aggregate is not None]
            candidates = []
            for shown_row in sorted(requests[ts, request_id], key=lambda one: one["position"]):
                name = str(shown_row["item_id"])
                item = world.profile("item_id", name, ts)
                item_known = item is not None or world.seen("item_id", name, ts)
                candidates.append(
                    {
                        "item_id": name,
                        "item_known": item_known,
                        "feature__item_id": hash_id(name) if item_known else 0,
                        "feature__colors": [COLORS.index(color) + 1 for color in item["colors"]] if item else [],
                        **{
                            feature_column(one): world.value(one, user, name, ts)
                            for one in counted
                            if one.side in ("item", "cross")
                        },
                        label_column(SCHEMA.tasks[0]): shown_row["click"],
                        "weight": 1.0,
                    }
                )
            device = min(requests[ts, request_id], key=lambda one: one["position"])["device"]
            row["requests"].append(
                {
                    "request_id": request_id,
                    "ts": ts,
                    "user_known": known,
                    **{end_column(sequence): ends[sequence.name][index] for sequence in SCHEMA.sequences},
                    feature_column(SCHEMA.features[0]): hash_id(user) if known else 0,
                    feature_column(SCHEMA.features[1]): profile["age"] if profile else None,
                    feature_column(SCHEMA.features[2]): {"tv": 1, "phone": 2}.get(device, 0),
                    **{feature_column(one): world.value(one, user, "", ts) for one in counted if one.side == "user"},
                    "candidates": candidates,
                }
            )
        result[user] = row
    return result


class World:
    """Profiles and windowed aggregates of some partitions of a log, looked up row by row for every question."""

    def __init__(self, tables: dict[str, Table], days: list[str], delay: int, grain: Grain = "day") -> None:
        self.rows = {name: table.scan().collect().to_dicts() for name, table in tables.items()}
        self.numbers = {day: partition_number(day, grain) for day in days}
        self.delay = delay
        self.grain: Grain = grain

    def profile(self, key: str, value: str, ts: int) -> dict[str, Any] | None:
        """The newest snapshot of a user or item by then."""
        rows = self.rows["users" if key == "user_id" else "items"]
        known = [row for row in rows if str(row[key]) == value and row["updated_at"] <= ts]
        return max(known, key=lambda row: row["updated_at"], default=None)

    def newest(self, ts: int) -> int:
        """Number of the newest partition of the calendar, in the log or not, whose counts are known at ``ts``."""
        return partition_number(partition_of(ts - self.delay, self.grain), self.grain) - 1

    def seen(self, key: str, value: str, ts: int) -> bool:
        newest = self.newest(ts)
        return any(
            str(row[key]) == value and self.numbers[row["dt"]] <= newest
            for name in ("impressions", "events")
            for row in self.rows[name]
            if row["dt"] in self.numbers
        )

    def value(self, feature: Feature, user: str, item: str, ts: int) -> float | None:
        aggregate, newest = feature.aggregate, self.newest(ts)
        assert aggregate is not None
        if aggregate.key == "item_id":
            keys: list[str] = [item]
        else:
            profile = self.profile("item_id", item, ts) if aggregate.key else None
            keys = profile["colors"] if profile else []
        values: list[float] = []
        for row in self.rows[aggregate.of]:
            number = self.numbers.get(row["dt"], newest + 1)
            if number > newest or number <= newest - (aggregate.window or 10**9):
                continue
            if aggregate.where is not None and row["action"] != "watch":
                continue
            value = 1.0 if aggregate.column is None else row[aggregate.column]
            if value is None:
                continue
            if feature.side == "item":
                values += [value] * (str(row["item_id"]) == item)
            elif str(row["user_id"]) == user and feature.side == "user":
                values.append(value)
            elif str(row["user_id"]) == user and aggregate.key == "item_id":
                values += [value] * (str(row["item_id"]) in keys)
            elif str(row["user_id"]) == user:
                then = self.profile("item_id", str(row["item_id"]), row["ts"])
                values += [value] * len(set(keys) & set(then["colors"] if then else []))
        count, total = len(values), sum(values)
        if aggregate.function == "count":
            return float(np.log1p(count).astype(np.float32)) if feature.scale == "log" else float(count)
        if aggregate.function == "sum":
            return total
        if aggregate.prior is not None:
            count, total = count + aggregate.prior_weight, total + aggregate.prior * aggregate.prior_weight
        return float(np.float32(total / count)) if count else None


def fold_all(one: BuildSettings, days: list[str], earlier: list[str]) -> None:
    """What :func:`build_partitions` does, in this process."""
    parts = pl.concat([part for bucket in range(one.buckets) for part in item_deltas(one, bucket, days)])
    schemas = {
        ITEM_AGGREGATES: item_aggregates_schema(one.schema),
        STATE: state_schema(one.schema),
        USER_AGGREGATES: user_aggregates_schema(one.schema),
        SAMPLES: sample_schema(one.schema),
    }
    files: dict[tuple[str, str], list[DataFile]] = {(table, day): [] for table in schemas for day in days}

    def write(table: str, day: str, bucket: int, rows: pa.Table) -> None:
        if rows.num_rows:
            where = {"dt": day, "bucket": str(bucket)}
            files[table, day].append(write_file(one.table_root(table), rows, where, {}))

    for bucket in range(one.buckets):
        for day, rows in fold_items(one, bucket, parts.filter(pl.col("bucket") == bucket), days, earlier):
            write(ITEM_AGGREGATES, day, bucket, rows)
    for day in days:
        replace_partition(
            one.table_root(ITEM_AGGREGATES), day, files[ITEM_AGGREGATES, day], schemas[ITEM_AGGREGATES], {}
        )
    for bucket in range(one.buckets):
        for table, day, rows, _ in fold_bucket(one, bucket, days, earlier):
            write(table, day, bucket, rows)
    for table, day in files:
        if table != ITEM_AGGREGATES:
            replace_partition(one.table_root(table), day, files[table, day], schemas[table], {})
