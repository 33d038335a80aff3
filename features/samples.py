"""The sample builder: log partitions folded into per-user timelines, one row per user and partition.

Data flow of one bucket of users (DESIGN §2), inside one Ray task, in Polars:

    state of d−1 + events of d ──► timelines ──► rows of d: timeline once, requests, candidates
                                        └──────► state of d (only users with events in d)

Partition by partition the state is carried in memory, so building many partitions reads each log slice
once. Tasks write Parquet files; nothing is visible until the driver commits a partition.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa

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
from features.errors import CorankError
from features.lake import DataFile, Table, replace_partition, write_file
from features.schema import Feature, Grain, Schema, partition_bounds
from features.schema import Sequence as BehaviourSequence
from features.validation import quarantine

SAMPLES, STATE = "samples", "state"
EVENT_ID = "__event_id"
"""Hashed ids of events while a bucket is folded; no field of the user's own has this name."""


@dataclass(frozen=True)
class BuildSettings:
    """What the builder reads and writes; picklable, sent to every task.

    Attributes:
        tables: impressions, users, items and every event table.
        log_delay: microseconds; a request sees events with ``event.ts < request.ts − log_delay``.
        root: below it lie the tables ``samples`` and ``state``.
        now: microseconds UTC; later timestamps are quarantined.
    """

    tables: Mapping[str, Table]
    schema: Schema
    grain: Grain
    buckets: int
    log_delay: int
    root: str
    now: int
    storage_options: Mapping[str, str] = field(default_factory=dict)

    def table_root(self, table: str) -> str:
        return f"{self.root}/{table}"


@dataclass
class PartitionCounts:
    """What went in and out of one partition."""

    impressions: int = 0
    quarantined: int = 0
    candidates: int = 0
    requests: int = 0
    users: int = 0
    events: int = 0
    timeline_events: int = 0

    def __iadd__(self, other: Mapping[str, int]) -> PartitionCounts:
        for name, value in other.items():
            setattr(self, name, getattr(self, name) + value)
        return self


def state_schema(schema: Schema) -> pa.Schema:
    """Arrow schema of the state table: a user's newest events per sequence, as of ``ts`` (the close of dt)."""
    return pa.schema(
        [
            pa.field("user_id", pa.string()),
            pa.field("ts", pa.int64()),
            *[
                pa.field(timeline_column(sequence, event_field), pa.list_(kind))
                for sequence in schema.sequences
                for event_field, kind in _timeline_types(sequence)
            ],
            *[pa.field(event_id_column(sequence), pa.list_(pa.int64())) for sequence in schema.sequences],
            pa.field("dt", pa.string()),
            pa.field("bucket", pa.string()),
        ]
    )


