"""The online store: what a request reads, written from Delta by :func:`materialize`.

The store keeps raw profiles and coded sequences. Readers turn profiles into codes with the same function as
the sample builder (:mod:`features.encoding`), so that a value means the same offline and online.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
from feast import FeatureStore, FeatureView, RepoConfig
from feast.errors import FeatureViewNotFoundException
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RegistryConfig
from feast.type_map import python_values_to_proto_values
from feast.types import Array, Bool, FeastType, Float32, Float64, Int64, String

from features.batch import event_id_column, feature_column, timeline_column
from features.encoding import encode
from features.errors import CorankError
from features.lake import Table
from features.schema import Feature, Schema
from features.store.definitions import (
    ITEM_VIEW,
    SEQUENCE_VIEW,
    UPDATED_AT,
    USER_VIEW,
    definitions,
    sequence_view,
    view_names,
)
from features.store.delta import DeltaOfflineStoreConfig, delta_source, moment
from features.store.query import SLICE_BYTES, TIME, Partitions, Query, latest, together

EntityValues = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
"""What Feast writes: entity key, feature → value, event timestamp, time of creation."""

Progress = Callable[[str, int], None]
"""Called with a view's name and how many of its rows have been written so far."""

WRITE_ROWS = 5_000
"""Rows written to the online store in one transaction; bounds memory."""

READ_ROWS = 5_000
"""Entities of one read; SQLite limits the parameters of a statement."""

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
}


@dataclass(frozen=True)
class FeatureStoreSettings:
    """Where the feature store is and what it holds. Plain values: it travels to Ray workers and replicas.

    Attributes:
        project: Feast project; separates pipelines that share an online store.
        registry: path (or ``s3://`` address) of the Feast registry file.
        users, items: the user's profile tables.
        state_uri: the state table of the sample builder; ``state_options`` are its storage options.
        sqlite_path: file of the online store, when ``online`` is sqlite.
        redis: ``host:port``, when ``online`` is redis.
        slice_bytes: bytes of Delta files that one Ray task reads; smaller tables are read in the calling process.
        item_max_age_seconds: how long a reader uses an item's features before it reads them again.
        max_cached_items: a reader's in-memory table of items is emptied beyond this size.
    """

    project: str
    registry: str
    schema: Schema
    users: Table
    items: Table
    state_uri: str
    state_options: dict[str, str] = field(default_factory=dict)
    online: Literal["sqlite", "redis"] = "sqlite"
    sqlite_path: str = "online.db"
    redis: str = "localhost:6379"
    slice_bytes: int = SLICE_BYTES
    item_max_age_seconds: float = 60.0
    max_cached_items: int = 1_000_000

    @property
    def state(self) -> Table:
        return Table("user_state", self.state_uri, {}, self.state_options)


def open_store(settings: FeatureStoreSettings) -> FeatureStore:
    """The feature store of these settings; nothing is read or written yet."""
    if settings.online == "sqlite":
        Path(settings.sqlite_path).parent.mkdir(parents=True, exist_ok=True)
        online: dict[str, Any] = {"type": "sqlite", "path": str(Path(settings.sqlite_path).absolute())}
    else:
        # Without skip_dedup Feast drops rows of a time already stored, and with them a rebuilt partition.
        online = {"type": "redis", "connection_string": settings.redis, "skip_dedup": True}
    if "://" not in settings.registry:
        Path(settings.registry).parent.mkdir(parents=True, exist_ok=True)
    tables = (settings.users, settings.items, settings.state)
    return FeatureStore(
        config=RepoConfig(
            project=settings.project,
            provider="local",
            registry=RegistryConfig(path=settings.registry),
            online_store=online,
            offline_store=DeltaOfflineStoreConfig(
                storage_options={table.uri: dict(table.storage_options) for table in tables if table.storage_options},
                slice_bytes=settings.slice_bytes,
            ).model_dump(),
            entity_key_serialization_version=3,
        )
    )


def apply(settings: FeatureStoreSettings) -> None:
    """Register the schema's entities, views and service, and create their online tables. Idempotent.

    Raises:
        ConfigError: a feature's column is missing, or has a type that cannot be stored.
        CorankError: a table does not exist.
    """
    objects = definitions(settings.schema, settings.users, settings.items, settings.state)
    open_store(settings).apply([*objects])


