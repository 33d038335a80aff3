"""The online store on a real Redis server gives what SQLite gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from redis import Redis

import features.store.online
from features.builder.states import STATE
from features.delta.table import Table
from features.errors import UnavailableError
from features.schema import SECOND, partition_bounds
from features.store.definitions import sequence_view
from features.store.erase import erase_absent, erase_users
from features.store.online import STRIPES, FeatureStoreSettings, apply, materialize, open_store, sole_writer
from features.store.push import OnlineWriter
from features.store.query import Query
from features.store.reader import OnlineReader
from tests.features.stores import build_state, online_content, store_settings
from tests.features.worlds import DAYS, SCHEMA, write_world
from tests.servers import free_port

WRITERS, PUSHES = 4, 10
CLOSES = [partition_bounds(day, "day")[1] for day in DAYS]
USERS = 12


@pytest.mark.parametrize(
    "on_ray",
    [
        pytest.param(False, id="in-process"),
        pytest.param(True, id="on-ray", marks=[pytest.mark.slow, pytest.mark.timeout(120)]),
    ],
)
def test_redis_gives_what_sqlite_gives(
    tmp_path: Path, redis_address: str, on_ray: bool, request: pytest.FixtureRequest
) -> None:
    tables = write_world(tmp_path, seed=1, users=USERS)
    build_state(tables, tmp_path, 0)
    options = {}
    if on_ray:
        request.getfixturevalue("local_ray")
        options = {"slice_bytes": 2_000}  # the state table is read by several tasks, which write themselves
        state = Query(Table(STATE, str(tmp_path / STATE)), "ts", {"user_id": "user_id"}, {}, 0, CLOSES[1])
        assert len(state.slices(2_000)) > 1
    sqlite = store_settings(tables, tmp_path, f"files_{on_ray}")
    redis = store_settings(tables, tmp_path, f"redis_{on_ray}", online="redis", redis=redis_address, **options)
    events = tables["events"].scan([DAYS[2]]).collect()
    contents = []
    for settings in (sqlite, redis):
        apply(settings)
        seen: dict[str, int] = {}
        written = materialize(settings, 0, CLOSES[1], seen.__setitem__)
        assert seen == written
        first = online_content(settings, USERS, CLOSES[1])
        writer = OnlineWriter(settings)
        added = [writer.push(events), writer.push(events)]
        pushed = online_content(settings, USERS, CLOSES[2])
        materialize(settings, CLOSES[1], CLOSES[2])
        contents.append([written, first, added, pushed, online_content(settings, USERS, CLOSES[2])])
    np.testing.assert_equal(contents[1], contents[0])
    assert contents[0][0][sequence_view(SCHEMA.sequences[0])] > 5
    assert contents[0][2][0] != contents[0][2][1] == {"watched": 0, "bought": 0}


def test_a_partition_built_again_replaces_the_values_of_its_time(tmp_path: Path, redis_address: str) -> None:
    tables = write_world(tmp_path, seed=1, users=USERS)
    build_state(tables, tmp_path, 0)
    redis = store_settings(tables, tmp_path, "rebuilt", online="redis", redis=redis_address)
    apply(redis)
    materialize(redis, 0, CLOSES[2])
    before = online_content(redis, USERS, CLOSES[2])
    tables["users"].delta().update(updates={"age": "age + 1"})  # the same updated_at
    materialize(redis, 0, CLOSES[2])
    after = online_content(redis, USERS, CLOSES[2])
    assert after["1"]["raw"]["age"] == before["1"]["raw"]["age"] + 1 == 51


@pytest.mark.parametrize("online", ["sqlite", "redis"])
def test_a_store_filled_anew_after_a_correction_is_as_one_filled_for_the_first_time(
    tmp_path: Path, online: Literal["sqlite", "redis"], request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue("redis_address") if online == "redis" else ""
    tables = write_world(tmp_path, seed=1, users=USERS)
    build_state(tables, tmp_path, 0)
    # on one server a name that ends like another's is another project all the same
    corrected, neighbour, fresh = (
        store_settings(tables, tmp_path, name, online=online, redis=address)
        for name in ("anew", "not_anew", "anew_fresh")
    )
    tomorrow = tables["events"].scan([DAYS[2]]).filter(pl.col("item_id") != 2).collect()
    for settings in (corrected, neighbour):
        apply(settings)
        materialize(settings, 0, CLOSES[1])
        OnlineWriter(settings).push(tomorrow)
    before = online_content(corrected, USERS, CLOSES[2])
    state, rows = Table(STATE, str(tmp_path / STATE)), pl.col("ts").is_in(CLOSES[:2])
    closes = dict(
        state.scan().filter(rows).group_by("user_id").agg(pl.col("ts").sort()).sort("user_id").collect().rows()
    )
    shortened = next(user for user, found in closes.items() if found == CLOSES[:2])  # its newest events go
    pushed = set(tomorrow["user_id"].cast(pl.String))
    gone = next(user for user in closes if user != shortened and user not in pushed)
    gone_but_pushed = next(user for user in closes if user != shortened and user in pushed)
    state.delta().delete(
        f"user_id IN ('{gone}', '{gone_but_pushed}') OR (user_id = '{shortened}' AND ts >= {CLOSES[1]})"
    )
    tables["users"].delta().delete(f"user_id = {gone}")
    tables["items"].delta().delete("item_id = 2")
    materialize(corrected, 0, CLOSES[1])
    if online == "redis":  # another project's users may be numbers, whose bytes are no text
        number = EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=-2)])
        key = serialize_entity_key(number, entity_key_serialization_version=3) + b"other"
        Redis.from_url(f"redis://{address}").hset(key, "_ts:user_features", "1")
    removed = erase_absent(corrected, CLOSES[1], CLOSES[1])
    apply(fresh)
    materialize(fresh, 0, CLOSES[1])
    OnlineWriter(fresh).push(tomorrow)
    after = online_content(corrected, USERS, CLOSES[2])
    np.testing.assert_equal(visible(after), visible(online_content(fresh, USERS, CLOSES[2])))
    assert removed["user_features"] == removed["item_features"] == 1
    assert removed[sequence_view(SCHEMA.sequences[0])] >= 1
    assert before[gone]["raw"] is not None
    assert before[gone]["watched"]["ts"]
    assert after[gone] == {**after[str(USERS)], "coded": after[gone]["coded"]}
    assert 0 < len(after[gone_but_pushed]["watched"]["ts"]) < len(before[gone_but_pushed]["watched"]["ts"])
    between = {ts for ts in before[shortened]["watched"]["ts"] if CLOSES[0] <= ts < CLOSES[1]}
    assert between
    assert not between & set(after[shortened]["watched"]["ts"])
    np.testing.assert_equal(online_content(neighbour, USERS, CLOSES[2]), before)
    assert not any(erase_absent(corrected, CLOSES[1], CLOSES[1]).values())


def two_days(
    root: Path, name: str, online: Literal["sqlite", "redis"], request: pytest.FixtureRequest
) -> FeatureStoreSettings:
    """A store that is filled with two days of a world."""
    address = request.getfixturevalue("redis_address") if online == "redis" else ""
    tables = write_world(root, seed=1, users=USERS)
    build_state(tables, root, 0)
    settings = store_settings(tables, root, name, online=online, redis=address)
    apply(settings)
    materialize(settings, 0, CLOSES[1])
    return settings


@pytest.mark.parametrize("online", ["sqlite", "redis"])
def test_pushes_of_several_writers_for_one_user_are_all_kept(
    tmp_path: Path, online: Literal["sqlite", "redis"], request: pytest.FixtureRequest
) -> None:
    """Writers with connections of their own, as replicas have them, and a materialisation between them."""
    settings = two_days(tmp_path, "crowded", online, request)

    def push(number: int) -> None:
        writer = OnlineWriter(settings, log_delay=86_400 * SECOND)  # none of them is visible yet, so all are kept
        for step in range(PUSHES):
            event = {"event_id": f"{number}-{step}", "user_id": 1, "item_id": 1, "action": "buy", "seconds": None}
            writer.push(pl.DataFrame([event | {"ts": CLOSES[1] + step}], schema_overrides={"seconds": pl.Float64}))

    with ThreadPoolExecutor(WRITERS + 1) as pool:
        for done in [pool.submit(push, number) for number in range(WRITERS)]:
            materialize(settings, 0, CLOSES[1])
            done.result()
    kept = [ts for ts in OnlineReader(settings).sequences("1")["bought"].ts.tolist() if ts >= CLOSES[1]]
    assert kept == sorted([CLOSES[1] + step for step in range(PUSHES)] * WRITERS)


@pytest.mark.parametrize("online", ["sqlite", "redis"])
def test_a_user_is_forgotten_after_a_push_in_flight_not_before_it(
    tmp_path: Path, online: Literal["sqlite", "redis"], request: pytest.FixtureRequest
) -> None:
    settings = two_days(tmp_path, "forgetting", online, request)
    with ThreadPoolExecutor(1) as pool:
        with sole_writer(open_store(settings), pl.Series(["1"])):  # as a push holds it from its reading to its writing
            erased = pool.submit(erase_users, settings, ["1"])
            with pytest.raises(TimeoutError):
                erased.result(timeout=0.5)
            assert OnlineReader(settings).user("1") is not None
        assert erased.result(timeout=10)["1"] > 0
    assert OnlineReader(settings).user("1") is None


def test_a_store_that_does_not_answer_is_named(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=1, users=USERS)
    build_state(tables, tmp_path, 0)
    gone = store_settings(tables, tmp_path, "gone", online="redis", redis=f"127.0.0.1:{free_port()},password=secret")
    apply(replace(gone, online="sqlite"))
    reader, writer = OnlineReader(gone), OnlineWriter(gone)
    for ask in (
        lambda: materialize(gone, 0, CLOSES[1]),
        lambda: writer.push(tables["events"].scan([DAYS[2]]).collect()),
        lambda: erase_users(gone, ["1"]),
        lambda: erase_absent(gone, CLOSES[1], CLOSES[1]),
        lambda: reader.user("1"),
        lambda: reader.sequences("1"),
        lambda: reader.items(["1"], CLOSES[1]),
    ):
        with pytest.raises(UnavailableError, match=r"redis at 127.0.0.1:\d+ cannot be used: .* reachable") as failure:
            ask()
        assert "secret" not in str(failure.value)


def test_a_lost_file_of_the_store_is_named_with_the_command_that_fills_it(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=1, users=USERS)
    build_state(tables, tmp_path, 0)
    settings = store_settings(tables, tmp_path, "lost")
    apply(settings)
    Path(settings.sqlite_path).unlink()
    with pytest.raises(UnavailableError, match=f"sqlite at {settings.sqlite_path} .*materialize --all"):
        OnlineReader(settings).user("1")


def test_locks_taken_while_others_are_waited_for_are_whole_when_all_are_held(
    tmp_path: Path, redis_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 2.0
    monkeypatch.setattr(features.store.online, "LOCKED_SECONDS", seconds)
    tables = write_world(tmp_path, seed=1, users=USERS)
    store = open_store(store_settings(tables, tmp_path, "locked", online="redis", redis=redis_address))
    client = Redis.from_url(f"redis://{redis_address}")
    last = f"locked:sequences:{STRIPES - 1}"
    assert client.lock(last, timeout=0.9 * seconds).acquire()  # of a writer that was killed
    with sole_writer(store, pl.Series(map(str, range(20 * STRIPES)))):
        left = [client.pttl(f"locked:sequences:{stripe}") for stripe in range(STRIPES)]
    assert min(left) > 500 * seconds
    assert not client.exists(last)


def visible(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the newest L events of every sequence; what a push still keeps of older ones is its affair."""
    newest = {one.name: one.length for one in SCHEMA.sequences}
    users = {user: dict(own) for user, own in content.items() if user != "items"}
    for own in users.values():
        for name, length in newest.items():
            own[name] = {field: values[-length:] for field, values in own[name].items()}
    return {"items": content["items"], **users}
