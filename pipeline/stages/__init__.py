"""The stages of the DAG, from a log partition to a verified deployment.

    log_partition → validated → samples → progressive_validation, feature_store → challenger → evaluation → refit
        → champion → deployment

A stage is an object (:class:`pipeline.stages.stage.Stage`) in a file of its own and an entry in ``STAGES``: the DAG,
what is left to do, the status and the summary go through this list.
"""

from __future__ import annotations

from typing import Any

from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.champion import CHAMPION
from pipeline.stages.deployment import DEPLOYMENT
from pipeline.stages.evaluation import EVALUATION
from pipeline.stages.feature_store import FEATURE_STORE
from pipeline.stages.progressive_validation import PROGRESSIVE_VALIDATION
from pipeline.stages.refit import REFIT
from pipeline.stages.samples import SAMPLES
from pipeline.stages.stage import Stage
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace

STAGES: list[Stage[Any]] = [
    VALIDATED,
    SAMPLES,
    PROGRESSIVE_VALIDATION,
    FEATURE_STORE,
    CHALLENGER,
    EVALUATION,
    REFIT,
    CHAMPION,
    DEPLOYMENT,
]
"""In order: each comes after those that it depends on."""


def pending(workspace: Workspace, training: bool = True) -> list[str]:
    """Names of the stages that have work, in order; empty when everything is up to date.

    Args:
        training: with those that train and judge a model.
    """
    names: list[str] = []
    for stage in STAGES:
        if training or not stage.trains:
            follows = stage.follows and not set(names).isdisjoint(stage.depends)
            if follows or stage.stale(workspace):
                names.append(stage.name)
    return names
