"""The online store: where it is, what is registered, and how it is filled from Delta (:func:`materialize`).

The store keeps raw profiles, counts and coded sequences; :mod:`features.store.reader` reads them.
"""

from __future__ import annotations

import fcntl
import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa
from feast import FeatureService, FeatureStore, FeatureView, RepoConfig
from feast.errors import FeatureViewNotFoundException
from feast.infra.online_stores.sqlite import SqliteOnlineStoreConfig
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RegistryConfig
from feast.type_map import python_values_to_proto_values
from feast.types import Array, FeastType, Float32

from features.delta.table import Table
from features.encoding import bucket_column
from features.errors import CorankError, UnavailableError, writing
from features.schema import Schema
from features.store.definitions import (
    ITEM,
    SEQUENCE_VIEW,
    SERVICE,
    USER,
    StoredView,
    is_named_by_content,
    stored_views,
    timeline_prefix,
)
from features.store.delta import DeltaOfflineStoreConfig, delta_source, moment
from features.store.feast_internals import read, redis_client, retry_for_a_second, write
from features.store.query import SLICE_BYTES, TIME, Partitions, Query, latest, together
from features.store.registry import DamagedRegistryError, WholeRegistryStore

EntityValues = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
"""What Feast writes: entity key, feature → value, event timestamp, time of creation."""

Progress = Callable[[str, int], None]
"""Called with a view's name and how many of its rows have been written so far."""

WRITE_ROWS = 5_000
"""Rows written to the online store in one transaction; bounds memory."""

STRIPES, STRIPE = 16, "__stripe"
"""Number of locks in Redis that users share: parallel tasks and pushes rarely want the same one."""

LOCKED_ROWS = 1_000
"""Users whose sequences are rewritten under one lock, which limits how long a push waits."""

LOCKED_SECONDS = 30.0
"""Seconds after which Redis frees the lock of a writer that was killed."""


@dataclass(frozen=True)
class FeatureStoreSettings:
    """Where the feature store is and what it holds. Plain values: it travels to Ray workers and replicas.

    Attributes:
        project: Feast project; separates pipelines that share an online store.
        registry: path (or ``s3://`` address) of the Feast registry file.
        live: schemas of models that are served, or may be from one moment to the next. What they read stays
            registered and stored, and is kept up to date as far as the tables still give it.
        users, items: the user's profile tables; None: there is none.
        events: the user's event tables by their names in the config; a push asks them what an event is identified by.
        state_uri: the state table of the sample builder; ``state_options`` are its storage options.
        user_aggregates, item_aggregates: the builder's tables of counts; None: a store without counts, where nobody is
            known without a profile.
        sqlite_path: file of the online store, when ``online`` is sqlite.
        redis: ``host:port``, when ``online`` is redis.
        slice_bytes: bytes of Delta files that one Ray task reads; smaller tables are read in the calling process.
        item_max_age_seconds: how long a reader uses an item's features before it reads them again.
        max_cached_items: a reader's in-memory table of items is emptied beyond this size.
    """

    project: str
    registry: str
    schema: Schema
    users: Table | None
    items: Table | None
    state_uri: str
    state_options: dict[str, str] = field(default_factory=dict)
    live: tuple[Schema, ...] = ()
    events: Mapping[str, Table] = field(default_factory=dict)
    user_aggregates: Table | None = None
    item_aggregates: Table | None = None
    online: Literal["sqlite", "redis"] = "sqlite"
    sqlite_path: str = "online.db"
    redis: str = "localhost:6379"
    slice_bytes: int = SLICE_BYTES
    item_max_age_seconds: float = 60.0
    max_cached_items: int = 1_000_000

    @property
    def state(self) -> Table:
        return Table("user_state", self.state_uri, {}, self.state_options)

    @property
    def tables(self) -> list[Table]:
        """All tables behind the views."""
        every = (self.users, self.items, self.state, self.user_aggregates, self.item_aggregates)
        return [table for table in every if table is not None]

    @property
    def counts(self) -> dict[Literal["user", "item"], Table]:
        """The tables of counts that there are."""
        named: dict[Literal["user", "item"], Table | None] = {
            "user": self.user_aggregates,
            "item": self.item_aggregates,
        }
        return {side: table for side, table in named.items() if table is not None}

    def stored_views(self, store: FeatureStore) -> list[StoredView]:
        """What is registered, in the order in which it is written.

        Raises:
            ConfigError: a feature's column is missing, or has a type that cannot be stored or that a live model cannot
                read.
        """
        registered = {view.name: view for view in store.list_feature_views()}
        return stored_views(self.schema, self.live, self.users, self.items, self.state, self.counts, registered)


