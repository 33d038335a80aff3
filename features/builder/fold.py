"""The fold of one bucket: log rows of partition after partition into sample rows and new states.

Data flow, inside one Ray task, in Polars:

    states of d−1 + rows of d, … , e ──► timelines, counts ──► samples of d, … , e: timeline once, requests, candidates
                                               └─────────────► states of d, … , e (only owners with a change)

Small partitions are folded together, in one set of expressions whose rows are keyed by owner and partition; the states
are carried in memory from one group of them to the next, so building many reads each log slice once. Items have rows in
every bucket of users; their counts are folded first, by bucket of items (:func:`fold_items`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

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
from features.builder.lists import parts_of
from features.builder.log_rows import crossed, items_named, log_rows, new_events, profiles_of, with_feedback
from features.builder.sample_rows import sample_rows
from features.builder.states import (
    CLOSE,
    EVENT_ID,
    ITEM_AGGREGATES,
    SAMPLES,
    STATE,
    TOGETHER_BYTES,
    USER_AGGREGATES,
    BuildSettings,
    bucket_rows,
    in_order,
    is_snapshot,
    item_aggregates_schema,
    load_state,
    newest,
    restore_items,
    restore_users,
    state_rows,
    unpartitioned,
    user_aggregates_schema,
)
from features.delta.table import together
from features.encoding import bucket_column
from features.history import with_history
from features.sample_table import candidate_counts, sample_schema
from features.schema import Sequence as BehaviourSequence
from features.schema import partition_bounds

TOGETHER_ITEMS = 200_000
"""Changes of items' counts that are folded together."""


def fold_bucket(
    settings: BuildSettings, bucket: int, partitions: Sequence[str], earlier: Sequence[str]
) -> Iterator[tuple[str, str, pa.Table, dict[str, int]]]:
    """Rows of ``samples``, ``state`` and ``user_aggregates`` of one bucket in every partition.

    The table ``item_aggregates`` must hold the earlier partitions and these.

    Args:
        partitions: oldest first.
        earlier: the partitions before, oldest first; their states precede these.

    Yields:
        (table, partition, rows without partition columns, counts).
    """
    settings = settings.pinned()
    schema, grain = settings.schema, settings.grain
    item_counts = settings.opened(ITEM_AGGREGATES)
    named = items_named(settings, partitions, bucket)
    users = profiles_of(settings, "users", "user_id", schema.side("user"), bucket)
    items = profiles_of(settings, "items", "item_id", schema.side("item"), named)
    per_user, cross = user_tallies(schema, grain)
    per_item = item_tally(schema, grain)
    opening = partition_bounds(partitions[0], grain)[0]
    restore_users(settings, [per_user, *cross], bucket, earlier, opening)
    restore_items(settings, per_item, named, earlier, opening)
    snapshots = _snapshots(settings, partitions, earlier)
    state: dict[str, pl.DataFrame] = {}
    for group in _together(settings, partitions):
        closes = {partition_bounds(partition, grain)[1]: partition for partition in group}
        rows, counts = log_rows(settings, group, bucket)
        if not state:
            touched = pl.concat([of_log.select("user_id") for of_log in rows.values()]).unique()
            state = load_state(settings, bucket, earlier, None if snapshots or len(partitions) > 1 else touched)
        new = {
            s.name: _delivered_once(settings, s, new_events(s, rows[s.events], items), state[s.name], list(closes))
            for s in schema.sequences
        }
        timelines = {name: in_order(pl.concat([state[name], new[name].drop(CLOSE)])) for name in new}
        shown = with_feedback(settings, rows["impressions"], group)
        states = _advance_users(settings, per_user, cross, rows, items, group, snapshots)
        of_items = bucket_rows(item_counts, item_aggregates_schema(schema), None, group, named)
        per_item.load(of_items.sort("ts", maintain_order=True), since=settings.known_at(group[0]))
        happened = dict(_owners_of(new).group_by(CLOSE).len().iter_rows())
        for close, samples in sample_rows(
            settings, shown, list(closes), timelines, users, items, per_user, cross, per_item
        ):
            sizes = candidate_counts(samples)
            yield (
                SAMPLES,
                closes[close],
                samples,
                {
                    **counts[closes[close]],
                    "candidates": sizes["candidates"],
                    "requests": sizes["requests"],
                    "users": sizes["rows"],
                    "timeline_events": sizes["events"],
                    "events": happened.get(close, 0),
                },
            )
        owners = _owners(state, new, [close for close, partition in closes.items() if partition in snapshots])
        for close, part in state_rows(settings, timelines, owners, list(closes)):
            yield STATE, closes[close], part, {}
        for partition, part in states:
            yield USER_AGGREGATES, partition, part, {}
        last = max(closes)
        state = {s.name: newest(timelines[s.name], s.length, last - settings.log_delay) for s in schema.sequences}
        for tally in (per_user, *cross, per_item):
            tally.forget_before(last)


