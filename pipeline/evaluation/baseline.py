"""The baseline that a model must beat: a fit of the mean labels of users and items."""

from __future__ import annotations

import numpy as np
import polars as pl

from features.sample_table import label_column
from features.schema import Task
from pipeline.evaluation.impressions import IDENTITY

PRIOR_STRENGTH = 10.0
"""Impressions of prior that smooth the baseline's user and item means."""


def baseline(shown: pl.DataFrame, task: Task, cut: int, log_delay: int) -> pl.DataFrame | None:
    """The baseline printed beside the model: a logistic fit of the smoothed user mean and item mean.

    Both means use only labels of requests older than the request's time − log delay; item means are frozen
    at ``cut``, like the model. Fitted on requests before the cut.

    Args:
        shown: every impression (:class:`pipeline.evaluation.impressions.Impressions`).
        cut: first request time of the test set, microseconds UTC.

    Returns:
        user_id, request_id, item_id, ts, label and score of the test set's impressions; None when there are not both
        classes before the cut to fit it on.
    """
    from sklearn.linear_model import LogisticRegression

    shown = shown.select(*IDENTITY, pl.col(label_column(task)).cast(pl.Float64).alias("label")).drop_nulls("label")
    mean = shown.filter(pl.col("ts") < cut)["label"].mean()
    prior = float(mean) if isinstance(mean, float) else 0.5
    shown = _mean_before(shown, "user_id", pl.col("ts") - log_delay, prior)
    shown = _mean_before(shown, "item_id", pl.min_horizontal(pl.col("ts") - log_delay, pl.lit(cut)), prior)
    fit, test = shown.filter(pl.col("ts") < cut), shown.filter(pl.col("ts") >= cut)
    inputs = ["user_id_mean", "item_id_mean"]
    if fit["label"].n_unique() < 2:
        return None
    model = LogisticRegression().fit(_logit(fit.select(inputs)), fit["label"].to_numpy())
    scores = model.predict_proba(_logit(test.select(inputs)))[:, 1] if test.height else np.zeros(0)
    return test.select(*IDENTITY, "label").with_columns(pl.Series("score", scores))


def _mean_before(shown: pl.DataFrame, key: str, before: pl.Expr, prior: float) -> pl.DataFrame:
    """Smoothed mean label of the key's impressions with ``ts < before``."""
    totals = (
        shown.group_by(key, "ts")
        .agg(pl.col("label").sum().alias("positives"), pl.len().alias("count"))
        .sort("ts")
        .with_columns(pl.col("positives", "count").cum_sum().over(key))
    )
    joined = (
        shown.with_columns(before.alias("before"))
        .with_row_index("row")
        .sort("before")
        .join_asof(
            totals,
            left_on="before",
            right_on="ts",
            by=key,
            strategy="backward",
            allow_exact_matches=False,
            suffix="_seen",
            check_sortedness=False,
        )
        .sort("row")
    )
    positives, count = joined["positives"].fill_null(0), joined["count"].fill_null(0)
    smoothed = (positives + PRIOR_STRENGTH * prior) / (count + PRIOR_STRENGTH)
    return shown.with_columns(smoothed.alias(f"{key}_mean"))


def _logit(means: pl.DataFrame) -> np.ndarray:
    clipped = np.clip(means.to_numpy(), 1e-4, 1 - 1e-4)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))
