"""The builder's own tables: their layout, and how a fold goes on from where earlier partitions left them.

Per owner and partition with a change one row, versioned by ``dt``; now and then a snapshot of all owners. So reading
the newest states goes back a bounded number of partitions, and a new partition writes in proportion to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl
import pyarrow as pa

from features.builder.aggregates import Tally, state_fields
from features.delta.table import Table
from features.sample_table import code_type, event_id_column, timeline_column
from features.schema import Grain, Schema, partition_bounds, partition_number
from features.schema import Sequence as BehaviourSequence

SAMPLES, STATE, USER_AGGREGATES, ITEM_AGGREGATES = "samples", "state", "user_aggregates", "item_aggregates"

LAYOUT = 2
"""Of the builder's own tables; what another version of corank laid out otherwise is built anew."""

SNAPSHOT_EVERY = 16
"""A state table holds all its owners in one of so many partitions, so that reading it never goes back further."""

EVENT_ID = "__event_id"
"""Hashed ids of events while a bucket is folded; no field of the user's own has this name."""


@dataclass(frozen=True)
class BuildSettings:
    """What the builder reads and writes; picklable, sent to every task.

    Attributes:
        tables: impressions, users, items and every event table.
        log_delay: microseconds; a request sees events with ``event.ts < request.ts − log_delay``.
        root: below it lie the tables ``samples``, ``state``, ``user_aggregates`` and ``item_aggregates``.
        now: microseconds UTC; later timestamps are quarantined.
        aggregates_delay: microseconds after a partition's close at which its counts become known.
        at_once: buckets built at a time; None: as many as there are CPUs.
    """

    tables: Mapping[str, Table]
    schema: Schema
    grain: Grain
    buckets: int
    log_delay: int
    root: str
    now: int
    storage_options: Mapping[str, str] = field(default_factory=dict)
    aggregates_delay: int = 0
    at_once: int | None = None

    def table_root(self, table: str) -> str:
        return f"{self.root}/{table}"

    def table(self, table: str) -> Table:
        """One of the builder's own tables."""
        return Table(table, self.table_root(table), {}, self.storage_options)

    def pinned(self) -> BuildSettings:
        """For one task: every log opened once, at the version it has now."""
        return replace(self, tables={role: table.pinned() for role, table in self.tables.items()})

    def known_at(self, partition: str) -> int:
        """When the counts as of this partition's close become known, microseconds UTC."""
        return partition_bounds(partition, self.grain)[1] + self.aggregates_delay


def state_schema(schema: Schema) -> pa.Schema:
    """Arrow schema of the state table: a user's newest events per sequence, as of ``ts`` (the close of dt)."""
    lists = [
        pa.field(timeline_column(sequence, event_field), pa.list_(kind))
        for sequence in schema.sequences
        for event_field, kind in _timeline_types(sequence)
    ]
    ids = [pa.field(event_id_column(sequence), pa.list_(pa.int64())) for sequence in schema.sequences]
    return partitioned([pa.field("user_id", pa.string()), pa.field("ts", pa.int64()), *lists, *ids])


def user_aggregates_schema(schema: Schema) -> pa.Schema:
    """A user's counts and those per key (:func:`state_fields`), known from ``ts`` on. One row per change."""
    fields = state_fields(schema.aggregates("user"), schema.aggregates("cross"))
    return partitioned([pa.field("user_id", pa.string()), pa.field("ts", pa.int64()), *fields])


def item_aggregates_schema(schema: Schema) -> pa.Schema:
    """An item's counts (:func:`state_fields`), known from ``ts`` on. One row per change."""
    fields = state_fields(schema.aggregates("item"))
    return partitioned([pa.field("item_id", pa.string()), pa.field("ts", pa.int64()), *fields])


def partitioned(fields: list[pa.Field]) -> pa.Schema:
    """These columns, and dt and bucket."""
    return pa.schema([*fields, pa.field("dt", pa.string()), pa.field("bucket", pa.string())])


def unpartitioned(schema: pa.Schema) -> pa.Schema:
    """The columns of a Parquet file below dt=…/bucket=…"""
    return pa.schema([one for one in schema if one.name not in ("dt", "bucket")])


def is_snapshot(partition: str, previous: str | None, grain: Grain) -> bool:
    """Whether the state tables hold all owners in this partition; decided by the calendar, so always alike."""
    if previous is None:
        return True
    return partition_number(partition, grain) // SNAPSHOT_EVERY != partition_number(previous, grain) // SNAPSHOT_EVERY


def since_snapshot(settings: BuildSettings, earlier: Sequence[str], known_by: int | None = None) -> Sequence[str]:
    """The newest of the earlier partitions that hold, together, the state of every owner.

    Args:
        known_by: the state is wanted as of this moment (microseconds UTC); default: the newest.
    """
    for index in range(len(earlier) - 1, -1, -1):
        previous = earlier[index - 1] if index else None
        known = known_by is None or settings.known_at(earlier[index]) <= known_by
        if known and is_snapshot(earlier[index], previous, settings.grain):
            return earlier[index:]
    return earlier


def _timeline_types(sequence: BehaviourSequence) -> Iterator[tuple[Any, pa.DataType]]:
    yield None, pa.int64()
    for event_field in sequence.fields:
        yield event_field, code_type(event_field)


