"""Self-check requests: stored beside a model with the scores they must give wherever it is loaded."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from features.reader import SampleSource
from models.protocol import RankingModel
from pipeline.evaluation import score_rows

ROWS = 8


def selfcheck_document(model: RankingModel, source: SampleSource) -> dict[str, Any]:
    """A few rows of the sample table and their probabilities, as JSON."""
    rows = next((rows for rows in map(source.read, source.files()) if rows.num_rows), None)
    if rows is None:
        return {"rows": [], "scores": []}
    rows = rows.slice(0, ROWS)
    return {"rows": rows.to_pylist(), "scores": score_rows(model, rows)["scores"].to_pylist()}


def selfcheck_difference(model: RankingModel, document: dict[str, Any], layout: pa.Schema) -> float:
    """Largest difference between the stored scores and the model's scores of the same rows."""
    if not document["rows"]:
        return 0.0
    columns = pa.schema([field for field in layout if field.name not in ("dt", "bucket")])
    rows = pa.Table.from_pylist(document["rows"], schema=columns)
    scores = score_rows(model, rows)["scores"].to_pylist()
    return max(
        abs(ours - theirs)
        for mine, stored in zip(scores, document["scores"], strict=True)
        for ours, theirs in zip(mine, stored, strict=True)
    )
