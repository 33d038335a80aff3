"""The fold of one bucket of users: partition by partition, log rows into sample rows and new states.

Data flow (DESIGN §2), inside one Ray task, in Polars:

    states of d−1 + rows of d ──► timelines, counts ──► samples of d: timeline once, requests, candidates
                                        └─────────────► states of d (only owners with a change)

The states are carried in memory from partition to partition, so building many reads each log slice once. Items
have rows in every bucket of users; their counts are folded first, by bucket of items (:func:`fold_items`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl
import pyarrow as pa

from features.aggregates import (
    KEY,
    Tally,
    aggregate_of,
    aggregate_value,
    count_column,
    cross_column,
    delta_column,
    deltas,
    item_tally,
    key_column,
    state_fields,
    sum_column,
    sum_deltas,
    user_tallies,
    value_columns,
)
from features.batch import (
    candidate_counts,
    code_type,
    end_column,
    event_id_column,
    feature_column,
    label_column,
    sample_schema,
    timeline_column,
)
from features.encoding import bucket_column, encode, hash_ids
from features.lake import Table
from features.schema import FEEDBACK, Feature, Grain, Schema, partition_bounds, partition_number
from features.schema import Sequence as BehaviourSequence
from features.validation import distinct_events, quarantine

SAMPLES, STATE, USER_AGGREGATES, ITEM_AGGREGATES = "samples", "state", "user_aggregates", "item_aggregates"

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


# --- layout of the state tables -----------------------------------------------------------------------


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
    """A user's counts in the window and, in lists, those per key; known from ``ts`` on. One row per change."""
    fields = state_fields(schema.aggregates("user"), schema.aggregates("cross"))
    return partitioned([pa.field("user_id", pa.string()), pa.field("ts", pa.int64()), *fields])


def item_aggregates_schema(schema: Schema) -> pa.Schema:
    """An item's counts in the window, known from ``ts`` on. One row per change."""
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


def _since_snapshot(settings: BuildSettings, earlier: Sequence[str], known_by: int | None = None) -> Sequence[str]:
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


# --- the fold of users --------------------------------------------------------------------------------


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
    users = _profiles(settings, "users", "user_id", schema.side("user"), bucket)
    items = _profiles(settings, "items", "item_id", schema.side("item"), None)
    previous = earlier[-1] if earlier else None
    state: dict[str, pl.DataFrame] = {}
    own, cross = user_tallies(schema)
    counted = item_tally(schema)
    for index, partition in enumerate(partitions):
        opening, close = partition_bounds(partition, grain)
        if index == 0:
            _restore_users(settings, own, cross, bucket, earlier, opening)
            _restore_items(settings, counted, earlier, opening)
        rows, counts = log_rows(settings, partition, bucket)
        whole = is_snapshot(partition, previous, grain)
        if index == 0:
            touched = pl.concat([one.select("user_id") for one in rows.values()]).unique()
            state = _load_state(settings, bucket, earlier, None if whole or len(partitions) > 1 else touched)
        new = {s.name: _new_events(settings, s, rows[s.events]) for s in schema.sequences}
        timelines = {name: _in_order(pl.concat([state[name], new[name]])) for name in new}
        samples = _samples(settings, rows["impressions"], timelines, users, items, own, cross, counted)
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
        state = {s.name: _newest(timelines[s.name], s.length, close - settings.log_delay) for s in schema.sequences}
        yield STATE, partition, _state_rows(settings, state, state if whole else new, close), {}
        yield USER_AGGREGATES, partition, _advance_users(settings, own, cross, rows, items, partition, whole), {}
        for tally in (own, *cross):
            tally.forget_before(close)
        counted.rows = pl.concat([counted.rows, _item_rows(settings, counted, [partition])])
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
    items = _profiles(settings, "items", "item_id", schema.side("item"), None)
    counted = item_tally(schema)
    _restore_items(settings, counted, earlier, moment)
    marked = impressions.with_columns(bucket_column(pl.col("user_id"), settings.buckets).alias("bucket"))
    for (bucket,), part in marked.partition_by("bucket", as_dict=True, include_key=False).items():
        own, cross = user_tallies(schema)
        _restore_users(settings, own, cross, bucket, earlier, moment)
        users = _profiles(settings, "users", "user_id", schema.side("user"), bucket)
        state = _load_state(settings, bucket, earlier, part.select("user_id").unique())
        timelines = {name: _in_order(events) for name, events in state.items()}
        rows.append(_samples(settings, part, timelines, users, items, own, cross, counted))
    return pa.concat_tables(rows)


