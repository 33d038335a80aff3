"""Every kind of bad input is named with table, partition and count; good data passes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from features.delta.table import Table
from features.errors import ConfigError
from features.schema import SECOND, Aggregate, Feature, partition_bounds
from features.validation import (
    PartitionValidation,
    ValidationRules,
    check_tables,
    columns_read,
    quarantine,
    validate_partitions,
)
from tests.features.worlds import DAYS, SCHEMA, write_world

DAY = DAYS[1]
NOW = partition_bounds(DAYS[-1], "day")[1]
RULES = ValidationRules(max_outside_vocabulary=1)  # the world has devices that no vocabulary lists


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


def on_day(value: pl.Expr, column: str) -> pl.Expr:
    return pl.when(pl.col("dt") == DAY).then(value).otherwise(pl.col(column)).alias(column)


@pytest.fixture
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
    "ts_outside": (
        lambda f: f.with_columns(
            (pl.col("ts") - pl.when(pl.col("dt") == DAY).then(86_400 * SECOND).otherwise(0)).alias("ts")
        ),
        0,
    ),
    "ts_in_seconds": (lambda f: f.with_columns(on_day(pl.col("ts") // SECOND, "ts")), 0),
    "ts_in_milliseconds": (lambda f: f.with_columns(on_day(pl.col("ts") // 1_000, "ts")), 0),
    "ts_in_nanoseconds": (lambda f: f.with_columns(on_day(pl.col("ts") * 1_000, "ts")), 0),
    **{
        f"null_{name}": (
            lambda f, name=name: f.with_columns(
                pl.when(first_rows(f, 2)).then(None).otherwise(pl.col(name)).alias(name)
            ),
            2,
        )
        for name in ("request_id", "user_id", "item_id", "ts")
    },
    "duplicate_request_id": (
        lambda f: f.with_columns(
            pl.when(pl.col("dt") == DAY).then(pl.lit("same")).otherwise(pl.col("request_id")).alias("request_id")
        ),
        1,
    ),
    "negative_position": (
        lambda f: f.with_columns(pl.when(first_rows(f, 2)).then(-1).otherwise("position").alias("position")),
        2,
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
    counted = f"{count or rows:,} of {rows:,} rows"
    if rule == "duplicate_request_id":
        counted = f"{count:,} request ids ({rows:,} rows)"
    assert finding.message.startswith(f"table impressions, partition {DAY}: {counted} ")


def test_a_timestamp_in_the_future_is_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    opening = partition_bounds(DAY, "day")[0]
    result = gate(tmp_path, tables, now=opening)
    late = tables["impressions"].scan([DAY]).filter(pl.col("ts") > opening).collect().height
    assert {(f.table, f.count) for f in result.failures if f.rule == "ts_future"} >= {("impressions", late)}


def test_an_empty_partition_is_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    changed = rewrite(tables["impressions"], lambda frame: frame.filter(pl.col("dt") != DAY))
    result = gate(tmp_path, {**tables, "impressions": changed})
    assert [finding.message for finding in result.failures] == [
        f"table impressions, partition {DAY}: 0 rows are fewer than validation.min_rows (1); "
        "write the partition whole, or choose other partitions by `start`"
    ]


@pytest.mark.parametrize("column", ["event_id", "user_id", "ts"])
def test_events_without_a_key_are_named(tmp_path: Path, tables: dict[str, Table], column: str) -> None:
    changed = rewrite(
        tables["events"],
        lambda f: f.with_columns(pl.when(first_rows(f, 2)).then(None).otherwise(pl.col(column)).alias(column)),
    )
    result = gate(tmp_path, {**tables, "events": changed})
    assert (f"null_{column}", "events", 2) in {(f.rule, f.table, f.count) for f in result.failures}


def test_a_repeated_profile_is_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    users = rewrite(tables["users"], lambda f: pl.concat([f, f.head(1)]))
    result = gate(tmp_path, {**tables, "users": users})
    assert [(f.table, f.rule, f.count) for f in result.failures] == [("users", "duplicate_snapshot", 1)]


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
        ("impressions", "mistyped_column_click"),
        ("events", "missing_column_seconds"),
        ("users", "missing_table"),
        ("items", "mistyped_column_colors"),
    }
    assert any("column seconds is missing" in finding.message for finding in findings)
    result = gate(tmp_path, wrong)
    assert result.failures == tuple(findings)
    assert result.quarantined == 0
    assert not check_tables({**tables, "not_used": Table("not_used", str(tmp_path / "nowhere"))}, SCHEMA)


@pytest.mark.parametrize(
    ("column", "kind", "wanted"),
    [
        ("ts", pl.String, "an integer, a timestamp or a date"),
        ("click", pl.Float64, "an integer or a boolean"),
        ("device", pl.Float64, "a text or an integer"),
    ],
)
def test_a_wrong_type_says_which_and_what_is_wanted(
    tmp_path: Path, tables: dict[str, Table], column: str, kind: pl.DataType, wanted: str
) -> None:
    changed = rewrite(tables["impressions"], lambda f: f.with_columns(pl.lit(None, kind).alias(column)))
    (finding,) = check_tables({**tables, "impressions": changed}, SCHEMA)
    assert finding.rule == f"mistyped_column_{column}"
    assert f"column {column} has type" in finding.message
    assert wanted in finding.message


@pytest.mark.parametrize("condition", ["acton = 'watch'", "action = = 1"])
def test_a_condition_that_cannot_be_evaluated_is_named(tables: dict[str, Table], condition: str) -> None:
    watched = SCHEMA.sequences[0].model_copy(update={"where": condition})
    schema = SCHEMA.model_copy(update={"sequences": (watched,)})
    (finding,) = check_tables(tables, schema)
    assert (finding.table, finding.rule) == ("events", "condition_watched")
    assert condition in finding.message


def test_tolerated_rows_are_set_aside_and_counted(tmp_path: Path, tables: dict[str, Table]) -> None:
    change, count = BAD_IMPRESSIONS["label_click"]
    changed = rewrite(tables["impressions"], change)
    result = gate(tmp_path, {**tables, "impressions": changed}, RULES.model_copy(update={"max_quarantined": 0.9}))
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
    _, whole = quarantine(bad, SCHEMA, [DAY], "day", NOW)
    parts = [quarantine(part, SCHEMA, [DAY], "day", NOW)[1] for part in bad.partition_by("bucket")]
    assert pl.concat(parts).sort(pl.all()).equals(whole.sort(pl.all()))
    assert whole.height == 3 + 2


def test_rows_without_a_user_change_nothing_in_other_buckets(tables: dict[str, Table]) -> None:
    """The same candidate once without a user, first, and once with: they lie in different buckets."""
    good = tables["impressions"].scan([DAY]).collect()
    missing = good.head(1).with_columns(pl.lit(None, pl.Int64).alias("user_id"), pl.lit("0").alias("bucket"))
    good = good.with_columns(pl.lit("1").alias("bucket"))
    kept, rejected = quarantine(pl.concat([missing, good]), SCHEMA, [DAY], "day", NOW)
    assert rejected["rule"].to_list() == ["null_user_id"]
    assert kept.equals(good)


def test_events_may_be_missing_for_a_partition(tmp_path: Path, tables: dict[str, Table]) -> None:
    changed = rewrite(tables["events"], lambda frame: frame.filter(pl.col("dt") != DAY))
    result = gate(tmp_path, {**tables, "events": changed})
    assert result.passed
    assert result.rows["events"] == 0


def test_profiles_in_seconds_are_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    changed = rewrite(tables["users"], lambda f: f.with_columns(pl.lit(NOW // SECOND, pl.Int64).alias("updated_at")))
    rows = changed.scan().collect().height
    result = gate(tmp_path, {**tables, "users": changed})
    assert ("users", "updated_at_in_seconds", rows) in {(f.table, f.rule, f.count) for f in result.failures}


def test_a_limit_on_nulls_names_the_feature(tmp_path: Path, tables: dict[str, Table]) -> None:
    nulls = tables["impressions"].scan([DAY]).filter(pl.col("device").is_null()).collect().height
    assert nulls
    result = gate(tmp_path, tables, ValidationRules(max_null_share={"device": 0.0}))
    assert [(finding.rule, finding.count) for finding in result.failures] == [("null_share_device", nulls)]
    assert gate(tmp_path, tables, ValidationRules(max_null_share={"device": 1.0})).passed
    with pytest.raises(ConfigError, match="devise"):
        gate(tmp_path, tables, ValidationRules(max_null_share={"devise": 0.0}))


def test_judging_again_replaces_the_results_and_commits_only_changes(tmp_path: Path, tables: dict[str, Table]) -> None:
    changed = {**tables, "impressions": rewrite(tables["impressions"], BAD_IMPRESSIONS["label_click"][0])}
    gate(tmp_path, changed)
    before = sorted(path.relative_to(tmp_path) for path in (tmp_path / "gx").rglob("*.json"))
    gate(tmp_path, changed)
    assert sorted(path.relative_to(tmp_path) for path in (tmp_path / "gx").rglob("*.json")) == before


def test_a_quarantine_that_was_not_committed_is_not_seen(
    tmp_path: Path, tables: dict[str, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {**tables, "impressions": rewrite(tables["impressions"], BAD_IMPRESSIONS["label_click"][0])}
    written = Table("quarantine", str(tmp_path / "quarantine"))
    with monkeypatch.context() as patch:
        patch.setattr("features.validation.gate.replace_partition", lambda *_: pytest.fail("killed before the commit"))
        with pytest.raises(pytest.fail.Exception):
            gate(tmp_path, changed)
    assert list((tmp_path / "quarantine").rglob("*.parquet"))
    assert not written.exists()
    assert gate(tmp_path, changed).quarantined == written.scan([DAY]).collect().height == 3


def test_a_bad_row_is_kept_whole(tmp_path: Path, tables: dict[str, Table]) -> None:
    change, _ = BAD_IMPRESSIONS["label_click"]
    changed = rewrite(tables["impressions"], lambda f: change(f).with_columns(pl.lit(b"\xff").alias("blob")))
    gate(tmp_path, {**tables, "impressions": changed})
    rows = Table("quarantine", str(tmp_path / "quarantine")).scan([DAY]).collect()["row"].to_list()
    assert {json.loads(row)["click"] for row in rows} == {2}
    assert {json.loads(row)["blob"] for row in rows} == {"/w=="}


def test_the_cli_config_does_not_import_great_expectations() -> None:
    code = "import sys, pipeline.config; sys.exit('great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_condition_of_an_aggregate_reads_its_columns_of_impressions() -> None:
    counted = Feature(name="seen_on_tv", side="item", aggregate=Aggregate(where="surface = 'tv'"))
    schema = SCHEMA.model_copy(update={"features": (*SCHEMA.features, counted)})
    assert "surface" in columns_read("impressions", schema) - columns_read("impressions", SCHEMA)
