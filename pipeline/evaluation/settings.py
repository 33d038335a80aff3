"""The config's section ``evaluation``: the gate."""

from __future__ import annotations

from pydantic import Field

from features.schema import Declaration


class EvaluationConfig(Declaration):
    """A challenger becomes champion only when it passes all of this. What a small test set cannot tell refuses nobody:
    it is told in the report, and not judged."""

    task: str | None = Field(None, description="task of the gate; default: the first")
    min_gain_over_baseline: float = Field(
        0.0, allow_inf_nan=False, description="AUC above the baseline printed beside it"
    )
    max_loss_against_champion: float = Field(
        0.01,
        ge=0,
        allow_inf_nan=False,
        description="AUC and GAUC of the gate's task below the champion's on the same requests. Passed where all of "
        "the interval loses less, failed where all of it loses more. Between: where the interval is no wider than "
        "this, one as good would have passed, so failed; where it is wider, the AUC's difference itself decides, and "
        "the GAUC is not judged",
    )
    max_loss_of_other_tasks: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="the same for every other task, whose AUC is not judged either where the interval is wider; "
        "default: as of the gate's task",
    )
    max_loss_in_segments: float = Field(
        0.03,
        ge=0,
        allow_inf_nan=False,
        description="AUC of the gate's task below the champion's in a segment: users with few, some or many visible "
        "events, new users, items never shown before, frequent values of category features. Failed where all of the "
        "interval loses more",
    )
    segment_impressions: int = Field(500, ge=1, description="a segment with fewer is not judged")
    max_entropy_loss: float = Field(
        0.02,
        ge=0,
        allow_inf_nan=False,
        description="normalised entropy (logloss in units of that of the mean label) above the champion's; where the "
        "interval holds this, the difference itself decides for the gate's task, and others are not judged",
    )
    max_miscalibration: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="positives ÷ predicted may lie between 1 ÷ (1 + this) and 1 + this, or be no further off than the "
        "champion's; where the interval holds such an end, as max_entropy_loss",
    )
    max_drift: float = Field(
        0.5,
        gt=0,
        allow_inf_nan=False,
        description="population stability index of the scores against the champion's on the same requests, in tenths "
        "of the champion's; 0.25 is commonly called a large shift. Beyond it passes where all of the interval says "
        "that the normalised entropy fell: the scores moved towards the labels",
    )
    max_slowdown: float = Field(
        3.0, gt=0, allow_inf_nan=False, description="time of scoring the self-check requests ÷ the champion's"
    )
    min_gain_over_references: float | None = Field(
        None,
        allow_inf_nan=False,
        description="AUC of the gate's task above that of the best declared number alone, and of gradient boosting on "
        "all of them; default: told, not judged",
    )
    reference_rows: int = Field(
        50_000, ge=100, description="impressions before the test set, drawn at random, that these are fitted on"
    )
    level: float = Field(0.95, gt=0, lt=1, description="of the two-sided intervals over resampled users")
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
