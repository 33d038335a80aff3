"""Sample rows of one bucket and partition: a user's timelines once, its requests, their candidates (DESIGN §2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
import pyarrow as pa

from features.builder.aggregates import (
    KEY,
    Tally,
    aggregate_of,
    aggregate_value,
    count_column,
    cross_column,
    sum_column,
    value_columns,
)
from features.builder.log_rows import join_as_of
from features.builder.states import BuildSettings, timeline_lists, to_arrow, unpartitioned
from features.encoding import encode, hash_ids
from features.sample_table import end_column, feature_column, label_column, sample_schema
from features.schema import Feature, Task

POSITION, START, STOP = "__position", "__start", "__stop"
"""Of an event in its user's timeline, and of the timeline's part that the requests see; no field has these names."""


def sample_rows(
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
        *[_label(task, impressions.columns).alias(label_column(task)) for task in schema.tasks],
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
            (pl.col(end).min() - sequence.length).clip(0).alias(START), pl.col(end).max().alias(STOP)
        )
        requests = requests.join(window, on="user_id", maintain_order="left").with_columns(
            (pl.col(end) - pl.col(START)).cast(pl.Int32).alias(end)
        )
        requests = requests.drop(START, STOP)
        seen = events.join(window, on="user_id", maintain_order="left").filter(
            pl.col(POSITION).is_between(START, STOP, closed="left")
        )
        lists = seen.group_by("user_id", maintain_order=True).agg(timeline_lists(sequence))
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
    return to_arrow(rows.select(arrow.names), arrow)


def _label(task: Task, columns: Sequence[str]) -> pl.Expr:
    """The label as the log has it; one that arrives later is null where feedback was not asked."""
    known = task.attribution_window is None or task.name in columns
    return pl.col(task.source).cast(pl.Int8) if known else pl.lit(None, pl.Int8)


def _as_known(
    rows: pl.DataFrame, profiles: pl.DataFrame, key: str, features: Sequence[Feature], counted: Tally
) -> pl.DataFrame:
    """Rows with what was known of their user or item by ``ts``: the newest profile and the counts.

    Someone is ``known`` with a profile by then, or when seen before the close of a partition whose counts were
    known. Without a profile codes are 0 and numbers null, but a known id is itself.
    """
    joined = join_as_of(rows, profiles, key)
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


def in_order(events: pl.DataFrame) -> pl.DataFrame:
    """Events grouped by user in time order with their ``POSITION`` in the user's timeline.

    The sort is stable and older partitions come first, so ties keep the order of (ts, event_id).
    """
    ordered = events.sort("user_id", "ts", maintain_order=True)
    return ordered.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).over("user_id").alias(POSITION))


def _count_before(events: pl.DataFrame, moments: pl.DataFrame) -> pl.Series:
    """For every row (user_id, before) of ``moments`` the user's events with ``ts < before``."""
    # both are ordered by time within every user, which is all that the join needs
    found = moments.join_asof(
        events.select("user_id", "ts", pl.col(POSITION) + 1),
        left_on="before",
        right_on="ts",
        by="user_id",
        strategy="backward",
        check_sortedness=False,
        allow_exact_matches=False,
    )
    return found[POSITION].fill_null(0).cast(pl.Int64)


def newest(events: pl.DataFrame, length: int, visible_until: int) -> pl.DataFrame:
    """The last L events before a moment and all after it: what any later request can see."""
    visible = (pl.col("ts") < visible_until).cast(pl.Int64).sum().over("user_id")
    return events.filter(pl.col(POSITION) >= visible - length).drop(POSITION)
