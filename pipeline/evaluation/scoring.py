"""Scores samples with a model: the probabilities of every candidate of every request, beside its labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from features.errors import CorankError
from features.samples.source import SampleSource
from features.schema import Schema
from models.artifact import load_artifact
from models.memory import keep_freed_memory
from models.metrics import task_metrics
from models.protocol import RankingModel
from models.scoring import score_batches


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
    parts: list[dict[str, Any]] = []
    for batch, scores in score_batches(model, rows, batch_candidates, batch_events):
        request = batch.items.request.numpy()
        parts.append(
            {
                "user_id": pa.array(batch.user_id[request], pa.string()),
                "request_id": pa.array(batch.request_id[request], pa.string()),
                "item_id": pa.array(batch.item_id, pa.string()),
                "ts": pa.array(batch.users.ts.numpy()[request]),
                "labels": _lists(batch.labels.numpy()),
                "mask": _lists(batch.label_mask.numpy()),
                "scores": _lists(scores),
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


def score_source(
    artifact: str, source: SampleSource, batch_candidates: int = 6_000, batch_events: int = 200_000
) -> Scored:
    """Score every request of a source on Ray Data; no row is dropped.

    Raises:
        CorankError: there is nothing to score.
    """
    if not source.files():
        raise CorankError("evaluation: no held-out requests; widen `holdout.test` or import more partitions")
    scored = source.dataset().map_batches(
        _score,
        fn_args=(artifact, batch_candidates, batch_events),
        batch_size=None,
        batch_format="pyarrow",
    )
    blocks = [block for block in scored.iter_batches(batch_size=None, batch_format="pyarrow") if block.num_rows]
    if not blocks:
        raise CorankError("evaluation: no held-out requests; widen `holdout.test` or import more partitions")
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


def scored_metrics(schema: Schema, scored: Scored) -> dict[str, dict[str, float | None]]:
    """Metrics of every task over the impressions whose label is known.

    Raises:
        CorankError: a score is not finite.
    """
    metrics = {}
    for index, task in enumerate(schema.tasks):
        known = scored.mask[:, index].astype(bool)
        labels, scores = scored.labels[known, index], scored.scores[known, index]
        metrics[task.name] = task_metrics(labels, scores, scored.user_id[known], scored.request_id[known]).as_dict()
    return metrics
