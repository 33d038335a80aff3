"""Dagster's entry point, which `corank watch` opens: ``CORANK_CONFIG=my.yaml dagster dev -m pipeline.definitions``."""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg

from features.errors import ConfigError
from pipeline.config import load_config
from pipeline.dag import build_assets
from pipeline.progress import Progress
from pipeline.watch import retraining_definitions
from pipeline.workspace import Workspace

if "CORANK_CONFIG" not in os.environ:
    raise ConfigError("set CORANK_CONFIG to the config file, e.g. CORANK_CONFIG=pipeline/examples/movielens.yaml")

_path = Path(os.environ["CORANK_CONFIG"]).resolve()
_config = load_config(_path)
defs = dg.Definitions.merge(
    dg.Definitions(assets=build_assets(Workspace(_config, Progress()))), retraining_definitions(_config, _path)
)
