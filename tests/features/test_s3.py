"""Logs and derived tables on S3 hold what local ones hold; an S3 that does not answer is named, and damages nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from features.builder.states import SAMPLES, STATE
from features.delta.damage import check_files, damaged_files
from features.delta.maintenance import compact, derived_tables
from features.delta.paths import address
from features.delta.table import Table
from features.errors import UnavailableError, message_of
from features.sample_table import candidate_counts
from features.samples.source import SampleSource
from pipeline.records import Records
from tests.features.worlds import COUNTING, DAYS, SCHEMA, fold_all, settings, write_world
from tests.s3 import Faults
from tests.servers import free_port, wait_for

BUCKET = "s3://lake/My Projects é#1? [x] 100%"


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """An S3 server with one bucket, which everything finds by the usual variables."""
    import boto3

    port = free_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    faults = Faults(tmp_path / "faults")
    command = [sys.executable, "-m", "tests.s3", str(port), str(faults.path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(server, port)
        boto3.client("s3").create_bucket(Bucket="lake")
        yield faults
    finally:
        server.terminate()
        server.wait(10)


def test_a_lake_on_s3_holds_what_a_local_one_holds(s3: Faults, tmp_path: Path) -> None:
    tables = write_world(tmp_path, seed=4, users=8)
    remote = {}
    for name, table in tables.items():
        rows, uri = table.scan().collect(), f"{BUCKET}/log/{name}"
        by = [column for column in ("dt", "bucket") if column in rows.columns]
        rows.write_delta(address(uri), delta_write_options={"partition_by": by or None})
        remote[name] = Table(name, uri)
    here = settings(tables, tmp_path / "here", schema=COUNTING)
    there = replace(here, tables=remote, root=f"{BUCKET}/work/tables")
    for one in (here, there):
        fold_all(one, DAYS, [])
        fold_all(one, DAYS[1:], DAYS[:1])  # replaces two of them
    for name in (SAMPLES, STATE):
        rows = [one.table(name).scan().collect().sort("dt", "user_id") for one in (here, there)]
        assert rows[0].height
        assert rows[0].equals(rows[1])
    assert [table.name for table in derived_tables(there.root)] == [table.name for table in derived_tables(here.root)]
    for table in derived_tables(there.root):
        compact(table)
    read = [
        list(
            SampleSource(one.table_root(SAMPLES), COUNTING, tuple(DAYS), 0, 2**62).batches(20, 100, 0, in_process=True)
        )
        for one in (here, there)
    ]
    assert [candidate_counts(batch) for batch in read[0]] == [candidate_counts(batch) for batch in read[1]]
    records = Records(f"{BUCKET}/work/records")
    assert records.get("samples", DAYS[0]) is None
    records.put("samples", DAYS[0], {"rows": 1})
    records.put("samples", DAYS[0], {"rows": 2})
    found = records.get("samples", DAYS[0])
    assert found is not None
    assert found["rows"] == 2


class Fails:
    """A query that fails when it is run."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def collect(self) -> pl.DataFrame:
        raise self._error

    def collect_batches(self, chunk_size: int) -> Iterator[pl.DataFrame]:
        raise self._error


def small_table(**options: str) -> Table:
    """A table of one file on S3."""
    pl.DataFrame({"dt": DAYS[:1], "ts": [1]}).write_delta(
        "s3://lake/events", delta_write_options={"partition_by": ["dt"]}
    )
    return Table("events", "s3://lake/events", storage_options=options, grain="day")


@pytest.mark.slow
def test_an_s3_that_answers_with_errors_is_named_and_no_file_is_taken_for_damaged(s3: Faults) -> None:
    table = small_table()
    pinned, records = table.pinned(), Records("s3://lake/records")
    rows = pinned.collect(pinned.scan())
    records.put("samples", DAYS[0], {"rows": 1})
    s3.set("500")
    where = f"500 Internal Server Error .* See that S3 at {os.environ['AWS_ENDPOINT_URL']} is up.* the same command"
    with pytest.raises(UnavailableError, match=f"table events at s3://lake/events: .*{where}"):
        table.delta()
    with pytest.raises(UnavailableError, match=f"table events, partition {DAYS[0]}: file s3://.*parquet: .*{where}"):
        pinned.collect(pinned.scan())
    with pytest.raises(OSError, match="AWS Error") as failure:
        records.get("samples", DAYS[0])
    assert os.environ["AWS_ENDPOINT_URL"] in message_of(failure.value)
    s3.stop()
    assert pinned.collect(pinned.scan()).equals(rows)
    # what was out of reach for a moment is no damage either: the check that follows finds nothing
    error = ConnectionRefusedError("Generic S3 error: error sending request")
    for read in (lambda: pinned.collect(Fails(error)), lambda: list(pinned.portions(Fails(error), 1))):  # type: ignore[arg-type]
        with pytest.raises(UnavailableError, match=r"table events at s3://lake/events: .*error sending request"):
            read()
    assert damaged_files(table, whole=True) == []
    assert records.get("samples", DAYS[0]) is not None


def test_a_silent_s3_is_given_up_after_a_time(s3: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.delta.paths.PATIENCE", {"timeout": "1s", "retry_timeout": "1s"})
    table = small_table()
    pinned = table.pinned()
    rows = pinned.collect(pinned.scan())
    started = time.monotonic()
    s3.set("silent")
    with pytest.raises(UnavailableError, match="operation timed out"):
        table.delta()
    with pytest.raises(UnavailableError, match="operation timed out"):
        check_files(pinned)
    with pytest.raises(Exception, match="operation timed out"):
        SampleSource("s3://lake/events", SCHEMA, tuple(DAYS), 0, 1).files()
    s3.set("silent", 1, ".parquet")
    assert pinned.collect(pinned.scan()).equals(rows)  # Polars asks again
    assert time.monotonic() - started < 30
