"""What Ray's HTTP proxy answers in place of a service replica that is gone, as JSON like every other answer.

Ray gives the proxy no options for it but an environment variable, which has to be set before Ray starts.
"""

from __future__ import annotations

import json
import os

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def announce() -> None:
    """Let the proxies of a Ray that starts later answer so."""
    os.environ.setdefault(VARIABLE, f"{middlewares.__module__}:{middlewares.__qualname__}")


def middlewares() -> list[Middleware]:
    """What Ray's proxy calls when it starts."""
    return [Middleware(JsonErrors)]


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
                    await _send_unavailable(send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, forward)
        if scope["type"] == "http" and not started:
            await _send_unavailable(send)


async def _send_unavailable(send: Send) -> None:
    message = "no process of the service answers; try again"
    content = json.dumps({"error": {"type": "unavailable", "field": None, "message": message}}).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": content})
