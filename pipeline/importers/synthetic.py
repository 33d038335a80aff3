"""A seeded simulator of a shop with videos: what it writes looks like a recommender's log, and can be learned.

Users and items have latent vectors; users drift smoothly from day to day. A request shows 10 to 30 items;
a click depends on taste · item, the item's quality, the device and the position; a purchase follows some
clicks. Watches follow clicks and also happen on their own, after taste, as searches do. New users and items
appear every day, and prices change. The true click probabilities are kept, so the best attainable AUC is known.

Everything about a user or an item is a closed function of (seed, id, day), and what chance adds on a day
depends only on (seed, day, bucket). So a day has the same content however and whenever it is written, and
one more day changes none before it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import xxhash
from deltalake import DeltaTable
from numpy.typing import NDArray

from features.delta.paths import address
from features.delta.write import DataFile, replace_partition, write_file
from features.encoding import bucket_column
from features.errors import ConfigError, CorankError
from features.schema import SECOND
from features.tasks import each, ray_runs
from pipeline.importers.target import imported, table_path, write_table
from pipeline.runtime import RayConfig, ensure_ray, stop_ray

LATENT = 8
"""Width of taste and item vectors."""
CATEGORIES = 20
COUNTRIES = ("AR", "BR", "DE", "FR", "IN", "JP", "NG", "US")
DEVICES = ("desktop", "mobile", "tablet", "tv")
DEVICE_BIAS = np.array([0.0, 0.3, -0.1, -0.6])
CANDIDATES = (10, 30)
"""Fewest and most shown items of one request."""
NEW_SHARE = 0.01
"""New users and new items of a day, as a share of those of the first day."""
WATCHES_PER_DAY, SEARCHES_PER_DAY = 2.0, 0.5
"""Mean number per user and day of what happens without a request."""
DAY = 86_400 * SECOND
LAST_REQUEST = DAY - 3_600 * SECOND
"""No request begins later in the day, so that all its consequences fall into the same day."""
REPORT_SECONDS = 2.0
WORTH_RAY = 20_000
"""Users × days from which on it is worth starting Ray."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The step of splitmix64."""

STRING, LONG = pa.string(), pa.int64()
PARTITION = {"dt": STRING, "bucket": STRING}
EVENT = {"event_id": STRING, "user_id": STRING, "item_id": STRING, "category": STRING}
SCHEMAS = {
    table: pa.schema(columns | PARTITION)
    for table, columns in {
        "truth": {
            "request_id": STRING,
            "item_id": STRING,
            "click_probability": pa.float64(),
            "click_probability_at_top": pa.float64(),
        },
        "watches": EVENT | {"duration": pa.float32(), "ts": LONG},
        "searches": EVENT | {"ts": LONG},
        "purchases": EVENT | {"price": pa.float32(), "ts": LONG},
        "impressions": {"request_id": STRING, "user_id": STRING, "item_id": STRING, "ts": LONG}
        | {"position": pa.int32(), "device": STRING, "click": pa.int8(), "purchase": pa.int8()},
    }.items()
}
"""Tables with partitions, in the order in which a day is committed: its impressions make a day complete."""

Array = NDArray[Any]


