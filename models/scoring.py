"""The one way from rows of the sample table to probabilities: of serving, evaluation and validation alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from features.batch import RequestBatch, collate
from features.sample_table import cut
from models.protocol import RankingModel

UNLIMITED = 2**62


@torch.inference_mode()
def probabilities(model: RankingModel, batch: RequestBatch) -> np.ndarray:
    """Predicted probabilities of every candidate, [C, K]; the batch lies on the model's device."""
    scores: np.ndarray = model(batch).float().sigmoid().cpu().numpy()
    return scores


def score_batches(
    model: RankingModel, rows: pa.Table, candidates: int, events: int = UNLIMITED
) -> Iterator[tuple[RequestBatch, np.ndarray]]:
    """Rows of the sample table in batches within a budget of candidates and events, each with its probabilities."""
    for part in cut(rows, candidates, events):
        batch = collate(part, model.schema)
        yield batch, probabilities(model, batch)
