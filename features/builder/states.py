"""The builder's own tables: their layout, and how a fold goes on from where earlier partitions left them.

There is one row per owner and partition with a change, versioned by ``dt``, and now and then a snapshot of all owners.
So reading the newest states goes back a bounded number of partitions, and what a new partition writes depends on its
own size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.builder.aggregates import Tally, state_fields
from features.builder.lists import list_columns, parts_of, ranges
from features.delta.table import Table, together
from features.sample_table import code_type, event_id_column, timeline_column
from features.schema import Grain, Schema, partition_bounds, partition_number
from features.schema import Sequence as BehaviourSequence

SAMPLES, STATE, USER_AGGREGATES, ITEM_AGGREGATES = "samples", "state", "user_aggregates", "item_aggregates"

LAYOUT = 2
"""Version of the layout of the builder's own tables; tables of another version are built anew."""

SNAPSHOT_EVERY = 16
"""One of so many partitions of a state table is a snapshot of all owners: reading never goes back further."""

TOGETHER_BYTES = 4 << 20
"""Bytes of a bucket's files: partitions up to this size in all are read and folded together, in one query."""

EVENT_ID, CLOSE, POSITION = "__event_id", "__close", "__position"
"""While a bucket is folded: the hashed id of an event, the close of a row's partition (microseconds UTC) and an event's
place in its user's timeline; no field of the user's own has these names."""


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

    def opened(self, table: str) -> Table:
        """The same table, opened once if it exists; for a task that reads it many times."""
        stored = self.table(table)
        return stored.pinned() if stored.exists() else stored

    def pinned(self) -> BuildSettings:
        """The settings for one task: every log opened once, at the version it has now."""
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
    return pa.schema([column for column in schema if column.name not in ("dt", "bucket")])


def is_snapshot(partition: str, previous: str | None, grain: Grain) -> bool:
    """Whether the state tables hold all owners in this partition; the calendar alone decides it."""
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


def lists_of(
    sequence: BehaviourSequence, events: pl.DataFrame, start: np.ndarray, stop: np.ndarray, event_ids: bool
) -> dict[str, pa.ListArray]:
    """Parts of timelines as list columns, one row per part.

    Args:
        start, stop: the part's first event and the one after its last, as rows of ``events``.
        event_ids: with the column of hashed event ids.
    """
    names = {"ts": timeline_column(sequence, None)}
    names |= {event_field.name: timeline_column(sequence, event_field) for event_field in sequence.fields}
    names |= {EVENT_ID: event_id_column(sequence)} if event_ids else {}
    return list_columns(events.select(list(names)).rename(names), ranges(start, stop), stop - start)


def state_rows(
    settings: BuildSettings,
    timelines: Mapping[str, pl.DataFrame],
    owners: pl.DataFrame,
    closes: Sequence[int],
) -> Iterator[tuple[int, pa.Table]]:
    """States of users as of the closes of partitions: (close, rows ordered by user).

    Args:
        timelines: per sequence the events, in order (:func:`in_order`), of the state before and all these partitions.
        owners: user_id and ``CLOSE``, each once.
    """
    schema = settings.schema
    arrow = unpartitioned(state_schema(schema))
    owners = owners.sort(CLOSE, "user_id")
    spans = {}
    for sequence in schema.sequences:
        events = timelines[sequence.name]
        stop = count_before(events, owners.select("user_id", before=CLOSE))
        visible = count_before(events, owners.select("user_id", before=pl.col(CLOSE) - settings.log_delay))
        opening = first_event(events, owners)
        spans[sequence.name] = opening + np.maximum(visible - sequence.length, 0), opening + stop
    for close, first, last in parts_of(owners[CLOSE], closes):
        columns: dict[str, Any] = {
            "user_id": owners["user_id"][first:last].to_arrow(),
            "ts": pa.repeat(close, last - first),
        }
        for sequence in schema.sequences:
            start, stop = (ends[first:last] for ends in spans[sequence.name])
            columns |= lists_of(sequence, timelines[sequence.name], start, stop, event_ids=True)
        yield close, pa.table({name: columns[name] for name in arrow.names}).cast(arrow)


