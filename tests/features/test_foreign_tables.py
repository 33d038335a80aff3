"""The same log as other people write it: other names, types, partitions and paths give the same samples, or an error
that says what is wrong."""

from __future__ import annotations

import json
import shutil
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from features.builder.states import SAMPLES, BuildSettings
from features.delta.columns import partition_column
from features.delta.damage import check_files
from features.delta.table import Table
from features.delta.write import is_written_for
from features.encoding import encode, hash_id
from features.errors import DataGateError, UnreadableError
from features.schema import (
    SECOND,
    Aggregate,
    EventField,
    Feature,
    FieldSpec,
    Grain,
    Schema,
    Sequence,
    Task,
    partition_bounds,
    partition_of,
)
from features.validation import PartitionValidation, ValidationRules, check_tables, validate_partitions
from features.validation.rules import event_rules
from tests.features.worlds import DAY, DAYS, SCHEMA, fold_all, settings, write_world

OPENING = partition_bounds(DAYS[0], "day")[0]
NOW = partition_bounds(DAYS[-1], "day")[1]


def samples(one: BuildSettings) -> list[dict[str, Any]]:
    fold_all(one, DAYS, [])
    return Table(SAMPLES, one.table_root(SAMPLES)).scan().collect().drop("bucket").sort("dt", "user_id").to_dicts()


def gate(root: Path, tables: dict[str, Table], schema: Schema = SCHEMA, **rules: Any) -> list[PartitionValidation]:
    limits = ValidationRules.model_validate({"max_outside_vocabulary": 1, "min_matched_share": 0, **rules})
    days = tables["impressions"].partitions()
    return validate_partitions(
        tables, schema, days, "day", limits, root / "gx", str(root / "quarantine"), NOW, lambda _: None
    )[0]


def written(folder: Path, name: str, frame: pl.DataFrame, by: list[str] | None = None, **options: Any) -> Table:
    frame.write_delta(str(folder / name), delta_write_options={"partition_by": by} if by else {})
    return Table(name, str(folder / name), **options)


# --- partitions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grain"), [("2026-01-05T8", "hour"), ("2026-1-5", "day"), ("2026-01-5", "week"), (" 2026-01-05", "day")]
)
def test_a_partition_is_called_exactly_what_its_grain_writes(name: str, grain: Grain) -> None:
    article = "an" if grain == "hour" else "a"
    with pytest.raises(ValueError, match=f"is not {article} {grain}: it is written like"):
        partition_bounds(name, grain)


def test_the_last_day_of_all_is_a_partition_and_a_time_beyond_is_named(tmp_path: Path) -> None:
    opening, close = partition_bounds("9999-12-31", "day")
    assert close - opening == DAY
    for ts in (close, -(2**60), 2**62):
        rows = pl.DataFrame({"user_id": ["a"], "ts": [ts]})
        table = written(tmp_path, f"at {ts}", rows, grain="day")
        with pytest.raises(DataGateError, match=r"table .* a ts of file .* is no time of the years 1 to 9999"):
            table.partitions()


@pytest.mark.parametrize("grain", ["hour", "day", "week"])
def test_partitions_cut_from_a_column_are_those_of_each_time(grain: Grain) -> None:
    times = [0, 1, OPENING - 1, OPENING, OPENING + 3_600 * SECOND, OPENING + 6 * DAY, OPENING + 7 * DAY - 1]
    cut = pl.DataFrame({"ts": times}).select(partition_column(pl.col("ts"), grain)).to_series()
    assert cut.to_list() == [partition_of(ts, grain) for ts in times]


