"""Ranking models in pure PyTorch. The public names are loaded when they are first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.artifact import Artifact, load_artifact, save_artifact
    from models.protocol import RankingModel
    from models.registry import MODELS, ModelSpec, build_model
    from models.scoring import probabilities, score_batches
    from models.state import TimelineState, UserState

__all__ = [
    "MODELS",
    "Artifact",
    "ModelSpec",
    "RankingModel",
    "TimelineState",
    "UserState",
    "build_model",
    "load_artifact",
    "probabilities",
    "save_artifact",
    "score_batches",
]

_HOMES = {
    "artifact": ("Artifact", "load_artifact", "save_artifact"),
    "protocol": ("RankingModel",),
    "registry": ("MODELS", "ModelSpec", "build_model"),
    "scoring": ("probabilities", "score_batches"),
    "state": ("TimelineState", "UserState"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"models.{module}"), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
