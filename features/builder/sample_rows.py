"""Sample rows of one bucket: a user's timelines once, its requests, their candidates (docs/design.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
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
from features.builder.lists import parts_of
from features.builder.log_rows import join_as_of
from features.builder.states import (
    CLOSE,
    BuildSettings,
    count_before,
    first_event,
    lists_of,
    unpartitioned,
)
from features.encoding import encode, hash_ids
from features.sample_table import end_column, feature_column, label_column, sample_schema
from features.schema import Feature, Task


def sample_rows(
    settings: BuildSettings,
    impressions: pl.DataFrame,
    closes: Sequence[int],
    timelines: Mapping[str, pl.DataFrame],
    users: pl.DataFrame,
    items: pl.DataFrame,
    per_user: Tally,
    cross: Sequence[Tally],
    per_item: Tally,
) -> Iterator[tuple[int, pa.Table]]:
    """Rows of the sample table for one bucket and some partitions: (close, rows ordered by user).

    Args:
        impressions: of the partitions with these closes, in the column ``CLOSE``.
        timelines: per sequence the events, in order, that these requests may see.
        per_user, cross, per_item: the tallies of users, of users and keys, and of items.
    """
    schema = settings.schema
    arrow = unpartitioned(sample_schema(schema, stored=True))
    if impressions.is_empty():
        yield from ((close, arrow.empty_table()) for close in closes)
        return
    requests = _requests(settings, impressions, users, items, per_user, cross, per_item)
    moments = requests.select("user_id", before=pl.col("ts") - settings.log_delay)
    rows = requests.select(CLOSE, "user_id").unique(maintain_order=True)
    seen: dict[str, tuple[pl.DataFrame, np.ndarray, np.ndarray]] = {}
    for sequence in schema.sequences:
        end, window = pl.col(end_column(sequence)), [CLOSE, "user_id"]
        events = timelines[sequence.name].join(rows, on="user_id", how="semi", maintain_order="left")
        requests = requests.with_columns(pl.Series(end_column(sequence), count_before(events, moments)))
        start = (end.min() - sequence.length).clip(0)
        spans = requests.group_by(window, maintain_order=True).agg(start.alias("start"), end.max().alias("stop"))
        requests = requests.with_columns((end - start.over(window)).cast(pl.Int32))
        opening = first_event(events, spans)
        seen[sequence.name] = events, opening + spans["start"].to_numpy(), opening + spans["stop"].to_numpy()
    request = pl.struct(
        "request_id",
        "ts",
        pl.col("known").alias("user_known"),
        *[end_column(sequence) for sequence in schema.sequences],
        *[feature_column(feature) for feature in schema.stored_user_side],
        "candidates",
    )
    nested = requests.group_by(CLOSE, "user_id", maintain_order=True).agg(request.alias("requests"))
    for close, first, last in parts_of(nested[CLOSE], closes):
        part = nested[first:last].drop(CLOSE).to_arrow(compat_level=pl.CompatLevel.oldest())
        columns = {name: part[name] for name in part.column_names}
        for sequence in schema.sequences:
            events, start_row, stop_row = seen[sequence.name]
            columns |= lists_of(sequence, events, start_row[first:last], stop_row[first:last], event_ids=False)
        yield close, pa.table({name: columns[name] for name in arrow.names}).cast(arrow)


def _requests(
    settings: BuildSettings,
    impressions: pl.DataFrame,
    users: pl.DataFrame,
    items: pl.DataFrame,
    per_user: Tally,
    cross: Sequence[Tally],
    per_item: Tally,
) -> pl.DataFrame:
    """One row per request, ordered by partition, user and time, with all but what it sees of timelines."""
    schema = settings.schema
    weight = pl.col("weight").cast(pl.Float32).fill_null(1.0) if "weight" in impressions.columns else pl.lit(1.0)
    position = pl.col("position") if "position" in impressions.columns else pl.lit(0)
    # only what is needed, coded at once, so that no column of the log can clash with a name used here
    candidates = impressions.select(
        CLOSE,
        "request_id",
        "user_id",
        "item_id",
        "ts",
        position.alias("position"),
        weight.cast(pl.Float32).alias("weight"),
        *[_label(task, impressions.columns).alias(label_column(task)) for task in schema.tasks],
        *[encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in schema.side("context")],
    ).sort(CLOSE, "user_id", "ts", "request_id", "position", "item_id")
    candidates = _as_known(candidates, items, "item_id", schema.side("item"), per_item)
    for tally in cross:
        candidates = candidates.with_columns(_crossed_values(candidates, tally))
    candidate = pl.struct(
        "item_id",
        pl.col("known").alias("item_known"),
        *[feature_column(feature) for feature in schema.stored_item_side],
        *[label_column(task) for task in schema.tasks],
        "weight",
    )
    context = [pl.col(feature_column(feature)).first() for feature in schema.side("context")]
    requests = candidates.group_by(CLOSE, "user_id", "ts", "request_id", maintain_order=True).agg(
        candidate.alias("candidates"), *context
    )
    return _as_known(requests, users, "user_id", schema.side("user"), per_user)


def _label(task: Task, columns: Sequence[str]) -> pl.Expr:
    """The label as the log has it; a label that arrives later is null where feedback was not read."""
    known = task.attribution_window is None or task.name in columns
    return pl.col(task.source).cast(pl.Int8) if known else pl.lit(None, pl.Int8)


def _as_known(
    rows: pl.DataFrame, profiles: pl.DataFrame, key: str, features: Sequence[Feature], tally: Tally
) -> pl.DataFrame:
    """Rows with what was known of their user or item by ``ts``: the newest profile and the counts.

    A user or item is ``known`` with a profile by then, or when seen before the close of a partition whose counts were
    known. Without a profile codes are 0 and numbers null, but a known id is itself.
    """
    joined = join_as_of(rows, profiles, key)
    counts = tally.as_of(rows)
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
        aggregate_value(feature, pl.col(count_column(feature)), pl.col(sum_column(feature))).alias(
            feature_column(feature)
        )
        for feature in tally.features
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
