"""The fold of one bucket: partition by partition, log rows into sample rows and new states.

Data flow, inside one Ray task, in Polars:

    states of d−1 + rows of d ──► timelines, counts ──► samples of d: timeline once, requests, candidates
                                        └─────────────► states of d (only owners with a change)

The states are carried in memory from partition to partition, so building many reads each log slice once. Items
have rows in every bucket of users; their counts are folded first, by bucket of items (:func:`fold_items`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import polars as pl
import pyarrow as pa

from features.aggregates import (
    KEY,
    Tally,
    aggregate_of,
    delta_column,
    deltas,
    item_tally,
    key_column,
    summed,
    user_tallies,
    value_columns,
)
from features.batch import (
    candidate_counts,
    sample_schema,
)
from features.encoding import bucket_column
from features.logs import crossed, log_rows, new_events, profiles_of, with_feedback
from features.requests import in_order, newest, sample_rows
from features.schema import partition_bounds, partition_number
from features.states import (
    EVENT_ID,
    ITEM_AGGREGATES,
    SAMPLES,
    STATE,
    USER_AGGREGATES,
    BuildSettings,
    bucket_rows,
    is_snapshot,
    item_aggregates_schema,
    item_rows,
    load_state,
    needed_partitions,
    restore,
    restore_items,
    restore_users,
    state_rows,
    to_arrow,
    unpartitioned,
    user_aggregates_schema,
    with_deltas,
)


def fold_bucket(
    settings: BuildSettings, bucket: int, partitions: Iterable[str], earlier: Sequence[str]
) -> Iterator[tuple[str, str, pa.Table, dict[str, int]]]:
    """Rows of ``samples``, ``state`` and ``user_aggregates`` of one bucket, partition by partition.

    The table ``item_aggregates`` must hold the earlier partitions and these.

    Args:
        earlier: the partitions before, oldest first; their states precede these.

    Yields:
        (table, partition, rows without partition columns, counts).
    """
    settings, partitions = settings.pinned(), list(partitions)
    schema, grain = settings.schema, settings.grain
    users = profiles_of(settings, "users", "user_id", schema.side("user"), bucket)
    items = profiles_of(settings, "items", "item_id", schema.side("item"), None)
    previous = earlier[-1] if earlier else None
    state: dict[str, pl.DataFrame] = {}
    own, cross = user_tallies(schema)
    counted = item_tally(schema)
    for index, partition in enumerate(partitions):
        opening, close = partition_bounds(partition, grain)
        if index == 0:
            restore_users(settings, own, cross, bucket, earlier, opening)
            restore_items(settings, counted, earlier, opening)
        rows, counts = log_rows(settings, partition, bucket)
        whole = is_snapshot(partition, previous, grain)
        if index == 0:
            touched = pl.concat([one.select("user_id") for one in rows.values()]).unique()
            state = load_state(settings, bucket, earlier, None if whole or len(partitions) > 1 else touched)
        new = {
            # an event delivered again in a later partition counts once, as online
            s.name: new_events(s, rows[s.events], items).join(
                state[s.name], on=["user_id", EVENT_ID], how="anti", maintain_order="left"
            )
            for s in schema.sequences
        }
        timelines = {name: in_order(pl.concat([state[name], new[name]])) for name in new}
        shown = with_feedback(settings, rows["impressions"], partition)
        samples = sample_rows(settings, shown, timelines, users, items, own, cross, counted)
        sizes = candidate_counts(samples)
        yield (
            SAMPLES,
            partition,
            samples,
            {
                **counts,
                "candidates": sizes["candidates"],
                "requests": sizes["requests"],
                "users": sizes["rows"],
                "timeline_events": sizes["events"],
                "events": sum(events.height for events in new.values()),
            },
        )
        state = {s.name: newest(timelines[s.name], s.length, close - settings.log_delay) for s in schema.sequences}
        yield STATE, partition, state_rows(settings, state, state if whole else new, close), {}
        yield USER_AGGREGATES, partition, _advance_users(settings, own, cross, rows, items, partition, whole), {}
        for tally in (own, *cross):
            tally.forget_before(close)
        counted.rows = pl.concat([counted.rows, item_rows(settings, counted, [partition])])
        counted.forget_before(close)
        previous = partition


def rows_after(settings: BuildSettings, earlier: Sequence[str], impressions: pl.DataFrame) -> pa.Table:
    """Sample rows of requests after the newest partition, from the states and profiles alone.

    What the next partition's samples would hold if nothing else happened: so what the online store should answer.

    Args:
        earlier: the partitions built so far.
        impressions: rows of the log, all of them good, with ``ts`` at or after the newest partition's close.
    """
    schema = settings.schema
    rows = [unpartitioned(sample_schema(schema)).empty_table()]
    moment = int(impressions.select(pl.col("ts").min()).item())
    items = profiles_of(settings, "items", "item_id", schema.side("item"), None)
    counted = item_tally(schema)
    restore_items(settings, counted, earlier, moment)
    marked = impressions.with_columns(bucket_column(pl.col("user_id"), settings.buckets).alias("bucket"))
    for (bucket,), part in marked.partition_by("bucket", as_dict=True, include_key=False).items():
        own, cross = user_tallies(schema)
        restore_users(settings, own, cross, bucket, earlier, moment)
        users = profiles_of(settings, "users", "user_id", schema.side("user"), bucket)
        state = load_state(settings, bucket, earlier, part.select("user_id").unique())
        timelines = {name: in_order(events) for name, events in state.items()}
        rows.append(sample_rows(settings, part, timelines, users, items, own, cross, counted))
    return pa.concat_tables(rows)


def _advance_users(
    settings: BuildSettings,
    own: Tally,
    cross: Sequence[Tally],
    rows: Mapping[str, pl.DataFrame],
    items: pl.DataFrame,
    partition: str,
    whole: bool,
) -> pa.Table:
    """Fold the partition into the user's tallies; rows of ``user_aggregates``, of all users if ``whole``."""
    number, ts = partition_number(partition, settings.grain), settings.known_at(partition)
    delta = deltas(own.features, own.keys, rows)
    changed = [own.advance(delta, number, ts).select("user_id")]
    lists = []
    for tally in cross:
        (feature,) = tally.features
        aggregate = aggregate_of(feature)
        counted = crossed(rows[aggregate.of], items, str(aggregate.key))
        added = deltas(tally.features, tally.keys, {aggregate.of: counted})
        moved = tally.advance(added, number, ts)
        changed.append(moved.select("user_id"))
        counts = value_columns(tally.features)
        state = (
            tally.current()
            .join(moved.select(*tally.keys, pl.lit(True).alias("moved")), on=tally.keys, how="left")
            .filter((pl.col(counts[0]) != 0) | pl.col("moved"))
            .join(added.rename({one: delta_column(one) for one in counts}), on=tally.keys, how="left")
            .with_columns(pl.col([delta_column(one) for one in counts]).fill_null(0))
            .sort("user_id", KEY)
            .rename({KEY: key_column(feature)})
        )
        lists.append(state.group_by("user_id").agg(key_column(feature), *with_deltas(tally.features)))
    users = own.current().select("user_id") if whole else pl.concat(changed).unique()
    result = users.join(own.current().drop("ts"), on="user_id", how="left").with_columns(pl.lit(ts).alias("ts"))
    columns = value_columns(own.features)
    result = result.join(
        delta.rename({column: delta_column(column) for column in columns}), on="user_id", how="left"
    ).with_columns(pl.col(delta_column(column)).fill_null(0) for column in columns)
    for one in lists:
        result = result.join(one, on="user_id", how="left")
    arrow = unpartitioned(user_aggregates_schema(settings.schema))
    return to_arrow(result.select(arrow.names).sort("user_id"), arrow)


