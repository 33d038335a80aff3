"""Labels that arrive after their impression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.builder.fold import fold_bucket, rows_after
from features.builder.log_rows import log_rows
from features.builder.states import SAMPLES, BuildSettings
from features.delta.table import Table
from features.errors import DataGateError
from features.schema import SECOND, Task, partition_bounds
from tests.features.worlds import DAY, DAYS, SCHEMA, fold_all, settings, write_world

WINDOW = 86_400.0
BOUGHT = SCHEMA.model_copy(update={"tasks": (*SCHEMA.tasks, Task(name="bought", attribution_window_seconds=WINDOW))})


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Table]:
    """A log whose feedback says yes, no, yes and then no, or too late, of some candidates."""
    tables = write_world(tmp_path, seed=5)
    shown = tables["impressions"].scan().collect().sort("dt", "request_id", "position").to_dicts()
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any], value: int, after: int, label: str = "bought") -> None:
        ts = row["ts"] + after
        day = next(day for day in [*DAYS, "2026-01-08", "2026-01-09"] if ts < partition_bounds(day, "day")[1])
        identity = {"request_id": row["request_id"], "item_id": row["item_id"]}
        rows.append({**identity, "label": label, "value": value, "ts": ts, "dt": day})

    for number, row in enumerate(shown):
        match number % 6:
            case 0:
                tell(row, 1, 0)
            case 1:
                tell(row, 0, 5 * SECOND)
            case 2:
                tell(row, 1, 5 * SECOND)
                tell(row, 0, 9 * SECOND)
            case 3:
                tell(row, 1, DAY + 1)
            case 4:
                tell(row, 1, DAY, label="bought")
                tell(row, 1, 7, label="shared")
    pl.DataFrame(rows).write_delta(str(tmp_path / "feedback"), delta_write_options={"partition_by": ["dt"]})
    return tables | {"feedback": Table("feedback", str(tmp_path / "feedback"))}


def labels(one: BuildSettings, tables: dict[str, Table]) -> dict[tuple[str, str], list[int | None]]:
    """By day and whether feedback's rule (number % 6) expects a yes: the labels of its candidates."""
    shown = tables["impressions"].scan().collect().sort("dt", "request_id", "position")
    wanted = {
        (row["request_id"], str(row["item_id"])): number % 6 in (0, 4) for number, row in enumerate(shown.to_dicts())
    }
    found: dict[tuple[str, str], list[int | None]] = {}
    for bucket in range(one.buckets):
        for table, day, content, _ in fold_bucket(one, bucket, DAYS, []):
            for row in content.to_pylist() if table == SAMPLES else ():
                for request in row["requests"]:
                    for candidate in request["candidates"]:
                        kind = "yes" if wanted[request["request_id"], candidate["item_id"]] else "no"
                        found.setdefault((day, kind), []).append(candidate["label__bought"])
    return found


def test_the_newest_feedback_within_the_window_is_the_label(world: dict[str, Table], tmp_path: Path) -> None:
    found = labels(settings(world, tmp_path / "out", schema=BOUGHT), world)
    assert {day for day, _ in found} == set(DAYS)
    for (_, kind), values in found.items():
        assert set(values) == {int(kind == "yes")}


def test_labels_are_masked_until_the_window_has_passed(world: dict[str, Table], tmp_path: Path) -> None:
    one = settings(world, tmp_path / "out", schema=BOUGHT)
    # the window of the second day's last moment has just passed, that of the third has not
    now = partition_bounds(DAYS[1], "day")[1] + DAY
    found = labels(BuildSettings(**{**vars(one), "now": now}), world)
    for (day, kind), values in found.items():
        assert set(values) == ({None} if day == DAYS[2] else {int(kind == "yes")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ts": pl.col("ts") // 1_000}, "looks like milliseconds"),
        ({"ts": pl.col("ts") + DAY}, "outside of the partition"),
        ({"value": pl.lit(2)}, "value that is not 0 or 1"),
        ({"item_id": pl.lit(None, pl.Int64)}, "lack request_id, item_id, label or ts"),
    ],
    ids=["unit", "partition", "value", "key"],
)
def test_feedback_that_would_give_a_wrong_label_is_named(
    world: dict[str, Table], tmp_path: Path, change: dict[str, pl.Expr], message: str
) -> None:
    bad = world["feedback"].scan().collect().with_columns(**change)
    bad.write_delta(str(tmp_path / "bad"), delta_write_options={"partition_by": ["dt"]})
    tables = world | {"feedback": Table("feedback", str(tmp_path / "bad"))}
    with pytest.raises(DataGateError, match=f"table feedback, partition {DAYS[0]}: .* rows .*{message}"):
        fold_all(settings(tables, tmp_path / "out", schema=BOUGHT), DAYS[:1], [])


def test_requests_after_the_log_ask_for_no_label_that_comes_later(world: dict[str, Table], tmp_path: Path) -> None:
    one = settings(world, tmp_path / "out", schema=BOUGHT)
    fold_all(one, DAYS, [])
    shown, _ = log_rows(one, [DAYS[2]], 0)
    asked = shown["impressions"].with_columns(ts=pl.lit(partition_bounds(DAYS[2], "day")[1], pl.Int64))
    rows = rows_after(one, DAYS, asked)
    candidates = [one for row in rows.to_pylist() for request in row["requests"] for one in request["candidates"]]
    assert len(candidates) == asked.height
    assert {candidate["label__bought"] for candidate in candidates} == {None}
