"""What one bucket reads of the user's own tables: good rows, events once, late labels, profiles as of a moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl

from features.builder.aggregates import (
    KEY,
    cross_column,
)
from features.builder.states import CLOSE, EVENT_ID, BuildSettings
from features.encoding import encode, hash_ids
from features.errors import DataGateError
from features.sample_table import feature_column, timeline_column
from features.schema import FEEDBACK, OTHER_UNITS, Feature, FieldSpec, Grain, Schema, partition_bounds
from features.schema import Sequence as BehaviourSequence
from features.validation import bounds_of, distinct_events, quarantine

FEEDBACK_ROWS = 1_000_000
"""Rows of feedback that are looked at together."""


def log_rows(
    settings: BuildSettings, partitions: Sequence[str], bucket: int
) -> tuple[dict[str, pl.DataFrame], dict[str, dict[str, int]]]:
    """One bucket's rows of every log in some partitions, and how many impressions there were in each.

    Bad impressions are left out, and repeated events of a partition count once. Keys are text, and ``CLOSE`` tells the
    partition.
    """
    raw = {role: settings.tables[role].slice(partitions, bucket, settings.buckets) for role in settings.schema.logs}
    raw = {role: rows.with_columns(pl.col("dt").cast(pl.String)) for role, rows in raw.items()}
    good, rejected = quarantine(raw["impressions"], settings.schema, partitions, settings.grain, settings.now)
    impressions, quarantined = (
        dict(rows.group_by("dt").agg(pl.len()).iter_rows()) for rows in (raw["impressions"], rejected)
    )
    counts = {
        partition: {"impressions": impressions.get(partition, 0), "quarantined": quarantined.get(partition, 0)}
        for partition in partitions
    }
    raw = {role: good if role == "impressions" else distinct_events(rows) for role, rows in raw.items()}
    keys, (_, close) = ("request_id", "user_id", "item_id"), bounds_of(partitions, settings.grain)
    return {
        role: rows.with_columns(
            close.alias(CLOSE), *[pl.col(key).cast(pl.String) for key in keys if key in rows.columns]
        )
        for role, rows in raw.items()
    }, counts


def items_named(settings: BuildSettings, partitions: Sequence[str], bucket: int) -> pl.DataFrame:
    """The items (item_id as text, each once) that a bucket's rows of the logs in some partitions name."""
    found = []
    for role in settings.schema.logs:
        table = settings.tables[role]
        rows = table.scan(partitions)
        if "item_id" in rows.collect_schema():
            of_bucket = rows.filter(table.in_bucket(bucket, settings.buckets))
            found.append(
                table.collect(of_bucket.select(pl.col("item_id").cast(pl.String).drop_nulls().unique()), partitions)
            )
    return pl.concat(found).unique()


def with_feedback(settings: BuildSettings, impressions: pl.DataFrame, partitions: Sequence[str]) -> pl.DataFrame:
    """Impressions with the labels that came later, as columns named like their tasks.

    A label is the value of the newest row of ``feedback`` within the attribution window, 0 without one, and null
    (masked) for a whole partition until the window of its last moment has passed.

    Args:
        partitions: of the impressions, oldest first.
    """
    tasks = settings.schema.delayed_tasks
    if not tasks:
        return impressions
    opening, close = (partition_bounds(partitions[end], settings.grain)[end] for end in (0, -1))
    table = settings.tables[FEEDBACK]
    window = settings.schema.attribution_window
    parts = feedback_partitions(table.partitions(), opening, close + window, settings.grain)
    keys = ["request_id", "item_id"]
    shown = impressions.select(*[pl.col(key).cast(pl.String) for key in keys], pl.col("ts").alias("shown"), CLOSE)
    given = table.scan(parts).select(
        *[pl.col(key).cast(pl.String) for key in keys],
        pl.col("label").cast(pl.String),
        pl.col("value").cast(pl.Int64),
        "ts",
        pl.col("dt").cast(pl.String),
    )
    found = []
    for portion in table.portions(given, FEEDBACK_ROWS, parts):  # so memory holds one portion and the bucket's own rows
        _refuse_bad_feedback(portion, settings.grain)
        found.append(portion.join(shown, on=keys, how="inner"))
    rows = pl.concat([given.clear().collect().join(shown, on=keys, how="inner"), *found])
    labels = []
    for task in tasks:
        span = task.attribution_window or 0
        newest = (
            rows.filter((pl.col("label") == task.name) & pl.col("ts").is_between("shown", pl.col("shown") + span))
            .drop_nulls("value")
            .sort("ts", "value")
            .unique([*keys, CLOSE], keep="last")
            .select(*keys, CLOSE, (pl.col("value") > 0).cast(pl.Int8).alias(task.name))
        )
        given_label = pl.col(task.name).fill_null(0)
        labels.append(
            shown.join(newest, on=[*keys, CLOSE], how="left", maintain_order="left")
            .select(pl.when(pl.col(CLOSE) + span <= settings.now).then(given_label).alias(task.name))
            .to_series()
        )
    return impressions.with_columns(labels)


