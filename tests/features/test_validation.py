"""Every kind of bad input is named with table, partition and count; good data passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from features.lake import Table
from features.schema import SECOND, partition_bounds
from features.validation import (
    PartitionValidation,
    ValidationRules,
    check_tables,
    quarantine,
    validate_partitions,
)
from tests.features.worlds import DAYS, SCHEMA, write_world

DAY = DAYS[1]
NOW = partition_bounds(DAYS[-1], "day")[1]
RULES = ValidationRules()


def gate(root: Path, tables: dict[str, Table], rules: ValidationRules = RULES, now: int = NOW) -> PartitionValidation:
    results, docs = validate_partitions(
        tables, SCHEMA, [DAY], "day", rules, root / "gx", str(root / "quarantine"), now, lambda _: None
    )
    assert docs.is_file()
    return results[0]


def rewrite(table: Table, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Table:
    """The same log with a change, as a table of its own."""
    frame = change(table.scan().collect())
    uri = f"{table.uri}_changed"
    parts = [name for name in ("dt", "bucket") if name in frame.columns]
    frame.write_delta(uri, delta_write_options={"partition_by": parts} if parts else {})
    return Table(table.name, uri)


def first_rows(frame: pl.DataFrame, count: int) -> pl.Series:
    """Marks the first rows of the tested day."""
    return frame.select((pl.col("dt") == DAY) & ((pl.col("dt") == DAY).cum_sum() <= count)).to_series()


@pytest.fixture()
def tables(tmp_path: Path) -> dict[str, Table]:
    return write_world(tmp_path, seed=5, users=6)


def test_good_data_passes_with_nothing_set_aside(tmp_path: Path, tables: dict[str, Table]) -> None:
    result = gate(tmp_path, tables)
    assert result.passed
    assert result.findings == ()
    assert result.quarantined == 0
    assert not Table("quarantine", str(tmp_path / "quarantine")).exists()
    assert result.rows["impressions"] == tables["impressions"].scan([DAY]).collect().height


BAD_IMPRESSIONS: dict[str, tuple[Callable[[pl.DataFrame], pl.DataFrame], int]] = {
    "label_click": (
        lambda f: f.with_columns(
            pl.when(first_rows(f, 3)).then(pl.lit(2, pl.Int8)).otherwise(pl.col("click")).alias("click")
        ),
        3,
    ),
    "null_user_id": (
        lambda f: f.with_columns(pl.when(first_rows(f, 2)).then(None).otherwise(pl.col("user_id")).alias("user_id")),
        2,
    ),
    "ts_outside": (
        lambda f: f.with_columns(
            (pl.col("ts") - pl.when(pl.col("dt") == DAY).then(86_400 * SECOND).otherwise(0)).alias("ts")
        ),
        0,
    ),
    "ts_in_seconds": (
        lambda f: f.with_columns(
            pl.when(pl.col("dt") == DAY).then(pl.col("ts") // SECOND).otherwise(pl.col("ts")).alias("ts")
        ),
        0,
    ),
    "duplicate_request_id": (
        lambda f: f.with_columns(
            pl.when(pl.col("dt") == DAY).then(pl.lit("same")).otherwise(pl.col("request_id")).alias("request_id")
        ),
        1,
    ),
    "duplicate_candidate": (lambda f: pl.concat([f, f.filter(first_rows(f, 2))]), 2),
}


@pytest.mark.parametrize("rule", BAD_IMPRESSIONS)
def test_bad_impressions_are_named_with_table_partition_and_count(
    tmp_path: Path, tables: dict[str, Table], rule: str
) -> None:
    change, count = BAD_IMPRESSIONS[rule]
    changed = rewrite(tables["impressions"], change)
    rows = changed.scan([DAY]).collect().height
    result = gate(tmp_path, {**tables, "impressions": changed})
    assert not result.passed
    finding = next(finding for finding in result.failures if finding.rule == rule)
    assert (finding.table, finding.partition, finding.count) == ("impressions", DAY, count or rows)
    assert f"table impressions, partition {DAY}: {count or rows:,} of {rows:,} rows" in finding.message


def test_a_timestamp_in_the_future_is_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    opening = partition_bounds(DAY, "day")[0]
    result = gate(tmp_path, tables, now=opening)
    late = tables["impressions"].scan([DAY]).filter(pl.col("ts") > opening).collect().height
    assert {(f.table, f.count) for f in result.failures if f.rule == "ts_future"} >= {("impressions", late)}


def test_an_empty_partition_is_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    changed = rewrite(tables["impressions"], lambda frame: frame.filter(pl.col("dt") != DAY))
    result = gate(tmp_path, {**tables, "impressions": changed})
    assert [finding.message for finding in result.failures] == [
        f"table impressions, partition {DAY}: 0 of 0 rows are fewer than validation.min_rows (1)"
    ]


@pytest.mark.parametrize("column", ["event_id", "user_id", "ts"])
def test_events_without_a_key_are_named(tmp_path: Path, tables: dict[str, Table], column: str) -> None:
    changed = rewrite(
        tables["events"],
        lambda f: f.with_columns(pl.when(first_rows(f, 2)).then(None).otherwise(pl.col(column)).alias(column)),
    )
    result = gate(tmp_path, {**tables, "events": changed})
    assert (f"null_{column}", "events", 2) in {(f.rule, f.table, f.count) for f in result.failures}


def test_a_repeated_event_and_a_repeated_profile_are_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    events = rewrite(tables["events"], lambda f: pl.concat([f, f.filter(first_rows(f, 1))]))
    users = rewrite(tables["users"], lambda f: pl.concat([f, f.head(1)]))
    result = gate(tmp_path, {**tables, "events": events, "users": users})
    named = {(finding.table, finding.rule, finding.count) for finding in result.failures}
    assert named == {("events", "duplicate_event_id", 1), ("users", "duplicate_snapshot", 1)}


def test_missing_tables_and_columns_and_wrong_types_are_named_before_anything_is_read(
    tmp_path: Path, tables: dict[str, Table]
) -> None:
    assert check_tables(tables, SCHEMA) == []
    wrong = {
        "impressions": rewrite(tables["impressions"], lambda f: f.with_columns(pl.col("click").cast(pl.String))),
        "events": rewrite(tables["events"], lambda f: f.drop("seconds")),
        "users": Table("users", str(tmp_path / "nowhere")),
        "items": rewrite(tables["items"], lambda f: f.with_columns(pl.col("colors").list.first())),
    }
    findings = check_tables(wrong, SCHEMA)
    assert {(finding.table, finding.rule) for finding in findings} == {
        ("impressions", "mistyped_column"),
        ("events", "missing_column"),
        ("users", "missing_table"),
        ("items", "mistyped_column"),
    }
    assert any("column seconds is missing" in finding.message for finding in findings)


def test_tolerated_rows_are_set_aside_and_counted(tmp_path: Path, tables: dict[str, Table]) -> None:
    change, count = BAD_IMPRESSIONS["label_click"]
    changed = rewrite(tables["impressions"], change)
    result = gate(tmp_path, {**tables, "impressions": changed}, ValidationRules(max_quarantined=0.9))
    assert result.passed
    assert [(finding.rule, finding.count) for finding in result.findings] == [("label_click", count)]
    rows = Table("quarantine", str(tmp_path / "quarantine")).scan([DAY]).collect()
    assert result.quarantined == rows.height == count
    assert set(rows["rule"]) == {"label_click"}
    again = gate(tmp_path, tables)
    assert again.quarantined == 0
    assert Table("quarantine", str(tmp_path / "quarantine")).scan([DAY]).collect().height == 0


def test_buckets_set_aside_the_same_rows_as_the_whole_partition(tables: dict[str, Table]) -> None:
    frame = tables["impressions"].scan([DAY]).collect()
    bad = BAD_IMPRESSIONS["duplicate_candidate"][0](BAD_IMPRESSIONS["label_click"][0](frame))
    _, whole = quarantine(bad, SCHEMA, DAY, "day", NOW)
    parts = [quarantine(part, SCHEMA, DAY, "day", NOW)[1] for part in bad.partition_by("bucket")]
    assert pl.concat(parts).sort(pl.all()).equals(whole.sort(pl.all()))
    assert whole.height == 3 + 2
