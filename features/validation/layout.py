"""What is wrong with a table before any row is read: missing tables and columns, wrong types."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from features.delta.table import Table
from features.schema import FEEDBACK, Feature, FieldSpec, Schema
from features.validation.rules import (
    KEYS_AS_TEXT,
    PROFILE_KEYS,
    Finding,
    columns_counted,
    columns_of_events,
    conditions_of,
)


def check_tables(tables: Mapping[str, Table], schema: Schema) -> list[Finding]:
    """Missing tables, missing columns and columns of the wrong type; reads no rows.

    Tables that the schema does not use are not looked at.
    """
    return [
        Finding(role, "", check, 1, 0, message)
        for role in [*roles(schema, tables), *([FEEDBACK] if schema.delayed_tasks else [])]
        for check, (broken, message) in layout_checks(role, tables.get(role), schema).items()
        if broken
    ]


def roles(schema: Schema, tables: Collection[str]) -> list[str]:
    """The tables that a pipeline reads. Profiles that there are count also when no column of theirs is read."""
    first, *events = schema.logs
    profiles: list[str] = [role for role in ("users", "items") if role in tables or schema.profile_columns(role)]
    return [first, *profiles, *events]


def joins(schema: Schema) -> list[tuple[str, str, str]]:
    """The joins that a pipeline rests on: (table, other table, id that both have)."""
    first, *events = schema.logs
    found = [(first, "users", "user_id"), (first, "items", "item_id")]
    items = {feature.embedding for feature in schema.side("item") if feature.source == "item_id"}
    for role in events:
        found.append((role, first, "user_id"))
        fields = [field for sequence in schema.sequences if sequence.events == role for field in sequence.fields]
        counts = [
            feature.aggregate.key for feature in schema.counts_of(role) if feature.aggregate and feature.side != "user"
        ]
        if any(field.of == "item" for field in fields) or any(key not in (None, "item_id") for key in counts):
            found.append((role, "items", "item_id"))
        # events share the embedding of the items shown, or are counted for them
        if counts or any(field.source == "item_id" and field.embedding in items for field in fields):
            found.append((role, first, "item_id"))
    if schema.delayed_tasks:
        found += [(FEEDBACK, first, "request_id"), (FEEDBACK, first, "item_id")]
    return found


def columns_read(role: str, schema: Schema) -> set[str]:
    """Columns of a table whose values reach samples, canonical names."""
    required = set(required_columns(role, schema))
    if role == "impressions":
        return required | set(OPTIONAL) | columns_counted(role, schema)
    return required if role in PROFILE_KEYS else required | columns_of_events(role, schema)


def layout_checks(role: str, table: Table | None, schema: Schema) -> dict[str, tuple[bool, str]]:
    """Check of a table's layout → (broken?, message). A missing table has no columns to check."""
    if table is None:
        return {"missing_table": (True, f"table {role} is missing; add tables.{role} to the config")}
    missing = not table.exists()
    hint = f"correct tables.{role}.path, or write the table (`corank import --help`)"
    checks = {"missing_table": (missing, f"table {role}: there is no Delta table at {table.uri}; {hint}")}
    if missing:
        return checks
    where, layout, given = f"table {role} at {table.uri}", table.schema(), table.read_schema()
    own_names = [column.name for column in table.delta().schema().fields]
    for column, source in table.columns.items():
        hint = f"correct tables.{role}.columns; there are: {', '.join(own_names)}"
        checks[f"missing_column_{column}"] = (
            source not in own_names,
            f"{where}: column {source} is missing, which {column} is mapped to; {hint}",
        )
    required = required_columns(role, schema)
    optional = {name: check for name, check in OPTIONAL.items() if role == "impressions" and name in layout.names}
    for column, (accepts, wanted) in (optional | required).items():
        source = table.columns.get(column, column)
        shown, mapped = f"{where}: column {source}", f"tables.{role}.columns"
        if column not in table.columns:
            hint = f"map it under {mapped} or correct the config; there are: {_reachable(table, layout, own_names)}"
            checks[f"missing_column_{column}"] = (column not in given.names, f"{shown} is missing; {hint}")
        if column in layout.names:
            kind = layout.field(column).type
            hint = f"must be {wanted}; convert it, or map another column under {mapped}"
            checks[f"mistyped_column_{column}"] = (not accepts(kind), f"{shown} has type {kind}, but {hint}")
    if any(broken for broken, _ in checks.values()):
        return checks
    if role not in PROFILE_KEYS:
        checks |= _partition_checks(table, where)
    if any(broken for broken, _ in checks.values()):
        return checks
    for what, name, condition in conditions_of(role, schema):
        problem = _problem_of_condition(condition, _columns_of_conditions(table))
        shown = f"table {role}: the condition {condition!r} of {what} {name}"
        checks[f"condition_{name}"] = (bool(problem), f"{shown} {problem}; correct {what}s in the config")
    return checks


