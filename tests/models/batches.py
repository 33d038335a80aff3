"""Random rows of the sample table: ragged and empty histories, several requests per timeline."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa

from features.sample_table import sample_schema
from features.schema import SECOND, EventField, Feature, Schema, Sequence, Task


def make_schema(tasks: int = 2, length: int = 4) -> Schema:
    return Schema(
        features=(
            Feature(name="user_id", side="user", buckets=50, dim=5),
            Feature(name="age", side="user", kind="number", dim=3),
            Feature(name="device", side="context", kind="category", vocabulary=("a", "b"), dim=2),
            Feature(name="item_id", side="item", buckets=50, dim=6),
            Feature(name="tags", side="item", kind="category", vocabulary=("x", "y"), multi=True, dim=3),
        ),
        sequences=(
            Sequence(name="seen", events="e", length=length, fields=(EventField(name="item_id", buckets=50, dim=6),)),
            Sequence(name="bought", events="e", length=2, fields=(EventField(name="item_id", buckets=50, dim=6),)),
        ),
        tasks=tuple(Task(name=f"task{index}") for index in range(tasks)),
    )


def make_rows(schema: Schema, seed: int, timelines: int = 4) -> pa.Table:
    rng = random.Random(seed)
    rows = []
    for user in range(timelines):
        row: dict[str, Any] = {"user_id": f"u{user}", "dt": "d", "bucket": "0"}
        lengths = {}
        for sequence in schema.sequences:
            count = lengths[sequence.name] = rng.choice([0, 1, 7, 12])
            row[f"{sequence.name}__ts"] = sorted(rng.randint(0, 1000) * SECOND for _ in range(count))
            row[f"{sequence.name}__item_id"] = [rng.randint(1, 10**9) for _ in range(count)]
        requests = rng.randint(1, 3)
        ends = {name: sorted(rng.randint(0, count) for _ in range(requests)) for name, count in lengths.items()}
        row["requests"] = [
            {
                "request_id": f"u{user}-{index}",
                "ts": (1001 + 500 * index) * SECOND,
                "user_known": True,
                **{f"end__{name}": values[index] for name, values in ends.items()},
                "feature__user_id": rng.choice([0, user + 1]),
                "feature__age": rng.choice([None, 30.0 + user]),
                "feature__device": rng.randint(0, 2),
                "candidates": [
                    {
                        "item_id": str(item),
                        "item_known": True,
                        "feature__item_id": rng.randint(0, 10**9),
                        "feature__tags": [rng.randint(0, 2) for _ in range(rng.randint(0, 3))],
                        **{f"label__{task.name}": rng.choice([0, 1, None]) for task in schema.tasks},
                        "weight": 1.0,
                    }
                    for item in range(rng.choice([1, 1, 3, 6]))
                ],
            }
            for index in range(requests)
        ]
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=sample_schema(schema))
