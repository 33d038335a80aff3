"""The config's sections ``training`` and ``split``."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, model_validator

from features.schema import Declaration


class SplitConfig(Declaration):
    """Chronological split by request time, newest last."""

    test: float = Field(0.1, gt=0, lt=1, description="newest share of the requests, for the test metrics")
    validation: float = Field(0.1, gt=0, lt=1, description="share before that, to choose the epoch")

    @model_validator(mode="after")
    def _leaves_something(self) -> SplitConfig:
        if self.test + self.validation >= 1:
            raise ValueError("test + validation must stay below 1, or nothing is left to train on")
        return self


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
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    embedding_learning_rate: float = Field(0.05, gt=0, allow_inf_nan=False, description="Adagrad on touched rows")
    clip_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    warmup_steps: int | None = Field(None, ge=0, description="default: a fifth of all steps, at most 50")
    id_dropout: float = Field(0.01, ge=0, lt=1, description="share of ids that read row 0 in training")
    average: float = Field(0.98, ge=0, lt=1, description="decay per step of the weight average; 0: none")
    seed: int = 0
    num_workers: int = Field(1, ge=1, description="Ray Train workers")
    cpus_per_worker: float = Field(1.0, gt=0, allow_inf_nan=False)
    use_gpu: bool = False

    def pace(self, candidates: int) -> Pace:
        """What is left out follows the number of training candidates, so that small data have enough steps, too."""
        batch = self.batch_candidates or min(max(candidates // 40, 100), 1_500)
        steps = self.epochs * -(-candidates // batch)
        return Pace(candidates, batch, min(50, steps // 5) if self.warmup_steps is None else self.warmup_steps)
