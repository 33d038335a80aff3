"""The log of what was served: the next partitions' impressions, events and feedback, and features as they were read.

Below one folder, Delta tables partitioned by ``dt``, to which every service replica appends from time to time:

    impressions    one row per answered item, as the role of that name: what a config may train on next
    feedback       labels that callers sent later, as the role of that name
    events/ROLE    events that were pushed, as the table of that role
    requests       one row per request: its features as the model read them, and its scores
    shadow         one row per candidate: the scores of the model that is asked, but not answered by

Of users a share is logged, by hash, so that all requests of a logged user are; feedback and pushed events are logged of
everybody. What waits to be written is lost when a replica is killed.
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

MOST_WAITING = 256 << 20
"""Bytes of rows that wait to be written, about; what comes on top is not logged."""

WRITE_AT = 16 << 20
"""Waiting bytes by which writing begins early."""

SCORE, CONTEXT = "_score__", "_context__"
"""Begin the names of columns of ``requests``; those of a timeline begin with a letter."""

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
        user_id, item_ids, context: as they were sent.
        row: its features as the model read them.
        ts: its time, microseconds UTC.
        from_store: whether all of these were read online, and none was sent along.
        ranked: its scores.
        ranking: places of its candidates in the order in which they were answered; those left out were not.
        model: the one that answered.
        erased: when users had last been forgotten as it was read.
    """

    user_id: str
    item_ids: Sequence[str]
    context: Mapping[str, Any]
    row: RequestRow
    ts: int
    from_store: bool
    ranked: Ranked
    ranking: Sequence[int]
    model: ModelDescription
    erased: int = 0

    @classmethod
    def of(
        cls,
        request: RankRequest,
        row: RequestRow,
        ts: int,
        ranked: Ranked,
        ranking: Sequence[int],
        model: ModelDescription,
        erased: int = 0,
    ) -> ServedRequest:
        """What is logged of a request; the rest of it is not kept."""
        ids, from_store = [str(item) for item in request.item_ids], not request.inline and row.degraded is None
        context = dict(request.context)
        return cls(str(request.user_id), ids, context, row, ts, from_store, ranked, ranking, model, erased)

    @property
    def nbytes(self) -> int:
        """About what it keeps in memory."""
        return int(self.row.rows.nbytes) + self.ranked.scores.nbytes + 100 * len(self.item_ids) + 2_000


@dataclass(frozen=True)
class _Waiting:
    """What waits to be written: its table, rows (of a request, its impressions), bytes, and what they are made of."""

    table: str
    rows: int
    nbytes: int
    part: Any


