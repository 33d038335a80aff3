"""Reads what a request needs from the online store, and encodes it with the functions of the sample builder.

A value means the same offline and online, and what is not known at the time of a request reads as unknown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from feast import FeatureView
from feast.types import Array, Bool, FeastType, Float32, Float64, Int64, String

from features.builder.aggregates import (
    KEY,
    Entries,
    aggregate_of,
    aggregate_value,
    count_column,
    cross_column,
    key_column,
    state_columns,
    sum_column,
    value_columns,
    within,
)
from features.delta.table import Table
from features.encoding import encode
from features.errors import CorankError
from features.sample_table import event_id_column, feature_column, timeline_column
from features.schema import Feature
from features.store.definitions import (
    ITEM_VIEW,
    UPDATED_AT,
    USER_VIEW,
    aggregate_fields,
    aggregates_view,
    sequence_view,
)
from features.store.online import FeatureStoreSettings, open_store, reachable, registered_view

READ_ROWS = 5_000
"""Entities of one read; SQLite limits the parameters of a statement."""

COUNTED_AT = "ts"
"""When the counts of a user or item became known, microseconds UTC; null for one that was never seen."""

NEVER = np.iinfo(np.int64).max
"""``updated_at`` of a profile that does not exist: later than any request."""

POLARS_TYPES: dict[FeastType, Any] = {
    String: pl.String,
    Int64: pl.Int64,
    Float32: pl.Float32,
    Float64: pl.Float64,
    Bool: pl.Boolean,
    Array(String): pl.List(pl.String),
    Array(Int64): pl.List(pl.Int64),
    Array(Float64): pl.List(pl.Float64),
}


@dataclass(frozen=True)
class History:
    """A user's events of one sequence, oldest first: ``ts`` [E] in microseconds UTC, ``fields`` [E] of codes."""

    ts: np.ndarray
    fields: dict[str, np.ndarray]


