"""Windowed aggregates (DESIGN §2): counts and sums per user, per item, and per user and key of the item.

Folded partition by partition, so that a new partition costs in proportion to itself:

    rows of d ──► delta(d)        state(d) = state(d−1) + delta(d) − delta of the partition that leaves the window

A :class:`Tally` is that fold in memory, in Polars; the state tables hold, per owner and partition with a change,
the counts within the window and the delta. A feature's value is made of count and sum only when it is read, by
:func:`aggregate_value`, in builder and service alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa

from features.encoding import encode
from features.schema import Aggregate, Feature, Schema

KEY = "__key"
"""What is crossed with the user, as text; no column of the user's own has this name."""


def count_column(feature: Feature) -> str:
    """Rows of the window that count."""
    return f"count__{feature.name}"


def sum_column(feature: Feature) -> str:
    """Sum of the aggregate's column over them."""
    return f"sum__{feature.name}"


def key_column(feature: Feature) -> str:
    """The keys that a user has rows of (side cross), a list beside those of counts and sums."""
    return f"key__{feature.name}"


def cross_column(key: str) -> str:
    """A column of items that features cross with the user, as text, beside the encoded ones."""
    return f"cross__{key}"


def delta_column(column: str) -> str:
    """What the partition itself adds to a count or sum."""
    return f"delta_{column}"


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


def state_fields(features: Sequence[Feature], cross: Sequence[Feature] = ()) -> list[pa.Field]:
    """Columns of a state table beside owner, ts and partition: scalars of ``features``, lists of ``cross``."""
    fields = []
    for feature in features:
        for column, kind in ((count_column(feature), pa.int64()), (sum_column(feature), pa.float64())):
            fields += [pa.field(column, kind), pa.field(delta_column(column), kind)]
    for feature in cross:
        fields.append(pa.field(key_column(feature), pa.list_(pa.string())))
        for column, kind in ((count_column(feature), pa.int64()), (sum_column(feature), pa.float64())):
            fields += [pa.field(column, pa.list_(kind)), pa.field(delta_column(column), pa.list_(kind))]
    return fields


