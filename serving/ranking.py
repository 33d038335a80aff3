"""The Ray Serve application: ``RankingService`` reads features and answers HTTP, ``Ranker`` runs the model.

One request travels as one row of the sample table. Requests that wait together are merged into one
``RequestBatch``; the user side of a request is computed once, however many candidates it has.

A request is bound to one model when it is admitted. When another is to be served (``ServingSettings.follow``), it is
loaded and checked beside the old one, and a reader of its features opened; then requests are bound to it. No request
waits for that, and none meets two models.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from types import NoneType
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, PlainValidator, StrictInt
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from features.delta.paths import file_system
from features.errors import CorankError, UnavailableError, message_of, raised
from features.sample_table import concatenate
from features.schema import OTHER_UNITS, Schema
from features.store.push import EventsError, OnlineWriter
from features.store.reader import OnlineReader
from models.artifact import Artifact, load_artifact
from models.memory import keep_freed_memory
from models.selfcheck import require_selfcheck
from serving.bodies import BodyError, bounded_route
from serving.memo import MemoisedModel, Ranked
from serving.proxy import ADMITTED
from serving.rows import InvalidRequestError, RequestRow, as_text, build_row
from serving.settings import MOST_BODY_BYTES, ServingConfig, ServingSettings

APPLICATION = "corank"

FOLLOW_SECONDS = 1.0
"""Between two looks at which model is to be served."""

BoundRow = tuple[str, pa.Table]
"""The artifact that a request is bound to, and its row in the layout of ``serving_schema``."""

MOST_MODELS = 2
"""Models that a ranker holds: the one that is served, and the one before or after it."""

NO_RANKER = "the model does not answer, its process has ended; try again"
MOST_EVENTS = 10_000
"""Events of one push."""

LOG = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ModelDescription:
    """What a ranker serves."""

    version: str
    schema: Schema
    metadata: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        return [task.name for task in self.schema.tasks]


@dataclass(frozen=True)
class LiveModel:
    """A model that requests are bound to, with a reader of the features that it reads (its schema, not the config's).

    Attributes:
        artifact: its directory, by which the ranker knows it.
    """

    artifact: str
    model: ModelDescription
    reader: OnlineReader


# --- the HTTP interface -------------------------------------------------------------------------------


def _identifier(value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("must be a text or an integer")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("is an integer of more than 64 bits; send it as text")
    return value


def _scalar(value: Any) -> Any:
    fits = -(2**63) <= value < 2**63 if isinstance(value, (int, float)) else isinstance(value, (str, NoneType))
    if not fits:  # NaN neither
        raise ValueError("must be a text, a number of at most 64 bits, a boolean or null")
    return value


Identifier = Annotated[str | int, PlainValidator(_identifier, json_schema_input_type=str | int)]
Scalar = Annotated[
    str | int | float | bool | None, PlainValidator(_scalar, json_schema_input_type=str | int | float | bool | None)
]


def _in_microseconds(ts: int) -> int:
    for unit, (low, high) in OTHER_UNITS.items():
        if low <= ts < high:
            raise ValueError(f"looks like {unit}; send microseconds UTC")
    return ts


Microseconds = Annotated[StrictInt, Field(ge=0, lt=2**62), AfterValidator(_in_microseconds)]


class RankRequest(BaseModel):
    """Body of ``POST /v1/rank``."""

    model_config = ConfigDict(extra="forbid")

    user_id: Identifier
    candidates: Annotated[list[Identifier], FailFast(), Field(min_length=1, description="item ids")]
    context: Annotated[dict[str, Any], Field(description="context features by the column they come from")] = {}
    ts: Annotated[Microseconds | None, Field(description="time of the request, microseconds UTC; default: now")] = None
    top_k: Annotated[int | None, Field(ge=1, description="length of the ranking; default: all")] = None
    weights: Annotated[
        dict[str, Annotated[float, Field(allow_inf_nan=False)]],
        Field(description="rank by this weighted sum of the tasks' scores; default: serving.weights of the config"),
    ] = {}


class Event(BaseModel):
    """One new event: its id, user and time, and the columns that the sequences of its table read.

    Of a table without ``event_id``: all its columns instead of the id, as an event is identified by its row's content.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Scalar]

    event_id: Annotated[Identifier | None, Field(description="where the table has this column")] = None
    user_id: Identifier
    ts: Annotated[Microseconds, Field(description="time of the event, microseconds UTC")]


class EventsRequest(BaseModel):
    """Body of ``POST /v1/events``."""

    model_config = ConfigDict(extra="forbid")

    events: Annotated[list[Event], FailFast(), Field(min_length=1, max_length=MOST_EVENTS)]
    table: Annotated[
        str | None, Field(description="the event table of the config that they belong to; default: the one there is")
    ] = None


class OverloadedError(CorankError):
    """More requests than the limits allow."""


class Service(Protocol):
    """What the HTTP interface calls."""

    async def rank(self, request: RankRequest) -> dict[str, Any]: ...

    async def push(self, request: EventsRequest) -> dict[str, Any]: ...

    async def describe(self) -> ModelDescription: ...

    @property
    def refused(self) -> dict[str, str] | None: ...


def build_api(
    service: Service, max_body_bytes: int = MOST_BODY_BYTES, admitted: int = ServingConfig().admitted
) -> FastAPI:
    """The HTTP interface; every error is JSON: ``{"error": {"type", "field", "message"}}``.

    Args:
        admitted: requests to rank, and pushes, that all replicas hold together; the proxy turns away what is more.
    """
    api = FastAPI(title="corank")
    api.router.route_class = bounded_route(max_body_bytes)
    limits = {ADMITTED: str(admitted)}

    @api.post("/v1/rank")
    async def rank(request: RankRequest) -> JSONResponse:
        return JSONResponse(await service.rank(request), headers=limits)

    @api.post("/v1/events")
    async def events(request: EventsRequest) -> JSONResponse:
        return JSONResponse(await service.push(request), headers=limits)

    @api.get("/healthz")
    async def healthz() -> JSONResponse:
        try:
            await service.describe()
        except Exception as error:
            LOG.exception("the model does not answer")
            return _error(503, "not_ready", None, _told(error))
        return JSONResponse({"status": "ok"}, headers=limits)

    @api.get("/v1/model")
    async def model() -> JSONResponse:
        return JSONResponse({**_summary(await service.describe()), "refused": service.refused})

    @api.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        if isinstance(error.body, bytes):
            return _error(
                422, "invalid_request", "body", "is not JSON by its header; send content-type: application/json"
            )
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])  # ("body", "candidates", 3) → candidates.3
        return _error(422, "invalid_request", field or "body", first["msg"].removeprefix("Value error, "))

    @api.exception_handler(BodyError)
    async def unreadable(_: Request, error: BodyError) -> JSONResponse:
        kind = "too_large" if error.status_code == 413 else "invalid_request"
        return _error(error.status_code, kind, error.field, error.detail)

    @api.exception_handler(InvalidRequestError)
    async def invalid(_: Request, error: InvalidRequestError) -> JSONResponse:
        return _error(422, "invalid_request", error.field, str(error))

    @api.exception_handler(OverloadedError)
    async def overloaded(_: Request, error: OverloadedError) -> JSONResponse:
        return _error(503, "overloaded", None, str(error), {"Retry-After": "1"})

    @api.exception_handler(CorankError)  # the model or the store is not there, or not as the request needs it
    async def unavailable(_: Request, error: CorankError) -> JSONResponse:
        LOG.error("request failed: %s", error)
        return _error(503, "unavailable", None, str(error), {"Retry-After": "1"})

    @api.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
        return _error(error.status_code, kind, None, str(error.detail))

    @api.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> JSONResponse:
        LOG.error("request failed", exc_info=error)
        return _error(500, "internal", None, _told(error))

    return api


