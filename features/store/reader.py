"""Reads what a request needs from the online store, and encodes it with the functions of the sample builder.

A value means the same offline and online, and what is not known at the time of a request reads as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
        self._user_views = (
            self._view(USER_VIEW, "user_id", self._user),
            self._view(aggregates_view(self.schema, "user"), "user_id", self._user_counts),
        )
        self._item_views = (
            self._view(ITEM_VIEW, "item_id", self._item),
            self._view(aggregates_view(self.schema, "item"), "item_id", self._item_counts),
        )
        self._sequence_views = {}
        for sequence in self.schema.sequences:
            columns = [timeline_column(sequence, field) for field in (None, *sequence.fields)]
            self._sequence_views[sequence.name] = self._view(sequence_view(sequence), "user_id", columns)
            _require(registered_view(self._store, sequence_view(sequence)), [*columns, event_id_column(sequence)])
        self._items = ItemTable(
            self._encode_items(_frame(self._item, {}, 1), _frame(self._item_counts, {}, 1), 0),
            self._read_items,
            settings.item_max_age_seconds,
            settings.max_cached_items,
        )

    def user(self, user_id: str) -> dict[str, Any] | None:
        """Raw profile with ``user_id`` and ``updated_at``; None when there is none."""
        profile, _ = self._read_user(user_id)
        return None if profile[UPDATED_AT] is None else {**profile, "user_id": user_id}

    def encoded_user(self, user_id: str, ts: int) -> tuple[bool, dict[str, Any]]:
        """Whether the user is known by ``ts`` (microseconds UTC), and a code per feature_column of the user.

        Someone unknown has code 0, no number and no values in every feature.
        """
        return self._encoded(user_id, *self._read_user(user_id), ts)

    def request(self, user_id: str, item_ids: list[str], ts: int) -> Known:
        """What is known of a user and some items by ``ts`` (microseconds UTC); each view is read once."""
        profile, counts = self._read_user(user_id)
        known, codes = self._encoded(user_id, profile, counts, ts)
        items = self._crossed(self._items.take(item_ids, ts), item_ids, counts, ts)
        return Known(known, codes, self.sequences(user_id), items)

    def unknown(self, item_ids: list[str]) -> Known:
        """What is known where nothing can be read: nobody, and no item. May be called beside another call."""
        nothing: dict[str, Any] = {UPDATED_AT: None, COUNTED_AT: None}
        _, codes = self._encoded("", dict.fromkeys(self._user) | nothing, nothing, 0)
        nobody = {name: None for view in self._sequence_views.values() for name in view[1]}
        items = self._crossed(self._items.unknown(len(item_ids)), item_ids, nothing, 0)
        return Known(False, codes, self._histories(lambda _: nobody), items)

    def _crossed(
        self, items: dict[str, Column], item_ids: list[str], counts: Mapping[str, Any], ts: int
    ) -> dict[str, Column]:
        """Items with the cross features, and without the keys that these are made of."""
        for feature in self.schema.aggregates("cross"):
            known_counts = counts if _is_counted(counts, ts) else {}
            items[feature_column(feature)] = crossed(feature, items, item_ids, known_counts, ts)
        for key in self.schema.cross_keys:
            del items[cross_column(key)]
        return items

    def _read_user(self, user_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Profile and counts as they are stored, which may have columns of the same name; None where there are none."""
        profile, counts = (self._read_one(view, user_id) for view in self._user_views)
        return profile, counts

    def _read_one(self, view: View, user_id: str) -> dict[str, Any]:
        return {name: values[0] for name, values in self._read(view, "user_id", [user_id]).items()}

    def _encoded(
        self, user_id: str, profile: Mapping[str, Any], counts: Mapping[str, Any], ts: int
    ) -> tuple[bool, dict[str, Any]]:
        has_profile = profile[UPDATED_AT] is not None and profile[UPDATED_AT] <= ts
        is_counted = _is_counted(counts, ts)
        known = has_profile or is_counted
        raw = {name: value if has_profile else None for name, value in profile.items()}
        raw["user_id"] = user_id if known else None
        codes = {
            feature_column(feature): encode_value(feature, raw[feature.source]) for feature in self.schema.side("user")
        }
        for feature in self.schema.aggregates("user"):
            value = aggregate_values(feature, *of_one(feature, counts if is_counted else {}, ts))[0]
            codes[feature_column(feature)] = None if np.isnan(value) else float(value)
        return known, codes

    def sequences(self, user_id: str) -> dict[str, History]:
        """All stored events per sequence; empty arrays where there are none."""
        return self._histories(lambda view: self._read_one(view, user_id))

    def _histories(self, read: Callable[[View], Mapping[str, Any]]) -> dict[str, History]:
        histories = {}
        for sequence in self.schema.sequences:
            row = read(self._sequence_views[sequence.name])
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
            self._absent.add(aggregates_view(self.schema, side))
            return {COUNTED_AT: pl.Int64}
        _require(registered_view(self._store, aggregates_view(self.schema, side)), [field.name for field in fields])
        return {field.name: POLARS_TYPES[field.dtype] for field in fields}

    def _view(self, name: str, key: str, columns: Iterable[str]) -> View:
        values = [column for column in columns if column != key]
        return None if name in self._absent else registered_view(self._store, name), values

    def _read(self, view: View, key: str, ids: list[str]) -> dict[str, list[Any]]:
        """Values by column of a view, None where nothing is stored."""
        stored, names = view
        if stored is None:
            return {name: [None] * len(ids) for name in names}
        keys = [EntityKey(join_keys=[key], entity_values=[Value(string_val=identifier)]) for identifier in ids]
        with reachable(self._store):
            found = [values or {} for _, values in read(self._store, stored, keys, names)]
        return {name: [_plain(values[name]) if name in values else None for values in found] for name in names}

    def _read_items(self, item_ids: list[str], ts: int) -> Stored:
        profiles, counts = [], []
        for start in range(0, len(item_ids), READ_ROWS):
            ids = item_ids[start : start + READ_ROWS]
            profile, counted = (self._read(view, "item_id", ids) for view in self._item_views)
            profiles.append(_frame(self._item, {"item_id": ids, **profile}, len(ids)))
            counts.append(_frame(self._item_counts, counted, len(ids)))
        return self._encode_items(pl.concat(profiles), pl.concat(counts), ts)

    def _encode_items(self, raw: pl.DataFrame, counts: pl.DataFrame, ts: int) -> Stored:
        """Of profiles and counts, a row each per item."""
        features, aggregates = self.schema.side("item"), self.schema.aggregates("item")
        id_features = [feature for feature in features if feature.source == "item_id" and feature.kind == "id"]
        keys = []
        for key in self.schema.cross_keys:
            kind = pl.List(pl.String) if isinstance(raw.schema[key], pl.List) else pl.String
            keys.append(raw[key].cast(kind).alias(cross_column(key)))
        profile = encode_features([feature for feature in features if feature not in id_features], raw)
        known = counts[COUNTED_AT].fill_null(NEVER).to_numpy()
        moments = np.maximum(known, ts)
        return Stored(
            arrays(pl.DataFrame([*profile, *keys])),
            raw[UPDATED_AT].fill_null(NEVER).to_numpy(),
            values_at(aggregates, counts, moments),
            known,
            *unchanged(aggregates, counts, known, moments),
            arrays(encode_features(id_features, raw)),
        )


View = tuple[FeatureView | None, list[str]]
"""A view of the store, None where nobody has a row of it, and those of its columns that are read, its key left out."""


def _is_counted(counts: Mapping[str, Any], ts: int) -> bool:
    return counts[COUNTED_AT] is not None and bool(counts[COUNTED_AT] <= ts)


def _frame(kinds: Mapping[str, Any], columns: Mapping[str, list[Any]], height: int) -> pl.DataFrame:
    """Columns of these kinds, nulls where they are not given."""
    nothing = [None] * height
    return pl.DataFrame({name: columns.get(name, nothing) for name in kinds}, schema=dict(kinds))


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
