"""The config's sections ``holdout``, ``training`` and ``retraining``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from features.errors import CorankError
from features.schema import SECOND, Declaration
from models.config import Precision

UNITS = {"hour": 3_600 * SECOND, "day": 86_400 * SECOND, "week": 7 * 86_400 * SECOND}
"""Microseconds."""

PARTITION = "partition"


class TooFewError(CorankError):
    """There are too few requests to train on or to judge by; later partitions can bring enough."""


@dataclass(frozen=True)
class Extent:
    """How much of a log: so many partitions, microseconds, or a share of its requests; one of them is set."""

    partitions: int | None = None
    duration: int | None = None
    share: float | None = None


def extent(text: str) -> Extent:
    """
    Raises:
        ValueError: it is not written as ``1 partition``, ``36 hours`` or ``0.1``.
    """
    if found := re.fullmatch(r"([1-9][0-9]*) (partition|hour|day|week)s?", text):
        number, unit = int(found[1]), found[2]
        return Extent(partitions=number) if unit == PARTITION else Extent(duration=number * UNITS[unit])
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(
            "write a number of partitions, hours, days or weeks (`1 partition`, `36 hours`), or a share (`0.1`)"
        )
    return Extent(share=share)


def _readable(text: str) -> str:
    extent(text)
    return text


def _no_share(text: str) -> str:
    if extent(text).share is not None:
        raise ValueError("write a number of partitions, hours, days or weeks (`30 partitions`, `12 weeks`)")
    return text


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) else value


ExtentText = Annotated[str, BeforeValidator(_text), AfterValidator(_readable)]
WindowText = Annotated[str, BeforeValidator(_text), AfterValidator(_no_share)]


class HoldoutConfig(Declaration):
    """The newest requests, which no epoch trains on: a number of partitions, a duration, or a share of all requests."""

    test: ExtentText = Field("1 partition", description="newest requests, by which a model is judged")
    validation: ExtentText = Field("1 partition", description="requests before those, by which the epoch is chosen")

    @model_validator(mode="after")
    def _leaves_something(self) -> HoldoutConfig:
        shares = [extent(text).share or 0.0 for text in (self.test, self.validation)]
        if sum(shares) >= 1:
            raise ValueError("test + validation must stay below 1, or nothing is left to train on")
        return self


class RetrainingConfig(Declaration):
    """How `corank retrain` goes on from the champion."""

    holdout: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="newest share of the newest partition's requests: challenger and champion are judged on it, and "
        "the next retraining trains on it first",
    )
    full_every: int | None = Field(
        None, ge=1, description="partitions after which a model is trained from scratch; default: only when asked to"
    )
    replay: float = Field(
        0.1, ge=0, description="older requests mixed in, sampled, as a share of the new ones; 0: none"
    )
    late_rows: bool = Field(
        False, description="train from scratch when rows came late to partitions that were trained on"
    )


@dataclass(frozen=True)
class Pace:
    """How training goes through its data.

    Attributes:
        candidates: of one epoch.
        batch_candidates: most candidates of one step.
        warmup_steps: over which the learning rates rise.
    """

    candidates: int
    batch_candidates: int
    warmup_steps: int


class TrainingConfig(Declaration):
    epochs: int = Field(6, ge=1)
    batch_candidates: int | None = Field(
        None, ge=1, description="candidates of one step; default: a 40th of an epoch's, in 100 … 1,500 (the papers')"
    )
    batch_events: int = Field(60_000, ge=1, description="events of one step; bounds memory")
    optimizer: Literal["adamw", "rmsprop"] = Field("adamw", description="of the dense weights")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    decay: Literal["none", "cosine", "linear"] = Field("none", description="of the learning rates, to 0 at the end")
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    embedding_learning_rate: float = Field(0.05, gt=0, allow_inf_nan=False, description="Adagrad on touched rows")
    embedding_optimizer: Literal["adagrad", "rowwise_adagrad"] = Field(
        "adagrad", description="with a sum per value or per row of a table"
    )
    clip_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    warmup_steps: int | None = Field(None, ge=0, description="default: a fifth of all steps, at most 50")
    id_dropout: float = Field(0.01, ge=0, lt=1, description="share of ids that read row 0 in training")
    average: float = Field(0.98, ge=0, lt=1, description="decay per step of the weight average; 0: none")
    negative_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the candidates without a positive label that is trained on, with as much more weight",
    )
    precision: Precision = Field(
        "float32", description="of the products in a step; weights, their average and losses stay float32"
    )
    stale_gradients: bool = Field(
        False,
        description="use the dense gradients of a step after the next one, so that they travel between workers "
        "while it is computed (HyFormer 3.8.2)",
    )
    checkpoint_steps: int | None = Field(
        None, ge=1, description="steps between checkpoints, which are written beside the training; default: every epoch"
    )
    seed: int = 0
    num_workers: int = Field(1, ge=0, description="Ray Train workers; 0: train in the process of the command")
    cpus_per_worker: float = Field(1.0, gt=0, allow_inf_nan=False)
    use_gpu: bool = False
    window: WindowText | None = Field(
        None, description="train from scratch on no more than this (`30 partitions`, `12 weeks`); default: on all"
    )

    @property
    def negatives(self) -> tuple[float, int] | None:
        """What :class:`features.samples.source.SampleSource` reads of negatives."""
        return (self.negative_share, self.seed) if self.negative_share < 1 else None

    def pace(self, candidates: int) -> Pace:
        """Values left out follow from the number of training candidates, so that small data have enough steps."""
        batch = self.batch_candidates or min(max(candidates // 40, 100), 1_500)
        steps = self.epochs * -(-candidates // batch)
        return Pace(candidates, batch, min(50, steps // 5) if self.warmup_steps is None else self.warmup_steps)
