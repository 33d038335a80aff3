"""AUC and its groups against scikit-learn and counting by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from features.errors import CorankError
from models.metrics import (
    Estimate,
    Gain,
    TaskMetrics,
    auc,
    auc_gain,
    calibration,
    calibration_bins,
    entropy_loss,
    gauc_gain,
    grouped_auc,
    population_stability,
    task_metrics,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=60))
def test_auc_counts_ties_half(rows: list[tuple[bool, int]]) -> None:
    labels = np.array([float(label) for label, _ in rows])
    scores = np.array([score / 5 for _, score in rows])
    if labels.min() == labels.max():
        assert auc(labels, scores) is None
    else:
        assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))


def test_uauc_is_unweighted_and_gauc_weighted_over_users_with_both_classes() -> None:
    users = np.array(["a"] * 2 + ["b"] * 4 + ["c"] * 3)
    labels = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1], dtype=float)
    scores = np.array([0.9, 0.1, 0.2, 0.8, 0.7, 0.1, 0.5, 0.5, 0.5])
    metrics = task_metrics(labels, scores, users, users)
    by_b = roc_auc_score(labels[2:6], scores[2:6])
    assert metrics.uauc == pytest.approx((1.0 + by_b) / 2)
    assert metrics.gauc == pytest.approx((2 * 1.0 + 4 * by_b) / 6)
    assert metrics.user_share == pytest.approx(2 / 3)
    assert metrics.logloss == pytest.approx(log_loss(labels, scores))


def test_the_interval_holds_a_difference_that_is_there_and_not_one_that_is_not() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(4000) < 0.4).astype(float)
    users = rng.integers(0, 200, 4000)
    noisy = labels + rng.normal(0, 1.5, 4000)
    better = labels + rng.normal(0, 1.0, 4000)
    gain = auc_gain(labels, better, noisy, users, resamples=200)
    assert gain is not None
    assert 0 < gain.low < gain.difference < gain.high
    gain = auc_gain(labels, noisy, labels + rng.normal(0, 1.5, 4000), users, resamples=200)
    assert gain is not None
    assert gain.low < 0.02
    assert gain.high > -0.02


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_or_label_that_is_not_finite_has_no_auc(value: float) -> None:
    good, bad, users = np.array([0.1, 0.9, 0.4]), np.array([0.1, value, value]), np.array(["a", "a", "b"])
    labels = np.array([0.0, 1.0, 1.0])
    for measure in (
        lambda: auc(labels, bad),
        lambda: task_metrics(labels, bad, users, users),
        lambda: auc_gain(labels, good, bad, users, resamples=50),
    ):
        with pytest.raises(CorankError, match="2 of 3 scores are not finite"):
            measure()
    with pytest.raises(CorankError, match="2 of 3 labels are not finite"):
        auc(bad, good)


def test_of_one_class_or_without_labels_what_cannot_be_told_is_none() -> None:
    users = np.array(["a", "a", "b"])
    ones = task_metrics(np.ones(3), np.array([0.5, 0.5, 0.5]), users, users)
    entropy: Any = pytest.approx(np.log(2))
    assert ones == TaskMetrics(None, None, None, None, entropy, 3, 1.0, 0.0, 0.0, predicted=0.5)
    nothing = task_metrics(np.zeros(0), np.zeros(0), users[:0], users[:0])
    assert nothing == TaskMetrics(None, None, None, None, None, 0, None, None, None)
    assert auc_gain(np.ones(3), np.zeros(3), np.zeros(3), users, resamples=50) is None
    assert auc_gain(np.zeros(0), np.zeros(0), np.zeros(0), users[:0], resamples=50) is None


def both_score() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, two probabilities with ties, and users of whom some have one class."""
    rng = np.random.default_rng(1)
    labels, users = (rng.random(500) < 0.3).astype(float), rng.integers(0, 60, 500)
    ours, theirs = (np.clip(np.round(0.3 * labels + 0.5 * rng.random(500), 2), 0.01, 0.99) for _ in range(2))
    return labels, ours, theirs, users


def resampled(users: np.ndarray, resamples: int) -> list[list[np.ndarray]]:
    """Rows of every user drawn, draw after draw."""
    rng, rows = (
        np.random.default_rng(0),
        [np.flatnonzero(users.astype(str) == one) for one in np.unique(users.astype(str))],
    )
    return [[rows[user] for user in rng.integers(0, len(rows), len(rows))] for _ in range(resamples)]