def open_store(settings: FeatureStoreSettings) -> FeatureStore:
    """The feature store of these settings; nothing is read or written yet."""
    if settings.online == "sqlite":
        Path(settings.sqlite_path).parent.mkdir(parents=True, exist_ok=True)
        online: dict[str, Any] = {"type": "sqlite", "path": str(Path(settings.sqlite_path).absolute())}
    else:
        # Without skip_dedup Feast drops rows of a time already stored, and with them a rebuilt partition.
        online = {"type": "redis", "connection_string": settings.redis, "skip_dedup": True}
    store_type = None
    if "://" not in settings.registry:
        Path(settings.registry).parent.mkdir(parents=True, exist_ok=True)
        store_type = f"{WholeRegistryStore.__module__}.{WholeRegistryStore.__qualname__}"
    tables = settings.tables
    store = FeatureStore(
        config=RepoConfig(
            project=settings.project,
            provider="local",
            registry=RegistryConfig(path=settings.registry, registry_store_type=store_type),
            online_store=online,
            offline_store=DeltaOfflineStoreConfig(
                storage_options={table.uri: dict(table.storage_options) for table in tables if table.storage_options},
                versions={table.uri: table.version for table in tables if table.version is not None},
                slice_bytes=settings.slice_bytes,
            ).model_dump(),
            entity_key_serialization_version=3,
        )
    )
    if settings.online == "redis":
        retry_for_a_second(store)
    return store


def apply(settings: FeatureStoreSettings) -> list[str]:
    """Register entities, views and service, and create their online tables. Idempotent.

    A view that no live model reads any more goes, with all that is stored in it.

    Returns:
        the names of the views.

    Raises:
        ConfigError: a feature's column is missing, or has a type that cannot be stored or that a live model cannot
            read.
        CorankError: a table does not exist.
    """
    try:
        store = open_store(settings)
        stored = settings.stored_views(store)
    except DamagedRegistryError:
        Path(settings.registry).unlink()
        store = open_store(settings)
        stored = settings.stored_views(store)
    views = [stored_view.view for stored_view in stored]
    names = [str(view.name) for view in views]
    declared = {stored_view.view.name for stored_view in replace(settings, live=()).stored_views(store)}
    service = FeatureService(name=SERVICE, features=[view for view in views if view.name in declared])
    registered = [view for view in store.list_feature_views() if is_named_by_content(view.name)]
    unread = [view for view in registered if view.name not in names]
    store.apply([USER, ITEM, *views, service], objects_to_delete=list(unread), partial=False)
    return names