@dataclass(frozen=True)
class World:
    """The parameters of a simulation, and all that follows from them without chance.

    Ids are numbers here: users and items 0 … n − 1 in order of appearance. Days are numbered from 0.
    """

    users: int
    items: int
    seed: int
    start: str
    buckets: int
    requests_per_user: float
    drift: float = 1.0

    def marker(self) -> str:
        """Names the simulation in the tables' commits."""
        return json.dumps(
            {"synthetic": {name: value for name, value in asdict(self).items() if (name, value) != ("drift", 1.0)}},
            sort_keys=True,
        )

    def partition(self, day: int) -> str:
        """Name of a day's partition."""
        return (date.fromisoformat(self.start) + timedelta(days=day)).isoformat()

    def opening(self, day: int | Array) -> int | Array:
        """First microsecond of a day."""
        return int(datetime.fromisoformat(self.start).replace(tzinfo=UTC).timestamp()) * SECOND + day * DAY

    def user_count(self, day: int) -> int:
        """Users that have appeared by the end of a day."""
        return self.users + day * _new_per_day(self.users)

    def item_count(self, day: int) -> int:
        """Items that have appeared by the opening of a day."""
        return self.items + day * _new_per_day(self.items)

    def user_first_day(self, user: Array) -> Array:
        """Day on which each user appears."""
        return np.asarray(np.maximum(0, (user - self.users) // _new_per_day(self.users) + 1))

    def item_first_day(self, item: Array) -> Array:
        """Day at whose opening each item appears."""
        return np.asarray(np.maximum(0, (item - self.items) // _new_per_day(self.items) + 1))

    def user_appears(self, user: Array) -> Array:
        """Microseconds: the first users at the start, later ones some time in the first half of their day."""
        day = self.user_first_day(user)
        within = self._uniform("user appears", user)[:, 0] * DAY / 2
        return self.opening(day) + np.where(day > 0, within, 0).astype(np.int64)

    def age(self, user: Array) -> Array:
        """Years: 16 to 75, more young than old."""
        return (16 + 60 * self._uniform("age", user)[:, 0] ** 1.5).astype(np.int32)

    def country(self, user: Array) -> Array:
        """Index into COUNTRIES."""
        return (self._uniform("country", user)[:, 0] * len(COUNTRIES)).astype(np.int64)

    def activity(self, user: Array) -> Array:
        """How much more than others a user does; mean 1, long tail."""
        return np.exp(0.8 * self._normal("activity", user)[:, 0] - 0.32)

    def taste(self, user: Array, day: int) -> Array:
        """[users, LATENT]: what profile and person give, turning slowly."""
        by_age = (self.age(user)[:, None] - 40) / 15 * self._normal("taste of age", np.arange(1), LATENT)
        by_country = self._normal("taste of country", np.arange(len(COUNTRIES)), LATENT)[self.country(user)]
        period, phase = (self._uniform("drift", user, 2) * [40, 2 * np.pi] + [20, 0]).T
        drift = np.sin(2 * np.pi * day / period + phase)[:, None] * self._normal("drift", user, LATENT)
        return np.asarray(
            0.35 * by_age + 0.35 * by_country + 0.8 * self._normal("taste", user, LATENT) + 0.4 * self.drift * drift
        )

    def category(self, item: Array) -> Array:
        """0 … CATEGORIES − 1; the first ones hold more items."""
        return (self._uniform("category", item)[:, 0] ** 1.3 * CATEGORIES).astype(np.int64)

    def category_vectors(self) -> Array:
        """[CATEGORIES, LATENT]"""
        return self._normal("category", np.arange(CATEGORIES), LATENT)

    def item_vectors(self, item: Array) -> Array:
        """[items, LATENT]: the category's and the item's own."""
        return 0.8 * self.category_vectors()[self.category(item)] + 0.6 * self._normal("item", item, LATENT)

    def quality(self, item: Array, day: int) -> Array:
        """What everybody likes about an item; it fades a little every day."""
        return self._normal("quality", item)[:, 0] - 0.01 * (day - self.item_first_day(item))

    def price(self, item: Array, day: int) -> Array:
        """An item keeps a price for 5 to 30 days, then takes another one within 25 % of the first."""
        return self._price(item, self._price_number(item, day))

    def price_changes(self, item: Array, day: int) -> Array:
        """Which items have another price than the day before, newly appeared ones included."""
        return np.asarray(
            (self.item_first_day(item) == day) | (self._price_number(item, day) != self._price_number(item, day - 1))
        )

    def _price_number(self, item: Array, day: int) -> Array:
        period, offset = (self._uniform("price period", item, 2) * [25, 30] + [5, 0]).T
        return np.asarray(((day - self.item_first_day(item) + offset) // period - offset // period).astype(np.int64))

    def _price(self, item: Array, number: Array) -> Array:
        first = np.exp(3 + 0.8 * self._normal("price", item)[:, 0])
        change = 0.75 + 0.5 * self._uniform("price change", item * 1_000_003 + number)[:, 0]
        return np.round(first * np.where(number == 0, 1, change), 2).astype(np.float32)

    def _uniform(self, name: str, index: Array, columns: int = 1) -> Array:
        """[indices, columns] in (0, 1): a closed function of (seed, name, index), by splitmix64."""
        key = np.uint64(xxhash.xxh64_intdigest(name.encode(), seed=0))
        columns_of_name = _mix((np.uint64(self.seed) + np.arange(columns, dtype=np.uint64) * GOLDEN) ^ key)
        words = _mix(_mix(columns_of_name[None, :] + index.astype(np.uint64)[:, None] * GOLDEN))
        return ((words >> np.uint64(11)) + 0.5) * 2.0**-53

    def _normal(self, name: str, index: Array, columns: int = 1) -> Array:
        """[indices, columns], standard normal (Box–Muller)."""
        uniform = self._uniform(f"{name} ~", index, 2 * columns)
        return np.asarray(np.sqrt(-2 * np.log(uniform[:, :columns])) * np.cos(2 * np.pi * uniform[:, columns:]))


def import_synthetic(
    target: str | Path,
    days: int = 14,
    users: int = 2_000,
    items: int = 1_000,
    seed: int = 0,
    start: str = "2026-01-05",
    buckets: int = 4,
    requests_per_user: float = 1.0,
    drift: float = 1.0,
    say: Callable[[str], None] = print,
) -> dict[str, int]:
    """Simulate days of behaviour into Delta tables, in parallel on Ray.

    Tables: impressions, watches, searches, purchases and truth, partitioned by day and user bucket; users and
    items, profile snapshots. ``truth`` holds the probability of each click, and the one it would have at the top of
    the list: the best that a model without positions can know. Days that are there already are
    left alone, so importing more days later adds just those.

    Args:
        target: folder of the tables, local or ``s3://``.
        days: number of days, from ``start`` on.
        users, items: those of the first day; every day 1 % of this many are new.
        start: first day, as YYYY-MM-DD.
        buckets: user-hash buckets; best the number in the config.
        requests_per_user: mean number per user and day.
        drift: how far tastes turn over the weeks; 0: not at all.
        say: takes lines of progress.

    Returns:
        rows per table, of all days that the target holds.

    Raises:
        ConfigError: a parameter makes no sense.
        CorankError: the target holds another simulation, or tables that no import wrote.
    """
    world = World(users, items, seed, start, buckets, requests_per_user, drift)
    _check(world, days)
    marker = world.marker()
    paths = {table: table_path(target, table) for table in ("users", "items", *SCHEMAS)}
    earlier = imported(paths["users"])
    if earlier not in (None, marker):
        raise CorankError(
            f"{target} holds another import:\n  there {earlier}\n  now   {marker}\n"
            "Give the same parameters (only days may differ), or another target."
        )
    _append_new(paths["users"], _user_rows(world, days), ["user_id"], marker)
    _append_new(paths["items"], _item_rows(world, days), ["item_id", "updated_at"], marker)
    there = _partitions(paths["impressions"])
    missing = [day for day in range(days) if world.partition(day) not in there]
    if missing:
        starts_ray = not ray_runs() and users * len(missing) > WORTH_RAY
        if starts_ray:
            ensure_ray(RayConfig())
        try:
            _write_days(world, missing, paths, say)
        finally:
            if starts_ray:
                stop_ray()
    else:
        say(f"{target} already holds these {days} days; nothing to do")
    return {table: DeltaTable(address(path)).count() for table, path in paths.items()}


def simulate(world: World, day: int, user: Array, bucket: int) -> dict[str, pa.Table]:
    """What the users of one bucket do on one day.

    Args:
        user: numbers of the bucket's users that have appeared by then, ascending.

    Returns:
        per table of SCHEMAS its rows, without the partition columns.
    """
    # The order of the draws below is part of the content: whatever is added comes last.
    chance = np.random.default_rng([world.seed, day, bucket])
    item = np.arange(world.item_count(day))
    vectors, quality, category = world.item_vectors(item), world.quality(item, day), world.category(item)
    price, taste, activity = world.price(item, day), world.taste(user, day), world.activity(user)
    pick = _Picker(category, quality, taste @ world.category_vectors().T)
    begin = np.maximum(world.opening(day), world.user_appears(user))
    end = world.opening(day) + LAST_REQUEST

    def moments(who: Array) -> Array:
        return np.asarray(begin[who] + (chance.random(len(who)) * (end - begin[who])).astype(np.int64))

    def affinity(who: Array, what: Array) -> Array:
        return np.asarray(np.einsum("nd,nd->n", taste[who], vectors[what]) / np.sqrt(LATENT))

    # R requests, then their C candidates; `who` are positions in `user`.
    requests = chance.poisson(world.requests_per_user * activity)
    who = np.repeat(np.arange(len(user)), requests)
    ts = moments(who)
    order = np.argsort(ts, kind="stable")
    who, ts = who[order], ts[order]
    device = chance.choice(len(DEVICES), len(who), p=[0.3, 0.5, 0.1, 0.1])
    shown = np.repeat(np.arange(len(who)), chance.integers(CANDIDATES[0], CANDIDATES[1], len(who), endpoint=True))
    candidates = (
        pl.DataFrame({"request": shown, "item": pick(chance, who[shown], warmth=0.5)})
        .unique(maintain_order=True)
        .with_columns(position=pl.int_range(pl.len(), dtype=pl.Int32).over("request"))
    )
    shown, chosen, position = (candidates[column].to_numpy() for column in candidates.columns)
    match = affinity(who[shown], chosen)
    at_top = -2.0 + 1.3 * match + 0.5 * quality[chosen] + DEVICE_BIAS[device[shown]]
    probability = _sigmoid(at_top - 0.3 * np.log1p(position))
    click = chance.random(len(shown)) < probability
    bought = click & (chance.random(len(shown)) < _sigmoid(-2.5 + 0.8 * match - 0.5 * (np.log(price[chosen]) - 3)))

    # A clicked video is watched from a few seconds after the request on, one after the other.
    clicked, paid = np.flatnonzero(click), np.flatnonzero(bought)
    watch_ts = ts[shown[clicked]] + (5 * SECOND * (1 + position[clicked] + chance.random(len(clicked)))).astype(
        np.int64
    )
    buy_ts = ts[shown[paid]] + ((300 + 900 * chance.random(len(paid))) * SECOND).astype(np.int64)

    watcher = np.repeat(np.arange(len(user)), chance.poisson(WATCHES_PER_DAY * activity))
    watched = pick(chance, watcher, warmth=1.5)
    own_ts = moments(watcher)
    searcher = np.repeat(np.arange(len(user)), chance.poisson(SEARCHES_PER_DAY * activity))
    found = pick(chance, searcher, warmth=2.0)

    all_who, all_watched = np.concatenate([who[shown[clicked]], watcher]), np.concatenate([chosen[clicked], watched])
    duration = np.exp(3 + 0.5 * affinity(all_who, all_watched) + 0.5 * chance.standard_normal(len(all_who)))

    def events(kind: str, who: Array, what: Array, ts: Array, **fields: Array) -> pa.Table:
        names = {
            "user_id": _names("u", user[who]),
            "item_id": _names("i", what),
            "category": _names("c", category[what]),
        }
        rows = pl.DataFrame(names | fields | {"ts": ts}).sort("ts", "user_id", "item_id")
        event_id = pl.format(f"{kind}-{world.partition(day)}-{bucket}-{{}}", _padded(pl.int_range(pl.len())))
        return _as_arrow(rows.with_columns(event_id=event_id), kind)

    request_id = pl.format(f"r-{world.partition(day)}-{bucket}-{{}}", _padded(pl.col("request")))
    impressions = candidates.select(
        request_id=request_id,
        user_id=_names("u", user[who[shown]]),
        item_id=_names("i", chosen),
        ts=pl.Series(ts[shown], dtype=pl.Int64),
        position="position",
        device=pl.Series(np.array(DEVICES)[device[shown]], dtype=pl.String),
        click=pl.Series(click),
        purchase=pl.Series(bought),
        click_probability=pl.Series(probability),
        click_probability_at_top=pl.Series(_sigmoid(at_top)),
    )
    return {
        "truth": _as_arrow(impressions, "truth"),
        "watches": events("watches", all_who, all_watched, np.concatenate([watch_ts, own_ts]), duration=duration),
        "searches": events("searches", searcher, found, moments(searcher)),
        "purchases": events("purchases", who[shown[paid]], chosen[paid], buy_ts, price=price[chosen[paid]]),
        "impressions": _as_arrow(impressions, "impressions"),
    }


class _Picker:
    """Draws items for users: a category after their taste, then an item of it after its quality."""

    def __init__(self, category: Array, quality: Array, liking: Array) -> None:
        """category, quality [items]; liking [users, CATEGORIES]."""
        self.order = np.argsort(category, kind="stable")
        self.weights = np.concatenate([[0.0], np.cumsum(np.exp(0.5 * quality[self.order]))])
        self.first = np.searchsorted(category[self.order], np.arange(CATEGORIES + 1))
        self.liking = np.where(np.diff(self.first) > 0, liking / np.sqrt(LATENT), -np.inf)

    def __call__(self, chance: np.random.Generator, who: Array, warmth: float) -> Array:
        """One item for each entry of ``who`` [n]; the warmer, the closer to taste."""
        share = np.exp(warmth * self.liking)
        cumulated = np.cumsum(share / share.sum(axis=1, keepdims=True), axis=1)[:, :-1]
        category = (cumulated[who] < chance.random((len(who), 1))).sum(axis=1)
        low, high = self.weights[self.first[category]], self.weights[self.first[category + 1]]
        place = np.searchsorted(self.weights, low + chance.random(len(who)) * (high - low), side="right") - 1
        # Rounding may step over the end of the category by one.
        return np.asarray(self.order[np.clip(place, self.first[category], self.first[category + 1] - 1)])


def _write_days(world: World, days: list[int], paths: dict[str, str], say: Callable[[str], None]) -> None:
    """Each (day, bucket) writes Parquet files, in a Ray task where Ray runs; each (table, day) becomes visible in one
    commit."""
    everyone = pl.DataFrame({"user_id": _names("u", np.arange(world.user_count(max(days))))})
    bucket_of_user = everyone.select(bucket_column(pl.col("user_id"), world.buckets)).to_series().to_numpy()
    members = [np.flatnonzero(bucket_of_user == bucket) for bucket in range(world.buckets)]
    calls = ((world, day, members[bucket], bucket, paths) for day in days for bucket in range(world.buckets))
    told = time.monotonic()
    with closing(each(_write_slice, calls, ray_runs())) as slices:
        for done, day in enumerate(days, start=1):
            files: list[dict[str, DataFile]] = []
            for written in islice(slices, world.buckets):
                files.append(written)
                if time.monotonic() - told > REPORT_SECONDS:
                    told = time.monotonic()
                    say(f"{world.partition(day)} ({done}/{len(days)}): {len(files)} of {world.buckets} buckets written")
            for table, schema in SCHEMAS.items():
                replace_partition(paths[table], world.partition(day), [of[table] for of in files], schema, {})
            rows = {table: sum(of[table].rows for of in files) for table in SCHEMAS if table != "truth"}
            counts = ", ".join(f"{count:,} {table}" for table, count in rows.items())
            say(f"{world.partition(day)} ({done}/{len(days)}): {counts}")


def _write_slice(world: World, day: int, members: Array, bucket: int, paths: dict[str, str]) -> dict[str, DataFile]:
    user = members[members < world.user_count(day)]
    partition = {"dt": world.partition(day), "bucket": str(bucket)}
    tables = simulate(world, day, user, bucket)
    return {table: write_file(paths[table], rows, partition, {}) for table, rows in tables.items()}


def _user_rows(world: World, days: int) -> pl.DataFrame:
    user = np.arange(world.user_count(days - 1))
    return pl.DataFrame(
        {
            "user_id": _names("u", user),
            "age": world.age(user),
            "country": np.array(COUNTRIES)[world.country(user)],
            "updated_at": world.user_appears(user),
        }
    )


def _item_rows(world: World, days: int) -> pl.DataFrame:
    """An item has a row when it appears, at the opening of its day, and one for every new price."""

    def of_day(day: int) -> pl.DataFrame:
        item = np.arange(world.item_count(day))
        item = item[world.price_changes(item, day)]
        return pl.DataFrame(
            {
                "item_id": _names("i", item),
                "category": _names("c", world.category(item)),
                "price": world.price(item, day),
                "updated_at": np.full(len(item), world.opening(day)),
            }
        )

    return pl.concat([of_day(day) for day in range(days)])


def _append_new(path: str, rows: pl.DataFrame, key: list[str], marker: str) -> None:
    """Append the rows whose key is not in the table yet; no commit where there are none."""
    if DeltaTable.is_deltatable(address(path)):
        rows = rows.join(pl.read_delta(path).select(key), on=key, how="anti")
    if rows.height:
        write_table(path, rows, marker, append=True)


def _partitions(path: str) -> set[str]:
    if not DeltaTable.is_deltatable(address(path)):
        return set()
    return {str(partition["dt"]) for partition in DeltaTable(address(path)).partitions()}


def _check(world: World, days: int) -> None:
    for name, value in {**asdict(world), "days": days}.items():
        if name in ("days", "users", "items", "buckets") and value < 1:
            raise ConfigError(f"{name} is {value}: at least 1 is needed")
    if world.seed < 0 or world.requests_per_user <= 0:
        raise ConfigError(
            f"seed ({world.seed}) is 0 or more, requests_per_user ({world.requests_per_user}) more than 0"
        )
    if not 0 <= world.drift < float("inf"):
        raise ConfigError(f"drift is {world.drift}: 0 or more is needed")
    try:
        date.fromisoformat(world.start)
    except ValueError:
        raise ConfigError(f"start is {world.start!r}: a day is written like 2026-01-05") from None


def _as_arrow(rows: pl.DataFrame, table: str) -> pa.Table:
    """The columns of a table in its own types and order, without those of the partition."""
    schema = pa.schema([column for column in SCHEMAS[table] if column.name not in PARTITION])
    return rows.select(schema.names).to_arrow().cast(schema)


def _names(prefix: str, numbers: Array) -> pl.Series:
    return prefix + pl.Series(numbers).cast(pl.String)


def _padded(numbers: pl.Expr) -> pl.Expr:
    """Text that sorts like the numbers."""
    return numbers.cast(pl.String).str.zfill(8)


def _new_per_day(first: int) -> int:
    return max(1, round(first * NEW_SHARE))


def _sigmoid(logit: Array) -> Array:
    return 1 / (1 + np.exp(-logit))


def _mix(words: Array) -> Array:
    """splitmix64's finaliser."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(words ^ (words >> np.uint64(31)))
