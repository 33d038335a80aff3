"""Writes new events straight into the online store: a request sees them before their log partition is built.

A push reads the stored sequences of its users, adds what is new, and writes them back. The next partition's
materialisation brings the same events from the log; what it does not hold yet stays (``materialize``).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, cast

import numpy as np
import polars as pl
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.type_map import python_values_to_proto_values
from feast.types import Int64, String

from features.builder.log_rows import new_events
from features.builder.states import EVENT_ID
from features.delta.columns import row_text
from features.encoding import encode
from features.errors import CorankError
from features.sample_table import event_id_column, timeline_column
from features.schema import OTHER_UNITS, SECOND, Sequence
from features.store.definitions import ITEM_VIEW, UPDATED_AT, sequence_view
from features.store.delta import microseconds
from features.store.feast_internals import read, write
from features.store.online import (
    LOCKED_ROWS,
    FeatureStoreSettings,
    entity_values,
    open_store,
    reachable,
    registered_view,
    sole_writer,
)
from features.store.query import TIME
from features.store.reader import POLARS_TYPES, READ_ROWS
from features.validation.rules import is_negative

AHEAD = 60 * SECOND
"""Microseconds by which a sender's clock may be ahead of ours."""

AS_OF, OLDEST = "__as_of", "__oldest"
"""In a frame of events; no field of the user's own has these names."""


MOST = float(np.finfo(np.float32).max)


class EventsError(CorankError):
    """Events are not what the sequences of their table read; ``column`` is the one that is wrong, where one is."""

    def __init__(self, message: str, column: str | None = None) -> None:
        super().__init__(message)
        self.column = column