def item_deltas(settings: BuildSettings, bucket: int, partitions: Iterable[str]) -> Iterator[pl.DataFrame]:
    """What one bucket of users adds to the items' counts, per partition: dt, bucket (of the item), and deltas."""
    features, settings = settings.schema.aggregates("item"), settings.pinned()
    for partition in partitions:
        rows, _ = log_rows(settings, partition, bucket)
        sources = {role: one.drop_nulls("item_id") for role, one in rows.items() if "item_id" in one.columns}
        yield deltas(features, ["item_id"], sources).with_columns(
            pl.lit(partition).alias("dt"),
            bucket_column(pl.col("item_id"), settings.buckets).alias("bucket"),
        )


def fold_items(
    settings: BuildSettings, bucket: int, parts: pl.DataFrame, partitions: Iterable[str], earlier: Sequence[str]
) -> Iterator[tuple[str, pa.Table]]:
    """Rows of ``item_aggregates`` of one bucket of items, partition by partition.

    Args:
        parts: :func:`item_deltas` of all buckets of users for this bucket of items.
    """
    tally = item_tally(settings.schema)
    arrow = unpartitioned(item_aggregates_schema(settings.schema))
    columns = value_columns(tally.features)
    previous = earlier[-1] if earlier else None
    for index, partition in enumerate(partitions):
        opening, close = partition_bounds(partition, settings.grain)
        if index == 0:
            needed = needed_partitions(settings, [tally], earlier, opening)
            rows = bucket_rows(settings, ITEM_AGGREGATES, item_aggregates_schema(settings.schema), bucket, needed)
            restore(settings, tally, rows.sort("ts"), earlier, opening)
        of_partition = parts.filter(pl.col("dt") == partition).drop("dt", "bucket")
        delta = summed([of_partition], tally.keys, tally.features)
        ts = settings.known_at(partition)
        changed = tally.advance(delta, partition_number(partition, settings.grain), ts)
        if is_snapshot(partition, previous, settings.grain):
            changed = tally.current().with_columns(pl.lit(ts).alias("ts"))
        changed = changed.join(
            delta.rename({column: delta_column(column) for column in columns}), on="item_id", how="left"
        ).with_columns(pl.col(delta_column(column)).fill_null(0) for column in columns)
        yield partition, to_arrow(changed.select(arrow.names).sort("item_id"), arrow)
        tally.forget_before(close)
        previous = partition
