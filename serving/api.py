"""The HTTP interface: bodies, answers, and errors, which are all JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, PlainValidator, StrictInt
from starlette.exceptions import HTTPException

from features.errors import CorankError, message_of
from features.schema import OTHER_UNITS, Schema
from serving.auth import Tokens, TooOftenError, UnauthorizedError
from serving.bodies import BodyError, bounded_route
from serving.inline import Inline, InvalidRequestError
from serving.memo import Ranked
from serving.metrics import Measuring, Metrics
from serving.paths import ABOUT, CONSOLE, EVENTS, EXPLAIN, FEEDBACK, HEALTH, MODEL, RANK, RANK_BATCH, READY
from serving.proxy import ADMITTED
from serving.rows import RequestRow
from serving.settings import MOST_BODY_BYTES, ServingConfig

MOST_EVENTS = 10_000
"""Events of one push."""

PAGE = Path(__file__).with_name("console") / "page.html"

MOST_REQUESTS = 64
"""Requests to rank of one body."""

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


def _plain_events(by_sequence: Mapping[str, Sequence[PastEvent]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [event.model_dump() for event in events] for name, events in by_sequence.items()}


def _candidate(value: Any) -> str | int | dict[str, Any]:
    if not isinstance(value, dict):
        return _identifier(value)
    if "item_id" not in value:
        raise ValueError("has no item_id")
    return value | {"item_id": _identifier(value["item_id"])}


Candidate = Annotated[
    str | int | dict[str, Any], PlainValidator(_candidate, json_schema_input_type=str | int | dict[str, Any])
]


def _in_microseconds(ts: int) -> int:
    for unit, (low, high) in OTHER_UNITS.items():
        if low <= ts < high:
            raise ValueError(f"looks like {unit}; send microseconds UTC")
    return ts


Microseconds = Annotated[StrictInt, Field(ge=0, lt=2**62), AfterValidator(_in_microseconds)]


class PastEvent(BaseModel):
    """An event of a sequence: its time, and the columns that the sequence reads."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Scalar]

    ts: Annotated[Microseconds, Field(description="time of the event, microseconds UTC")]


class RankRequest(BaseModel):
    """Body of ``POST /v1/rank``."""

    model_config = ConfigDict(extra="forbid")

    user_id: Identifier
    candidates: Annotated[
        list[Candidate],
        FailFast(),
        Field(min_length=1, description="item ids; or objects with item_id and features of the item"),
    ]
    context: Annotated[dict[str, Any], Field(description="context features by the column they come from")] = {}
    user: Annotated[
        dict[str, Any], Field(description="features of the user, by column, in place of those that are stored")
    ] = {}
    history: Annotated[
        dict[str, Annotated[list[PastEvent], FailFast(), Field(max_length=MOST_EVENTS)]],
        Field(description="per sequence all its events, in place of those that are stored"),
    ] = {}
    ts: Annotated[Microseconds | None, Field(description="time of the request, microseconds UTC; default: now")] = None
    recent: Annotated[
        dict[str, Annotated[list[PastEvent], FailFast(), Field(max_length=MOST_EVENTS)]],
        Field(description="per sequence events that this request sees on top of those that are stored"),
    ] = {}
    tasks: Annotated[list[str] | None, Field(min_length=1, description="whose scores to answer; default: all")] = None
    top_k: Annotated[int | None, Field(ge=1, description="length of the ranking; default: all")] = None
    weights: Annotated[
        dict[str, Annotated[float, Field(allow_inf_nan=False)]],
        Field(description="rank by this weighted sum of the tasks' scores; default: serving.weights of the config"),
    ] = {}
    request_id: Annotated[
        Identifier | None, Field(description="what feedback calls this request; default: a new id")
    ] = None
    model_version: Annotated[
        str | None, Field(description="of a model that is served, to be asked; default: as the config splits users")
    ] = None

    @cached_property
    def item_ids(self) -> list[str | int]:
        return [one["item_id"] if isinstance(one, dict) else one for one in self.candidates]

    @cached_property
    def inline(self) -> Inline:
        """What it brings along in place of what is stored."""
        return Inline(
            self.user,
            _plain_events(self.history),
            _plain_events(self.recent),
            {
                place: {name: value for name, value in one.items() if name != "item_id"}
                for place, one in enumerate(self.candidates)
                if isinstance(one, dict) and len(one) > 1
            },
        )


