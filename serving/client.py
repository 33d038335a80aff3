"""Thin clients of the ranking endpoint: one that waits, and one for programs that are asynchronous themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from types import TracebackType
from typing import Any, cast

import httpx

from features.errors import CorankError
from serving.auth import UnauthorizedError
from serving.paths import EVENTS, FEEDBACK, HEALTH, MODEL, RANK, RANK_BATCH
from serving.ports import is_own

TOKEN = "CORANK_TOKEN"


class NoEndpointError(CorankError):
    """Nothing answers at the address, or what answers is not corank."""


class RankingClient:
    """Calls a ranking endpoint.

    Every method raises :class:`CorankError` with what went wrong and what to do: nothing listens, no answer
    in time, or the endpoint's own message (with the wrong field named).
    """

    def __init__(self, url: str, timeout: float = 30.0, token: str | None = None) -> None:
        """
        Args:
            url: e.g. ``http://127.0.0.1:8000``.
            timeout: seconds.
            token: one of the endpoint's, where it asks for them; default: the environment's ``CORANK_TOKEN``.
        """
        self.url, self._timeout = url.rstrip("/"), timeout
        with _addressed(url):
            self._http = httpx.Client(**_options(self.url, timeout, token))

    def rank(
        self,
        user_id: str | int,
        candidates: Sequence[str | int | Mapping[str, Any]],
        context: Mapping[str, Any] | None = None,
        ts: int | None = None,
        *,
        tasks: Sequence[str] | None = None,
        top_k: int | None = None,
        weights: Mapping[str, float] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Scores and ranking of the candidates.

        Args:
            candidates: item ids; or ``item_id`` and features of the item in place of the stored ones.
            context: context features by the column they come from.
            ts: time of the request in microseconds UTC; default: now.
            tasks: whose scores to answer; default: all.
            top_k: length of the ranking; default: all.
            weights: of the tasks, by whose weighted sum to rank; default: as the endpoint is configured.
            more: ``user``, ``history``: features in place of the stored ones; ``request_id``: what feedback calls it;
                ``model_version``: of the model to ask.
        """
        return self._call("POST", RANK, rank_body(user_id, candidates, context, ts, tasks, top_k, weights, **more))

    def rank_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The answers to several requests, in their order; all of them, or an error.

        Args:
            requests: bodies of ``POST /v1/rank``: user_id, candidates, and what else a request may have.
        """
        return cast(list[dict[str, Any]], self._call("POST", RANK_BATCH, _batch_body(requests))["answers"])

    def push(self, events: Sequence[Mapping[str, Any]], table: str | None = None) -> dict[str, int]:
        """Append new events to the online sequences; the next request sees them. May be repeated.

        Args:
            events: event_id, user_id, ts (microseconds UTC) and the columns that the sequences of the table read; of a
                table without ``event_id``, all its columns instead of it.
            table: the event table of the config that they belong to; default: the one that sequences read.

        Returns:
            events added per sequence.
        """
        return cast(dict[str, int], self._call("POST", EVENTS, _events_body(events, table))["added"])

    def feedback(self, labels: Sequence[Mapping[str, Any]]) -> int:
        """Log what became of items that were answered; returns how many labels were accepted.

        Args:
            labels: request_id (of the answer), item_id, label (a task), and value (0 or 1; default: 1) and ts
                (microseconds UTC; default: now).
        """
        return int(self._call("POST", FEEDBACK, _feedback_body(labels))["accepted"])

    def healthz(self) -> dict[str, Any]:
        """``{"status": "ok"}`` when the model answers."""
        return self._call("GET", HEALTH)

    def model(self) -> dict[str, Any]:
        """Version, tasks, schema summary and metadata of the deployed model."""
        return self._call("GET", MODEL)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RankingClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        with _explained(self.url, path, self._timeout):
            return _content(self.url, path, self._http.request(method, path, json=body))


class AsyncRankingClient:
    """Calls a ranking endpoint without holding up the event loop; otherwise as :class:`RankingClient`."""

    def __init__(self, url: str, timeout: float = 30.0, token: str | None = None) -> None:
        """As :meth:`RankingClient.__init__`."""
        self.url, self._timeout = url.rstrip("/"), timeout
        with _addressed(url):
            self._http = httpx.AsyncClient(**_options(self.url, timeout, token))

    async def rank(
        self,
        user_id: str | int,
        candidates: Sequence[str | int | Mapping[str, Any]],
        context: Mapping[str, Any] | None = None,
        ts: int | None = None,
        *,
        tasks: Sequence[str] | None = None,
        top_k: int | None = None,
        weights: Mapping[str, float] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """As :meth:`RankingClient.rank`."""
        return await self._call(
            "POST", RANK, rank_body(user_id, candidates, context, ts, tasks, top_k, weights, **more)
        )

    async def rank_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """As :meth:`RankingClient.rank_batch`."""
        return cast(list[dict[str, Any]], (await self._call("POST", RANK_BATCH, _batch_body(requests)))["answers"])

    async def push(self, events: Sequence[Mapping[str, Any]], table: str | None = None) -> dict[str, int]:
        """As :meth:`RankingClient.push`."""
        return cast(dict[str, int], (await self._call("POST", EVENTS, _events_body(events, table)))["added"])

    async def feedback(self, labels: Sequence[Mapping[str, Any]]) -> int:
        """As :meth:`RankingClient.feedback`."""
        return int((await self._call("POST", FEEDBACK, _feedback_body(labels)))["accepted"])

    async def healthz(self) -> dict[str, Any]:
        """As :meth:`RankingClient.healthz`."""
        return await self._call("GET", HEALTH)

    async def model(self) -> dict[str, Any]:
        """As :meth:`RankingClient.model`."""
        return await self._call("GET", MODEL)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncRankingClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        with _explained(self.url, path, self._timeout):
            return _content(self.url, path, await self._http.request(method, path, json=body))


def rank_body(
    user_id: str | int,
    candidates: Sequence[str | int | Mapping[str, Any]],
    context: Mapping[str, Any] | None = None,
    ts: int | None = None,
    tasks: Sequence[str] | None = None,
    top_k: int | None = None,
    weights: Mapping[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Of ``POST /v1/rank``, e.g. for :meth:`RankingClient.rank_batch`; arguments as of :meth:`RankingClient.rank`."""
    items = [dict(candidate) if isinstance(candidate, Mapping) else candidate for candidate in candidates]
    body: dict[str, Any] = {"user_id": user_id, "candidates": items, "context": dict(context or {})}
    chosen = {
        "ts": ts,
        "tasks": None if tasks is None else list(tasks),
        "top_k": top_k,
        "weights": None if weights is None else dict(weights),
    }
    return body | {name: value for name, value in (chosen | more).items() if value is not None}


