"""The sample builder against plain Python, incremental against whole, and its commits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from features.lake import Table
from features.samples import SAMPLES, STATE, build_partitions, fold_bucket
from features.schema import SECOND
from tests.features.worlds import DAYS, expected_rows, settings, write_world


def built(path: Path, tables: dict[str, Table], log_delay: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by day and user, folded in this process."""
    rows: dict[str, dict[str, dict[str, Any]]] = {day: {} for day in DAYS}
    for bucket in range(2):
        for table, day, content, _ in fold_bucket(settings(tables, path, log_delay), bucket, DAYS, []):
            if table == SAMPLES:
                for row in content.to_pylist():
                    user = row.pop("user_id")
                    assert user not in rows[day]
                    rows[day][user] = row
    return rows


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("log_delay", [0, 3 * SECOND])
def test_samples_equal_a_plain_python_reading_of_the_rules(tmp_path: Path, seed: int, log_delay: int) -> None:
    tables = write_world(tmp_path, seed)
    rows = built(tmp_path / "out", tables, log_delay)
    for day in DAYS:
        assert rows[day] == expected_rows(tables, day, log_delay)


def shown(tables: dict[str, Table]) -> dict[str, int]:
    return {day: tables["impressions"].scan([day]).collect().height for day in DAYS}


def test_a_request_never_sees_an_event_of_its_own_time(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=3)
    for users in built(tmp_path / "out", tables, 0).values():
        for row in users.values():
            for request in row["requests"]:
                visible = row["watched__ts"][: request["end__watched"]]
                assert all(ts < request["ts"] for ts in visible)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_day_by_day_builds_the_same_tables_as_all_at_once(tmp_path: Path, local_ray: None) -> None:
    tables = write_world(tmp_path, seed=1, users=12)
    whole, steps = settings(tables, tmp_path / "whole"), settings(tables, tmp_path / "steps")
    counts = build_partitions(whole, DAYS, [], shown(tables), lambda *_: None)
    for index, day in enumerate(DAYS):
        counts_of_day = build_partitions(steps, [day], DAYS[:index], shown(tables), lambda *_: None)
        assert counts_of_day[day] == counts[day]
    for name in (SAMPLES, STATE):
        frames = [
            Table(name, one.table_root(name)).scan().collect().sort("dt", "user_id").to_dicts()
            for one in (whole, steps)
        ]
        assert frames[0] == frames[1]
        assert frames[0]
    for day in DAYS:
        assert counts[day].impressions == shown(tables)[day] == counts[day].candidates + counts[day].quarantined


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_building_a_partition_again_replaces_it_in_one_commit(tmp_path: Path, local_ray: None) -> None:
    tables = write_world(tmp_path, seed=2)
    one = settings(tables, tmp_path / "out")
    build_partitions(one, DAYS, [], shown(tables), lambda *_: None)
    root = one.table_root(SAMPLES)
    before = Table(SAMPLES, root).scan().collect().sort("dt", "user_id").to_dicts()
    version = DeltaTable(root).version()
    build_partitions(one, [DAYS[1]], [DAYS[0]], shown(tables), lambda *_: None)
    assert DeltaTable(root).version() == version + 1
    assert Table(SAMPLES, root).scan().collect().sort("dt", "user_id").to_dicts() == before


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("buckets", [1, 4])
def test_another_number_of_buckets_than_the_layout_is_an_error(tmp_path: Path, local_ray: None, buckets: int) -> None:
    tables = write_world(tmp_path, seed=2, users=8, buckets=2)
    one = settings(tables, tmp_path / "out", buckets=buckets)
    with pytest.raises(Exception, match="Set `buckets` in the config"):
        build_partitions(one, DAYS, [], shown(tables), lambda *_: None)
    assert not Table(SAMPLES, one.table_root(SAMPLES)).exists()
