"""The gate: the criteria that a challenger must meet to become champion, computed from arrays.

An interval can be better than a margin as a whole, worse as a whole, or hold the margin; then the test set alone does
not tell. What follows from that differs by criterion (see EvaluationConfig).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from features.schema import Schema
from models.metrics import (
    Estimate,
    Gain,
    auc_gain,
    calibration,
    entropy_loss,
    gauc_gain,
    population_stability,
)
from models.selfcheck import selfcheck_scores
from pipeline.evaluation.comparison import TaskReport
from pipeline.evaluation.criterion import Criterion
from pipeline.evaluation.scoring import Scored
from pipeline.evaluation.settings import EvaluationConfig

LATENCY_ROUNDS = 5
"""Timings of each model, alternately; the fastest counts."""


@dataclass(frozen=True)
class Rival:
    """The champion on the challenger's test set.

    Attributes:
        name: as people read it.
        since: ts from which on it is compared; it has trained on the requests before.
        seconds, own_seconds: of scoring the self-check requests, champion and challenger; None where there are none.
    """

    name: str
    scored: Scored
    since: int
    seconds: float | None = None
    own_seconds: float | None = None


def judge(
    limits: EvaluationConfig,
    schema: Schema,
    gate_task: str,
    scored: Scored,
    reports: Mapping[str, TaskReport],
    rival: Rival | None,
    segments: Mapping[str, np.ndarray],
    without: str = "there is no champion",
) -> list[Criterion]:
    """The verdict on a challenger, one criterion after the other; it passes when none has failed.

    Args:
        reports: of every task.
        segments: which candidates belong to each, bool [C].
        without: why there is no rival.
    """
    gate, criteria = reports[gate_task], []
    criteria.append(
        at_least(f"{gate_task} AUC, gain over the baseline", gate.gain, limits.min_gain_over_baseline, decides=True)
    )
    criteria += [
        at_least(f"{gate_task} AUC, gain over {name}", gain, limits.min_gain_over_references, decides=True)
        for name, gain in gate.reference_gains.items()
    ]
    if rival is None:
        criteria.append(Criterion("comparison with the champion", note=without))
    for index, task in enumerate(schema.tasks):
        criteria += _of_task(
            limits, task.name, task.name == gate_task, _known(scored, index, rival), reports[task.name]
        )
    if rival is not None:
        index = [task.name for task in schema.tasks].index(gate_task)
        for name, members in segments.items():
            part = _known(scored, index, rival, members)
            criteria.append(_of_segment(limits, f"{gate_task} AUC, {name}", part, rival.name))
        criteria.append(_latency(limits, rival))
    return criteria


@dataclass(frozen=True)
class _Known:
    """Impressions of one task with known labels, [C]."""

    labels: np.ndarray
    scores: np.ndarray
    users: np.ndarray
    rival: np.ndarray | None
    rival_name: str


def _known(scored: Scored, index: int, rival: Rival | None, members: np.ndarray | None = None) -> _Known:
    known = scored.mask[:, index].astype(bool)
    if rival is not None:
        known &= scored.ts >= rival.since
    if members is not None:
        known &= members
    return _Known(
        scored.labels[known, index],
        scored.scores[known, index],
        scored.user_id[known],
        None if rival is None else rival.scored.scores[known, index],
        "" if rival is None else rival.name,
    )


def _of_task(limits: EvaluationConfig, task: str, is_gate: bool, known: _Known, report: TaskReport) -> list[Criterion]:
    labels, scores, users, rival = known.labels, known.scores, known.users, known.rival
    resampling = (limits.resamples, limits.level)
    calibrated = calibration(labels, scores, users, *resampling)
    if rival is None:
        return [_calibration(limits, task, is_gate, calibrated, None)]
    margin = limits.max_loss_against_champion
    if not is_gate and limits.max_loss_of_other_tasks is not None:
        margin = limits.max_loss_of_other_tasks
    over, entropy = f"gain over {known.rival_name}", entropy_loss(labels, scores, rival, users, *resampling)
    return [
        at_least(f"{task} AUC, {over}", report.champion_gain, -margin, decides=is_gate, width=margin),
        at_least(f"{task} GAUC, {over}", gauc_gain(labels, scores, rival, users, *resampling), -margin, width=margin),
        _entropy(
            limits,
            f"{task} normalised entropy, above {known.rival_name}",
            entropy,
            is_gate,
        ),
        _calibration(limits, task, is_gate, calibrated, calibration(labels, rival, users, *resampling)),
        _drift(limits, f"{task} scores, PSI against {known.rival_name}", scores, rival, entropy),
    ]


def _drift(
    limits: EvaluationConfig, measured: str, scores: np.ndarray, rival: np.ndarray, entropy: Gain | None
) -> Criterion:
    """Scores that moved far from the champion's fail, unless the labels show that they became better."""
    limit, text = limits.max_drift, f"≤ {limits.max_drift:g}"
    if not len(scores):
        return Criterion(measured, limit=limit, limit_text=text, note="no label is known")
    found = Criterion(measured, population_stability(scores, rival), None, limit, text)
    if found.value is not None and found.value > limit and entropy is not None and entropy.high < 0:
        return replace(found, passed=True, note="towards the labels: the normalised entropy fell")
    return _judged(found, found.value is not None and found.value <= limit)


