"""The log of what was served: the next partitions' impressions, events and feedback, and features as they were read.

Below one folder, Delta tables partitioned by ``dt``, to which every service replica appends from time to time:

    impressions    one row per answered item, as the role of that name: what a config may train on next
    feedback       labels that callers sent later, as the role of that name
    events/ROLE    events that were pushed, as the table of that role
    requests       one row per request: its features as the model read them, and its scores
    shadow         one row per candidate: the scores of the model that is asked, but not answered by

Of users a share is logged, by hash, so that all that is known of a logged user is whole. What waits to be written is
lost when a replica is killed.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.delta.write import append
from features.digest import digest
from features.encoding import as_text
from features.sample_table import column_of
from features.schema import FEEDBACK, Feature, Grain, Schema, partition_of
from serving.api import ModelDescription, RankRequest
from serving.memo import Ranked
from serving.rows import RequestRow
from serving.settings import share_of_users

IMPRESSIONS, REQUESTS, EVENTS, SHADOW = "impressions", "requests", "events", "shadow"

FEATURES, FROM_STORE = "features", "from_store"
"""Columns of ``requests``: :func:`schema_digest` of the model's features, and whether all of them were read online."""

MOST_WAITING = 500_000
"""Rows that wait to be written; what comes on top is not logged."""

WRITE_AT = 50_000
"""Waiting rows by which writing begins early."""

WRITTEN, LOST = "written", "lost"

LOG = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class LogSettings:
    """Where and what is logged; plain values, as they are sent to the replicas.

    Attributes:
        folder: holds the tables; may be ``s3://``.
        share: of users, 0 … 1.
        seconds: between two appends.
    """

    folder: str
    grain: Grain
    share: float = 1.0
    seconds: float = 10.0


@dataclass(frozen=True)
class ServedRequest:
    """A request that was answered.

    Attributes:
        row: its features as the model read them.
        ts: its time, microseconds UTC.
        ranking: places of its candidates in the order in which they were answered; those left out were not.
        model: the one that answered.
    """

    request: RankRequest
    row: RequestRow
    ts: int
    ranked: Ranked
    ranking: Sequence[int]
    model: ModelDescription

    @property
    def user_id(self) -> str:
        return str(self.request.user_id)


