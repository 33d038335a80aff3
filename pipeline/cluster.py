"""The application for ``serve deploy`` and KubeRay's RayService: ``import_path: pipeline.cluster:application``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from features.errors import ConfigError, CorankError

if TYPE_CHECKING:
    from ray import serve


def application(arguments: Mapping[str, str]) -> serve.Application:
    """The endpoint of the champion, which follows later ones as `corank serve` does.

    Args:
        arguments: ``config``: path of the config; default: ``CORANK_CONFIG``.

    Raises:
        ConfigError: no config is named, or it is wrong.
        CorankError: there is no champion, or the feature store lacks what it reads.
    """
    from pipeline.config import load_config
    from pipeline.progress import Progress
    from pipeline.stages.deployment import name_served, require_own_features, serving_settings
    from pipeline.stages.feature_store import require_store
    from pipeline.workspace import Workspace
    from serving.application import build_application

    path = arguments.get("config") or os.environ.get("CORANK_CONFIG")
    if not path:
        raise ConfigError("name the config: args: {config: /corank/config.yaml}, or CORANK_CONFIG")
    workspace = Workspace(load_config(Path(path)), Progress())
    champion = workspace.registry.champion()
    if champion is None:
        raise CorankError("there is no champion to serve; `corank run` trains one")
    require_own_features(workspace, champion)
    require_store(workspace)
    name_served(workspace, champion)
    return build_application(serving_settings(workspace, champion))
