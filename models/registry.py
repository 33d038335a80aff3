"""Every model by its name; needs no PyTorch until one is built, so that a config is checked without loading it.

A new model is a folder (its config, its :class:`models.protocol.RankingModel`) and an entry in :data:`MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from features.schema import Declaration, Schema
from models.hyformer import config as hyformer
from models.hyformer.config import HyFormerConfig
from models.hyformer.tokens import check_tokens
from models.mixformer import config as mixformer
from models.mixformer.config import MixFormerConfig, decoupled_heads

if TYPE_CHECKING:
    from models.protocol import RankingModel


@dataclass(frozen=True)
class ModelSpec:
    """All that is known of a model before PyTorch is loaded.

    Attributes:
        config: its sizes and switches, each checked on its own.
        presets: sizes by name; ``tiny`` is the default, ``paper`` what the model's bare name stands for.
        check_fit: raises ValueError where a config does not fit a schema, with what would.
        build: ``module:Class`` of its :class:`models.protocol.RankingModel`, of (schema, config, id_dropout).
        fixed: what the name fixes of the config.
        paper_sequences: behaviour sequences of the paper's data.
    """

    name: str
    config: type[Declaration]
    presets: Mapping[str, Mapping[str, Any]]
    check_fit: Callable[[Schema, Any], object]
    build: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    paper_sequences: int = 1

    def sizes(self, preset: str, overrides: Mapping[str, Any] | None = None) -> Declaration:
        """Sizes and switches of a preset, some of them overridden.

        Raises:
            ValueError: the model has no such preset, or (pydantic's) a key or value is not allowed.
        """
        if preset not in self.presets:
            raise ValueError(f"{self.name} has no preset {preset!r}; there are {', '.join(self.presets)}")
        overrides = overrides or {}
        for key, value in self.fixed.items():
            if overrides.get(key, value) != value:
                raise ValueError(
                    f"{self.name} has {key} = {value}, not {overrides[key]}; another model has that to choose"
                )
        return self.config(**{**self.presets[preset], **overrides, **self.fixed})

    def model(self, schema: Schema, sizes: Declaration, id_dropout: float) -> RankingModel:
        """A freshly initialised model of these sizes.

        Raises:
            ValueError: sizes that do not fit the schema.
        """
        module, _, name = self.build.partition(":")
        model: RankingModel = getattr(import_module(module), name)(schema, sizes, id_dropout)
        model.name = self.name
        return model


MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="mixformer",
            config=MixFormerConfig,
            presets=mixformer.PRESETS,
            check_fit=decoupled_heads,
            build="models.mixformer.model:MixFormer",
            fixed={"user_heads": 0},
        ),
        ModelSpec(
            name="ui-mixformer",
            config=MixFormerConfig,
            presets=mixformer.PRESETS,
            check_fit=decoupled_heads,
            build="models.mixformer.model:MixFormer",
        ),
        ModelSpec(
            name="hyformer",
            config=HyFormerConfig,
            presets=hyformer.PRESETS,
            check_fit=check_tokens,
            build="models.hyformer.model:HyFormer",
            paper_sequences=3,
        ),
    )
}

DEFAULT = "ui-mixformer"
"""The model of a config that names none, and of a preset that is only a size."""


def build_model(
    schema: Schema, name: str, preset: str, overrides: Mapping[str, Any] | None = None, id_dropout: float = 0.01
) -> RankingModel:
    """A freshly initialised model of this name and size.

    Raises:
        ValueError: sizes that do not fit together, or not with the schema.
    """
    spec = MODELS[name]
    return spec.model(schema, spec.sizes(preset, overrides), id_dropout)


def rebuild_model(schema: Schema, description: Mapping[str, Any]) -> RankingModel:
    """The model that :meth:`RankingModel.describe` described, freshly initialised and without id dropout."""
    sizes = dict(description)
    spec = MODELS[sizes.pop("name")]
    return spec.model(schema, spec.config(**sizes), id_dropout=0.0)


def find_preset(text: str) -> tuple[str, str]:
    """Model and preset of a name like ``mixformer-medium``; a model alone has the paper's size, a size alone is of the
    default model.

    Raises:
        ValueError: lists what there is.
    """
    if text in MODELS[DEFAULT].presets:
        return DEFAULT, text
    for name in sorted(MODELS, key=len, reverse=True):
        presets = MODELS[name].presets
        if text == name and "paper" in presets:
            return name, "paper"
        if text.startswith(f"{name}-") and text.removeprefix(f"{name}-") in presets:
            return name, text.removeprefix(f"{name}-")
    raise ValueError(f"there is no preset {text!r}; there are {', '.join(preset_names())}")


def preset_names() -> list[str]:
    """Every preset by its full name; a model's name alone is the paper's."""
    return [f"{name}-{size}".removesuffix("-paper") for name, spec in MODELS.items() for size in spec.presets]
