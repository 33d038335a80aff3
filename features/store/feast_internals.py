"""The parts of Feast outside its public interface that the store needs, each in one function.

``tests/features/test_feast_internals.py`` checks what these must do, for when another version of Feast comes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import typeguard

# Importing Feast imports its server and the server's metrics, which make a temporary folder for every process; a killed
# process leaves it behind. Neither is used here, and Feast works without metrics.
sys.modules.setdefault("feast.feature_server", ModuleType("feast.feature_server"))
sys.modules.setdefault("feast.metrics", None)  # type: ignore[arg-type]


def _unchecked(target: Any = None, **_: Any) -> Any:
    return target if target is not None else _unchecked


# Feast has its constructors' arguments checked at run time, by code that is made anew at every import: six of the ten
# seconds that importing Feast takes, in every command and replica. mypy checks our calls; so Feast comes without.
_checked, typeguard.typechecked = typeguard.typechecked, _unchecked
try:
    from feast import FeatureStore, FeatureView
    from feast.infra.online_stores.helpers import _mmh3, compute_versioned_name
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
finally:
    typeguard.typechecked = _checked

RETRIES, FIRST_WAIT, LONGEST_WAIT = 3, 0.02, 0.2
"""How often, and after how many seconds, a call to Redis is tried again; the waits of its own client are longer."""


def online_store(store: FeatureStore) -> Any:
    """Feast's object of the online store; its class depends on the config."""
    return store._get_provider().online_store


def read(store: FeatureStore, view: FeatureView, keys: list[EntityKey], features: list[str] | None) -> list[Any]:
    """Per key when it was written, and its values by feature; None or empty values where there is nothing."""
    own = None if features is None else list(features)  # the store on Redis appends to it
    found: list[Any] = store._get_provider().online_read(store.config, view, keys, own)
    return found


def write(store: FeatureStore, view: FeatureView, entries: Sequence[Any]) -> None:
    """Write (key, values by feature, time, time of creation) of a view."""
    store._get_provider().online_write_batch(store.config, view, list(entries), None)


def sqlite_connection(store: FeatureStore) -> Any:
    """The connection of an online store on SQLite."""
    return online_store(store)._get_conn(store.config)


def redis_client(store: FeatureStore) -> Any:
    """The client of an online store on Redis; Feast's own reads and writes use it, too."""
    return online_store(store)._get_client(store.config.online_store)


def retry_for_a_second(store: FeatureStore) -> None:
    """Let the client of an online store on Redis give up on a server that is gone within a second."""
    from redis import Redis
    from redis.backoff import ExponentialWithJitterBackoff
    from redis.retry import Retry

    client = redis_client(store)
    if isinstance(client, Redis):  # a cluster's client has its own way to look for other nodes
        client.set_retry(Retry(ExponentialWithJitterBackoff(base=FIRST_WAIT, cap=LONGEST_WAIT), RETRIES))


def redis_fields(store: FeatureStore, view: FeatureView) -> list[bytes]:
    """Names that Feast gives to a view's fields in a hash of Redis, that of its time first."""
    name = compute_versioned_name(view, store.config.registry.enable_online_feature_view_versioning)
    return [f"_ts:{name}".encode(), *[_mmh3(f"{name}:{feature.name}") for feature in view.features]]
