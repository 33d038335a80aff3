"""Partitions that hold events but no impressions are history, and partitions that are gone leave nothing behind."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from deltalake import DeltaTable

from features.store.online import FeatureStoreSettings, apply, materialize
from features.store.push import OnlineWriter
from features.store.reader import History, OnlineReader
from pipeline.config import Config
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.stages import pending
from pipeline.stages.feature_store import FEATURE_STORE, lost_partitions, online_record, store_settings
from pipeline.stages.samples import SAMPLES, build_settings
from pipeline.stages.stage import Stage
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace
from tests.pipeline.workspaces import START, load

DAYS = ["2026-01-05", "2026-01-06", "2026-01-07"]
TIMELINES = ("watched__ts", "watched__item_id", "searched__ts", "purchased__ts")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_events_before_the_first_impressions_are_seen_until_the_log_loses_them(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timelines = {}
    for name, together in (("whole", 32), ("late", 2)):
        monkeypatch.setattr("pipeline.stages.samples.RUN_PARTITIONS", together)
        data = tmp_path / name / "data"
        import_synthetic(data, days=3, users=40, items=40, seed=5, start=START, buckets=2, say=lambda _: None)
        if name == "late":
            DeltaTable(str(data / "impressions")).delete(f"dt = '{DAYS[0]}'")
        config = load(tmp_path / name, data)
        workspace = Workspace(config, Progress())
        assert workspace.partitions == DAYS
        VALIDATED.run(workspace, VALIDATED.stale(workspace))
        SAMPLES.run(workspace, SAMPLES.stale(workspace))
        samples = build_settings(workspace).table("samples")
        rows = samples.scan(DAYS[1:]).select("dt", "user_id", *TIMELINES).collect().sort("dt", "user_id")
        timelines[name] = rows.to_dicts()
        assert rows["watched__ts"].list.len().sum() > 0
    assert timelines["late"] == timelines["whole"]
    assert samples.partitions() == DAYS[1:]
    for table in ("watches", "searches", "purchases"):
        DeltaTable(str(data / table)).delete(f"dt = '{DAYS[0]}'")
    shorter = Workspace(config, Progress())
    assert shorter.partitions == DAYS[1:]
    VALIDATED.run(shorter, VALIDATED.stale(shorter))
    SAMPLES.run(shorter, SAMPLES.stale(shorter))
    FEATURE_STORE.run(shorter, FEATURE_STORE.stale(shorter))
    for name in ("state", "user_aggregates", "item_aggregates"):
        assert build_settings(shorter).table(name).partitions() == DAYS[1:]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_of_a_partition_that_the_log_lost_nothing_stays_online(tmp_path: Path, local_ray: None) -> None:
    aggregates_delay = 2 * 86_400  # so that counts of what is lost are still to become known
    data, late = tmp_path / "data", "2026-01-08"
    import_synthetic(data, days=4, users=40, items=40, seed=5, start=START, buckets=2, say=lambda _: None)
    config = load(
        tmp_path, data, validation={"allow_gaps": True}, aggregates_delay_seconds=aggregates_delay, log_delay_seconds=0
    )
    fill(config, until=DAYS[2])
    close = Workspace(config, Progress()).log.bounds(late)[1]
    pushed = config.table("watches").scan([late]).head(1).collect().with_columns(ts=pl.lit(close), event_id=pl.lit("p"))
    writer = OnlineWriter(store_settings(Workspace(config, Progress())))
    assert writer.push(pushed, "watches")["watched"] == 1
    for gone, left in ((DAYS[2], [*DAYS[:2], late]), (late, DAYS[:2])):
        lose(config, gone)
        workspace = fill(config)
        assert workspace.partitions == left
        assert online_record(workspace).close == workspace.log.bounds(left[-1])[1] + aggregates_delay * 1_000_000
        assert_as_fresh(workspace, tmp_path / gone, pushed)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("aggregates_delay", "until"), [(0, None), (2 * 86_400, "2026-01-08")])
def test_however_the_store_was_filled_it_is_as_one_filled_at_once(
    tmp_path: Path, local_ray: None, aggregates_delay: int, until: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third day is missing, but a profile is of it; counts may become known after the next partition's close."""
    data, late = tmp_path / "data", "2026-01-08"
    import_synthetic(data, days=4, users=40, items=40, seed=5, start=START, buckets=2, say=lambda _: None)
    config = load(
        tmp_path, data, validation={"allow_gaps": True}, aggregates_delay_seconds=aggregates_delay, log_delay_seconds=0
    )
    lose(config, DAYS[2])
    workspace = Workspace(config, Progress())
    items = config.table("items")
    profile = items.scan().sort("item_id", "updated_at").tail(1).collect()
    moment = workspace.log.bounds(DAYS[2])[0] + 3_600_000_000
    profile.with_columns(updated_at=pl.lit(moment), category=pl.lit("c7")).write_delta(items.uri, mode="append")
    workspace = Workspace(config, Progress())
    VALIDATED.run(workspace, VALIDATED.stale(workspace))
    SAMPLES.run(workspace, SAMPLES.stale(workspace))  # all of them, while the store follows

    earlier = Workspace(config, Progress(), until=DAYS[1])
    FEATURE_STORE.run(earlier, FEATURE_STORE.stale(earlier))
    assert_as_fresh(earlier, tmp_path / "earlier")

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "lineage", kill)  # before its record, after all is written
        with pytest.raises(Killed):
            FEATURE_STORE.run(workspace, FEATURE_STORE.stale(workspace))
    assert_as_fresh(workspace, tmp_path / "killed")
    lose(config, late)
    shorter = Workspace(config, Progress(), until)
    FEATURE_STORE.run(shorter, FEATURE_STORE.stale(shorter))
    assert_as_fresh(shorter, tmp_path / "lost")
    assert FEATURE_STORE.stale(shorter) == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_partition_of_events_alone_outlives_until_and_is_built_again_when_impressions_return(
    tmp_path: Path, local_ray: None
) -> None:
    data = tmp_path / "data"
    import_synthetic(data, days=3, users=40, items=40, seed=5, start=START, buckets=2, say=lambda _: None)
    DeltaTable(str(data / "impressions")).delete(f"dt = '{DAYS[1]}'")
    config = load(tmp_path, data, validation={"allow_gaps": True})
    workspace = fill(config)
    assert workspace.partitions == DAYS
    tables = [build_settings(workspace).table(name) for name in ("samples", "state", "user_aggregates")]
    before = [table.scan().collect().sort("dt", "user_id").to_dicts() for table in tables]
    earlier = Workspace(config, Progress(), until=DAYS[1])
    assert earlier.partitions == DAYS[:1]
    assert lost_partitions(earlier, DAYS) == FEATURE_STORE.stale(earlier) == []

    impressions = config.table("impressions")
    rows = impressions.scan([DAYS[2]]).collect()
    impressions.delta().delete(f"dt = '{DAYS[2]}'")
    shorter = Workspace(config, Progress())
    assert shorter.partitions == DAYS[:1]
    FEATURE_STORE.run(shorter, FEATURE_STORE.stale(shorter))
    assert tables[1].partitions() == DAYS[:1]
    rows.write_delta(impressions.uri, mode="append")
    assert SAMPLES.stale(Workspace(config, Progress())) == DAYS[1:]
    fill(config)
    assert [table.scan().collect().sort("dt", "user_id").to_dicts() for table in tables] == before