@pytest.mark.parametrize("stamped", [False, True])
@pytest.mark.parametrize("partitioned", [None, "ds", "item_id"])
def test_logs_partitioned_otherwise_or_not_at_all_give_the_same_samples(
    tmp_path: Path, partitioned: str | None, stamped: bool
) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    other = dict(tables)
    for role in ("impressions", "events"):
        rows = tables[role].scan().collect().drop("bucket").rename({"dt": "ds"})
        rows = rows.with_columns(pl.col("ds").str.to_date()) if partitioned == "ds" else rows.drop("ds")
        if stamped:
            rows = rows.with_columns(pl.from_epoch("ts", time_unit="us").dt.replace_time_zone("UTC"))
        table = written(tmp_path, role, rows, [partitioned] if partitioned else None, grain="day")
        other[role] = Table(role, table.uri, grain="day", partition="ds" if partitioned == "ds" else None)
        assert other[role].partitions() == tables[role].partitions()
        assert not check_tables(other, SCHEMA)
    assert samples(settings(other, tmp_path / "other")) == samples(settings(tables, tmp_path / "one"))


def test_a_partition_column_takes_the_place_of_a_dt_of_the_tables_own(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    rows = tables["events"].scan().collect().drop("bucket")
    renamed = rows.with_columns(pl.col("dt").alias("ds"), pl.lit("a draft").alias("dt"))
    uri = written(tmp_path, "events", renamed, ["ds"]).uri
    table = Table("events", uri, {"draft": "dt"}, grain="day", partition="ds")
    assert table.scan([DAYS[0]]).collect()["dt"].unique().to_list() == [DAYS[0]]
    assert table.scan([DAYS[0]]).collect()["draft"].unique().to_list() == ["a draft"]
    ours = samples(settings({**tables, "events": table}, tmp_path / "out"))
    assert ours == samples(settings(tables, tmp_path / "one"))
    hidden = Table("events", uri, grain="day", partition="ds")
    schema = SCHEMA.model_copy(update={"sequences": (with_field("written"),)})
    (finding,) = check_tables({**tables, "events": hidden}, schema)
    assert "its own column dt is hidden, as dt is the partition, the column ds" in finding.message


def test_rows_of_no_partition_and_columns_that_are_none_are_named(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    rows = tables["events"].scan().collect().drop("dt", "bucket")
    lost = rows.with_columns(pl.when(pl.int_range(pl.len()) > 0).then("ts").alias("ts"))
    for name, frame, column, text in (
        ("lost", lost, None, "has rows without a ts, which belong to no partition"),
        ("by", rows, "ds", "is not partitioned by ds, but by nothing"),
    ):
        uri = written(tmp_path, name, frame).uri
        (finding,) = check_tables({**tables, "events": Table("events", uri, grain="day", partition=column)}, SCHEMA)
        assert text in finding.message


@pytest.mark.parametrize(
    ("unit", "ts"),
    [
        ("seconds", (pl.col("ts") // SECOND).cast(pl.Int32)),
        ("milliseconds", pl.col("ts") // 1_000),
        ("nanoseconds", pl.col("ts") * 1_000),
    ],
)
@pytest.mark.parametrize("by_statistics", [True, False])
def test_times_in_another_unit_are_named_where_partitions_are_cut_from_them(
    tmp_path: Path, unit: str, ts: pl.Expr, by_statistics: bool
) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    before = (
        [] if by_statistics else [pl.lit(number).alias(f"c{number}") for number in range(40)]
    )  # Delta counts so many
    rows = tables["events"].scan().collect().drop("dt", "bucket").with_columns(ts.alias("ts")).select(*before, pl.all())
    cut = {**tables, "events": written(tmp_path, "events", rows, grain="day")}
    messages = [finding.message for finding in check_tables(cut, SCHEMA)]
    if by_statistics:
        assert ["has a wrong unit: ts looks like" in one and unit in one for one in messages] == [True]
        return
    rules = event_rules("events", SCHEMA, "1970-01-21", "day", ValidationRules(), NOW)
    counts = cut["events"].scan().select(rule.metric.alias(rule.name) for rule in rules).collect()
    assert not messages
    assert counts[f"ts_in_{unit}"].item() == rows.height


def test_a_time_of_any_integer_type_is_read(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    first = tables["users"].scan().collect().filter(pl.col("updated_at") == 0)
    narrow = first.with_columns(pl.col("updated_at").cast(pl.Int8))
    one, other = (
        {**tables, "users": written(tmp_path, name, frame)} for name, frame in (("wide", first), ("narrow", narrow))
    )
    assert samples(settings(other, tmp_path / "other")) == samples(settings(one, tmp_path / "one"))


# --- fingerprints -------------------------------------------------------------------------------------


def log(path: Path, *days: str, by: list[str] | None = None) -> Table:
    """A log with a commit per day; the days' names come again when rows are late."""
    for day in days:
        frame = pl.DataFrame({"ts": [partition_bounds(day, "day")[0]], "dt": [day]})
        frame.write_delta(str(path), mode="append", delta_write_options={"partition_by": by} if by else {})
    return Table("events", str(path), grain="day")


def clean_up(path: Path) -> None:
    """Checkpoint the newest version and remove the commits before it."""
    table = DeltaTable(str(path))
    table.create_checkpoint()
    for commit in sorted((path / "_delta_log").glob("*.json"))[:-1]:
        commit.unlink()


@pytest.mark.parametrize("by", [["dt"], None])
def test_late_rows_whose_commit_was_cleaned_up_change_their_partition_alone(
    tmp_path: Path, by: list[str] | None
) -> None:
    table, cache = log(tmp_path / "log", *DAYS, by=by), dict[str, Any]()
    before = table.fingerprints(cache)
    log(tmp_path / "log", DAYS[0], DAYS[2], by=by)
    clean_up(tmp_path / "log")
    after = table.fingerprints(cache)
    assert [day for day in DAYS if after[day] != before[day]] == [DAYS[0], DAYS[2]]
    assert table.fingerprints(cache) == after
    log(tmp_path / "log", DAYS[1], by=by)
    assert [day for day in DAYS if table.fingerprints(cache)[day] != after[day]] == [DAYS[1]]


@pytest.mark.parametrize("by", [["dt"], None])
def test_a_remove_that_does_not_say_where_changes_what_it_removed(tmp_path: Path, by: list[str] | None) -> None:
    path = tmp_path / "log"
    table, cache = log(path, *DAYS, DAYS[1], by=by), dict[str, Any]()
    before = table.fingerprints(cache)
    actions = pl.DataFrame(pa.table(table.delta().get_add_actions(flatten=True)))
    gone = actions.filter(pl.col("min.ts" if by is None else "partition.dt").cast(pl.String) == (
        str(partition_bounds(DAYS[1], "day")[0]) if by is None else DAYS[1]
    ))["path"][0]  # fmt: skip
    removed = {"remove": {"path": gone, "deletionTimestamp": 0, "dataChange": True}}
    version = table.delta().version() + 1
    (path / "_delta_log" / f"{version:020d}.json").write_text(json.dumps(removed))
    after = table.fingerprints(cache)
    assert [day for day in DAYS if after[day] != before[day]] == [DAYS[1]]
    # with nothing remembered nothing can be ruled out
    assert all(table.fingerprints()[day] != before[day] for day in DAYS)


@pytest.mark.parametrize("by", [["dt"], None])
def test_compaction_changes_no_fingerprint(tmp_path: Path, by: list[str] | None) -> None:
    table, cache = log(tmp_path / "log", *DAYS, DAYS[0], by=by), dict[str, Any]()
    before = table.fingerprints(cache)
    table.delta().optimize.compact()
    assert table.fingerprints(cache) == before == table.fingerprints()


def test_a_log_that_was_restored_and_went_another_way_is_looked_at_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    table, cache = log(path, DAYS[0], DAYS[1]), dict[str, Any]()
    before = table.fingerprints(cache)
    (path / "_delta_log" / f"{1:020d}.json").unlink()
    log(path, DAYS[0])
    assert table.fingerprints(cache)[DAYS[0]] != before[DAYS[0]]


# --- columns ------------------------------------------------------------------------------------------


def test_what_a_name_is_mapped_from_decides_and_a_missing_target_is_an_error(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    rows = tables["events"].scan().collect()
    shifted = rows.rename({"ts": "shown"}).with_columns((pl.col("shown") - DAY).alias("ts"))
    both = written(tmp_path, "both", shifted, ["dt", "bucket"])
    mapped = {**tables, "events": Table("events", both.uri, {"ts": "shown", "logged_at": "ts"})}
    assert not check_tables(mapped, SCHEMA)
    assert mapped["events"].scan().collect().select(rows.columns).sort("event_id").equals(rows.sort("event_id"))
    assert mapped["events"].scan().collect()["logged_at"].sort().equals(shifted["ts"].sort().alias("logged_at"))
    hidden = Table("events", both.uri, {"ts": "shown"})
    assert "logged_at" not in hidden.scan().collect_schema()
    for key, target in (("ts", "seen_at"), ("user_id", "member"), ("not_read", "nowhere")):
        wrong = Table("events", tables["events"].uri, {key: target})
        (finding,) = check_tables({**tables, "events": wrong}, SCHEMA)
        assert f"column {target} is missing, which {key} is mapped to" in finding.message
    schema = SCHEMA.model_copy(update={"sequences": (with_field("ts_raw"),)})
    (finding,) = check_tables({**tables, "events": Table("events", both.uri, {"ts": "shown"})}, schema)
    assert "its own column ts is hidden, as ts is mapped to shown" in finding.message


def with_field(name: str, **options: Any) -> Sequence:
    return Sequence(name="watched", events="events", length=3, fields=(EventField(name=name, **options),))


def test_a_profile_without_updated_at_is_valid_from_the_beginning(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    first = tables["users"].scan().collect().filter(pl.col("updated_at") == 0)
    dated = written(tmp_path, "users", first)
    bare = written(tmp_path, "bare", first.drop("updated_at"))
    made = Table("users", bare.uri, makes=("updated_at",))
    assert not check_tables({**tables, "users": made}, SCHEMA)
    one, other = ({**tables, "users": users} for users in (dated, made))
    assert samples(settings(other, tmp_path / "other")) == samples(settings(one, tmp_path / "one"))


def test_without_profile_tables_ids_are_known_once_the_log_has_shown_them(tmp_path: Path) -> None:
    schema = Schema(
        features=(Feature(name="user_id", side="user"), Feature(name="item_id", side="item")),
        sequences=(with_field("item_id"),),
        tasks=SCHEMA.tasks,
    )
    tables = write_world(tmp_path / "own", seed=4)
    bare = {role: tables[role] for role in ("impressions", "events")}
    assert not check_tables(bare, schema)
    assert all(result.passed for result in gate(tmp_path, bare, schema))
    rows = samples(settings(bare, tmp_path / "out", schema=schema))
    known = {(row["dt"], request["user_known"]) for row in rows for request in row["requests"]}
    assert (DAYS[0], True) not in known
    assert (DAYS[-1], True) in known


def test_an_event_without_an_id_is_identified_by_its_row(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    rows = tables["events"].scan().collect().drop("event_id").unique()
    again = pl.concat([rows, rows.head(3)])
    made = [
        Table("events", written(tmp_path, name, frame, ["dt", "bucket"]).uri, makes=("event_id",))
        for name, frame in (("once", rows), ("twice", again.select(reversed(rows.columns))))
    ]
    assert not check_tables({**tables, "events": made[0]}, SCHEMA)
    once, twice = (samples(settings({**tables, "events": one}, tmp_path / f"out-{one.uri[-5:]}")) for one in made)
    assert once == twice
    assert sum(len(row["watched__ts"]) for row in once) > 0


# --- values -------------------------------------------------------------------------------------------


def test_a_number_is_finite_or_missing() -> None:
    values = pl.DataFrame({"x": [1.0, float("inf"), float("-inf"), float("nan"), 1e39, None]})
    plain, log_scaled = (FieldSpec(name="x", kind="number", scale=scale) for scale in ("linear", "log"))
    assert values.select(encode(plain, pl.col("x")))["x"].to_list() == [1.0, None, None, None, None, None]
    below = pl.DataFrame({"x": [-1.0, -2.0, 0.0, 1e39]})  # too large on any scale
    assert below.select(encode(log_scaled, pl.col("x")))["x"].to_list() == [None, None, 0.0, None]


def test_numbers_that_are_not_finite_are_counted_and_read_as_missing(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    profiles = tables["users"].scan().collect().with_columns(pl.col("age").cast(pl.Float64))
    wild = profiles.with_columns(pl.when(pl.col("user_id") == 2).then(float("inf")).otherwise("age").alias("age"))
    blank = profiles.with_columns(pl.when(pl.col("user_id") == 2).then(None).otherwise("age").alias("age"))
    wild_users, blank_users = written(tmp_path, "users", wild), written(tmp_path, "blank", blank)
    results = gate(tmp_path, {**tables, "users": wild_users})
    assert all(result.passed for result in results)
    assert "1 of 4 rows hold no finite number in age" in results[0].findings[0].message
    one, other = ({**tables, "users": users} for users in (blank_users, wild_users))
    assert samples(settings(other, tmp_path / "other")) == samples(settings(one, tmp_path / "one"))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0, 1e39])
def test_a_weight_that_is_negative_or_not_finite_is_set_aside(tmp_path: Path, weight: float) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    rows = tables["impressions"].scan().collect()
    bad = rows.with_columns(pl.when(pl.int_range(pl.len()) == 0).then(weight).otherwise(2.0).alias("weight"))
    changed = {**tables, "impressions": written(tmp_path, "impressions", bad, ["dt", "bucket"])}
    failed = [result for result in gate(tmp_path, changed) if not result.passed]
    assert [finding.message for result in failed for finding in result.failures] == [
        f"table impressions, partition {failed[0].partition}: 1 of {failed[0].rows['impressions']} rows have a weight "
        "that is negative or not finite; correct them, or set them aside by validation.max_quarantined"
    ]
    assert sum(result.quarantined for result in gate(tmp_path, changed, max_quarantined=0.5)) == 1


def test_ids_that_never_meet_stop_the_log_with_examples_of_both_sides(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    for role, key in (("users", "user_id"), ("items", "item_id"), ("events", "user_id")):
        rows = tables[role].scan().collect()
        padded = rows.with_columns(pl.format("00{}", key).alias(key))
        other = written(tmp_path, role, padded, ["dt", "bucket"] if role == "events" else None)
        first = gate(tmp_path, {**tables, role: other}, min_matched_share=0.01)[0]
        assert not first.passed
        finding = first.failures[0]
        assert f"no {key} in common with table" in finding.message
        assert "'000'" in finding.message or "'001'" in finding.message
        assert "'0'" in finding.message
        assert gate(tmp_path, {**tables, role: other})[0].passed


def test_items_that_nobody_was_shown_under_that_id_stop_the_log(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    rows = tables["events"].scan().collect().with_columns(pl.format("i{}", "item_id").alias("item_id"))
    changed = {**tables, "events": written(tmp_path, "events", rows, ["dt", "bucket"])}
    first = gate(tmp_path, changed, SCHEMA.model_copy(update={"sequences": SCHEMA.sequences[1:]}), **MATCHED)[0]
    assert ["no item_id in common with table impressions" in one.message for one in first.failures] == [True]
    # where nothing is made of both, they may be of two worlds
    own = with_field("item_id", table="done", buckets=7)
    assert gate(tmp_path, changed, SCHEMA.model_copy(update={"sequences": (own,)}), **MATCHED)[0].passed


def test_feedback_on_requests_that_nobody_made_stops_the_log(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    schema = SCHEMA.model_copy(update={"tasks": (*SCHEMA.tasks, Task(name="bought", attribution_window_seconds=9.0))})
    shown = tables["impressions"].scan().collect()
    given = shown.select("request_id", "item_id", "ts", "dt", label=pl.lit("bought"), value=pl.lit(1))
    strange = given.with_columns(pl.format("R-{}", "request_id").alias("request_id"))
    for name, rows, passes in (("known", given, True), ("strange", strange, False)):
        result = gate(tmp_path, {**tables, "feedback": written(tmp_path, name, rows, ["dt"])}, schema, **MATCHED)[0]
        assert result.passed == passes
    assert "table feedback has (almost) no request_id in common with table impressions" in result.failures[0].message


def test_a_few_ids_that_are_strangers_by_chance_stop_nothing(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    rows = tables["events"].scan().collect()
    alone = rows.filter((pl.col("dt") != DAYS[2]) | (pl.col("user_id") == 0))
    shown = tables["impressions"].scan().collect().filter((pl.col("dt") != DAYS[2]) | (pl.col("user_id") != 0))
    tables["events"] = written(tmp_path, "events", alone, ["dt", "bucket"], grain="day")
    tables["impressions"] = written(tmp_path, "impressions", shown, ["dt", "bucket"], grain="day")
    limits, root = ValidationRules(max_outside_vocabulary=1), str(tmp_path / "quarantine")
    newest = validate_partitions(tables, SCHEMA, DAYS[2:], "day", limits, tmp_path / "gx", root, NOW, lambda _: None)
    assert [result.passed for result in newest[0]] == [True]


MATCHED = {"min_matched_share": 0.01}


def test_values_outside_a_vocabulary_are_said_above_a_threshold(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=4)
    said = [
        finding.message for result in gate(tmp_path, tables, max_outside_vocabulary=0.05) for finding in result.findings
    ]
    assert any("of the values of device are outside the vocabulary of device" in one for one in said)
    assert any("(for example watch)" in one for one in said)
    # a column may be a feature and side information at once
    shade = Feature(name="shade", side="item", kind="category", vocabulary=("red",))
    both = SCHEMA.model_copy(update={"features": (*SCHEMA.features, shade)})
    messages = [one.message for one in gate(tmp_path, tables, both, max_outside_vocabulary=0.05)[0].findings]
    assert sum("outside the vocabulary of shade" in one for one in messages) == 1
    assert all(result.passed for result in gate(tmp_path, tables, max_outside_vocabulary=0.05))


# --- types --------------------------------------------------------------------------------------------

TYPED = Schema(
    features=(
        Feature(name="member", side="user"),
        Feature(name="balance", side="user", kind="number"),
        Feature(name="flags", side="item", multi=True),
        Feature(name="released", side="item"),
        Feature(name="price", side="context", kind="number"),
        Feature(name="slot", side="context"),
        Feature(name="spent", side="user", aggregate=Aggregate(of="events", function="sum", column="paid")),
    ),
    sequences=(Sequence(name="watched", events="events", length=3, fields=(EventField(name="day"),)),),
    tasks=(Task(name="click"),),
)


def test_decimals_are_numbers_and_dates_ids_by_their_iso_text(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    day, money = date(2026, 1, 5), pl.Decimal(10, 2)
    typed = {
        "users": tables["users"].scan().collect().with_columns(
            pl.col("user_id").cast(pl.Decimal(10, 0)).alias("member"),
            pl.lit(Decimal("12.50")).cast(money).alias("balance"),
            pl.from_epoch("updated_at", time_unit="us").cast(pl.Date).alias("updated_at"),
        ),
        "items": tables["items"].scan().collect().with_columns(
            pl.lit([True, False]).alias("flags"), pl.lit(day).alias("released")
        ),
        "impressions": tables["impressions"].scan().collect().with_columns(
            pl.col("click", "position").cast(pl.Decimal(3, 0)),
            pl.lit(Decimal("1.25")).cast(money).alias("price"),
            pl.lit(day).alias("slot"),
        ),
        "events": tables["events"].scan().collect().with_columns(
            pl.lit(Decimal("0.50")).cast(money).alias("paid"), pl.lit(day).alias("day")
        ),
    }  # fmt: skip
    own = {
        role: written(tmp_path, role, frame, ["dt", "bucket"] if "dt" in frame.columns else None)
        for role, frame in typed.items()
    }
    assert not check_tables(own, TYPED)
    assert all(result.passed for result in gate(tmp_path, own, TYPED))
    rows = samples(settings(own, tmp_path / "out", schema=TYPED))
    requests = [(row["user_id"], request) for row in rows for request in row["requests"] if request["user_known"]]
    user, request = next(one for one in requests if one[1]["feature__balance"] is not None)
    assert request["feature__member"] == hash_id(user)
    assert request["feature__balance"] == 12.5
    assert request["feature__price"] == 1.25
    assert request["feature__slot"] == hash_id("2026-01-05")
    item = next(one for one in request["candidates"] if one["feature__released"])
    assert item["feature__released"] == hash_id("2026-01-05")
    assert item["feature__flags"] == [hash_id("true"), hash_id("false")]
    assert {code for row in rows for code in row["watched__day"]} == {hash_id("2026-01-05")}
    assert any(request["feature__spent"] == pytest.approx(0.5, abs=1) for _, request in requests)


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ("seconds + 1", "gives float64, not true or false"),
        ("user_id > 5", "is not valid SQL"),
        ("action = ", "is not valid SQL"),
        ("kind = 'buy'", "reads kind, but there are only"),
        ("bucket = '0'", "reads bucket, but there are only"),
        ("MAX(seconds) > 1", "looks at other rows"),
        ("seconds > AVG(seconds)", "looks at other rows"),
        ("COUNT(*) > 1", "looks at other rows"),
        ("SUM(seconds) OVER (PARTITION BY user_id) > 1", "looks at other rows"),
        ("RANK() OVER (ORDER BY ts) > 1", "looks at other rows"),
    ],
)
def test_a_condition_is_checked_for_its_type(tmp_path: Path, condition: str, problem: str) -> None:
    tables = write_world(tmp_path, seed=4)
    sequence = with_field("item_id").model_copy(update={"where": condition})
    counted = Feature(name="counted", side="user", aggregate=Aggregate(of="events", where=condition))
    for schema, what in (
        (SCHEMA.model_copy(update={"sequences": (sequence,)}), "sequence watched"),
        (SCHEMA.model_copy(update={"features": (*SCHEMA.features, counted)}), "feature counted"),
    ):
        (finding,) = check_tables(tables, schema)
        assert problem in finding.message
        assert f"of {what}" in finding.message


@pytest.mark.parametrize(
    "condition",
    [
        "TRUE",
        "action = 'max(1)' OR action LIKE 'w%' OR action IN ('buy', 'watch')",
        "ROUND(COALESCE(seconds, 0)) BETWEEN 1 AND 2 AND LENGTH(action) > 2",
        "CASE WHEN seconds > 1 THEN GREATEST(seconds, 2) > 1 ELSE FALSE END",
        "LOWER(SUBSTR(action, 1, 2)) = 'wa' AND NOT user_id IN ('1') AND seconds IS NOT NULL",
    ],
)
def test_a_condition_on_each_row_by_itself_passes(tmp_path: Path, condition: str) -> None:
    tables = write_world(tmp_path, seed=4)
    sequence = with_field("item_id").model_copy(update={"where": condition})
    assert not check_tables(tables, SCHEMA.model_copy(update={"sequences": (sequence,)}))


def test_a_condition_that_fails_on_values_stops_their_partition(tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=4)
    for condition, passes in (("CAST(user_id AS BIGINT) > 1", True), ("CAST(action AS BIGINT) > 1", False)):
        sequence = with_field("item_id").model_copy(update={"where": condition})
        schema = SCHEMA.model_copy(update={"sequences": (sequence,)})
        result = gate(tmp_path, tables, schema)[0]
        assert result.passed == passes
        messages = [finding.message for finding in result.failures]
        assert passes or ("TRY_CAST" in messages[0] and f"partition {DAYS[0]}" in messages[0])


def test_a_number_is_no_date_and_an_id_no_fraction(tmp_path: Path) -> None:
    tables = write_world(tmp_path / "own", seed=4)
    users = tables["users"].scan().collect()
    for column, value, wanted in (
        ("age", pl.lit(date(2026, 1, 5)), "but must be a number"),
        ("user_id", pl.col("user_id").cast(pl.Decimal(10, 2)), "but must be a text or an integer"),
    ):
        changed = written(tmp_path, column, users.with_columns(value.alias(column)))
        (finding,) = check_tables({**tables, "users": Table("users", changed.uri)}, SCHEMA)
        assert wanted in finding.message


# --- paths and Delta's features -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", ["My Projects", "größe", "a#b", "what?", "100%", "env=prod", "a&b{c}", "[v2] x^y|z*"]
)
def test_tables_lie_below_any_path(tmp_path: Path, folder: str) -> None:
    plain = write_world(tmp_path / "plain", seed=4)
    shutil.copytree(tmp_path / "plain", tmp_path / folder / "own")
    tables = {name: Table(name, str(tmp_path / folder / "own" / name)) for name in plain}
    assert all(result.passed for result in gate(tmp_path / folder, tables))
    for table in tables.values():
        check_files(table, whole=True)
    ours = samples(settings(tables, tmp_path / folder / "out"))
    assert ours == samples(settings(plain, tmp_path / "plain-out"))
    assert tables["events"].fingerprints().keys() == plain["events"].fingerprints().keys()


def test_partition_values_of_any_text_are_read(tmp_path: Path) -> None:
    rows = pl.DataFrame({"dt": ["2026-01-05"] * 3, "country": ["New York", "ö/ä", "50%"], "ts": [1, 2, 3]})
    table = written(tmp_path, "events", rows, ["dt", "country"])
    assert table.scan(["2026-01-05"]).collect().sort("ts")["country"].to_list() == rows["country"].to_list()
    check_files(table, ["2026-01-05"], whole=True)


def test_a_delta_feature_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "t"), pa.table({"x": [1]}))
    commit = tmp_path / "t" / "_delta_log" / f"{0:020d}.json"
    lines = [json.loads(line) for line in commit.read_text().splitlines()]
    for line in lines:
        if "protocol" in line:
            line["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
        if "metaData" in line:
            line["metaData"]["configuration"] = {"delta.columnMapping.mode": "name"}
            fields = json.loads(line["metaData"]["schemaString"])
            fields["fields"][0]["metadata"] = {"delta.columnMapping.id": 1, "delta.columnMapping.physicalName": "c1"}
            line["metaData"]["schemaString"] = json.dumps(fields)
    commit.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(UnreadableError, match=r"table events at .* cannot be read: column mapping"):
        Table("events", str(tmp_path / "t")).scan()


@pytest.mark.parametrize(
    "protocol",
    [
        {"minReaderVersion": 9, "minWriterVersion": 9},
        {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["newer"], "writerFeatures": ["newer"]},
        {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["v2Checkpoint"]}
        | {"writerFeatures": ["v2Checkpoint"]},
    ],
    ids=["version", "feature", "known feature"],
)
def test_a_protocol_that_nobody_knows_yet_is_named(tmp_path: Path, protocol: dict[str, Any]) -> None:
    write_deltalake(str(tmp_path / "t"), pa.table({"x": [1]}))
    commit = tmp_path / "t" / "_delta_log" / f"{0:020d}.json"
    lines = [json.loads(line) for line in commit.read_text().splitlines()]
    commit.write_text("\n".join(json.dumps({"protocol": protocol} if "protocol" in one else one) for one in lines))
    with pytest.raises(UnreadableError, match=r"table events at .* uses a Delta feature that cannot be read: "):
        Table("events", str(tmp_path / "t")).scan()


def test_a_table_at_a_version_is_what_it_was(tmp_path: Path) -> None:
    table = log(tmp_path / "log", *DAYS, by=["dt"])
    then = table.at(table.delta().version())
    before = then.fingerprints()
    log(tmp_path / "log", DAYS[0], by=["dt"])
    assert then.scan([DAYS[0]]).collect().height == 1
    assert table.scan([DAYS[0]]).collect().height == 2
    assert then.fingerprints() == before != table.fingerprints()


def test_a_file_of_another_writer_is_not_taken_for_a_misplaced_one_of_ours() -> None:
    """Whatever it is called and wherever it lies: of a user's table the Delta log alone says what is whose."""
    assert is_written_for(f"day=2026-01-05/part-{'0' * 32}.parquet", "2026-01-05")
    assert is_written_for(f"anywhere/part-{'0' * 32}.parquet", "2026-01-05")
    ours = f"part-{'0' * 32}-{'1' * 32}.parquet"
    assert is_written_for(f"dt=2026-01-05/bucket=0/{ours}", "2026-01-05")
    assert not is_written_for(f"dt=2026-01-06/bucket=0/{ours}", "2026-01-05")
