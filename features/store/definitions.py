"""Feast objects derived from schemas: entities, one view per table or sequence, one feature service.

Profiles are stored as they are in their tables (raw), sequences as codes from the state table. No view has
a time to live: a value counts until a newer one replaces it.

Registered are the features of the config's schema and of the schemas of *live* models, which are or may soon be served.
Profiles have one view per table with the columns that any of these schemas reads. The meaning of codes and counts
depends on their declaration, so that a digest of it is part of their view's name: a changed declaration gets another
view beside that of the live model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import pyarrow as pa
from feast import Entity, FeatureView, Field, ValueType
from feast.types import Array, Bool, FeastType, Float32, Float64, Int64, String

from features.builder.aggregates import key_column, state_columns, state_fields
from features.delta.table import Table
from features.digest import digest
from features.errors import ConfigError
from features.sample_table import event_id_column, timeline_column
from features.schema import EventField, Feature, Schema
from features.schema import Sequence as BehaviourSequence
from features.store.delta import DeltaSource

USER_VIEW = "user_features"
ITEM_VIEW = "item_features"
SEQUENCE_VIEW = "user_sequences_"
AGGREGATES_VIEWS = {"user": "user_aggregates_", "item": "item_aggregates_"}
"""Prefixes of the views that are named by what they hold."""
SERVICE = "ranking"
UPDATED_AT = "updated_at"
"""When a profile became true (microseconds UTC). It is a feature, too, so that a reader can skip future profiles."""

USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
ITEM = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)


@dataclass(frozen=True)
class StoredView:
    """A view, and those of its features that its table has.

    Its other features are no longer in the table and stay online as last written; only a live model reads them.
    """

    view: FeatureView
    given: tuple[str, ...]


def sequence_view(sequence: BehaviourSequence) -> str:
    """Name of the view that holds a behaviour sequence."""
    stored = [sequence.events, sequence.where, sequence.length, *[_stored_field(field) for field in sequence.fields]]
    return f"{SEQUENCE_VIEW}{sequence.name}_{_identity(stored)}"


def aggregates_view(schema: Schema, side: Literal["user", "item"]) -> str:
    """Name of the view that holds the counts of users or items."""
    return f"{AGGREGATES_VIEWS[side]}{_identity([_stored_aggregate(feature) for feature in _counted(schema, side)])}"


def is_named_by_content(view: str) -> bool:
    return view.startswith((SEQUENCE_VIEW, *AGGREGATES_VIEWS.values()))


def timeline_prefix(view: str) -> str:
    """Name of the sequence in a :func:`sequence_view`, with which its features begin."""
    return view.removeprefix(SEQUENCE_VIEW).rpartition("_")[0]


def _identity(stored: object) -> str:
    return digest(stored)[:6]


def _stored_field(field: EventField) -> list[object]:
    """The parts of a field's declaration that decide its codes; embedding tables and their sizes do not."""
    return [field.name, field.source, field.of, field.kind, field.vocabulary, field.scale]


def _stored_aggregate(feature: Feature) -> list[object]:
    """The parts of a feature's declaration that decide its counts and sums, but not how a value is made of them."""
    aggregate = feature.aggregate
    assert aggregate is not None
    return [
        feature.name,
        feature.side,
        aggregate.of,
        aggregate.column,
        aggregate.where,
        aggregate.window,
        aggregate.key,
    ]


def stored_views(
    schema: Schema,
    live: Sequence[Schema],
    users: Table | None,
    items: Table | None,
    state: Table,
    counts: Mapping[Literal["user", "item"], Table],
    registered: Mapping[str, FeatureView],
) -> list[StoredView]:
    """The views of a schema, and those that live models read besides, in the order in which they are written.

    Args:
        live: schemas of live models.
        users, items: profile tables, with ``updated_at``; None: no view, and nobody has a profile.
        state: user_id, ts and per sequence of ``schema`` the list columns of
            :func:`features.sample_table.timeline_column` and :func:`features.sample_table.event_id_column`.
        counts: the tables of :mod:`features.builder.aggregates`, with ``ts``; none: no views.
        registered: by name; they know the types of columns that a profile table has lost.

    Raises:
        ConfigError: a feature's column is missing in its table, has a type that cannot be stored, or one that a live
            model cannot read.
    """
    every = (schema, *live)
    views = []
    if users is not None:
        views.append(
            _profile_view(USER_VIEW, USER, users, [_user_columns(each_schema) for each_schema in every], registered)
        )
        for live_schema in live:
            _require_readable(users, live_schema.side("user"))
    if items is not None:
        views.append(
            _profile_view(ITEM_VIEW, ITEM, items, [_item_columns(each_schema) for each_schema in every], registered)
        )
        for live_schema in live:
            _require_readable(items, live_schema.side("item"))
    by_name = {sequence.name: sequence for sequence in schema.sequences}
    sequences = {sequence_view(sequence): sequence for each_schema in every for sequence in each_schema.sequences}
    for name, sequence in sequences.items():
        view = _view(name, USER, state, "ts", _sequence_fields(sequence))
        views.append(StoredView(view, _names(view) if _is_part_of(sequence, by_name.get(sequence.name)) else ()))
    for side, table in counts.items():
        for each_schema in {aggregates_view(each_schema, side): each_schema for each_schema in every}.values():
            view = _view(
                aggregates_view(each_schema, side),
                USER if side == "user" else ITEM,
                table,
                "ts",
                aggregate_fields(each_schema, side),
            )
            declared = [_stored_aggregate(feature) for feature in _counted(schema, side)]
            lost = [feature for feature in _counted(each_schema, side) if _stored_aggregate(feature) not in declared]
            lost_columns = {column for feature in lost for column in (key_column(feature), *state_columns(feature))}
            views.append(StoredView(view, tuple(name for name in _names(view) if name not in lost_columns)))
    return views


