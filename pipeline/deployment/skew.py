"""Compares the online store with the samples, value by value, by replaying a partition.

An online store knows only the present, so a scratch store is filled up to the partition's opening. From there on
profiles and counts are materialised and events pushed in the order in which they became known. Every request is read
just before its own time, as the endpoint would read it, and compared with the sample table.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from features.builder.fold import rows_after
from features.builder.states import ITEM_AGGREGATES, USER_AGGREGATES, BuildSettings
from features.delta.table import Table
from features.errors import CorankError
from features.sample_table import end_column, feature_column, timeline_column
from features.samples.export import Unnested
from features.samples.source import SampleSource
from features.schema import Schema, partition_bounds
from features.store.online import FeatureStoreSettings, apply, materialize
from features.store.push import OnlineWriter
from features.store.reader import OnlineReader
from features.validation import distinct_events
from pipeline.deployment.verification import raw_contexts
from serving.request_log import CONTEXT, FEATURES, FROM_STORE, REQUESTS, schema_digest
from serving.rows import build_row


@dataclass
class FeatureSkew:
    """One feature's values: how many were compared, how many differ, and the first that did.

    Of those that differ, online lacks ``missing`` ones, and has ``extra`` ones that the samples lack.
    """

    compared: int = 0
    differ: int = 0
    missing: int = 0
    extra: int = 0
    example: str = ""

    @property
    def rate(self) -> float:
        return self.differ / self.compared if self.compared else 0.0


@dataclass
class SkewReport:
    """What was found, by feature; a sequence's feature is its visible window.

    Attributes:
        left_out: requests that cannot be compared.
    """

    partition: str
    requests: int = 0
    left_out: int = 0
    features: dict[str, FeatureSkew] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Share of all compared values that differ."""
        compared = sum(feature.compared for feature in self.features.values())
        return sum(feature.differ for feature in self.features.values()) / compared if compared else 0.0

    def compare(self, name: str, offline: Any, online: Any, where: str) -> None:
        found = self.features.setdefault(name, FeatureSkew())
        found.compared += 1
        if not same(offline, online):
            found.differ += 1
            found.missing += _has_value(offline) and not _has_value(online)
            found.extra += _has_value(online) and not _has_value(offline)
            found.example = found.example or f"{where}: samples {_short(offline)}, online {_short(online)}"


def replay(
    build: BuildSettings,
    store: FeatureStoreSettings,
    samples: SampleSource,
    partition: str,
    limit: int,
    folder: Path,
    progress: Callable[[int, int], None],
) -> SkewReport:
    """Replay requests of one partition against a scratch online store.

    Args:
        build, store: of the pipeline; the states of the partitions before must be there.
        samples: the partition's samples.
        limit: requests to replay, spread evenly over the partition; 0: all.
        folder: the scratch store lies below it while the replay runs.
        progress: called with (requests done, requests to do).

    Raises:
        CorankError: the partition has no samples.
    """
    schema = build.schema
    requests = _requests(samples, limit)
    if not requests:
        raise CorankError(f"samples, partition {partition}: there are no requests to replay; run `corank run` first")
    opening, close = partition_bounds(partition, build.grain)
    users = sorted({row["user_id"] for row, _ in requests})

    def of_users(role: str) -> pl.DataFrame:
        table = build.tables[role]
        rows = table.scan([partition]).with_columns(pl.col("user_id").cast(pl.String))
        return table.collect(rows.filter(pl.col("user_id").is_in(users)), [partition])

    contexts = raw_contexts(schema, of_users("impressions"))
    events = {
        role: distinct_events(of_users(role)).sort("ts")
        for role in dict.fromkeys(sequence.events for sequence in schema.sequences)
    }
    asked = {candidate["item_id"] for _, request in requests for candidate in request["candidates"]}
    for rows in events.values() if schema.joined_columns else ():  # an event is joined with its item's profile
        if "item_id" in rows.columns:
            asked.update(rows["item_id"].drop_nulls().cast(pl.String))
    changes = _changes(build, opening, close, {"user_id": users, "item_id": sorted(asked)})
    report = SkewReport(partition)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        scratch_store = replace(
            store,
            project=f"{store.project}_skew",
            registry=f"{scratch}/registry.db",
            online="sqlite",
            sqlite_path=f"{scratch}/online.db",
            item_max_age_seconds=0.0,
        )
        apply(scratch_store)
        materialize(scratch_store, 0, opening)
        reader, writer = OnlineReader(scratch_store), OnlineWriter(scratch_store, build.log_delay)
        now = opening

        def inside(start: int, stop: int) -> list[pl.DataFrame]:
            return [rows.filter(pl.col("ts").is_between(start, stop, closed="left")) for rows in events.values()]

        for done, (row, request) in enumerate(requests, start=1):
            ts = request["ts"]
            # an event takes its item's profile along: it is pushed between the changes before it and those after it
            steps = [change for change in changes if now < change < ts] if schema.joined_columns else []
            followed = [start for start, end in pairwise([*steps, ts]) if any(new.height for new in inside(start, end))]
            for moment in [*followed, ts]:
                for role, new in zip(events, inside(now, moment), strict=True):
                    if new.height:
                        writer.push(new, role)
                if any(now < change <= moment for change in changes):
                    materialize(scratch_store, now, moment, close=opening)
                now = max(now, moment)
            items = [candidate["item_id"] for candidate in request["candidates"]]
            answer = build_row(reader, build.log_delay, row["user_id"], items, contexts[request["request_id"]], ts)
            _compare(report, schema, row, request, answer.rows.to_pylist()[0])
            report.requests = done
            progress(done, len(requests))
    return report


