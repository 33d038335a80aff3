"""Evaluation: the candidate on the newest held-out requests, beside a baseline and the champion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.batch import collate
from features.errors import CorankError
from features.sample_table import label_column
from features.samples.source import SampleSource
from features.schema import Schema, Task
from models.artifact import load_artifact
from models.memory import keep_freed_memory
from models.metrics import Gain, TaskMetrics, auc_gain, task_metrics
from models.protocol import RankingModel
from pipeline.training import probabilities

IDENTITY = ("user_id", "request_id", "item_id", "ts")
"""What tells impressions apart; request ids may repeat from one partition to the next."""

PRIOR_STRENGTH = 10.0
"""Impressions of prior that smooth the baseline's user and item means."""


@dataclass(frozen=True)
class Scored:
    """Impressions with labels and probabilities, one row per candidate; arrays [C] and [C, K]."""

    user_id: np.ndarray
    request_id: np.ndarray
    item_id: np.ndarray
    ts: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    scores: np.ndarray


@cache
def _loaded(artifact: str) -> RankingModel:
    """One model per worker process."""
    keep_freed_memory()
    return load_artifact(artifact).model


def _score(rows: pa.Table, artifact: str, batch_candidates: int, batch_events: int) -> pa.Table:
    return score_rows(_loaded(artifact), rows, batch_candidates, batch_events)


def score_rows(model: Any, rows: pa.Table, batch_candidates: int = 6_000, batch_events: int = 200_000) -> pa.Table:
    """Score rows of the sample table: user_id, request_id, item_id, labels, mask, scores per candidate."""
    from features.sample_table import cut

    parts: list[dict[str, Any]] = []
    for piece in cut(rows, batch_candidates, batch_events):
        batch = collate(piece, model.schema)
        request = batch.items.request.numpy()
        parts.append(
            {
                "user_id": pa.array(batch.user_id[request], pa.string()),
                "request_id": pa.array(batch.request_id[request], pa.string()),
                "item_id": pa.array(batch.item_id, pa.string()),
                "ts": pa.array(batch.users.ts.numpy()[request]),
                "labels": _lists(batch.labels.numpy()),
                "mask": _lists(batch.label_mask.numpy()),
                "scores": _lists(probabilities(model, batch)),
            }
        )
    tasks = len(model.schema.tasks)
    empty = {
        **dict.fromkeys(("user_id", "request_id", "item_id"), pa.array([], pa.string())),
        "ts": pa.array([], pa.int64()),
        "labels": _lists(np.zeros((0, tasks), np.float32)),
        "mask": _lists(np.zeros((0, tasks), bool)),
        "scores": _lists(np.zeros((0, tasks), np.float32)),
    }
    return pa.concat_tables([pa.table(part) for part in parts or [empty]])


def _lists(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def score_source(artifact: str, source: SampleSource, batch_candidates: int, batch_events: int) -> Scored:
    """Score every request of a source on Ray Data; no row is dropped.

    Raises:
        CorankError: there is nothing to score.
    """
    if not source.files():
        raise CorankError("evaluation: no held-out requests; widen `split.test` or import more partitions")
    scored = source.dataset().map_batches(
        _score,
        fn_args=(artifact, batch_candidates, batch_events),
        batch_size=None,
        batch_format="pyarrow",
    )
    blocks = [block for block in scored.iter_batches(batch_size=None, batch_format="pyarrow") if block.num_rows]
    if not blocks:
        raise CorankError("evaluation: no held-out requests; widen `split.test` or import more partitions")
    table = pa.concat_tables(blocks).combine_chunks()
    tasks = len(source.schema.tasks)

    def matrix(name: str) -> np.ndarray:
        flat = pa.concat_arrays(table[name].chunks).flatten()
        return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(-1, tasks)

    def text(name: str) -> np.ndarray:
        return np.asarray(table[name].to_pylist(), dtype=object)

    return Scored(
        text("user_id"),
        text("request_id"),
        text("item_id"),
        table["ts"].to_numpy(),
        matrix("labels"),
        matrix("mask"),
        matrix("scores"),
    )


def impressions(source: SampleSource, task: Task) -> pl.DataFrame:
    """Impressions of one task as a flat frame: user_id, request_id, item_id, ts, label (known ones only)."""
    frames = []
    for file in source.files():
        rows = source.read(file)
        if rows.num_rows:
            frame = pl.DataFrame(pl.from_arrow(rows.select(["user_id", "requests"])))
            frame = frame.explode("requests").unnest("requests").select("user_id", "request_id", "ts", "candidates")
            frame = frame.explode("candidates").with_columns(
                pl.col("candidates").struct.field("item_id"),
                pl.col("candidates").struct.field(label_column(task)).cast(pl.Float64).alias("label"),
            )
            frames.append(frame.drop("candidates").drop_nulls("label"))
    if not frames:
        raise CorankError("evaluation: there are no impressions with known labels")
    return pl.concat(frames)


def baseline(source: SampleSource, task: Task, cut: int, log_delay: int) -> pl.DataFrame | None:
    """The baseline printed beside the model: a logistic fit of the smoothed user mean and item mean.

    Both means use only labels of requests older than the request's time − log delay; item means are frozen
    at ``cut``, like the model. Fitted on requests before the cut.

    Args:
        cut: first request time of the test set, microseconds UTC.

    Returns:
        user_id, request_id, item_id, ts, label and score of the test set's impressions; None when there are not both
        classes before the cut to fit it on.
    """
    from sklearn.linear_model import LogisticRegression

    shown = impressions(source, task)
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
    return np.log(clipped) - np.log1p(-clipped)


@dataclass(frozen=True)
class TaskReport:
    """One task: the candidate, the baseline, the champion, and AUC gains; None of what cannot be told."""

    metrics: TaskMetrics
    baseline: TaskMetrics | None
    gain: Gain | None
    champion: TaskMetrics | None
    champion_gain: Gain | None

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.metrics.as_dict(),
            "baseline": self.baseline.as_dict() if self.baseline else None,
            "auc_gain_over_baseline": asdict(self.gain) if self.gain else None,
            "champion": self.champion.as_dict() if self.champion else None,
            "auc_gain_over_champion": asdict(self.champion_gain) if self.champion_gain else None,
        }


def report(
    schema: Schema,
    scored: Scored,
    baselines: Mapping[str, pl.DataFrame | None],
    champion: Scored | None,
    resamples: int,
) -> dict[str, TaskReport]:
    """Metrics of every task; candidate, baseline and champion judge the same impressions."""
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
        rival = _champion_scores(scored, champion, index, known)
        reports[task.name] = TaskReport(
            metrics=task_metrics(labels, scores, users, requests),
            baseline=task_metrics(labels, other, users, requests) if other is not None else None,
            gain=auc_gain(labels, scores, other, users, resamples) if other is not None else None,
            champion=task_metrics(labels, rival, users, requests) if rival is not None else None,
            champion_gain=auc_gain(labels, scores, rival, users, resamples) if rival is not None else None,
        )
    return reports


def _champion_scores(scored: Scored, champion: Scored | None, index: int, known: np.ndarray) -> np.ndarray | None:
    if champion is None:
        return None
    assert (champion.request_id == scored.request_id).all()
    assert (champion.item_id == scored.item_id).all()
    return np.asarray(champion.scores[known, index])
