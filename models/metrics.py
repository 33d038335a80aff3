"""AUC, UAUC, GAUC, query AUC and logloss of a scored set, and intervals that resample users.

UAUC is the unweighted mean over users, GAUC weighted by their impressions, query AUC the mean over
requests; each over the groups that hold both classes, whose share is reported. Score ties count ½.
What cannot be told is None: an AUC without both classes, anything of a set without labels. A score that is not finite
has no rank, so that it is an error.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from features.errors import CorankError


@dataclass(frozen=True)
class TaskMetrics:
    """Metrics of one task; None where a class, or every label, is missing. ``*_share``: groups with both classes.

    ``normalised_entropy`` is the logloss in units of that of the constant prediction ``positives``; ``predicted`` the
    mean probability, so that positives ÷ predicted is the calibration.
    """

    auc: float | None
    uauc: float | None
    gauc: float | None
    query_auc: float | None
    logloss: float | None
    impressions: int
    positives: float | None
    user_share: float | None
    query_share: float | None
    predicted: float | None = None
    normalised_entropy: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True)
class Gain:
    """An AUC minus another, and the 2.5 % and 97.5 % quantiles of that over resampled users."""

    difference: float
    low: float
    high: float


def midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.concatenate([starts, [len(values)]]))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(starts + (lengths + 1) / 2, lengths)
    return ranks


def require_finite(what: str, values: np.ndarray) -> None:
    """
    Raises:
        CorankError: says how many of the values are not finite.
    """
    lost = values.size - int(np.isfinite(values).sum())
    if lost:
        raise CorankError(f"{lost:,} of {values.size:,} {what} are not finite, so that nothing can be measured by them")


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve; None without both classes.

    Args:
        labels: 0 or 1, [C]; scores: [C].

    Raises:
        CorankError: a score or label is not finite.
    """
    require_finite("scores", scores)
    require_finite("labels", labels)
    return _auc(labels, scores)


def _auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    positives = float(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    ranks = midranks(scores)
    return float((ranks[labels > 0.5].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _parts(groups: np.ndarray) -> list[np.ndarray]:
    """Rows of every group, in order of the groups' names."""
    _, codes = np.unique(groups.astype(str), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)


def grouped_auc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """AUC of every group with both classes, their sizes, and their share of all groups of a set that is not empty."""
    parts = _parts(groups)
    found = [(value, len(part)) for part in parts if (value := _auc(labels[part], scores[part])) is not None]
    values, sizes = np.array(found).reshape(-1, 2).T
    return values, sizes, len(found) / len(parts)


def task_metrics(labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray, requests: np.ndarray) -> TaskMetrics:
    """All metrics of one task over the impressions whose label is known; arrays [C].

    Raises:
        CorankError: a probability or label is not finite.
    """
    whole = auc(labels, probabilities)
    if not len(labels):
        return TaskMetrics(None, None, None, None, None, 0, None, None, None)
    by_user, user_sizes, user_share = grouped_auc(labels, probabilities, users)
    by_query, _, query_share = grouped_auc(labels, probabilities, requests)
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    logloss = -(labels * np.log(clipped) + (1 - labels) * np.log1p(-clipped)).mean()
    rate = float(labels.mean())
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)) if 0 < rate < 1 else 0.0
    return TaskMetrics(
        auc=whole,
        uauc=float(by_user.mean()) if len(by_user) else None,
        gauc=float(np.average(by_user, weights=user_sizes)) if len(by_user) else None,
        query_auc=float(by_query.mean()) if len(by_query) else None,
        logloss=float(logloss),
        impressions=len(labels),
        positives=rate,
        user_share=user_share,
        query_share=query_share,
        predicted=float(probabilities.astype(np.float64).mean()),
        normalised_entropy=float(logloss / entropy) if entropy else None,
    )


CALIBRATION_BINS = 10


@dataclass(frozen=True)
class CalibrationBin:
    """Impressions of like probability: their number, their mean probability, and how many were positive."""

    impressions: int
    predicted: float
    observed: float


def calibration_bins(labels: np.ndarray, probabilities: np.ndarray) -> list[CalibrationBin]:
    """Predicted beside observed rates in bins of equally many impressions, in order of their probability; arrays [C].

    Raises:
        CorankError: a probability is not finite.
    """
    require_finite("probabilities", probabilities)
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, CALIBRATION_BINS) if len(part)]
    means = [(float(probabilities[one].astype(np.float64).mean()), float(labels[one].mean())) for one in parts]
    return [CalibrationBin(len(part), *mean) for part, mean in zip(parts, means, strict=True)]


def auc_gain(
    labels: np.ndarray, scores: np.ndarray, other: np.ndarray, users: np.ndarray, resamples: int, seed: int = 0
) -> Gain | None:
    """AUC(scores) − AUC(other) with its 95 % interval over resampled users; None without both classes.

    Raises:
        CorankError: a score or label is not finite.
    """
    ours, theirs = auc(labels, scores), auc(labels, other)
    if ours is None or theirs is None:
        return None
    rng = np.random.default_rng(seed)
    parts = _parts(users)
    drawn = []
    for _ in range(resamples):
        rows = np.concatenate([parts[user] for user in rng.integers(0, len(parts), len(parts))])
        left, right = _auc(labels[rows], scores[rows]), _auc(labels[rows], other[rows])
        if left is not None and right is not None:
            drawn.append(left - right)
    low, high = np.quantile(drawn or [-1.0, 1.0], [0.025, 0.975])  # no draw has both classes: anything is possible
    return Gain(ours - theirs, float(low), float(high))