def rows_after(
    settings: BuildSettings, earlier: Sequence[str], impressions: pl.DataFrame, partition: str | None = None
) -> pa.Table:
    """Sample rows of requests after the newest partition, from the states and profiles alone.

    They are what the next partition's samples would hold if nothing else happened, and what the online store should
    answer.

    Args:
        earlier: the partitions built so far, or before ``partition``.
        impressions: rows in the shape of the log, all of them good, with ``ts`` at or after the close of these.
        partition: the one that the requests lie in, whose events they see; None: nothing has happened since.
    """
    schema = settings.schema
    rows = [unpartitioned(sample_schema(schema, stored=True)).empty_table()]
    opening, close = (
        partition_bounds(partition, settings.grain)
        if partition is not None
        else (int(impressions.select(pl.col("ts").min()).item()), 0)
    )
    asked = impressions.select(pl.col("item_id").cast(pl.String)).drop_nulls().unique()
    per_item = item_tally(schema, settings.grain)
    restore_items(settings, per_item, asked, earlier, opening)
    marked = impressions.with_columns(
        bucket_column(pl.col("user_id"), settings.buckets).alias("bucket"), pl.lit(close, pl.Int64).alias(CLOSE)
    )
    for (bucket,), part in marked.partition_by("bucket", as_dict=True, include_key=False).items():
        per_user, cross = user_tallies(schema, settings.grain)
        restore_users(settings, [per_user, *cross], bucket, earlier, opening)
        users = profiles_of(settings, "users", "user_id", schema.side("user"), int(bucket))
        state = load_state(settings, bucket, earlier, part.select("user_id").unique())
        named = asked
        if partition is not None:
            named = pl.concat([asked, items_named(settings, [partition], bucket)]).unique()
        items = profiles_of(settings, "items", "item_id", schema.side("item"), named)
        if partition is not None:
            of_logs, _ = log_rows(settings, [partition], bucket)
            for s in schema.sequences:
                new = _delivered_once(settings, s, new_events(s, of_logs[s.events], items), state[s.name], [close])
                state[s.name] = pl.concat([state[s.name], new.drop(CLOSE)])
        timelines = {name: in_order(events) for name, events in state.items()}
        rows += [
            samples
            for _, samples in sample_rows(settings, part, [close], timelines, users, items, per_user, cross, per_item)
        ]
    return with_history(pa.concat_tables(rows), schema)


def _together(settings: BuildSettings, partitions: Sequence[str]) -> list[list[str]]:
    """The partitions in groups that are folded together, by the size of what a bucket reads of the logs."""
    sizes = dict.fromkeys(partitions, 0)
    for role in settings.schema.logs:
        for partition, size in settings.tables[role].sizes(partitions).items():
            sizes[partition] += size
    return together(sizes, TOGETHER_BYTES * settings.buckets, len(partitions))


def _snapshots(settings: BuildSettings, partitions: Sequence[str], earlier: Sequence[str]) -> set[str]:
    """Those of the partitions in which the state tables hold all owners."""
    previous = [earlier[-1] if earlier else None, *partitions]
    return {
        partition
        for partition, before in zip(partitions, previous, strict=False)
        if is_snapshot(partition, before, settings.grain)
    }


def _delivered_once(
    settings: BuildSettings,
    sequence: BehaviourSequence,
    new: pl.DataFrame,
    state: pl.DataFrame,
    closes: Sequence[int],
) -> pl.DataFrame:
    """The events that the state before their partition does not hold: an event that is delivered again in a later
    partition counts once, as online.

    Args:
        new: events of the partitions with these closes, each once in its partition.
        state: the one before the first of them.
    """
    key = ["user_id", EVENT_ID]
    if len(closes) == 1:
        return new.join(state, on=key, how="anti", maintain_order="left")
    delivered = pl.concat([state.select(key), new.select(key)])
    users = delivered.filter(pl.struct(key).is_duplicated()).select("user_id").unique()
    if users.is_empty():
        return new
    # a state depends on the partitions before it, so for these users they are taken one by one
    in_state, kept = state.join(users, on="user_id", how="semi"), [new.join(users, on="user_id", how="anti")]
    again = new.join(users, on="user_id", how="semi", maintain_order="left")
    for close in closes:
        first = again.filter(pl.col(CLOSE) == close).join(in_state, on=key, how="anti", maintain_order="left")
        kept.append(first)
        in_state = newest(
            in_order(pl.concat([in_state, first.drop(CLOSE)])), sequence.length, close - settings.log_delay
        )
    return pl.concat(kept)


def _owners(
    state: Mapping[str, pl.DataFrame], new: Mapping[str, pl.DataFrame], snapshots: Sequence[int]
) -> pl.DataFrame:
    """Users with a row in the state table (user_id, ``CLOSE``): with new events; in a snapshot, with any so far."""
    changed = _owners_of(new)
    before = [events.select("user_id", pl.lit(0, pl.Int64).alias(CLOSE)) for events in state.values()]
    since = pl.concat([changed, *before]).group_by("user_id").agg(pl.col(CLOSE).min())
    everyone = [
        since.filter(pl.col(CLOSE) <= close).with_columns(pl.lit(close, pl.Int64).alias(CLOSE)) for close in snapshots
    ]
    return pl.concat([changed, *everyone]).unique()


