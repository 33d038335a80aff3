"""What Feast's internals must do, for every online store: another version of Feast that does otherwise fails here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from redis import RedisError

from features.schema import partition_bounds
from features.store.feast_internals import (
    online_store,
    read,
    redis_client,
    redis_fields,
    sqlite_connection,
    write,
)
from features.store.online import apply, materialize, open_store, registered_view
from tests.features.stores import build_state, store_settings
from tests.features.worlds import DAYS, write_world
from tests.servers import free_port


def key_of(user: str) -> EntityKey:
    return EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user)])


@pytest.mark.parametrize("online", ["sqlite", "redis"])
def test_what_is_written_is_read_and_lies_where_it_is_erased(
    tmp_path: Path, online: str, request: pytest.FixtureRequest
) -> None:
    tables = write_world(tmp_path, seed=1, users=4)
    build_state(tables, tmp_path, 0)
    address = request.getfixturevalue("redis_address") if online == "redis" else "nowhere"
    settings = store_settings(tables, tmp_path, f"internals_{online}", online=online, redis=address)
    apply(settings)
    store = open_store(settings)
    view = registered_view(store, "user_features")
    ((_, nothing),) = read(store, view, [key_of("1")], None)
    assert not any(value.WhichOneof("val") for value in (nothing or {}).values())
    materialize(settings, 0, partition_bounds(DAYS[-1], "day")[1])
    written, values = read(store, view, [key_of("1")], None)[0]
    assert set(values) == {feature.name for feature in view.features}
    write(store, view, [(key_of("new"), values, written, None)])
    assert read(store, view, [key_of("new")], None)[0][1] == values
    if online == "sqlite":
        assert type(online_store(store)).__name__ == "SqliteOnlineStore"
        names = {name for (name,) in sqlite_connection(store).execute("SELECT name FROM sqlite_master")}
        assert any("user_features" in name for name in names)
    else:
        client = redis_client(store)
        hashes = [client.hkeys(key) for key in client.scan_iter(b"*" + settings.project.encode())]
        assert any(set(redis_fields(store, view)) <= set(fields) for fields in hashes)


def test_a_redis_that_is_gone_is_given_up_within_a_second_or_so(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=1, users=2)
    store = open_store(store_settings(tables, tmp_path, "gone", online="redis", redis=f"127.0.0.1:{free_port()}"))
    started = time.monotonic()
    with pytest.raises(RedisError):
        redis_client(store).ping()
    assert time.monotonic() - started < 3  # with the client's own waits it is more


def test_feast_is_imported_without_its_run_time_checks_and_others_keep_theirs() -> None:
    code = (
        "import typeguard; before = typeguard.typechecked; import features.store.online;"
        "assert typeguard.typechecked is before; print('fine')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert run.stdout.strip() == "fine", run.stderr


def test_feast_counts_nothing_and_makes_no_folder_for_it(tmp_path: Path) -> None:
    program = """
import tempfile
from pathlib import Path
from features.store import feast_internals
from feast.feature_store import _get_track_materialization
assert _get_track_materialization() is None
assert not list(Path(tempfile.gettempdir()).iterdir())
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
