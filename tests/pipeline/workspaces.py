"""A small synthetic log and its config, for tests that run the whole DAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config, load_config
from pipeline.records import R
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace
from tests.servers import free_port

EXAMPLE = Path("pipeline/examples/synthetic.yaml")
START = "2026-01-05"

LENIENT = {
    "min_gain_over_baseline": -1.0,
    "max_loss_against_champion": 1.0,
    "max_loss_in_segments": 1.0,
    "max_entropy_loss": 100.0,
    "max_miscalibration": 1_000.0,
    "max_drift": 100.0,
    "max_slowdown": 1_000.0,
    "resamples": 50,
}
"""A gate for tiny models on three days, which need not beat anything; it has tests of its own."""


def write_config(folder: Path, data: Path, **changes: Any) -> Path:
    """The synthetic example on other folders, with a tiny model that trains in seconds."""
    content = yaml.safe_load(EXAMPLE.read_text())
    content["workspace"] = str(folder / "work")
    content["buckets"] = 2
    for name in content["tables"]:
        content["tables"][name]["path"] = str(data / name)
    for field in [*content["features"], *(f for s in content["sequences"] for f in s["fields"])]:
        if "buckets" in field:
            field["buckets"] = 2_000
    content["model"] |= {"heads": 4, "head_dim": 16, "layers": 1}
    # in the command's process: what Ray Train does is tested in test_training.py, and by the fixture of test_dag.py
    content["training"] = {"epochs": 2, "batch_candidates": 1_000, "num_workers": 0}
    content["evaluation"] = LENIENT
    content["holdout"] = {"test": 0.1, "validation": 0.1}
    content["serving"] = {"port": free_port()}
    content |= changes
    path = folder / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def load(folder: Path, data: Path, **changes: Any) -> Config:
    return load_config(write_config(folder, data, **changes))


def make(stage: Stage[R], workspace: Workspace) -> R:
    """Run a stage that is no partitioned one, whether it is stale or not; its record."""
    (part,) = stage.inputs(workspace)
    return stage.run(workspace, [part])[part]
