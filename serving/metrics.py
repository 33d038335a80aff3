"""What a service replica measures, for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
GONE = 499
"""Status of a request whose client did not wait for the answer."""

CANDIDATES = (1, 10, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)


DIFFERENCES = (1e-6, 1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


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
            Histogram,
            "http_request_seconds",
            "In the replica, without the wait for it.",
            "path",
            buckets=SECONDS,
        )
        self._ongoing = made(Gauge, "http_requests_ongoing", "Requests that are worked on now.")
        self._parts = made(Histogram, "rank_part_seconds", "Where the time of an answer went.", "part", buckets=SECONDS)
        self._candidates = made(Histogram, "rank_candidates", "Candidates of a request.", buckets=CANDIDATES)
        self._cold = made(Counter, "rank_cold", "Users and items of requests that nobody knows.", "entity")
        self._degraded = made(Counter, "rank_degraded", "Requests of which the online store told nothing.")
        self._memo = made(Counter, "memo", "Requests by what of their user side was remembered.", "remembered")
        self._memo_bytes = made(Gauge, "memo_bytes", "What the ranker that answered last remembers.")
        self._log_rows = made(Counter, "log_rows", "Rows of the served log.", "table", "outcome")
        self._shadow_differences = made(
            Histogram,
            "shadow_score_difference",
            "Mean difference of a request's scores between a shadow and what was answered.",
            "task",
            buckets=DIFFERENCES,
        )
        self._shadow_failed = made(Counter, "shadow_failed", "Requests of which the shadow has no scores.")
        self._model = made(Gauge, "model_served", "1 for the model that requests are bound to.", "version")
        self._refused = made(Gauge, "model_refused", "1 while the newest model named is not fit to be served.")

    def answered(self, answer: Mapping[str, Any]) -> None:
        """Count an answer to a request to rank (:func:`serving.api.answer`)."""
        for part, milliseconds in answer["milliseconds"].items():
            self._parts.labels(self._process, part).observe(milliseconds / 1e3)
        cold, candidates = answer["cold_start"], next(iter(answer["scores"].values()), ())
        self._candidates.observe(len(candidates))
        self._degraded.inc(answer["degraded"] is not None)
        self._cold.labels(self._process, "user").inc(bool(cold["user"]))
        self._cold.labels(self._process, "item").inc(len(cold["items"]))
        self._memo.labels(self._process, answer["memo"]).inc()

    def logged(self, table: str, outcome: str, rows: int) -> None:
        """Count rows of the served log (:class:`serving.request_log.RequestLog`)."""
        self._log_rows.labels(self._process, table, outcome).inc(rows)

    def shadowed(self, task: str, served: np.ndarray, other: np.ndarray) -> None:
        """Compare a shadow's scores of one request with those that were answered, [C] each."""
        self._shadow_differences.labels(self._process, task).observe(float(np.abs(served - other).mean()))

    def shadow_failed(self) -> None:
        """A shadow did not answer, or was not asked because it had too much to do."""
        self._shadow_failed.inc()

    def state(self, version: str | None, refused: bool, memo_bytes: int) -> None:
        """The version that requests are bound to now, if any; what the ranker remembers that answered last."""
        self._memo_bytes.set(memo_bytes)
        self._model.clear()
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
    """Counts and times requests by the path of their route; those without one are one path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def forward(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self._metrics.begun()
        try:
            await self._app(scope, receive, forward)
        except asyncio.CancelledError:
            status = GONE  # the client has left
            raise
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.ended(path, status, time.perf_counter() - started)
