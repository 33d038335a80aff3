"""The deployment that answers: it validates requests, reads their features, asks the ranker, and stores new events."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from features.encoding import as_text
from features.errors import CorankError, UnavailableError
from features.schema import Schema
from features.store.online import FeatureStoreSettings
from features.store.push import EventsError, OnlineWriter
from serving.api import (
    EventsRequest,
    FeedbackRequest,
    ModelDescription,
    OverloadedError,
    RankBatchRequest,
    RankRequest,
    answer,
    build_api,
    ranking_of,
    weights_of,
)
from serving.auth import Tokens
from serving.console import Console
from serving.inline import InvalidRequestError
from serving.live import LiveModel, LiveModels
from serving.memo import Ranked, in_order
from serving.metrics import Metrics
from serving.rankers import Rankers
from serving.rate import Rate
from serving.request_log import EVENTS as LOGGED_EVENTS
from serving.request_log import LOST, RequestLog, ServedRequest
from serving.rows import RequestRow, build_row, chunks
from serving.settings import ServingSettings
from serving.store_thread import StoreThread


@dataclass(frozen=True)
class Answered:
    """An answer, and what it was made of (:class:`serving.request_log.ServedRequest`)."""

    ts: int
    row: RequestRow
    erased: int
    ranked: Ranked
    order: Sequence[int]
    content: dict[str, Any]

    def served(self, request: RankRequest, model: ModelDescription) -> ServedRequest:
        return ServedRequest.of(request, self.row, self.ts, self.ranked, self.order, model, self.erased)


MOST_SHADOWED = 8
"""Requests of which a shadow is asked at a time; of others it is not."""

MOST_EXPLAINED = 200
"""Candidates of a request that is explained."""

LOG = logging.getLogger("ray.serve")


class RankingService:
    """Validates requests, reads their features from the online store and asks the ranker; stores new events.

    One thread reads the store and another writes it, so that health and overload are answered meanwhile, and no ranking
    waits for a push that waits for another writer.
    """

    def __init__(self, settings: ServingSettings, ranker: DeploymentHandle[Any]) -> None:
        self._settings = settings
        self.metrics = Metrics(f"{socket.gethostname()}:{os.getpid()}")
        reading, shadow_reading = StoreThread("feature-store-reader"), StoreThread("shadow-reader")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="feature-store-writer")
        self._telling = ThreadPoolExecutor(1, thread_name_prefix="console")
        self._console = Console(settings.store, settings.log_delay)  # used by that thread alone
        self._log = RequestLog(settings.log, self.metrics.logged) if settings.log is not None else None
        self._rankers = Rankers(ranker, settings.options.ranker_replicas)
        self._models = LiveModels(settings, self._rankers, reading, shadow_reading, self._forget, self._write_to)
        # the store by the newest config, whose views it has; a model may read fewer of them
        self._writes_to = settings.store
        self._writer: tuple[FeatureStoreSettings, OnlineWriter] | None = None  # used by the writing thread alone
        self._admitted = {"rank": 0, "push": 0}
        self._shadowing: set[asyncio.Task[None]] = set()
        self.memo_bytes = 0  # of the ranker that answered last

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = self._settings.options
        tokens = None
        if options.tokens is not None:
            most = options.requests_per_second
            tokens = Tokens(Path(options.tokens), Rate(most).allows if most is not None else lambda _: True)
        return build_api(self, options.max_body_bytes, options.admitted * options.service_replicas, tokens)

    def __del__(self) -> None:
        """Ray Serve calls this when a replica is stopped, and waits for it."""
        if (log := getattr(self, "_log", None)) is not None:
            log.close()

    async def describe(self) -> ModelDescription:
        """What the ranker serves, asked anew each time."""
        return await self._rankers.describe((await self._models.open()).artifact)

    async def require_ready(self) -> str | None:
        """Why requests are answered without the online store now; None: they are answered with it.

        Raises:
            CorankError: the model does not answer; or the store, and ``store_deadline_ms`` is null.
        """
        live = await self._models.open()
        await self._rankers.describe(live.artifact)
        deadline = self._settings.options.store_deadline_ms
        try:
            await live.thread.result(
                lambda: live.thread.timed(lambda: live.reader.user("")), deadline and deadline / 1e3
            )
        except (TimeoutError, UnavailableError) as error:
            if deadline is None:
                raise
            return str(error) or f"the online store did not answer within {deadline:g} ms"
        return None

    @property
    def served(self) -> str | None:
        """Version of the model that requests are bound to now; None before the first."""
        return self._models.served.model.version if self._models.served is not None else None

    @property
    def refused(self) -> dict[str, str] | None:
        """The last artifact that is not fit to be served, and why."""
        return self._models.refused

    @property
    def beside(self) -> dict[str, Any]:
        """Versions of a split and of a shadow."""
        return self._models.beside

    async def rank(self, request: RankRequest) -> dict[str, Any]:
        """Score and order the candidates of a request.

        Raises:
            InvalidRequestError: it does not fit the model or the limits.
            OverloadedError: too many requests are being worked on.
            UnavailableError: the online store does not answer.
        """
        with self._admission("rank"):
            live = await self._models.bind(str(request.user_id), request.model_version)
            return await self._answer(live, request, self._weights(live, request))

    async def rank_batch(self, batch: RankBatchRequest) -> list[dict[str, Any]]:
        """The answers to several requests, which are admitted together and worked on at once; all, or the first error.

        Raises:
            InvalidRequestError: as :meth:`rank` raises it; the field begins with the request's place.
            OverloadedError, UnavailableError: as :meth:`rank` raises them.
        """
        requests, most = batch.requests, self._settings.options.admitted
        if len(requests) > most:
            raise InvalidRequestError("requests", f"has {len(requests)}; at most {most} are worked on at a time")
        with self._admission("rank", len(requests)):
            bound = []
            for place, request in enumerate(requests):
                with _named(place):
                    live = await self._models.bind(str(request.user_id), request.model_version)
                    bound.append((live, request, self._weights(live, request)))
            answers = await asyncio.gather(*(self._answer(*each) for each in bound), return_exceptions=True)
            for place, answered in enumerate(answers):
                if isinstance(answered, BaseException):
                    with _named(place):
                        raise answered
            return [answered for answered in answers if not isinstance(answered, BaseException)]

    async def explain(self, request: RankRequest) -> dict[str, Any]:
        """An answer, with ``history``: per sequence its events in readable form and the attention of every candidate.

        It is neither logged nor asked of a shadow: nobody is shown anything.

        Raises:
            InvalidRequestError, OverloadedError, UnavailableError: as :meth:`rank` raises them.
        """
        if len(request.candidates) > MOST_EXPLAINED:
            raise InvalidRequestError("candidates", f"has {len(request.candidates)} items; at most {MOST_EXPLAINED}")
        with self._admission("rank"):
            live = await self._models.bind(str(request.user_id), request.model_version)
            answered = await self._scored(live, request, self._weights(live, request))
            attention = await self._rankers.explain(live.artifact, answered.row.rows)
            history, schema = self._console.history, live.model.schema
            told = await _in_thread(self._telling, lambda: history(schema, answered.row, attention))
            return answered.content | {"history": told}

    async def about(self) -> dict[str, Any]:
        """What the console proposes to ask (:meth:`serving.console.Console.about`)."""
        schema = (await self._models.open()).model.schema
        return dict(await _in_thread(self._telling, lambda: self._console.about(schema)))

    def _weights(self, live: LiveModel, request: RankRequest) -> np.ndarray:
        """The tasks' weights of a request, [K].

        Raises:
            InvalidRequestError: it has too many candidates, or names what is no task of the model.
        """
        limits = self._settings.options
        if len(request.candidates) > limits.max_candidates:
            raise InvalidRequestError(
                "candidates", f"has {len(request.candidates)} items; at most {limits.max_candidates}"
            )
        return weights_of(request, live.model.tasks, limits.weights)

    async def _answer(self, live: LiveModel, request: RankRequest, weights: np.ndarray) -> dict[str, Any]:
        answered = await self._scored(live, request, weights)
        if self._log is not None and self._log.wants(str(request.user_id)):
            self._log.request(answered.served(request, live.model))
        if (shadow := self._models.shadow) is not None and shadow is not live:
            self._ask_too(shadow, request, answered, live)
        return answered.content

    async def _scored(self, live: LiveModel, request: RankRequest, weights: np.ndarray) -> Answered:
        started = time.perf_counter()
        ts = request.ts if request.ts is not None else time.time_ns() // 1_000
        row, erased = await self._read(live, request, ts)
        read = time.perf_counter()
        ranked = await self._ranked(live, request, row, erased)
        self.memo_bytes = ranked.memo_bytes
        order = ranking_of(ranked.scores, weights, request.top_k)
        seconds = {"features": read - started, "model": time.perf_counter() - read}
        return Answered(ts, row, erased, ranked, order, answer(request, ts, row, live.model, ranked, seconds, order))

    async def _read(self, live: LiveModel, request: RankRequest, ts: int) -> tuple[RequestRow, int]:
        """A request's row, and when users had last been forgotten as it was read.

        Raises:
            InvalidRequestError: it does not fit the model.
            UnavailableError: the store does not answer, and ``store_deadline_ms`` is null.
        """
        settings, erased = self._settings, self._models.erased  # before the row: it may hold what is erased meanwhile
        options, deadline = settings.options, settings.options.store_deadline_ms
        user_id, items = str(request.user_id), [str(item) for item in request.item_ids]

        def row(degraded: str | None = None) -> RequestRow:
            return build_row(
                live.reader,
                settings.log_delay,
                user_id,
                items,
                request.context,
                ts,
                options.missing_context,
                request.inline,
                None if request.request_id is None else str(request.request_id),
                degraded,
                lambda: live.thread.timed(lambda: live.reader.request(user_id, items, ts)),
            )

        try:
            return await live.thread.result(row, deadline and deadline / 1e3), erased
        except TimeoutError:
            reason = f"the online store did not answer within {deadline:g} ms"
        except UnavailableError as error:
            if deadline is None:
                raise
            reason = str(error)
        LOG.error("request of an unknown user and items: %s", reason)
        return await asyncio.to_thread(row, reason), erased

    async def _ranked(self, live: LiveModel, request: RankRequest, row: RequestRow, erased: int) -> Ranked:
        options, user_id = self._settings.options, str(request.user_id)
        # in turns with other requests; without a memo each part would compute the user side anew
        most = options.chunk_candidates if options.memo_megabytes else options.max_candidates
        parts = [await self._rankers.rank(user_id, live.artifact, part, erased) for part in chunks(row.rows, most)]
        return in_order(parts)

    def _ask_too(self, shadow: LiveModel, request: RankRequest, answered: Answered, live: LiveModel) -> None:
        """Compare the scores of another model with those that are answered, without anybody waiting for it."""

        async def compare() -> None:
            try:
                row, erased = await self._read(shadow, request, answered.ts)
                other = await self._ranked(shadow, request, row, erased)
            except Exception:  # the answer is on its way
                LOG.exception("the shadow %s does not answer", shadow.model.version)
                self.metrics.shadow_failed()
                return
            for task in [task for task in live.model.tasks if task in shadow.model.tasks]:
                of_both = [
                    scored.scores[:, model.tasks.index(task)]
                    for scored, model in ((answered.ranked, live.model), (other, shadow.model))
                ]
                self.metrics.shadowed(task, *of_both)
            if self._log is not None and self._log.wants(str(request.user_id)):
                whole = replace(answered, row=row, erased=erased, ranked=other, order=range(len(other.scores)))
                self._log.shadow(whole.served(request, shadow.model))

        if len(self._shadowing) >= MOST_SHADOWED:
            self.metrics.shadow_failed()
            return
        task = asyncio.create_task(compare())
        self._shadowing.add(task)
        task.add_done_callback(self._shadowing.discard)

    async def _forget(self, erased: int) -> None:
        if self._log is not None:
            await asyncio.to_thread(self._log.forget, erased)

    def _write_to(self, schema: Schema) -> None:
        """The config has changed: pushes fill the views that its models read."""
        if schema != self._writes_to.schema:
            self._writes_to = replace(self._writes_to, schema=schema)

    async def feedback(self, request: FeedbackRequest) -> dict[str, Any]:
        """Log labels of items that were answered.

        Returns:
            ``accepted``: how many.

        Raises:
            InvalidRequestError: nothing is logged, or a label is no task of the model.
            OverloadedError: there is no room for them.
        """
        if self._log is None:
            raise InvalidRequestError("feedback", "is not logged here; serving.log_share turns the log on")
        tasks, now = (await self._models.open()).model.tasks, time.time_ns() // 1_000
        for place, label in enumerate(request.feedback):
            if label.label not in tasks:
                problem = f"{label.label!r} is no task of the model; there are: {', '.join(tasks)}"
                raise InvalidRequestError(f"feedback.{place}.label", problem)
        accepted = self._log.feedback(
            [
                {
                    "request_id": str(label.request_id),
                    "item_id": str(label.item_id),
                    "label": label.label,
                    "value": label.value,
                    "ts": now if label.ts is None else label.ts,
                }
                for label in request.feedback
            ]
        )
        if not accepted:
            raise OverloadedError("more waits to be logged than can be written; try again later")
        return {"accepted": len(request.feedback)}

    async def push(self, request: EventsRequest) -> dict[str, Any]:
        """Append events to the online sequences; the next request sees them.

        Returns:
            ``added``: events that each sequence got; what it had already, or does not select, is not counted.

        Raises:
            InvalidRequestError: the events are not what the sequences of this table read; none is stored.
            OverloadedError: too many requests are being worked on.
            UnavailableError: the online store does not answer.
        """
        with self._admission("push"):
            return {"added": await _in_thread(self._writing, lambda: self._push(request))}

    def _push(self, request: EventsRequest) -> dict[str, int]:
        store = self._writes_to
        if self._writer is None or self._writer[0] is not store:
            self._writer = store, OnlineWriter(store, self._settings.log_delay)
        writer = self._writer[1]
        try:
            table = writer.table(request.table)
        except CorankError as error:
            raise InvalidRequestError("table", str(error)) from None
        events, needed = [event.model_dump(exclude_unset=True) for event in request.events], writer.columns(table)
        for index, event in enumerate(events):
            if "event_id" in event and "event_id" not in needed:
                problem = (
                    f"the table {table} has no event_id, an event is identified by its row's content; leave it out"
                )
                raise InvalidRequestError(f"events.{index}.event_id", problem)
            for column in needed:
                if column not in event:
                    advice = "" if column == "event_id" else "; send null if it is not known"
                    raise InvalidRequestError(f"events.{index}.{column}", f"is missing{advice}")
        try:
            added = writer.push(_frame(events), table)
        except EventsError as error:
            first, alone = _first_refused(events, lambda some: writer.check(_frame(some), table), error)
            place = f"events.{first}.{alone.column}" if first is not None and alone.column else "events"
            raise InvalidRequestError(place, str(alone)) from error
        if self._log is not None:
            try:
                self._log.events(table, _frame(events), writer.log_types(table))
            except CorankError:  # they are stored; their log cannot be looked at
                self.metrics.logged(f"{LOGGED_EVENTS}/{table}", LOST, len(events))
                LOG.exception("events that were pushed to %s are not logged", table)
        return added

    @contextmanager
    def _admission(self, kind: Literal["rank", "push"], count: int = 1) -> Iterator[None]:
        """Count requests among those of their kind that are worked on while the block lasts.

        Raises:
            OverloadedError: there are too many.
        """
        if self._admitted[kind] + count > self._settings.options.admitted:
            raise OverloadedError(
                f"{self._admitted[kind]} requests are being worked on, which is the limit; try again later"
            )
        self._admitted[kind] += count
        try:
            yield
        finally:
            self._admitted[kind] -= count


@contextmanager
def _named(place: int) -> Iterator[None]:
    """Of a request of a batch: a field that is wrong is named with the request's place."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(f"requests.{place}.{error.field}", str(error)) from None


async def _in_thread(thread: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(thread, work)


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Events as a frame. A column of several kinds becomes text, value by value, as its ids are coded one by one;
    whole and fractional numbers together stay numbers."""
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain(*rows))}
    for name, values in columns.items():
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and kinds != {int, float}:
            columns[name] = [None if value is None else as_text(value) for value in values]
    return pl.DataFrame(columns, strict=False)


def _first_refused(
    events: list[dict[str, Any]], check: Callable[[list[dict[str, Any]]], None], together: EventsError
) -> tuple[int | None, EventsError]:
    """The place of the first event that is refused alone, and why; (None, ``together``) when none is."""
    first, last, why = 0, len(events), together
    while last - first > 1:
        middle = (first + last) // 2
        for start, end in ((first, middle), (middle, last)):
            try:
                check(events[start:end])
            except EventsError as error:
                first, last, why = start, end, error
                break
        else:
            return None, together
    return first, why
