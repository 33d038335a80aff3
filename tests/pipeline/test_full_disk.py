"""A full disk ends a command with what was to be written and what is free; with room, the same command goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from features.errors import NoSpaceError
from pipeline.importers.synthetic import import_synthetic
from pipeline.records import Records
from pipeline.training.checkpoints import Checkpoints
from pipeline.workspace.registry import local_database
from tests.disks import filled, small_disk
from tests.pipeline.commands import corank
from tests.pipeline.workspaces import START, write_config


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    try:
        with small_disk(tmp_path / "disk", megabytes=32) as mounted:
            yield mounted
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_checkpoint_for_which_there_is_no_room_is_named_with_its_size_and_does_not_count(disk: Path) -> None:
    checkpoints = Checkpoints(str(disk / "checkpoints"))
    checkpoints.save(1, {"weights": torch.zeros(10)})
    with (
        filled(disk, 100_000),
        pytest.raises(NoSpaceError, match=r"epoch-0002: No space left .* for 80[0-9],[0-9]* bytes"),
    ):
        checkpoints.save(2, {"weights": torch.zeros(200_000)})
    assert checkpoints.newest(lambda _: None) == 1
    checkpoints.save(2, {"weights": torch.zeros(200_000)})
    assert checkpoints.newest(lambda _: None) == 2


def test_a_record_for_which_there_is_no_room_leaves_the_one_before(disk: Path) -> None:
    records = Records(str(disk / "records"))
    records.put("log", "impressions", {"version": 1})
    with filled(disk, 0), pytest.raises(NoSpaceError, match=r"log/impressions.json: No space left .* bytes"):
        records.put("log", "impressions", {"version": "2" * 10_000})
    assert (records.get("log", "impressions") or {})["version"] == 1


def test_a_registry_for_which_there_is_no_room_is_not_half_made(disk: Path) -> None:
    with filled(disk, 200_000), pytest.raises(NoSpaceError, match=r"mlflow.db: No space left"):
        local_database(disk / "mlflow")
    assert [path.name for path in (disk / "mlflow").iterdir()] == ["mlflow.lock"]
    local_database(disk / "mlflow")


@pytest.mark.slow
def test_a_command_on_a_full_disk_says_what_happened_and_goes_on_when_there_is_room(
    tmp_path: Path, disk: Path, local_ray: None
) -> None:
    import_synthetic(tmp_path / "data", days=1, users=20, items=20, seed=1, start=START, buckets=1, say=lambda _: None)
    config = write_config(tmp_path, tmp_path / "data", workspace=str(disk / "work"))
    with filled(disk, 100_000):
        full = corank("validate", "--config", str(config))
    assert full.exit_code == 1
    assert f"error: stage validated: {disk}/work/great_expectations: No space left on device" in full.stderr
    assert re.search(rf"Free: .*0\.\d MB at {disk}/work \(the workspace\)", full.stderr)
    assert "Traceback" not in full.stderr
    assert corank("validate", "--config", str(config)).exit_code == 0
