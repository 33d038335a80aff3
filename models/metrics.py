"""AUC, UAUC, GAUC, query AUC and logloss of a scored set, and intervals that resample users.

UAUC is the unweighted mean over users, GAUC weighted by their impressions, query AUC the mean over
requests; each over the groups that hold both classes, whose share is reported. Score ties count ½.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class TaskMetrics:
    """Metrics of one task; NaN where a class is missing. ``*_share``: groups that have both classes."""

    auc: float
    uauc: float
    gauc: float
    query_auc: float
    logloss: float
    impressions: int
    positives: float
    user_share: float
    query_share: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.concatenate([starts, [len(values)]]))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(starts + (lengths + 1) / 2, lengths)
    return ranks


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; NaN without both classes."""
    positives = float(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = midranks(scores)
    return float((ranks[labels > 0.5].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def grouped_auc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC of every group and its size, in order of the groups' codes; NaN without both classes."""
    _, codes = np.unique(groups.astype(str), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    bounds = np.flatnonzero(np.diff(codes[order])) + 1
    parts = np.split(order, bounds)
    values = np.array([auc(labels[part], scores[part]) for part in parts])
    return values, np.array([len(part) for part in parts])


def task_metrics(labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray, requests: np.ndarray) -> TaskMetrics:
    """All metrics of one task over the impressions whose label is known; arrays [C]."""
    by_user, user_sizes = grouped_auc(labels, probabilities, users)
    by_query, _ = grouped_auc(labels, probabilities, requests)
    both = ~np.isnan(by_user)
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    logloss = -(labels * np.log(clipped) + (1 - labels) * np.log1p(-clipped)).mean()
    return TaskMetrics(
        auc=auc(labels, probabilities),
        uauc=float(by_user[both].mean()) if both.any() else float("nan"),
        gauc=float(np.average(by_user[both], weights=user_sizes[both])) if both.any() else float("nan"),
        query_auc=float(np.nanmean(by_query)) if not np.isnan(by_query).all() else float("nan"),
        logloss=float(logloss),
        impressions=len(labels),
        positives=float(labels.mean()),
        user_share=float(both.mean()),
        query_share=float((~np.isnan(by_query)).mean()),
    )


def auc_difference_interval(
    labels: np.ndarray, scores: np.ndarray, other: np.ndarray, users: np.ndarray, resamples: int, seed: int = 0
) -> tuple[float, float, float]:
    """AUC(scores) − AUC(other) with its 95 % interval over resampled users.

    Returns:
        the difference and the 2.5 % and 97.5 % quantiles of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    _, codes = np.unique(users.astype(str), return_inverse=True)
    count = int(codes.max()) + 1
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    drawn = []
    for _ in range(resamples):
        rows = np.concatenate([parts[user] for user in rng.integers(0, count, count)])
        drawn.append(auc(labels[rows], scores[rows]) - auc(labels[rows], other[rows]))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return auc(labels, scores) - auc(labels, other), float(low), float(high)