def materialize(
    settings: FeatureStoreSettings, start: int, end: int, progress: Progress | None = None
) -> dict[str, int]:
    """Write the newest row of every entity with start ≤ time ≤ end to the online store.

    The time is ``updated_at`` of a profile and the partition's close of a state row. Both bounds belong to
    the window: consecutive windows lose nothing, and a row on their border is written twice with the same
    values. Run windows in the order of time: an older one run last would bring older values back.

    Events pushed with ``end`` ≤ time (:mod:`features.store.push`) stay behind the stored events: the log does not
    hold them yet. A push that runs at the same moment for the same user may be lost until its partition is built.

    A large table is read by slices in Ray tasks, where Ray runs. Into Redis the tasks write themselves; SQLite has
    one writer, this process, which takes the tasks' results as they come. Feast's own ``materialize`` reads every
    column through NumPy, where an integer column with nulls becomes floating point and large ids change; so values
    are converted here, one by one, and written in portions.

    Args:
        start, end: microseconds UTC.
        progress: called after every portion (SQLite) or task (Redis) with the rows written so far.

    Returns:
        rows written per view.

    Raises:
        CorankError: the views are not registered (:func:`apply`), or a table cannot be read.
    """
    store = open_store(settings)
    written = {}
    for name in view_names(settings.schema):
        view = registered_view(store, name)
        source = delta_source(view)
        query = Query(
            source.table(store.config),
            source.clock,
            keys={column.name: column.name for column in view.entity_columns},
            values={one.name: one.name for one in view.features},
            start=start,
            end=end,
            latest=True,
        )
        partitions = Partitions(query, settings.slice_bytes)
        rows = 0
        for count in _written(store, settings, view, partitions, end):
            rows += count
            if progress is not None:
                progress(name, rows)
        window = (moment(start), moment(end))
        if window not in view.materialization_intervals:
            store.registry.apply_materialization(view, settings.project, *window)
        written[name] = rows
    return written


def _written(
    store: FeatureStore, settings: FeatureStoreSettings, view: FeatureView, partitions: Partitions, end: int
) -> Iterator[int]:
    """Write the newest rows of every partition; yields how many, portion by portion."""
    query = partitions.query
    if settings.online == "redis" and partitions.count > 1:
        yield from filter(None, partitions.map(partial(_write_partition, settings, view.name, query, end)))
    else:
        for rows in partitions.map(partial(latest, query)):
            yield from _write(store, view, together([rows]), end)


def _write_partition(
    settings: FeatureStoreSettings, name: str, query: Query, end: int, *pieces: pl.DataFrame | pa.Table
) -> int:
    """What a task does with its partition, when several may write."""
    store = open_store(settings)
    return sum(_write(store, registered_view(store, name), latest(query, *pieces), end))


def _write(store: FeatureStore, view: FeatureView, rows: pl.DataFrame, end: int) -> Iterator[int]:
    provider = store._get_provider()
    for portion in rows.iter_slices(WRITE_ROWS) if rows.height else ():
        entries = entity_values(view, portion)
        if view.name.startswith(SEQUENCE_VIEW):
            stored = provider.online_read(store.config, view, [key for key, *_ in entries], None)
            for (_, values, _, _), (_, before) in zip(entries, stored, strict=True):
                _keep_pushed(view, values, before or {}, end)
        provider.online_write_batch(store.config, view, entries, None)
        yield portion.height


def _keep_pushed(view: FeatureView, values: dict[str, Any], before: dict[str, Any], end: int) -> None:
    """Append to a state row's lists the stored events of ``end`` ≤ ts, which only a push can have brought."""
    times = before.get(f"{view.name.removeprefix(SEQUENCE_VIEW)}__ts")
    first = bisect_left(times.int64_list_val.val, end) if times is not None else 0
    if times is None or first == len(times.int64_list_val.val):
        return
    kinds = {name: before[name].WhichOneof("val") if name in before else None for name in values}
    if None in kinds.values():
        return  # pushed before the sequence had this field; the log brings these events with the next partition
    for name, kind in kinds.items():
        getattr(values[name], str(kind)).val.extend(getattr(before[name], str(kind)).val[first:])


def entity_values(view: FeatureView, rows: pl.DataFrame) -> list[EntityValues]:
    """Rows of keys, features and ``TIME`` as Feast writes them."""
    values = {
        column.name: python_values_to_proto_values(
            _storable(rows[column.name], column.dtype), column.dtype.to_value_type()
        )
        for column in [*view.entity_columns, *view.features]
    }
    keys = [column.name for column in view.entity_columns]
    features = [feature.name for feature in view.features]
    return [
        (
            EntityKey(join_keys=keys, entity_values=[values[key][row] for key in keys]),
            {feature: values[feature][row] for feature in features},
            moment(ts),
            None,
        )
        for row, ts in enumerate(rows[TIME])
    ]


