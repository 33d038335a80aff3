"""Names of models and presets to modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from features.schema import Schema
from models.mixformer import MixFormer, MixFormerConfig

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"heads": 8, "head_dim": 32, "layers": 2, "dropout": 0.1, "tower": 64},
    "base": {"heads": 16, "head_dim": 64, "layers": 4, "dropout": 0.1, "tower": 128},
}
MODELS: dict[str, dict[str, Any]] = {"mixformer": {"user_heads": 0}, "ui-mixformer": {}}


def build_model(
    schema: Schema, name: str, preset: str, overrides: Mapping[str, Any] | None = None, id_dropout: float = 0.01
) -> MixFormer:
    """A freshly initialised model of this name and size.

    Raises:
        ValueError: sizes that do not fit together (for instance D not divisible by N).
    """
    sizes = {**MODELS[name], **PRESETS[preset], **(overrides or {})}
    return MixFormer(schema, MixFormerConfig(**sizes), id_dropout)