def log_rows(settings: BuildSettings, partition: str, bucket: int) -> tuple[dict[str, pl.DataFrame], dict[str, int]]:
    """One bucket's rows of every log in a partition, keys as text, and how many impressions there were.

    Of impressions only the good ones; of events each once.
    """
    raw = {role: settings.tables[role].slice([partition], bucket, settings.buckets) for role in settings.schema.logs}
    good, rejected = quarantine(raw["impressions"], settings.schema, partition, settings.grain, settings.now)
    counts = {"impressions": raw["impressions"].height, "quarantined": rejected.height}
    good = _with_feedback(settings, good, partition)
    raw = {role: good if role == "impressions" else distinct_events(rows) for role, rows in raw.items()}
    keys = ("request_id", "user_id", "item_id")
    return {
        role: rows.with_columns(pl.col(key).cast(pl.String) for key in keys if key in rows.columns)
        for role, rows in raw.items()
    }, counts


def _with_feedback(settings: BuildSettings, impressions: pl.DataFrame, partition: str) -> pl.DataFrame:
    """Impressions with the labels that came later, as columns named like their tasks.

    A label is the value of the newest row of ``feedback`` within the attribution window, 0 without one, and null
    (masked) for the whole partition until the window of its last moment has passed.
    """
    tasks = settings.schema.delayed_tasks
    if not tasks:
        return impressions
    opening, close = partition_bounds(partition, settings.grain)
    table = settings.tables[FEEDBACK]
    window = settings.schema.attribution_window
    parts = feedback_partitions(table.partitions(), opening, close + window, settings.grain)
    keys = ["request_id", "item_id"]
    own = impressions.select(*[pl.col(key).cast(pl.String) for key in keys], pl.col("ts").alias("shown"))
    given = table.scan(parts).select(
        *[pl.col(key).cast(pl.String) for key in keys],
        pl.col("label").cast(pl.String),
        pl.col("value").cast(pl.Int64),
        "ts",
    )
    rows = table.collect(given.filter(pl.col("label").is_in([task.name for task in tasks])), parts)
    rows = own.join(rows, on=keys, how="inner")
    labels = []
    for task in tasks:
        last = pl.col("shown") + (task.attribution_window or 0)
        newest = (
            rows.filter((pl.col("label") == task.name) & pl.col("ts").is_between("shown", last))
            .drop_nulls("value")
            .sort("ts", "value")
            .unique(keys, keep="last")
            .select(*keys, (pl.col("value") > 0).cast(pl.Int8).alias(task.name))
        )
        label = own.join(newest, on=keys, how="left", maintain_order="left")[task.name].fill_null(0)
        is_known = close + (task.attribution_window or 0) <= settings.now
        labels.append(label if is_known else pl.repeat(None, len(own), dtype=pl.Int8, eager=True).alias(task.name))
    return impressions.with_columns(labels)


def feedback_partitions(partitions: Iterable[str], low: int, high: int, grain: Grain) -> list[str]:
    """The partitions of feedback that can hold rows of ``low ≤ ts < high``, microseconds UTC, and the one at high."""
    bounds = {partition: partition_bounds(partition, grain) for partition in partitions}
    return [partition for partition, (opening, close) in bounds.items() if close > low and opening <= high]


def _timeline_types(sequence: BehaviourSequence) -> Iterator[tuple[Any, pa.DataType]]:
    yield None, pa.int64()
    for event_field in sequence.fields:
        yield event_field, code_type(event_field)


def _profiles(
    settings: BuildSettings, role: str, key: str, features: Sequence[Feature], bucket: int | None
) -> pl.DataFrame:
    """Profile snapshots ordered by updated_at: key, updated_at, known, a code per feature; keys to cross as text."""
    table = settings.tables[role]
    if bucket is not None and table.is_bucketed():
        frame = table.collect(table.scan().filter(pl.col("bucket").cast(pl.Int32) == bucket))
    else:
        frame = table.collect(table.scan())
        if bucket is not None:
            frame = frame.filter(bucket_column(pl.col(key), settings.buckets) == bucket)
    texts = []
    for column in settings.schema.cross_keys if role == "items" else ():
        kind = pl.List(pl.String) if isinstance(frame.schema[column], pl.List) else pl.String
        texts.append(pl.col(column).cast(kind).alias(cross_column(column)))
    return frame.select(
        pl.col(key).cast(pl.String),
        "updated_at",
        pl.lit(True).alias("known"),
        *[encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in features],
        *texts,
    ).sort("updated_at", maintain_order=True)


