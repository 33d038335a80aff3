"""The online store on a real Redis server gives what SQLite gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from features.lake import Table
from features.schema import partition_bounds
from features.states import STATE
from features.store.online import apply, materialize
from features.store.push import OnlineWriter
from features.store.query import Query
from tests.features.stores import build_state, online_content, store_settings
from tests.features.worlds import DAYS, write_world

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
    assert contents[0][0]["user_sequences_watched"] > 5
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
