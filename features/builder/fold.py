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

from features.builder.aggregates import (
    Tally,
    aggregate_of,
    deltas,
    item_tally,
    summed,
    user_tallies,
)
from features.builder.log_rows import crossed, log_rows, new_events, profiles_of, with_feedback
from features.builder.sample_rows import in_order, newest, sample_rows
from features.builder.states import (
    EVENT_ID,
    ITEM_AGGREGATES,
    SAMPLES,
    STATE,
    USER_AGGREGATES,
    BuildSettings,
    bucket_rows,
    is_snapshot,
    item_aggregates_schema,
    load_state,
    restore_items,
    restore_users,
    state_rows,
    to_arrow,
    unpartitioned,
    user_aggregates_schema,
)
from features.encoding import bucket_column
from features.sample_table import candidate_counts, sample_schema
from features.schema import partition_bounds


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
    own, cross = user_tallies(schema, grain)
    counted = item_tally(schema, grain)
    for index, partition in enumerate(partitions):
        opening, close = partition_bounds(partition, grain)
        if index == 0:
            restore_users(settings, [own, *cross], bucket, earlier, opening)
            restore_items(settings, counted, None, earlier, opening)
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
        of_items = bucket_rows(settings.table(ITEM_AGGREGATES), item_aggregates_schema(schema), None, partition)
        counted.load(of_items, since=settings.known_at(partition))
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
    counted = item_tally(schema, settings.grain)
    restore_items(settings, counted, None, earlier, moment)
    marked = impressions.with_columns(bucket_column(pl.col("user_id"), settings.buckets).alias("bucket"))
    for (bucket,), part in marked.partition_by("bucket", as_dict=True, include_key=False).items():
        own, cross = user_tallies(schema, settings.grain)
        restore_users(settings, [own, *cross], bucket, earlier, moment)
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
    ts = settings.known_at(partition)
    changed = [own.advance(deltas(own.features, own.keys, rows), ts)]
    for tally in cross:
        (feature,) = tally.features
        aggregate = aggregate_of(feature)
        counted = crossed(rows[aggregate.of], items, str(aggregate.key))
        changed.append(tally.advance(deltas(tally.features, tally.keys, {aggregate.of: counted}), ts).select("user_id"))
    users = own.current().select("user_id") if whole else pl.concat(changed).unique()
    states = own.states(users, ts)
    for tally in cross:
        states = states.join(tally.states(users, ts).drop("ts"), on="user_id", how="left")
    arrow = unpartitioned(user_aggregates_schema(settings.schema))
    return to_arrow(states.select(arrow.names).sort("user_id"), arrow)


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
    tally = item_tally(settings.schema, settings.grain)
    arrow = unpartitioned(item_aggregates_schema(settings.schema))
    previous = earlier[-1] if earlier else None
    for index, partition in enumerate(partitions):
        opening, close = partition_bounds(partition, settings.grain)
        if index == 0:
            restore_items(settings, tally, bucket, earlier, opening)
        of_partition = parts.filter(pl.col("dt") == partition).drop("dt", "bucket")
        ts = settings.known_at(partition)
        changed = tally.advance(summed([of_partition], tally.keys, tally.features), ts)
        if is_snapshot(partition, previous, settings.grain):
            changed = tally.current().select("item_id")
        yield partition, to_arrow(tally.states(changed, ts).select(arrow.names).sort("item_id"), arrow)
        tally.forget_before(close)
        previous = partition
