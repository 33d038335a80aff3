"""Self-check requests: stored beside a model with the scores they must give wherever it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from features.samples.source import SampleSource
from models.metrics import require_finite
from models.protocol import RankingModel
from models.selfcheck import selfcheck_scores

ROWS = 8


def selfcheck_document(model: RankingModel, source: SampleSource) -> dict[str, Any]:
    """A few rows of the sample table and their probabilities, as JSON.

    Raises:
        CorankError: a score is not finite.
    """
    rows = next((rows for rows in map(source.read, source.files()) if rows.num_rows), None)
    if rows is None:
        return {"rows": [], "scores": []}
    rows = rows.slice(0, ROWS)
    scores = selfcheck_scores(model, rows)
    require_finite("scores of the self-check requests", scores)
    return {"rows": rows.to_pylist(), "scores": scores.tolist()}


def erase_from_selfcheck(artifact: Path, users: Collection[str]) -> int:
    """Take the self-check requests of these users out of a published model; its weights and version stay.

    The checksum is written first: killed between the two files, the users are found again the next time.

    Returns:
        rows removed.
    """
    path, sums = artifact / "selfcheck.json", artifact / "SHA256SUMS"
    document = json.loads(path.read_text(encoding="utf-8"))
    rows, scores = document.get("rows", []), document.get("scores", [])
    kept, kept_scores, position = [], [], 0
    for row in rows:
        size = sum(len(request["candidates"]) for request in row["requests"])
        if row["user_id"] not in users:
            kept.append(row)
            kept_scores += scores[position : position + size]
        position += size
    if len(kept) == len(rows):
        return 0
    text = json.dumps({**document, "rows": kept, "scores": kept_scores}, indent=1, sort_keys=True)
    listing = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8").splitlines()]
    new_digest = hashlib.sha256(text.encode()).hexdigest()
    _replace(sums, "".join(f"{new_digest if name == path.name else value}  {name}\n" for value, name in listing))
    _replace(path, text)
    return len(rows) - len(kept)


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