def _error(
    status: int, kind: str, field: str | None, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    content = {"error": {"type": kind, "field": field, "message": message}}
    return JSONResponse(content, status_code=status, headers=headers)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, CorankError) else message_of(error)


def _summary(model: ModelDescription) -> dict[str, Any]:
    """``GET /v1/model``."""
    schema = model.schema
    metadata = {name: model.metadata[name] for name in ("metrics", "lineage") if name in model.metadata}
    return {
        "model_version": model.version,
        "tasks": model.tasks,
        "schema": {
            "features": {
                side: [
                    {"name": one.name, "column": one.source, "kind": one.kind, "multi": one.multi}
                    for one in schema.features
                    if one.side == side
                ]
                for side in ("user", "item", "context")
            },
            "sequences": [
                {"name": one.name, "length": one.length, "fields": [field.name for field in one.fields]}
                for one in schema.sequences
            ],
        },
        "metadata": json.loads(json.dumps(metadata), parse_constant=lambda _: None),
    }


def answer(
    request: RankRequest,
    ts: int,
    row: RequestRow,
    model: ModelDescription,
    ranked: Ranked,
    seconds: Mapping[str, float],
    weights: Mapping[str, float],
) -> dict[str, Any]:
    """The body of an answer.

    Args:
        seconds: ``features`` and ``model``, the way to the ranker and the wait for others included.
        weights: of tasks, where the request has none.

    Raises:
        InvalidRequestError: a weight names no task of the model.
    """
    order = np.argsort(-_ordered_by(request.weights or weights, model.tasks, ranked.scores), kind="stable")
    known = zip(request.candidates, row.item_known, strict=True)
    return {
        "model_version": model.version,
        "request_ts": ts,
        "tasks": model.tasks,
        "scores": {task: ranked.scores[:, index].tolist() for index, task in enumerate(model.tasks)},
        "ranking": [request.candidates[index] for index in order[: request.top_k]],
        "cold_start": {"user": not row.user_known, "items": [item for item, is_known in known if not is_known]},
        "memo": ranked.remembered,
        "milliseconds": {
            "features": 1e3 * seconds["features"],
            "user_side": 1e3 * ranked.user_seconds,
            "item_side": 1e3 * ranked.item_seconds,
            "between": 1e3 * (seconds["model"] - ranked.user_seconds - ranked.item_seconds),
        },
    }


