"""Names of models to modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from features.schema import Schema
from models.config import MODELS, AnyConfig, HyFormerConfig, model_config
from models.hyformer import HyFormer
from models.mixformer import MixFormer
from models.protocol import RankingModel


def build_model(
    schema: Schema, name: str, preset: str, overrides: Mapping[str, Any] | None = None, id_dropout: float = 0.01
) -> RankingModel:
    """A freshly initialised model of this name and size.

    Raises:
        ValueError: sizes that do not fit together, or not with the schema.
    """
    return _build(schema, model_config(name, preset, dict(overrides or {})), id_dropout)


def rebuild_model(schema: Schema, description: Mapping[str, Any]) -> RankingModel:
    """The model that :meth:`RankingModel.describe` described, freshly initialised and without id dropout."""
    kind, _ = MODELS[description["name"]]
    return _build(schema, kind(**{key: value for key, value in description.items() if key != "name"}), id_dropout=0.0)


def _build(schema: Schema, config: AnyConfig, id_dropout: float) -> RankingModel:
    if isinstance(config, HyFormerConfig):
        return HyFormer(schema, config, id_dropout)
    return MixFormer(schema, config, id_dropout)
