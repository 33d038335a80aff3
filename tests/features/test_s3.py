"""Logs and derived tables on S3, served by moto: the same rows and records as on a local disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from features.builder.states import SAMPLES, STATE
from features.delta.maintenance import compact, derived_tables
from features.delta.paths import address
from features.delta.table import Table
from features.sample_table import candidate_counts
from features.samples.source import SampleSource
from pipeline.records import Records
from tests.features.worlds import COUNTING, DAYS, fold_all, settings, write_world
from tests.servers import free_port, wait_for

BUCKET = "s3://lake/My Projects é#1? [x] 100%"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 server with one bucket, which everything finds by the usual variables.

    In a process of its own: deltalake holds the interpreter's lock while it waits for an answer.
    """
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
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(server, port)
        boto3.client("s3").create_bucket(Bucket="lake")
        yield
    finally:
        server.terminate()
        server.wait(10)


def test_a_lake_on_s3_holds_what_a_local_one_holds(s3: None, tmp_path: Path) -> None:
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