def in_order(events: pl.DataFrame) -> pl.DataFrame:
    """Events grouped by user in time order with their ``POSITION`` in the user's timeline.

    The sort is stable and older partitions come first, so ties keep the order of (ts, event_id).
    """
    ordered = events.sort("user_id", "ts", maintain_order=True)
    return ordered.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).over("user_id").alias(POSITION))


def first_event(events: pl.DataFrame, users: pl.DataFrame) -> np.ndarray:
    """For every row (user_id) of ``users`` the row of ``events`` at which the user's timeline begins; 0 without one."""
    rows = events.select("user_id", POSITION).with_row_index("row")
    firsts = rows.filter(pl.col(POSITION) == 0).select("user_id", pl.col("row").cast(pl.Int64))
    found = users.select("user_id").join(firsts, on="user_id", how="left", maintain_order="left")
    return found["row"].fill_null(0).to_numpy()


def count_before(events: pl.DataFrame, moments: pl.DataFrame) -> np.ndarray:
    """For every row (user_id, before) of ``moments`` the user's events with ``ts < before``."""
    # both are ordered by time within every user, as the join needs
    found = moments.join_asof(
        events.select("user_id", "ts", pl.col(POSITION) + 1),
        left_on="before",
        right_on="ts",
        by="user_id",
        strategy="backward",
        check_sortedness=False,
        allow_exact_matches=False,
    )
    return found[POSITION].fill_null(0).cast(pl.Int64).to_numpy()


def newest(events: pl.DataFrame, length: int, visible_until: int) -> pl.DataFrame:
    """The last L events before a moment and all after it: what any later request can see."""
    visible = (pl.col("ts") < visible_until).cast(pl.Int64).sum().over("user_id")
    return events.filter(pl.col(POSITION) >= visible - length).drop(POSITION)


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
    settings: BuildSettings,
    tally: Tally,
    items: int | pl.DataFrame,
    earlier: Sequence[str],
    opening: int,
) -> None:
    """The counts of some items that a request from ``opening`` on can read.

    Args:
        items: those of a bucket, or those named in a column ``item_id``.
    """
    layout = item_aggregates_schema(settings.schema)
    bucket, owners = (items, None) if isinstance(items, int) else (None, items)
    tally.load(newest_rows(settings, ITEM_AGGREGATES, layout, bucket, earlier, opening, owners))
    tally.forget_before(opening)


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

    Args:
        schema: of the table; its first column names the owner.
        bucket: None: all.
        known_by: the newest row with ts up to this moment (microseconds UTC), and all after it.
        owners: with one column, the owners that are wanted; default: all.
    """
    owner, stored = schema.names[0], settings.opened(table)
    partitions = since_snapshot(settings, earlier, known_by)
    # first the places of these rows, so that no list of an older row is loaded
    every = bucket_rows(stored, schema, bucket, partitions, owners, [owner, "ts"])
    is_old = pl.lit(True) if known_by is None else pl.col("ts") <= known_by
    newest_old = every.filter(is_old).group_by(owner).agg(pl.col("ts").max())
    wanted = pl.concat([newest_old, every.filter(~is_old)])
    shares = settings.buckets if bucket is not None else 1
    groups = together(stored.sizes(partitions), TOGETHER_BYTES * shares, len(partitions)) if stored.exists() else []
    found = [bucket_rows(stored, schema, bucket, group, wanted) for group in groups]
    empty = pl.DataFrame(pl.from_arrow(schema.empty_table()))
    return pl.concat([empty, *found]).sort("ts", maintain_order=True)


def bucket_rows(
    table: Table,
    schema: pa.Schema,
    bucket: int | None,
    partitions: Sequence[str],
    wanted: pl.DataFrame | None = None,
    columns: Sequence[str] | None = None,
) -> pl.DataFrame:
    """Rows of one of the builder's tables in some partitions, of one bucket or all.

    Args:
        wanted: only the rows that have these values in the columns that it has.
        columns: default: all.
    """
    names = list(columns or schema.names)
    if not partitions or not table.exists():
        return pl.DataFrame(pl.from_arrow(schema.empty_table())).select(names)
    rows = table.scan(partitions)
    if bucket is not None:
        rows = rows.filter(pl.col("bucket") == str(bucket))
    if wanted is not None:
        rows = rows.join(wanted.lazy(), on=wanted.columns, how="semi", maintain_order="left")
    return table.collect(rows.select(names), partitions)
