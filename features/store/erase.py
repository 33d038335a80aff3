"""Erasing users from the online store. Feast deletes whole views, not entities, so this speaks to each store.

Only the stores' own layout is used: SQLite holds a row per (entity key, feature) in one table per view; Redis a
hash per entity key with the features of all views. The endpoint keeps no user in memory (``OnlineReader`` caches
items alone), so an erased user is unknown to it from the next request on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from typing import Any

from feast import FeatureStore, FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import compute_table_id
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from features.errors import CorankError
from features.store.online import FeatureStoreSettings, open_store

USER_KEY = "user_id"


def erase_users(settings: FeatureStoreSettings, users: Collection[str]) -> dict[str, int]:
    """Remove all that is online about these users, in every view keyed by them; other entities stay.

    Returns:
        per user found: the stored values (SQLite) or hashes (Redis) that were removed.

    Raises:
        CorankError: a view is keyed by the user and something else, so its entries cannot be told from here, or
            the store cannot be reached.
    """
    store = open_store(settings)
    views = _user_views(store)
    version = store.config.entity_key_serialization_version
    keys = {
        user: serialize_entity_key(
            EntityKey(join_keys=[USER_KEY], entity_values=[Value(string_val=user)]),
            entity_key_serialization_version=version,
        )
        for user in users
    }
    failures: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
    if settings.online == "redis":
        from redis import RedisError

        failures = (RedisError, OSError)
    try:
        removed = _erase_sqlite(store, views, keys) if settings.online == "sqlite" else _erase_redis(store, keys)
    except failures as error:
        where = settings.sqlite_path if settings.online == "sqlite" else settings.redis
        raise CorankError(
            f"online store {settings.online} at {where}: users cannot be erased: {error}. "
            "Make it reachable, then run the same command again."
        ) from error
    return {user: count for user, count in removed.items() if count}


def _user_views(store: FeatureStore) -> list[FeatureView]:
    views = [view for view in store.list_feature_views() if USER_KEY in view.join_keys]
    for view in views:
        if view.join_keys != [USER_KEY]:
            raise CorankError(f"feature view {view.name} is keyed by {view.join_keys}: erase its users by hand")
    return views


def _erase_sqlite(store: FeatureStore, views: list[FeatureView], keys: dict[str, bytes]) -> dict[str, int]:
    online = _online(store)
    assert isinstance(online, SqliteOnlineStore)
    connection = online._get_conn(store.config)
    connection.execute("PRAGMA secure_delete = ON")  # freed pages are overwritten: the bytes go, not only the rows
    versioned = store.config.registry.enable_online_feature_view_versioning
    existing = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    removed = dict.fromkeys(keys, 0)
    with connection:  # one transaction: a user is online as before, or not at all
        for table in existing & {compute_table_id(store.config.project, view, versioned) for view in views}:
            quoted = '"' + table.replace('"', '""') + '"'
            for user, key in keys.items():
                removed[user] += connection.execute(f"DELETE FROM {quoted} WHERE entity_key = ?", (key,)).rowcount
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return removed


def _erase_redis(store: FeatureStore, keys: dict[str, bytes]) -> dict[str, int]:
    client = _online(store)._get_client(store.config.online_store)
    project = store.config.project.encode()
    return {user: int(client.delete(key + project)) for user, key in keys.items()}


def _online(store: FeatureStore) -> Any:
    """Feast's class of the online store, which depends on the config."""
    return store._get_provider().online_store
