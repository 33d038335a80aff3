"""A run killed with SIGKILL in a stage and started again ends in the same state as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from features.delta.maintenance import remove_uncommitted
from features.delta.table import Table
from pipeline.config import Config
from pipeline.dag import open_instance
from pipeline.importers.synthetic import import_synthetic
from pipeline.leftovers import DERIVED
from pipeline.progress import Progress
from pipeline.stages import pending
from pipeline.stages.feature_store import online_record
from pipeline.workspace import Workspace
from serving.ports import is_free
from tests.pipeline.workspaces import START, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COMMAND = [sys.executable, "-c", "from pipeline.cli import main; main()"]


def start(folder: Path, command: str = "run") -> subprocess.Popen[str]:
    log = (folder / "run.log").open("a")
    return subprocess.Popen(
        [*COMMAND, command, "--config", str(folder / "config.yaml")],
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path) -> None:
    process = start(folder)
    assert process.wait(timeout=200) == 0, (folder / "run.log").read_text()


def kill_when(folder: Path, happened: Any) -> list[psutil.Process]:
    """SIGKILL the run as soon as something is seen in its workspace; its processes, which end a little later."""
    process = start(folder)
    deadline = time.monotonic() + 150
    while not happened():
        assert process.poll() is None, "the run ended before it could be killed: " + (folder / "run.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return started


def outcome(config: Config) -> dict[str, Any]:
    """What a run leaves behind, without times and paths."""
    workspace = Workspace(config, Progress())
    champion = workspace.registry.champion()
    assert champion is not None
    owners = {"samples": "user_id", "state": "user_id", "user_aggregates": "user_id", "item_aggregates": "item_id"}
    tables = {name: Table(name, config.path("tables", name)).scan().collect() for name in owners}
    return {
        "pending": pending(workspace),
        "model": champion.tags["content"],
        "versions": len(workspace.registry.versions()),
        **{name: rows.sort("dt", owners[name]).to_dicts() for name, rows in tables.items()},
        "store": online_record(workspace).rows,
    }


def interrupt_when(folder: Path, happened: Any, number: signal.Signals, subcommand: str = "run") -> None:
    """A signal to the group two seconds after something is seen and Ray runs; it ends in time, and nothing is left."""
    process = start(folder, subcommand)
    command = psutil.Process(process.pid)
    while not happened() or not any(one.name() == "raylet" for one in command.children()):
        assert process.poll() is None, (folder / "run.log").read_text()
        time.sleep(0.05)
    time.sleep(2)
    started = command.children(recursive=True)
    os.killpg(process.pid, number)
    assert process.wait(timeout=15) == 128 + number, (folder / "run.log").read_text()
    _, left = psutil.wait_procs(started, timeout=2)
    assert not left
    log = (folder / "run.log").read_text()
    assert f"{number.name}: corank {subcommand} stopped" in log.splitlines()[-1]
    assert "Traceback" not in log


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of the commands; its path is short, as Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def assert_nothing_is_left(config: Config, temporary: Path) -> None:
    with open_instance(config) as instance:
        runs = instance.get_runs()
    assert {run.status for run in runs} == {dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS}
    assert sum(remove_uncommitted(Table(name, config.path(name))) for name in DERIVED) == 0
    left = [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]  # a cache
    assert [(path / "owner").exists() for path in left] == [True]  # the logs of the last Ray


def test_a_run_interrupted_before_its_training_and_killed_in_it_continues_and_ends_the_same(
    tmp_path: Path, temporary: Path
) -> None:
    """Kills inside the build: test_builder_limits.py; at all boundaries: benchmarks.crashwalk."""
    data = tmp_path / "data"
    import_synthetic(data, days=2, users=80, items=80, seed=2, start=START, buckets=2, say=lambda _: None)
    undisturbed, killed = load(tmp_path / "a", data), load(tmp_path / "b", data)
    finish(tmp_path / "a")
    work = killed.local_path()
    interrupt_when(tmp_path / "b", lambda: bool(list(work.glob("records/feature_store/*.json"))), signal.SIGTERM)
    started = kill_when(tmp_path / "b", lambda: bool(list(work.glob("checkpoints/*/*/SHA256SUMS"))))
    psutil.wait_procs(started, timeout=60)
    for state in work.glob("checkpoints/*/*/state.pt"):  # and what it saved is damaged
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    finish(tmp_path / "b")
    assert "is damaged or was not finished" in (tmp_path / "b" / "run.log").read_text()
    assert_nothing_is_left(killed, temporary)
    assert outcome(killed) == outcome(undisturbed)
    serving = killed.serving
    interrupt_when(tmp_path / "b", lambda: not is_free(serving.host, serving.port), signal.SIGINT, "serve")
    assert is_free(serving.host, serving.port)
