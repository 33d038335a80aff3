"""A service in one process: its schema, requests, rows, and models to be published."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import torch

from features.schema import EventField, Feature, Schema, Sequence, Task
from features.store.reader import OnlineReader
from models.artifact import save_artifact
from models.registry import build_model
from serving.ranker import Ranker
from serving.rows import build_row
from serving.settings import ServingSettings

SCHEMA = Schema(
    features=(
        Feature(name="user_id", side="user"),
        Feature(name="tags", side="user", multi=True),
        Feature(name="device", side="context"),
        Feature(name="hour", side="context", kind="number"),
        Feature(name="modes", side="context", multi=True),
        Feature(name="item_id", side="item"),
        Feature(name="price", side="item", kind="number"),
    ),
    sequences=(
        Sequence(name="clicks", events="events", length=5, fields=(EventField(name="item", column="item_id"),)),
    ),
    tasks=(Task(name="click"), Task(name="like")),
)


CONTEXT = {"device": "ios", "hour": 3, "modes": ["dark", 7]}


NOW = 1_000


def without_cost(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without how it came about."""
    return {name: value for name, value in answer.items() if name not in ("request_id", "memo", "milliseconds")}


class InProcess:
    """A deployment handle to an object in this process."""

    def __init__(self, target: Ranker) -> None:
        self.describe = Remote(target.describe)
        self.forget = Remote(target.forget)
        self.explain = Remote(target.explain)
        self.rank = Remote(lambda request: target.score([request])[0])


class Remote:
    def __init__(self, function: Any) -> None:
        self._function = function

    async def remote(self, *arguments: Any) -> Any:
        await asyncio.sleep(0)
        result = self._function(*arguments)
        return await result if asyncio.iscoroutine(result) else result


def body(**changes: Any) -> dict[str, Any]:
    return {"user_id": "7", "candidates": [1, "2"], "context": CONTEXT, "ts": NOW} | changes


def new_events(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"events": [{"event_id": "e1", "user_id": 9, "item_id": 1, "ts": NOW - 5} | row for row in rows], **more}


def rows_of(settings: ServingSettings, *requests: tuple[str, list[str], int]) -> list[Any]:
    """Rows of requests: user, candidates, ts."""
    reader = OnlineReader(settings.store)
    return [build_row(reader, 0, user, items, CONTEXT, ts).rows for user, items, ts in requests]


def published(root: Path, seed: int) -> tuple[str, str]:
    """Another model of the same features: its artifact and version."""
    torch.manual_seed(seed)
    artifact = root / f"model-{seed}"
    model = build_model(SCHEMA, "ui-mixformer", "tiny", id_dropout=0.0)
    return str(artifact), save_artifact(artifact, model, {"selfcheck": {"rows": [], "scores": []}})


def name(document: Path, artifact: str, **more: Any) -> None:
    scratch = document.with_suffix(".tmp")
    scratch.write_text(json.dumps({"artifact": artifact, **more}))
    scratch.replace(document)