class RankBatchRequest(BaseModel):
    """Body of ``POST /v1/rank:batch``."""

    model_config = ConfigDict(extra="forbid")

    requests: Annotated[list[RankRequest], FailFast(), Field(min_length=1, max_length=MOST_REQUESTS)]


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


class Label(BaseModel):
    """What became of an item that was answered."""

    model_config = ConfigDict(extra="forbid")

    request_id: Annotated[Identifier, Field(description="of the answer")]
    item_id: Identifier
    label: Annotated[str, Field(description="name of a task of the model")]
    value: Annotated[StrictInt, Field(ge=0, le=1)] = 1
    ts: Annotated[Microseconds | None, Field(description="when it happened, microseconds UTC; default: now")] = None


class FeedbackRequest(BaseModel):
    """Body of ``POST /v1/feedback``."""

    model_config = ConfigDict(extra="forbid")

    feedback: Annotated[list[Label], FailFast(), Field(min_length=1, max_length=MOST_EVENTS)]


class OverloadedError(CorankError):
    """More requests than the limits allow."""


class Service(Protocol):
    """What the HTTP interface calls."""

    async def rank(self, request: RankRequest) -> dict[str, Any]: ...

    async def rank_batch(self, batch: RankBatchRequest) -> list[dict[str, Any]]: ...

    async def explain(self, request: RankRequest) -> dict[str, Any]: ...

    async def about(self) -> dict[str, Any]: ...

    async def push(self, request: EventsRequest) -> dict[str, Any]: ...

    async def feedback(self, request: FeedbackRequest) -> dict[str, Any]: ...

    async def describe(self) -> ModelDescription: ...

    async def require_ready(self) -> str | None: ...

    @property
    def metrics(self) -> Metrics: ...

    @property
    def beside(self) -> dict[str, Any]: ...

    @property
    def served(self) -> str | None: ...

    @property
    def memo_bytes(self) -> int: ...

    @property
    def refused(self) -> dict[str, str] | None: ...


def build_api(
    service: Service,
    max_body_bytes: int = MOST_BODY_BYTES,
    admitted: int = ServingConfig().admitted,
    tokens: Tokens | None = None,
) -> FastAPI:
    """The HTTP interface; every error is JSON: ``{"error": {"type", "field", "message"}}``.

    Args:
        admitted: requests to rank, and pushes, that all replicas hold together; the proxy turns away what is more.
        tokens: one of them must come with every request but those for health and documentation; None: none is asked.
    """
    api = FastAPI(title="corank")
    # only shown in the documentation; the route checks it, before the body is read
    private: dict[str, Any] = {"dependencies": [Depends(HTTPBearer(auto_error=False))] if tokens is not None else []}
    metrics, page = service.metrics, PAGE.read_text(encoding="utf-8")
    api.router.route_class = bounded_route(max_body_bytes, tokens.require if tokens is not None else lambda _: None)
    limits = {ADMITTED: str(admitted)}

    @api.post(RANK, **private)
    async def rank(request: RankRequest) -> JSONResponse:
        answer = await service.rank(request)
        metrics.answered(answer)
        return JSONResponse(answer, headers=limits)

    @api.post(RANK_BATCH, **private)
    async def rank_batch(batch: RankBatchRequest) -> JSONResponse:
        answers = await service.rank_batch(batch)
        for answer in answers:
            metrics.answered(answer)
        return JSONResponse({"answers": answers}, headers=limits)

    @api.post(EXPLAIN, **private)
    async def explain(request: RankRequest) -> JSONResponse:
        return JSONResponse(await service.explain(request), headers=limits)

    @api.get(ABOUT, **private)
    async def about() -> JSONResponse:
        return JSONResponse(await service.about())

    @api.get(CONSOLE, include_in_schema=False)
    async def console() -> HTMLResponse:
        return HTMLResponse(page)

    @api.post(EVENTS, **private)
    async def events(request: EventsRequest) -> JSONResponse:
        return JSONResponse(await service.push(request), headers=limits)

    @api.post(FEEDBACK, **private)
    async def feedback(request: FeedbackRequest) -> JSONResponse:
        return JSONResponse(await service.feedback(request), headers=limits)

    @api.get(HEALTH)
    @api.get(READY)
    async def health() -> JSONResponse:
        try:
            degraded = await service.require_ready()
        except Exception as error:
            LOG.exception("the model does not answer")
            return _error(503, "not_ready", None, told(error))
        # 200, as requests are answered: nobody is served better by taking the replica away
        status = {"status": "ok"} if degraded is None else {"status": "degraded", "why": degraded}
        return JSONResponse(status, headers=limits)

    @api.get(MODEL, **private)
    async def model() -> JSONResponse:
        return JSONResponse({**_summary(await service.describe()), "refused": service.refused, **service.beside})

    @api.get("/metrics", **private)
    async def measured() -> Response:
        metrics.state(service.served, service.refused is not None, service.memo_bytes)
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    api.add_middleware(Measuring, metrics=metrics)

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

    @api.exception_handler(UnauthorizedError)
    async def unauthorized(_: Request, error: UnauthorizedError) -> JSONResponse:
        return _error(401, "unauthorized", None, str(error), {"WWW-Authenticate": "Bearer"})

    @api.exception_handler(TooOftenError)
    async def too_often(_: Request, error: TooOftenError) -> JSONResponse:
        return _error(429, "too_often", None, str(error), {"Retry-After": "1"})

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
        return _error(500, "internal", None, told(error))

    return api


