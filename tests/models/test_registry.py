"""A model is known by its entry in the registry alone, and what is light to load stays light."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import models
from features.batch import Items, Timeline, Users, collate
from features.errors import ConfigError
from features.schema import Declaration, Schema
from models import (
    MODELS,
    ModelSpec,
    RankingModel,
    TimelineState,
    UserState,
    load_artifact,
    probabilities,
    save_artifact,
)
from models.config import ModelConfig
from models.sizes import width_of
from models.state import requests_along
from pipeline.config import load_config
from tests.models.batches import make_rows, make_schema

SCHEMA = make_schema()
EXAMPLE = Path(__file__).parents[2] / "pipeline" / "examples" / "synthetic.yaml"


class ToyConfig(Declaration):
    width: int = Field(4, ge=1)


@dataclass
class ToyUserState(UserState):
    user: Tensor = field(metadata=requests_along(0))


class Toy(RankingModel):
    """A product of two embeddings; reads no history."""

    def __init__(self, schema: Schema, config: ToyConfig, id_dropout: float) -> None:
        super().__init__(schema, config.width, event_time=False, id_dropout=id_dropout)
        self.config = config
        self.user = nn.Linear(width_of(schema.user_side), config.width)
        self.item = nn.Linear(width_of(schema.item_side), config.width * len(schema.tasks))

    def encode_timelines(self, timelines: Mapping[str, Timeline]) -> TimelineState:
        return TimelineState([])

    def encode_users(self, users: Users, timeline_state: TimelineState) -> ToyUserState:
        return ToyUserState([], self.user(self.inputs.concatenate(self.schema.user_side, users.fields)))

    def score(self, user_state: UserState, items: Items) -> Tensor:
        assert isinstance(user_state, ToyUserState)
        item = self.item(self.inputs.concatenate(self.schema.item_side, items.fields))
        return torch.einsum("cd,cdk->ck", user_state.user[items.request], item.unflatten(-1, (self.config.width, -1)))


def no_wider_than_features(schema: Schema, config: ToyConfig) -> None:
    if config.width > width_of(schema.features):
        raise ValueError("a toy is no wider than its features")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    presets = {"tiny": {}, "wide": {"width": 10_000}}
    spec = ModelSpec("toy", ToyConfig, presets, no_wider_than_features, build=f"{__name__}:Toy")
    monkeypatch.setitem(MODELS, "toy", spec)


@pytest.mark.usefixtures("toy")
def test_a_model_that_is_registered_goes_from_config_to_scores(tmp_path: Path) -> None:
    section = ModelConfig.model_validate({"name": "toy", "width": "6"})
    section.check_fit(SCHEMA)
    torch.manual_seed(0)
    model = models.build_model(SCHEMA, section.name, section.preset, section.overrides).eval()
    assert model.describe() == {"name": "toy", "width": 6}
    batch = collate(make_rows(SCHEMA, 3), SCHEMA)
    scores = probabilities(model, batch)
    assert scores.shape == (batch.candidates, 2)
    save_artifact(tmp_path / "toy", model, {})
    assert (probabilities(load_artifact(tmp_path / "toy").model, batch) == scores).all()


@pytest.mark.usefixtures("toy")
def test_a_model_that_is_registered_is_checked_in_a_whole_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORANK_MODEL", "{name: toy, preset: wide}")
    with pytest.raises(ConfigError, match="model: a toy is no wider than its features"):
        load_config(EXAMPLE)
    monkeypatch.setenv("CORANK_MODEL", "{name: toy, widht: 3}")
    with pytest.raises(ConfigError, match=r"widht: there is no such key. Did you mean 'width'"):
        load_config(EXAMPLE)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import pipeline.config, models.registry", ["torch", "ray", "feast", "mlflow"]),
        ("from models import build_model, load_artifact", ["ray", "feast", "mlflow"]),
    ],
)
def test_what_is_light_to_load_stays_light(statement: str, absent: list[str]) -> None:
    check = f"{statement}; import sys; sys.exit(', '.join(set({absent!r}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