def deltas(features: Sequence[Feature], keys: Sequence[str], sources: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Counts and sums of one partition's rows per owner: ``keys`` and the :func:`value_columns`, ordered by owner.

    Args:
        sources: rows per table, with the keys as text. Every owner with a row in any of them gets one here.
    """
    parts = [rows.select(keys).unique() for rows in sources.values()]
    for feature in features:
        aggregate = aggregate_of(feature)
        rows = sources[aggregate.of]
        if aggregate.where is not None:
            rows = rows.filter(pl.sql_expr(aggregate.where))
        value = pl.lit(1.0) if aggregate.column is None else pl.col(aggregate.column).cast(pl.Float64)
        parts.append(
            rows.select(*keys, value.alias("value"))
            .filter(pl.col("value").is_finite())  # nor null; one NaN would stay in the sum for ever
            .group_by(keys, maintain_order=True)
            .agg(
                pl.len().cast(pl.Int64).alias(count_column(feature)),
                pl.col("value").sum().alias(sum_column(feature)),
            )
        )
    return summed(parts, keys, features)


def summed(parts: Sequence[pl.DataFrame], keys: Sequence[str], features: Sequence[Feature]) -> pl.DataFrame:
    """The parts added up per owner, ordered by owner; a column that a part lacks adds nothing."""
    empty = _empty(keys, features)
    stacked = pl.concat([empty, *parts], how="diagonal")
    return stacked.group_by(keys).agg(pl.col(value_columns(features)).sum()).sort(keys)


def _empty(keys: Sequence[str], features: Sequence[Feature], **others: pl.DataType) -> pl.DataFrame:
    kinds = {column: pl.Int64 if column.startswith("count") else pl.Float64 for column in value_columns(features)}
    return pl.DataFrame(schema={**dict.fromkeys(keys, pl.String), **others, **kinds})


def _any_nonzero(columns: Iterable[str]) -> pl.Expr:
    return pl.any_horizontal(pl.lit(False), *[pl.col(column) != 0 for column in columns])


@dataclass
class Tally:
    """Counts and sums of some features with the same owners, as of the newest folded partition.

    Attributes:
        keys: the columns that name an owner: user_id, item_id, or user_id and key.
        rows: per owner the newest state that any request of the next partition can read, and all after it, by ts
            (microseconds UTC, when it becomes known).
        recent: deltas of the partitions that are still in some window, with their ``number``.
        number: of the newest folded partition; None before the first.
    """

    keys: list[str]
    features: Sequence[Feature]
    rows: pl.DataFrame = field(init=False)
    recent: pl.DataFrame = field(init=False)
    number: int | None = None

    def __post_init__(self) -> None:
        self.rows = _empty(self.keys, self.features, ts=pl.Int64())
        self.recent = _empty(self.keys, self.features, number=pl.Int64())

    @property
    def windows(self) -> set[int]:
        return {aggregate.window for aggregate in map(aggregate_of, self.features) if aggregate.window is not None}

    def current(self) -> pl.DataFrame:
        """The newest state of every owner."""
        return self.rows.unique(self.keys, keep="last", maintain_order=True)

    def advance(self, delta: pl.DataFrame, number: int, ts: int) -> pl.DataFrame:
        """Fold one partition in.

        Args:
            delta: its :func:`deltas`; every owner in it counts as seen from now on.
            ts: when the new state becomes known, microseconds UTC.

        Returns:
            the owners whose state changed, or who are new: keys, ts, and the state's value columns.
        """
        moves = [delta]
        for window in self.windows:
            leaving = pl.col("number") <= number - window
            if self.number is not None:
                leaving &= pl.col("number") > self.number - window
            columns = value_columns([one for one in self.features if aggregate_of(one).window == window])
            moves.append(self.recent.filter(leaving).select(*self.keys, *[-pl.col(column) for column in columns]))
        columns = value_columns(self.features)
        moved = summed(moves, self.keys, self.features)
        adding = [move.filter(_any_nonzero(move.columns[len(self.keys) :])).select(self.keys) for move in moves]
        touched = pl.concat(adding).unique().with_columns(pl.lit(True).alias("touched"))
        before = moved.select(self.keys).join(self.current(), on=self.keys, how="left", maintain_order="left")
        moving = moved.select(self.keys).join(touched, on=self.keys, how="left", maintain_order="left")["touched"]
        changed = before["ts"].is_null() | moving.fill_null(False)
        after = before.select(
            *self.keys,
            pl.lit(ts, pl.Int64).alias("ts"),
            *[(pl.col(column).fill_null(0) + moved[column]).alias(column) for column in columns],
        )
        # what is left of a float sum after everything left the window is rounding
        after = after.with_columns(
            pl.when(pl.col(count_column(one)) != 0).then(sum_column(one)).otherwise(0.0).alias(sum_column(one))
            for one in self.features
        ).filter(changed)
        self.rows = pl.concat([self.rows, after])
        longest = max(self.windows, default=0)
        kept = self.recent.filter(pl.col("number") > number - longest)
        if longest:
            kept = pl.concat([kept, delta.select(*self.keys, pl.lit(number, pl.Int64).alias("number"), *columns)])
        self.recent, self.number = kept, number
        return after

    def forget_before(self, ts: int) -> None:
        """Drop states that no request from ``ts`` (microseconds UTC) on can read."""
        known = pl.col("ts") <= ts
        newest = self.rows.filter(known).unique(self.keys, keep="last", maintain_order=True)
        self.rows = pl.concat([newest, self.rows.filter(~known)])

    def as_of(self, moments: pl.DataFrame) -> pl.DataFrame:
        """The states known at ``moments`` (keys and ts), row by row: ``known`` and the value columns."""
        return (
            moments.select(*self.keys, "ts")
            .with_row_index("row")
            .sort("ts")
            .join_asof(
                self.rows.with_columns(pl.lit(True).alias("known")).sort("ts", maintain_order=True),
                on="ts",
                by=self.keys,
                strategy="backward",
                check_sortedness=False,
            )
            .sort("row")
            .select(pl.col("known").fill_null(False), *value_columns(self.features))
        )


def user_tallies(schema: Schema) -> tuple[Tally, list[Tally]]:
    """The tally of the user's own aggregates, and one per cross aggregate."""
    own = Tally(["user_id"], schema.aggregates("user"))
    return own, [Tally(["user_id", KEY], [feature]) for feature in schema.aggregates("cross")]


def item_tally(schema: Schema) -> Tally:
    return Tally(["item_id"], schema.aggregates("item"))
