"""Every damaged piece of a workspace is named and mended, and the next run ends as if nothing had been damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from features.delta.table import Table
from features.errors import CorankError
from features.store.reader import OnlineReader
from models.artifact import load_artifact
from pipeline.config import Config
from pipeline.dag import open_instance
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.repair import Damage, repair
from pipeline.stages import STAGES, pending
from pipeline.stages.feature_store import require_store, store_settings
from pipeline.workspace import Workspace
from pipeline.workspace.registry import CHAMPION as CHAMPION_ALIAS
from pipeline.workspace.registry import PREVIOUS, forget_connections
from tests.damages import empty, flip, halve, lose, overwrite
from tests.pipeline.workspaces import START, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
DAYS = [START, "2026-01-06", "2026-01-07"]
USERS = [f"u{number}" for number in range(5)]


def advance(config: Config, until: str) -> Workspace:
    """All stages but the deployment, where they have work."""
    workspace = Workspace(config, Progress(), until, warm_start=until != DAYS[1])
    for stage in STAGES[:-1]:
        if parts := stage.stale(workspace):
            stage.run(workspace, parts)
    return workspace


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Config:
    """A version made of two days, and a second one after the third."""
    folder = tmp_path_factory.mktemp("repair")
    import_synthetic(folder / "data", days=3, users=60, items=50, seed=1, start=START, buckets=2, say=lambda _: None)
    config = load(folder, folder / "data", training={"epochs": 1, "batch_candidates": 1_000, "num_workers": 0})
    with open_instance(config):
        pass
    advance(config, DAYS[1])
    advance(config, DAYS[2])
    return config


def opened(config: Config) -> Workspace:
    return Workspace(config, Progress(), DAYS[2], warm_start=True)


def the(config: Config, pattern: str) -> Path:
    """The last file of a pattern below the workspace."""
    return sorted(config.local_path().glob(pattern))[-1]


def rows_of(config: Config, table: str) -> Path:
    """The last of the files that hold a table's rows now; those that were replaced lie beside them for a while."""
    files = Table(table, config.path("tables", table)).data_files(None)
    return config.local_path() / "tables" / table / max(path for path, _, _ in files)


def outcome(config: Config) -> dict[str, Any]:
    workspace = opened(config)
    owners = {"samples": "user_id", "state": "user_id", "user_aggregates": "user_id", "item_aggregates": "item_id"}
    tables = {name: Table(name, config.path("tables", name)).scan().collect() for name in owners}
    reader = OnlineReader(store_settings(workspace))
    return {
        "versions": [(one.number, one.aliases, one.artifact, one.tags) for one in workspace.registry.versions()],
        **{name: rows.sort("dt", owners[name]).to_dicts() for name, rows in tables.items()},
        "online": [reader.user(user) for user in USERS],
    }


def named(found: list[Damage]) -> set[str]:
    return {damage.file for damage in found}


def test_nothing_is_damaged_in_what_the_stages_made(config: Config) -> None:
    assert repair(opened(config), only_check=True) == []
    assert set(pending(opened(config))) <= {"deployment"}


def test_a_damaged_file_of_every_kind_is_named_and_mended_and_the_next_run_ends_the_same(config: Config) -> None:
    before = outcome(config)
    damages = {
        the(config, "records/samples/*.json"): flip,
        the(config, "records/types/*.json"): empty,
        rows_of(config, "samples"): flip,
        rows_of(config, "state"): halve,
        rows_of(config, "user_aggregates"): lose,
        the(config, "tables/item_aggregates/_delta_log/*.json"): halve,
        the(config, "models/*/model.safetensors"): flip,
        the(config, "checkpoints/*/*/state.pt"): flip,
        the(config, "feast/registry.db"): empty,
        the(config, "feast/online.db"): lose,
        the(config, "dagster/history/runs.db"): overwrite,
        the(config, "great_expectations/gx/expectations/*.json"): halve,
    }
    for path, damage in damages.items():
        damage(path)
    found = repair(opened(config))
    assert len(found) == len(damages)
    assert all({str(path), str(path.parent)} & named(found) for path in damages)
    assert all(damage.mend for damage in found)
    advance(config, DAYS[2])
    assert repair(opened(config), only_check=True) == []
    assert outcome(config) == before


def test_a_run_makes_again_what_is_lost_without_being_asked(config: Config) -> None:
    before = outcome(config)
    halve(rows_of(config, "samples"))
    lose(rows_of(config, "state"))
    empty(the(config, "feast/registry.db"))
    lose(the(config, "feast/online.db"))
    workspace = opened(config)
    with pytest.raises(CorankError, match=r"feature store is damaged: .*registry.db is empty.*online.db is missing"):
        require_store(workspace)
    assert pending(workspace)[:2] == ["samples", "feature_store"]
    advance(config, DAYS[2])
    assert set(pending(opened(config))) <= {"deployment"}
    require_store(workspace)
    assert outcome(config) == before


@pytest.mark.parametrize("damage", [empty, overwrite, lose])
def test_a_lost_model_registry_is_registered_again_from_records_and_artifacts(config: Config, damage: Any) -> None:
    before = outcome(config)["versions"]
    damage(the(config, "mlflow/mlflow.db"))
    forget_connections()  # of this process; a command has none yet
    repair(opened(config))
    assert outcome(config)["versions"] == before


def test_a_model_that_nothing_restores_is_dropped_for_the_one_before_and_trained_again(config: Config) -> None:
    registry = opened(config).registry
    champion, previous = registry.champion(), registry.champion(PREVIOUS)
    assert champion is not None
    assert previous is not None
    scores = load_artifact(champion.artifact).version
    for path in [Path(champion.artifact), *config.local_path("mlflow", "artifacts").glob(f"{champion.run}/*/model")]:
        flip(path / "model.safetensors")
    found = repair(opened(config))
    (dropped,) = [one for one in found if one.file == champion.artifact]
    assert dropped.holds == f"model version {champion.number} ({CHAMPION_ALIAS})"
    assert f"version {previous.number} is champion again" in dropped.remedy
    current = opened(config).registry.champion()
    assert current is not None
    assert current.number == previous.number
    assert pending(opened(config))[:4] == ["challenger", "evaluation", "refit", "champion"]
    advance(config, DAYS[2])
    trained = opened(config).registry.champion()
    assert trained is not None
    assert load_artifact(trained.artifact).version == scores
    assert trained.number == champion.number + 1
