"""The config's section ``evaluation``: the gate."""

from __future__ import annotations

from pydantic import Field

from features.schema import Declaration


class EvaluationConfig(Declaration):
    """A challenger becomes champion only when it passes all of this."""

    task: str | None = Field(None, description="task of the gate; default: the first")
    min_gain_over_baseline: float = Field(
        0.0, allow_inf_nan=False, description="AUC above the baseline printed beside it"
    )
    max_loss_against_champion: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="AUC below the champion on the same requests"
    )
    resamples: int = Field(200, ge=50, description="bootstrap resamples of users for the intervals")
    refit: bool = Field(
        True, description="a model trained from scratch that passed is also trained on what was held out, once"
    )
    refit_bound: float = Field(
        0.2,
        gt=0,
        allow_inf_nan=False,
        description="most that its mean prediction on the held-out requests may move by that, relatively; beyond, the "
        "judged model is deployed",
    )
