"""Names of models and presets to modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from features.schema import Schema
from models.mixformer import MixFormer, MixFormerConfig
from models.presets import MODELS, PRESETS


def build_model(
    schema: Schema, name: str, preset: str, overrides: Mapping[str, Any] | None = None, id_dropout: float = 0.01
) -> MixFormer:
    """A freshly initialised model of this name and size.

    Raises:
        ValueError: sizes that do not fit together (for instance D not divisible by N).
    """
    sizes = {**MODELS[name], **PRESETS[preset], **(overrides or {})}
    return MixFormer(schema, MixFormerConfig(**sizes), id_dropout)
