"""What the console shows beyond an answer: whom and what one may ask about, and histories in readable form.

The online store holds codes. Vocabularies are read back exactly; hashed ids are looked up among the values that the
tables of users and items, which the service can read, have in these columns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from features.delta.table import Table
from features.encoding import as_text, hash_id
from features.sample_table import timeline_column
from features.schema import SECOND, EventField, Schema, Sequence
from features.store.online import FeatureStoreSettings
from serving.rows import RequestRow

MOST_NAMES = 1_000_000
"""Values of a column that are looked up."""

SHOWN = 100
"""Users and items that are proposed."""

OLD = 2 * 86_400 * SECOND
"""Microseconds after which a log's newest state is taken to be history, which is asked about at its own time."""

KEPT_SECONDS = 300.0
"""After which names and what is proposed are read again."""


class Console:
    """Reads the tables behind a store when the page asks, seldom; not for several threads at once."""

    def __init__(self, store: FeatureStoreSettings, log_delay: int) -> None:
        self._store, self._log_delay = store, log_delay
        self._last: tuple[float, tuple[list[str], list[str], int | None]] | None = None
        self._names: dict[str, tuple[float, dict[int, str]]] = {}

    def about(self, schema: Schema) -> dict[str, Any]:
        """Users and items to propose, the time to ask at, the log's delay, and the columns that a request needs."""
        users, popular, ts = self._proposed(schema)
        return {
            "users": users,
            "popular": popular,
            "log_delay": self._log_delay,
            "ts": ts if ts is not None and ts < time.time_ns() // 1_000 - OLD else None,
            "context": [
                {"name": feature.source, "kind": feature.kind, "multi": feature.multi, "values": feature.vocabulary}
                for feature in {feature.source: feature for feature in schema.side("context")}.values()
            ],
            "sequences": [{"name": sequence.name, "columns": _columns(sequence)} for sequence in schema.sequences],
        }

    def history(self, schema: Schema, row: RequestRow, attention: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Per sequence the events of a request, oldest first: ``ts``, ``fields`` as text, ``items``, ``attention``."""
        found = {}
        for sequence in schema.sequences:
            fields = {
                field.name: self._texts(field, row.rows[timeline_column(sequence, field)][0].as_py())
                for field in sequence.fields
            }
            items = next((fields[field.name] for field in sequence.fields if field.source == "item_id"), [])
            found[sequence.name] = {
                "ts": row.rows[timeline_column(sequence, None)][0].as_py(),
                "fields": fields,
                "items": [item for item in items if item is not None],
                "attention": attention[sequence.name].tolist(),
            }
        return found

    def _texts(self, field: EventField, codes: list[Any]) -> list[str | None]:
        if field.kind == "number":
            return [None if code is None or np.isnan(code) else f"{code:g}" for code in codes]
        if field.vocabulary is not None:
            return [field.vocabulary[code - 1] if code else None for code in codes]
        names = self._names_of(field.source)
        return [names.get(code, f"#{code & (1 << 64) - 1:016x}") if code else None for code in codes]

    def _names_of(self, column: str) -> dict[int, str]:
        """Code → value, of the values of a column of users or items."""
        if column not in self._names or time.monotonic() - self._names[column][0] >= KEPT_SECONDS:
            names: dict[int, str] = {}
            for table in (self._store.items, self._store.users):
                if table is not None and column in table.schema().names:
                    values = table.collect(table.scan().select(column)).to_series()
                    values = values.explode() if isinstance(values.dtype, pl.List) else values
                    texts = (as_text(value) for value in values.drop_nulls().unique().head(MOST_NAMES))
                    names |= {hash_id(text): text for text in texts}
            self._names[column] = time.monotonic(), names
        return self._names[column][1]

    def _proposed(self, schema: Schema) -> tuple[list[str], list[str], int | None]:
        """Users with new events, items that these are of, most frequent first, then others, and the state's time."""
        if self._last is not None and time.monotonic() - self._last[0] < KEPT_SECONDS:
            return self._last[1]
        items = [
            timeline_column(sequence, field)
            for sequence in schema.sequences
            for field in sequence.fields
            if field.source == "item_id"
        ]
        rows = _newest(self._store.state, ["user_id", "ts", *items])
        if rows.is_empty():
            return [], [], None
        codes = [rows[column].explode() for column in items if column in rows.columns]
        counts = pl.concat(codes).drop_nulls().value_counts(sort=True) if codes else pl.DataFrame()
        names = self._names_of("item_id")
        frequent = [names[code] for code in (counts.to_series(0) if counts.width else []) if code in names]
        popular = list(dict.fromkeys([*frequent, *sorted(names.values())[:SHOWN]]))
        proposed = rows["user_id"].head(SHOWN).to_list(), popular[:SHOWN], int(rows["ts"].to_numpy().max())
        self._last = time.monotonic(), proposed
        return proposed


def _newest(state: Table, columns: list[str]) -> pl.DataFrame:
    """These columns, as far as they are there, of the state table's newest partition, or of a table without any."""
    if not state.exists():
        return pl.DataFrame()
    partitions = [state.partitions()[-1]] if state.partitions() else None
    rows = state.scan(partitions)
    present = set(rows.collect_schema().names())
    return state.collect(rows.select([column for column in columns if column in present]), partitions)


def _columns(sequence: Sequence) -> list[dict[str, Any]]:
    by_source = {field.source: field for field in sequence.fields}
    return [{"name": name, "kind": field.kind, "values": field.vocabulary} for name, field in by_source.items()]
