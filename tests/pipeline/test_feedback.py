"""Late labels rebuild their own partition, once they are known, and nothing else."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable

from features.errors import CorankError
from features.schema import SECOND, partition_bounds
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.stages.cuts import cuts_from_scratch
from pipeline.stages.samples import FOREVER, SAMPLES, sample_source, trainable
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace, now_us
from tests.pipeline.workspaces import START, load

DAYS = ["2026-01-05", "2026-01-06"]
HOUR = 3_600 * SECOND


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_labels_make_a_partition_trainable_and_rebuild_only_it(tmp_path: Path, local_ray: None) -> None:
    data = tmp_path / "data"
    import_synthetic(data, days=2, users=40, items=40, seed=5, start=START, buckets=2, say=lambda _: None)
    shown = (
        pl.scan_delta(str(data / "impressions")).select("request_id", "item_id", "ts", "dt").collect().sort("dt", "ts")
    )
    feedback = shown.head(5).with_columns(pl.lit("liked").alias("label"), pl.lit(1).alias("value"))
    partitioned = {"partition_by": ["dt"]}
    feedback.write_delta(str(data / "feedback"), delta_write_options=partitioned)
    example = load(tmp_path, data)
    # the window of the first day has passed, that of the second ends in an hour
    window = (now_us() + HOUR - partition_bounds(DAYS[1], "day")[1]) / SECOND
    changes = {
        "tables": {**example.model_dump()["tables"], "feedback": {"path": str(data / "feedback")}},
        "tasks": [{"name": "click"}, {"name": "liked", "attribution_window_seconds": window}],
    }
    config = load(tmp_path, data, **changes)
    workspace = Workspace(config, Progress())
    VALIDATED.run(workspace, workspace.partitions)
    SAMPLES.run(workspace, SAMPLES.stale(workspace))
    assert trainable(workspace) == DAYS[:1]
    assert list(sample_source(workspace, 0, FOREVER).partitions) == DAYS[:1]

    def liked(day: str) -> list[int | None]:
        rows = pl.scan_delta(config.path("tables", "samples")).filter(pl.col("dt") == day).collect()
        candidates = rows["requests"].explode().struct.field("candidates").explode()
        return candidates.struct.field("label__liked").to_list()

    assert set(liked(DAYS[1])) == {None}
    assert liked(DAYS[0]).count(1) == 5
    version = DeltaTable(config.path("tables", "samples")).version()
    late = shown.filter(pl.col("dt") == DAYS[0]).tail(3)
    late = late.with_columns(pl.lit("liked").alias("label"), pl.lit(1).alias("value"), ts=pl.col("ts") + 1)
    late.write_delta(str(data / "feedback"), mode="append")
    again = Workspace(config, Progress())
    assert VALIDATED.stale(again) == []
    assert SAMPLES.stale(again) == DAYS[:1]
    before = set(liked(DAYS[1]))
    SAMPLES.run(again, SAMPLES.stale(again))
    assert SAMPLES.stale(Workspace(config, Progress())) == []
    assert DeltaTable(config.path("tables", "samples")).version() == version + 1
    assert liked(DAYS[0]).count(1) == 8
    assert set(liked(DAYS[1])) == before

    waiting = load(
        tmp_path, data, **{**changes, "tasks": [{"name": "liked", "attribution_window_seconds": 10 * 365 * 86_400.0}]}
    )
    with pytest.raises(CorankError, match="no partition can be trained on yet"):
        cuts_from_scratch(Workspace(waiting, Progress()))