def _ordered_by(weights: Mapping[str, float], tasks: list[str], scores: np.ndarray) -> np.ndarray:
    """What the ranking is by, [C]: the weighted sum of the tasks' probabilities; without weights the first task."""
    if not weights:
        return scores[:, 0]
    unknown = [task for task in weights if task not in tasks]
    if unknown:
        raise InvalidRequestError(f"weights.{unknown[0]}", f"is no task of the model; there are: {', '.join(tasks)}")
    return np.asarray(scores @ np.array([weights.get(task, 0.0) for task in tasks]))


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
    """Of events that are refused together, the place of the first that is refused alone, and why."""
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


# --- the deployments ----------------------------------------------------------------------------------


class RankingService:
    """Validates requests, reads their features from the online store and asks the ranker; stores new events.

    The store is read in one thread of its own and written in another, so that health and overload are answered
    meanwhile, and no ranking waits for a push that waits for another writer.
    """

    def __init__(self, settings: ServingSettings, ranker: DeploymentHandle[Any]) -> None:
        self._settings = settings
        self._ranker = ranker
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="feature-store-reader")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="feature-store-writer")
        self._opening = asyncio.Lock()
        self._live: LiveModel | None = None
        self._following: asyncio.Task[None] | None = None
        self.refused: dict[str, str] | None = None  # the artifact that was to be served last, and why it is not
        self._writer: OnlineWriter | None = None
        self._admitted = {"rank": 0, "push": 0}
        self._missing: asyncio.Task[None] | None = None  # runs while no ranker answers

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = self._settings.options
        return build_api(self, options.max_body_bytes, options.admitted * options.service_replicas)

    async def describe(self) -> ModelDescription:
        """What the ranker serves, asked anew each time; also proves that the store can be read.

        Raises:
            CorankError: the store lacks what the model reads, or does not answer.
        """
        live = await self._open()
        return await self._described(live.artifact)

    async def rank(self, request: RankRequest) -> dict[str, Any]:
        """Score and order the candidates of a request.

        Raises:
            InvalidRequestError: it does not fit the model or the limits.
            OverloadedError: too many requests are being worked on.
            UnavailableError: the online store does not answer.
        """
        settings, limits = self._settings, self._settings.options
        if len(request.candidates) > limits.max_candidates:
            raise InvalidRequestError(
                "candidates", f"has {len(request.candidates)} items; at most {limits.max_candidates}"
            )
        with self._admission("rank"):
            live = await self._open()
            started = time.perf_counter()
            ts = request.ts if request.ts is not None else time.time_ns() // 1_000
            row = await _in_thread(
                self._reading,
                lambda: build_row(
                    live.reader,
                    settings.log_delay,
                    str(request.user_id),
                    [str(item) for item in request.candidates],
                    request.context,
                    ts,
                    limits.missing_context,
                ),
            )
            read = time.perf_counter()
            ranked: Ranked = await self._ask(self._ranker.rank, (live.artifact, row.rows))
            seconds = {"features": read - started, "model": time.perf_counter() - read}
            return answer(request, ts, row, live.model, ranked, seconds, limits.weights)

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
        if self._writer is None:  # of the newest config, whose views the store has; a model may read fewer of them
            live = self._live
            switched = live is not None and live.artifact != self._settings.artifact
            store = (
                replace(self._settings.store, schema=live.model.schema) if live and switched else self._settings.store
            )
            self._writer = OnlineWriter(store, self._settings.log_delay)
        writer = self._writer
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
    def _admission(self, kind: Literal["rank", "push"]) -> Iterator[None]:
        """One of the requests of its kind that are worked on at a time.

        Raises:
            OverloadedError: there are too many.
        """
        if self._admitted[kind] >= self._settings.options.admitted:
            raise OverloadedError(
                f"{self._admitted[kind]} requests are being worked on, which is the limit; try again later"
            )
        self._admitted[kind] += 1
        try:
            yield
        finally:
            self._admitted[kind] -= 1

    async def _open(self) -> LiveModel:
        """The model that requests are bound to now."""
        if self._live is None:
            async with self._opening:
                if self._live is None:
                    self._live = await self._prepared(await self._wanted() or self._settings.artifact)
        if self._settings.follow is not None and (self._following is None or self._following.done()):
            self._following = asyncio.create_task(self._follow())
        return self._live

    async def _prepared(self, artifact: str) -> LiveModel:
        model = await self._described(artifact)
        store = replace(self._settings.store, schema=model.schema)
        reader = await _in_thread(self._reading, lambda: OnlineReader(store))
        await _in_thread(self._reading, lambda: reader.user(""))  # a lost store has its views, but no tables
        return LiveModel(artifact, model, reader)

    async def _wanted(self) -> str | None:
        """The artifact that is to be served; None when nothing says so."""
        if self._settings.follow is None:
            return None
        return await asyncio.to_thread(followed, self._settings.follow)

    async def _follow(self) -> None:
        """Bind requests to what is to be served, once it is ready; what is not fit stays out, and says why."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            wanted = await self._wanted()
            if self._live is None or wanted in (None, self._live.artifact, (self.refused or {}).get("artifact")):
                continue
            assert wanted is not None
            try:
                live = await self._prepared(wanted)
            except UnavailableError:  # the ranker or the store is away; later
                continue
            except Exception as error:
                LOG.exception("model %s is not served", wanted)
                self.refused = {"artifact": wanted, "why": _told(error)}
                continue
            if live.model.schema != self._live.model.schema:  # pushes fill the views that it reads
                self._writer = None
            self._live, self.refused = live, None

    async def _described(self, artifact: str) -> ModelDescription:
        description: ModelDescription = await self._ask(self._ranker.describe, artifact)
        return description

    async def _ask(self, method: Any, *arguments: Any) -> Any:
        """What a ranker answers. When one has ended, until another is there, nobody waits for it.

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


