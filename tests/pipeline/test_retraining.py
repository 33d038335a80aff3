"""What a retraining does next, on a workspace whose data stages are real and whose versions are only registered."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

import pipeline.workspace.log
from features.schema import SECOND, partition_bounds
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.retraining import Retraining, next_retraining
from pipeline.stages import pending
from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.deployment import CURRENT, DEPLOYMENT
from pipeline.stages.evaluation import EVALUATION
from pipeline.stages.feature_store import FEATURE_STORE
from pipeline.stages.samples import SAMPLES, trainable
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace, now_us
from tests.pipeline.workspaces import START, load

DAYS = ["2026-01-05", "2026-01-06", "2026-01-07", "2026-01-08"]
HOUR = 3_600 * SECOND


def run_data_stages(step: Workspace) -> None:
    VALIDATED.run(step, VALIDATED.stale(step))
    SAMPLES.run(step, SAMPLES.stale(step))
    FEATURE_STORE.run(step, FEATURE_STORE.stale(step))


def register(trained: Workspace) -> None:
    """A version of what this workspace would train, with the records that its stages leave."""
    artifact = trained.config.local_path("models", "any")
    artifact.mkdir(parents=True, exist_ok=True)
    (artifact / "SHA256SUMS").write_text("")
    registry = trained.registry
    run = registry.log_run("run", CHALLENGER.key(trained), {}, {}, [], str(artifact))
    tags = {"partition": trained.partitions[-1], "trained": trainable(trained)[-1]}
    registry.promote(registry.register(str(artifact), run, tags).number)
    # as an earlier version called it
    trained.records.put("candidate", CHALLENGER.key(trained), {"artifact": str(artifact)})
    for stage in ("evaluation", "champion"):
        trained.records.put(stage, EVALUATION.key(trained), {})
    champion = registry.champion()
    assert champion is not None
    trained.records.put(
        "deployment", "current", {"inputs": DEPLOYMENT.inputs(trained)[CURRENT], "artifact": champion.artifact}
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_partitions_whose_labels_are_not_known_are_built_one_by_one_and_trained_on_when_they_are(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    import_synthetic(data, days=4, users=40, items=40, seed=5, start=START, buckets=2, say=lambda _: None)
    shown = pl.scan_delta(str(data / "impressions")).select("request_id", "item_id", "ts", "dt").collect().head(5)
    shown.with_columns(label=pl.lit("liked"), value=pl.lit(1)).write_delta(
        str(data / "feedback"), delta_write_options={"partition_by": ["dt"]}
    )
    tables = load(tmp_path, data).model_dump()["tables"] | {"feedback": {"path": str(data / "feedback")}}
    # the windows of two days have passed, that of the third ends in an hour
    window = (now_us() + HOUR - partition_bounds(DAYS[2], "day")[1]) / SECOND
    tasks = [{"name": "click"}, {"name": "liked", "attribution_window_seconds": window}]
    config = load(tmp_path, data, tables=tables, tasks=tasks)
    first = Workspace(config, Progress(), DAYS[1])
    run_data_stages(first)
    register(first)

    def following() -> tuple[Retraining, str | None]:
        step = next_retraining(config)
        return step, step.workspace.until

    for day in DAYS[2:]:
        step, until = following()
        assert (step.training, until) == (False, day)
        run_data_stages(step.workspace)
        assert pending(step.workspace, step.training) == []
    step, _ = following()
    assert step.says.startswith("Nothing to train")
    assert pending(step.workspace, step.training) == []

    watches = config.table("watches")
    late = watches.scan([DAYS[0]]).head(1).collect().with_columns(event_id=pl.lit("late"))
    late.write_delta(watches.uri, mode="append")
    step, until = following()
    assert (step.training, until) == (False, DAYS[2])
    assert pending(step.workspace, step.training)[:2] == ["validated", "samples"]

    monkeypatch.setattr(pipeline.workspace.log, "now_us", lambda: now_us() + 2 * HOUR)
    step, until = following()
    assert (step.training, until) == (True, DAYS[2])
    assert "challenger" in pending(step.workspace)