def _reaches(value: float, low: float, high: float, limit: float, decides: bool) -> bool | None:
    """Whether a value is at least ``limit``. Where its interval holds the limit, the value itself decides if
    ``decides``; else None."""
    if low >= limit:
        return True
    if high < limit:
        return False
    return value >= limit if decides else None


def at_least(
    measured: str, gain: Gain | None, limit: float | None, decides: bool = False, width: float | None = None
) -> Criterion:
    """A gain that must reach a limit.

    Args:
        width: an interval no wider than this must lie above the limit as a whole. Where it is wider and holds the
            limit, the value itself decides if ``decides``, else nothing is judged. None: the value alone is judged,
            whatever its interval.
    """
    if gain is None:
        return Criterion(measured, limit=limit, limit_text=_least(limit), note="the labels have not both classes")
    found = Criterion(measured, gain.difference, (gain.low, gain.high), limit, _least(limit))
    if limit is None:
        return found
    if width is None:
        return _judged(found, gain.difference >= limit)
    verdict = _reaches(gain.difference, gain.low, gain.high, limit, decides)
    if gain.low < limit and gain.high - gain.low <= width:
        verdict = False
    return _judged(found, verdict)


def _entropy(limits: EvaluationConfig, measured: str, loss: Gain | None, decides: bool) -> Criterion:
    limit, text = limits.max_entropy_loss, f"≤ {limits.max_entropy_loss:g}"
    if loss is None:
        return Criterion(measured, limit=limit, limit_text=text, note="the labels have not both classes")
    found = Criterion(measured, loss.difference, (loss.low, loss.high), limit, text)
    return _judged(found, _reaches(-loss.difference, -loss.high, -loss.low, -limit, decides))


def _calibration(
    limits: EvaluationConfig, task: str, decides: bool, ours: Estimate | None, rival: Estimate | None
) -> Criterion:
    """Positives ÷ predicted within [1 ÷ end, end], or no further off than the champion's."""
    measured, end = f"{task} calibration (positives ÷ predicted)", 1 + limits.max_miscalibration
    text = f"{1 / end:.2f} … {end:.2f}"
    if ours is None:
        return Criterion(measured, limit=end, limit_text=text, note="no label is known")
    found = Criterion(measured, ours.value, (ours.low, ours.high), end, text)
    if rival is not None and _factor(ours.value) <= _factor(rival.value):
        return _judged(found, True)
    # distances as factors: 1.5 and 1 ÷ 1.5 both are 1.5 off; an interval that holds 1 begins at 1
    low, high = sorted([_factor(ours.low), _factor(ours.high)])
    low = 1.0 if ours.low <= 1 <= ours.high else low
    return _judged(found, _reaches(-_factor(ours.value), -high, -low, -end, decides))


def _factor(ratio: float) -> float:
    return math.inf if ratio <= 0 else max(ratio, 1 / ratio)


def _of_segment(limits: EvaluationConfig, measured: str, known: _Known, champion: str) -> Criterion:
    count, margin = len(known.labels), limits.max_loss_in_segments
    measured, note = f"{measured}, gain over {champion}", f"{count:,} impressions"
    assert known.rival is not None
    gain = auc_gain(known.labels, known.scores, known.rival, known.users, limits.resamples, limits.level)
    if gain is None:
        return Criterion(measured, limit=-margin, limit_text=_least(-margin), note=f"{note}, not both classes")
    found = Criterion(measured, gain.difference, (gain.low, gain.high), -margin, _least(-margin), None, note)
    if count < limits.segment_impressions:
        return found
    return _judged(found, _reaches(gain.difference, gain.low, gain.high, -margin, False))


def _latency(limits: EvaluationConfig, rival: Rival) -> Criterion:
    measured, limit = f"time of scoring the self-check requests ÷ that of {rival.name}", limits.max_slowdown
    text = f"≤ {limit:g}"
    if not rival.seconds or rival.own_seconds is None:
        return Criterion(measured, None, None, limit, text, None, "there are no self-check requests")
    ratio, note = rival.own_seconds / rival.seconds, f"{rival.own_seconds * 1e3:.1f} ms"
    return Criterion(measured, ratio, None, limit, text, ratio <= limit, note)


def _least(limit: float | None) -> str:
    return "" if limit is None else f"≥ {limit:g}"


def _judged(found: Criterion, passed: bool | None) -> Criterion:
    note = found.note if passed is not None else ", ".join(filter(None, [found.note, "too few to tell"]))
    return replace(found, passed=passed, note=note)


def scoring_seconds(model: Any, other: Any, rows: pa.Table) -> tuple[float, float]:
    """Fastest time of scoring rows with each of two models, timed alternately after a first round of warming up.

    It is CPU time of one thread, so that other work on the machine makes no challenger fail.
    """
    taken: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(1 + LATENCY_ROUNDS):
            for times, scores in zip(taken, (model, other), strict=True):
                started = time.thread_time()
                selfcheck_scores(scores, rows)
                times.append(time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return min(taken[0][1:]), min(taken[1][1:])
