"""AUC, UAUC, GAUC, query AUC and logloss of a scored set, its gain over another, and intervals by resampling users.

UAUC is the unweighted mean over users, GAUC weighted by their impressions, query AUC the mean over
requests; each over the groups that hold both classes, whose share is reported. Score ties count ½.
A metric that is not defined is None: an AUC without both classes, anything of a set without labels. A score that is not
finite has no rank and is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """A metric minus another's, and the two-sided interval of that over resampled users."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A metric, and its two-sided interval over resampled users."""

    value: float
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


def grouped_auc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """AUC and size of every group with both classes, and the share of such groups; the set is not empty."""
    names, group = np.unique(groups.astype(str), return_inverse=True)
    found, sizes = _group_aucs(labels, scores, group, len(names))
    both = ~np.isnan(found)
    return found[both], sizes[both], float(both.mean())


def _group_aucs(labels: np.ndarray, scores: np.ndarray, group: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """AUC, NaN without both classes, and size of every group; group: index of each row's, [C]."""
    sizes = np.bincount(group, minlength=count)
    # ranks in the order of (group, score), counted from each group's beginning
    _, place = np.unique(scores, return_inverse=True)
    ranks = midranks(group.astype(np.int64) * (len(scores) + 1) + place) - (np.cumsum(sizes) - sizes)[group]
    positive = labels > 0.5
    positives = np.bincount(group[positive], minlength=count)
    above = np.bincount(group[positive], ranks[positive], count) - positives * (positives + 1) / 2
    pairs = positives * (sizes - positives)
    return np.divide(above, pairs, out=np.full(count, np.nan), where=pairs > 0), sizes


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
    logloss = _losses(labels, probabilities).mean()
    rate = float(labels.mean())
    entropy = _entropy(rate)
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


def _losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """−log of the probability that each label was given, [C]."""
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    losses: np.ndarray = -(labels * np.log(clipped) + (1 - labels) * np.log1p(-clipped))
    return losses


def _entropy(rate: float) -> float:
    """Logloss of the constant prediction of a rate."""
    return float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))) if 0 < rate < 1 else 0.0


