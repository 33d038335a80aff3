"""Windowed aggregates: counts and sums per user, per item, and per user and key of the item.

They are kept per partition, so that the cost of a new partition depends on its own size; several are folded at once. A
feature without a window is a running total. For one with a window of w partitions, what each partition added is kept
with the time *until* which it counts:

    added by partition d:   count, sum,   known from ts(d) = close(d) + aggregates_delay,   until ts(d) + w partitions
    as of a moment:         the sum, oldest first, of what is known by then and whose until lies after it

So a window moves with the calendar, whatever partitions exist, and a stored state never has to be expired: builder and
online reader add up the same numbers in the same order (:func:`within`). In memory a :class:`Tally` holds them, in
Polars. The state tables hold a row per owner and partition with a change, of columns and lists (:func:`state_fields`).
Builder and service alike make a feature's value from count and sum when they read it (:func:`aggregate_value`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import polars as pl
import pyarrow as pa

from features.builder.lists import list_columns, ranges
from features.encoding import encode, encode_numbers
from features.schema import GRAIN_LENGTH, Aggregate, Feature, Grain, Schema

Entries = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""What partitions added, [E] each: number of the owner, until (microseconds UTC), count, sum."""

FOREVER = 2**63 - 1
"""Later than any time, microseconds UTC."""

KEY = "__key"
"""Column of the key that is crossed with the user, as text; no column of a log has this name."""


def count_column(feature: Feature) -> str:
    """Column of the number of rows: of the window, of all time or of one partition."""
    return f"count__{feature.name}"


def sum_column(feature: Feature) -> str:
    """Column of the sum of the aggregate's column over these rows."""
    return f"sum__{feature.name}"


def until_column(feature: Feature) -> str:
    """List column of a windowed feature's state: when each partition's rows leave the window, microseconds UTC."""
    return f"until__{feature.name}"


def counts_column(feature: Feature) -> str:
    """Beside the list of :func:`until_column`: the partitions' counts, oldest first."""
    return f"counts__{feature.name}"


def sums_column(feature: Feature) -> str:
    """Beside the list of :func:`until_column`: the partitions' sums, oldest first."""
    return f"sums__{feature.name}"


def key_column(feature: Feature) -> str:
    """List column of the keys that a user has rows of (side cross), beside the lists of counts and sums."""
    return f"key__{feature.name}"


def cross_column(key: str) -> str:
    """Name for an item's column that features cross with the user, kept as text beside the encoded columns."""
    return f"__cross__{key}"  # no name of a config begins so


def value_columns(features: Iterable[Feature]) -> list[str]:
    """The columns of counts and sums, feature by feature."""
    return [column for feature in features for column in (count_column(feature), sum_column(feature))]


def aggregate_of(feature: Feature) -> Aggregate:
    assert feature.aggregate is not None
    return feature.aggregate


def aggregate_value(feature: Feature, count: pl.Expr, total: pl.Expr) -> pl.Expr:
    """The feature as the sample table holds it (Float32, ``scale`` applied); null counts read as 0 rows.

    A mean or rate of no rows is its prior, or null without one.
    """
    aggregate = aggregate_of(feature)
    rows, total = count.fill_null(0).cast(pl.Float64), total.fill_null(0.0)
    if aggregate.function == "count":
        value = rows
    elif aggregate.function == "sum":
        value = total
    elif aggregate.prior is None:
        value = pl.when(rows > 0).then(total / rows)
    else:
        value = (total + aggregate.prior * aggregate.prior_weight) / (rows + aggregate.prior_weight)
    return encode(feature, value)