async def _in_thread(thread: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(thread, work)


class Ranker:
    """The models that are asked for, on merged batches of requests."""

    def __init__(self, settings: ServingSettings) -> None:
        keep_freed_memory()
        torch.set_num_threads(
            settings.ranker_threads or max(1, (os.cpu_count() or 1) // settings.options.ranker_replicas)
        )
        self._models: OrderedDict[str, tuple[Artifact, MemoisedModel]] = OrderedDict()
        self._loading = threading.Lock()
        self._max_candidates = settings.options.max_candidates
        self._memo_bytes = round(settings.options.memo_megabytes * 1e6)
        self.rank.set_max_batch_size(settings.options.max_batch_requests)  # type: ignore[attr-defined]
        self.rank.set_batch_wait_timeout_s(settings.options.batch_wait_ms / 1e3)  # type: ignore[attr-defined]
        self._model(settings.artifact)

    def _model(self, artifact: str) -> tuple[Artifact, MemoisedModel]:
        """A model, loaded and checked when it is first asked for; the one longest not asked for goes then.

        Raises:
            CorankError: it cannot be read, or gives other scores than those stored beside it.
        """
        with self._loading:
            if artifact not in self._models:
                loaded = load_artifact(artifact)
                require_selfcheck(artifact, loaded.model, loaded.metadata.get("selfcheck", {}))
                self._models[artifact] = loaded, MemoisedModel(loaded.model, self._memo_bytes)
            self._models.move_to_end(artifact)
            while len(self._models) > MOST_MODELS:
                self._models.popitem(last=False)
            return self._models[artifact]

    async def describe(self, artifact: str) -> ModelDescription:
        model, _ = await asyncio.to_thread(self._model, artifact)
        return ModelDescription(model.version, model.schema, model.metadata)

    @serve.batch
    async def rank(self, requests: list[BoundRow]) -> list[Ranked]:
        """What every request gets by the model that it is bound to."""
        return await asyncio.to_thread(self.score, requests)

    def score(self, requests: Sequence[BoundRow]) -> list[Ranked]:
        """Scores of these requests, merged per model into batches of at most ``max_candidates`` candidates."""
        ranked: dict[int, Ranked] = {}
        for artifact in dict.fromkeys(artifact for artifact, _ in requests):
            places = [place for place, (bound_to, _) in enumerate(requests) if bound_to == artifact]
            rows = concatenate([requests[place][1] for place in places])
            _, model = self._model(artifact)
            ranked |= dict(zip(places, model.rank(rows, self._max_candidates), strict=True))
        return [ranked[place] for place in range(len(requests))]


def followed(path: str) -> str | None:
    """The artifact that the document of ``ServingSettings.follow`` names; None when it is not there or half written."""
    store, inside = file_system(path)
    try:
        with store.open_input_stream(inside) as stream:
            return str(json.loads(stream.read())["artifact"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build_application(settings: ServingSettings) -> serve.Application:
    """The application of these settings, for ``serve.run``."""
    ranker = serve.deployment(
        # The service limits the requests; the ranker must take all of them, or they could not be merged.
        max_ongoing_requests=settings.options.admitted * settings.options.service_replicas,
        num_replicas=settings.options.ranker_replicas,
        ray_actor_options={"num_cpus": settings.ranker_cpus},
        max_constructor_retry_count=2,
    )(Ranker)
    service = serve.deployment(
        # Room above the limits of both kinds, so that what exceeds them reaches the service and is answered 503 in
        # JSON.
        max_ongoing_requests=3 * settings.options.admitted + 100,
        num_replicas=settings.options.service_replicas,
        ray_actor_options={"num_cpus": settings.service_cpus},
        max_constructor_retry_count=2,
    )(serve.ingress()(RankingService))
    return service.bind(settings, ranker.bind(settings))