class OnlineReader:
    """What a request needs of the online store. Not for several threads at once.

    Raises (on creation):
        CorankError: the registry lacks a view or a feature of the schema.

    Raises (on reading):
        UnavailableError: the store does not answer.
    """

    def __init__(self, settings: FeatureStoreSettings) -> None:
        self.schema = settings.schema
        self._store = open_store(settings)
        tables: dict[Literal["users", "items"], Table | None] = {"users": settings.users, "items": settings.items}
        # without a profile table nobody has a profile
        self._absent = {
            USER_VIEW if role == "users" else ITEM_VIEW
            for role, table in tables.items()
            if table is None and not settings.schema.profile_columns(role)
        }
        self._user = self._columns(USER_VIEW, "user_id", settings.schema.side("user"))
        self._item = self._columns(ITEM_VIEW, "item_id", settings.schema.side("item"))
        self._user_counts = self._counts("user", settings.user_aggregates)
        self._item_counts = self._counts("item", settings.item_aggregates)
        for sequence in self.schema.sequences:
            _require(
                registered_view(self._store, sequence_view(sequence)),
                [*[timeline_column(sequence, field) for field in (None, *sequence.fields)], event_id_column(sequence)],
            )
        nothing = {name: [None] for name in (*self._item, *self._item_counts)}
        self._items = ItemTable(
            self._encode_items(pl.DataFrame(nothing, schema={**self._item, **self._item_counts}), 0),
            self._read_items,
            settings.item_max_age_seconds,
            settings.max_cached_items,
        )

    def user(self, user_id: str) -> dict[str, Any] | None:
        """Raw profile with ``user_id`` and ``updated_at``; None when there is none."""
        row = self._user_row(user_id)
        profile = {name: row[name] for name in self._user if name != "user_id"}
        return None if profile[UPDATED_AT] is None else {**profile, "user_id": user_id}

    def encoded_user(self, user_id: str, ts: int) -> tuple[bool, dict[str, Any]]:
        """Whether the user is known by ``ts`` (microseconds UTC), and a code per feature_column of the user.

        Someone unknown has code 0, no number and no values in every feature.
        """
        return self._encoded(user_id, self._user_row(user_id), ts)

    def request(self, user_id: str, item_ids: list[str], ts: int) -> tuple[bool, dict[str, Any], pl.DataFrame]:
        """What is known of a user and some items by ``ts`` (microseconds UTC): :meth:`encoded_user` and
        :meth:`items`, with the features of user and item together."""
        row = self._user_row(user_id)
        items = self.items(item_ids, ts)
        known_counts = self._is_counted(row, ts)
        counts = row if known_counts else {}
        crossed = [self._crossed(feature, items, item_ids, counts, ts) for feature in self.schema.aggregates("cross")]
        return *self._encoded(user_id, row, ts), items.with_columns(crossed)

    def _user_row(self, user_id: str) -> dict[str, Any]:
        """Profile and counts as they are stored; nulls where there are none."""
        views = {USER_VIEW: list(self._user), aggregates_view(self.schema, "user"): list(self._user_counts)}
        names = [f"{view}:{name}" for view, columns in views.items() for name in columns if name != "user_id"]
        return {name: values[0] for name, values in self._read(names, "user_id", [user_id]).items()}

    def _is_counted(self, row: Mapping[str, Any], ts: int) -> bool:
        return row.get(COUNTED_AT) is not None and row[COUNTED_AT] <= ts

    def _encoded(self, user_id: str, row: Mapping[str, Any], ts: int) -> tuple[bool, dict[str, Any]]:
        has_profile = row[UPDATED_AT] is not None and row[UPDATED_AT] <= ts
        is_counted = self._is_counted(row, ts)
        known = has_profile or is_counted
        raw = {name: [row[name] if has_profile and name != "user_id" else None] for name in self._user}
        raw["user_id"] = [user_id if known else None]
        features = self.schema.aggregates("user")
        names = [name for feature in features for name in state_columns(feature)]
        counts = pl.DataFrame(
            {name: [row[name] if is_counted else None] for name in names},
            schema={name: self._user_counts[name] for name in names},
        )
        profile = encode_features(self.schema.side("user"), pl.DataFrame(raw, schema=self._user))
        counted_values = _values_at(features, counts, ts)
        # a frame without columns has no rows, so that the parts are not stacked as frames
        return known, {column.name: column.to_list()[0] for part in (profile, counted_values) for column in part}

    def _crossed(
        self, feature: Feature, items: pl.DataFrame, item_ids: list[str], row: Mapping[str, Any], ts: int
    ) -> pl.Series:
        """A cross feature of every item: the user's counts of all the keys that the item has, added up."""
        key = str(aggregate_of(feature).key)
        keys = pl.Series(KEY, item_ids, pl.String) if key == "item_id" else items[cross_column(key)].alias(KEY)
        keyed = pl.DataFrame([keys]).with_row_index("candidate")
        if isinstance(keys.dtype, pl.List):
            keyed = keyed.explode(KEY, empty_as_null=True, keep_nulls=True)
        names = [key_column(feature), *state_columns(feature)]
        kinds = {name: self._user_counts[name].inner for name in names}
        counts = _per_key(feature, pl.DataFrame({name: row.get(name) or [] for name in names}, schema=kinds), ts)
        found = keyed.join(counts, on=KEY, how="left", maintain_order="left")
        summed = found.group_by("candidate", maintain_order=True).agg(pl.col(value_columns([feature])).sum())
        return summed.select(_values([feature])).to_series()

    def sequences(self, user_id: str) -> dict[str, History]:
        """All stored events per sequence; empty arrays where there are none."""
        histories = {}
        for sequence in self.schema.sequences:
            columns = {timeline_column(sequence, field): field for field in (None, *sequence.fields)}
            names = [f"{sequence_view(sequence)}:{column}" for column in columns]
            row = self._read(names, "user_id", [user_id])
            arrays = {
                field.name if field is not None else "ts": np.array(
                    row[name][0] or [], np.float32 if field is not None and field.kind == "number" else np.int64
                )
                for name, field in columns.items()
            }
            histories[sequence.name] = History(arrays.pop("ts"), arrays)
        return histories

    def items(self, item_ids: list[str], ts: int) -> pl.DataFrame:
        """Encoded features of items [C], in this order: ``item_known`` and a feature_column per item feature.

        An item without a profile by ``ts`` (microseconds UTC) has code 0, no number and no values; its id is its own
        once it has been seen in the log. The columns that a cross feature needs stand beside, as text.
        """
        return self._items.take(item_ids, ts)

    def _columns(self, name: str, key: str, features: Iterable[Feature]) -> dict[str, Any]:
        """Polars types of a profile's raw columns, its key and the keys of cross features included."""
        if name in self._absent:
            return {key: pl.String, UPDATED_AT: pl.Int64}
        view = registered_view(self._store, name)
        kinds = {feature.name: POLARS_TYPES[feature.dtype] for feature in view.features}
        crossed = self.schema.cross_keys if key == "item_id" else ()
        sources = dict.fromkeys([*[feature.source for feature in features], *crossed, UPDATED_AT])
        sources.pop(key, None)
        _require(view, sources)
        return {key: pl.String, **{source: kinds[source] for source in sources}}

    def _counts(self, side: Literal["user", "item"], table: Table | None) -> dict[str, Any]:
        """Polars types of the stored counts by column; ``ts`` is called ``COUNTED_AT``."""
        fields = aggregate_fields(self.schema, side)
        if table is None:
            if len(fields) > 1:
                raise CorankError(f"the model reads counts ({fields[1].name}), but the store's settings have none")
            return {}
        _require(registered_view(self._store, aggregates_view(self.schema, side)), [field.name for field in fields])
        return {field.name: POLARS_TYPES[field.dtype] for field in fields}

    def _read(self, names: list[str], key: str, ids: list[str]) -> dict[str, list[Any]]:
        """Values by column of these features (view:column)."""
        stored = [name for name in names if name.split(":", 1)[0] not in self._absent]
        response: dict[str, list[Any]] = {}
        if stored:
            with reachable(self._store):
                rows = [{key: identifier} for identifier in ids]
                response = self._store.get_online_features(features=stored, entity_rows=rows).to_dict()
        nothing = [None] * len(ids)
        columns = {name: name.split(":", 1)[1] for name in names}
        return {column: response[column] if name in stored else nothing for name, column in columns.items()}

    def _read_items(self, item_ids: list[str], ts: int) -> Stored:
        kinds = {**self._item, **self._item_counts}
        views = {ITEM_VIEW: self._item, aggregates_view(self.schema, "item"): self._item_counts}
        names = [f"{view}:{name}" for view, columns in views.items() for name in columns if name != "item_id"]
        portions = []
        for start in range(0, len(item_ids), READ_ROWS):
            ids = item_ids[start : start + READ_ROWS]
            portions.append(pl.DataFrame({"item_id": ids, **self._read(names, "item_id", ids)}, schema=kinds))
        return self._encode_items(pl.concat(portions), ts)

    def _encode_items(self, raw: pl.DataFrame, ts: int) -> Stored:
        features, aggregates = self.schema.side("item"), self.schema.aggregates("item")
        id_features = [feature for feature in features if feature.source == "item_id" and feature.kind == "id"]
        crossed = []
        for key in self.schema.cross_keys:
            kind = pl.List(pl.String) if isinstance(raw.schema[key], pl.List) else pl.String
            crossed.append(raw[key].cast(kind).alias(cross_column(key)))
        profile = encode_features([feature for feature in features if feature not in id_features], raw)
        counted_at = (
            raw[COUNTED_AT] if COUNTED_AT in raw.columns else pl.repeat(None, raw.height, dtype=pl.Int64, eager=True)
        )
        known = counted_at.fill_null(NEVER).to_numpy()
        moments = np.maximum(known, ts)
        return Stored(
            pl.DataFrame([*profile, *crossed]),
            raw[UPDATED_AT].fill_null(NEVER).to_numpy(),
            _values_at(aggregates, raw, moments),
            known,
            *_unchanged(aggregates, raw, known, moments),
            encode_features(id_features, raw),
        )


