"""Values of aggregates at a moment, from what the online store holds of their owners."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.builder.aggregates import (
    Entries,
    aggregate_of,
    aggregate_values,
    cross_column,
    key_column,
    state_columns,
    value_columns,
    within,
)
from features.sample_table import feature_column
from features.schema import Feature
from features.store.items import NEVER, Column


def of_one(feature: Feature, row: Mapping[str, Any], ts: int) -> tuple[np.ndarray, np.ndarray]:
    """Count and sum, [1] each, of a user's or item's aggregate at a moment; of an empty row nothing."""
    if aggregate_of(feature).window is None:
        count, total = (row.get(name) or 0 for name in value_columns([feature]))
        return np.array([count]), np.array([float(total)])
    until, counts, sums = (
        np.array(row.get(name) or [], np.float64 if name.startswith("sum") else np.int64)
        for name in state_columns(feature)
    )
    return within((np.zeros(len(until), np.int64), until, counts, sums), ts, 1)


def crossed(
    feature: Feature, items: Mapping[str, Column], item_ids: list[str], row: Mapping[str, Any], ts: int
) -> np.ndarray:
    """A cross feature of every item: the user's counts of all the keys that the item has, added up."""
    key = str(aggregate_of(feature).key)
    keys = item_ids if key == "item_id" else items[cross_column(key)]
    counts, totals, places = _per_key(feature, row, ts)
    if isinstance(keys, pa.Array):
        lengths = keys.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        owner, keys = np.repeat(np.arange(len(lengths)), lengths), keys.flatten().to_pylist()
    else:
        owner = np.arange(len(keys))
    # the last place holds nothing
    found = np.array([places.get(one, len(counts) - 1) for one in keys], np.int64)
    return aggregate_values(
        feature,
        np.bincount(owner, counts[found], len(item_ids)),
        np.bincount(owner, totals[found], len(item_ids)),
    )


def _per_key(feature: Feature, row: Mapping[str, Any], ts: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Counts and sums of a user's keys at a moment, one more of nothing after them, and the place of every key."""
    keys = row.get(key_column(feature)) or []
    places: dict[str, int] = {}
    owner = np.array([places.setdefault(key, len(places)) for key in keys], np.int64)
    stored = [np.array(row.get(name) or []) for name in state_columns(feature)]
    if aggregate_of(feature).window is None:
        counts, sums = stored
    else:
        until, counts, sums = stored
        owner, counts, sums = (values[until > ts] for values in (owner, counts, sums))
    size = len(places) + 1
    return np.bincount(owner, counts, size), np.bincount(owner, sums, size), places


def values_at(features: Iterable[Feature], stored: pl.DataFrame, ts: np.ndarray) -> dict[str, Column]:
    """The values of aggregates from what is stored of each owner, each at its row's moment."""
    columns: dict[str, Column] = {}
    for feature in features:
        if aggregate_of(feature).window is None:
            counts, totals = (stored[name].fill_null(0).to_numpy() for name in value_columns([feature]))
        else:
            entries = _entries(feature, stored)
            counts, totals = within(entries, ts[entries[0]], stored.height)
        columns[feature_column(feature)] = aggregate_values(feature, counts, totals)
    return columns


def unchanged(
    features: Iterable[Feature], stored: pl.DataFrame, known: np.ndarray, moments: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """From and until when the values of each row's moment hold, microseconds UTC; ``known`` is the first such."""
    since, until = known.copy(), np.full_like(known, NEVER)
    for feature in features:
        if aggregate_of(feature).window is not None:
            owner, ends, *_ = _entries(feature, stored)
            ahead = ends > moments[owner]
            np.maximum.at(since, owner[~ahead], ends[~ahead])
            np.minimum.at(until, owner[ahead], ends[ahead])
    return since, until


def _entries(feature: Feature, stored: pl.DataFrame) -> Entries:
    """What is stored of a windowed feature; the owner's number is its row."""
    lists = [stored[name] for name in state_columns(feature)]
    owner = np.repeat(np.arange(stored.height), lists[0].list.len().fill_null(0).to_numpy())
    until, counts, sums = (column.list.explode(empty_as_null=False, keep_nulls=False).to_numpy() for column in lists)
    return owner, until, counts, sums
