"""Partitions that hold events but no impressions are history, and partitions that are gone leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import DeltaTable

from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.stages import Pipeline
from tests.pipeline.workspaces import START, load

DAYS = ["2026-01-05", "2026-01-06", "2026-01-07"]
TIMELINES = ("watched__ts", "watched__item_id", "searched__ts", "purchased__ts")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_events_before_the_first_impressions_are_seen_until_the_log_loses_them(tmp_path: Path, local_ray: None) -> None:
    timelines = {}
    for name in ("whole", "late"):
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
    for name in ("state", "user_aggregates", "item_aggregates"):
        assert shorter.build_settings().table(name).partitions() == DAYS[1:]
