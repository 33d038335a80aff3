"""The ``model:`` section of a config; needs no PyTorch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from features.errors import explain
from features.schema import Declaration, Schema
from models.registry import DEFAULT, MODELS


def _names(schema: dict[str, Any]) -> None:
    schema["enum"] = list(MODELS)


Precision = Literal["float32", "bfloat16"]
"""Of the products in a model; weights, losses and probabilities are float32."""


class ModelConfig(Declaration):
    """Which model, how large. Any size or switch of the model's own config may stand beside; else the preset says."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(DEFAULT, json_schema_extra=_names)
    preset: str = "tiny"

    @property
    def overrides(self) -> dict[str, Any]:
        """The keys that differ from the preset."""
        return dict(self.model_extra or {})

    @property
    def sizes(self) -> Declaration:
        """The model's own config."""
        return MODELS[self.name].sizes(self.preset, self.overrides)

    def check_fit(self, schema: Schema) -> None:
        """Whether this model can be built for a schema.

        Raises:
            ValueError: says what does not fit and what would.
        """
        MODELS[self.name].check_fit(schema, self.sizes)

    @field_validator("name")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if name not in MODELS:
            raise ValueError(f"must be one of {', '.join(map(repr, MODELS))}")
        return name

    @model_validator(mode="after")
    def _is_a_model(self) -> ModelConfig:
        try:
            sizes = self.sizes
        except ValidationError as error:
            kind = MODELS[self.name].config
            raise ValueError("; ".join(explain(problem, kind) for problem in error.errors())) from None
        for key in self.overrides:  # a file has them as text
            (self.__pydantic_extra__ or {})[key] = getattr(sizes, key)
        return self