def _is_part_of(sequence: BehaviourSequence, other: BehaviourSequence | None) -> bool:
    """Whether the other sequence's lists hold, event by event, all that this sequence's lists would."""
    if other is None or (sequence.events, sequence.where, sequence.length) != (other.events, other.where, other.length):
        return False
    return all(
        _stored_field(field) in [_stored_field(other_field) for other_field in other.fields]
        for field in sequence.fields
    )


def _sequence_fields(sequence: BehaviourSequence) -> list[Field]:
    fields = [
        Field(name=timeline_column(sequence, None), dtype=Array(Int64)),
        Field(name=event_id_column(sequence), dtype=Array(Int64)),
    ]
    for field in sequence.fields:
        dtype = Array(Float32) if field.kind == "number" else Array(Int64)
        fields.append(Field(name=timeline_column(sequence, field), dtype=dtype))
    return fields


def _counted(schema: Schema, side: Literal["user", "item"]) -> tuple[Feature, ...]:
    """The features whose counts are stored with users, or items."""
    return schema.aggregates("user", "cross") if side == "user" else schema.aggregates("item")


def aggregate_fields(schema: Schema, side: Literal["user", "item"]) -> list[Field]:
    """What is stored of a user's or item's counts: ``ts``, when they became known, and the columns of a state table.

    So of a feature with a window a historical retrieval, too, gives back lists (``until__``, ``counts__``, ``sums__``):
    what single partitions added, to be added up where ``until`` lies after the moment asked for.
    """
    columns = state_fields(schema.aggregates(side), schema.aggregates("cross") if side == "user" else ())
    stored = {pa.int64(): Int64, pa.float64(): Float64}
    lists = {pa.int64(): Array(Int64), pa.float64(): Array(Float64), pa.string(): Array(String)}
    return [
        Field(name="ts", dtype=Int64),
        *[
            Field(
                name=field.name,
                dtype=lists[field.type.value_type] if pa.types.is_list(field.type) else stored[field.type],
            )
            for field in columns
        ],
    ]


def _user_columns(schema: Schema) -> list[str]:
    return [feature.source for feature in schema.side("user")]


def _item_columns(schema: Schema) -> list[str]:
    """The columns of items that candidates, events and cross features read."""
    return [*[feature.source for feature in schema.side("item")], *schema.joined_columns, *schema.cross_keys]


def _profile_view(
    name: str, entity: Entity, table: Table, wanted: Sequence[list[str]], registered: Mapping[str, FeatureView]
) -> StoredView:
    """A profile table's view.

    Args:
        wanted: columns, of the config's schema first; those of live models may be gone from the table.
    """
    types = {column.name: column.type for column in table.read_schema()}
    known = {field.name: field for field in registered[name].features} if name in registered else {}
    fields, given = [], []
    for column in dict.fromkeys(
        [*wanted[0], UPDATED_AT, *(wanted_column for columns in wanted[1:] for wanted_column in columns)]
    ):
        if column == entity.join_key:
            continue
        if column in types:
            dtype = Int64 if column == UPDATED_AT else _feast_type(table, column, types[column])
            fields.append(Field(name=column, dtype=dtype))
            given.append(column)
        elif column in (*wanted[0], UPDATED_AT):
            raise ConfigError(
                f"table {table.name} at {table.uri} has no column {column!r}; it has {sorted(types)}. "
                f"Correct the feature's `column`, or map it under `tables.{table.name}.columns`."
            )
        elif column in known:
            fields.append(known[column])
    return StoredView(_view(name, entity, table, UPDATED_AT, fields), tuple(given))


def _require_readable(table: Table, features: Iterable[Feature]) -> None:
    """Require that a live model can still read the columns that it was trained with.

    Raises:
        ConfigError: it cannot.
    """
    types = {column.name: column.type for column in table.read_schema()}
    for feature in features:
        if feature.source in types:
            stored = _feast_type(table, feature.source, types[feature.source])
            number = stored in (Int64, Float32, Float64, Bool)
            if isinstance(stored, Array) != feature.multi or (feature.kind == "number" and not number):
                raise ConfigError(
                    f"table {table.name}: column {feature.source!r} is {types[feature.source]} now, which a model that "
                    f"is served, or was before it, cannot read as its feature {feature.name}. Give the new values a "
                    "column of their own until that model is replaced."
                )


def _view(name: str, entity: Entity, table: Table, clock: str, fields: list[Field]) -> FeatureView:
    source = DeltaSource(name=table.name, uri=table.uri, clock=clock, columns=table.columns, makes=table.makes)
    key = Field(name=entity.join_key, dtype=String)
    return FeatureView(name=name, entities=[entity], schema=[key, *fields], source=source, ttl=timedelta(0))


def _names(view: FeatureView) -> tuple[str, ...]:
    return tuple(feature.name for feature in view.features)


def _feast_type(table: Table, column: str, kind: pa.DataType) -> FeastType:
    """The Feast type that gives back a column's values, and so their text, unchanged."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _scalar_type(kind.value_type)
        if inner in (String, Int64):
            return Array(inner)
    elif (scalar := _scalar_type(kind)) is not None:
        return scalar
    raise ConfigError(
        f"table {table.name}: column {column!r} is {kind}; a feature's column is text, a number, a boolean, "
        "or a list of texts or integers. Cast it in the table."
    )


def _scalar_type(kind: pa.DataType) -> FeastType | None:
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if any(matches(kind) for matches in text):
        return String
    if pa.types.is_integer(kind):
        return Int64
    if pa.types.is_float32(kind):
        return Float32
    if pa.types.is_float64(kind):
        return Float64
    return Bool if pa.types.is_boolean(kind) else None