def _storable(column: pl.Series, kind: FeastType) -> list[Any]:
    """A column as Python values; a list in Feast cannot hold a null: a missing number is NaN, others go."""
    values = column.to_list()
    if not isinstance(kind, Array):
        return values
    if kind.base_type == Float32:
        return [value and [float("nan") if one is None else one for one in value] for value in values]
    return [value and [one for one in value if one is not None] for value in values]


@dataclass(frozen=True)
class History:
    """A user's events of one sequence, oldest first: ``ts`` [E] in microseconds UTC, ``fields`` [E] of codes."""

    ts: np.ndarray
    fields: dict[str, np.ndarray]


class OnlineReader:
    """What a request needs of the online store. Not for several threads at once.

    Raises (on creation):
        CorankError: the registry lacks a view or a feature of the schema.
    """

    def __init__(self, settings: FeatureStoreSettings) -> None:
        self.schema = settings.schema
        self._store = open_store(settings)
        self._user = self._columns(USER_VIEW, "user_id", settings.schema.side("user"))
        self._item = self._columns(ITEM_VIEW, "item_id", settings.schema.side("item"))
        for sequence in self.schema.sequences:
            _require(
                registered_view(self._store, sequence_view(sequence)),
                [*[timeline_column(sequence, one) for one in (None, *sequence.fields)], event_id_column(sequence)],
            )
        nothing = pl.DataFrame({name: [None] for name in self._item}, schema=self._item)
        self._items = ItemTable(
            self._encode_items(nothing), self._read_items, settings.item_max_age_seconds, settings.max_cached_items
        )

    def user(self, user_id: str) -> dict[str, Any] | None:
        """Raw profile with ``user_id`` and ``updated_at``; None when there is none."""
        row = self._read(USER_VIEW, "user_id", [user_id], [name for name in self._user if name != "user_id"])
        profile = {name: values[0] for name, values in row.items()}
        return None if profile[UPDATED_AT] is None else {**profile, "user_id": user_id}

    def encoded_user(self, user_id: str, ts: int) -> tuple[bool, dict[str, Any]]:
        """Whether the user is known by ``ts`` (microseconds UTC), and a code per feature_column of the user.

        Someone unknown has code 0, no number and no values in every feature.
        """
        profile = self.user(user_id)
        known = profile is not None and profile[UPDATED_AT] <= ts
        raw = pl.DataFrame(
            {name: [profile[name] if profile is not None and known else None] for name in self._user},
            schema=self._user,
        )
        return known, encode_features(self.schema.side("user"), raw).row(0, named=True)

    def sequences(self, user_id: str) -> dict[str, History]:
        """All stored events per sequence; empty arrays where there are none."""
        histories = {}
        for sequence in self.schema.sequences:
            columns = {timeline_column(sequence, one): one for one in (None, *sequence.fields)}
            row = self._read(sequence_view(sequence), "user_id", [user_id], list(columns))
            arrays = {
                one.name if one is not None else "ts": np.array(
                    row[name][0] or [], np.float32 if one is not None and one.kind == "number" else np.int64
                )
                for name, one in columns.items()
            }
            histories[sequence.name] = History(arrays.pop("ts"), arrays)
        return histories

    def items(self, item_ids: list[str], ts: int) -> pl.DataFrame:
        """Encoded features of items [C], in this order: ``item_known`` and a feature_column per item feature.

        An item without a profile by ``ts`` (microseconds UTC) has code 0, no number and no values.
        """
        return self._items.take(item_ids, ts)

    def _columns(self, name: str, key: str, features: Iterable[Feature]) -> dict[str, Any]:
        """Polars types of a profile's raw columns, its key included."""
        view = registered_view(self._store, name)
        kinds = {one.name: POLARS_TYPES[one.dtype] for one in view.features}
        sources = dict.fromkeys([*[feature.source for feature in features if feature.source != key], UPDATED_AT])
        _require(view, sources)
        return {key: pl.String, **{source: kinds[source] for source in sources}}

    def _read(self, view: str, key: str, ids: list[str], columns: list[str]) -> dict[str, list[Any]]:
        response = self._store.get_online_features(
            features=[f"{view}:{column}" for column in columns], entity_rows=[{key: one} for one in ids]
        ).to_dict()
        return {column: response[column] for column in columns}

    def _read_items(self, item_ids: list[str]) -> pl.DataFrame:
        columns = [name for name in self._item if name != "item_id"]
        portions = []
        for start in range(0, len(item_ids), READ_ROWS):
            ids = item_ids[start : start + READ_ROWS]
            portions.append(
                pl.DataFrame({"item_id": ids, **self._read(ITEM_VIEW, "item_id", ids, columns)}, schema=self._item)
            )
        return self._encode_items(pl.concat(portions))

    def _encode_items(self, raw: pl.DataFrame) -> pl.DataFrame:
        known = raw[UPDATED_AT].is_not_null()
        raw = raw.with_columns(item_id=pl.when(known).then("item_id"))  # an unknown item's id reads 0
        return encode_features(self.schema.side("item"), raw).with_columns(
            raw[UPDATED_AT].fill_null(NEVER), known.alias("item_known")
        )