def _reachable(table: Table, layout: pa.Schema, own_names: Sequence[str]) -> str:
    """The columns that a config can name, and the table's own columns that a mapping or the partition hides."""
    targets, partition = set(table.columns.values()), table.partition_column()
    taken = {name: f"{name} is mapped to {source}" for name, source in table.columns.items()}
    if table.grain is not None and partition != "dt":
        taken["dt"] = f"dt is the partition, {'cut from ts' if partition is None else f'the column {partition}'}"
    hidden = [name for name in own_names if name in taken and name not in targets]
    return ", ".join(layout.names) + "".join(f"; its own column {name} is hidden, as {taken[name]}" for name in hidden)


def _partition_checks(table: Table, where: str) -> dict[str, tuple[bool, str]]:
    """Whether the log is partitioned as the config says, and every row belongs to a partition."""
    column = table.partition_column()
    missing = table.partition not in (None, "ts") and column is None
    partitioned = ", ".join(table.delta().metadata().partition_columns) or "nothing"
    text = (
        f"{where}: it is not partitioned by {table.partition}, but by {partitioned}; correct tables.{table.name}."
        "partition, or leave it out: partitions are then cut from ts"
    )
    checks = {"partition_column": (missing, text)}
    if not missing:
        lost = "ts" if column is None else "dt" if column == "dt" else f"{column} (its partition)"
        text = f"{where} has rows without a {lost}, which belong to no partition; give them theirs"
        checks["null_dt"] = (table.unpartitioned_rows(), text)
        unit, example = table.wrong_unit() or ("", 0)
        text = f"{where} has a wrong unit: ts looks like {unit} (for example {example}); cast to microseconds"
        checks["ts_unit"] = (bool(unit), text)
    return checks


def _columns_of_conditions(table: Table) -> dict[str, Any]:
    """Name and Polars type of the columns that a condition sees in the builder."""
    kinds = dict(table.scan().collect_schema())
    if table.is_bucketed():
        del kinds["bucket"]
    return kinds


def _problem_of_condition(condition: str, kinds: Mapping[str, Any]) -> str:
    """What is wrong with an SQL condition on columns of these Polars types, as the builder has them; empty if nothing
    is."""
    try:
        expression = pl.sql_expr(condition)
        unknown = sorted(set(expression.meta.root_names()) - set(kinds))
        if unknown:
            return f"reads {', '.join(unknown)}, but there are only {', '.join(kinds)}"
        text = dict.fromkeys(KEYS_AS_TEXT & set(kinds), pl.String)
        result = pl.DataFrame(schema={**kinds, **text}).select(expression).to_series()
    except pl.exceptions.PolarsError as error:
        reason = str(error).strip().splitlines()[0]
        of = ", ".join(f"{name} is {str(kinds[name]).lower()}" for name in _names_in(condition, kinds))
        return f"is not valid SQL ({reason}{'; ' if of else ''}{of}; ids are text)"
    if result.dtype != pl.Boolean:
        return f"gives {str(result.dtype).lower()}, not true or false"
    if OTHER_ROWS.search(QUOTED.sub("", str(expression))):
        return "looks at other rows, but must say of each row by itself whether it counts"
    return ""


