"""A synthetic log of any size as Delta tables laid out by (dt, bucket).

The content of a slice follows from (seed, day, bucket) alone and is written before the next one is drawn, so memory is
bounded by a slice. Activity has a long tail: some users have hundreds of events in a partition, many have a few.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from deltalake import write_deltalake
from numpy.typing import NDArray

from features.builder.states import BuildSettings
from features.delta.table import Table
from features.delta.write import DataFile, replace_partition, write_file
from features.encoding import bucket_column
from features.schema import SECOND, EventField, Feature, Schema, Sequence, Task, partition_bounds

Array = NDArray[Any]

START = date(2026, 1, 5)
DAY = 86_400 * SECOND
EVENTS_PER_USER, CANDIDATES, REQUESTS = 200, 10, 4
"""Means: events of a user over all partitions, candidates of a request, requests of a user on a day with any."""
COUNTRIES, DEVICES = ("BR", "DE", "IN", "JP", "US"), ("phone", "tv", "web")
CATEGORIES = 200
LOG_DELAY = 60 * SECOND
MANIFEST = "world.json"
"""Written last: a folder without it is not complete."""

SCHEMA = Schema(
    features=(
        Feature(name="user_id", side="user", buckets=1_000_000),
        Feature(name="age", side="user", kind="number"),
        Feature(name="country", side="user", kind="category", vocabulary=COUNTRIES),
        Feature(name="device", side="context", kind="category", vocabulary=DEVICES),
        Feature(name="item_id", side="item", buckets=100_000),
        Feature(name="category", side="item", buckets=1_000),
        Feature(name="price", side="item", kind="number"),
    ),
    sequences=(
        Sequence(
            name="watched",
            events="events",
            length=256,
            fields=(
                EventField(name="item_id", buckets=100_000),
                EventField(name="category", buckets=1_000),
                EventField(name="seconds", kind="number"),
            ),
        ),
    ),
    tasks=(Task(name="click"), Task(name="purchase")),
)
PARTITIONED = {
    "events": pa.schema(
        {"event_id": pa.int64(), "user_id": pa.string(), "item_id": pa.string(), "category": pa.string()}
        | {"seconds": pa.float32(), "ts": pa.int64(), "dt": pa.string(), "bucket": pa.string()}
    ),
    "impressions": pa.schema(
        {"request_id": pa.string(), "user_id": pa.string(), "item_id": pa.string(), "ts": pa.int64()}
        | {"position": pa.int32(), "device": pa.string(), "click": pa.int8(), "purchase": pa.int8()}
        | {"dt": pa.string(), "bucket": pa.string()}
    ),
}


@dataclass(frozen=True)
class World:
    """Sizes of a log; rows and users grow together, the catalogue of items stays."""

    events: int
    items: int = 50_000
    days: int = 10
    buckets: int = 16
    seed: int = 0
    events_per_impression: int = 10

    @property
    def users(self) -> int:
        return max(self.buckets, self.events // EVENTS_PER_USER)

    @cached_property
    def partitions(self) -> list[str]:
        return [(START + timedelta(days=day)).isoformat() for day in range(self.days)]

    @cached_property
    def user_buckets(self) -> Array:
        """[users]: every distinct user is hashed once."""
        names = pl.DataFrame({"user_id": _names("u", np.arange(self.users))})
        return names.select(bucket_column(pl.col("user_id"), self.buckets)).to_series().to_numpy()

    @cached_property
    def activity(self) -> Array:
        """[users]: how much more than others a user does; mean about 1, long tail."""
        return np.exp(self.random("activity").normal(-0.32, 0.8, self.users))

    def random(self, what: str, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what.encode(), *numbers])


@dataclass(frozen=True)
class WrittenWorld:
    """A complete log on disk. ``impressions``: rows of every partition."""

    world: World
    root: Path
    impressions: dict[str, int]

    @property
    def tables(self) -> dict[str, Table]:
        return {name: Table(name, str(self.root / name)) for name in (*PARTITIONED, "users", "items")}

    def settings(self, output: Path) -> BuildSettings:
        buckets = self.world.buckets
        return BuildSettings(self.tables, SCHEMA, "day", buckets, LOG_DELAY, str(output), now=2**60)


def write_world(world: World, root: Path, progress: Callable[[str, int, int], None]) -> WrittenWorld:
    """Write the tables below ``root``, or use those that an earlier call with the same sizes completed there."""
    manifest, sizes = root / MANIFEST, asdict(world)
    if manifest.exists():
        found = json.loads(manifest.read_text())
        if found["sizes"] == sizes:
            return WrittenWorld(world, root, found["impressions"])
    shutil.rmtree(root, ignore_errors=True)
    _write_profiles(world, root)
    impressions = {}
    for day, partition in enumerate(world.partitions):
        files: dict[str, list[DataFile]] = {name: [] for name in PARTITIONED}
        total = world.events * (day + 1) // world.days - world.events * day // world.days
        shares = np.bincount(world.user_buckets, world.activity, world.buckets)
        counts = world.random("bucket", day).multinomial(total, shares / shares.sum())
        for bucket, events in enumerate(counts):
            users = np.flatnonzero(world.user_buckets == bucket)
            if not len(users) or not events:
                continue
            where = {"dt": partition, "bucket": str(bucket)}
            drawn = {
                "events": _events(world, day, bucket, users, int(events)),
                "impressions": _impressions(world, day, bucket, users, int(events)),
            }
            for name, rows in drawn.items():
                schema = pa.schema([field for field in PARTITIONED[name] if field.name not in where])
                content = rows.select(schema.names).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)
                files[name].append(write_file(str(root / name), content, where, {}))
        for name, schema in PARTITIONED.items():
            replace_partition(str(root / name), partition, files[name], schema, {})
        impressions[partition] = sum(file.rows for file in files["impressions"])
        progress("partitions", day + 1, world.days)
    manifest.write_text(json.dumps({"sizes": sizes, "impressions": impressions}))
    return WrittenWorld(world, root, impressions)


def _events(world: World, day: int, bucket: int, users: Array, rows: int) -> pl.DataFrame:
    random = world.random("events", day, bucket)
    weight = world.activity[users]
    user = users[np.searchsorted(np.cumsum(weight) / weight.sum(), random.random(rows)).clip(max=len(users) - 1)]
    item = _popular(world, random, rows)
    return pl.DataFrame(
        {
            "event_id": (day * world.buckets + bucket) * 10**9 + np.arange(rows),
            "user_id": _names("u", user),
            "item_id": _names("i", item),
            "category": _names("c", item % CATEGORIES),
            "seconds": random.exponential(60, rows).round(1).astype(np.float32),
            # whole seconds: events of one moment happen
            "ts": np.sort(_open(world, day) + random.integers(0, 86_400, rows) * SECOND),
        }
    )


def _impressions(world: World, day: int, bucket: int, users: Array, events: int) -> pl.DataFrame:
    random = world.random("impressions", day, bucket)
    wanted = max(1, round(events / world.events_per_impression / CANDIDATES / REQUESTS))
    # the smallest exponential times are a draw without replacement, in proportion to activity
    visiting = users[np.argsort(random.exponential(size=len(users)) / world.activity[users])[:wanted]]
    user = np.repeat(visiting, random.integers(1, 2 * REQUESTS, len(visiting)))
    requests = len(user)
    size = random.integers(CANDIDATES // 2, CANDIDATES * 3 // 2 + 1, requests)
    request = np.repeat(np.arange(requests), size)
    position = np.arange(len(request)) - np.repeat(np.cumsum(size) - size, size)
    step = random.integers(1, max(2, world.items // (2 * CANDIDATES)), requests)  # no item twice in a request
    item = (_popular(world, random, requests)[request] + position * step[request]) % world.items
    click = random.random(len(request)) < 0.1
    ts = _open(world, day) + random.integers(0, 86_400, requests) * SECOND
    return pl.DataFrame(
        {
            "request_id": _names(f"r{day}-{bucket}-", request),
            "user_id": _names("u", user[request]),
            "item_id": _names("i", item),
            "ts": ts[request],
            "position": position,
            "device": np.array(DEVICES)[random.integers(0, len(DEVICES), requests)][request],
            "click": click.astype(np.int8),
            "purchase": (click & (random.random(len(request)) < 0.2)).astype(np.int8),
        }
    )


def _write_profiles(world: World, root: Path) -> None:
    """One snapshot of everyone from before the log, and up to three later ones."""
    for name, count in (("users", world.users), ("items", world.items)):
        random = world.random(name)
        snapshots = random.integers(1, 5, count) if name == "users" else 1 + (random.random(count) < 0.2)
        entity = np.repeat(np.arange(count), snapshots)
        first = np.concatenate([[True], entity[1:] != entity[:-1]])
        updated_at = np.where(first, 0, random.integers(0, world.days * 86_400, len(entity)) * SECOND)
        updated_at += np.where(first, _open(world, 0) - DAY, _open(world, 0))
        columns: dict[str, Any] = (
            {"user_id": _names("u", entity)} if name == "users" else {"item_id": _names("i", entity)}
        )
        if name == "users":
            columns["age"] = random.integers(16, 76, len(entity)).astype(np.float64)
            columns["country"] = np.array(COUNTRIES)[random.integers(0, len(COUNTRIES), len(entity))]
        else:
            columns["category"] = _names("c", entity % CATEGORIES)
            columns["price"] = random.exponential(20, len(entity)).round(2)
        # two snapshots of one moment would leave open which one counts
        frame = pl.DataFrame(columns | {"updated_at": updated_at}).unique(
            [next(iter(columns)), "updated_at"], keep="first", maintain_order=True
        )
        write_deltalake(str(root / name), frame.to_arrow(compat_level=pl.CompatLevel.oldest()))


def _popular(world: World, random: np.random.Generator, rows: int) -> Array:
    return (random.random(rows) ** 3 * world.items).astype(np.int64)


def _open(world: World, day: int) -> int:
    return partition_bounds(world.partitions[day], "day")[0]


def _names(prefix: str, numbers: Array) -> pl.Series:
    return prefix + pl.Series(numbers).cast(pl.String)
