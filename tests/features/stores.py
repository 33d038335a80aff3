"""A feature store over a generated log (tests.features.worlds), its state table built by the sample builder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from features.builder.fold import fold_bucket
from features.builder.states import STATE
from features.delta.table import Table
from features.store.online import FeatureStoreSettings
from features.store.reader import OnlineReader
from tests.features.worlds import DAYS, SCHEMA, settings

BUCKETS = 2


def build_state(tables: dict[str, Table], root: Path, log_delay: int) -> dict[str, dict[str, Any]]:
    """Write the state table of all days to ``root / STATE``; returns the sample rows by day and user."""
    samples: dict[str, dict[str, Any]] = {day: {} for day in DAYS}
    for bucket in range(BUCKETS):
        for table, day, content, _ in fold_bucket(settings(tables, root, log_delay), bucket, DAYS, []):
            if table == STATE:
                content = content.append_column("dt", pa.array([day] * content.num_rows, pa.string()))
                frame = pl.DataFrame(pl.from_arrow(content))
                frame.write_delta(str(root / STATE), mode="append", delta_write_options={"partition_by": ["dt"]})
            else:
                samples[day] |= {row["user_id"]: row for row in content.to_pylist()}
    return samples


def store_settings(tables: dict[str, Table], root: Path, name: str, **options: Any) -> FeatureStoreSettings:
    """A feature store of its own, ``name``, over the state table below ``root``."""
    own = FeatureStoreSettings(
        project=name,
        registry=str(root / name / "registry.db"),
        schema=SCHEMA,
        users=tables["users"],
        items=tables["items"],
        state_uri=str(root / STATE),
        sqlite_path=str(root / name / "online.db"),
    )
    return replace(own, **options)


def online_content(settings: FeatureStoreSettings, users: int, ts: int) -> dict[str, Any]:
    """Everything a reader gives for users 0 … users (the last one is unknown) and all items, as plain values."""
    reader = OnlineReader(settings)
    content: dict[str, Any] = {"items": reader.items([str(item) for item in range(9)], ts).to_dicts()}
    for user_id in map(str, range(users + 1)):
        sequences = {
            name: {"ts": history.ts.tolist(), **{key: codes.tolist() for key, codes in history.fields.items()}}
            for name, history in reader.sequences(user_id).items()
        }
        content[user_id] = {"raw": reader.user(user_id), "coded": reader.encoded_user(user_id, ts), **sequences}
    return content