class RequestLog:
    """Takes rows at once and appends them later, in a thread of its own.

    Args:
        counted: called with a table, what became of some rows (``written``, or ``lost``: they could not be written, or
            were too many), and their number.
    """

    def __init__(self, settings: LogSettings, counted: Callable[[str, str, int], None]) -> None:
        self._settings, self._counted = settings, counted
        self._waiting: deque[_Waiting] = deque()
        self._nbytes, self._erased = 0, 0
        self._changing, self._writing = threading.Lock(), threading.Lock()
        self._due, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def wants(self, user_id: str) -> bool:
        """Whether requests of this user are logged."""
        return share_of_users(user_id) < self._settings.share

    def request(self, request: ServedRequest) -> None:
        """Log a request that was answered, of a user whose requests are logged (:meth:`wants`)."""
        self._put_request(REQUESTS, request)

    def shadow(self, request: ServedRequest) -> None:
        """Log what another model would have answered."""
        self._put_request(SHADOW, request)

    def feedback(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Log labels: request_id, item_id, label, value, ts; returns whether there was room."""
        return self._put(_Waiting(FEEDBACK, len(rows), 500 * len(rows), rows))

    def events(self, role: str, events: pl.DataFrame, types: Mapping[str, Any]) -> None:
        """Log events that were pushed.

        Args:
            types: columns of the log of this role, and their Polars types; other columns are left out.
        """
        size = int(events.estimated_size())
        self._put(_Waiting(f"{EVENTS}/{role}", events.height, size, (events, types)))

    def forget(self, erased: int) -> None:
        """Drop what waits, and what was read before a moment and comes later: some of it may be of users who were
        forgotten then. Waits until what is being written is."""
        with self._writing, self._changing:
            self._erased = max(erased, self._erased)
            for waiting in self._waiting:
                self._lose(waiting)
            self._waiting.clear()
            self._nbytes = 0

    def flush(self) -> None:
        """Append all that waits now. What cannot be written is lost, and told in the service's log."""
        with self._writing:
            with self._changing:
                waiting, self._waiting, self._nbytes = self._waiting, deque(), 0
            by_table: dict[str, list[_Waiting]] = {}
            for entry in waiting:
                by_table.setdefault(entry.table, []).append(entry)
            for table, entries in by_table.items():
                self._write(table, entries)

    def close(self) -> None:
        """Write what waits, and end."""
        self._ended = True
        self._due.set()
        self._thread.join()
        self.flush()  # what came while the last ones were written

    def _put_request(self, table: str, request: ServedRequest) -> None:
        waiting = _Waiting(table, len(request.ranking), request.nbytes, request)
        if request.erased < self._erased:
            self._lose(waiting)
        else:
            self._put(waiting)

    def _put(self, waiting: _Waiting) -> bool:
        with self._changing:
            if self._nbytes + waiting.nbytes > MOST_WAITING:
                self._lose(waiting)
                return False
            self._waiting.append(waiting)
            self._nbytes += waiting.nbytes
        if self._nbytes >= WRITE_AT:
            self._due.set()
        return True

    def _lose(self, waiting: _Waiting) -> None:
        for name in _makers(waiting.table):
            self._counted(name, LOST, _rows_of(name, waiting))

    def _run(self) -> None:
        while not self._ended:
            self._due.wait(self._settings.seconds)
            self._due.clear()
            self.flush()

    def _write(self, table: str, entries: Sequence[_Waiting]) -> None:
        for name, make in _makers(table).items():
            waited = sum(_rows_of(name, entry) for entry in entries)
            try:
                rows = make([entry.part for entry in entries])
                dt = [partition_of(ts, self._settings.grain) for ts in rows["ts"]]
                append(
                    f"{self._settings.folder}/{name}",
                    rows.with_columns(pl.Series("dt", dt, pl.String)).to_arrow(),
                    {},
                )
            except BaseException:  # whatever it is, a panic of a library included: requests are answered
                self._counted(name, LOST, waited)
                LOG.exception("rows of the served log's table %s are lost", name)
                continue
            self._counted(name, WRITTEN, rows.height)
            if make is _events and rows.height < waited:
                self._counted(name, LOST, waited - rows.height)
                LOG.error("%s events of %s do not fit the columns of its log", waited - rows.height, name)


def _rows_of(table: str, waiting: _Waiting) -> int:
    """How many rows of a table are made of what waits."""
    return 1 if table == REQUESTS else waiting.rows


def _makers(table: str) -> dict[str, Callable[[list[Any]], pl.DataFrame]]:
    """What is written of what waits under this name: tables, and how their rows are made."""
    if table == REQUESTS:
        return {IMPRESSIONS: _impressions, REQUESTS: _requests}
    if table == SHADOW:
        return {SHADOW: _impressions}
    return {table: _feedback if table == FEEDBACK else _events}


def _events(entries: Sequence[tuple[pl.DataFrame, Mapping[str, Any]]]) -> pl.DataFrame:
    """Events in the types of their log; without those of which a value does not fit."""
    parts = []
    for events, types in entries:
        names = [name for name in types if name in events.columns]
        cast = events.select(pl.col(name).cast(types[name], strict=False) for name in names)
        fits = pl.Series([True] * events.height)
        for name in names:
            fits &= cast[name].is_not_null() | events[name].is_null()
        parts.append(cast.filter(fits))
    return pl.concat(parts, how="diagonal_relaxed")


def _impressions(requests: Sequence[ServedRequest]) -> pl.DataFrame:
    """One row per item that was answered; ``position`` counts from 0."""
    return pl.concat([_shown(request) for request in requests], how="diagonal_relaxed")


def _shown(served: ServedRequest) -> pl.DataFrame:
    schema, scores = served.model.schema, served.ranked.scores[list(served.ranking)]
    count = len(served.ranking)
    contexts = _contexts(schema, [served.context])
    return pl.DataFrame(
        {
            # a column of the table's own takes the place of one of the context with its name
            **{name: pl.Series(values * count, dtype=kind, strict=False) for name, (values, kind) in contexts.items()},
            "request_id": [served.row.request_id] * count,
            "user_id": [served.user_id] * count,
            "item_id": [served.item_ids[place] for place in served.ranking],
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
        FROM_STORE: [served.from_store for served in requests],
    }
    columns |= {
        field.name: request.field(field.name)
        for field in request.type
        if field.name not in ("request_id", "ts", "candidates")
    }
    columns |= {field.name: pa.ListArray.from_arrays(offsets, candidate.field(field.name)) for field in candidate.type}
    columns |= {name: rows[name] for name in rows.column_names if name not in ("user_id", "requests")}
    scores, schema = np.concatenate([served.ranked.scores for served in requests]), requests[0].model.schema
    columns |= {
        f"{SCORE}{task.name}": pa.ListArray.from_arrays(offsets, pa.array(scores[:, index]))
        for index, task in enumerate(schema.tasks)
    }
    frame = pl.from_arrow(pa.table(columns))
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(
        pl.Series(f"{CONTEXT}{name}", values, dtype=kind, strict=False)
        for name, (values, kind) in _contexts(schema, [served.context for served in requests]).items()
    )


def _contexts(schema: Schema, contexts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[Any], pl.DataType]]:
    """By column of the log: the values of these requests' contexts in its type, and the type."""
    sources = {feature.source: feature for feature in schema.side("context")}
    return {
        source: ([_logged(feature, context.get(source)) for context in contexts], _type(feature))
        for source, feature in sources.items()
    }


def _feedback(entries: Iterable[Sequence[Mapping[str, Any]]]) -> pl.DataFrame:
    kinds = {"request_id": pl.String, "item_id": pl.String, "label": pl.String, "value": pl.Int64, "ts": pl.Int64}
    return pl.DataFrame([row for entry in entries for row in entry], schema=kinds)


def schema_digest(schema: Schema) -> str:
    """Of a model's features: rows with the same one have the same columns."""
    return digest(schema.model_dump(mode="json", exclude_none=True))  # what is added to schemas later is left out