def materialize(
    settings: FeatureStoreSettings,
    start: int,
    end: int,
    progress: Progress | None = None,
    close: int | None = None,
    logged_until: int | None = None,
) -> dict[str, int]:
    """Write the newest row of every entity with start ≤ time ≤ end to the online store.

    The time is ``updated_at`` of a profile and the partition's close of a state row. Both bounds belong to
    the window: consecutive windows lose nothing, and a row on their border is written twice with the same
    values. Run windows in the order of time: an older one run last would bring older values back.

    Events pushed with ``logged_until`` ≤ time (:mod:`features.store.push`) stay behind the stored events: no log that
    was materialised held them.

    A large table is read by slices in Ray tasks, where Ray runs. Into Redis the tasks write themselves; SQLite has
    one writer, this process, which takes the tasks' results as they come. Feast's own ``materialize`` reads every
    column through NumPy, where an integer column with nulls becomes floating point and large ids change; so values
    are converted here, one by one, and written in portions.

    Args:
        start, end: microseconds UTC.
        progress: called after every portion (SQLite) or task (Redis) with the rows written so far.
        close: of the newest partition whose events count, microseconds UTC; default: ``end``, which may be later so
            that its counts are known.
        logged_until: latest close that the store was ever filled to, microseconds UTC; default: ``close``.

    Returns:
        rows written per view.

    Raises:
        CorankError: the views are not registered (:func:`apply`), or a table cannot be read.
        UnavailableError: the online store does not answer.
    """
    close = end if close is None else close
    logged_until = close if logged_until is None else logged_until
    store, written = open_store(settings), {}
    for stored in settings.stored_views(store):
        name = str(stored.view.name)
        view = registered_view(store, name)
        if not stored.given:
            continue
        query = view_query(store, view, start, close if name.startswith(SEQUENCE_VIEW) else end, stored.given)
        partitions = Partitions(query, settings.slice_bytes)
        rows = 0
        for count in _written(store, settings, view, partitions, logged_until):
            rows += count
            if progress is not None:
                progress(name, rows)
        window = (moment(start), moment(end))
        if window not in view.materialization_intervals:
            store.registry.apply_materialization(view, settings.project, *window)
        written[name] = rows
    return written


def view_query(
    store: FeatureStore, view: FeatureView, start: int | None, end: int, features: Iterable[str] = ()
) -> Query:
    """The newest row of every entity of a view with start ≤ time ≤ end, and these features of it."""
    source = delta_source(view)
    return Query(
        source.table(store.config),
        source.clock,
        keys={column.name: column.name for column in view.entity_columns},
        values={feature: feature for feature in features},
        start=start,
        end=end,
        latest=True,
    )


def _written(
    store: FeatureStore, settings: FeatureStoreSettings, view: FeatureView, partitions: Partitions, logged_until: int
) -> Iterator[int]:
    """Write the newest rows of every partition; yields the number of rows, portion by portion."""
    query = partitions.query
    if settings.online == "redis" and partitions.count > 1:
        yield from filter(None, partitions.map(partial(_write_partition, settings, view.name, query, logged_until)))
    else:
        for rows in partitions.map(partial(latest, query)):
            yield from _write(store, view, together([rows]), logged_until)


def _write_partition(
    settings: FeatureStoreSettings, name: str, query: Query, logged_until: int, *pieces: pl.DataFrame | pa.Table
) -> int:
    """Write one partition inside a task, where the store takes several writers."""
    store = open_store(settings)
    return sum(_write(store, registered_view(store, name), latest(query, *pieces), logged_until))


def _write(store: FeatureStore, view: FeatureView, rows: pl.DataFrame, logged_until: int) -> Iterator[int]:
    if not view.name.startswith(SEQUENCE_VIEW):
        for portion in rows.iter_slices(WRITE_ROWS) if rows.height else ():
            with reachable(store):
                write(store, view, entity_values(view, portion))
            yield portion.height
        return
    (key,) = view.join_keys
    for stripe in rows.with_columns(_stripe(key)).partition_by(STRIPE):
        for portion in stripe.iter_slices(LOCKED_ROWS):
            entries = entity_values(view, portion)
            with reachable(store), sole_writer(store, portion[key]):
                stored = read(store, view, [entity_key for entity_key, *_ in entries], None)
                for (_, values, _, _), (_, before) in zip(entries, stored, strict=True):
                    keep_pushed(view, values, before or {}, logged_until)
                write(store, view, entries)
            yield portion.height


