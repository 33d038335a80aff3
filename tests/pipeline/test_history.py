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
from pipeline.stages import Pipeline
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
        monkeypatch.setattr("pipeline.data_stages.RUN_PARTITIONS", together)
        data = tmp_path / name / "data"
        import_synthetic(data, days=3, users=40, items=40, seed=5, start=START, buckets=2, say=lambda _: None)
        if name == "late":
            DeltaTable(str(data / "impressions")).delete(f"dt = '{DAYS[0]}'")
        config = load(tmp_path / name, data)
        pipeline = Pipeline(config, Progress())
        assert pipeline.partitions == DAYS
        pipeline.validate(pipeline.stale_validation())
        pipeline.build_samples(pipeline.stale_samples())
        samples = pipeline.build_settings().table("samples")
        rows = samples.scan(DAYS[1:]).select("dt", "user_id", *TIMELINES).collect().sort("dt", "user_id")
        timelines[name] = rows.to_dicts()
        assert rows["watched__ts"].list.len().sum() > 0
    assert timelines["late"] == timelines["whole"]
    assert samples.partitions() == DAYS[1:]
    for table in ("watches", "searches", "purchases"):
        DeltaTable(str(data / table)).delete(f"dt = '{DAYS[0]}'")
    shorter = Pipeline(config, Progress())
    assert shorter.partitions == DAYS[1:]
    shorter.validate(shorter.stale_validation())
    shorter.build_samples(shorter.stale_samples())
    shorter.fill_store(shorter.stale_store())
    for name in ("state", "user_aggregates", "item_aggregates"):
        assert shorter.build_settings().table(name).partitions() == DAYS[1:]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("aggregates_delay", [0, 2 * 86_400])
def test_of_a_partition_that_the_log_lost_nothing_stays_online(
    tmp_path: Path, local_ray: None, aggregates_delay: int
) -> None:
    data, late = tmp_path / "data", "2026-01-08"
    import_synthetic(data, days=4, users=40, items=40, seed=5, start=START, buckets=2, say=lambda _: None)
    config = load(
        tmp_path, data, validation={"allow_gaps": True}, aggregates_delay_seconds=aggregates_delay, log_delay_seconds=0
    )
    fill(config, until=DAYS[2])
    close = Pipeline(config, Progress()).log.bounds(late)[1]
    pushed = config.table("watches").scan([late]).head(1).collect().with_columns(ts=pl.lit(close), event_id=pl.lit("p"))
    writer = OnlineWriter(Pipeline(config, Progress()).store_settings())
    assert writer.push(pushed, "watches")["watched"] == 1
    for gone, left in ((DAYS[2], [*DAYS[:2], late]), (late, DAYS[:2])):
        lose(config, gone)
        pipeline = fill(config)
        assert pipeline.partitions == left
        assert pipeline.store_close() == pipeline.log.bounds(left[-1])[1] + aggregates_delay * 1_000_000
        assert_as_fresh(pipeline, tmp_path / gone, pushed)


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
    pipeline = Pipeline(config, Progress())
    items = config.table("items")
    profile = items.scan().sort("item_id", "updated_at").tail(1).collect()
    moment = pipeline.log.bounds(DAYS[2])[0] + 3_600_000_000
    profile.with_columns(updated_at=pl.lit(moment), category=pl.lit("c7")).write_delta(items.uri, mode="append")
    pipeline = Pipeline(config, Progress())
    pipeline.validate(pipeline.stale_validation())
    pipeline.build_samples(pipeline.stale_samples())  # all of them, while the store follows

    earlier = Pipeline(config, Progress(), until=DAYS[1])
    earlier.fill_store(earlier.stale_store())
    assert_as_fresh(earlier, tmp_path / "earlier")

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "lineage", kill)  # before its record, after all is written
        with pytest.raises(Killed):
            pipeline.fill_store(pipeline.stale_store())
    assert_as_fresh(pipeline, tmp_path / "killed")
    lose(config, late)
    shorter = Pipeline(config, Progress(), until)
    shorter.fill_store(shorter.stale_store())
    assert_as_fresh(shorter, tmp_path / "lost")
    assert shorter.stale_store() == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_partition_of_events_alone_outlives_until_and_is_built_again_when_impressions_return(
    tmp_path: Path, local_ray: None
) -> None:
    data = tmp_path / "data"
    import_synthetic(data, days=3, users=40, items=40, seed=5, start=START, buckets=2, say=lambda _: None)
    DeltaTable(str(data / "impressions")).delete(f"dt = '{DAYS[1]}'")
    config = load(tmp_path, data, validation={"allow_gaps": True})
    pipeline = fill(config)
    assert pipeline.partitions == DAYS
    tables = [pipeline.build_settings().table(name) for name in ("samples", "state", "user_aggregates")]
    before = [table.scan().collect().sort("dt", "user_id").to_dicts() for table in tables]
    earlier = Pipeline(config, Progress(), until=DAYS[1])
    assert earlier.partitions == DAYS[:1]
    assert earlier.gone(DAYS) == earlier.stale_store() == []

    impressions = config.table("impressions")
    rows = impressions.scan([DAYS[2]]).collect()
    impressions.delta().delete(f"dt = '{DAYS[2]}'")
    shorter = Pipeline(config, Progress())
    assert shorter.partitions == DAYS[:1]
    shorter.fill_store(shorter.stale_store())
    assert tables[1].partitions() == DAYS[:1]
    rows.write_delta(impressions.uri, mode="append")
    assert Pipeline(config, Progress()).stale_samples() == DAYS[1:]
    fill(config)
    assert [table.scan().collect().sort("dt", "user_id").to_dicts() for table in tables] == before


def test_states_that_another_version_laid_out_otherwise_count_as_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    import_synthetic(data, days=2, users=10, items=10, seed=5, start=START, buckets=2, say=lambda _: None)
    config = load(tmp_path, data)
    pipeline = Pipeline(config, Progress())
    for day, inputs in pipeline.sample_inputs.items():
        pipeline.records.put("samples", day, {"inputs": inputs})
    assert Pipeline(config, Progress()).stale_samples() == []
    monkeypatch.setattr("features.builder.states.LAYOUT", 0)
    assert Pipeline(config, Progress()).stale_samples() == DAYS[:2]


def lose(config: Config, partition: str) -> None:
    for role in config.tables:
        if role not in ("users", "items"):
            DeltaTable(config.table(role).uri).delete(f"dt = '{partition}'")


def assert_as_fresh(pipeline: Pipeline, folder: Path, pushed: pl.DataFrame | None = None) -> None:
    """What is online is what a store holds that is filled for the first time, then pushed to."""
    own, close = pipeline.store_settings(), pipeline.log.bounds(pipeline.partitions[-1])[1]
    end = close + pipeline.config.aggregates_delay
    fresh = replace(own, project="fresh", registry=f"{folder}/registry.db", sqlite_path=f"{folder}/online.db")
    apply(fresh)
    materialize(fresh, 0, end, close=close)
    if pushed is not None:
        OnlineWriter(fresh).push(pushed, "watches")
    np.testing.assert_equal(content(own, end), content(fresh, end))


def fill(config: Config, until: str | None = None) -> Pipeline:
    pipeline = Pipeline(config, Progress(), until)
    pipeline.validate(pipeline.stale_validation())
    pipeline.build_samples(pipeline.stale_samples())
    assert pipeline.stale_store()
    pipeline.fill_store(pipeline.stale_store())
    assert not {"validated", "samples", "feature_store"} & set(pipeline.pending())
    return pipeline


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