def _error(
    status: int, kind: str, field: str | None, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    content = {"error": {"type": kind, "field": field, "message": message}}
    return JSONResponse(content, status_code=status, headers=headers)


def told(error: Exception) -> str:
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
                    {"name": feature.name, "column": feature.source, "kind": feature.kind, "multi": feature.multi}
                    for feature in schema.features
                    if feature.side == side
                ]
                for side in ("user", "item", "context")
            },
            "sequences": [
                {"name": sequence.name, "length": sequence.length, "fields": [field.name for field in sequence.fields]}
                for sequence in schema.sequences
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
    order: Sequence[int],
) -> dict[str, Any]:
    """The body of an answer.

    Args:
        seconds: ``features`` and ``model``, the way to the ranker and the wait for others included.
        order: places of the candidates in the ranking.
    """
    tasks = request.tasks or model.tasks
    item_ids = request.item_ids
    known = zip(item_ids, row.item_known, strict=True)
    return {
        "request_id": row.request_id,
        "model_version": model.version,
        "request_ts": ts,
        "tasks": tasks,
        "scores": {task: ranked.scores[:, model.tasks.index(task)].tolist() for task in tasks},
        "ranking": [item_ids[index] for index in order],
        "cold_start": {"user": not row.user_known, "items": [item for item, is_known in known if not is_known]},
        "degraded": row.degraded,
        "memo": ranked.remembered,
        "milliseconds": {
            "features": 1e3 * seconds["features"],
            "user_side": 1e3 * ranked.user_seconds,
            "item_side": 1e3 * ranked.item_seconds,
            "between": 1e3 * (seconds["model"] - ranked.user_seconds - ranked.item_seconds),
        },
    }


def ranking_of(scores: np.ndarray, weights: np.ndarray, top_k: int | None) -> list[int]:
    """Places of the best candidates by the weighted sum of their probabilities, best first; ties in their order.

    Args:
        scores: [C, K].
        weights: of the tasks, [K].
    """
    return [int(place) for place in np.argsort(-(scores @ weights), kind="stable")[:top_k]]


def weights_of(request: RankRequest, tasks: list[str], configured: Mapping[str, float]) -> np.ndarray:
    """Weights of a model's tasks, [K]: those of the request, else of the config, else the first task alone.

    Raises:
        InvalidRequestError: the request names what is no task of the model.
    """
    named = [(f"weights.{task}", task) for task in request.weights]
    named += [(f"tasks.{index}", task) for index, task in enumerate(request.tasks or ())]
    for field, task in named:
        if task not in tasks:
            raise InvalidRequestError(field, f"{task!r} is no task of the model; there are: {', '.join(tasks)}")
    # of the config: a model of another config may have other tasks
    chosen = (
        request.weights or {task: weight for task, weight in configured.items() if task in tasks} or {tasks[0]: 1.0}
    )
    return np.array([chosen.get(task, 0.0) for task in tasks])
