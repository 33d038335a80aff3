"""Upkeep of a workspace that the stages really built: forgetting users, retention, and what runs make of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable

from features.delta.maintenance import find_users
from features.delta.table import Table
from features.delta.write import append
from features.sample_table import candidate_counts, request_times
from features.store.reader import OnlineReader
from models.artifact import load_artifact
from pipeline.config import Config
from pipeline.importers.synthetic import import_synthetic
from pipeline.maintenance import (
    compact_tables,
    forget,
    forgotten_key,
    plan_retention,
    retain,
    samples_table,
    served_tables,
    update_sample_records,
    workspace_tables,
)
from pipeline.progress import Progress
from pipeline.stages import pending
from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.champion import CHAMPION
from pipeline.stages.cuts import cuts_from_scratch
from pipeline.stages.deployment import SERVED, SERVED_LOG, name_served
from pipeline.stages.evaluation import EVALUATION
from pipeline.stages.feature_store import FEATURE_STORE, store_settings
from pipeline.stages.refit import REFIT
from pipeline.stages.samples import FOREVER, SAMPLES, sample_source
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace
from pipeline.workspace.registry import PREVIOUS
from tests.pipeline.workspaces import LENIENT, START, load, make, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
DAYS = ["2026-01-05", "2026-01-06", "2026-01-07", "2026-01-08"]
COMMAND = [sys.executable, "-c", "from pipeline.cli import main; main()"]
CHANGES: dict[str, Any] = {
    "retention": {"partitions": 1},
    "training": {"epochs": 1, "batch_candidates": 1_000, "num_workers": 0},
    "evaluation": {
        **LENIENT,
        # so that a retraining begins inside a partition, and needs nothing older
        "refit": False,
    },
    "retraining": {"replay": 0},
}


def advance(config: Config, until: str) -> Workspace:
    """All stages but the deployment; from the second partition count on, starting from the champion."""
    workspace = Workspace(config, Progress(), until, warm_start=until != DAYS[1])
    VALIDATED.run(workspace, VALIDATED.stale(workspace))
    SAMPLES.run(workspace, SAMPLES.stale(workspace))
    FEATURE_STORE.run(workspace, FEATURE_STORE.stale(workspace))
    make(CHALLENGER, workspace)
    make(EVALUATION, workspace)
    make(REFIT, workspace)
    make(CHAMPION, workspace)
    return workspace


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Config:
    """Four days imported, the stages run over the first two."""
    folder = tmp_path_factory.mktemp("upkeep")
    import_synthetic(folder / "data", days=4, users=80, items=60, seed=1, start=START, buckets=2, say=lambda _: None)
    config = load(folder, folder / "data", **CHANGES)
    advance(config, DAYS[1])
    return config


def newest_files(table: Table) -> list[Path]:
    return sorted(Path(file.removeprefix("file://")) for file in table.delta().file_uris())


def counted(workspace: Workspace, day: str) -> dict[str, int]:
    source = sample_source(workspace, 0, FOREVER, (day,))
    counts = [candidate_counts(source.read(file)) for file in source.files()]
    return {name: sum(one[name] for one in counts) for name in ("requests", "candidates")}


def recorded(workspace: Workspace, day: str) -> dict[str, int]:
    record = workspace.records.require(SAMPLES, day)
    assert record.impressions == record.candidates + record.quarantined + record.forgotten
    return {"requests": record.requests, "candidates": record.candidates}


def test_a_forgotten_user_is_gone_and_no_stage_has_work_because_of_it(config: Config) -> None:
    workspace = Workspace(config, Progress(), DAYS[1])
    champion = workspace.registry.champion()
    assert champion is not None
    selfcheck = load_artifact(champion.artifact).metadata["selfcheck"]
    user, other = (row["user_id"] for row in selfcheck["rows"][:2])
    left, own = pending(workspace), DeltaTable(config.table("impressions").uri).version()
    update_sample_records(workspace, find_users(samples_table(workspace), [user]))  # a run killed before the commit
    name_served(workspace, champion)
    root, shown = config.path(SERVED_LOG), {"dt": "2026-01-05", "ts": 1, "user_id": [user, other], "item_id": "1"}
    for name in ("impressions", "requests", "events/events"):
        for _ in range(2):
            append(f"{root}/{name}", pl.DataFrame(shown).to_arrow(), {})
    (result,) = forget(workspace, [user])
    assert result.tables["served impressions"] == result.tables["served events"] == 2
    for table in served_tables(workspace):
        assert table.scan().collect()["user_id"].to_list() == [other] * 2
        assert sorted(Path(table.uri).rglob("*.parquet")) == newest_files(table)
    assert compact_tables(workspace, keep_hours=168)["served events"][1].files == 3  # two old ones may still be read
    assert (workspace.records.get(*SERVED) or {})["erased"] > 0  # a running service follows it
    assert {"samples", "state"} <= set(result.tables)
    assert result.online
    assert result.selfchecks
    for table in workspace_tables(workspace):
        assert find_users(table, [user]).rows == {}
        assert find_users(table, [other]).rows or table.name in ("quarantine", "item_aggregates")
    reader = OnlineReader(store_settings(workspace))
    assert reader.user(user) is None
    assert reader.user(other) is not None
    after = load_artifact(champion.artifact)  # checksums hold
    assert [row["user_id"] for row in after.metadata["selfcheck"]["rows"]] == [
        row["user_id"] for row in selfcheck["rows"] if row["user_id"] != user
    ]
    candidates = sum(len(one["candidates"]) for row in after.metadata["selfcheck"]["rows"] for one in row["requests"])
    assert len(after.metadata["selfcheck"]["scores"]) == candidates
    assert not [path for path in Path(config.path("models")).rglob("*.json") if user in path.read_text()]
    again = Workspace(config, Progress(), DAYS[1])
    assert pending(again) == left == ["deployment"]
    for day in DAYS[:2]:
        assert recorded(again, day) == counted(again, day)
    source = sample_source(again, 0, FOREVER)
    times = sorted(ts for file in source.files() for ts in request_times(source.read(file)))
    assert cuts_from_scratch(again).test == times[len(times) - round(0.1 * len(times))]
    assert result.remains["impressions"] > 0
    assert DeltaTable(config.table("impressions").uri).version() == own
    path = Path(config.path("records", "forgotten", f"{forgotten_key(user)}.json"))
    assert json.loads(path.read_text())["finished"]
    assert user not in path.read_text()
    (unknown,) = forget(again, [user])
    assert not unknown.found


def test_an_unknown_user_is_no_error_and_keeping_nothing_must_be_meant(config: Config) -> None:
    path = write_config(Path(config.workspace).parent, Path(config.tables["users"].path).parent, **CHANGES)

    def corank(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "features", *arguments, "--config", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    workspace = Workspace(config, Progress(), DAYS[1])
    for table in workspace_tables(workspace):  # as an earlier version of the table left them, somebody in them
        shutil.copy(newest_files(table)[0], Path(table.uri, "dt=2026-01-05", "old.parquet"))
    done = corank("forget", "nobody")
    for table in workspace_tables(workspace):
        assert sorted(Path(table.uri).rglob("*.parquet")) == newest_files(table)
    assert done.returncode == 0, done.stderr
    assert "user nobody: nothing was found" in done.stdout
    assert not Path(config.path("records", "forgotten", f"{forgotten_key('nobody')}.json")).exists()
    refused = corank("compact", "--keep-hours", "0")
    assert refused.returncode == 2
    assert "--remove-all-unreferenced" in refused.stderr


def test_retention_drops_what_no_live_model_was_made_from_and_training_goes_on(config: Config) -> None:
    """Last of this module: it moves the champion."""
    first = Workspace(config, Progress(), DAYS[1]).registry.champion()
    workspace = advance(config, DAYS[2])
    assert first is not None
    assert plan_retention(workspace).retired == []
    assert plan_retention(workspace).live[DAYS[0]] == first.number  # a rollback returns to it
    workspace.registry.client.delete_registered_model_alias(config.name, PREVIOUS)
    state_table = next(table for table in workspace_tables(workspace) if table.name == "state")
    state = state_table.scan().collect()
    assert retain(workspace).retired == DAYS[:1]
    samples = samples_table(workspace)
    assert samples.partitions() == DAYS[1:3]  # the second one is older than the newest too, but the champion's
    assert state_table.scan().collect().equals(state)
    after, version = Workspace(config, Progress(), DAYS[2]), DeltaTable(samples.uri).version()
    assert pending(after) == ["deployment"]
    assert retain(after).retired == []
    assert DeltaTable(samples.uri).version() == version
    later = advance(config, DAYS[3])
    assert samples.partitions() == DAYS[1:]
    champion = later.registry.champion()
    assert champion is not None
    assert champion.tags["partition"] == DAYS[3]
    assert DAYS[0] not in load_artifact(champion.artifact).metadata["lineage"]["partitions"]
    assert cuts_from_scratch(later).train == later.log.bounds(DAYS[1])[0]
