"""The commands ``corank features …`` on a workspace whose samples are built, and on a fresh one."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from features.delta.write import replace_partition, write_file
from features.errors import ConfigError
from features.sample_table import sample_schema
from pipeline.commands.features import _print_registry
from pipeline.config import load_config
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.stages.feature_store import FEATURE_STORE, online_record, store_settings
from pipeline.stages.samples import SAMPLES, build_settings
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace
from tests.pipeline.commands import corank
from tests.pipeline.workspaces import START, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
DAYS = ["2026-01-05", "2026-01-06"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "data"
    import_synthetic(folder, days=2, users=40, items=40, seed=4, start=START, buckets=2, say=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def config(data: Path, local_ray: None) -> Path:
    """A workspace after the stages validated and samples of two days."""
    path = write_config(data.parent, data)
    workspace = Workspace(load_config(path), Progress())
    VALIDATED.run(workspace, DAYS)
    SAMPLES.run(workspace, DAYS)
    return path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["list"], "nothing is registered"),
        (["materialize"], "2 of 2 partitions are not built"),
        (["stats"], "no samples are built"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_fresh_workspace_is_told_what_to_run(tmp_path: Path, data: Path, command: list[str], message: str) -> None:
    done = corank("features", *command, "--config", str(write_config(tmp_path, data)))
    assert done.exit_code == 1, done.stderr
    assert message in done.stderr
    assert "corank run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work" / "feast").exists()  # looking creates nothing


def test_features_are_registered_materialized_once_and_listed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    applied = corank("features", "apply", "--config", str(config))
    assert applied.exit_code == 0, applied.stderr
    workspace = Workspace(load_config(config), Progress())
    _print_registry(store_settings(workspace))
    before = capsys.readouterr().out
    for part in ("user_sequences_watched", "watched__duration", "list of float32", "ranking:", "joined on user_id"):
        assert part in before
    assert "not online yet" in before

    first = corank("features", "materialize", "--until", DAYS[0], "--config", str(config))
    assert first.exit_code == 0, first.stderr
    assert FEATURE_STORE.stale(workspace) == [DAYS[1]]
    rest = corank("features", "materialize", "--config", str(config))
    assert rest.exit_code == 0, rest.stderr
    written = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in rest.stdout.splitlines()}
    assert written == online_record(workspace).rows
    assert FEATURE_STORE.stale(workspace) == []
    again = corank("features", "materialize", "--config", str(config))
    assert "Nothing to do" in again.stdout
    _print_registry(store_settings(workspace))
    assert "online up to 2026-01-07 00:00:00 UTC" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"already holds partitions up to {DAYS[1]}"):
        FEATURE_STORE.run(workspace, DAYS[:1])


def test_stats_and_export_count_the_candidates_of_the_log(config: Path, data: Path, tmp_path: Path) -> None:
    shown = pl.read_delta(str(data / "impressions")).filter(pl.col("dt") == DAYS[1]).height
    chosen = ["--partition", DAYS[1], "--config", str(config)]
    counted = corank("features", "stats", "--json", *chosen)
    assert counted.exit_code == 0, counted.stderr
    figures = json.loads(counted.stdout)
    assert figures["partitions"] == [DAYS[1]]
    assert figures["candidates"] == shown
    assert figures["bytes"]["flattened_arrow_computed"] > figures["bytes"]["sample_arrow"]

    target = tmp_path / "flat"
    exported = corank("features", "export", "--target", str(target), *chosen)
    assert exported.exit_code == 0, exported.stderr
    assert f"{shown:,} candidates in = {shown:,} rows out" in exported.stderr
    assert "as samples" in exported.stdout
    assert pl.scan_parquet(target / "**/*.parquet").select(pl.len()).collect().item() == shown
    unknown = corank("features", "export", "--target", str(target), "-p", "2030-01-01", "--config", str(config))
    assert unknown.exit_code == 2
    assert "--partition 2030-01-01" in unknown.stderr


def test_skew_exits_with_1_where_samples_and_store_differ_and_names_the_feature(config: Path) -> None:
    """Last of this module: it spoils the samples."""
    command = ("features", "skew", "--config", str(config), "--partition", DAYS[1], "--requests", "20")
    equal = corank(*command)
    assert equal.exit_code == 0, equal.stderr
    samples = build_settings(Workspace(load_config(config), Progress())).table("samples")
    rows = samples.scan([DAYS[1]]).collect()
    spoiled = rows.with_columns(pl.col("watched__duration").list.eval(pl.element() + 1)).to_arrow()
    schema = sample_schema(load_config(config).schema_)
    layout = pa.schema([one for one in schema if one.name not in ("dt", "bucket")])
    file = write_file(samples.uri, spoiled.select(layout.names).cast(layout), {"dt": DAYS[1], "bucket": "0"}, {})
    replace_partition(samples.uri, DAYS[1], [file], schema, {})
    differing = corank(*command)
    assert differing.exit_code == 1, differing.stderr
    assert f"skew, partition {DAYS[1]}" in differing.stderr
    assert "more than --threshold 0.0000%" in differing.stderr
    (line,) = [line for line in differing.stdout.splitlines() if "watched.duration" in line]
    assert " 0.00%" not in line  # but for requests without a history
    assert corank(*command, "--threshold", "0.5").exit_code == 0
    unknown = corank("features", "skew", "--config", str(config), "--partition", "2026-02-01")
    assert unknown.exit_code == 1
    assert "partition 2026-02-01 has no samples of the present log and config" in unknown.stderr