@contextmanager
def reachable(store: FeatureStore) -> Iterator[None]:
    """Turn errors of the online store's client into ones that name the store and say what to do.

    Raises:
        UnavailableError
        NoSpaceError
    """
    online = store.config.online_store
    failures: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
    if online.type == "redis":
        from redis import RedisError

        failures = (RedisError, OSError)
        where = online.connection_string.split(",")[0]  # options follow, a password among them
        advice = "Make it reachable, then try again."
    else:
        where = online.path
        advice = "If the file is lost or damaged, remove it and `corank features materialize --all`; else try again."
    try:
        with writing(where):
            yield
    except failures as error:
        raise UnavailableError(f"online store {online.type} at {where} cannot be used: {error}. {advice}") from error


@contextmanager
def sole_writer(store: FeatureStore, users: pl.Series) -> Iterator[None]:
    """Let one thread of all processes at a time read and write back the sequences of these users; others wait."""
    online = store.config.online_store
    with ExitStack() as locked:
        if isinstance(online, SqliteOnlineStoreConfig):  # the file is local, and so are all its writers
            fcntl.flock(locked.enter_context(Path(f"{online.path}.lock").open("a")), fcntl.LOCK_EX)
        else:
            client = redis_client(store)
            stripes = users.to_frame("user_id").select(_stripe("user_id").unique().sort()).to_series()
            names = [f"{store.config.project}:sequences:{stripe}" for stripe in stripes]
            locks = [client.lock(name, timeout=LOCKED_SECONDS, sleep=0.005) for name in names]
            for lock in locks:  # always in the same order, so that no two writers wait for each other
                locked.enter_context(lock)
            for lock in locks[:-1]:  # part of their time has passed while the later ones were waited for
                lock.reacquire()
        yield


def _stripe(user: str) -> pl.Expr:
    return bucket_column(pl.col(user), STRIPES).alias(STRIPE)


def keep_pushed(view: FeatureView, values: dict[str, Any], before: dict[str, Any], logged_until: int) -> bool:
    """Append to a state row's lists the stored events of ``logged_until`` ≤ ts, which only a push can have brought.

    Returns:
        whether there are any.
    """
    times = before.get(f"{timeline_prefix(view.name)}__ts")
    first = bisect_left(times.int64_list_val.val, logged_until) if times is not None else 0
    if times is None or first == len(times.int64_list_val.val):
        return False
    kinds = {name: before[name].WhichOneof("val") if name in before else None for name in values}
    if None in kinds.values():
        return False  # they were pushed before the sequence had this field; the next partition brings them from the log
    for name, kind in kinds.items():
        getattr(values[name], str(kind)).val.extend(getattr(before[name], str(kind)).val[first:])
    return True


def entity_values(view: FeatureView, rows: pl.DataFrame) -> list[EntityValues]:
    """Rows of keys, features and ``TIME`` as Feast writes them; a feature that they lack stays as it is stored."""
    features = [feature for feature in view.features if feature.name in rows.columns]
    values = {
        column.name: python_values_to_proto_values(
            _storable(rows[column.name], column.dtype), column.dtype.to_value_type()
        )
        for column in [*view.entity_columns, *features]
    }
    keys = [column.name for column in view.entity_columns]
    return [
        (
            EntityKey(join_keys=keys, entity_values=[values[key][row] for key in keys]),
            {feature.name: values[feature.name][row] for feature in features},
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
        return [value and [float("nan") if element is None else element for element in value] for value in values]
    return [value and [element for element in value if element is not None] for value in values]


def registered_view(store: FeatureStore, name: str) -> FeatureView:
    try:
        return store.get_feature_view(name)
    except FeatureViewNotFoundException:
        raise CorankError(
            f"the feature store has no view {name} in project {store.project!r}. Run the pipeline first (`corank run`)."
        ) from None