class RequestLog:
    """Takes rows at once and appends them later, in a thread of its own.

    Args:
        counted: called with a table, what became of some rows (``written``, or ``lost``: they could not be written, or
            were too many), and their number.
    """

    def __init__(self, settings: LogSettings, counted: Callable[[str, str, int], None]) -> None:
        self._settings, self._counted = settings, counted
        self._waiting: deque[tuple[str, int, Any]] = deque()
        self._size = 0
        self._changing, self._writing = threading.Lock(), threading.Lock()
        self._due, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def wants(self, user_id: str) -> bool:
        """Whether requests of this user are logged."""
        return share_of_users(user_id) < self._settings.share

    def request(self, request: ServedRequest) -> None:
        """Log a request that was answered, if its user's are."""
        if self.wants(request.user_id):
            self._put(REQUESTS, len(request.ranked.scores), request)

    def shadow(self, request: ServedRequest) -> None:
        """Log what another model would have answered, if the user's requests are logged."""
        if self.wants(request.user_id):
            self._put(SHADOW, len(request.ranked.scores), request)

    def feedback(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log labels: request_id, item_id, label, value, ts."""
        self._put(FEEDBACK, len(rows), rows)

    def events(self, role: str, events: pl.DataFrame, types: Mapping[str, Any]) -> None:
        """Log events that were pushed.

        Args:
            types: columns of the log of this role, and their Polars types; other columns are left out.
        """
        self._put(f"{EVENTS}/{role}", events.height, (events, types))

    def forget(self) -> None:
        """Drop what waits: some of it may be of users who have just been forgotten."""
        with self._changing:
            for table, size, _ in self._waiting:
                self._counted(table, LOST, size)
            self._waiting.clear()
            self._size = 0

    def flush(self) -> None:
        """Append all that waits now. What cannot be written is lost, and told in the service's log."""
        with self._writing:
            with self._changing:
                waiting, self._waiting, self._size = self._waiting, deque(), 0
            parts: dict[str, list[Any]] = {}
            for table, _, part in waiting:
                parts.setdefault(table, []).append(part)
            for table, entries in parts.items():
                self._write(table, entries)

    def close(self) -> None:
        """Write what waits, and end."""
        self._ended = True
        self._due.set()
        self._thread.join()

    def _put(self, table: str, size: int, part: Any) -> None:
        with self._changing:
            if self._size + size > MOST_WAITING:
                self._counted(table, LOST, size)
                return
            self._waiting.append((table, size, part))
            self._size += size
        if self._size >= WRITE_AT:
            self._due.set()

    def _run(self) -> None:
        while not self._ended:
            self._due.wait(self._settings.seconds)
            self._due.clear()
            self.flush()

    def _write(self, table: str, entries: list[Any]) -> None:
        for name, make in _makers(table).items():
            count = 0
            try:
                rows = make(entries)
                count = rows.height
                dt = [partition_of(ts, self._settings.grain) for ts in rows["ts"]]
                append(
                    f"{self._settings.folder}/{name}",
                    rows.with_columns(pl.Series("dt", dt, pl.String)).to_arrow(),
                    {},
                )
                self._counted(name, WRITTEN, count)
            except Exception:  # whatever it is, requests are answered
                self._counted(name, LOST, count or len(entries))
                LOG.exception("rows of the served log's table %s are lost", name)


def _makers(table: str) -> dict[str, Callable[[list[Any]], pl.DataFrame]]:
    """What is written of what waits under this name: tables, and how their rows are made."""
    if table == REQUESTS:
        return {IMPRESSIONS: _impressions, REQUESTS: _requests}
    if table == SHADOW:
        return {SHADOW: _impressions}
    return {table: _feedback if table == FEEDBACK else _events}


def _events(entries: Sequence[tuple[pl.DataFrame, Mapping[str, Any]]]) -> pl.DataFrame:
    parts = [
        events.select(pl.col(name).cast(kind) for name, kind in types.items() if name in events.columns)
        for events, types in entries
    ]
    return pl.concat(parts, how="diagonal_relaxed")


def _impressions(requests: Sequence[ServedRequest]) -> pl.DataFrame:
    """One row per item that was answered; ``position`` counts from 0."""
    return pl.concat([_shown(request) for request in requests], how="diagonal_relaxed")


def _shown(served: ServedRequest) -> pl.DataFrame:
    request, schema = served.request, served.model.schema
    ids, scores = request.item_ids, served.ranked.scores[list(served.ranking)]
    count = len(served.ranking)
    context = {
        feature.source: pl.Series(
            [_logged(feature, request.context.get(feature.source))] * count, dtype=_type(feature), strict=False
        )
        for feature in schema.side("context")
    }
    return pl.DataFrame(
        {
            **context,
            "request_id": [served.row.request_id] * count,
            "user_id": [served.user_id] * count,
            "item_id": [str(ids[place]) for place in served.ranking],
            "ts": [served.ts] * count,
            "position": np.arange(count),
            "model_version": [served.model.version] * count,
            **{f"score__{task.name}": scores[:, index] for index, task in enumerate(schema.tasks)},
        }
    )


def _type(feature: Feature) -> pl.DataType:
    if feature.kind == "number":
        return pl.Float64()
    return pl.List(pl.String) if feature.multi else pl.String()


def _logged(feature: Feature, value: Any) -> Any:
    """A value of the context in the type of the log's column."""
    if value is None or feature.kind == "number":
        return value if value is None else float(value)
    if feature.multi:
        return [as_text(element) for element in value if element is not None]
    return as_text(value)


def _requests(requests: Sequence[ServedRequest]) -> pl.DataFrame:
    """One row per request; what there is one of per candidate is a list."""
    by_schema: dict[str, list[ServedRequest]] = {}
    for request in requests:
        by_schema.setdefault(schema_digest(request.model.schema), []).append(request)
    return pl.concat([_of_schema(key, same) for key, same in by_schema.items()], how="diagonal_relaxed")


def _of_schema(key: str, requests: Sequence[ServedRequest]) -> pl.DataFrame:
    rows = pa.concat_tables([served.row.rows for served in requests])
    request = column_of(rows, "requests").flatten()
    candidates = request.field("candidates")
    offsets, candidate = candidates.offsets, candidates.flatten()
    columns: dict[str, Any] = {
        "request_id": [served.row.request_id for served in requests],
        "user_id": rows["user_id"],
        "ts": request.field("ts"),
        "model_version": [served.model.version for served in requests],
        FEATURES: [key] * len(requests),
        FROM_STORE: [not served.request.inline and served.row.degraded is None for served in requests],
    }
    columns |= {
        field.name: request.field(field.name)
        for field in request.type
        if field.name not in ("request_id", "ts", "candidates")
    }
    columns |= {field.name: pa.ListArray.from_arrays(offsets, candidate.field(field.name)) for field in candidate.type}
    columns |= {name: rows[name] for name in rows.column_names if name not in ("user_id", "requests")}
    scores = np.concatenate([served.ranked.scores for served in requests])
    for index, task in enumerate(requests[0].model.schema.tasks):
        columns[f"score__{task.name}"] = pa.ListArray.from_arrays(offsets, pa.array(scores[:, index]))
    frame = pl.from_arrow(pa.table(columns))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _feedback(entries: Iterable[Sequence[Mapping[str, Any]]]) -> pl.DataFrame:
    kinds = {"request_id": pl.String, "item_id": pl.String, "label": pl.String, "value": pl.Int64, "ts": pl.Int64}
    return pl.DataFrame([row for entry in entries for row in entry], schema=kinds)


def schema_digest(schema: Schema) -> str:
    """Of a model's features: rows with the same one have the same columns."""
    return digest(schema.model_dump(mode="json"))