def served_skew(
    build: BuildSettings,
    folder: str,
    partition: str,
    earlier: Sequence[str],
    limit: int,
    progress: Callable[[int, int], None],
) -> SkewReport:
    """Compare the features of logged requests, as they were served, with what the log gives for the same requests now.

    Args:
        build: of the pipeline; the states of the partitions before must be there.
        folder: of the served log (:mod:`serving.request_log`).
        partition: closed; its requests are compared.
        earlier: the partitions before it.
        limit: requests, spread evenly over the partition; 0: all.
        progress: called with (requests done, requests to do).

    Raises:
        CorankError: no request of the partition was logged, or none by a model of these features.
    """
    schema = build.schema
    requests = Table("served requests", f"{folder}/{REQUESTS}")
    if not requests.exists():
        raise CorankError(f"no request was logged at {folder}; `serving.log_share` turns the log on")
    logged = requests.collect(requests.scan([partition]), [partition])
    # callers choose ids: one that names several requests tells of none which is which
    once = logged.filter(pl.col("request_id").is_unique())
    comparable = once.filter((pl.col(FEATURES) == schema_digest(schema)) & pl.col(FROM_STORE))
    if comparable.is_empty():
        raise CorankError(
            f"partition {partition}: of {logged.height:,} logged requests none was answered by a model of the config's "
            f"features, from the online store alone; there are requests of {', '.join(requests.partitions()) or 'none'}"
        )
    chosen = comparable.sort("ts", "request_id").gather_every(max(comparable.height // limit, 1) if limit else 1)
    # a list of booleans is read as one of texts, as a category's is
    chosen = chosen.with_columns(pl.col("item_known").list.eval(pl.element() == "true"))
    context = {feature.source: pl.col(f"{CONTEXT}{feature.source}") for feature in schema.side("context")}
    impressions = (
        chosen.select("request_id", "user_id", "ts", "item_id", **context)
        .explode("item_id")
        .with_columns(pl.lit(None, pl.Int8).alias(task.source) for task in schema.tasks)
    )
    report = SkewReport(partition, left_out=logged.height - comparable.height)
    recomputed = {
        request["request_id"]: (row, request)
        for row in rows_after(build, earlier, impressions, partition).to_pylist()
        for request in row["requests"]
    }
    for done, served in enumerate(chosen.iter_rows(named=True), start=1):
        row, request = recomputed[served["request_id"]]
        per_item = ["item_id", "item_known", *(feature_column(feature) for feature in schema.item_side)]
        values = zip(*(served[name] for name in per_item), strict=True)
        candidates = [dict(zip(per_item, of_item, strict=True)) for of_item in values]
        request, answered = (
            {**side, "candidates": sorted(of_side, key=lambda candidate: candidate["item_id"])}
            for side, of_side in ((request, request["candidates"]), (served, candidates))
        )
        _compare(report, schema, row, request, {**served, "requests": [answered]})
        report.requests = done
        progress(done, chosen.height)
    return report


def _requests(samples: SampleSource, limit: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of a sample row and one of its requests, by time; evenly thinned where there are more than ``limit``."""
    times: list[tuple[int, str]] = []
    for file in samples.files():
        requests = Unnested.of(samples.read(file)).requests
        times += zip(requests.field("ts").to_pylist(), requests.field("request_id").to_pylist(), strict=True)
    times.sort()
    chosen = set(times[:: max(len(times) // limit, 1) if limit else 1])
    found = []
    for file in samples.files():
        part = Unnested.of(samples.read(file))
        ids = zip(part.requests.field("ts").to_pylist(), part.requests.field("request_id").to_pylist(), strict=True)
        for index, key in enumerate(ids):
            if key in chosen:
                row = part.rows.slice(int(part.row_of_request[index]), 1).to_pylist()[0]
                found.append((row, part.requests[index].as_py()))
    return sorted(found, key=lambda pair: (pair[1]["ts"], pair[1]["request_id"]))


def _changes(build: BuildSettings, opening: int, close: int, asked: Mapping[str, Sequence[str]]) -> list[int]:
    """Times within the partition at which profiles or counts of the asked users and items change, microseconds UTC."""
    keys = {"users": "user_id", "items": "item_id"}
    tables = [(build.tables[role], key, "updated_at") for role, key in keys.items() if role in build.tables]
    tables += [(build.table(USER_AGGREGATES), "user_id", "ts"), (build.table(ITEM_AGGREGATES), "item_id", "ts")]
    times: set[int] = set()
    for table, key, clock in tables:
        of_asked = pl.col(key).cast(pl.String).is_in(asked[key])
        inside = pl.col(clock).is_between(opening, close, closed="none")
        times |= set(table.collect(table.scan().filter(of_asked & inside).select(clock).unique())[clock])
    return sorted(times)


def _compare(
    report: SkewReport, schema: Schema, row: Mapping[str, Any], request: Mapping[str, Any], online: Mapping[str, Any]
) -> None:
    where = f"request {request['request_id']} of user {row['user_id']}"
    (answered,) = online["requests"]
    report.compare("user_known", request["user_known"], answered["user_known"], where)
    for feature in schema.user_side:
        name = feature_column(feature)
        report.compare(feature.name, request[name], answered[name], where)
    for candidate, other in zip(request["candidates"], answered["candidates"], strict=True):
        at = f"{where}, item {candidate['item_id']}"
        report.compare("item_known", candidate["item_known"], other["item_known"], at)
        for feature in schema.item_side:
            name = feature_column(feature)
            report.compare(feature.name, candidate[name], other[name], at)
    for sequence in schema.sequences:
        end = end_column(sequence)
        for event_field in (None, *sequence.fields):
            column = timeline_column(sequence, event_field)
            offline, served = (
                side[column][max(0, at[end] - sequence.length) : at[end]]
                for side, at in ((row, request), (online, answered))
            )
            report.compare(f"{sequence.name}.{event_field.name if event_field else 'ts'}", offline, served, where)


def same(offline: Any, online: Any) -> bool:
    """Whether two values are equal; a missing number may be null or NaN."""
    if isinstance(offline, list) and isinstance(online, list):
        return len(offline) == len(online) and all(map(same, offline, online))
    return offline == online or (_missing(offline) and _missing(online))


def _has_value(value: Any) -> bool:
    """Whether it is a number, a code of something known, or a list with anything in it."""
    return isinstance(value, float) if value == 0 else not (_missing(value) or value == [])


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