class OnlineWriter:
    """Appends new events to the online sequences. May be used by several threads and processes.

    Args:
        log_delay: microseconds; as in :class:`features.builder.build.BuildSettings`.

    Raises (on creation):
        CorankError: the registry lacks the view of a sequence, or an event table is not there.
        UnreadableError: an event table cannot be read.
    """

    def __init__(self, settings: FeatureStoreSettings, log_delay: int = 0) -> None:
        self.settings = settings
        self.schema = settings.schema
        self.log_delay = log_delay
        self._store = open_store(settings)
        self._views = {
            sequence.name: registered_view(self._store, sequence_view(sequence)) for sequence in self.schema.sequences
        }
        # without joined fields there may be no profiles of items
        joined = any(sequence.joined for sequence in self.schema.sequences)
        items = registered_view(self._store, ITEM_VIEW).features if joined else []
        self._item_types = {feature.name: feature.dtype for feature in items}
        # read from the tables as they are now: an id made of a row's content depends on the types of its columns
        self._identifying = {name: table.pinned().identifying() for name, table in settings.events.items()}

    def table(self, name: str | None) -> str:
        """The event table of this name, or the one there is.

        Raises:
            CorankError: no sequence reads it, or there are several to choose from.
        """
        known = list(dict.fromkeys(sequence.events for sequence in self.schema.sequences))
        if name is None and len(known) == 1:
            return known[0]
        if name is None and known:
            raise CorankError(f"push: name the table that the events belong to; tables of sequences are {known}")
        if name not in known:
            raise CorankError(f"push: no sequence reads the table {name!r}; tables of sequences are {known}")
        return name

    def columns(self, table: str) -> list[str]:
        """The columns that every event of a table must have: those that identify it, and those that sequences read."""
        read = [
            column
            for sequence in self.schema.sequences
            if sequence.events == table
            for column in columns_read(sequence)
        ]
        identity = self._identifying.get(table) or ["event_id"]
        return list(dict.fromkeys(["user_id", "ts", *identity, *read]))

    def log_types(self, table: str) -> dict[str, Any]:
        """Columns of the log's rows and their Polars types, what is made of them left out."""
        log = self.settings.events[table]
        made = {*log.made(), "dt"}
        return {name: kind for name, kind in log.scan([]).collect_schema().items() if name not in made}

    def push(self, events: pl.DataFrame, table: str | None = None) -> dict[str, int]:
        """Append raw events to every sequence that reads this table.

        Each sequence takes the events that its ``where`` selects, coded like the log's. An event whose ``event_id``
        the user's stored sequence has already is left out, so a push may be repeated. As in the state table, a
        sequence keeps the last L events that a request after the newest event (or after the materialised partition)
        sees, and all after them; an event older than that is left out. Order is by (ts, event_id) within a push; an
        event of the time of a stored one comes after it.

        Args:
            events: event_id, user_id, ts (microseconds UTC, or a timestamp) and the columns that the sequences read.
                Of a table without ``event_id``: all its columns instead, as an event is then its row's content.
            table: which event table of the config they belong to; default: the one that sequences read.

        Returns:
            events added per sequence of this table.

        Raises:
            CorankError: no sequence reads the table, or it is not named and there are several.
            EventsError: a column is missing or of a wrong type, an event has no id, user or time, or a time in another
                unit. Nothing is written then.
            UnavailableError: the store does not answer. Push the same events again later; what was written stays.
        """
        name = self.table(table)
        with reachable(self._store):
            coded = self._coded(events, name)
            return {sequence.name: self._append(sequence, new) for sequence, new in coded}

    def check(self, events: pl.DataFrame, table: str) -> None:
        """Whether :meth:`push` takes them; nothing is written.

        Raises:
            EventsError, UnavailableError: as there.
        """
        with reachable(self._store):
            self._coded(events, table)

    def _coded(self, events: pl.DataFrame, table: str) -> list[tuple[Sequence, pl.DataFrame]]:
        identity = {} if "event_id" in events.columns else self._identifying.get(table, {})
        checked = _checked(_identified(events, identity, table), table)
        sequences = [sequence for sequence in self.schema.sequences if sequence.events == table]
        return [(sequence, self._coded_for(sequence, checked, table)) for sequence in sequences]

    def _coded_for(self, sequence: Sequence, events: pl.DataFrame, table: str) -> pl.DataFrame:
        """What the sequence stores of these events, ordered by (user, ts, event_id), every event once."""
        _require(events, columns_read(sequence), table)
        for field in sequence.own:
            _require_kind(events[field.source], field.kind, table)
        if sequence.joined:
            _require_kind(events["item_id"], "id", table)
        if sequence.where is not None:
            events = _selected(events, sequence, table)
        if sequence.joined:
            events = events.with_columns(pl.col("item_id").cast(pl.String))
        try:
            coded = new_events(sequence, events, self._profiles(events, sequence))
        except pl.exceptions.PolarsError as failure:
            raise EventsError(f"push to {table}: {_types(events, columns_read(sequence))}") from failure
        return coded.with_columns(pl.col("user_id").cast(pl.String), pl.col("ts").cast(pl.Int64)).unique(
            ["user_id", EVENT_ID], keep="first", maintain_order=True
        )

    def _profiles(self, events: pl.DataFrame, sequence: Sequence) -> pl.DataFrame:
        """The stored profiles of the events' items, as the sample builder has them; a store knows one of each."""
        fields = {timeline_column(sequence, field): field for field in sequence.joined}
        if not fields:
            return pl.DataFrame()
        columns = {UPDATED_AT: Int64, **{field.source: self._item_types[field.source] for field in fields.values()}}
        items = events["item_id"].drop_nulls().unique().to_list()
        rows = [
            pl.DataFrame(schema={"item_id": pl.String, **{name: POLARS_TYPES[kind] for name, kind in columns.items()}})
        ]
        for start in range(0, len(items), READ_ROWS):
            entities = [{"item_id": item} for item in items[start : start + READ_ROWS]]
            names = [f"{ITEM_VIEW}:{name}" for name in columns]
            found = self._store.get_online_features(features=names, entity_rows=entities).to_dict()
            rows.append(pl.DataFrame({name: found[name] for name in rows[0].columns}, schema=rows[0].schema))
        stored = pl.concat(rows).drop_nulls(UPDATED_AT).sort(UPDATED_AT)
        coded = [encode(field, pl.col(field.source)).alias(name) for name, field in fields.items()]
        return stored.select("item_id", UPDATED_AT, *coded)

    def _append(self, sequence: Sequence, new: pl.DataFrame) -> int:
        """Write the sequences of users that get something new; returns how many events they got."""
        added = 0
        for users in new.select("user_id").unique(maintain_order=True).iter_slices(LOCKED_ROWS):
            with sole_writer(self._store, users["user_id"]):
                stored, bounds = self._stored(sequence, users["user_id"].to_list(), new.schema)
                fresh = (
                    new.join(users, on="user_id", how="semi", maintain_order="left")
                    .join(stored, on=["user_id", EVENT_ID], how="anti", maintain_order="left")
                    .join(bounds, on="user_id", how="left", maintain_order="left")
                    .filter(pl.col(OLDEST).is_null() | (pl.col("ts") > pl.col(OLDEST)))
                    .drop(OLDEST)
                )
                if fresh.height:
                    stored = stored.join(fresh, on="user_id", how="semi", maintain_order="left").join(
                        bounds.drop(OLDEST), on="user_id", maintain_order="left"
                    )
                    self._write(sequence, _bounded(pl.concat([stored, fresh]), sequence.length, self.log_delay))
                    added += fresh.height
        return added

    def _stored(self, sequence: Sequence, users: list[str], schema: pl.Schema) -> tuple[pl.DataFrame, pl.DataFrame]:
        """What the online store has of these users.

        Returns:
            events, one row each, in their order; and per user with events ``AS_OF``, the time its sequence was
            written for, and ``OLDEST``, the time of its first event where older ones have been dropped or would be.
        """
        view = self._views[sequence.name]
        columns = _columns(sequence)
        keys = python_values_to_proto_values(users, String.to_value_type())
        found = read(
            self._store,
            view,
            [EntityKey(join_keys=["user_id"], entity_values=[key]) for key in keys],
            list(columns),
        )
        rows: list[dict[str, Any]] = []
        bounds: list[tuple[str, int, int | None]] = []
        for user_id, (written, values) in zip(users, found, strict=True):
            lists = {name: _list(values[column]) for column, name in columns.items() if values and column in values}
            if not lists.get("ts"):
                continue
            if any(len(lists.get(name, ())) != len(lists["ts"]) for name in columns.values()):
                raise CorankError(
                    f"push: the online sequence {sequence.name} of user {user_id} lacks a field of the schema or its "
                    "event ids: another schema wrote it. Materialise the newest partition again (`corank run`)."
                )
            rows.append({"user_id": user_id, **lists})
            # the store may keep only whole seconds
            as_of = max(microseconds(cast(datetime, written)), lists["ts"][-1])
            full = bisect_left(lists["ts"], as_of - self.log_delay) >= sequence.length
            bounds.append((user_id, as_of, lists["ts"][0] if full else None))
        kinds = {name: kind if name == "user_id" else pl.List(kind) for name, kind in schema.items()}
        events = pl.DataFrame(rows, schema=kinds).explode(list(columns.values())).select(schema.names())
        types = {"user_id": pl.String, AS_OF: pl.Int64, OLDEST: pl.Int64}
        return events, pl.DataFrame(bounds, schema=types, orient="row")

    def _write(self, sequence: Sequence, events: pl.DataFrame) -> None:
        view = self._views[sequence.name]
        columns = _columns(sequence)
        lists = events.group_by("user_id", maintain_order=True).agg(
            pl.max_horizontal(pl.col(AS_OF).max(), pl.col("ts").max()).alias(TIME),
            *[pl.col(name).alias(column) for column, name in columns.items()],
        )
        write(self._store, view, entity_values(view, lists))


