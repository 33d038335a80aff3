"""What a service replica measures, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CANDIDATES = (1, 10, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)


class Metrics:
    """Counters since the replica's start, and what it does now.

    Each replica has its own, under its name as ``process``; where there are several, each scrape meets one of them.
    """

    def __init__(self, process: str) -> None:
        """
        Args:
            process: name of the replica.
        """
        self._registry = CollectorRegistry()

        def made(kind: type[Any], name: str, told: str, *labels: str, **options: Any) -> Any:
            metric = kind(name, told, ["process", *labels], namespace="corank", registry=self._registry, **options)
            return metric if labels else metric.labels(process)

        self._process = process
        self._requests = made(Counter, "http_requests", "Requests by path and status.", "path", "status")
        self._seconds = made(
            Histogram, "http_request_seconds", "From the first to the last byte.", "path", buckets=SECONDS
        )
        self._ongoing = made(Gauge, "http_requests_ongoing", "Requests that are worked on now.")
        self._parts = made(Histogram, "rank_part_seconds", "Where the time of an answer went.", "part", buckets=SECONDS)
        self._candidates = made(Histogram, "rank_candidates", "Candidates of a request.", buckets=CANDIDATES)
        self._cold = made(Counter, "rank_cold", "Users and items of requests that nobody knows.", "entity")
        self._memo = made(Counter, "memo", "Requests by what of their user side was remembered.", "remembered")
        self._model = made(Gauge, "model_served", "1 for the model that requests are bound to.", "version")
        self._ready = made(Gauge, "ready", "1 if the model and the online store answer.")
        self._refused = made(Gauge, "model_refused", "1 while the newest model named is not fit to be served.")

    def answered(self, answer: Mapping[str, Any]) -> None:
        """Count an answer to a request to rank (:func:`serving.api.answer`)."""
        for part, milliseconds in answer["milliseconds"].items():
            self._parts.labels(self._process, part).observe(milliseconds / 1e3)
        cold, candidates = answer["cold_start"], next(iter(answer["scores"].values()), ())
        self._candidates.observe(len(candidates))
        self._cold.labels(self._process, "user").inc(bool(cold["user"]))
        self._cold.labels(self._process, "item").inc(len(cold["items"]))
        self._memo.labels(self._process, answer["memo"]).inc()

    def state(self, version: str | None, refused: bool) -> None:
        """What is served now; None: the model or the store does not answer."""
        self._model.clear()
        self._ready.set(version is not None)
        if version is not None:
            self._model.labels(self._process, version).set(1)
        self._refused.set(refused)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def begun(self) -> None:
        """A request is worked on from now on."""
        self._ongoing.inc()

    def ended(self, path: str, status: int, seconds: float) -> None:
        self._ongoing.dec()
        self._requests.labels(self._process, path, str(status)).inc()
        self._seconds.labels(self._process, path).observe(seconds)


class Measuring:
    """Counts and times the requests to some paths; all others are one path."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, started, status = scope["path"].removeprefix(scope.get("root_path", "")), time.perf_counter(), 500

        async def forward(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self._metrics.begun()
        try:
            await self._app(scope, receive, forward)
        finally:
            self._metrics.ended(path if path in self._paths else "other", status, time.perf_counter() - started)