class ItemTable:
    """Read-through table of encoded items in memory: reading 500 items from a store takes 10 ms, from here 0.1.

    Args:
        blank: one row, which stands for every item that is not known at the time of a request.
        read: encoded rows of these ids, in their order, with ``updated_at`` (``NEVER`` if unknown) and
            ``item_known``.
        max_age: seconds until an entry is read again.
        max_items: the table is emptied when it would hold more ids.
    """

    def __init__(
        self, blank: pl.DataFrame, read: Callable[[list[str]], pl.DataFrame], max_age: float, max_items: int
    ) -> None:
        self._read = read
        self._max_age = max_age
        self._max_items = max_items
        self._rows: dict[str, int] = {}
        self._table = blank
        self._updated_at = np.array([NEVER])
        self._read_at = np.array([np.inf])

    def take(self, item_ids: list[str], ts: int) -> pl.DataFrame:
        """Rows of these items as known at ``ts``, in this order; ``updated_at`` is left out."""
        now = time.monotonic()
        rows = np.array([self._rows.get(one, -1) for one in item_ids], np.int64)
        stale = (rows < 0) | (self._read_at[rows] + self._max_age < now)
        if stale.any():
            self._load(list(dict.fromkeys(one for one, old in zip(item_ids, stale, strict=True) if old)), now)
            if len(self._rows) > self._max_items:
                self._keep_only(set(item_ids))
            rows = np.array([self._rows[one] for one in item_ids], np.int64)
        return self._table[np.where(self._updated_at[rows] <= ts, rows, 0)].drop(UPDATED_AT)

    def _load(self, item_ids: list[str], now: float) -> None:
        fresh = self._read(item_ids)
        self._rows.update(zip(item_ids, range(len(self._table), len(self._table) + len(fresh)), strict=True))
        self._table = pl.concat([self._table, fresh], rechunk=True)
        self._updated_at = np.concatenate([self._updated_at, fresh[UPDATED_AT].to_numpy()])
        self._read_at = np.concatenate([self._read_at, np.full(len(fresh), now)])
        if len(self._table) > 2 * len(self._rows) + 1:
            self._keep_only(set(self._rows))

    def _keep_only(self, item_ids: set[str]) -> None:
        """Drop other items, and the rows that newer ones have replaced."""
        kept = [one for one in self._rows if one in item_ids]
        rows = np.array([0, *[self._rows[one] for one in kept]], np.int64)
        self._table, self._updated_at, self._read_at = self._table[rows], self._updated_at[rows], self._read_at[rows]
        self._rows = {one: row for row, one in enumerate(kept, start=1)}


def encode_features(features: Iterable[Feature], raw: pl.DataFrame) -> pl.DataFrame:
    """One ``feature_column`` per feature from raw source columns: what the sample builder stores."""
    return raw.select(encode(feature, pl.col(feature.source)).alias(feature_column(feature)) for feature in features)


def _require(view: FeatureView, columns: Iterable[str]) -> None:
    present = {one.name for one in view.features}
    if missing := [column for column in columns if column not in present]:
        raise CorankError(
            f"the feature store's view {view.name} lacks {missing}, which the model reads. "
            "Run the pipeline with the model's features (`corank run`)."
        )


def registered_view(store: FeatureStore, name: str) -> FeatureView:
    try:
        return store.get_feature_view(name)
    except FeatureViewNotFoundException:
        raise CorankError(
            f"the feature store has no view {name} in project {store.project!r}. Run the pipeline first (`corank run`)."
        ) from None