def build_partitions(
    settings: BuildSettings,
    partitions: Sequence[str],
    earlier: Sequence[str],
    impressions: Mapping[str, int],
    progress: Callable[[str, int, int], None],
) -> dict[str, PartitionCounts]:
    """Build and commit these partitions on Ray, each in one atomic commit per table.

    Args:
        partitions: consecutive, oldest first.
        earlier: partitions whose state precedes them.
        impressions: rows that each partition is known to hold.
        progress: called with (what, done, total).

    Raises:
        CorankError: the rows of a partition do not close: impressions ≠ candidates + quarantined, or fewer were
            read than the partition holds. Nothing is committed then.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    fold: Any = _fold_bucket  # Ray's type of a batch function does not know fn_args
    buckets = [{"bucket": bucket} for bucket in range(settings.buckets)]
    plan = ray.data.from_items(buckets, override_num_blocks=settings.buckets).map_batches(
        fold, batch_size=1, fn_args=(settings, tuple(partitions), tuple(earlier))
    )
    files: dict[tuple[str, str], list[DataFile]] = {}
    counts = {partition: PartitionCounts() for partition in partitions}
    blocks: Iterator[Any] = iter(plan.iter_batches(batch_size=None, batch_format="pyarrow"))
    for done, block in enumerate(blocks, start=1):
        for row in block.to_pylist():
            if row["file"] is not None:
                files.setdefault((row["table"], row["partition"]), []).append(DataFile(**json.loads(row["file"])))
            counts[row["partition"]] += json.loads(row["counts"])
        progress("buckets", done, settings.buckets)
    for partition in partitions:
        count = counts[partition]
        if count.impressions != impressions[partition]:
            raise CorankError(
                f"samples, partition {partition}: {count.impressions:,} of {impressions[partition]:,} impressions were "
                f"read in {settings.buckets} buckets. Set `buckets` in the config to the number that the table was "
                "laid out with; if that is right, the log changed meanwhile: run again."
            )
        if count.impressions != count.candidates + count.quarantined:
            raise CorankError(
                f"samples, partition {partition}: {count.impressions:,} impressions came in, but "
                f"{count.candidates:,} candidates and {count.quarantined:,} quarantined rows came out; "
                "nothing of it was committed. Please report this as a defect of corank."
            )
    schemas = {SAMPLES: sample_schema(settings.schema), STATE: state_schema(settings.schema)}
    for done, partition in enumerate(partitions, start=1):
        for table, schema in schemas.items():
            written = files.get((table, partition), [])
            replace_partition(settings.table_root(table), partition, written, schema, settings.storage_options)
        progress("partitions", done, len(partitions))
    return counts


def _fold_bucket(batch: Any, settings: BuildSettings, partitions: Sequence[str], earlier: Sequence[str]) -> Any:
    """Fold one bucket; returns the written files and counts, one row each."""
    rows: list[dict[str, Any]] = []
    for bucket in batch["bucket"]:
        for table, partition, content, counts in fold_bucket(settings, int(bucket), partitions, earlier):
            written = None
            if content.num_rows:
                where = {"dt": partition, "bucket": str(bucket)}
                written = write_file(settings.table_root(table), content, where, settings.storage_options)
            rows.append(
                {
                    "table": table,
                    "partition": partition,
                    "file": json.dumps(asdict(written)) if written else None,
                    "counts": json.dumps(counts),
                }
            )
    return pa.Table.from_pylist(
        rows,
        schema=pa.schema([(name, pa.string()) for name in ("table", "partition", "file", "counts")]),
    )


def fold_bucket(
    settings: BuildSettings, bucket: int, partitions: Iterable[str], earlier: Sequence[str]
) -> Iterator[tuple[str, str, pa.Table, dict[str, int]]]:
    """Rows of ``samples`` and ``state`` of one bucket, partition by partition.

    Yields:
        (table, partition, rows without partition columns, counts).
    """
    schema = settings.schema
    users = _profiles(settings, "users", "user_id", schema.side("user"), bucket)
    items = _profiles(settings, "items", "item_id", schema.side("item"), None)
    state = _load_state(settings, bucket, earlier)
    for partition in partitions:
        raw = settings.tables["impressions"].slice([partition], bucket, settings.buckets)
        impressions, rejected = quarantine(raw, schema, partition, settings.grain, settings.now)
        new = {s.name: _new_events(settings, s, partition, bucket) for s in schema.sequences}
        timelines = {name: _in_order(pl.concat([state[name], new[name]])) for name in new}
        samples = _samples(settings, impressions, timelines, users, items)
        sizes = candidate_counts(samples)
        yield (
            SAMPLES,
            partition,
            samples,
            {
                "impressions": raw.height,
                "quarantined": rejected.height,
                "candidates": sizes["candidates"],
                "requests": sizes["requests"],
                "users": sizes["rows"],
                "timeline_events": sizes["events"],
                "events": sum(events.height for events in new.values()),
            },
        )
        _, close = partition_bounds(partition, settings.grain)
        state = {s.name: _newest(timelines[s.name], s.length, close - settings.log_delay) for s in schema.sequences}
        yield STATE, partition, _state_rows(settings, state, new, close), {}


def _timeline_types(sequence: BehaviourSequence) -> Iterator[tuple[Any, pa.DataType]]:
    yield None, pa.int64()
    for event_field in sequence.fields:
        yield event_field, code_type(event_field)


def _profiles(
    settings: BuildSettings, role: str, key: str, features: Sequence[Feature], bucket: int | None
) -> pl.DataFrame:
    """Encoded profile snapshots: key, updated_at, known and one column per feature, ordered by updated_at."""
    frame = settings.tables[role].scan().collect()
    if bucket is not None:
        frame = frame.filter(bucket_column(pl.col(key), settings.buckets) == bucket)
    return frame.select(
        pl.col(key).cast(pl.String),
        "updated_at",
        pl.lit(True).alias("known"),
        *[encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in features],
    ).sort("updated_at", maintain_order=True)


def _new_events(settings: BuildSettings, sequence: BehaviourSequence, partition: str, bucket: int) -> pl.DataFrame:
    """Encoded events of one partition, ordered by (user, ts, event_id)."""
    events = settings.tables[sequence.events].slice([partition], bucket, settings.buckets)
    if sequence.where is not None:
        events = events.filter(pl.sql_expr(sequence.where))
    return events.sort("user_id", "ts", "event_id").select(
        pl.col("user_id").cast(pl.String),
        "ts",
        *[encode(event_field, pl.col(event_field.source)).alias(event_field.name) for event_field in sequence.fields],
        hash_ids(pl.col("event_id")).alias(EVENT_ID),
    )


def _load_state(settings: BuildSettings, bucket: int, earlier: Sequence[str]) -> dict[str, pl.DataFrame]:
    """The newest state of every user of the bucket, one row per event and sequence."""
    schema = settings.schema
    empty: pl.DataFrame = pl.DataFrame(pl.from_arrow(state_schema(schema).empty_table()))
    table = Table(STATE, settings.table_root(STATE), {}, settings.storage_options)
    rows = empty
    if earlier and table.exists():
        rows = (
            table.scan(earlier)
            .filter(pl.col("bucket") == str(bucket))
            .sort("ts")
            .group_by("user_id", maintain_order=True)
            .last()
            .collect()
        )
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


def _in_order(events: pl.DataFrame) -> pl.DataFrame:
    """Events grouped by user in time order with their ``position`` in the user's timeline.

    The sort is stable and older partitions come first, so ties keep the order of (ts, event_id).
    """
    ordered = events.sort("user_id", "ts", maintain_order=True)
    return ordered.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).over("user_id").alias("position"))


def _count_before(events: pl.DataFrame, moments: pl.DataFrame) -> pl.Series:
    """For every row (user_id, before) of ``moments`` the user's events with ``ts < before``."""
    last = events.group_by("user_id", "ts", maintain_order=True).agg(pl.col("position").max() + 1)
    found = (
        moments.with_row_index("row")
        .sort("before")
        .join_asof(
            last.sort("ts"),
            left_on="before",
            right_on="ts",
            by="user_id",
            strategy="backward",
            check_sortedness=False,
            allow_exact_matches=False,
        )
        .sort("row")
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
) -> pa.Table:
    """Rows of the sample table for one bucket and partition, ordered by user."""
    schema = settings.schema
    columns = [name for name in sample_schema(schema).names if name not in ("dt", "bucket")]
    arrow = pa.schema([sample_schema(schema).field(name) for name in columns])
    if impressions.is_empty():
        return arrow.empty_table()
    weight = pl.col("weight").cast(pl.Float32).fill_null(1.0) if "weight" in impressions.columns else pl.lit(1.0)
    position = pl.col("position") if "position" in impressions.columns else pl.lit(0)
    # only what is needed, coded at once: no column of the user's own meets a name used here
    candidates = impressions.select(
        pl.col("request_id", "user_id", "item_id").cast(pl.String),
        "ts",
        position.alias("position"),
        weight.cast(pl.Float32).alias("weight"),
        *[pl.col(task.source).cast(pl.Int8).alias(label_column(task)) for task in schema.tasks],
        *[encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in schema.side("context")],
    ).sort("user_id", "ts", "request_id", "position", "item_id")
    candidates = _as_of(candidates, items, "item_id", schema.side("item"))
    candidate = pl.struct(
        "item_id",
        pl.col("known").alias("item_known"),
        *[feature_column(feature) for feature in schema.side("item")],
        *[label_column(task) for task in schema.tasks],
        "weight",
    )
    context = [pl.col(feature_column(feature)).first() for feature in schema.side("context")]
    requests = candidates.group_by("user_id", "ts", "request_id", maintain_order=True).agg(
        candidate.alias("candidates"), *context
    )
    requests = _as_of(requests, users, "user_id", schema.side("user"))
    moments = requests.select("user_id", before=pl.col("ts") - settings.log_delay)
    rows = requests.select("user_id").unique(maintain_order=True)
    for sequence in schema.sequences:
        end, events = end_column(sequence), timelines[sequence.name]
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
        *[feature_column(feature) for feature in schema.side("user", "context")],
        "candidates",
    )
    nested = requests.group_by("user_id", maintain_order=True).agg(request.alias("requests"))
    rows = rows.join(nested, on="user_id", maintain_order="left")
    return _to_arrow(rows.select(columns), arrow)


