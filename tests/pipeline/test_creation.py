"""Databases that MLflow and Dagster make step by step: half-made ones brick nothing, and two at once make one."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from features.errors import CorankError
from pipeline.config import Config
from pipeline.dag import FORMER_SETTINGS, SETTINGS, open_instance
from pipeline.workspace.registry import ModelRegistry, local_database
from tests.pipeline.workspaces import load


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(tmp_path, tmp_path / "data")


def half_made(config: Config, folder: Path) -> Path:
    """As a kill during the migrations leaves it: not all tables, and the version of an early one.

    Made in another folder, as MLflow keeps its connections to a database by name.
    """
    local_database(folder)
    path = config.local_path("mlflow", "mlflow.db")
    path.parent.mkdir(parents=True)
    (folder / "mlflow.db").rename(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("drop table registered_model_aliases")
        database.execute("update alembic_version set version_num = '451aebb31d03'")
        database.execute("pragma application_id = 0")
    return path


def test_a_half_made_registry_is_made_again(config: Config, tmp_path: Path) -> None:
    half_made(config, tmp_path)
    assert ModelRegistry(config).versions() == []


def test_an_empty_registry_is_made_again(config: Config) -> None:
    path = config.local_path("mlflow", "mlflow.db")
    path.parent.mkdir(parents=True)
    path.touch()
    assert ModelRegistry(config).versions() == []


def test_a_registry_with_content_that_cannot_be_opened_is_named_and_kept(config: Config, tmp_path: Path) -> None:
    path = half_made(config, tmp_path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("insert into runs (run_uuid, name) values ('1', 'a run')")
    before = path.read_bytes()
    with pytest.raises(CorankError, match=r"MLflow's database .*mlflow.db cannot be opened"):
        ModelRegistry(config)
    assert path.read_bytes() == before
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(CorankError, match=r"mlflow.db is no SQLite database. Restore it .* `corank repair`"):
        ModelRegistry(config)


@pytest.mark.timeout(120)
def test_two_first_commands_at_once_make_one_registry(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, pipeline.workspace.registry as one; print(one.local_database(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    two = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=100)[0].strip().splitlines()[-1] for one in two]
    assert [one.returncode for one in two] == [0, 0]
    assert said == [local_database(tmp_path)] * 2


def test_what_a_user_sets_in_dagsters_settings_stays_and_those_of_before_are_brought_up_to_date(
    config: Config,
) -> None:
    path = config.local_path("dagster", "dagster.yaml")
    own = f"{SETTINGS}code_servers:\n  wait_for_local_processes_on_shutdown: true\n"
    for before, after in ((FORMER_SETTINGS, SETTINGS), (own, own)):
        open_instance(config).dispose()
        path.write_text(before)
        open_instance(config).dispose()
        assert path.read_text() == after


def test_dagsters_history_that_cannot_be_opened_is_set_aside(config: Config) -> None:
    with open_instance(config) as instance:
        assert instance.get_runs() == []
    home = config.local_path("dagster")
    half = home / "history" / "runs.db"
    assert half.is_file()
    half.write_bytes(b"no database at all" * 100)
    with open_instance(config) as instance:
        assert instance.get_runs() == []
    assert (home.with_name("dagster.damaged") / "history" / "runs.db").is_file()
    shutil.rmtree(home)
    home.write_text("a file where the folder goes", encoding="utf-8")
    with open_instance(config) as instance:
        assert instance.get_runs() == []
    assert home.with_name("dagster.damaged").is_file()


@pytest.mark.parametrize("folder", ["what?", "100% größe #1", "[v2] x^y|z*"])
def test_databases_lie_below_any_path(tmp_path: Path, folder: str) -> None:
    config = load(tmp_path / folder, tmp_path / "data")
    assert ModelRegistry(config).versions() == []
    with open_instance(config) as instance:
        assert instance.get_runs() == []
    assert config.local_path("mlflow", "mlflow.db").is_file()
    assert config.local_path("dagster", "history", "runs.db").is_file()


def test_a_training_is_shown_while_it_goes_on_and_a_killed_one_is_closed(config: Config) -> None:
    registry = ModelRegistry(config)

    def runs() -> dict[str, list[float]]:
        experiment = registry.client.get_experiment_by_name(registry.name)
        assert experiment is not None
        found = registry.client.search_runs([experiment.experiment_id], "tags.job = 'a'", order_by=["start_time"])
        return {
            f"{number} {run.info.status}": [
                metric.value for metric in registry.client.get_metric_history(run.info.run_id, "train/click_loss")
            ]
            for number, run in enumerate(found)
        }

    killed = registry.training("a")
    log = killed.__enter__()
    log(10, {"train/click_loss": 0.7})
    log(20, {"train/click_loss": 0.6})
    assert runs() == {"0 RUNNING": [0.7, 0.6]}
    with registry.training("a") as log:
        log(10, {"train/click_loss": 0.5})
    assert runs() == {"0 KILLED": [0.7, 0.6], "1 FINISHED": [0.5]}
    with pytest.raises(KeyboardInterrupt), registry.training("a"):
        raise KeyboardInterrupt
    assert "2 FAILED" in runs()
