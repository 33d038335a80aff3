"""The log's impressions as flat frames: who was shown what, with its labels and what the samples hold of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from features.errors import CorankError
from features.sample_table import end_column, feature_column, label_column
from features.samples.source import SampleSource
from features.schema import Schema

IDENTITY = ("user_id", "request_id", "item_id", "ts")
"""Columns that identify an impression; request ids may repeat from one partition to the next."""

FREQUENT_VALUES = 10
"""So many of a category feature's most frequent values are segments."""

EVENTS = "visible events"


@dataclass(frozen=True)
class Impressions:
    """All impressions of a log, one row per candidate.

    Attributes:
        shown: all of them: :data:`IDENTITY` and the label of every task (null while it is not known).
        before: those of some requests before the test set, drawn at random, with features and the visible events of
            every sequence.
        test: those of the test set with the same columns, in the order of the sample table's files and rows: that of
            :func:`pipeline.evaluation.scoring.score_source`.
    """

    shown: pl.DataFrame
    before: pl.DataFrame
    test: pl.DataFrame


def read_impressions(source: SampleSource, cut: int, rows: int, candidates: int, seed: int = 0) -> Impressions:
    """Read every impression once; of those before the test set only some with their features.

    Args:
        cut: first request time of the test set, microseconds UTC.
        rows: about how many to draw before it …
        candidates: … of how many that the samples hold in all.

    Raises:
        CorankError: there are no impressions.
    """
    schema, draw = source.schema, np.random.default_rng(seed)
    share = min(1.0, rows / max(candidates, 1))
    labels = [label_column(task) for task in schema.tasks]
    shown, before, test = [], [], []
    for file in source.files():
        read = source.read(file, ("user_id", "requests"))
        if not read.num_rows:
            continue
        requests = pl.DataFrame(pl.from_arrow(read)).explode("requests").unnest("requests")
        candidate = pl.col("candidates").struct
        light = requests.select("user_id", "request_id", "ts", "candidates").explode("candidates")
        light = light.with_columns(candidate.field("item_id"), *map(candidate.field, labels)).drop_nulls("item_id")
        shown.append(light.select(*IDENTITY, *labels))
        is_test = pl.col("ts") >= cut
        drawn = requests.filter(is_test | pl.Series(draw.random(requests.height) < share))
        drawn = drawn.with_columns(_visible_events(schema)).drop(
            [end_column(sequence) for sequence in schema.sequences]
        )
        drawn = drawn.explode("candidates").unnest("candidates").drop_nulls("item_id")
        before.append(drawn.filter(~is_test))
        test.append(drawn.filter(is_test))
    if not shown:
        raise CorankError("evaluation: there are no impressions")
    return Impressions(pl.concat(shown), pl.concat(before), pl.concat(test))


def _visible_events(schema: Schema) -> Iterable[pl.Expr]:
    return [
        pl.col(end_column(sequence)).clip(0, sequence.length).cast(pl.Float64).alias(f"{EVENTS} of {sequence.name}")
        for sequence in schema.sequences
    ]


def declared_numbers(schema: Schema) -> Mapping[str, str]:
    """Columns by name of the numbers of requests and candidates, and of the counts of visible events."""
    numbers = {feature.name: feature_column(feature) for feature in schema.features if feature.kind == "number"}
    return numbers | {f"{EVENTS} of {sequence.name}": f"{EVENTS} of {sequence.name}" for sequence in schema.sequences}


def segments(impressions: Impressions, schema: Schema, cut: int) -> dict[str, np.ndarray]:
    """Parts of the test set on which a model may be better or worse, each as a mask of its candidates, bool [C].

    Users by how many events their request sees (thirds of the impressions with any), those without any, items never
    shown before the test set, and the frequent values of every category feature.
    """
    test = impressions.test
    known = impressions.shown.filter(pl.col("ts") < cut)["item_id"].unique()
    found = {"new items": ~test["item_id"].is_in(known.implode()).to_numpy()}
    if schema.sequences:
        columns = [f"{EVENTS} of {sequence.name}" for sequence in schema.sequences]
        events = test.select(pl.sum_horizontal(columns)).to_series().to_numpy()
        seen = events > 0
        found["new users"] = ~seen
        low, high = np.quantile(events[seen], [1 / 3, 2 / 3]) if seen.any() else (0.0, 0.0)
        found["users with few events"] = seen & (events <= low)
        found["users with some events"] = seen & (events > low) & (events <= high)
        found["users with many events"] = events > high
    for feature in schema.features:
        if feature.kind == "category":
            values = test[feature_column(feature)]
            every = values.explode() if feature.multi else values
            codes = every.drop_nulls().value_counts(sort=True)[every.name][:FREQUENT_VALUES]
            for code in codes:
                assert feature.vocabulary is not None
                name = f"{feature.name} {feature.vocabulary[code - 1] if code else 'unknown'}"
                members = values.list.contains(code) if feature.multi else values == code
                found[name] = members.fill_null(False).to_numpy()
    return {name: members for name, members in found.items() if members.any()}