def aggregate_values(feature: Feature, counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """:func:`aggregate_value` of counts and sums [N], float32 [N]; a missing value is NaN."""
    aggregate = aggregate_of(feature)
    rows = counts.astype(np.float64)
    if aggregate.function == "count":
        values = rows
    elif aggregate.function == "sum":
        values = totals
    elif aggregate.prior is None:
        values = np.divide(totals, rows, out=np.full(len(rows), np.nan), where=rows > 0)
    else:
        values = (totals + aggregate.prior * aggregate.prior_weight) / (rows + aggregate.prior_weight)
    return encode_numbers(feature, values)


def state_columns(feature: Feature) -> dict[str, pa.DataType]:
    """A feature's columns in a state table, with the type of a value: totals, or what partitions added to a window."""
    if aggregate_of(feature).window is None:
        return {count_column(feature): pa.int64(), sum_column(feature): pa.float64()}
    return {until_column(feature): pa.int64(), counts_column(feature): pa.int64(), sums_column(feature): pa.float64()}


def state_fields(features: Sequence[Feature], cross: Sequence[Feature] = ()) -> list[pa.Field]:
    """Columns of a state table beside owner, ts and partition.

    Of ``features`` scalars, or lists where there is a window, oldest partition first; of ``cross`` always lists, with
    the key of every entry beside, ordered by key and then by time.
    """
    fields = [
        pa.field(column, kind if aggregate_of(feature).window is None else pa.list_(kind))
        for feature in features
        for column, kind in state_columns(feature).items()
    ]
    for feature in cross:
        columns = {key_column(feature): pa.string(), **state_columns(feature)}
        fields += [pa.field(column, pa.list_(kind)) for column, kind in columns.items()]
    return fields


def within(entries: Entries, ts: np.ndarray | int, owners: int) -> tuple[np.ndarray, np.ndarray]:
    """What a window holds at a moment: counts and sums [owners].

    Sums are added up one after the other in the order of the entries, so equal entries give equal bits.

    Args:
        entries: all known at the moment.
        ts: microseconds UTC, one or [E].
    """
    owner, until, counts, sums = entries
    inside = until > ts
    if not inside.all():
        owner, counts, sums = owner[inside], counts[inside], sums[inside]
    count = np.bincount(owner, counts, owners).astype(np.int64)  # exact below 2^53
    return count, np.bincount(owner, sums, owners)


def deltas(
    features: Sequence[Feature], keys: Sequence[str], sources: Mapping[str, pl.DataFrame], known: pl.Expr
) -> pl.DataFrame:
    """Counts and sums of every partition's rows per owner: ``keys``, ``ts`` (when it becomes known) and the
    :func:`value_columns`, ordered by owner and ts.

    Args:
        sources: rows per table, with the keys as text. Every owner with a row in any of them gets one here.
        known: when a row's partition becomes known, microseconds UTC.
    """
    owner = [*keys, "ts"]
    parts = [rows.select(*keys, known.alias("ts")).unique() for rows in sources.values()]
    for feature in features:
        aggregate = aggregate_of(feature)
        rows = sources[aggregate.of]
        if aggregate.where is not None:
            rows = rows.filter(pl.sql_expr(aggregate.where))
        value = pl.lit(1.0) if aggregate.column is None else pl.col(aggregate.column).cast(pl.Float64)
        parts.append(
            rows.select(*keys, known.alias("ts"), value.alias("value"))
            # nor null; one NaN would stay in the sum for ever, and what no feature can hold takes others with it
            .filter(pl.col("value").cast(pl.Float32).is_finite())
            .group_by(owner, maintain_order=True)
            .agg(
                pl.len().cast(pl.Int64).alias(count_column(feature)),
                pl.col("value").sum().alias(sum_column(feature)),
            )
        )
    return summed(parts, keys, features)


def summed(parts: Sequence[pl.DataFrame], keys: Sequence[str], features: Sequence[Feature]) -> pl.DataFrame:
    """The parts added up per owner and ts, ordered by them; a column that a part lacks adds nothing."""
    owner, empty = [*keys, "ts"], _empty(keys, features, ts=pl.Int64())
    stacked = pl.concat([empty, *parts], how="diagonal")
    return stacked.group_by(owner, maintain_order=True).agg(pl.col(value_columns(features)).sum()).sort(owner)


def _empty(keys: Sequence[str], features: Sequence[Feature], **others: pl.DataType) -> pl.DataFrame:
    kinds = {column: pl.Int64 if column.startswith("count") else pl.Float64 for column in value_columns(features)}
    return pl.DataFrame(schema={**dict.fromkeys(keys, pl.String), **others, **kinds})


def _any_nonzero(columns: Iterable[str]) -> pl.Expr:
    return pl.any_horizontal(pl.lit(False), *[pl.col(column) != 0 for column in columns])


@dataclass(frozen=True)
class Spans:
    """What counts for owners, each for some time: rows of ``lists`` [E], ordered by owner, key and time.

    Attributes:
        owners: their name, first row and the row after the last.
        since, until: it counts at ``since ≤ ts < until``, microseconds UTC, [E].
    """

    owners: pl.DataFrame
    since: np.ndarray
    until: np.ndarray
    lists: pl.DataFrame

    @staticmethod
    def of(owner: pl.Series, since: np.ndarray, until: np.ndarray, lists: pl.DataFrame) -> Spans:
        runs = owner.alias("owner").rle().struct.unnest()
        stop = pl.col("len").cast(pl.Int64).cum_sum()
        owners = runs.select(pl.col("value").alias("owner"), (stop - pl.col("len")).alias("start"), stop.alias("stop"))
        return Spans(owners, since, until, lists)

    def at(self, owners: pl.Series, ts: int) -> dict[str, pa.ListArray]:
        """What counts at a moment for some owners, as list columns."""
        asked = owners.alias("owner").to_frame()
        found = asked.join(self.owners, on="owner", how="left", maintain_order="left").fill_null(0)
        start, stop = found["start"].to_numpy(), found["stop"].to_numpy()
        rows, owner = ranges(start, stop), np.repeat(np.arange(len(start)), stop - start)
        counts = (self.since[rows] <= ts) & (ts < self.until[rows])
        return list_columns(self.lists, rows[counts], np.bincount(owner[counts], minlength=len(start)))


@dataclass
class Tally:
    """Counts and sums of some features with the same owners.

    Attributes:
        keys: the columns that name an owner: user_id, item_id, or user_id and key.
        length: of a partition, microseconds.
        rows: per owner the newest totals that any request to come can read, and all after it, by ts (microseconds
            UTC, when it becomes known). Who has a row has been seen; of users and keys only totals need any.
        entries: of the features with a window what each partition added, oldest first, with its ts. Value columns of
            0 are no entries.
    """

    keys: list[str]
    features: Sequence[Feature]
    length: int
    rows: pl.DataFrame = field(init=False)
    entries: pl.DataFrame = field(init=False)

    def __post_init__(self) -> None:
        self.windows = {
            feature: window for feature in self.features if (window := aggregate_of(feature).window) is not None
        }
        self.totals = [feature for feature in self.features if feature not in self.windows]
        self.rows = _empty(self.keys, self.totals, ts=pl.Int64())
        self.entries = _empty(self.keys, list(self.windows), ts=pl.Int64())

    def current(self) -> pl.DataFrame:
        """The newest totals of every owner."""
        return self.rows.unique(self.keys, keep="last", maintain_order=True)

    def everyone(self, ts: int) -> pl.DataFrame:
        """Keys and ts of all that have been seen when this partition becomes known (microseconds UTC)."""
        seen = self.rows.filter(pl.col("ts") <= ts).select(self.keys).unique()
        return seen.with_columns(pl.lit(ts, pl.Int64).alias("ts"))

    def advance(self, delta: pl.DataFrame) -> pl.DataFrame:
        """Fold partitions in, which come after those folded so far.

        Args:
            delta: their :func:`deltas`; every owner in it counts as seen from then on.

        Returns:
            keys and ts of the owners whose state changed, or who are new.
        """
        before = delta.select(self.keys).join(self.current(), on=self.keys, how="left", maintain_order="left")
        is_first = pl.struct(self.keys).is_first_distinct()
        changed = delta.select(_any_nonzero(value_columns(self.features)).alias("changed"))["changed"]
        if KEY not in self.keys:
            changed |= delta.select(is_first).to_series() & before["ts"].is_null()
        delta, before = delta.filter(changed), before.filter(changed)
        if self.totals or KEY not in self.keys:
            totals = value_columns(self.totals)
            # added up one after the other, as if they were folded one by one: equal bits
            added = [
                pl.when(is_first).then(before[column].fill_null(0) + pl.col(column)).otherwise(column).alias(column)
                for column in totals
            ]
            after = delta.select(*self.keys, "ts", *added)
            self.rows = pl.concat([self.rows, after.with_columns(pl.col(totals).cum_sum().over(self.keys))])
        windowed = delta.filter(_any_nonzero(value_columns(self.windows)))
        self.entries = pl.concat([self.entries, windowed.select(self.entries.columns)])
        return delta.select(*self.keys, "ts")

    def totals_at(self, owners: pl.DataFrame) -> pl.DataFrame:
        """The totals of owners (user_id or item_id, ts) as of their ``ts``, when a folded partition becomes known."""
        asked = owners.with_row_index("__row").sort("ts")
        rows = self.rows.sort("ts", maintain_order=True)
        return asked.join_asof(rows, on="ts", by=self.keys, check_sortedness=False).sort("__row").drop("__row")

    def spans(self) -> list[Spans]:
        """The features whose state is a list, in order of declaration: those with a window, and all of side cross."""
        found = []
        for feature in self.features:
            columns = [count_column(feature), sum_column(feature)]
            if feature in self.windows:
                rows = self.entries.filter(pl.col(columns[0]) != 0).sort(*self.keys, "ts")
                until = pl.col("ts") + self.windows[feature] * self.length
                rows = rows.with_columns(until.alias("until"))
            elif KEY in self.keys:
                rows = self.rows.sort(*self.keys, "ts")
                following = pl.col("ts").shift(-1).over(self.keys).fill_null(FOREVER)
                rows = rows.with_columns(following.alias("until")).filter(pl.col(columns[0]) != 0)
            else:
                continue
            stored = [*([KEY] if KEY in self.keys else []), *(["until"] if feature in self.windows else []), *columns]
            names = [*([key_column(feature)] if KEY in self.keys else []), *state_columns(feature)]
            lists = rows.select(pl.col(column).alias(name) for column, name in zip(stored, names, strict=True))
            found.append(Spans.of(rows[self.keys[0]], rows["ts"].to_numpy(), rows["until"].to_numpy(), lists))
        return found

    def load(self, states: pl.DataFrame, since: int = 0) -> None:
        """Take in rows of the state table, ordered by ts and after those known.

        Args:
            since: of lists take only what partitions added that became known from then on (microseconds UTC); those
                before are known.
        """
        if KEY in self.keys:
            (feature,) = self.features
            lists = [key_column(feature), *state_columns(feature)]
            states = _exploded(states.select("user_id", "ts", *lists), lists).rename({lists[0]: KEY})
        if self.totals or KEY not in self.keys:
            self.rows = pl.concat([self.rows, states.select(self.rows.columns)])
        added = []
        for feature, window in self.windows.items():
            lists = list(state_columns(feature))
            long = states.select(*self.keys, *lists)
            long = long if KEY in self.keys else _exploded(long, lists)
            until, *values = lists
            names = dict(zip(values, value_columns([feature]), strict=True))
            long = long.with_columns((pl.col(until) - window * self.length).alias("ts")).drop(until).rename(names)
            # a state that is not known yet repeats what the one before it has
            added.append(long.filter(pl.col("ts") >= since).unique([*self.keys, "ts"]))
        stacked = pl.concat([self.entries.clear(), *added], how="diagonal")  # a row is of one feature
        entries = stacked.group_by([*self.keys, "ts"]).agg(pl.col(value_columns(self.windows)).sum()).sort("ts")
        self.entries = pl.concat([self.entries, entries])

    def forget_before(self, ts: int) -> None:
        """Drop what no request from ``ts`` (microseconds UTC) on can read."""
        known = pl.col("ts") <= ts
        newest = self.rows.filter(known).unique(self.keys, keep="last", maintain_order=True)
        self.rows = pl.concat([newest, self.rows.filter(~known)])
        longest = max(self.windows.values(), default=0) * self.length
        self.entries = self.entries.filter(pl.col("ts") + longest > ts)

    def as_of(self, moments: pl.DataFrame) -> pl.DataFrame:
        """The states known at ``moments`` (keys and ts), row by row: ``known`` and the value columns."""
        # states become known one partition apart: moments between two of these times read the same
        phase = next((int(frame["ts"][0]) for frame in (self.rows, self.entries) if frame.height), 0) % self.length
        asked = moments.select(*self.keys, pl.col("ts") - (pl.col("ts") - phase) % self.length)
        distinct = asked.unique(maintain_order=True).sort("ts", maintain_order=True)
        found = distinct.join_asof(
            self.rows.with_columns(pl.lit(True).alias("known")).sort("ts", maintain_order=True),
            on="ts",
            by=self.keys,
            strategy="backward",
            check_sortedness=False,
        )
        if self.windows:
            known = self.entries.rename({"ts": "since"})
            entries = distinct.with_row_index("owner").join(known, on=self.keys, maintain_order="right")
            longest = max(self.windows.values()) * self.length
            since = pl.col("since")
            entries = entries.filter((since <= pl.col("ts")) & (since + longest > pl.col("ts")))
            owner, opened, ts = (entries[name].to_numpy() for name in ("owner", "since", "ts"))
            for feature, window in self.windows.items():
                counts, sums = (entries[name].to_numpy() for name in value_columns([feature]))
                added = owner, opened + window * self.length, counts, sums
                inside = within(added, ts, distinct.height)
                columns = zip(value_columns([feature]), inside, strict=True)
                found = found.with_columns(pl.Series(name, values) for name, values in columns)
        return asked.join(found, on=[*self.keys, "ts"], how="left", maintain_order="left").select(
            pl.col("known").fill_null(False), *value_columns(self.features)
        )


def _exploded(rows: pl.DataFrame, lists: Sequence[str]) -> pl.DataFrame:
    """One row per entry of parallel lists; none for an empty or missing list."""
    return rows.explode(lists, empty_as_null=False, keep_nulls=False)


def user_tallies(schema: Schema, grain: Grain) -> tuple[Tally, list[Tally]]:
    """The tally of the user's own aggregates, and one per cross aggregate."""
    per_user = Tally(["user_id"], schema.aggregates("user"), _length(grain))
    return per_user, [Tally(["user_id", KEY], [feature], _length(grain)) for feature in schema.aggregates("cross")]


def item_tally(schema: Schema, grain: Grain) -> Tally:
    return Tally(["item_id"], schema.aggregates("item"), _length(grain))


def _length(grain: Grain) -> int:
    """Microseconds of a partition."""
    return GRAIN_LENGTH[grain] // timedelta(microseconds=1)
