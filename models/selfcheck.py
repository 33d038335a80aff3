"""Requests stored beside a model with the scores that they must give, wherever it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from features.errors import CorankError
from features.sample_table import sample_schema
from features.schema import Schema
from models.protocol import RankingModel
from models.scoring import score_batches

TOLERANCE = 1e-5
"""Largest difference of a probability, in fp32, that is still the same score."""

CANDIDATES = 6_000


def selfcheck_scores(model: RankingModel, rows: pa.Table) -> np.ndarray:
    """Probabilities [C, K] of rows of the sample table."""
    return np.concatenate([scores for _, scores in score_batches(model, rows, CANDIDATES)])


def selfcheck_rows(schema: Schema, document: Mapping[str, Any]) -> pa.Table:
    """The stored requests as rows of the sample table."""
    layout = pa.schema([field for field in sample_schema(schema) if field.name not in ("dt", "bucket")])
    return pa.Table.from_pylist(document.get("rows", []), schema=layout)


def selfcheck_difference(model: RankingModel, document: Mapping[str, Any]) -> float:
    """Largest difference between the stored scores and the model's scores of the same rows; NaN when one is NaN."""
    if not document.get("rows"):
        return 0.0
    return float(
        np.abs(selfcheck_scores(model, selfcheck_rows(model.schema, document)) - np.array(document["scores"])).max()
    )


def require_selfcheck(what: str, model: RankingModel, document: Mapping[str, Any]) -> None:
    """
    Raises:
        CorankError: the model gives other scores than those stored.
    """
    drift = selfcheck_difference(model, document)
    if not drift <= TOLERANCE:  # NaN is no agreement either
        raise CorankError(f"model {what}: its self-check requests differ by {drift:.2e} from the stored scores")
