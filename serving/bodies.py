"""The body of an HTTP request: its size is limited while it streams in, and its values are such that all later steps
can hold them.

Python's parser accepts more than JSON allows or a later step can hold: NaN, numbers beyond all floats, halves of
surrogate pairs. They are refused here, with the name of their field, so that no later step has to check for them.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from serving.paths import OPEN

ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BodyError(HTTPException):
    """A body that cannot be read; ``field`` names the part of it that is wrong."""

    def __init__(self, status: int, field: str, message: str) -> None:
        super().__init__(status, message)
        self.field = field


def bounded_route(most_bytes: int, authorize: Callable[[str | None], object]) -> type[APIRoute]:
    """A kind of route whose requests have a body of at most so many bytes, read by :func:`parse`.

    Args:
        authorize: raises what a request is refused with by its header ``authorization``, before its body is read; not
            asked about those to :data:`serving.paths.OPEN`.
    """

    class BoundedRequest(Request):
        async def body(self) -> bytes:
            if not hasattr(self, "_read"):
                content = bytearray()
                async for chunk in self.stream():
                    content += chunk
                    if len(content) > most_bytes:
                        raise BodyError(413, "body", f"is larger than {most_bytes:,} bytes; send less at a time")
                self._read = bytes(content)
            return self._read

        async def json(self) -> Any:
            return parse(await self.body())

    class BoundedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle, guarded = super().get_route_handler(), self.path not in OPEN

            async def bounded(request: Request) -> Response:
                if guarded:
                    authorize(request.headers.get("authorization"))
                return await handle(BoundedRequest(request.scope, request.receive))

            return bounded

    return BoundedRoute


def parse(body: bytes) -> Any:
    """JSON as Python values: every text is Unicode, every fractional number finite.

    Raises:
        BodyError: the body is no such JSON; the field, or else the body, is named.
    """
    strange = False

    def number(text: str) -> float:
        nonlocal strange
        value = float(text)
        strange |= not math.isfinite(value)
        return value

    try:
        text = body.decode()
        content = json.loads(text, parse_float=number, parse_constant=number)
    except UnicodeDecodeError as error:
        raise BodyError(422, "body", f"is not UTF-8: byte {error.start:,} cannot be read") from None
    except json.JSONDecodeError as error:
        raise BodyError(422, "body", f"is not JSON: {error}") from None
    except ValueError:  # Python reads no integer of more than some thousand digits
        raise BodyError(422, "body", "has an integer of more digits than can be read; send an id as text") from None
    except RecursionError:
        raise BodyError(422, "body", "is nested too deeply") from None
    if strange or ESCAPED_SURROGATE.search(text):
        _refuse_strange(content)
    return content


def _refuse_strange(content: Any) -> None:
    waiting = deque[tuple[str, Any]]([("", content)])  # nested as deeply as Python's parser allows
    while waiting:
        field, value = waiting.popleft()
        if isinstance(value, dict):
            for key in value:
                _check_text(key, f"{field}.{key}")
            waiting += [(f"{field}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{field}.{index}", inner) for index, inner in enumerate(value)]
        elif isinstance(value, str):
            _check_text(value, field)
        elif isinstance(value, float) and not math.isfinite(value):
            raise BodyError(422, _shown(field), "must be a finite number")


def _check_text(value: str, field: str) -> None:
    """Raise BodyError on half a surrogate pair, which JSON can spell, but no text can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BodyError(422, _shown(field), "holds a character that is no Unicode text") from None


def _shown(field: str) -> str:
    return field.removeprefix(".").encode("utf-8", "backslashreplace").decode() or "body"