class _Resampled:
    """Users drawn with replacement, as many as there are, again and again; the same draws for the same users and seed.

    Attributes:
        user: index of every impression's user, [C].
        count: users.
    """

    def __init__(self, users: np.ndarray, resamples: int, level: float, seed: int) -> None:
        names, self.user = np.unique(users.astype(str), return_inverse=True)
        self.count, self._resamples, self._level, self._seed = len(names), resamples, level, seed

    def times(self) -> Iterator[np.ndarray]:
        """How often each user was drawn, [U]."""
        rng = np.random.default_rng(self._seed)
        for _ in range(self._resamples):
            yield np.bincount(rng.integers(0, self.count, self.count), minlength=self.count)

    def per_user(self, values: np.ndarray) -> np.ndarray:
        """Sums of [C] by user, [U]."""
        return np.bincount(self.user, values, self.count)

    def interval(self, drawn: list[float], otherwise: tuple[float, float]) -> tuple[float, float]:
        """Quantiles of the drawn values; ``otherwise``, the whole range, where no draw has a value."""
        outside = (1 - self._level) / 2
        low, high = np.quantile(drawn, [outside, 1 - outside]) if drawn else otherwise
        return float(low), float(high)

    def of_ratio(self, above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
        """Interval of Σ above ÷ Σ below, arrays [C]; ``below`` is positive."""
        above, below = self.per_user(above), self.per_user(below)
        return self.interval([float(times @ above / (times @ below)) for times in self.times()], (-np.inf, np.inf))


class _Ranked:
    """Impressions sorted once, so that an AUC with users counted several times needs no further sorting."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray, user: np.ndarray) -> None:
        positive = labels > 0.5
        order = np.argsort(scores[~positive])
        below = scores[~positive][order]
        self._positives, self._negatives = user[positive], user[~positive][order]
        # a positive wins against the negatives before ``first``; those from there to before ``last`` tie and count half
        self._first = np.searchsorted(below, scores[positive], "left")
        self._last = np.searchsorted(below, scores[positive], "right")

    def auc(self, times: np.ndarray) -> float | None:
        """AUC with every user counted ``times`` times, [U]; None without both classes."""
        positives, negatives = times[self._positives], np.cumsum(times[self._negatives])
        pairs = positives.sum() * negatives[-1]
        if not pairs:
            return None
        before = np.concatenate([[0], negatives])
        return float(positives @ (before[self._first] + before[self._last]) / (2 * pairs))


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
    means = [(float(probabilities[part].astype(np.float64).mean()), float(labels[part].mean())) for part in parts]
    return [CalibrationBin(len(part), *mean) for part, mean in zip(parts, means, strict=True)]


def auc_gain(
    labels: np.ndarray,
    scores: np.ndarray,
    other: np.ndarray,
    users: np.ndarray,
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> Gain | None:
    """AUC(scores) − AUC(other) with its interval over resampled users; None without both classes.

    Raises:
        CorankError: a score or label is not finite.
    """
    ours, theirs = auc(labels, scores), auc(labels, other)
    if ours is None or theirs is None:
        return None
    drawn, resampled = [], _Resampled(users, resamples, level, seed)
    ranked = [_Ranked(labels, compared, resampled.user) for compared in (scores, other)]
    for times in resampled.times():
        left, right = (ranking.auc(times) for ranking in ranked)
        if left is not None and right is not None:
            drawn.append(left - right)
    return Gain(ours - theirs, *resampled.interval(drawn, (-1.0, 1.0)))


def gauc_gain(
    labels: np.ndarray,
    scores: np.ndarray,
    other: np.ndarray,
    users: np.ndarray,
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> Gain | None:
    """GAUC(scores) − GAUC(other) as :func:`auc_gain`; None where no user has both classes."""
    require_finite("scores", np.stack([scores, other]))
    resampled = _Resampled(users, resamples, level, seed)
    ours, sizes = _group_aucs(labels, scores, resampled.user, resampled.count)
    theirs, _ = _group_aucs(labels, other, resampled.user, resampled.count)
    both = ~np.isnan(ours)
    if not both.any():
        return None
    sizes = sizes * both
    weighted = np.where(both, ours - theirs, 0.0) * sizes
    drawn = [float(times @ weighted / (times @ sizes)) for times in resampled.times() if times @ sizes]
    return Gain(float(weighted.sum() / sizes.sum()), *resampled.interval(drawn, (-1.0, 1.0)))


def entropy_loss(
    labels: np.ndarray,
    scores: np.ndarray,
    other: np.ndarray,
    users: np.ndarray,
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> Gain | None:
    """Normalised entropy of probabilities minus that of others, in units of the whole set's entropy; below 0 is better.

    None without both classes, as then there is no entropy.
    """
    entropy = _entropy(float(labels.mean())) if len(labels) else 0.0
    if not entropy:
        return None
    more = (_losses(labels, scores) - _losses(labels, other)) / entropy
    low, high = _Resampled(users, resamples, level, seed).of_ratio(more, np.ones(len(more)))
    return Gain(float(more.mean()), low, high)


def calibration(
    labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray, resamples: int, level: float = 0.95, seed: int = 0
) -> Estimate | None:
    """Positives ÷ the sum of the probabilities, 1 at best; None for an empty set."""
    if not len(labels):
        return None
    predicted = np.maximum(probabilities.astype(np.float64), 1e-7)
    low, high = _Resampled(users, resamples, level, seed).of_ratio(labels, predicted)
    return Estimate(float(labels.sum() / predicted.sum()), low, high)


def population_stability(scores: np.ndarray, other: np.ndarray, bins: int = 10) -> float:
    """PSI = Σ (p − q) ln(p / q) between shares p of the scores and q of others, in bins of equally many others.

    Half a score is added to every bin, so that the logarithm of an empty one is defined. Arrays [C], not empty.
    """
    edges = np.unique(np.quantile(other, np.linspace(0, 1, bins + 1)[1:-1]))
    p, q = (
        (np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1) + 0.5)
        / (len(values) + 0.5 * (len(edges) + 1))
        for values in (scores, other)
    )
    return float(((p - q) * np.log(p / q)).sum())
