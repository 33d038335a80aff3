"""What is trained: a job for the workers, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from features.errors import CorankError
from features.samples.source import SampleSource
from features.schema import Schema
from models.config import ModelConfig
from models.protocol import RankingModel
from models.registry import build_model
from pipeline.training.settings import Pace, TrainingConfig


@dataclass(frozen=True)
class TrainingJob:
    """Everything a worker needs; picklable.

    Attributes:
        name: names the run and its checkpoints; the same job always has the same name.
        pace: the values that the section ``training`` leaves to be chosen from the data.
        statistics: mean and deviation of every number's embedding.
        validation: samples by which the best epoch is chosen; None: the last epoch is taken.
        warm_start: weights to begin with, or None.
        optimizers: states of the optimizers to begin with, or None.
    """

    name: str
    schema: Schema
    model: ModelConfig
    training: TrainingConfig
    pace: Pace
    train: SampleSource
    validation: SampleSource | None
    statistics: Mapping[str, tuple[float, float]]
    gate_task: str
    warm_start: Mapping[str, Tensor] | None = None
    optimizers: Sequence[dict[str, Any]] | None = None


@dataclass(frozen=True)
class TrainingResult:
    """The best epoch's model and the metrics of every epoch."""

    model: RankingModel
    history: list[dict[str, float | None]]


def initial_model(job: TrainingJob) -> RankingModel:
    """The model before the first step: seeded, with the number statistics, or the warm start's weights."""
    torch.manual_seed(job.training.seed)
    chosen = job.model
    try:
        model = build_model(job.schema, chosen.name, chosen.preset, chosen.overrides, job.training.id_dropout)
    except ValueError as error:
        raise CorankError(f"model: {error}") from None
    model.inputs.set_statistics(job.statistics)
    if job.warm_start is not None:
        model.load_state_dict(dict(job.warm_start))
    return model
