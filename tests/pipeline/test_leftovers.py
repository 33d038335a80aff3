"""What a killed command left is cleared by the next one that has the workspace alone; nothing else is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pytest
from mlflow.exceptions import MlflowException

from features.delta.table import Table
from features.delta.write import replace_partition, write_file
from pipeline.config import Config
from pipeline.dag import open_instance
from pipeline.leftovers import exclusive
from pipeline.progress import Progress
from pipeline.runtime import clear_sessions
from pipeline.workspace import Workspace
from tests.pipeline.workspaces import load

ROWS = pa.table({"user_id": ["u1", "u2"]})
LAYOUT = pa.schema({"user_id": pa.string(), "dt": pa.string(), "bucket": pa.string()})
SLICE = {"dt": "2026-01-05", "bucket": "0"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(tmp_path, tmp_path / "work" / "tables")  # the user's own tables beside those of corank


def killed(program: str, path: Path) -> None:
    """Run a program that is killed while it has the workspace of a config."""
    start = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom pipeline.config import load_config\n"
        "from pipeline.leftovers import exclusive\nconfig = load_config(Path(sys.argv[1]))\n"
        "def die(): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", start + program, str(path)], timeout=60, check=False)
    assert run.returncode == -9


def write(table: str, config: Config, commit: bool) -> Path:
    root = config.path("tables", table)
    file = write_file(root, ROWS, SLICE, {})
    if commit:
        replace_partition(root, SLICE["dt"], [file], LAYOUT, {})
    return Path(root) / file.path


def test_the_next_command_removes_what_nothing_refers_to_and_no_more(config: Config, tmp_path: Path) -> None:
    older, newest = write("state", config, True), write("state", config, True)
    uncommitted, no_table = write("state", config, False), write("samples", config, False)
    copied, own = write("laid_out/events", config, False), write("events", config, False)
    work = config.local_path()
    scratch = [work / "records" / "samples" / "a.json.tmp", work / "models" / ".a.tmp" / "model.yaml"]
    scratch += [work / "feast" / ".registry.db.7.tmp", work / "skew" / "tmp1" / "online.db"]
    kept = [work / "records" / "samples" / "a.json", work / "records" / "serving" / "current.json.tmp"]
    kept += [work / "checkpoints" / "a" / "epoch-0001" / "state.pt", work / "models" / "a" / "model.yaml"]
    for path in [*scratch, *kept]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with exclusive(config):
        pass  # no command was killed: it may be somebody's
    assert uncommitted.exists()
    assert all(path.exists() for path in scratch)
    killed("with exclusive(config): die()", tmp_path / "config.yaml")
    with exclusive(config):
        assert not any(path.exists() for path in [uncommitted, no_table, copied, *scratch])
        assert all(path.exists() for path in [older, newest, own, *kept])
    assert Table("state", config.path("tables", "state")).scan().collect().height == ROWS.num_rows
    uncommitted = write("state", config, False)
    with exclusive(config):
        pass
    assert uncommitted.exists()  # cleared once, not at every command


def test_what_failed_is_cleared_like_what_was_killed(config: Config) -> None:
    uncommitted = write("state", config, False)
    with pytest.raises(OSError, match="disk"), exclusive(config):
        raise OSError("disk")
    with exclusive(config):
        assert not uncommitted.exists()


DYING_RUN = """
import dagster as dg
from pipeline.dag import WORKSPACE, open_instance
@dg.asset
def dies(): die()
open_instance(config).dispose()
for tags in ({}, {WORKSPACE: str(config.local_path())}):
    if (child := os.fork()) == 0:
        with exclusive(config), open_instance(config) as instance:
            dg.materialize([dies], instance=instance, tags=tags)
    os.waitpid(child, 0)
die()
"""


def test_dagster_learns_that_a_killed_run_of_ours_has_ended(config: Config, tmp_path: Path) -> None:
    def statuses() -> list[dg.DagsterRunStatus]:
        with open_instance(config) as instance:
            return [run.status for run in instance.get_runs()]

    killed(DYING_RUN, tmp_path / "config.yaml")
    assert statuses() == [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTED]
    with exclusive(config):
        assert statuses() == [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.STARTED]


def test_folders_of_rays_of_dead_processes_are_deleted_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    program = "from pipeline import runtime\nprint(runtime._own_folder(), flush=True)\ninput()"
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for _ in range(2)
    ]
    folders = []
    for process in starts:
        assert process.stdout is not None
        folders.append(Path(process.stdout.readline().strip()))
        (folders[-1] / "session_1").mkdir()
    another = tmp_path / "corank-0"
    another.mkdir()
    starts[0].kill()
    starts[0].wait()
    clear_sessions()
    assert not folders[0].exists()
    assert (folders[1] / "session_1").exists()
    assert another.exists()
    starts[1].communicate("\n", timeout=10)
    clear_sessions()
    assert not folders[1].exists()


def test_mlflow_learns_that_a_run_which_was_not_logged_whole_has_ended(config: Config, tmp_path: Path) -> None:
    registry = Workspace(config, Progress()).registry
    files = str(tmp_path / "model")
    (tmp_path / "model").mkdir()
    with pytest.raises(MlflowException):  # in the middle
        registry.log_run("a", "content", {}, {"no name for a metric!": 1.0}, [], files)
    run = registry.log_run("a", "content", {}, {"auc": 0.5}, [], files)
    assert run == registry.log_run("a", "content", {}, {"auc": 0.5}, [], files)
    experiment = registry.client.get_experiment_by_name(registry.name)
    runs = registry.client.search_runs([experiment.experiment_id])
    assert sorted(one.info.status for one in runs) == ["FINISHED", "KILLED"]