def test_states_that_another_version_laid_out_otherwise_count_as_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    import_synthetic(data, days=2, users=10, items=10, seed=5, start=START, buckets=2, say=lambda _: None)
    config = load(tmp_path, data)
    workspace = Workspace(config, Progress())
    for day, inputs in SAMPLES.inputs(workspace).items():
        workspace.records.put("samples", day, {"inputs": inputs})
    assert Stage.stale(SAMPLES, Workspace(config, Progress())) == []
    monkeypatch.setattr("features.builder.states.LAYOUT", 0)
    assert Stage.stale(SAMPLES, Workspace(config, Progress())) == DAYS[:2]


def lose(config: Config, partition: str) -> None:
    for role in config.tables:
        if role not in ("users", "items"):
            DeltaTable(config.table(role).uri).delete(f"dt = '{partition}'")


def assert_as_fresh(workspace: Workspace, folder: Path, pushed: pl.DataFrame | None = None) -> None:
    """What is online is what a store holds that is filled for the first time, then pushed to."""
    own, close = store_settings(workspace), workspace.log.bounds(workspace.partitions[-1])[1]
    end = close + workspace.config.aggregates_delay
    fresh = replace(own, project="fresh", registry=f"{folder}/registry.db", sqlite_path=f"{folder}/online.db")
    apply(fresh)
    materialize(fresh, 0, end, close=close)
    if pushed is not None:
        OnlineWriter(fresh).push(pushed, "watches")
    np.testing.assert_equal(content(own, end), content(fresh, end))


def fill(config: Config, until: str | None = None) -> Workspace:
    workspace = Workspace(config, Progress(), until)
    VALIDATED.run(workspace, VALIDATED.stale(workspace))
    SAMPLES.run(workspace, SAMPLES.stale(workspace))
    assert FEATURE_STORE.stale(workspace)
    FEATURE_STORE.run(workspace, FEATURE_STORE.stale(workspace))
    assert not {"validated", "samples", "feature_store"} & set(pending(workspace))
    return workspace


def content(settings: FeatureStoreSettings, ts: int) -> dict[str, Any]:
    """Everything online about all users and items, as known at ``ts``."""
    reader = OnlineReader(settings)
    users, items = (
        sorted(set(table.scan().select(pl.col(key).cast(pl.String)).collect()[key]))
        for table, key in ((settings.users, "user_id"), (settings.items, "item_id"))
    )
    return {
        "items": reader.items(items, ts).to_dicts(),
        **{user: (_plain(reader.sequences(user)), reader.encoded_user(user, ts)) for user in users},
    }


def _plain(histories: dict[str, History]) -> dict[str, Any]:
    return {name: asdict(history) for name, history in histories.items()}