def _batch_body(requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"requests": [dict(request) for request in requests]}


def _events_body(events: Sequence[Mapping[str, Any]], table: str | None) -> dict[str, Any]:
    return {"events": [dict(event) for event in events], "table": table}


def _feedback_body(labels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"feedback": [dict(label) for label in labels]}


def _options(url: str, timeout: float, token: str | None) -> dict[str, Any]:
    token = token or os.environ.get(TOKEN, "")
    if not token.isascii() or not token.isprintable():
        raise CorankError("the token has letters that no token of serving.tokens can have")
    # http_proxy, all_proxy, … in the environment name proxies; this machine's own addresses need none
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return {"base_url": url, "timeout": timeout, "trust_env": not is_own(url), "headers": headers}


@contextmanager
def _addressed(url: str) -> Iterator[None]:
    """
    Raises:
        CorankError: it is no address, or a proxy's is none.
    """
    try:
        yield
    except (httpx.InvalidURL, ValueError, ImportError) as error:  # a SOCKS proxy needs a further package
        raise CorankError(
            f"no endpoint can be asked at {url}: {error}. Correct the address, or the variables that name a proxy "
            "(no_proxy exempts a host)."
        ) from None


@contextmanager
def _explained(url: str, path: str, timeout: float) -> Iterator[None]:
    """
    Raises:
        CorankError: the request cannot be sent, or there was no answer.
    """
    try:
        yield
    except (TypeError, ValueError) as error:  # NaN, half a character, a number of NumPy
        raise CorankError(f"{url}{path}: the request cannot be written as JSON: {error}") from None
    except httpx.ConnectError:
        raise NoEndpointError(f"no endpoint at {url}; start it with `corank serve`") from None
    except httpx.TimeoutException:
        raise CorankError(f"{url}{path}: no answer within {timeout:g} s") from None
    except httpx.HTTPError as error:
        raise CorankError(f"{url}{path}: {error}") from None


def _content(url: str, path: str, response: httpx.Response) -> dict[str, Any]:
    """
    Raises:
        CorankError: the endpoint answers with an error, or is none of corank.
    """
    content = _object(response)
    told = content.get("error")
    if response.is_success and content and told is None:
        return content
    if not isinstance(told, dict) or "message" not in told:
        raise NoEndpointError(
            f"{url}{path}: {response.status_code}: {response.text.strip()[:300] or response.reason_phrase}; "
            "this is no endpoint of corank"
        )
    if response.status_code == HTTPStatus.UNAUTHORIZED:
        raise UnauthorizedError(f"{url}{path}: {told['message']}")
    where = f"{told['field']}: " if told.get("field") else ""
    raise CorankError(f"{url}{path}: {response.status_code}: {where}{told['message']}")


def _object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer; empty when the answer is no JSON object."""
    try:
        content = response.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
