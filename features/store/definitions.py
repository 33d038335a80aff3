"""Feast objects derived from the schema: entities, one view per table or sequence, one feature service.

Profiles are stored as they are in their tables (raw), sequences as codes from the state table. No view has
a time to live: a value counts until a newer one replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Literal

import pyarrow as pa
from feast import Entity, FeatureService, FeatureView, Field, ValueType
from feast.types import Array, Bool, FeastType, Float32, Float64, Int64, String

from features.aggregates import state_fields
from features.batch import event_id_column, timeline_column
from features.errors import ConfigError
from features.lake import Table
from features.schema import Schema, Sequence
from features.store.delta import DeltaSource

USER_VIEW = "user_features"
ITEM_VIEW = "item_features"
SEQUENCE_VIEW = "user_sequences_"
"""Prefix of the views that hold behaviour sequences."""
USER_AGGREGATES_VIEW = "user_aggregates"
ITEM_AGGREGATES_VIEW = "item_aggregates"
SERVICE = "ranking"
UPDATED_AT = "updated_at"
"""When a profile became true (microseconds UTC): a feature too, so that a reader can refuse the future."""

Definitions = list[Entity | FeatureView | FeatureService]


def sequence_view(sequence: Sequence) -> str:
    """Name of the view that holds a behaviour sequence."""
    return f"{SEQUENCE_VIEW}{sequence.name}"


def definitions(
    schema: Schema,
    users: Table,
    items: Table,
    state: Table,
    user_aggregates: Table | None = None,
    item_aggregates: Table | None = None,
) -> Definitions:
    """All Feast objects of a schema.

    Args:
        users, items: profile tables, with ``updated_at``.
        state: user_id, ts and per sequence the list columns of :func:`features.batch.timeline_column` and
            :func:`features.batch.event_id_column`.
        user_aggregates, item_aggregates: the counts of :mod:`features.aggregates`, with ``ts``; None: no views.

    Raises:
        ConfigError: a feature's column is missing in its table, or has a type that cannot be stored.
    """
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)
    views = [
        _profile_view(USER_VIEW, user, users, [feature.source for feature in schema.side("user")]),
        _profile_view(
            ITEM_VIEW, item, items, [*[feature.source for feature in schema.side("item")], *schema.joined_columns]
        ),
    ]
    state_source = DeltaSource(name=state.name, uri=state.uri, clock="ts", columns=state.columns)
    for sequence in schema.sequences:
        fields = [
            Field(name=timeline_column(sequence, None), dtype=Array(Int64)),
            Field(name=event_id_column(sequence), dtype=Array(Int64)),
        ]
        fields += [
            Field(
                name=timeline_column(sequence, field), dtype=Array(Float32) if field.kind == "number" else Array(Int64)
            )
            for field in sequence.fields
        ]
        views.append(_view(sequence_view(sequence), user, state_source, fields))
    counted: list[tuple[str, Entity, Table | None, Literal["user", "item"]]] = [
        (USER_AGGREGATES_VIEW, user, user_aggregates, "user"),
        (ITEM_AGGREGATES_VIEW, item, item_aggregates, "item"),
    ]
    for name, entity, table, side in counted:
        if table is not None:
            source = DeltaSource(name=table.name, uri=table.uri, clock="ts", columns=table.columns)
            views.append(_view(name, entity, source, aggregate_fields(schema, side)))
    return [user, item, *views, FeatureService(name=SERVICE, features=list(views))]


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
            Field(name=one.name, dtype=lists[one.type.value_type] if pa.types.is_list(one.type) else stored[one.type])
            for one in columns
        ],
    ]


def _profile_view(name: str, entity: Entity, table: Table, sources: Iterable[str]) -> FeatureView:
    types = {column.name: column.type for column in table.schema()}
    fields = []
    for column in dict.fromkeys([*sources, UPDATED_AT]):
        if column == entity.join_key:
            continue
        if column not in types:
            raise ConfigError(
                f"table {table.name} at {table.uri} has no column {column!r}; it has {sorted(types)}. "
                f"Correct the feature's `column`, or map it under `tables.{table.name}.columns`."
            )
        fields.append(
            Field(name=column, dtype=Int64 if column == UPDATED_AT else _feast_type(table, column, types[column]))
        )
    return _view(
        name, entity, DeltaSource(name=table.name, uri=table.uri, clock=UPDATED_AT, columns=table.columns), fields
    )


def _view(name: str, entity: Entity, source: DeltaSource, fields: list[Field]) -> FeatureView:
    key = Field(name=entity.join_key, dtype=String)
    return FeatureView(name=name, entities=[entity], schema=[key, *fields], source=source, ttl=timedelta(0))


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