def _new_events(settings: BuildSettings, sequence: BehaviourSequence, events: pl.DataFrame) -> pl.DataFrame:
    """Encoded events of one partition, ordered by (user, ts, event_id)."""
    if sequence.where is not None:
        events = events.filter(pl.sql_expr(sequence.where))
    return events.sort("user_id", "ts", "event_id").select(
        "user_id",
        "ts",
        *[encode(event_field, pl.col(event_field.source)).alias(event_field.name) for event_field in sequence.fields],
        hash_ids(pl.col("event_id")).alias(EVENT_ID),
    )


def _load_state(
    settings: BuildSettings, bucket: int, earlier: Sequence[str], users: pl.DataFrame | None = None
) -> dict[str, pl.DataFrame]:
    """The newest state of these users of the bucket (default: all), one row per event and sequence.

    Partitions are read newest first, only until everyone is found.
    """
    schema, missing = settings.schema, users
    found = [pl.DataFrame(pl.from_arrow(state_schema(schema).empty_table()))]
    for partition in reversed(_since_snapshot(settings, earlier)):
        if missing is not None and missing.is_empty():
            break
        rows = _bucket_rows(settings, STATE, state_schema(schema), bucket, [partition])
        if missing is not None:
            rows = rows.join(missing, on="user_id", how="semi", maintain_order="left")
            missing = missing.join(rows, on="user_id", how="anti")
        found.append(rows)
    rows = pl.concat(found).unique("user_id", keep="first", maintain_order=True)
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


def _bucket_rows(
    settings: BuildSettings, table: str, schema: pa.Schema, bucket: int | None, partitions: Sequence[str]
) -> pl.DataFrame:
    """Rows of one of the builder's tables in some partitions, of one bucket or all."""
    if not partitions or not settings.table(table).exists():
        return pl.DataFrame(pl.from_arrow(schema.empty_table()))
    rows = settings.table(table).scan(partitions)
    if bucket is not None:
        rows = rows.filter(pl.col("bucket") == str(bucket))
    return settings.table(table).collect(rows.select(schema.names), partitions)


def _restore_users(
    settings: BuildSettings, own: Tally, cross: Sequence[Tally], bucket: int, earlier: Sequence[str], opening: int
) -> None:
    """Bring the user's tallies to where the earlier partitions left them."""
    needed = _needed(settings, [own, *cross], earlier, opening)
    rows = _bucket_rows(settings, USER_AGGREGATES, user_aggregates_schema(settings.schema), bucket, needed).sort("ts")
    _restore(settings, own, rows, earlier, opening)
    for tally in cross:
        (feature,) = tally.features
        columns = [key_column(feature), *_with_deltas([feature])]
        long = rows.select("user_id", "ts", "dt", *columns).filter(pl.col(columns[0]).list.len() > 0).explode(columns)
        newest = rows.filter(pl.col("ts") <= opening).group_by("user_id").agg(pl.col("ts").max().alias("newest"))
        # a list is a user's whole state: keys that only an older list has are gone
        long = long.join(newest, on="user_id", how="left", maintain_order="left").filter(
            (pl.col("ts") >= pl.col("newest")) | pl.col("newest").is_null() | (pl.col(delta_column(columns[1])) != 0)
        )
        stale = pl.col("ts") < pl.col("newest")
        _restore(settings, tally, long.rename({columns[0]: KEY}), earlier, opening, ~stale.fill_null(False))


def _restore_items(settings: BuildSettings, counted: Tally, earlier: Sequence[str], opening: int) -> None:
    """The counts of items that a request from ``opening`` on can read; the fold of items has written them."""
    counted.rows = _item_rows(settings, counted, _since_snapshot(settings, earlier, opening))
    counted.forget_before(opening)


def _item_rows(settings: BuildSettings, counted: Tally, partitions: Sequence[str]) -> pl.DataFrame:
    rows = _bucket_rows(settings, ITEM_AGGREGATES, item_aggregates_schema(settings.schema), None, partitions)
    return rows.sort("ts").select(counted.rows.columns)


