"""The user's log at one moment: pinned versions, names of partitions, and reading it once more as a record names it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import polars as pl
import pytest

from features.errors import ConfigError, CorankError, DataGateError
from pipeline.config import Config, load_config
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.records import Records
from pipeline.stages.samples import SAMPLES, build_settings, state_inputs
from pipeline.workspace import Workspace, read_lineage
from pipeline.workspace.log import Log
from tests.pipeline.workspaces import START, load, write_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    import_synthetic(tmp_path / "data", days=2, users=20, items=20, seed=1, start=START, buckets=2, say=lambda _: None)
    return load(tmp_path, tmp_path / "data")


def append_late_rows(config: Config, role: str = "watches") -> int:
    """Late rows of the first day; returns how many."""
    table = config.table(role)
    late = table.scan([START]).collect().head(3).with_columns(pl.format("late-{}", "event_id").alias("event_id"))
    late.write_delta(table.uri, mode="append")
    return late.height


def test_profiles_that_were_restored_and_went_another_way_are_seen(config: Config, tmp_path: Path) -> None:
    table, backup = config.table("users"), tmp_path / "backup"
    shutil.copytree(table.uri, backup)

    def append(rows: int) -> tuple[int, str]:
        late = table.scan().collect().head(rows).with_columns(pl.lit(rows, pl.Int64).alias("updated_at"))
        late.write_delta(table.uri, mode="append")
        return table.delta().version(), Workspace(config, Progress()).log.fingerprint(START)["users"]

    version, before = append(1)
    assert Workspace(config, Progress()).log.fingerprint(START)["users"] == before
    shutil.rmtree(table.uri)
    shutil.copytree(backup, table.uri)
    again, after = append(3)
    assert again == version
    assert after != before


def test_what_is_written_meanwhile_belongs_to_the_next_run(config: Config) -> None:
    workspace = Workspace(config, Progress())
    fingerprints = workspace.log.fingerprint(START)
    rows = build_settings(workspace).tables["watches"].scan([START]).collect().height
    late = append_late_rows(config)
    for tables in (workspace.log.tables, build_settings(workspace).tables, build_settings(workspace).pinned().tables):
        assert tables["watches"].scan([START]).collect().height == rows
        assert tables["watches"].fingerprints()[START] == fingerprints["watches"]
    after = Workspace(config, Progress())
    assert build_settings(after).tables["watches"].scan([START]).collect().height == rows + late
    assert after.log.fingerprint(START)["watches"] != fingerprints["watches"]
    assert [state_inputs(after)[one] != state_inputs(workspace)[one] for one in after.partitions] == [True, True]


def test_a_records_lineage_reads_the_log_as_it_was(config: Config, tmp_path: Path) -> None:
    workspace = Workspace(config, Progress())
    record = tmp_path / "record.json"
    record.write_text(json.dumps(workspace.lineage()))
    append_late_rows(config)
    again = Workspace(config, Progress(), as_of=read_lineage(record))
    assert again.log.now == workspace.log.now
    assert state_inputs(again) == state_inputs(workspace)
    assert SAMPLES.inputs(again) == SAMPLES.inputs(workspace)
    assert state_inputs(Workspace(config, Progress())) != state_inputs(workspace)
    record.write_text("{}")
    with pytest.raises(ConfigError, match="names no versions of the tables"):
        read_lineage(record)


def test_partitions_that_no_grain_writes_are_errors_that_say_so(config: Config, tmp_path: Path) -> None:
    table = config.table("watches")
    renamed = table.scan().collect().with_columns(pl.col("dt").str.replace("-0", "-", literal=True).alias("dt"))
    renamed.write_delta(str(tmp_path / "renamed"), delta_write_options={"partition_by": ["dt", "bucket"]})
    content = {role: {"path": one.path} for role, one in config.tables.items()}
    content["watches"] = {"path": str(tmp_path / "renamed")}
    changed = load(tmp_path, tmp_path / "data", tables=content)
    with pytest.raises(DataGateError, match=r"table watches .* partition '2026-1-05' is not a day: it is written like"):
        Workspace(changed, Progress()).partitions  # noqa: B018 - reading it reads the log
    content["watches"]["partition"] = {"column": "ts"}  # type: ignore[assignment]
    cut = load(tmp_path, tmp_path / "data", tables=content)
    assert Workspace(cut, Progress()).partitions == Workspace(config, Progress()).partitions
    with pytest.raises(ConfigError, match="start: partition '2026-1-6' is not a day"):
        Workspace(load(tmp_path, tmp_path / "data", start="2026-1-6"), Progress()).partitions  # noqa: B018
    with pytest.raises(ConfigError, match="--until: partition '2026-1-6' is not a day"):
        Log(config, Workspace(config, Progress()).records, until="2026-1-6")


def test_scalars_of_a_config_mean_what_is_written(tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path / "data")
    text = path.read_text(encoding="utf-8")
    countries = (
        "\n- {name: land, side: context, kind: category, vocabulary: [DE, NO, 012, 1.10, größe, yes, NULL, true]}"
    )
    path.write_text(text.replace("features:", f"start: 2026-01-05\nfeatures:{countries}", 1), encoding="utf-8")
    config = load_config(path)
    assert config.features[0].vocabulary == ("DE", "NO", "012", "1.10", "größe", "yes", "NULL", "true")
    assert config.start == "2026-01-05"
    path.write_bytes(text.encode() + "# größe".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_config(path)


@pytest.mark.parametrize("folder", ["a\\b", "a%20b"])
def test_a_path_that_deltas_library_cannot_open_is_refused_at_once(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ConfigError, match="rename that folder"):
        load(tmp_path, tmp_path / "data", workspace=str(tmp_path / folder))


def test_a_damaged_record_is_named_with_what_to_do(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "records"))
    records.put("samples", START, {"inputs": "a"})
    path = tmp_path / "records" / "samples" / f"{START}.json"
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert (records.get("samples", START) or {})["inputs"] == "a"
    for content in (b"", path.read_bytes()[:-5], b"[1]"):
        path.write_bytes(content)
        with pytest.raises(CorankError, match=rf"record {re.escape(str(path))} is damaged .* `corank repair`"):
            records.get("samples", START)
