"""A feature store over a few profiles and sequences whose values are hard to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import write_deltalake

from features.delta.table import Table
from features.encoding import hash_id
from features.schema import EventField, Feature, Schema, Sequence, Task
from features.store.online import FeatureStoreSettings

DAY = 86_400_000_000
BIG = 2**62 + 1  # changes when it passes through a float

SCHEMA = Schema(
    features=(
        Feature(name="user_id", side="user"),
        Feature(name="city", side="user"),
        Feature(name="segment", column="segment_id", side="user"),
        Feature(name="age", kind="number", side="user"),
        Feature(name="tags", side="user", multi=True),
        Feature(name="groups", side="user", multi=True),
        Feature(name="score", side="user", kind="id"),
        Feature(name="item_id", side="item"),
        Feature(name="genre", side="item", kind="category", vocabulary=("drama", "action")),
        Feature(name="price", side="item", kind="number"),
    ),
    sequences=(
        Sequence(
            name="clicks",
            events="events",
            length=200,
            fields=(EventField(name="item", column="item_id"), EventField(name="dwell", kind="number")),
        ),
    ),
    tasks=(Task(name="click"),),
)
USERS = {"uid": pl.String, "city": pl.String, "segment_id": pl.Int64, "age": pl.Float64, "tags": pl.List(pl.String)} | {
    "groups": pl.List(pl.Int64),
    "score": pl.Float32,
    "updated_at": pl.Int64,
}
STATE = {"user_id": pl.String, "ts": pl.Int64, "clicks__ts": pl.List(pl.Int64), "clicks__item": pl.List(pl.Int64)} | {
    "clicks__dwell": pl.List(pl.Float32),
    "clicks__event_id": pl.List(pl.Int64),
}


def user_row(uid: str, updated_at: int, **values: Any) -> dict[str, Any]:
    return dict.fromkeys(USERS) | {"uid": uid, "updated_at": updated_at} | values


def write(path: Path, rows: list[dict[str, Any]], schema: dict[str, Any], **options: Any) -> None:
    frame = pl.DataFrame(rows, schema=schema)
    write_deltalake(str(path), frame.to_arrow(), mode="append", **options)


@pytest.fixture
def settings(tmp_path: Path) -> FeatureStoreSettings:
    users = [
        user_row("a", 0, city="Köln", segment_id=BIG, age=31.5, tags=["x", "y"], groups=[BIG, 2], score=0.1),
        user_row("b", 5 * DAY),
        user_row("c", 5 * DAY, tags=[], groups=[]),
        user_row("d", 6 * DAY, city="Rom"),
        user_row("a", 9 * DAY, city="Bonn", segment_id=7),
    ]
    items: list[dict[str, Any]] = [
        {"item_id": 1, "genre": "drama", "price": 2.5, "updated_at": 0},
        {"item_id": 2, "genre": None, "price": None, "updated_at": 3 * DAY},
    ]
    long = list(range(200))
    state: list[dict[str, Any]] = [
        {
            "user_id": "a",
            "ts": 2 * DAY,
            "clicks__ts": [DAY + one for one in long],
            "clicks__item": [hash_id(one) for one in long],
            "clicks__dwell": [None if one == 3 else one / 7 for one in long],
            "clicks__event_id": [hash_id(f"e{one}") for one in long],
        },
        {
            "user_id": "b",
            "ts": 2 * DAY,
            "clicks__ts": [],
            "clicks__item": [],
            "clicks__dwell": [],
            "clicks__event_id": [],
        },
    ]
    write(tmp_path / "users", users, USERS)
    write(
        tmp_path / "items",
        items,
        {"item_id": pl.Int64, "genre": pl.String, "price": pl.Float64, "updated_at": pl.Int64},
    )
    write(tmp_path / "state", state, STATE)
    return FeatureStoreSettings(
        project="test",
        registry=str(tmp_path / "feast" / "registry.db"),
        schema=SCHEMA,
        users=Table("users", str(tmp_path / "users"), {"user_id": "uid"}),
        items=Table("items", str(tmp_path / "items")),
        state_uri=str(tmp_path / "state"),
        sqlite_path=str(tmp_path / "feast" / "online.db"),
    )
