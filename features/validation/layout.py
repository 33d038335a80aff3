"""What is wrong with a table before any row is read: missing tables and columns, wrong types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import polars as pl
import pyarrow as pa

from features.lake import Table
from features.schema import FEEDBACK, Feature, FieldSpec, Schema
from features.validation.rules import PROFILE_KEYS, Finding, columns_counted, columns_of_events


def check_tables(tables: Mapping[str, Table], schema: Schema) -> list[Finding]:
    """Missing tables, missing columns and columns of the wrong type; reads no rows.

    Tables that the schema does not use are not looked at.
    """
    return [
        Finding(role, "", check, 1, 0, message)
        for role in [*roles(schema), *([FEEDBACK] if schema.delayed_tasks else [])]
        for check, (broken, message) in layout_checks(role, tables.get(role), schema).items()
        if broken
    ]


def roles(schema: Schema) -> list[str]:
    """The tables that a pipeline reads."""
    first, *events = schema.logs
    return [first, *PROFILE_KEYS, *events]


def columns_read(role: str, schema: Schema) -> set[str]:
    """Columns of a table whose values reach samples, canonical names."""
    own = set(required_columns(role, schema))
    if role == "impressions":
        return own | {"position", "weight"} | columns_counted(role, schema)
    return own if role in PROFILE_KEYS else own | columns_of_events(role, schema)


def layout_checks(role: str, table: Table | None, schema: Schema) -> dict[str, tuple[bool, str]]:
    """Check of a table's layout → (broken?, message). A missing table has no columns to check."""
    if table is None:
        return {"missing_table": (True, f"table {role} is missing; add tables.{role} to the config")}
    missing = not table.exists()
    hint = f"correct tables.{role}.path, or write the table (`corank import --help`)"
    checks = {"missing_table": (missing, f"table {role}: there is no Delta table at {table.uri}; {hint}")}
    if missing:
        return checks
    if role not in PROFILE_KEYS:
        lost = any("dt" in one and one["dt"] is None for one in table.delta().partitions())
        text = f"table {role} at {table.uri} has rows without a dt, which belong to no partition; give them theirs"
        checks["null_dt"] = (lost, text)
    layout = table.schema()
    for column, (accepts, wanted) in required_columns(role, schema).items():
        own, index = table.columns.get(column, column), layout.get_field_index(column)
        where, mapped = f"table {role} at {table.uri}: column {own}", f"tables.{role}.columns"
        hint = f"map it under {mapped} or correct the config; there are: {', '.join(layout.names)}"
        checks[f"missing_column_{column}"] = (index < 0, f"{where} is missing; {hint}")
        if index >= 0:
            kind = layout.field(index).type
            hint = f"must be {wanted}; convert it, or map another column under {mapped}"
            checks[f"mistyped_column_{column}"] = (not accepts(kind), f"{where} has type {kind}, but {hint}")
    conditions = [("sequence", one.name, one.where) for one in schema.sequences if one.events == role]
    conditions += [
        ("feature", one.name, one.aggregate.where if one.aggregate else None) for one in schema.counts_of(role)
    ]
    for what, name, condition in conditions:
        if condition is not None:
            problem = _problem_of_condition(condition, layout.names)
            where = f"table {role}: the condition {condition!r} of {what} {name}"
            checks[f"condition_{name}"] = (bool(problem), f"{where} {problem}; correct {what}s in the config")
    return checks


def _problem_of_condition(condition: str, columns: Sequence[str]) -> str:
    """What is wrong with an SQL condition on these columns; empty if nothing is."""
    try:
        unknown = sorted(set(pl.sql_expr(condition).meta.root_names()) - set(columns))
    except pl.exceptions.PolarsError as error:
        return f"is not valid SQL ({error})"
    return f"reads {', '.join(unknown)}, but there are only {', '.join(columns)}" if unknown else ""


Accepts = Callable[[pa.DataType], bool]


def required_columns(role: str, schema: Schema) -> dict[str, tuple[Accepts, str]]:
    identifier, moment = (_is_identifier, "a text or an integer"), (_is_moment, "an integer or a timestamp")
    partition = (_is_identifier, "a text (the partition)")
    if role in PROFILE_KEYS:
        side = schema.side("user" if role == "users" else "item")
        own = {PROFILE_KEYS[role]: identifier, "updated_at": moment}
        crossed = schema.cross_keys if role == "items" else ()
        keys = dict.fromkeys(crossed, (_is_key, "a text or an integer, or a list of them"))
        joined = [field for sequence in schema.sequences for field in sequence.joined] if role == "items" else []
        return keys | {one.source: _accepts(one) for one in (*joined, *side)} | own
    if role == FEEDBACK:
        names = {"request_id": identifier, "item_id": identifier, "label": identifier, "ts": moment, "dt": partition}
        return names | {"value": (_is_label, "an integer or a boolean")}
    counts = {one.aggregate.column: (_is_number, "a number") for one in schema.counts_of(role) if one.aggregate}
    counted = {column: accepts for column, accepts in counts.items() if column is not None}
    if any(one.side != "user" for one in schema.counts_of(role)):
        counted["item_id"] = identifier
    if role == "impressions":
        own_labels = [task for task in schema.tasks if task.attribution_window is None]
        labels = {task.source: (_is_label, "an integer or a boolean") for task in own_labels}
        own = {"request_id": identifier, "user_id": identifier, "item_id": identifier, "ts": moment, "dt": partition}
        return counted | {feature.source: _accepts(feature) for feature in schema.side("context")} | labels | own
    sequences = [sequence for sequence in schema.sequences if sequence.events == role]
    fields = [field for sequence in sequences for field in sequence.own]
    own = {"event_id": identifier, "user_id": identifier, "ts": moment, "dt": partition}
    if any(sequence.joined for sequence in sequences):
        own["item_id"] = identifier
    return counted | {field.source: _accepts(field) for field in fields} | own


def _accepts(field: FieldSpec) -> tuple[Accepts, str]:
    if field.kind == "number":
        return _is_number, "a number"
    if isinstance(field, Feature) and field.multi:
        return _is_list, "a list of texts or integers (multi: true)"
    return _is_identifier, "a text or an integer"


def _is_identifier(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_identifier(kind.value_type)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(text or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_date(kind))


def _is_key(kind: pa.DataType) -> bool:
    return _is_identifier(kind) or _is_list(kind)


def _is_moment(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_timestamp(kind))


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_number(kind: pa.DataType) -> bool:
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return bool(numeric or pa.types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind)
    return bool(nested and _is_identifier(kind.value_type))
