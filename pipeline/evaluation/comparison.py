"""The challenger beside a baseline and the champion, on the same impressions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from features.errors import CorankError
from features.schema import Schema
from models.metrics import CalibrationBin, Gain, TaskMetrics, auc_gain, calibration_bins, task_metrics
from pipeline.evaluation.impressions import IDENTITY
from pipeline.evaluation.scoring import Scored


@dataclass(frozen=True)
class TaskReport:
    """One task: the challenger, the baseline, the champion, and AUC gains; None where one is not defined.

    Attributes:
        references, reference_gains: by name the metrics of models stronger than the baseline, and AUC gains over them.
    """

    metrics: TaskMetrics
    baseline: TaskMetrics | None
    gain: Gain | None
    champion: TaskMetrics | None
    champion_gain: Gain | None
    references: dict[str, TaskMetrics] = field(default_factory=dict)
    reference_gains: dict[str, Gain | None] = field(default_factory=dict)
    calibration: list[CalibrationBin] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.metrics.as_dict(),
            "baseline": self.baseline.as_dict() if self.baseline else None,
            "auc_gain_over_baseline": asdict(self.gain) if self.gain else None,
            "champion": self.champion.as_dict() if self.champion else None,
            "auc_gain_over_champion": asdict(self.champion_gain) if self.champion_gain else None,
            "references": {name: metrics.as_dict() for name, metrics in self.references.items()},
            "calibration": [asdict(bin_) for bin_ in self.calibration],
        }


def compare(
    schema: Schema,
    scored: Scored,
    baselines: Mapping[str, pl.DataFrame | None],
    champion: Scored | None,
    since: int,
    resamples: int,
    level: float = 0.95,
    references: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> dict[str, TaskReport]:
    """Metrics of every task; challenger, baseline and champion are judged on the same impressions.

    Args:
        since: ts from which on the challenger is compared with the champion, which has trained on the requests before.
        references: per task and name the scores of all impressions, [C].
    """
    reports = {}
    for index, task in enumerate(schema.tasks):
        known = scored.mask[:, index].astype(bool)
        labels, scores = scored.labels[known, index], scored.scores[known, index]
        users, requests = scored.user_id[known], scored.request_id[known]
        keys = pl.DataFrame(
            {
                "user_id": users.astype(str),
                "request_id": requests.astype(str),
                "item_id": scored.item_id[known].astype(str),
                "ts": scored.ts[known],
            }
        )
        fitted, other = baselines[task.name], None
        if fitted is not None:
            beside = keys.join(fitted.select(*IDENTITY, "score"), on=IDENTITY, how="left", maintain_order="left")
            if beside["score"].null_count() or len(beside) != len(labels):
                raise CorankError(f"evaluation: task {task.name}: baseline and model saw different impressions")
            other = beside["score"].to_numpy()
        unseen = scored.ts[known] >= since
        rival = _champion_scores(scored, champion, index, known)
        beside_it = {name: of_all[known] for name, of_all in (references or {}).get(task.name, {}).items()}
        reports[task.name] = TaskReport(
            metrics=task_metrics(labels, scores, users, requests),
            baseline=task_metrics(labels, other, users, requests) if other is not None else None,
            gain=auc_gain(labels, scores, other, users, resamples, level) if other is not None else None,
            champion=task_metrics(labels[unseen], rival[unseen], users[unseen], requests[unseen])
            if rival is not None
            else None,
            champion_gain=auc_gain(labels[unseen], scores[unseen], rival[unseen], users[unseen], resamples, level)
            if rival is not None
            else None,
            references={name: _ranking_metrics(labels, theirs, users, requests) for name, theirs in beside_it.items()},
            reference_gains={
                name: auc_gain(labels, scores, theirs, users, resamples, level) for name, theirs in beside_it.items()
            },
            calibration=calibration_bins(labels, scores),
        )
    return reports


def _ranking_metrics(labels: np.ndarray, scores: np.ndarray, users: np.ndarray, requests: np.ndarray) -> TaskMetrics:
    """Metrics of scores that need not be probabilities."""
    found = task_metrics(labels, scores, users, requests)
    if len(scores) and scores.min() >= 0 and scores.max() <= 1:
        return found
    return replace(found, logloss=None, predicted=None, normalised_entropy=None)


def _champion_scores(scored: Scored, champion: Scored | None, index: int, known: np.ndarray) -> np.ndarray | None:
    if champion is None:
        return None
    assert (champion.request_id == scored.request_id).all()
    assert (champion.item_id == scored.item_id).all()
    return np.asarray(champion.scores[known, index])
