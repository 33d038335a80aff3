"""Additions to Ray's HTTP proxy: it refuses requests beyond the limit at once, and answers in JSON in place of a
replica that is gone.

Ray offers only an environment variable for this, which must be set before Ray starts.
"""

from __future__ import annotations

import json
import os
from collections import Counter

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.paths import LIMITED, OPEN

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
ADMITTED = "x-corank-admitted"
"""Header of the service's answers: how many requests of each of :data:`serving.paths.LIMITED` the proxy passes on at a
time, a batch as one. Whoever starts an endpoint asks for its health first; a proxy that is replaced learns it from the
next answer."""
UNAVAILABLE = "no process of the service answers; try again"
GONE = "corank.gone"
"""In the scope of a request that no replica answered."""


def announce() -> None:
    """Give proxies that Ray starts later these additions, and have a killed proxy replaced soon."""
    os.environ.setdefault(VARIABLE, f"{middlewares.__module__}:{middlewares.__qualname__}")
    # a proxy is replaced after three failed checks; they come every 30 s by default
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")


def middlewares() -> list[Middleware]:
    """The additions; Ray's proxy calls this when it starts."""
    return [Middleware(JsonErrors), Middleware(Admission)]  # the last one sees a request first


class Admission:
    """Answers 503 where a path has as many requests as the service admits, before they cost it anything.

    Otherwise each of them would wait in the proxy and in a replica for those before it, only to be refused there.
    After a replica was gone, only one request at a time waits for the next replica, until a replica answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._admitted: dict[str, int] = {}
        self._ongoing: Counter[str] = Counter()
        self._lost: set[str] = set()  # paths whose last answer came from no replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path not in self._admitted:
            await self._app(scope, receive, self._learning(path, send))
        elif path in self._lost and self._ongoing[path]:
            await _send_error(send, "unavailable", UNAVAILABLE)
        elif self._ongoing[path] >= self._admitted[path]:
            message = f"{self._ongoing[path]} requests are being worked on, which is the limit; try again later"
            await _send_error(send, "overloaded", message)
        else:
            self._ongoing[path] += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._ongoing[path] -= 1
            if GONE in scope:
                self._lost.add(path)
            else:
                self._lost.discard(path)

    def _learning(self, path: str, send: Send) -> Send:
        async def forward(message: Message) -> None:
            for name, value in message.get("headers", []):
                if name == ADMITTED.encode():
                    root = next(path.removesuffix(suffix) for suffix in (*OPEN, *LIMITED) if path.endswith(suffix))
                    self._admitted |= {root + limited: int(value) for limited in LIMITED}
            await send(message)

        return forward


class JsonErrors:
    """Answers 503 in JSON where the proxy has only a line of text, or no answer at all because the replica died."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = replaced = False

        async def forward(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                text = any(name == b"content-type" and b"text/plain" in value for name, value in message["headers"])
                started, replaced = True, text and message["status"] in (408, 429, 503)
                if replaced:
                    await self._replace(scope, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, forward)
        if scope["type"] == "http" and not started:
            await self._replace(scope, send)

    async def _replace(self, scope: Scope, send: Send) -> None:
        scope[GONE] = True
        await _send_error(send, "unavailable", UNAVAILABLE)


async def _send_error(send: Send, kind: str, message: str) -> None:
    content = json.dumps({"error": {"type": kind, "field": None, "message": message}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(content)),
        (b"retry-after", b"1"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": content})