def _needed(settings: BuildSettings, tallies: Sequence[Tally], earlier: Sequence[str], opening: int) -> Sequence[str]:
    """The earlier partitions that the tallies are restored from: states as of ``opening``, and open windows."""
    since = _since_snapshot(settings, earlier, opening)
    longest = max((window for tally in tallies for window in tally.windows), default=0)
    first = partition_number(earlier[-1], settings.grain) - longest + 1 if earlier else 0
    inside = [one for one in earlier if partition_number(one, settings.grain) >= first]
    return max(since, inside, key=len)


def _with_deltas(features: Sequence[Feature]) -> list[str]:
    return [name for column in value_columns(features) for name in (column, delta_column(column))]


def _restore(
    settings: BuildSettings,
    tally: Tally,
    rows: pl.DataFrame,
    earlier: Sequence[str],
    opening: int,
    current: pl.Expr | None = None,
) -> None:
    """Fill a tally from rows of its state table, ordered by ts; ``current`` marks those that are states."""
    if not earlier:
        return
    columns = value_columns(tally.features)
    states = rows if current is None else rows.filter(current)
    tally.rows = states.select(*tally.keys, "ts", *columns)
    tally.forget_before(opening)
    tally.number = partition_number(earlier[-1], settings.grain)
    numbers = {one: partition_number(one, settings.grain) for one in earlier}
    adds = pl.any_horizontal(pl.lit(False), *[pl.col(delta_column(column)) != 0 for column in columns])
    recent = rows.filter(adds).with_columns(pl.col("dt").replace_strict(numbers, return_dtype=pl.Int64).alias("number"))
    tally.recent = recent.filter(pl.col("number") > tally.number - max(tally.windows, default=0)).select(
        *tally.keys, "number", *[pl.col(delta_column(column)).alias(column) for column in columns]
    )


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
        crossed = _crossed(rows[aggregate.of], items, str(aggregate.key))
        added = deltas(tally.features, tally.keys, {aggregate.of: crossed})
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
        lists.append(state.group_by("user_id").agg(key_column(feature), *_with_deltas(tally.features)))
    users = own.current().select("user_id") if whole else pl.concat(changed).unique()
    result = users.join(own.current().drop("ts"), on="user_id", how="left").with_columns(pl.lit(ts).alias("ts"))
    columns = value_columns(own.features)
    result = result.join(
        delta.rename({column: delta_column(column) for column in columns}), on="user_id", how="left"
    ).with_columns(pl.col(delta_column(column)).fill_null(0) for column in columns)
    for one in lists:
        result = result.join(one, on="user_id", how="left")
    arrow = unpartitioned(user_aggregates_schema(settings.schema))
    return _to_arrow(result.select(arrow.names).sort("user_id"), arrow)


def _crossed(rows: pl.DataFrame, items: pl.DataFrame, key: str) -> pl.DataFrame:
    """Rows of a log with the ``key`` of their item as of their own time; one row per key when it has several."""
    if key == "item_id":
        return rows.with_columns(pl.col("item_id").alias(KEY)).drop_nulls(KEY)
    profiles = items.select("item_id", "updated_at", pl.col(cross_column(key)).alias(KEY))
    joined = _join_as_of(rows.drop(KEY, strict=False), profiles, "item_id")
    return (
        joined.explode(KEY, empty_as_null=True, keep_nulls=True) if isinstance(joined.schema[KEY], pl.List) else joined
    ).drop_nulls(KEY)


# --- the fold of items --------------------------------------------------------------------------------


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
            needed = _needed(settings, [tally], earlier, opening)
            rows = _bucket_rows(settings, ITEM_AGGREGATES, item_aggregates_schema(settings.schema), bucket, needed)
            _restore(settings, tally, rows.sort("ts"), earlier, opening)
        delta = sum_deltas(parts.filter(pl.col("dt") == partition).drop("dt", "bucket"), tally.features, tally.keys)
        ts = settings.known_at(partition)
        changed = tally.advance(delta, partition_number(partition, settings.grain), ts)
        if is_snapshot(partition, previous, settings.grain):
            changed = tally.current().with_columns(pl.lit(ts).alias("ts"))
        changed = changed.join(
            delta.rename({column: delta_column(column) for column in columns}), on="item_id", how="left"
        ).with_columns(pl.col(delta_column(column)).fill_null(0) for column in columns)
        yield partition, _to_arrow(changed.select(arrow.names).sort("item_id"), arrow)
        tally.forget_before(close)
        previous = partition