def _columns(sequence: Sequence) -> dict[str, str]:
    """Feature of the sequence's view → its name in a frame of events."""
    return {
        timeline_column(sequence, None): "ts",
        **{timeline_column(sequence, field): field.name for field in sequence.fields},
        event_id_column(sequence): EVENT_ID,
    }


def columns_read(sequence: Sequence) -> list[str]:
    """What a sequence reads of an event's row, besides event_id, user_id and ts."""
    condition = pl.sql_expr(sequence.where).meta.root_names() if sequence.where is not None else []
    return list(
        dict.fromkeys(
            [*[field.source for field in sequence.own], *(["item_id"] if sequence.joined else []), *condition]
        )
    )


def _selected(events: pl.DataFrame, sequence: Sequence, table: str) -> pl.DataFrame:
    """The events that the sequence's condition selects."""
    condition = pl.sql_expr(str(sequence.where))
    try:
        return events.filter(condition)
    except pl.exceptions.PolarsError as failure:
        columns = condition.meta.root_names()
        where = f"sequence {sequence.name} selects events by {', '.join(columns)}"
        raise EventsError(f"push to {table}: {where}: {_types(events, columns)}", columns[0]) from failure


def _types(events: pl.DataFrame, columns: Iterable[str]) -> str:
    found = ", ".join(f"{column} {events.schema[column]}" for column in dict.fromkeys(columns))
    return f"the events have the types {found}; send them as the log has them"