def _as_of(rows: pl.DataFrame, profiles: pl.DataFrame, key: str, features: Sequence[Feature]) -> pl.DataFrame:
    """Join the newest profile with ``updated_at ≤ ts``; without one, codes are 0 and numbers null."""
    joined = (
        rows.with_row_index("row")
        .sort("ts")
        .join_asof(profiles, left_on="ts", right_on="updated_at", by=key, strategy="backward", check_sortedness=False)
        .sort("row")
        .drop("row", "updated_at")
    )
    filled = [pl.col("known").fill_null(False)]
    for feature in features:
        column = pl.col(feature_column(feature))
        if feature.multi:
            filled.append(column.fill_null(pl.lit([], dtype=pl.List(pl.Int64))))
        elif feature.kind != "number":
            filled.append(column.fill_null(0))
    return joined.with_columns(filled)


def _lists(sequence: BehaviourSequence) -> list[pl.Expr]:
    return [
        pl.col("ts").alias(timeline_column(sequence, None)),
        *[pl.col(event_field.name).alias(timeline_column(sequence, event_field)) for event_field in sequence.fields],
    ]


def _state_rows(
    settings: BuildSettings, state: Mapping[str, pl.DataFrame], new: Mapping[str, pl.DataFrame], close: int
) -> pa.Table:
    """State of the users with events in this partition, ordered by user."""
    schema = settings.schema
    full = state_schema(schema)
    arrow = pa.schema([column for column in full if column.name not in ("dt", "bucket")])
    if not new:
        return arrow.empty_table()
    rows = pl.concat([events.select("user_id") for events in new.values()]).unique().sort("user_id")
    rows = rows.with_columns(pl.lit(close, pl.Int64).alias("ts"))
    for sequence in schema.sequences:
        event_ids = pl.col(EVENT_ID).alias(event_id_column(sequence))
        lists = state[sequence.name].group_by("user_id", maintain_order=True).agg(*_lists(sequence), event_ids)
        rows = rows.join(lists, on="user_id", how="left", maintain_order="left")
    return _to_arrow(rows.select(arrow.names), arrow)


def _to_arrow(rows: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """Cast to the table's Arrow types; a user without events has an empty list, never null."""
    lists = [
        pl.col(column.name).fill_null(pl.lit([], dtype=rows.schema[column.name]))
        for column in schema
        if pa.types.is_list(column.type)
    ]
    table = rows.with_columns(lists).to_arrow(compat_level=pl.CompatLevel.oldest())
    return table.cast(schema)
