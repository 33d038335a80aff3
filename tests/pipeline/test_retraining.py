"""What a retraining does next, on a workspace whose data stages are real and whose versions are only registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

import pipeline.commands.run
import pipeline.workspace.log
from features.errors import CorankError
from features.schema import SECOND, partition_bounds
from pipeline.commands.run import _backfilled
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.retraining import Retraining, next_retraining
from pipeline.stages import pending
from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.deployment import CURRENT, DEPLOYMENT
from pipeline.stages.evaluation import EVALUATION
from pipeline.stages.feature_store import FEATURE_STORE
from pipeline.stages.progressive_validation import PROGRESSIVE_VALIDATION
from pipeline.stages.samples import SAMPLES, SamplesRecord, trainable
from pipeline.stages.validated import VALIDATED
from pipeline.training.settings import TooFewError
from pipeline.workspace import Workspace, now_us
from tests.pipeline.commands import corank
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
        assert step is not None
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


def test_what_is_taken_next_is_what_was_asked_for(tmp_path: Path) -> None:
    """A version covers the first of four days; nothing is built, so every step has work."""
    data = tmp_path / "data"
    import_synthetic(data, days=4, users=10, items=10, seed=5, start=START, buckets=2, say=lambda _: None)

    def step(retraining: dict[str, object] | None = None, **asked: Any) -> tuple[str | None, bool, bool] | None:
        found = next_retraining(load(tmp_path, data, retraining=retraining or {}), **asked)
        return None if found is None else (found.workspace.until, found.workspace.warm_start, found.training)

    def covers(partition: str, started_from: str) -> None:
        registry = Workspace(load(tmp_path, data), Progress()).registry
        artifact = tmp_path / f"artifact-{partition}-{started_from}"
        artifact.mkdir()
        run = registry.log_run(partition, artifact.name, {}, {}, [], str(artifact))
        tags = {"partition": partition, "trained": partition, "started from": started_from}
        registry.promote(registry.register(str(artifact), run, tags).number)

    covers(DAYS[0], "scratch")
    assert step() == (DAYS[1], True, True)
    assert step(together=True) == (DAYS[3], True, True)
    assert step(together=True, partition=DAYS[2]) == (DAYS[2], True, True)
    assert step(full=True) == (DAYS[3], False, True)
    assert step(full=True, partition=DAYS[1]) == (DAYS[1], False, True)
    # a partition with too few requests is left to the next one; after the last there is none
    assert step(passed_over=DAYS[1]) == (DAYS[2], True, True)
    assert step(passed_over=DAYS[3]) is None
    # from scratch after so many partitions since the last time
    assert step({"full_every": 2}) == (DAYS[1], True, True)
    covers(DAYS[1], "1")
    assert step({"full_every": 2}) == (DAYS[2], False, True)
    assert step({"full_every": 3}) == (DAYS[2], True, True)
    # all is covered, but by other rows than there are now
    covers(DAYS[3], "2")
    assert step() == (None, True, False)
    assert step({"late_rows": True}) == (None, False, True)


@pytest.mark.parametrize("asked", [[], ["--full"]], ids=["warm", "full"])
def test_a_partition_with_too_few_requests_is_taken_with_the_next_and_is_an_error_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    import_synthetic(tmp_path / "data", days=4, users=10, items=10, seed=5, start=START, buckets=2, say=lambda _: None)
    workspace = Workspace(load(tmp_path, tmp_path / "data"), Progress())
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    run = workspace.registry.log_run(DAYS[0], "one", {}, {}, [], str(artifact))
    tags = {"partition": DAYS[0], "trained": DAYS[0], "started from": "scratch"}
    workspace.registry.promote(workspace.registry.register(str(artifact), run, tags).number)
    taken = []

    def work(workspace: Workspace, serve: bool, training: bool) -> bool:
        taken.append((workspace.partitions[-1], training))
        raise TooFewError("5 requests are too few")

    monkeypatch.setattr(pipeline.commands.run, "_work", work)
    done = corank("retrain", "--config", str(tmp_path / "config.yaml"), *asked)
    if asked:
        assert done.exit_code == 1
        assert "5 requests are too few" in done.stderr
        assert taken == [(DAYS[3], True)]
    else:
        assert done.exit_code == 0
        assert taken == [(day, True) for day in DAYS[1:]]
        assert done.stdout.count("is passed over, the next one takes its requests along: 5 requests are too few") == 3


def test_a_backfill_names_partitions_exactly(tmp_path: Path) -> None:
    import_synthetic(tmp_path / "data", days=2, users=10, items=10, seed=5, start=START, buckets=2, say=lambda _: None)
    load(tmp_path, tmp_path / "data")
    for written in ("2026-01-1..2026-01-20", "2026-1-5..2026-01-09", "2026-01-05..2026-01-9"):
        done = corank("retrain", "--config", str(tmp_path / "config.yaml"), "--backfill", written)
        assert done.exit_code == 1
        assert f"--backfill {written}: partition" in done.stderr
        assert "is not a day: it is written like" in done.stderr


@pytest.mark.parametrize("written", ["", "..", "2026-01-05", "2026-01-06..2026-01-05", "2026-01-05.."])
def test_a_backfill_that_names_no_range_is_a_mistake(written: str) -> None:
    with pytest.raises(CorankError, match="write the first and the last partition"):
        _backfilled(written, None, "day")


def test_a_backfill_is_a_first_and_a_last_partition() -> None:
    assert _backfilled(f"{DAYS[0]}..{DAYS[2]}", None, "day") == (DAYS[0], DAYS[2])
    assert _backfilled(None, DAYS[1], "day") == (None, DAYS[1])
    with pytest.raises(CorankError, match="leave --partition out"):
        _backfilled(f"{DAYS[0]}..{DAYS[2]}", DAYS[1], "day")


def test_partitions_without_requests_are_not_scored(tmp_path: Path) -> None:
    """They hold events alone, or only rows that were set aside."""
    data = tmp_path / "data"
    import_synthetic(data, days=3, users=10, items=10, seed=5, start=START, buckets=2, say=lambda _: None)
    workspace = Workspace(load(tmp_path, data), Progress())
    registry = workspace.registry
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    run = registry.log_run("run", "content", {}, {}, [], str(artifact))
    registry.promote(registry.register(str(artifact), run, {"partition": DAYS[0], "trained": DAYS[0]}).number)
    assert list(PROGRESSIVE_VALIDATION.inputs(workspace)) == DAYS[1:3]
    workspace.records.write(SAMPLES, DAYS[1], SamplesRecord(requests=0))
    workspace.records.write(SAMPLES, DAYS[2], SamplesRecord(requests=1))
    assert list(PROGRESSIVE_VALIDATION.inputs(workspace)) == DAYS[2:3]
