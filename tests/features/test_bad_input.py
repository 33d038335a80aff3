"""What a log may do wrong is named precisely, and nothing else is disturbed: ids, units, types, files, repeats."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.transaction import AddAction
from ray.exceptions import RayTaskError

from features.builder.build import build_partitions
from features.builder.fold import fold_bucket
from features.delta.columns import reads_as
from features.delta.table import Table
from features.errors import CorankError, DataGateError, UnreadableError, known_cause
from features.schema import SECOND, partition_bounds
from features.validation import PartitionValidation, ValidationRules, distinct_events, quarantine, validate_partitions
from models.config import ModelConfig
from pipeline.config import Config, TableConfig
from pipeline.progress import Progress
from pipeline.stages.samples import SAMPLES
from pipeline.stages.stage import Stage
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace
from tests.features.worlds import DAYS, SCHEMA, settings, write_world

DAY = DAYS[1]
OPEN, CLOSE = partition_bounds(DAY, "day")
NOW = partition_bounds(DAYS[-1], "day")[1]


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Table]:
    return write_world(tmp_path, seed=5, users=6)


def judge(
    root: Path, tables: dict[str, Table], days: list[str] | None = None, **rules: float
) -> dict[str, PartitionValidation]:
    results, _ = validate_partitions(
        tables,
        SCHEMA,
        days or [DAY],
        "day",
        ValidationRules.model_validate({"max_outside_vocabulary": 1, **rules}),  # the world has devices nobody lists
        root / "gx",
        str(root / "quarantine"),
        NOW,
        lambda _: None,
    )
    return {result.partition: result for result in results}


def changed(table: Table, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Table:
    """The same log with a change of the tested day, as a table of its own."""
    frame = table.scan().collect()
    if "dt" in frame.columns:
        tested = change(frame.filter(pl.col("dt") == DAY))
        kept = frame.filter(pl.col("dt") != DAY).cast({name: tested.schema[name] for name in frame.columns})
        frame = pl.concat([kept, tested])
    else:
        frame = change(frame)
    parts = [name for name in ("dt", "bucket") if name in frame.columns]
    frame.write_delta(f"{table.uri}_changed", delta_write_options={"partition_by": parts} if parts else {})
    return replace(table, uri=f"{table.uri}_changed")


def test_rows_without_a_partition_are_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    row = pl.int_range(pl.len())
    for role in ("impressions", "events"):
        lost = changed(tables[role], lambda f: f.with_columns(dt=pl.when(row > 1).then("dt")))
        (finding,) = [one for one in judge(tmp_path, {**tables, role: lost})[DAY].failures if one.table == role]
        assert finding.message.startswith(f"table {role} at {lost.uri} has rows without a dt")


def first(column: str, value: object, rows: int = 2) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """Put a value into a column of the first rows."""
    row = pl.int_range(pl.len())
    kind = pl.String if isinstance(value, str) else pl.Int64
    return lambda f: f.with_columns(pl.when(row < rows).then(pl.lit(value, kind)).otherwise(column).alias(column))


def file_of(table: Table, day: str) -> Path:
    return next(Path(table.uri).glob(f"dt={day}/**/*.parquet"))


# --- ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_impressions_with_negative_ids_are_set_aside_and_named(
    tmp_path: Path, tables: dict[str, Table], column: str
) -> None:
    bad = {**tables, "impressions": changed(tables["impressions"], first(column, -1))}
    stopped = judge(tmp_path, bad)[DAY]
    messages = [finding.message for finding in stopped.failures if finding.rule == f"negative_{column}"]
    assert [message.split(": ")[0] for message in messages] == [f"table impressions, partition {DAY}"]
    assert "2 of " in messages[0]
    assert "(for example -1)" in messages[0]
    tolerated = judge(tmp_path, bad, max_quarantined=0.9)[DAY]
    assert tolerated.passed
    assert tolerated.quarantined == 2
    rows = Table("quarantine", str(tmp_path / "quarantine")).scan([DAY]).collect()
    assert rows[column].to_list() == ["-1", "-1"]
    kept, rejected = quarantine(bad["impressions"].scan([DAY]).collect(), SCHEMA, [DAY], "day", NOW)
    assert rejected["rule"].to_list() == [f"negative_{column}"] * 2
    assert kept.filter(pl.col(column) < 0).is_empty()


def test_events_and_profiles_with_negative_ids_are_named_and_text_ids_may_look_negative(
    tmp_path: Path, tables: dict[str, Table]
) -> None:
    bad = {
        **tables,
        "impressions": changed(tables["impressions"], first("request_id", "-1", rows=1)),
        "events": changed(tables["events"], lambda f: first("item_id", -7)(first("user_id", -1)(f))),
        "items": changed(tables["items"], first("item_id", -1, rows=1)),
    }
    named = {(f.table, f.rule, f.count) for f in judge(tmp_path, bad)[DAY].failures}
    assert named == {
        ("events", "negative_user_id", 2),
        ("events", "negative_item_id", 2),
        ("items", "negative_item_id", 1),
    }


# --- time ---------------------------------------------------------------------------------------------


UNITS = {"seconds": (1, SECOND), "milliseconds": (1, 1_000), "nanoseconds": (1_000, 1)}


@pytest.mark.parametrize("unit", UNITS)
def test_a_wrong_unit_is_recognised_with_an_example(tmp_path: Path, tables: dict[str, Table], unit: str) -> None:
    times, over = UNITS[unit]

    def converted(rows: pl.DataFrame) -> pl.DataFrame:
        return rows.with_columns(pl.col("ts") * times // over)

    bad = {name: changed(tables[name], converted) for name in ("impressions", "events")}
    late = tables["users"].scan().collect().with_columns(updated_at=pl.lit(OPEN, pl.Int64) * times // over)
    late.write_delta(f"{tables['users'].uri}_late")
    bad["users"] = replace(tables["users"], uri=f"{tables['users'].uri}_late")
    result = judge(tmp_path, {**tables, **bad})[DAY]
    named = {f.table: f.message for f in result.failures if f.rule.endswith(f"_in_{unit}")}
    assert set(named) == {"impressions", "events", "users"}
    for name, column in (("impressions", "ts"), ("events", "ts"), ("users", "updated_at")):
        example = bad[name].scan(None if name == "users" else [DAY]).collect()[column][0]
        where = f"table {name}" if name == "users" else f"table {name}, partition {DAY}"
        assert named[name].startswith(f"{where}: ")
        assert f"{column} looks like {unit}; cast to microseconds" in named[name]
        assert named[name].endswith(f"(for example {example})")
    # the unit explains the rows; they are not named again as outside of the partition or in the future
    assert not {f.rule for f in result.failures} & {"ts_outside", "ts_future"}


def test_rows_of_another_partition_are_set_aside_and_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    bad = {**tables, "impressions": changed(tables["impressions"], first("ts", CLOSE, rows=3))}
    result = judge(tmp_path, bad, max_quarantined=0.9)[DAY]
    assert [(f.rule, f.count) for f in result.findings] == [("ts_outside", 3)]
    assert f"outside of the partition {DAY}" in result.findings[0].message
    assert f"(for example {CLOSE})" in result.findings[0].message
    assert result.quarantined == 3


@pytest.mark.parametrize("zone", [None, "UTC"])
def test_timestamps_are_utc_with_and_without_a_zone_in_any_order(
    tmp_path: Path, tables: dict[str, Table], zone: str | None
) -> None:
    stamped = changed(
        tables["impressions"],
        lambda f: f.sort("ts", descending=True).with_columns(pl.col("ts").cast(pl.Datetime("us", zone))),
    )
    assert judge(tmp_path, {**tables, "impressions": stamped})[DAY].findings == ()
    by = ["request_id", "item_id"]
    read, original = (table.scan([DAY]).collect().sort(by) for table in (stamped, tables["impressions"]))
    assert read["ts"].equals(original["ts"])


def test_the_order_of_rows_changes_no_sample(tmp_path: Path, tables: dict[str, Table]) -> None:
    shuffled = {
        name: changed(tables[name], lambda f: f.sample(fraction=1.0, shuffle=True, seed=3))
        for name in ("impressions", "events")
    }
    for bucket in range(2):
        for own, other in zip(
            fold_bucket(settings(tables, tmp_path), bucket, DAYS, []),
            fold_bucket(settings({**tables, **shuffled}, tmp_path), bucket, DAYS, []),
            strict=True,
        ):
            assert own[2].equals(other[2])


# --- repeats ------------------------------------------------------------------------------------------


def test_events_delivered_twice_count_once_and_others_under_the_same_id_are_named(
    tmp_path: Path, tables: dict[str, Table]
) -> None:
    twice = changed(tables["events"], lambda f: pl.concat([f, f.head(3), f.head(1)]))
    result = judge(tmp_path, {**tables, "events": twice})[DAY]
    assert result.passed
    assert [(f.table, f.rule, f.count) for f in result.findings] == [("events", "repeated_event", 4)]
    events = tables["events"].scan([DAY]).collect()
    assert distinct_events(twice.scan([DAY]).collect()).sort(pl.all()).equals(events.sort(pl.all()))
    conflict = changed(twice, lambda f: pl.concat([f, f.head(1).with_columns(pl.lit(0.25).alias("seconds"))]))
    (finding,) = judge(tmp_path, {**tables, "events": conflict})[DAY].failures
    assert (finding.rule, finding.count) == ("conflicting_event_id", 1)
    assert re.findall(r"in (\w+)", finding.message) == ["seconds"]


def test_an_event_id_belongs_to_its_user_and_the_first_by_ts_counts() -> None:
    events = pl.DataFrame(
        {"user_id": [1, 2, 1, 1], "event_id": ["a", "a", "b", "a"], "ts": [5, 4, 3, 2], "value": [0, 1, 2, 3]}
    )
    assert distinct_events(events.with_columns(dt=pl.lit(DAY)))["value"].to_list() == [3, 2, 1]


def test_partitions_that_are_judged_together_get_the_verdicts_of_each_by_itself(
    tmp_path: Path, tables: dict[str, Table]
) -> None:
    """Where all pass, where one breaks a rule, and where a file of one is damaged."""
    twice = changed(tables["events"], lambda f: pl.concat([f, f.head(3)]))
    spoiled = changed(tables["impressions"], lambda f: f.with_columns(ts=pl.col("ts") // SECOND))
    damaged = changed(twice, lambda f: f)
    (file, *_) = Path(damaged.uri, f"dt={DAYS[2]}").rglob("*.parquet")
    truncate(file)
    found = []
    days = DAYS[1:]
    for number, own in enumerate([{"events": twice}, {"impressions": spoiled}, {"events": damaged}]):
        together = judge(tmp_path / f"{number}", {**tables, **own}, days)
        for day in days:
            assert judge(tmp_path / f"{number}-{day}", {**tables, **own}, [day])[day] == together[day]
        found.append([len(together[day].failures) for day in days])
    assert found[0] == [0, 0]
    assert found[1][0] > 0 == found[1][1]
    assert found[2] == [0, 1]


# --- files --------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite_pages(path: Path) -> None:
    """Damage that neither the size nor the footer shows."""
    content = bytearray(path.read_bytes())
    content[4:120] = b"\xff" * 116
    path.write_bytes(content)


def overwrite_footer(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + b"\xff" * 8)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (truncate, "but the Delta log says"),
    "footer": (overwrite_footer, "is no readable Parquet file"),
    "pages": (overwrite_pages, "is no readable Parquet file"),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [("events", "missing"), ("impressions", "truncated"), ("events", "footer"), ("impressions", "pages")],
)
def test_a_damaged_file_stops_its_partition_alone_and_is_named(
    tmp_path: Path, tables: dict[str, Table], name: str, damage: str
) -> None:
    harm, problem = DAMAGE[damage]
    path = file_of(tables[name], DAY)
    harm(path)
    results = judge(tmp_path, tables, DAYS[:2])
    assert [results[day].passed for day in DAYS[:2]] == [True, False]
    (finding,) = results[DAY].failures
    assert (finding.table, finding.partition, finding.rule) == (name, DAY, "unreadable_files")
    assert finding.message.startswith(f"table {name}, partition {DAY}: file {path} ")
    assert problem in finding.message
    bucket = int(path.parent.name.removeprefix("bucket="))
    with pytest.raises(UnreadableError, match=path.name):  # as if it broke after its partition was validated
        tables[name].slice([DAY], bucket, 2)
    assert tables[name].slice([DAYS[0], DAYS[2]], bucket, 2).height


def test_a_damaged_profile_file_is_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    path = next(Path(tables["users"].uri).glob("*.parquet"))
    truncate(path)
    (finding,) = judge(tmp_path, tables)[DAY].failures
    assert finding.message.startswith(f"table users: file {path} has ")


def test_a_damaged_delta_log_is_named(tables: dict[str, Table]) -> None:
    next(Path(tables["events"].uri, "_delta_log").glob("*.json")).write_text("{")
    with pytest.raises(UnreadableError, match=r"table events: the Delta log of .* cannot be read"):
        tables["events"].fingerprints()


def test_a_query_that_is_wrong_is_not_blamed_on_files(tables: dict[str, Table]) -> None:
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        tables["events"].collect(tables["events"].scan([DAY]).select("nothing"), [DAY])


def test_files_of_another_type_than_the_table_are_named(tmp_path: Path, tables: dict[str, Table]) -> None:
    table = tables["impressions"]
    own = file_of(table, DAY)
    frame = pl.read_parquet(own, hive_partitioning=False).with_columns(pl.col("position").cast(pl.String))
    path = own.with_name("other.parquet")
    frame.write_parquet(path)
    delta = DeltaTable(table.uri)
    action = AddAction(
        str(path.relative_to(table.uri)),
        path.stat().st_size,
        {"dt": DAY, "bucket": own.parent.name.removeprefix("bucket=")},
        0,
        True,
        json.dumps({"numRecords": frame.height}),
    )
    delta.create_write_transaction([action], mode="append", schema=delta.schema(), partition_by=["dt", "bucket"])
    (finding,) = judge(tmp_path, tables)[DAY].failures
    assert finding.rule == "unreadable_files"
    assert f"{path} stores column position as string, but the table says int64" in finding.message


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_file_that_breaks_after_validation_is_named_through_ray_and_earlier_samples_stay(
    tmp_path: Path, tables: dict[str, Table], local_ray: None
) -> None:
    build = settings(tables, tmp_path)
    shown = {day: tables["impressions"].scan([day]).collect().height for day in DAYS}
    build_partitions(build, DAYS[:1], [], shown, lambda *_: None)
    samples = Table("samples", build.table_root("samples"))
    before = samples.scan().collect()
    path = file_of(tables["events"], DAY)
    truncate(path)
    with pytest.raises(UnreadableError) as caught:
        build_partitions(build, DAYS[1:], DAYS[:1], shown, lambda *_: None)
    cause = known_cause(caught.value)
    assert str(cause).startswith(f"table events, partition {DAY}: file {path} has ")
    assert samples.scan().collect().equals(before)


def test_the_message_of_an_error_inside_a_task_is_found_not_its_stack_trace() -> None:
    shipped = pickle.loads(pickle.dumps(UnreadableError("table events: …")))
    wrapped = RayTaskError("fold", "a long stack trace", shipped).as_instanceof_cause()
    assert isinstance(wrapped, CorankError)
    assert str(known_cause(wrapped)) == "table events: …"


# --- types and late rows, at the level of the workspace ------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path, tables: dict[str, Table]) -> Callable[[], Workspace]:
    """Makes a workspace that sees the tables as they are at the moment."""
    config = Config(
        name="world",
        workspace=str(tmp_path / "work"),
        grain="day",
        buckets=2,
        tables={name: TableConfig(path=table.uri) for name, table in tables.items()},
        features=SCHEMA.features,
        sequences=SCHEMA.sequences,
        tasks=SCHEMA.tasks,
        model=ModelConfig(heads=2),
    )
    return lambda: Workspace(config, Progress())


def test_a_new_column_reads_as_null_in_older_partitions(tmp_path: Path, tables: dict[str, Table]) -> None:
    uri = tables["impressions"].uri
    newest = DeltaTable(uri)
    rows = pl.read_delta(uri).filter(pl.col("dt") == DAYS[2]).with_columns(pl.lit("b").alias("experiment"))
    newest.delete(f"dt = '{DAYS[2]}'")
    write_deltalake(uri, rows.to_arrow(), mode="append", schema_mode="merge", partition_by=["dt", "bucket"])
    results = judge(tmp_path, tables, DAYS)
    assert all(result.passed for result in results.values())
    assert tables["impressions"].scan([DAY]).collect()["experiment"].null_count() == results[DAY].rows["impressions"]
    assert tables["impressions"].scan([DAYS[2]]).collect()["experiment"].unique().to_list() == ["b"]


def test_a_changed_type_is_named_and_a_wider_one_is_not(workspace: Callable[[], Workspace]) -> None:
    users = workspace().config.table("users")
    frame = pl.read_delta(users.uri)

    def write(kind: type[pl.DataType]) -> None:
        frame.with_columns(pl.col("age").cast(kind)).write_delta(
            users.uri, mode="overwrite", delta_write_options={"schema_mode": "overwrite"}
        )

    write(pl.Int32)
    first_run = workspace()
    VALIDATED.run(first_run, VALIDATED.stale(first_run))
    write(pl.Int64)
    assert VALIDATED.stale(workspace()) == []  # the same values
    write(pl.Float64)
    with pytest.raises(DataGateError) as caught:
        VALIDATED.stale(workspace())
    assert f"table users at {users.uri}: column age was int32, now it is float64" in str(caught.value)
    (Path(first_run.config.path("records", "types")) / "users.json").unlink()
    assert workspace().partitions == first_run.partitions == DAYS


def test_wider_types_read_without_a_loss_and_narrower_do_not() -> None:
    assert reads_as("int32", "int64")
    assert reads_as("float32", "float64")
    assert reads_as("list<int32>", "list<int64>")
    for old, new in (("int64", "int32"), ("float64", "float32"), ("int32", "float64"), ("int64", "string")):
        assert not reads_as(old, new)


def test_late_rows_make_their_partition_and_all_after_it_stale(workspace: Callable[[], Workspace]) -> None:
    before = workspace()
    days = before.partitions
    for day in days:
        before.records.put("samples", day, {"inputs": SAMPLES.inputs(before)[day]})
    assert Stage.stale(SAMPLES, workspace()) == []
    impressions = before.config.table("impressions")
    late = pl.read_delta(impressions.uri).filter(pl.col("dt") == days[1]).head(1)
    write_deltalake(impressions.uri, late.with_columns(pl.lit("late").alias("request_id")).to_arrow(), mode="append")
    assert Stage.stale(SAMPLES, workspace()) == days[1:]


def test_a_damaged_profile_file_stops_a_run_before_anything_else(workspace: Callable[[], Workspace]) -> None:
    path = next(Path(workspace().config.table("items").uri).glob("**/*.parquet"))
    truncate(path)
    with pytest.raises(UnreadableError, match=path.name):
        VALIDATED.stale(workspace())