def timeline_lists(sequence: BehaviourSequence) -> list[pl.Expr]:
    """A user's events as the list columns of a timeline."""
    return [
        pl.col("ts").alias(timeline_column(sequence, None)),
        *[pl.col(event_field.name).alias(timeline_column(sequence, event_field)) for event_field in sequence.fields],
    ]


def state_rows(
    settings: BuildSettings, state: Mapping[str, pl.DataFrame], owners: Mapping[str, pl.DataFrame], close: int
) -> pa.Table:
    """State of the users with a row in ``owners``, ordered by user."""
    schema = settings.schema
    arrow = unpartitioned(state_schema(schema))
    if not owners:
        return arrow.empty_table()
    rows = pl.concat([events.select("user_id") for events in owners.values()]).unique().sort("user_id")
    rows = rows.with_columns(pl.lit(close, pl.Int64).alias("ts"))
    for sequence in schema.sequences:
        event_ids = pl.col(EVENT_ID).alias(event_id_column(sequence))
        lists = state[sequence.name].group_by("user_id", maintain_order=True).agg(*timeline_lists(sequence), event_ids)
        rows = rows.join(lists, on="user_id", how="left", maintain_order="left")
    return to_arrow(rows.select(arrow.names), arrow)


def to_arrow(rows: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """Cast to the table's Arrow types; who has nothing has an empty list, never null."""
    lists = [
        pl.col(column.name).fill_null(pl.lit([], dtype=rows.schema[column.name]))
        for column in schema
        if pa.types.is_list(column.type)
    ]
    table = rows.with_columns(lists).to_arrow(compat_level=pl.CompatLevel.oldest())
    return table.cast(schema)


def load_state(
    settings: BuildSettings, bucket: int, earlier: Sequence[str], users: pl.DataFrame | None = None
) -> dict[str, pl.DataFrame]:
    """The newest state of these users of the bucket (default: all), one row per event and sequence."""
    schema = settings.schema
    rows = newest_rows(settings, STATE, state_schema(schema), bucket, earlier, owners=users)
    state = {}
    for sequence in schema.sequences:
        columns = [timeline_column(sequence, event_field) for event_field, _ in _timeline_types(sequence)]
        columns.append(event_id_column(sequence))
        names = ["ts", *(event_field.name for event_field in sequence.fields), EVENT_ID]
        filled = rows.filter(pl.col(columns[0]).list.len() > 0)
        state[sequence.name] = (
            filled.select("user_id", *columns).explode(columns).rename(dict(zip(columns, names, strict=True)))
        )
    return state


def restore_users(
    settings: BuildSettings, tallies: Sequence[Tally], bucket: int, earlier: Sequence[str], opening: int
) -> None:
    """The user's counts that a request from ``opening`` on can read."""
    layout = user_aggregates_schema(settings.schema)
    rows = newest_rows(settings, USER_AGGREGATES, layout, bucket, earlier, opening)
    for tally in tallies:
        tally.load(rows)
        tally.forget_before(opening)


def restore_items(
    settings: BuildSettings, counted: Tally, bucket: int | None, earlier: Sequence[str], opening: int
) -> None:
    """The counts of a bucket's items, or all, that a request from ``opening`` on can read."""
    layout = item_aggregates_schema(settings.schema)
    counted.load(newest_rows(settings, ITEM_AGGREGATES, layout, bucket, earlier, opening))
    counted.forget_before(opening)


def newest_rows(
    settings: BuildSettings,
    table: str,
    schema: pa.Schema,
    bucket: int | None,
    earlier: Sequence[str],
    known_by: int | None = None,
    owners: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """The newest row of every owner in one of the builder's tables, ordered by ts.

    Partitions are read newest first, only until everyone is found.

    Args:
        schema: of the table; its first column names the owner.
        bucket: None: all.
        known_by: the newest row with ts up to this moment (microseconds UTC), and all after it.
        owners: with one column, the owners that are wanted; default: all.
    """
    owner = schema.names[0]
    empty = pl.DataFrame(pl.from_arrow(schema.empty_table()))
    found, done, missing = [empty], empty.select(owner), owners
    stored = settings.table(table)
    stored = stored.pinned() if stored.exists() else stored
    for partition in reversed(since_snapshot(settings, earlier, known_by)):
        if missing is not None and missing.is_empty():
            break
        rows = bucket_rows(stored, schema, bucket, partition)
        if missing is not None:
            rows = rows.join(missing, on=owner, how="semi", maintain_order="left")
        rows = rows.join(done, on=owner, how="anti", maintain_order="left")
        found.append(rows)
        known = rows.select(owner) if known_by is None else rows.filter(pl.col("ts") <= known_by).select(owner)
        done = pl.concat([done, known])
        if missing is not None:
            missing = missing.join(known, on=owner, how="anti")
    return pl.concat(found[::-1])


def bucket_rows(table: Table, schema: pa.Schema, bucket: int | None, partition: str) -> pl.DataFrame:
    """Rows of one of the builder's tables in a partition, of one bucket or all."""
    if not table.exists():
        return pl.DataFrame(pl.from_arrow(schema.empty_table()))
    rows = table.scan([partition])
    if bucket is not None:
        rows = rows.filter(pl.col("bucket") == str(bucket))
    return table.collect(rows.select(schema.names), [partition])
