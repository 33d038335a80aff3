"""Requests stored beside a model with the scores that they must give, wherever it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from features.errors import CorankError
from features.sample_table import sample_schema
from features.schema import Schema
from models.config import Precision
from models.protocol import RankingModel
from models.scoring import score_batches

TOLERANCES: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 0.02}
"""Largest difference of a probability that is still the same score."""

TOLERANCE = TOLERANCES["float32"]

CANDIDATES = 6_000


def computed_in(precision: Precision) -> AbstractContextManager[Any]:
    """A block in which models compute in this precision on the CPU."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


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


def require_selfcheck(
    what: str, model: RankingModel, document: Mapping[str, Any], precision: Precision = "float32"
) -> None:
    """
    Raises:
        CorankError: the model gives other scores than those stored.
    """
    with computed_in(precision):
        drift = selfcheck_difference(model, document)
    if not drift <= TOLERANCES[precision]:  # NaN is no agreement either
        raise CorankError(f"model {what}: its self-check requests differ by {drift:.2e} from the stored scores")