@dataclass(frozen=True)
class Stored:
    """Items as they are stored, encoded in parts, each with the time from which on it holds (microseconds UTC).

    Attributes:
        profile, updated_at: codes and numbers of the profile; ``NEVER`` without one.
        counts, counted_at: values of the aggregates; ``NEVER`` for an item that was never seen.
        counts_since, counts_until: from and until when these values hold, as windows move on.
        ids: features that are the item's own id; they hold as soon as either part does.
    """

    profile: pl.DataFrame
    updated_at: np.ndarray
    counts: pl.DataFrame
    counted_at: np.ndarray
    counts_since: np.ndarray
    counts_until: np.ndarray
    ids: pl.DataFrame

    def rows(self, rows: np.ndarray) -> Stored:
        return Stored(
            _rows(self.profile, rows),
            self.updated_at[rows],
            _rows(self.counts, rows),
            self.counted_at[rows],
            self.counts_since[rows],
            self.counts_until[rows],
            _rows(self.ids, rows),
        )

    def and_then(self, other: Stored) -> Stored:
        return Stored(
            pl.concat([self.profile, other.profile], rechunk=True),
            np.concatenate([self.updated_at, other.updated_at]),
            pl.concat([self.counts, other.counts], rechunk=True),
            np.concatenate([self.counted_at, other.counted_at]),
            np.concatenate([self.counts_since, other.counts_since]),
            np.concatenate([self.counts_until, other.counts_until]),
            pl.concat([self.ids, other.ids], rechunk=True),
        )