def _owners_of(events: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """user_id and ``CLOSE`` of the events of all sequences."""
    none = pl.DataFrame(schema={"user_id": pl.String, CLOSE: pl.Int64})
    return pl.concat([none, *[of_sequence.select("user_id", CLOSE) for of_sequence in events.values()]])


def _advance_users(
    settings: BuildSettings,
    per_user: Tally,
    cross: Sequence[Tally],
    rows: Mapping[str, pl.DataFrame],
    items: pl.DataFrame,
    partitions: Sequence[str],
    snapshots: Collection[str],
) -> Iterator[tuple[str, pa.Table]]:
    """Fold partitions into the user's tallies; yields rows of ``user_aggregates``, in a snapshot those of all users."""
    known = pl.col(CLOSE) + settings.aggregates_delay
    changed = [per_user.advance(deltas(per_user.features, per_user.keys, rows, known))]
    for tally in cross:
        (feature,) = tally.features
        aggregate = aggregate_of(feature)
        with_key = crossed(rows[aggregate.of], items, str(aggregate.key))
        added = tally.advance(deltas(tally.features, tally.keys, {aggregate.of: with_key}, known))
        changed.append(added.select("user_id", "ts"))
    changed += [per_user.everyone(settings.known_at(partition)) for partition in partitions if partition in snapshots]
    owners = pl.concat(changed).unique()
    return _counts(settings, [per_user, *cross], owners, partitions, user_aggregates_schema(settings.schema))


def _counts(
    settings: BuildSettings,
    tallies: Sequence[Tally],
    owners: pl.DataFrame,
    partitions: Sequence[str],
    schema: pa.Schema,
) -> Iterator[tuple[str, pa.Table]]:
    """Rows of a table of counts, partition by partition.

    Args:
        tallies: that of the owners themselves, then those by key.
        owners: owners with a row, and when it becomes known: user_id or item_id, and ts.
        schema: of the table.
    """
    arrow, known = unpartitioned(schema), {settings.known_at(partition): partition for partition in partitions}
    rows = tallies[0].totals_at(owners.sort("ts", arrow.names[0]))
    spans = [span for tally in tallies for span in tally.spans()]
    for ts, first, last in parts_of(rows["ts"], list(known)):
        part = rows[first:last]
        columns: dict[str, Any] = {column.name: column.to_arrow() for column in part}
        for span in spans:
            columns |= span.at(part[arrow.names[0]], ts)
        yield known[ts], pa.table({name: columns[name] for name in arrow.names}).cast(arrow)


def item_deltas(settings: BuildSettings, bucket: int, partitions: Sequence[str]) -> Iterator[pl.DataFrame]:
    """What one bucket of users adds to the items' counts: bucket (of the item), and deltas."""
    features, settings = settings.schema.aggregates("item"), settings.pinned()
    for group in _together(settings, partitions):
        rows, _ = log_rows(settings, group, bucket)
        sources = {role: of_log.drop_nulls("item_id") for role, of_log in rows.items() if "item_id" in of_log.columns}
        yield deltas(features, ["item_id"], sources, pl.col(CLOSE) + settings.aggregates_delay).with_columns(
            bucket_column(pl.col("item_id"), settings.buckets).alias("bucket")
        )


def fold_items(
    settings: BuildSettings, bucket: int, parts: pl.DataFrame, partitions: Sequence[str], earlier: Sequence[str]
) -> Iterator[tuple[str, pa.Table]]:
    """Rows of ``item_aggregates`` of one bucket of items, partition by partition.

    Args:
        parts: :func:`item_deltas` of all buckets of users for this bucket of items.
    """
    tally, grain = item_tally(settings.schema, settings.grain), settings.grain
    restore_items(settings, tally, bucket, earlier, partition_bounds(partitions[0], grain)[0])
    snapshots = _snapshots(settings, partitions, earlier)
    known = {partition: settings.known_at(partition) for partition in partitions}
    sizes = dict(parts.group_by("ts").len().iter_rows())
    for group in together(
        {partition: sizes.get(ts, 0) for partition, ts in known.items()}, TOGETHER_ITEMS, len(partitions)
    ):
        added = parts.filter(pl.col("ts").is_between(known[group[0]], known[group[-1]])).drop("bucket")
        changed = [tally.advance(summed([added], tally.keys, tally.features))]
        changed += [tally.everyone(known[partition]) for partition in group if partition in snapshots]
        layout = item_aggregates_schema(settings.schema)
        yield from _counts(settings, [tally], pl.concat(changed).unique(), group, layout)
        tally.forget_before(partition_bounds(group[-1], grain)[1])