# --- sample rows --------------------------------------------------------------------------------------


def _in_order(events: pl.DataFrame) -> pl.DataFrame:
    """Events grouped by user in time order with their ``position`` in the user's timeline.

    The sort is stable and older partitions come first, so ties keep the order of (ts, event_id).
    """
    ordered = events.sort("user_id", "ts", maintain_order=True)
    return ordered.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).over("user_id").alias("position"))


def _count_before(events: pl.DataFrame, moments: pl.DataFrame) -> pl.Series:
    """For every row (user_id, before) of ``moments`` the user's events with ``ts < before``."""
    # both are ordered by time within every user, which is all that the join needs
    found = moments.join_asof(
        events.select("user_id", "ts", pl.col("position") + 1),
        left_on="before",
        right_on="ts",
        by="user_id",
        strategy="backward",
        check_sortedness=False,
        allow_exact_matches=False,
    )
    return found["position"].fill_null(0).cast(pl.Int64)


def _newest(events: pl.DataFrame, length: int, visible_until: int) -> pl.DataFrame:
    """The last L events before a moment and all after it: what any later request can see."""
    visible = (pl.col("ts") < visible_until).cast(pl.Int64).sum().over("user_id")
    return events.filter(pl.col("position") >= visible - length).drop("position")


def _samples(
    settings: BuildSettings,
    impressions: pl.DataFrame,
    timelines: Mapping[str, pl.DataFrame],
    users: pl.DataFrame,
    items: pl.DataFrame,
    own: Tally,
    cross: Sequence[Tally],
    counted: Tally,
) -> pa.Table:
    """Rows of the sample table for one bucket and partition, ordered by user."""
    schema = settings.schema
    arrow = unpartitioned(sample_schema(schema))
    if impressions.is_empty():
        return arrow.empty_table()
    weight = pl.col("weight").cast(pl.Float32).fill_null(1.0) if "weight" in impressions.columns else pl.lit(1.0)
    position = pl.col("position") if "position" in impressions.columns else pl.lit(0)
    # only what is needed, coded at once: no column of the user's own meets a name used here
    candidates = impressions.select(
        "request_id",
        "user_id",
        "item_id",
        "ts",
        position.alias("position"),
        weight.cast(pl.Float32).alias("weight"),
        *[pl.col(task.source).cast(pl.Int8).alias(label_column(task)) for task in schema.tasks],
        *[encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in schema.side("context")],
    ).sort("user_id", "ts", "request_id", "position", "item_id")
    candidates = _as_known(candidates, items, "item_id", schema.side("item"), counted)
    for tally in cross:
        candidates = candidates.with_columns(_crossed_values(candidates, tally))
    candidate = pl.struct(
        "item_id",
        pl.col("known").alias("item_known"),
        *[feature_column(feature) for feature in schema.item_side],
        *[label_column(task) for task in schema.tasks],
        "weight",
    )
    context = [pl.col(feature_column(feature)).first() for feature in schema.side("context")]
    requests = candidates.group_by("user_id", "ts", "request_id", maintain_order=True).agg(
        candidate.alias("candidates"), *context
    )
    requests = _as_known(requests, users, "user_id", schema.side("user"), own)
    moments = requests.select("user_id", before=pl.col("ts") - settings.log_delay)
    rows = requests.select("user_id").unique(maintain_order=True)
    for sequence in schema.sequences:
        end = end_column(sequence)
        events = timelines[sequence.name].join(rows, on="user_id", how="semi", maintain_order="left")
        requests = requests.with_columns(_count_before(events, moments).alias(end))
        window = requests.group_by("user_id", maintain_order=True).agg(
            start=(pl.col(end).min() - sequence.length).clip(0), stop=pl.col(end).max()
        )
        requests = requests.join(window, on="user_id", maintain_order="left").with_columns(
            (pl.col(end) - pl.col("start")).cast(pl.Int32).alias(end)
        )
        requests = requests.drop("start", "stop")
        seen = events.join(window, on="user_id", maintain_order="left").filter(
            pl.col("position").is_between(pl.col("start"), pl.col("stop"), closed="left")
        )
        lists = seen.group_by("user_id", maintain_order=True).agg(_lists(sequence))
        rows = rows.join(lists, on="user_id", how="left", maintain_order="left")
    request = pl.struct(
        "request_id",
        "ts",
        pl.col("known").alias("user_known"),
        *[end_column(sequence) for sequence in schema.sequences],
        *[feature_column(feature) for feature in schema.user_side],
        "candidates",
    )
    nested = requests.group_by("user_id", maintain_order=True).agg(request.alias("requests"))
    rows = rows.join(nested, on="user_id", maintain_order="left")
    return _to_arrow(rows.select(arrow.names), arrow)