class ItemTable:
    """Read-through table of encoded items in memory: reading 500 items from a store takes 10 ms, from here 0.1.

    Args:
        blank: one row, which stands for whatever is not known at the time of a request.
        read: these ids as they are stored, in their order, with the counts of a moment (microseconds UTC).
        max_age: seconds until an entry is read again.
        max_items: the table is emptied when it would hold more ids.
    """

    def __init__(self, blank: Stored, read: Callable[[list[str], int], Stored], max_age: float, max_items: int) -> None:
        self._read = read
        self._max_age = max_age
        self._max_items = max_items
        self._rows: dict[str, int] = {}
        self._table = blank
        self._read_at = np.array([np.inf])

    def take(self, item_ids: list[str], ts: int) -> pl.DataFrame:
        """Rows of these items as known at ``ts``, in this order, with ``item_known``."""
        now = time.monotonic()
        rows = np.array([self._rows.get(item_id, -1) for item_id in item_ids], np.int64)
        stale = (rows < 0) | (self._read_at[rows] + self._max_age < now)
        stale |= (self._table.counted_at[rows] <= ts) & (
            (ts < self._table.counts_since[rows]) | (self._table.counts_until[rows] <= ts)
        )
        if stale.any():
            self._load(
                list(dict.fromkeys(item_id for item_id, old in zip(item_ids, stale, strict=True) if old)), ts, now
            )
            if len(self._rows) > self._max_items:
                self._keep_only(set(item_ids))
            rows = np.array([self._rows[item_id] for item_id in item_ids], np.int64)
        table = self._table
        profiled, has_counts = table.updated_at[rows] <= ts, table.counted_at[rows] <= ts
        known = profiled | has_counts
        parts = (
            _rows(table.ids, np.where(known, rows, 0)),
            _rows(table.profile, np.where(profiled, rows, 0)),
            _rows(table.counts, np.where(has_counts, rows, 0)),
        )
        columns = [column for part in parts for column in part]
        return pl.DataFrame([*columns, pl.Series("item_known", known)])

    def _load(self, item_ids: list[str], ts: int, now: float) -> None:
        fresh = self._read(item_ids, ts)
        size = len(self._read_at)
        self._rows.update(zip(item_ids, range(size, size + len(item_ids)), strict=True))
        self._table = self._table.and_then(fresh)
        self._read_at = np.concatenate([self._read_at, np.full(len(item_ids), now)])
        if len(self._read_at) > 2 * len(self._rows) + 1:
            self._keep_only(set(self._rows))

    def _keep_only(self, item_ids: set[str]) -> None:
        """Drop other items, and the rows that newer ones have replaced."""
        kept = [item_id for item_id in self._rows if item_id in item_ids]
        rows = np.array([0, *[self._rows[item_id] for item_id in kept]], np.int64)
        self._table, self._read_at = self._table.rows(rows), self._read_at[rows]
        self._rows = {item_id: row for row, item_id in enumerate(kept, start=1)}


def _rows(frame: pl.DataFrame, rows: np.ndarray) -> pl.DataFrame:
    """These rows; a frame without columns has none to take."""
    return frame[rows] if frame.width else frame


def _values_at(features: Iterable[Feature], stored: pl.DataFrame, ts: np.ndarray | int) -> pl.DataFrame:
    """The values of aggregates from what is stored of each owner, a row each; ``ts``: one moment, or each row's."""
    columns = []
    for feature in features:
        if aggregate_of(feature).window is None:
            columns += [stored[name] for name in value_columns([feature])]
        else:
            entries = _entries(feature, stored)
            moments = ts if isinstance(ts, int) else ts[entries[0]]
            columns += within(feature, entries, moments, stored.height)
    return pl.DataFrame(columns).select(_values(features))


def _unchanged(
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


def _per_key(feature: Feature, stored: pl.DataFrame, ts: int) -> pl.DataFrame:
    """What counts at a moment per key (``KEY`` and the value columns), from what is stored of a user's keys."""
    key = stored[key_column(feature)].alias(KEY)
    if aggregate_of(feature).window is None:
        return pl.DataFrame([key, *[stored[name] for name in value_columns([feature])]])
    until, counts, sums = (stored[name].to_numpy() for name in state_columns(feature))
    owner, keys = key.rle_id().to_numpy(), key.unique(maintain_order=True)  # entries are ordered by key
    return pl.DataFrame([keys, *within(feature, (owner, until, counts, sums), ts, len(keys))])


def _values(features: Iterable[Feature]) -> list[pl.Expr]:
    """The values of aggregates from their counts and sums, as the sample builder makes them."""
    return [
        aggregate_value(feature, pl.col(count_column(feature)), pl.col(sum_column(feature))).alias(
            feature_column(feature)
        )
        for feature in features
    ]


def encode_features(features: Iterable[Feature], raw: pl.DataFrame) -> pl.DataFrame:
    """One ``feature_column`` per feature from raw source columns: what the sample builder stores."""
    return raw.select(encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in features)


def _require(view: FeatureView, columns: Iterable[str]) -> None:
    present = {feature.name for feature in view.features}
    if missing := [column for column in columns if column not in present]:
        raise CorankError(
            f"the feature store's view {view.name} lacks {missing}, which the model reads. "
            "Run the pipeline with the model's features (`corank run`)."
        )
