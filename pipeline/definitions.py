"""Dagster's entry point: ``CORANK_CONFIG=my.yaml dagster dev -m pipeline.definitions``."""

from __future__ import annotations

import os

import dagster as dg

from features.errors import ConfigError
from pipeline.config import load_config
from pipeline.dag import build_assets
from pipeline.progress import Progress
from pipeline.workspace import Workspace

if "CORANK_CONFIG" not in os.environ:
    raise ConfigError("set CORANK_CONFIG to the config file, e.g. CORANK_CONFIG=pipeline/examples/movielens.yaml")

defs = dg.Definitions(assets=build_assets(Workspace(load_config(os.environ["CORANK_CONFIG"]), Progress())))