def test_gains_and_their_intervals_equal_those_of_rows_drawn_again_and_again() -> None:
    labels, ours, theirs, users = both_score()
    draws = resampled(users, 50)

    def check(found: Gain | Estimate | None, direct: Any) -> None:
        assert found is not None
        drawn = [direct(parts) for parts in draws]
        whole = direct([np.flatnonzero(users == user) for user in np.unique(users)])
        assert list(vars(found).values()) == pytest.approx([whole, *np.quantile(drawn, [0.05, 0.95])])

    def auc_of(parts: list[np.ndarray]) -> float:
        rows = np.concatenate(parts)
        return float(roc_auc_score(labels[rows], ours[rows]) - roc_auc_score(labels[rows], theirs[rows]))

    def gauc_of(parts: list[np.ndarray]) -> float:
        both = [rows for rows in parts if labels[rows].min() < labels[rows].max()]
        gains = [roc_auc_score(labels[r], ours[r]) - roc_auc_score(labels[r], theirs[r]) for r in both]
        return float(np.average(gains, weights=[len(rows) for rows in both]))

    def entropy_of(parts: list[np.ndarray]) -> float:
        rows, mean = np.concatenate(parts), np.full(500, labels.mean())
        return (log_loss(labels[rows], ours[rows]) - log_loss(labels[rows], theirs[rows])) / log_loss(labels, mean)

    def calibration_of(parts: list[np.ndarray]) -> float:
        rows = np.concatenate(parts)
        return float(labels[rows].sum() / ours[rows].sum())

    check(auc_gain(labels, ours, theirs, users, 50, 0.9), auc_of)
    check(gauc_gain(labels, ours, theirs, users, 50, 0.9), gauc_of)
    check(entropy_loss(labels, ours, theirs, users, 50, 0.9), entropy_of)
    check(calibration(labels, ours, users, 50, 0.9), calibration_of)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=60))
def test_a_groups_auc_is_that_of_its_rows(rows: list[tuple[bool, int, int]]) -> None:
    labels, scores, groups = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    parts = [groups == group for group in np.unique(groups)]
    both = [part for part in parts if labels[part].min() < labels[part].max()]
    values, sizes, share = grouped_auc(labels, scores, groups)
    assert values.tolist() == pytest.approx([roc_auc_score(labels[part], scores[part]) for part in both])
    assert sizes.tolist() == [part.sum() for part in both]
    assert share == pytest.approx(len(both) / len(parts))


def test_the_stability_index_is_that_of_two_histograms() -> None:
    _, ours, theirs, _ = both_score()
    ours = ours**2
    edges = np.unique([-1.0, *np.quantile(theirs, np.arange(1, 10) / 10), 2.0])
    p, q = (np.histogram(scores, edges)[0] + 0.5 for scores in (ours, theirs))
    p, q = p / p.sum(), q / q.sum()
    assert population_stability(ours, theirs) == pytest.approx(((p - q) * np.log(p / q)).sum())
    assert population_stability(ours, theirs) > 0.25
    assert population_stability(theirs, theirs) == 0.0
    constant = np.full(100, 0.3)
    assert population_stability(constant, constant) == 0.0
    assert population_stability(constant + 0.1, np.linspace(0.2, 0.35, 100)) > 0.25


def test_what_cannot_be_compared_is_none() -> None:
    users, ones = np.array(["a", "b", "c"]), np.ones(3)
    for gain in (auc_gain, gauc_gain, entropy_loss):
        assert gain(ones, ones / 2, ones / 3, users, 50) is None
        assert gain(ones[:0], ones[:0], ones[:0], users[:0], 50) is None
    assert gauc_gain(np.array([0.0, 1.0, 1.0]), ones, ones, users, 50) is None  # no user has both classes
    assert calibration(ones[:0], ones[:0], users[:0], 50) is None


def test_calibration_bins_hold_every_impression_once_in_order_of_the_probability() -> None:
    rng = np.random.default_rng(3)
    probabilities = rng.random(1_003).astype(np.float32)
    labels = (rng.random(1_003) < probabilities).astype(np.float32)
    bins = calibration_bins(labels, probabilities)
    assert sum(one.impressions for one in bins) == 1_003
    assert max(one.impressions for one in bins) - min(one.impressions for one in bins) <= 1
    assert [one.predicted for one in bins] == sorted(one.predicted for one in bins)
    mean = sum(one.impressions * one.observed for one in bins) / 1_003
    assert mean == pytest.approx(labels.mean(), abs=1e-6)
    assert all(abs(one.observed - one.predicted) < 0.2 for one in bins)
    assert calibration_bins(labels[:0], probabilities[:0]) == []
    assert [one.impressions for one in calibration_bins(labels[:3], probabilities[:3])] == [1, 1, 1]
    with pytest.raises(CorankError, match="1 of 3 probabilities are not finite"):
        calibration_bins(labels[:3], np.array([0.1, np.nan, 0.3]))
