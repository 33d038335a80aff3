"""New events straight into the online store: a request sees them before their log partition is built.

A push reads the stored sequences of its users, adds what is new, and writes them back. The next partition's
materialisation brings the same events from the log; what it does not hold yet stays (``materialize``).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable
from datetime import datetime
from typing import Any, cast

import polars as pl
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.type_map import python_values_to_proto_values
from feast.types import Int64, String

from features.batch import event_id_column, timeline_column
from features.encoding import encode
from features.errors import CorankError
from features.logs import new_events
from features.schema import OTHER_UNITS, SECOND, Sequence
from features.states import EVENT_ID
from features.store.definitions import ITEM_VIEW, UPDATED_AT, sequence_view
from features.store.delta import microseconds
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
"""How far a sender's clock may be ahead of ours."""

AS_OF, OLDEST = "__as_of", "__oldest"
"""In a frame of events; no field of the user's own has these names."""


class OnlineWriter:
    """Appends new events to the online sequences. May be used by several threads and processes.

    Args:
        log_delay: microseconds; as in :class:`features.samples.BuildSettings`.

    Raises (on creation):
        CorankError: the registry lacks the view of a sequence.
    """

    def __init__(self, settings: FeatureStoreSettings, log_delay: int = 0) -> None:
        self.settings = settings
        self.schema = settings.schema
        self.log_delay = log_delay
        self._store = open_store(settings)
        self._views = {one.name: registered_view(self._store, sequence_view(one)) for one in self.schema.sequences}
        joined = any(one.joined for one in self.schema.sequences)  # else there may be no profiles of items
        items = registered_view(self._store, ITEM_VIEW).features if joined else []
        self._item_types = {one.name: one.dtype for one in items}

    def push(self, events: pl.DataFrame, table: str = "events") -> dict[str, int]:
        """Append raw events to every sequence that reads this table.

        Each sequence takes the events that its ``where`` selects, coded like the log's. An event whose ``event_id``
        the user's stored sequence has already is left out, so a push may be repeated. As in the state table, a
        sequence keeps the last L events that a request after the newest event (or after the materialised partition)
        sees, and all after them; an event older than that is left out. Order is by (ts, event_id) within a push; an
        event of the time of a stored one comes after it.

        Args:
            events: event_id, user_id, ts (microseconds UTC, or a timestamp) and the columns that the sequences read.
            table: which event table of the config they belong to.

        Returns:
            events added per sequence of this table.

        Raises:
            CorankError: no sequence reads the table; a column is missing or of a wrong type, an event has no id, user
                or time, or a time in another unit. Nothing is written then.
            UnavailableError: the store does not answer. Push the same events again later; what was written stays.
        """
        sequences = [sequence for sequence in self.schema.sequences if sequence.events == table]
        if not sequences:
            known = sorted({sequence.events for sequence in self.schema.sequences})
            raise CorankError(f"push: no sequence reads the table {table!r}; tables of sequences are {known}")
        checked = _checked(events, table)
        with reachable(self._store):
            try:
                coded = {sequence.name: self._coded(checked, sequence, table) for sequence in sequences}
            except pl.exceptions.PolarsError as failure:
                raise CorankError(f"push to {table}: a column has another type than the log's: {failure}") from failure
            return {sequence.name: self._append(sequence, coded[sequence.name]) for sequence in sequences}

    def _coded(self, events: pl.DataFrame, sequence: Sequence, table: str) -> pl.DataFrame:
        """What the sequence stores of these events, ordered by (user, ts, event_id), every event once."""
        _require(events, [*[one.source for one in sequence.own], *(["item_id"] if sequence.joined else [])], table)
        for one in sequence.own:
            if one.kind == "id" and events.schema[one.source].is_float():
                raise CorankError(f"push to {table}: {one.source} is an id, but has type {events.schema[one.source]}")
        if sequence.where is not None:
            _require(events, pl.sql_expr(sequence.where).meta.root_names(), table)
            events = events.filter(pl.sql_expr(sequence.where))
        if sequence.joined:
            events = events.with_columns(pl.col("item_id").cast(pl.String))
        coded = new_events(sequence, events, self._profiles(events, sequence))
        return coded.with_columns(pl.col("user_id").cast(pl.String), pl.col("ts").cast(pl.Int64)).unique(
            ["user_id", EVENT_ID], keep="first", maintain_order=True
        )

    def _profiles(self, events: pl.DataFrame, sequence: Sequence) -> pl.DataFrame:
        """The stored profiles of the events' items, as the sample builder has them; a store knows one of each."""
        fields = {timeline_column(sequence, one): one for one in sequence.joined}
        if not fields:
            return pl.DataFrame()
        columns = {UPDATED_AT: Int64, **{one.source: self._item_types[one.source] for one in fields.values()}}
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
        coded = [encode(one, pl.col(one.source)).alias(name) for name, one in fields.items()]
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
        found = self._store._get_provider().online_read(
            self._store.config,
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
            # the store may keep whole seconds only
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
        self._store._get_provider().online_write_batch(self._store.config, view, entity_values(view, lists), None)


def _columns(sequence: Sequence) -> dict[str, str]:
    """Feature of the sequence's view → its name in a frame of events."""
    return {
        timeline_column(sequence, None): "ts",
        **{timeline_column(sequence, one): one.name for one in sequence.fields},
        event_id_column(sequence): EVENT_ID,
    }


def _checked(events: pl.DataFrame, table: str) -> pl.DataFrame:
    """Events with ``ts`` in microseconds, all of them with an id, a user and a time."""
    _require(events, ("event_id", "user_id", "ts"), table)
    if isinstance(events.schema["ts"], pl.Datetime):
        events = events.with_columns(pl.col("ts").dt.cast_time_unit("us").dt.timestamp("us"))
    if not events.schema["ts"].is_integer():
        raise CorankError(f"push to {table}: ts has type {events.schema['ts']}; send microseconds UTC, or a timestamp")
    for column in ("event_id", "user_id", "ts"):
        if missing := events[column].null_count():
            raise CorankError(f"push to {table}: {missing:,} of {events.height:,} events have no {column}")
    for column in ("event_id", "user_id"):
        if wrong := events.select(is_negative(column).sum()).item():
            raise CorankError(f"push to {table}: {wrong:,} of {events.height:,} events have a negative {column}")
    for unit, span in OTHER_UNITS.items():
        if wrong := events.select(pl.col("ts").is_between(*span, closed="left").sum()).item():
            raise CorankError(
                f"push to {table}: {wrong:,} of {events.height:,} events have a ts that looks like {unit}; "
                "send microseconds UTC"
            )
    # one from far ahead would stand at the end of the history until its time has come
    if wrong := events.select((pl.col("ts") > time.time_ns() // 1_000 + AHEAD).sum()).item():
        raise CorankError(f"push to {table}: {wrong:,} of {events.height:,} events have a ts in the future")
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
        raise CorankError(f"push to {table}: the events lack the columns {missing}; they have {events.columns}")


def _list(value: Any) -> list[Any]:
    """The items of a stored list; empty when there is none."""
    kind = value.WhichOneof("val")
    return list(getattr(value, kind).val) if kind is not None else []
