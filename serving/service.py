"""The deployment that answers: it validates requests, reads their features, asks the ranker, and stores new events.

A request is bound to one model when it is admitted. When another model is to be served (``ServingSettings.follow``), it
is loaded and checked beside the old one and a reader of its features is opened; only then are requests bound to it. No
request waits for that, and none is answered by two models.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from fastapi import FastAPI
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from features.delta.paths import file_system
from features.encoding import as_text
from features.errors import CorankError, UnavailableError, raised
from features.store.online import FeatureStoreSettings
from features.store.push import EventsError, OnlineWriter
from features.store.reader import OnlineReader
from serving.api import (
    EventsRequest,
    ModelDescription,
    OverloadedError,
    RankBatchRequest,
    RankRequest,
    answer,
    build_api,
    told,
    weights_of,
)
from serving.auth import Tokens
from serving.memo import in_order
from serving.rows import InvalidRequestError, build_row, chunks
from serving.settings import ServingSettings

FOLLOW_SECONDS = 1.0
"""Seconds between two looks at which model is to be served."""

NO_RANKER = "the model does not answer, its process has ended; try again"

LOG = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class LiveModel:
    """A model that requests are bound to, with a reader of the features that it reads (its schema, not the config's).

    Attributes:
        artifact: its directory, by which the ranker knows it.
    """

    artifact: str
    model: ModelDescription
    reader: OnlineReader


class RankingService:
    """Validates requests, reads their features from the online store and asks the ranker; stores new events.

    One thread reads the store and another writes it, so that health and overload are answered meanwhile, and no ranking
    waits for a push that waits for another writer.
    """

    def __init__(self, settings: ServingSettings, ranker: DeploymentHandle[Any]) -> None:
        self._settings = settings
        self._ranker = ranker
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="feature-store-reader")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="feature-store-writer")
        self._opening = asyncio.Lock()
        self._live: LiveModel | None = None
        self._following: asyncio.Task[None] | None = None
        self.refused: dict[str, str] | None = None  # the last artifact that is not fit to be served, and why
        # the store by the newest config, whose views it has; a model may read fewer of them
        self._writes_to = settings.store
        self._writer: tuple[FeatureStoreSettings, OnlineWriter] | None = None  # used by the writing thread alone
        self._erased = 0  # when users were last forgotten, microseconds UTC
        self._admitted = {"rank": 0, "push": 0}
        self.memo_bytes = 0  # of the ranker that answered last
        self._missing: asyncio.Task[None] | None = None  # runs while no ranker answers

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = self._settings.options
        tokens = Tokens(Path(options.tokens)) if options.tokens is not None else None
        return build_api(self, options.max_body_bytes, options.admitted * options.service_replicas, tokens)

    async def describe(self) -> ModelDescription:
        """What the ranker serves, asked anew each time."""
        return await self._described((await self._open()).artifact)

    async def require_ready(self) -> None:
        """
        Raises:
            CorankError: the model does not answer, or the online store cannot be read.
        """
        live = await self._open()
        await self._described(live.artifact)
        await _in_thread(self._reading, lambda: live.reader.user(""))

    @property
    def served(self) -> str | None:
        """Version of the model that requests are bound to now; None before the first."""
        return self._live.model.version if self._live is not None else None

    async def rank(self, request: RankRequest) -> dict[str, Any]:
        """Score and order the candidates of a request.

        Raises:
            InvalidRequestError: it does not fit the model or the limits.
            OverloadedError: too many requests are being worked on.
            UnavailableError: the online store does not answer.
        """
        with self._admission("rank"):
            live = await self._open()
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
            live = await self._open()
            weights = []
            for place, request in enumerate(requests):
                with _named(place):
                    weights.append(self._weights(live, request))
            answers = await asyncio.gather(
                *(self._answer(live, request, own) for request, own in zip(requests, weights, strict=True)),
                return_exceptions=True,
            )
            for place, answered in enumerate(answers):
                if isinstance(answered, BaseException):
                    with _named(place):
                        raise answered
            return [answered for answered in answers if not isinstance(answered, BaseException)]

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
        settings = self._settings
        started = time.perf_counter()
        ts = request.ts if request.ts is not None else time.time_ns() // 1_000
        erased = self._erased  # before the row is read: it may hold what is erased meanwhile
        row = await _in_thread(
            self._reading,
            lambda: build_row(
                live.reader,
                settings.log_delay,
                str(request.user_id),
                [str(item) for item in request.candidates],
                request.context,
                ts,
                settings.options.missing_context,
            ),
        )
        read = time.perf_counter()
        ranker = self._ranker.options(session_id=str(request.user_id)) if settings.by_user else self._ranker
        # in turns with other requests; without a memo each part would compute the user side anew
        most = settings.options.chunk_candidates if settings.options.memo_megabytes else settings.options.max_candidates
        ranked = in_order(
            [await self._ask(ranker.rank, (live.artifact, part, erased)) for part in chunks(row.rows, most)]
        )
        self.memo_bytes = ranked.memo_bytes
        seconds = {"features": read - started, "model": time.perf_counter() - read}
        return answer(request, ts, row, live.model, ranked, seconds, weights)

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
            return writer.push(_frame(events), table)
        except EventsError as error:
            first, alone = _first_refused(events, lambda some: writer.check(_frame(some), table), error)
            place = f"events.{first}.{alone.column}" if first is not None and alone.column else "events"
            raise InvalidRequestError(place, str(alone)) from error

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

    async def _open(self) -> LiveModel:
        """The model that requests are bound to now."""
        if self._live is None:
            async with self._opening:
                if self._live is None:
                    await self._begin()
        assert self._live is not None
        if self._settings.follow is not None and (self._following is None or self._following.done()):
            self._following = asyncio.create_task(self._follow())
        return self._live

    async def _begin(self) -> None:
        """Bind requests to the model that is to be served now or, if it is not fit, to the one of the start."""
        wanted = await self._wanted()
        if wanted is None or not await self._switch(wanted):
            self._live = await self._prepared(self._settings.artifact)

    async def _prepared(self, artifact: str) -> LiveModel:
        model = await self._described(artifact)
        store = replace(self._settings.store, schema=model.schema)
        reader = await _in_thread(self._reading, lambda: OnlineReader(store))
        # a store that was lost has its views, but no tables: then this fails
        await _in_thread(self._reading, lambda: reader.user(""))
        return LiveModel(artifact, model, reader)

    async def _wanted(self) -> str | None:
        """The artifact that is to be served; None when nothing says so. What the ranker is to forget, it is told."""
        if self._settings.follow is None:
            return None
        document = await asyncio.to_thread(followed, self._settings.follow)
        if document is not None and document.erased > self._erased:
            self._erased = document.erased
            with suppress(UnavailableError):  # the next request tells it
                await self._ask(self._ranker.forget, self._erased)
        return None if document is None else document.artifact

    async def _follow(self) -> None:
        """Bind requests to each model that is to be served, once it is ready; ``refused`` says why one is not fit."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            wanted = await self._wanted()
            if wanted is None or self._live is None or wanted == self._live.artifact:
                continue
            if self.refused is None or wanted != self.refused["artifact"]:
                with suppress(UnavailableError):  # the ranker or the store does not answer; tried again
                    await self._switch(wanted)

    async def _switch(self, artifact: str) -> bool:
        """Bind requests to a model from now on, once it is ready; returns whether it was fit.

        Raises:
            UnavailableError: the ranker or the store does not answer.
        """
        try:
            live = await self._prepared(artifact)
        except UnavailableError:
            raise
        except Exception as error:  # whatever it is, requests stay bound to the model before
            LOG.exception("model %s is not served", artifact)
            self.refused = {"artifact": artifact, "why": told(error)}
            return False
        if artifact != self._settings.artifact and live.model.schema != self._writes_to.schema:
            # the config has changed: pushes fill the views that its models read
            self._writes_to = replace(self._writes_to, schema=live.model.schema)
        self._live, self.refused = live, None
        return True

    async def _described(self, artifact: str) -> ModelDescription:
        description: ModelDescription = await self._ask(self._ranker.describe, artifact)
        return description

    async def _ask(self, method: Any, *arguments: Any) -> Any:
        """What a ranker answers. After one has ended nobody waits for it, until another is there.

        Raises:
            UnavailableError: its replica is dead, or none is there; Ray's own words are for the log.
            Exception: what it raised, as it was raised there.
        """
        if self._missing is not None and not self._missing.done():
            raise UnavailableError(NO_RANKER)
        try:
            return await method.remote(*arguments)
        except (RayError, RayServeException) as failure:
            error = raised(failure)
            if not isinstance(error, (RayError, RayServeException)):
                raise error from None
            LOG.error("the model does not answer", exc_info=failure)
            if self._missing is None or self._missing.done():
                self._missing = asyncio.create_task(self._until_answered())
            raise UnavailableError(NO_RANKER) from None

    async def _until_answered(self) -> None:
        """Wait for a ranker, as every request would in Ray's queue."""
        while True:
            try:
                await self._ranker.describe.remote(self._live.artifact if self._live else self._settings.artifact)
                return
            except (RayError, RayServeException):
                await asyncio.sleep(0.2)


@contextmanager
def _named(place: int) -> Iterator[None]:
    """Of a request of a batch: a field that is wrong is named with the request's place."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(f"requests.{place}.{error.field}", str(error)) from None


async def _in_thread(thread: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(thread, work)


@dataclass(frozen=True)
class Followed:
    """What the document of ``ServingSettings.follow`` says.

    Attributes:
        artifact: to be served.
        erased: when users were last forgotten, microseconds UTC.
    """

    artifact: str
    erased: int = 0


def followed(path: str) -> Followed | None:
    """The document of ``ServingSettings.follow``; None when it is not there or half written."""
    store, inside = file_system(path)
    try:
        with store.open_input_stream(inside) as stream:
            document = json.loads(stream.read())
            return Followed(str(document["artifact"]), int(document.get("erased", 0)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