def _as_known(
    rows: pl.DataFrame, profiles: pl.DataFrame, key: str, features: Sequence[Feature], counted: Tally
) -> pl.DataFrame:
    """Rows with what was known of their user or item by ``ts``: the newest profile and the counts.

    Someone is ``known`` with a profile by then, or when seen before the close of a partition whose counts were
    known. Without a profile codes are 0 and numbers null, but a known id is itself.
    """
    joined = _join_as_of(rows, profiles, key)
    counts = counted.as_of(rows)
    known = joined["known"].fill_null(False) | counts["known"]
    filled: list[pl.Expr | pl.Series] = [known.alias("known")]
    for feature in features:
        column = pl.col(feature_column(feature))
        if feature.source == key and feature.kind == "id":
            filled.append(pl.when(known).then(hash_ids(pl.col(key))).otherwise(0).alias(feature_column(feature)))
        elif feature.multi:
            filled.append(column.fill_null(pl.lit([], dtype=pl.List(pl.Int64))))
        elif feature.kind != "number":
            filled.append(column.fill_null(0))
    values = counts.select(
        aggregate_value(one, pl.col(count_column(one)), pl.col(sum_column(one))).alias(feature_column(one))
        for one in counted.features
    )
    return joined.with_columns(filled).hstack(values)


def _join_as_of(rows: pl.DataFrame, profiles: pl.DataFrame, key: str) -> pl.DataFrame:
    """Rows, in their order, with the columns of the newest profile that has ``updated_at ≤ ts``."""
    return (
        rows.with_row_index("row")
        .sort("ts")
        .join_asof(profiles, left_on="ts", right_on="updated_at", by=key, strategy="backward", check_sortedness=False)
        .sort("row")
        .drop("row", "updated_at", strict=False)
    )


def _crossed_values(candidates: pl.DataFrame, tally: Tally) -> pl.Series:
    """A cross feature of every candidate: the user's counts of all the keys that the item has, added up."""
    (feature,) = tally.features
    key = str(aggregate_of(feature).key)
    column = pl.col("item_id") if key == "item_id" else pl.col(cross_column(key))
    keyed = candidates.select("user_id", "ts", column.alias(KEY)).with_row_index("candidate")
    if isinstance(keyed.schema[KEY], pl.List):
        keyed = keyed.explode(KEY, empty_as_null=True, keep_nulls=True)
    counts = keyed.select("candidate").hstack(tally.as_of(keyed))
    per_candidate = counts.group_by("candidate", maintain_order=True).agg(pl.col(value_columns(tally.features)).sum())
    value = aggregate_value(feature, pl.col(count_column(feature)), pl.col(sum_column(feature)))
    return per_candidate.select(value.alias(feature_column(feature))).to_series()


def _lists(sequence: BehaviourSequence) -> list[pl.Expr]:
    return [
        pl.col("ts").alias(timeline_column(sequence, None)),
        *[pl.col(event_field.name).alias(timeline_column(sequence, event_field)) for event_field in sequence.fields],
    ]


def _state_rows(
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
        lists = state[sequence.name].group_by("user_id", maintain_order=True).agg(*_lists(sequence), event_ids)
        rows = rows.join(lists, on="user_id", how="left", maintain_order="left")
    return _to_arrow(rows.select(arrow.names), arrow)


def _to_arrow(rows: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """Cast to the table's Arrow types; who has nothing has an empty list, never null."""
    lists = [
        pl.col(column.name).fill_null(pl.lit([], dtype=rows.schema[column.name]))
        for column in schema
        if pa.types.is_list(column.type)
    ]
    table = rows.with_columns(lists).to_arrow(compat_level=pl.CompatLevel.oldest())
    return table.cast(schema)