def _names_in(condition: str, kinds: Mapping[str, Any]) -> list[str]:
    try:
        return [name for name in pl.sql_expr(condition).meta.root_names() if name in kinds]
    except pl.exceptions.PolarsError:
        return []


OTHER_ROWS = re.compile(
    r"\.(over|rank|shift|sum|mean|median|quantile|max|min|count|first|last|len|std|var|n_unique|cum_\w+)\(|\blen\(\)"
)
"""How Polars writes aggregates and windows, which are meaningless over the rows of a bucket."""

QUOTED = re.compile(r'"[^"]*"')

Accepts = Callable[[pa.DataType], bool]


def required_columns(role: str, schema: Schema) -> dict[str, tuple[Accepts, str]]:
    """Canonical name → what its type must be. What :attr:`Table.makes` may be missing."""
    identifier, moment = (_is_identifier, "a text or an integer"), (_is_moment, "an integer, a timestamp or a date")
    partition = (_is_partition, "a text or a date (the partition)")
    if role in PROFILE_KEYS:
        side = schema.side("user" if role == "users" else "item")
        fixed = {PROFILE_KEYS[role]: identifier, "updated_at": moment}
        crossed = schema.cross_keys if role == "items" else ()
        keys = dict.fromkeys(crossed, (_is_key, "a text or an integer, or a list of them"))
        joined = [field for sequence in schema.sequences for field in sequence.joined] if role == "items" else []
        return keys | {field.source: _accepts(field) for field in (*joined, *side)} | fixed
    if role == FEEDBACK:
        names = {"request_id": identifier, "item_id": identifier, "label": identifier, "ts": moment, "dt": partition}
        return names | {"value": (_is_label, "an integer or a boolean")}
    counts = {
        feature.aggregate.column: (_is_number, "a number") for feature in schema.counts_of(role) if feature.aggregate
    }
    counted_columns = {column: accepts for column, accepts in counts.items() if column is not None}
    if any(feature.side != "user" for feature in schema.counts_of(role)):
        counted_columns["item_id"] = identifier
    if role == "impressions":
        own_labels = [task for task in schema.tasks if task.attribution_window is None]
        labels = {task.source: (_is_label, "an integer or a boolean") for task in own_labels}
        fixed = {"request_id": identifier, "user_id": identifier, "item_id": identifier, "ts": moment, "dt": partition}
        return (
            counted_columns | {feature.source: _accepts(feature) for feature in schema.side("context")} | labels | fixed
        )
    sequences = [sequence for sequence in schema.sequences if sequence.events == role]
    fields = [field for sequence in sequences for field in sequence.own]
    fixed = {"event_id": identifier, "user_id": identifier, "ts": moment, "dt": partition}
    if any(sequence.joined for sequence in sequences):
        fixed["item_id"] = identifier
    return counted_columns | {field.source: _accepts(field) for field in fields} | fixed


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
    return bool(text or _is_whole(kind) or pa.types.is_boolean(kind) or pa.types.is_date(kind))


def _is_partition(kind: pa.DataType) -> bool:
    return _is_identifier(kind) and not pa.types.is_boolean(kind)


def _is_key(kind: pa.DataType) -> bool:
    return _is_identifier(kind) or _is_list(kind)


def _is_moment(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _is_label(kind: pa.DataType) -> bool:
    return _is_whole(kind) or bool(pa.types.is_boolean(kind))


def _is_whole(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0))


def _is_number(kind: pa.DataType) -> bool:
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return bool(numeric or pa.types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind)
    return bool(nested and _is_identifier(kind.value_type))


OPTIONAL: dict[str, tuple[Accepts, str]] = {
    "position": (_is_whole, "an integer"),
    "weight": (_is_number, "a number"),
}
"""Columns of impressions that may be missing."""
