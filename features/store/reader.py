"""Reads what a request needs from the online store, and encodes it with the functions of the sample builder.

A value means the same offline and online, and what is not known at the time of a request reads as unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from feast import FeatureView
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Array, Bool, FeastType, Float32, Float64, Int64, String

from features.builder.aggregates import aggregate_values, cross_column
from features.delta.table import Table
from features.encoding import encode, encode_value
from features.errors import CorankError
from features.sample_table import event_id_column, feature_column, timeline_column
from features.schema import Feature
from features.store.counts import crossed, of_one, unchanged, values_at
from features.store.definitions import (
    ITEM_VIEW,
    UPDATED_AT,
    USER_VIEW,
    aggregate_fields,
    aggregates_view,
    sequence_view,
)
from features.store.feast_internals import read
from features.store.items import NEVER, Column, ItemTable, Stored, arrays, series
from features.store.online import FeatureStoreSettings, open_store, reachable, registered_view

READ_ROWS = 5_000
"""Entities of one read; SQLite limits the parameters of a statement."""

COUNTED_AT = "ts"
"""When the counts of a user or item became known, microseconds UTC; null for one that was never seen."""


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


@dataclass(frozen=True)
class Known:
    """What a request reads.

    Attributes:
        user: whether the user is known.
        codes: by feature_column of the user.
        histories: per sequence all stored events.
        items: by feature_column of items and cross features, and ``item_known``: [C] each; a missing number is NaN.
    """

    user: bool
    codes: dict[str, Any]
    histories: dict[str, History]
    items: dict[str, Column]


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
        self._user_views = [
            self._view(USER_VIEW, "user_id", self._user),
            self._view(aggregates_view(self.schema, "user"), "user_id", self._user_counts),
        ]
        self._item_views = [
            self._view(ITEM_VIEW, "item_id", self._item),
            self._view(aggregates_view(self.schema, "item"), "item_id", self._item_counts),
        ]
        self._sequence_views = []
        for sequence in self.schema.sequences:
            columns = [timeline_column(sequence, field) for field in (None, *sequence.fields)]
            self._sequence_views.append(self._view(sequence_view(sequence), "user_id", columns))
            _require(registered_view(self._store, sequence_view(sequence)), [*columns, event_id_column(sequence)])
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

    def request(self, user_id: str, item_ids: list[str], ts: int) -> Known:
        """What is known of a user and some items by ``ts`` (microseconds UTC), in one read of the user."""
        row = self._read_user(user_id, [*self._user_views, *self._sequence_views])
        known, codes = self._encoded(user_id, row, ts)
        items = self._items.take(item_ids, ts)
        counts = row if self._is_counted(row, ts) else {}
        for feature in self.schema.aggregates("cross"):
            items[feature_column(feature)] = crossed(feature, items, item_ids, counts, ts)
        for key in self.schema.cross_keys:
            del items[cross_column(key)]
        return Known(known, codes, self._histories(row), items)

    def _user_row(self, user_id: str) -> dict[str, Any]:
        """Profile and counts as they are stored; nulls where there are none."""
        return self._read_user(user_id, self._user_views)

    def _read_user(self, user_id: str, views: Iterable[tuple[FeatureView | None, list[str]]]) -> dict[str, Any]:
        return {name: values[0] for name, values in self._read(views, "user_id", [user_id]).items()}

    def _is_counted(self, row: Mapping[str, Any], ts: int) -> bool:
        return row.get(COUNTED_AT) is not None and row[COUNTED_AT] <= ts

    def _encoded(self, user_id: str, row: Mapping[str, Any], ts: int) -> tuple[bool, dict[str, Any]]:
        has_profile = row[UPDATED_AT] is not None and row[UPDATED_AT] <= ts
        is_counted = self._is_counted(row, ts)
        known = has_profile or is_counted
        raw = {name: row[name] if has_profile else None for name in self._user if name != "user_id"}
        raw["user_id"] = user_id if known else None
        codes = {
            feature_column(feature): encode_value(feature, raw[feature.source]) for feature in self.schema.side("user")
        }
        for feature in self.schema.aggregates("user"):
            value = aggregate_values(feature, *of_one(feature, row if is_counted else {}, ts))[0]
            codes[feature_column(feature)] = None if np.isnan(value) else float(value)
        return known, codes

    def sequences(self, user_id: str) -> dict[str, History]:
        """All stored events per sequence; empty arrays where there are none."""
        return self._histories(self._read_user(user_id, self._sequence_views))

    def _histories(self, row: Mapping[str, Any]) -> dict[str, History]:
        histories = {}
        for sequence in self.schema.sequences:
            fields = {
                field.name: np.array(
                    row[timeline_column(sequence, field)] or [], np.float32 if field.kind == "number" else np.int64
                )
                for field in sequence.fields
            }
            histories[sequence.name] = History(np.array(row[timeline_column(sequence, None)] or [], np.int64), fields)
        return histories

    def items(self, item_ids: list[str], ts: int) -> pl.DataFrame:
        """Encoded features of items [C], in this order: ``item_known`` and a feature_column per item feature.

        An item without a profile by ``ts`` (microseconds UTC) has code 0, no number and no values; its id is its own
        once it has been seen in the log. The columns that a cross feature needs stand beside, as text.
        """
        columns = self._items.take(item_ids, ts)
        return pl.DataFrame({name: series(name, values) for name, values in columns.items()})

    def _columns(self, name: str, key: str, features: Iterable[Feature]) -> dict[str, Any]:
        """Polars types of a profile's raw columns, its key and the keys of cross features included."""
        if name in self._absent:
            return {key: pl.String, UPDATED_AT: pl.Int64}
        view = registered_view(self._store, name)
        kinds = {feature.name: POLARS_TYPES[feature.dtype] for feature in view.features}
        keys = self.schema.cross_keys if key == "item_id" else ()
        sources = dict.fromkeys([*[feature.source for feature in features], *keys, UPDATED_AT])
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

    def _view(self, name: str, key: str, columns: Iterable[str]) -> tuple[FeatureView | None, list[str]]:
        """A view, None where nobody has a row of it, and those of these columns that are not the key."""
        values = [column for column in columns if column != key]
        return None if name in self._absent or not values else registered_view(self._store, name), values

    def _read(
        self, views: Iterable[tuple[FeatureView | None, list[str]]], key: str, ids: list[str]
    ) -> dict[str, list[Any]]:
        """Values by column of these views, None where nothing is stored."""
        keys = [EntityKey(join_keys=[key], entity_values=[Value(string_val=identifier)]) for identifier in ids]
        columns: dict[str, list[Any]] = {}
        with reachable(self._store):
            for view, names in views:
                found = (
                    read(self._store, view, keys, names) if view is not None and names else [(None, None)] * len(ids)
                )
                for name in names:
                    columns[name] = [
                        None if values is None or name not in values else _plain(values[name]) for _, values in found
                    ]
        return columns

    def _read_items(self, item_ids: list[str], ts: int) -> Stored:
        kinds = {**self._item, **self._item_counts}
        portions = []
        for start in range(0, len(item_ids), READ_ROWS):
            ids = item_ids[start : start + READ_ROWS]
            columns = {"item_id": ids, **self._read(self._item_views, "item_id", ids)}
            portions.append(pl.DataFrame(columns, schema=kinds))
        return self._encode_items(pl.concat(portions), ts)

    def _encode_items(self, raw: pl.DataFrame, ts: int) -> Stored:
        features, aggregates = self.schema.side("item"), self.schema.aggregates("item")
        id_features = [feature for feature in features if feature.source == "item_id" and feature.kind == "id"]
        keys = []
        for key in self.schema.cross_keys:
            kind = pl.List(pl.String) if isinstance(raw.schema[key], pl.List) else pl.String
            keys.append(raw[key].cast(kind).alias(cross_column(key)))
        profile = encode_features([feature for feature in features if feature not in id_features], raw)
        counted_at = (
            raw[COUNTED_AT] if COUNTED_AT in raw.columns else pl.repeat(None, raw.height, dtype=pl.Int64, eager=True)
        )
        known = counted_at.fill_null(NEVER).to_numpy()
        moments = np.maximum(known, ts)
        return Stored(
            arrays(pl.DataFrame([*profile, *keys])),
            raw[UPDATED_AT].fill_null(NEVER).to_numpy(),
            values_at(aggregates, raw, moments),
            known,
            *unchanged(aggregates, raw, known, moments),
            arrays(encode_features(id_features, raw)),
        )


def _plain(value: Value) -> Any:
    """A stored value as Python has it; None where there is none."""
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    stored = getattr(value, kind)
    if kind == "float_val":
        return np.float32(stored)  # as a text it is shorter than the same number in 64 bits
    return list(stored.val) if kind.endswith("_list_val") else stored


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