def _require_kind(values: pl.Series, kind: str, table: str) -> None:
    """
    Raises:
        EventsError: the column cannot be coded as an id, a category or a number.
    """
    dtype, name = values.dtype, values.name
    number = dtype.is_numeric() or dtype in (pl.Boolean, pl.Null)
    if dtype.is_nested() or (kind == "id" and dtype.is_float()) or (kind == "number" and not number):
        article = "an" if kind == "id" else "a"
        raise EventsError(f"push to {table}: {name} is {article} {kind}, but has type {dtype}", name)
    if kind == "number" and dtype.is_numeric() and (values.cast(pl.Float64).fill_nan(None).abs() > MOST).any():
        raise EventsError(f"push to {table}: {name} has a number that is not finite", name)


def _identified(events: pl.DataFrame, identity: Mapping[str, Any], table: str) -> pl.DataFrame:
    """Events with the ids that the log's rows of this content have.

    Args:
        identity: :meth:`features.delta.table.Table.identifying`; empty: the events bring their ids.
    """
    if not identity:
        return events
    _require(events, identity, table)
    events = _in_microseconds(events, table)
    content = []
    for name, kind in identity.items():
        try:
            values = events[name]
            is_moment = isinstance(kind, pl.Datetime) and values.dtype == pl.String  # JSON has no moments
            content.append((values.str.to_datetime(time_zone="UTC") if is_moment else values).cast(kind))
        except pl.exceptions.PolarsError as failure:
            problem = f"{name} is {kind} in the table, which has no event_id, so that its value identifies the event"
            raise EventsError(
                f"push to {table}: {problem}; sent were values of type {events.schema[name]}", name
            ) from failure
    return events.with_columns(pl.DataFrame(content).select(row_text(identity).alias("event_id")))


def _in_microseconds(events: pl.DataFrame, table: str) -> pl.DataFrame:
    if isinstance(events.schema["ts"], pl.Datetime):
        events = events.with_columns(pl.col("ts").dt.cast_time_unit("us").dt.timestamp("us"))
    if not events.schema["ts"].is_integer():
        raise EventsError(
            f"push to {table}: ts has type {events.schema['ts']}; send microseconds UTC, or a timestamp", "ts"
        )
    return events


def _checked(events: pl.DataFrame, table: str) -> pl.DataFrame:
    """Events with ``ts`` in microseconds, all of them with an id, a user and a time."""
    _require(events, ("event_id", "user_id", "ts"), table)
    for column in ("event_id", "user_id"):
        _require_kind(events[column], "id", table)
    events = _in_microseconds(events, table)

    def refuse(column: str, broken: pl.Expr, problem: str) -> None:
        if wrong := events.select(broken.sum()).item():
            raise EventsError(f"push to {table}: {wrong:,} of {events.height:,} events have {problem}", column)

    for column in ("event_id", "user_id", "ts"):
        refuse(column, pl.col(column).is_null(), f"no {column}")
    for column in ("event_id", "user_id", "item_id"):
        refuse(column, is_negative(column), f"a negative {column}")
    for unit, span in OTHER_UNITS.items():
        unlikely = pl.col("ts").is_between(*span, closed="left")
        refuse("ts", unlikely, f"a ts that looks like {unit}; send microseconds UTC")
    # an event from far ahead would stay at the end of the history until its time has come
    refuse("ts", pl.col("ts") > time.time_ns() // 1_000 + AHEAD, "a ts in the future")
    return events


def _bounded(events: pl.DataFrame, length: int, log_delay: int) -> pl.DataFrame:
    """Per user, in time order, the last L events that any later request can see and all after them."""
    ordered = events.sort("user_id", "ts", maintain_order=True)
    position = pl.int_range(pl.len(), dtype=pl.Int64).over("user_id")
    as_of = pl.max_horizontal(AS_OF, "ts").max().over("user_id")
    visible = (pl.col("ts") < as_of - log_delay).cast(pl.Int64).sum().over("user_id")
    return ordered.filter(position >= visible - length)


def _require(events: pl.DataFrame, columns: Iterable[str], table: str) -> None:
    if missing := [column for column in columns if column not in events.columns]:
        message = f"push to {table}: the events lack the columns {missing}; they have {events.columns}"
        raise EventsError(message, missing[0])


def _list(value: Any) -> list[Any]:
    """The items of a stored list; empty when there is none."""
    kind = value.WhichOneof("val")
    return list(getattr(value, kind).val) if kind is not None else []