def _refuse_bad_feedback(rows: pl.DataFrame, grain: Grain) -> None:
    """Raise on rows that would silently give no label, or a wrong one.

    Raises:
        DataGateError: table, partition and count of rows without a key, with another value than 0 or 1, or with a ts
            outside of their partition.
    """
    bounds = {str(partition): partition_bounds(str(partition), grain) for partition in rows["dt"].unique()}
    spans = pl.DataFrame(
        [(partition, *span) for partition, span in bounds.items()],
        schema={"dt": pl.String, "opening": pl.Int64, "close": pl.Int64},
        orient="row",
    )
    rows = rows.join(spans, on="dt", how="left")
    rules = {
        "lack request_id, item_id, label or ts": pl.any_horizontal(
            pl.col("request_id", "item_id", "label", "ts").is_null()
        ),
        "have a value that is not 0 or 1": ~pl.col("value").is_in([0, 1]),
        **{
            f"have a wrong unit: ts looks like {unit}; cast to microseconds": pl.col("ts").is_between(
                *span, closed="left"
            )
            for unit, span in OTHER_UNITS.items()
        },
        "have a ts outside of the partition": ~pl.col("ts").is_between("opening", "close", closed="left"),
    }
    for problem, broken in rules.items():
        bad = rows.filter(broken.fill_null(False))
        if bad.height:
            raise DataGateError(
                f"table {FEEDBACK}, partition {bad['dt'].sort()[0]}: {bad.height:,} rows {problem}; correct them and "
                "write their partition again"
            )


def feedback_partitions(partitions: Iterable[str], low: int, high: int, grain: Grain) -> list[str]:
    """The partitions of feedback that can hold rows of ``low ≤ ts < high``, microseconds UTC, and the one at high."""
    bounds = {partition: partition_bounds(partition, grain) for partition in partitions}
    return [partition for partition, (opening, close) in bounds.items() if close > low and opening <= high]


def profiles_of(
    settings: BuildSettings, role: str, key: str, features: Sequence[Feature], owners: int | pl.DataFrame
) -> pl.DataFrame:
    """Profile snapshots ordered by updated_at: key, updated_at, known, a code per feature.

    Those of items also have the keys to cross, as text, and the side information of events. Where there is no such
    table, nobody has a profile.

    Args:
        owners: whose: those of a bucket, or those named as text in the column ``key``.
    """
    table = settings.tables.get(role)
    if table is None:
        frame = pl.DataFrame(schema={key: pl.String, "updated_at": pl.Int64})
    elif isinstance(owners, int):
        frame = table.slice(None, owners, settings.buckets)
    else:
        wanted = pl.col(key).cast(pl.String)
        frame = table.collect(
            table.scan().join(owners.lazy(), left_on=wanted, right_on=key, how="semi", maintain_order="left")
        )
    texts = []
    for column in settings.schema.cross_keys if role == "items" else ():
        kind = pl.List(pl.String) if isinstance(frame.schema[column], pl.List) else pl.String
        texts.append(pl.col(column).cast(kind).alias(cross_column(column)))
    joined = joined_fields(settings.schema) if role == "items" else {}
    return frame.select(
        pl.col(key).cast(pl.String),
        "updated_at",
        pl.lit(True).alias("known"),
        *[encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in features],
        *texts,
        *[encode(field, pl.col(field.source)).alias(name) for name, field in joined.items()],
    ).sort("updated_at", maintain_order=True)


def new_events(sequence: BehaviourSequence, events: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Encoded events, ordered by (user, ts, event_id), with ``CLOSE`` where they have it.

    Args:
        items: profiles with the columns of :func:`joined_fields`.
    """
    if sequence.where is not None:
        events = events.filter(pl.sql_expr(sequence.where))
    events = events.sort("user_id", "ts", "event_id")
    coded = events.select(
        "user_id",
        "ts",
        *[encode(field, pl.col(field.source)).alias(field.name) for field in sequence.own],
        hash_ids(pl.col("event_id")).alias(EVENT_ID),
        *[name for name in (CLOSE,) if name in events.columns],
    )
    if not sequence.joined:
        return coded
    names = {timeline_column(sequence, field): field.name for field in sequence.joined}
    known = join_as_of(events.select("item_id", "ts"), items.select("item_id", "updated_at", *names), "item_id")
    unknown = [
        pl.col(timeline_column(sequence, field)).fill_null(0) for field in sequence.joined if field.kind != "number"
    ]
    joined = known.with_columns(unknown).select(pl.col(column).alias(name) for column, name in names.items())
    marks = [name for name in (EVENT_ID, CLOSE) if name in coded.columns]
    return coded.hstack(joined).select("user_id", "ts", *[field.name for field in sequence.fields], *marks)


def joined_fields(schema: Schema) -> dict[str, FieldSpec]:
    """The side information that events take from their items, by ``timeline_column``."""
    return {timeline_column(sequence, field): field for sequence in schema.sequences for field in sequence.joined}


def crossed(rows: pl.DataFrame, items: pl.DataFrame, key: str) -> pl.DataFrame:
    """Rows of a log with the ``key`` of their item as of their own time; one row per key when it has several."""
    if key == "item_id":
        return rows.with_columns(pl.col("item_id").alias(KEY)).drop_nulls(KEY)
    profiles = items.select("item_id", "updated_at", pl.col(cross_column(key)).alias(KEY))
    joined = join_as_of(rows.drop(KEY, strict=False), profiles, "item_id")
    return (
        joined.explode(KEY, empty_as_null=True, keep_nulls=True) if isinstance(joined.schema[KEY], pl.List) else joined
    ).drop_nulls(KEY)


def join_as_of(rows: pl.DataFrame, profiles: pl.DataFrame, key: str) -> pl.DataFrame:
    """Rows, in their order, with the columns of the newest profile that has ``updated_at ≤ ts``."""
    return (
        rows.with_row_index("__row")
        .sort("ts")
        .join_asof(profiles, left_on="ts", right_on="updated_at", by=key, strategy="backward", check_sortedness=False)
        .sort("__row")
        .drop("__row", "updated_at", strict=False)
    )
