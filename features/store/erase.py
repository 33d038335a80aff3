"""Erasing entities from the online store. Feast deletes whole views, not entities, so this speaks to each store.

Only the stores' own layout is used: SQLite holds a row per (entity key, feature) in one table per view; Redis a
hash per entity key with the features of all views. The endpoint keeps no user in memory (``OnlineReader`` caches
items alone), so an erased user is unknown to it from the next request on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import compress, islice

import polars as pl
from feast import FeatureStore, FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key, serialize_entity_key_prefix
from feast.infra.online_stores.helpers import compute_table_id
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from features.errors import CorankError
from features.store.definitions import SEQUENCE_VIEW
from features.store.feast_internals import online_store, read, redis_client, redis_fields, sqlite_connection, write
from features.store.online import (
    LOCKED_ROWS,
    WRITE_ROWS,
    FeatureStoreSettings,
    entity_values,
    keep_pushed,
    open_store,
    reachable,
    registered_view,
    sole_writer,
    view_query,
)
from features.store.query import TIME, Partitions

USER_KEY = "user_id"


def erase_users(settings: FeatureStoreSettings, users: Collection[str]) -> dict[str, int]:
    """Remove all that is online about these users, in every view keyed by them; other entities stay.

    Returns:
        per user found: the stored values (SQLite) or hashes (Redis) that were removed.

    Raises:
        CorankError: a view is keyed by the user and something else, so its entries cannot be told from here, or
            the store does not answer.
    """
    store = open_store(settings)
    views = _user_views(store)
    keys = {user: _serialized(store, _entity_key(USER_KEY, user)) for user in users}
    with reachable(store), sole_writer(store, pl.Series(list(keys), dtype=pl.String)):
        removed = _erase_sqlite(store, views, keys) if settings.online == "sqlite" else _erase_redis(store, keys)
    return {user: count for user, count in removed.items() if count}


def erase_absent(
    settings: FeatureStoreSettings, end: int, close: int | None = None, logged_until: int | None = None
) -> dict[str, int]:
    """Remove entities without a row in the tables up to ``end``: a corrected log may lack users, items or profiles.

    After a materialisation from the beginning, the online store is then as one that was filled for the first time. Of
    a sequence the events pushed with ``logged_until`` ≤ time stay.

    Args:
        end, close, logged_until: microseconds UTC, as of that materialisation.

    Returns:
        entities that were removed, per view.

    Raises:
        CorankError: the views are not registered, a table cannot be read, or the store does not answer.
    """
    close = end if close is None else close
    logged_until = close if logged_until is None else logged_until
    store, removed = open_store(settings), {}
    for name in [str(stored_view.view.name) for stored_view in settings.stored_views(store) if stored_view.given]:
        view = registered_view(store, name)
        until = close if name.startswith(SEQUENCE_VIEW) else end
        query = view_query(store, view, None, until)
        (key,) = query.keys
        present = pl.concat([rows[key] for rows in Partitions(query, settings.slice_bytes).rows()])
        with reachable(store):
            stored = pl.Series(key, _stored_ids(store, view), dtype=pl.String).unique()
            absent = stored.filter(stored.is_in(present.implode()).not_()).to_frame()
            removed[name] = 0
            if name.startswith(SEQUENCE_VIEW):
                for portion in absent.iter_slices(LOCKED_ROWS) if absent.height else ():
                    with sole_writer(store, portion[key]):
                        users = _without_pushed(store, view, portion, logged_until)
                        _erase_from_view(store, view, users)
                    removed[name] += len(users)
            else:
                _erase_from_view(store, view, absent[key].to_list())
                removed[name] = absent.height
    return removed


def _without_pushed(store: FeatureStore, view: FeatureView, absent: pl.DataFrame, logged_until: int) -> list[str]:
    """The absent entities without pushed events; the sequences of the others are reduced to their pushed events."""
    empty = [pl.lit([]).alias(feature.name) for feature in view.features]
    entries = entity_values(view, absent.with_columns(*empty, pl.lit(logged_until).alias(TIME)))
    stored = read(store, view, [key for key, *_ in entries], None)
    pushed = [
        keep_pushed(view, entry[1], before or {}, logged_until)
        for entry, (_, before) in zip(entries, stored, strict=True)
    ]
    write(store, view, list(compress(entries, pushed)))
    return [user for user, kept in zip(absent.to_series(), pushed, strict=True) if not kept]


def _user_views(store: FeatureStore) -> list[FeatureView]:
    views = [view for view in store.list_feature_views() if USER_KEY in view.join_keys]
    for view in views:
        if view.join_keys != [USER_KEY]:
            raise CorankError(f"feature view {view.name} is keyed by {view.join_keys}: erase its users by hand")
    return views


def _entity_key(name: str, value: str) -> EntityKey:
    return EntityKey(join_keys=[name], entity_values=[Value(string_val=value)])


def _serialized(store: FeatureStore, key: EntityKey) -> bytes:
    return serialize_entity_key(key, store.config.entity_key_serialization_version)


def _stored_ids(store: FeatureStore, view: FeatureView) -> Iterator[str]:
    """Every entity with a row of this view."""
    (name,) = view.join_keys
    prefix = serialize_entity_key_prefix([name], store.config.entity_key_serialization_version)
    if isinstance(online_store(store), SqliteOnlineStore):
        select = f"SELECT DISTINCT entity_key FROM {_quoted(_table(store, view))}"
        for (key,) in sqlite_connection(store).execute(select):
            yield _value_in(key, prefix)[0].decode()
        return
    client, project = redis_client(store), store.config.project.encode()
    found = client.scan_iter(prefix + b"*", count=WRITE_ROWS)
    while keys := list(islice(found, WRITE_ROWS)):
        with client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hexists(key, redis_fields(store, view)[0])
            are_stored = pipe.execute()
        for key in compress(keys, are_stored):
            value, rest = _value_in(key, prefix)
            if rest == project:  # other projects may share the server
                yield value.decode()


def _value_in(key: bytes, prefix: bytes) -> tuple[bytes, bytes]:
    """The id in a serialized entity key, and what follows it: type, length and bytes of the value come after names."""
    start = len(prefix) + 8
    end = start + int.from_bytes(key[start - 4 : start], "little")
    return key[start:end], key[end:]


def _erase_from_view(store: FeatureStore, view: FeatureView, ids: list[str]) -> None:
    (name,) = view.join_keys
    keys = {identifier: _serialized(store, _entity_key(name, identifier)) for identifier in ids}
    if isinstance(online_store(store), SqliteOnlineStore):
        _erase_sqlite(store, [view], keys)
        return
    project = store.config.project.encode()
    with redis_client(store).pipeline(transaction=False) as pipe:
        for key in keys.values():
            pipe.hdel(key + project, *redis_fields(store, view))  # a hash without fields is gone
        pipe.execute()


def _erase_sqlite(store: FeatureStore, views: list[FeatureView], keys: dict[str, bytes]) -> dict[str, int]:
    connection = sqlite_connection(store)
    connection.execute("PRAGMA secure_delete = ON")  # freed pages are overwritten: the bytes go, not only the rows
    existing = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    removed = dict.fromkeys(keys, 0)
    with connection:  # one transaction: a user is online as before, or not at all
        for table in existing & {_table(store, view) for view in views}:
            for user, key in keys.items():
                erased = connection.execute(f"DELETE FROM {_quoted(table)} WHERE entity_key = ?", (key,))
                removed[user] += erased.rowcount
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return removed


def _table(store: FeatureStore, view: FeatureView) -> str:
    versioned = store.config.registry.enable_online_feature_view_versioning
    return str(compute_table_id(store.config.project, view, versioned))


def _quoted(table: str) -> str:
    return '"' + table.replace('"', '""') + '"'


def _erase_redis(store: FeatureStore, keys: dict[str, bytes]) -> dict[str, int]:
    client = redis_client(store)
    project = store.config.project.encode()
    return {user: int(client.delete(key + project)) for user, key in keys.items()}
