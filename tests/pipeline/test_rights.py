"""What a command may not read or write is named; it is not damaged, and with the right the same command goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.importers.synthetic import import_synthetic
from pipeline.leftovers import exclusive
from pipeline.workspace.registry import local_database
from tests.pipeline.commands import corank
from tests.pipeline.test_leftovers import write
from tests.pipeline.workspaces import START, load
from tests.rights import bound, closed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def run(config: Config, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = config.local_path().parent / "config.yaml"
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments, "--config", str(path)]
    return subprocess.run(bound(command), capture_output=True, text=True, timeout=100, check=False)


def refused(done: subprocess.CompletedProcess[str], *names: object) -> bool:
    """Whether a command failed with one message that names these and says what to do."""
    said = done.stdout + done.stderr
    advice = "Give the user who runs corank the right to read and write there"
    return done.returncode == 1 and "Traceback" not in said and all(str(one) in said for one in (*names, advice))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    import_synthetic(tmp_path / "data", days=1, users=10, items=10, seed=1, start=START, buckets=1, say=lambda _: None)
    return load(tmp_path, tmp_path / "data")


def test_a_file_of_the_log_that_may_not_be_read_is_named_and_its_partition_is_not_judged(config: Config) -> None:
    file = next(Path(config.table("impressions").uri).glob("dt=*/*/*.parquet"))
    with closed(file):
        assert refused(run(config, "validate"), f"table impressions, partition {START}: file {file}")
    assert not list(config.local_path("records", "validated").glob("*"))
    records = config.local_path("records")
    with closed(records, mode=0o555):
        assert refused(run(config, "validate"), records)
    assert corank("validate", "--config", str(config.local_path().parent / "config.yaml")).exit_code == 0


def test_repair_takes_nothing_away_that_it_may_not_read(config: Config) -> None:
    file = write("state", config, True)
    database = config.local_path("mlflow", "mlflow.db")
    local_database(database.parent)
    log = next(file.parents[2].glob("_delta_log/*1.json"))
    with closed(log):  # with which all of the table would go
        assert refused(run(config, "repair"), "derived tables could not be checked: table state", log)
    with closed(database, mode=0o444):
        assert refused(run(config, "repair"), f"{database}: Permission denied")
    whole = corank("repair", "--config", str(config.local_path().parent / "config.yaml"))
    assert whole.stdout.endswith("Nothing is damaged.\n")
    assert all(path.is_file() for path in (file, log, database))


def test_a_second_command_is_told_which_one_has_the_workspace_before_it_decides_anything(config: Config) -> None:
    command = ("retrain", "--config", str(config.local_path().parent / "config.yaml"))
    with exclusive(config):
        second = corank(*command)  # which has no champion to start from, either
    holder = config.local_path("run.lock")
    assert second.exit_code == 1
    assert f"error: another corank run (process {os.getpid()}: " in second.stderr
    assert f"is working in {holder.parent}; wait for it or stop it" in second.stderr
    assert "there is no champion" in corank(*command).stderr
