"""Which partitions start a retraining, when, and what is said when one fails; on real tables."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from deltalake import CommitProperties, DeltaTable, write_deltalake

import pipeline.workspace.log
from features.errors import CorankError
from features.schema import SECOND
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.trigger import MARKER
from pipeline.watch import _run, due, raise_alert, readiness, retraining_definitions
from pipeline.workspace import Workspace, now_us
from tests.pipeline.workspaces import START, load, write_config

DAYS = ["2026-01-05", "2026-01-06", "2026-01-07"]
MINUTE = 60 * SECOND


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two days of a small log, and a version that covers the first."""
    write_days(tmp_path, 2)
    workspace = open_workspace(tmp_path)
    registry = workspace.registry
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    run = registry.log_run("run", "content", {}, {}, [], str(artifact))
    registry.promote(registry.register(str(artifact), run, {"partition": DAYS[0]}).number)
    return tmp_path


def write_days(folder: Path, days: int) -> None:
    import_synthetic(folder / "data", days=days, users=20, items=20, seed=5, start=START, buckets=2, say=lambda _: None)


def open_workspace(folder: Path, **trigger: Any) -> Workspace:
    return Workspace(load(folder, folder / "data", trigger=trigger), Progress())


def waiting(folder: Path, **trigger: Any) -> dict[str, str]:
    return {one.partition: one.waits_for for one in readiness(open_workspace(folder, **trigger))}


def table(folder: Path, name: str) -> DeltaTable:
    return DeltaTable(str(folder / "data" / name))


def test_the_newest_partition_waits_for_a_later_one_a_marker_or_quiet(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert waiting(folder, closed="time") == {DAYS[1]: ""}
    assert waiting(folder) == {DAYS[1]: "impressions of a later partition"}
    assert waiting(folder, closed="marker")[DAYS[1]].endswith(f"metadata {MARKER}: {DAYS[1]}")
    assert waiting(folder, closed="quiet", quiet_minutes=5)[DAYS[1]].startswith("no more commits until")
    monkeypatch.setattr(pipeline.workspace.log, "now_us", lambda: now_us() + 6 * MINUTE)
    assert waiting(folder, closed="quiet", quiet_minutes=5) == {DAYS[1]: ""}
    impressions = table(folder, "impressions")
    empty = pl.read_delta(impressions.table_uri).clear().to_arrow()
    mark = CommitProperties(custom_metadata={MARKER: f"{DAYS[0]}, {DAYS[1]}"})
    write_deltalake(impressions, empty, mode="append", commit_properties=mark)
    assert waiting(folder, closed="marker") == {DAYS[1]: ""}


def test_a_partition_waits_until_every_log_reaches_it(folder: Path) -> None:
    table(folder, "watches").delete(f"dt = '{DAYS[1]}'")
    assert waiting(folder, closed="time") == {DAYS[1]: "rows of watches"}
    assert due(open_workspace(folder, closed="time")).partition == DAYS[0]  # type: ignore[union-attr]
    assert waiting(folder, closed="time", wait_for=["searches"]) == {DAYS[1]: ""}
    assert waiting(folder, closed="time", wait_for=["watches"]) == {DAYS[1]: "rows of watches"}


def test_a_retraining_is_asked_for_once_whatever_is_read_or_compacted_and_again_for_new_rows(folder: Path) -> None:
    config = load(folder, folder / "data", trigger={"closed": "time"})
    definitions = retraining_definitions(config, folder / "config.yaml")
    dg.Definitions.validate_loadable(definitions)
    (sensor,) = definitions.sensors or ()
    assert isinstance(sensor, dg.SensorDefinition)
    keys = []

    def asked() -> str | None:
        with dg.DagsterInstance.ephemeral() as instance:
            (request,) = sensor(dg.build_sensor_context(instance))  # type: ignore[misc]
        assert request.tags == {"corank/partition": DAYS[1]}
        return str(request.run_key)

    keys += [asked(), asked()]
    impressions = table(folder, "impressions")
    write_deltalake(
        impressions, pl.read_delta(impressions.table_uri).filter(dt=DAYS[0]).head(1).to_arrow(), mode="append"
    )
    keys.append(asked())
    assert table(folder, "impressions").optimize.compact()["numFilesAdded"] > 0
    keys.append(asked())
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_without_a_champion_nothing_is_asked_for(tmp_path: Path) -> None:
    write_days(tmp_path, 1)
    assert due(open_workspace(tmp_path)) is None
    definitions = retraining_definitions(load(tmp_path, tmp_path / "data"), tmp_path / "config.yaml")
    (sensor,) = definitions.sensors or ()
    (skipped,) = sensor(dg.build_sensor_context())  # type: ignore[misc, operator]
    assert isinstance(skipped, dg.SkipReason)
    assert skipped.skip_message == f"{DAYS[0]} waits for impressions of a later partition"


def test_a_schedule_takes_the_place_of_the_sensor(tmp_path: Path) -> None:
    config = load(tmp_path, tmp_path / "data", trigger={"cron": "0 4 * * *"})
    definitions = retraining_definitions(config, tmp_path / "config.yaml")
    dg.Definitions.validate_loadable(definitions)
    assert [one.cron_schedule for one in definitions.schedules or ()] == ["0 4 * * *"]  # type: ignore[union-attr]
    assert not definitions.sensors


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An address, and what was sent there."""
    sent: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/alert", sent
    server.shutdown()


def test_a_retraining_that_fails_for_good_is_told_with_its_message(
    tmp_path: Path, webhook: tuple[str, list[dict[str, str]]]
) -> None:
    """Of a log without a champion: the command fails at once, is tried again, and then it is told."""
    address, sent = webhook
    write_days(tmp_path, 1)
    trigger = {"retries": 1, "backoff_seconds": 0, "alert_webhook": address}
    trigger["alert_command"] = f'printf %s "$CORANK_ALERT" > {tmp_path}/told'
    path = write_config(tmp_path, tmp_path / "data", trigger=trigger)
    definitions = retraining_definitions(load(tmp_path, tmp_path / "data", trigger=trigger), path)
    (job,) = definitions.jobs or ()
    assert isinstance(job, dg.JobDefinition)
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
        tries = [event.event_type for event in result.all_events if event.step_key == "corank_retrain"]
    assert not result.success
    assert tries.count(dg.DagsterEventType.STEP_UP_FOR_RETRY) == 1
    (message,) = sent
    assert "there is no champion to start from" in message["text"]
    assert (tmp_path / "told").read_text() == message["text"]


def test_a_command_that_fails_is_told_by_its_message_and_an_alert_that_fails_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(CorankError, match=r"^error: no disk\nfree some$"):
        _run(["sh", "-c", "echo fine; echo 'error: no disk' >&2; echo 'free some' >&2; exit 1"], said.append)
    assert said[0] == "fine"
    config = load(tmp_path, tmp_path, trigger={"alert_command": "echo no mail >&2; exit 3"})
    with pytest.raises(CorankError, match=r"alert_command ended with 3: no mail"):
        raise_alert(config, "late")
