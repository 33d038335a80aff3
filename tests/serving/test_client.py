"""Both clients send the same requests and understand the same answers, over HTTP."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from features.errors import CorankError
from serving import AsyncRankingClient, RankingClient
from serving.api import EventsRequest, FeedbackRequest, RankBatchRequest, RankRequest, build_api
from serving.auth import Tokens, UnauthorizedError
from serving.client import NoEndpointError, rank_body
from serving.inline import InvalidRequestError
from tests.servers import free_port, served
from tests.serving.test_auth import ANSWER, SHOP, Answers, write

REQUEST: dict[str, Any] = {
    "user_id": 7,
    "candidates": [1, "2"],
    "context": {"device": "ios"},
    "ts": 5 * 10**14,
    "tasks": ["click"],
    "top_k": 1,
    "weights": {"click": 0.5},
}
LABEL = {"request_id": "r", "item_id": 1, "label": "click"}
EVENT = {"event_id": "e", "user_id": 7, "ts": 5 * 10**14, "item_id": 1}


class Remembers(Answers):
    """Knows what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    async def rank(self, request: RankRequest) -> dict[str, Any]:
        self.asked.append(request)
        if request.user_id == "wrong":
            raise InvalidRequestError("context.hour", "is missing")
        return await super().rank(request)

    async def rank_batch(self, batch: RankBatchRequest) -> list[dict[str, Any]]:
        self.asked.append(batch)
        return await super().rank_batch(batch)

    async def push(self, request: EventsRequest) -> dict[str, Any]:
        self.asked.append(request)
        return {"added": {"clicks": 1}}

    async def feedback(self, request: FeedbackRequest) -> dict[str, Any]:
        self.asked.append(request)
        return await super().feedback(request)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Remembers, str]]:
    path, service = tmp_path_factory.mktemp("tokens") / "tokens", Remembers()
    write(path, f"shop {SHOP}")
    with served(build_api(service, tokens=Tokens(path))) as address:
        yield service, address


def called(kind: str, url: str, method: str, *arguments: Any, token: str = SHOP, **options: Any) -> Any:
    """What a method of a client returns, or raises."""
    if kind == "sync":
        with RankingClient(url, timeout=20, token=token) as client:
            return getattr(client, method)(*arguments, **options)

    async def wait() -> Any:
        async with AsyncRankingClient(url, timeout=20, token=token) as client:
            return await getattr(client, method)(*arguments, **options)

    return asyncio.run(wait())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_every_method_sends_what_it_is_given_and_returns_what_is_answered(
    endpoint: tuple[Remembers, str], kind: str
) -> None:
    service, url = endpoint
    assert called(kind, url, "rank", **REQUEST) == ANSWER
    assert service.asked[-1] == RankRequest(**REQUEST)
    assert called(kind, url, "rank", "u", ["i"]) == ANSWER
    assert service.asked[-1] == RankRequest(user_id="u", candidates=["i"])
    assert called(kind, url, "rank_batch", [rank_body(**REQUEST), rank_body("u", ["i"])]) == [ANSWER] * 2
    assert service.asked[-1].requests == [RankRequest(**REQUEST), RankRequest(user_id="u", candidates=["i"])]
    assert called(kind, url, "push", [EVENT], table="clicks") == {"clicks": 1}
    assert service.asked[-1] == EventsRequest(events=[EVENT], table="clicks")
    assert called(kind, url, "feedback", [LABEL, LABEL | {"value": 0}]) == 2
    assert service.asked[-1] == FeedbackRequest(feedback=[LABEL, LABEL | {"value": 0}])
    inline: dict[str, Any] = {"user": {"age": 3}, "history": {"clicks": [{"ts": 1, "item_id": 2}]}}
    inline |= {"request_id": 5, "model_version": "v"}
    assert called(kind, url, "rank", "u", [{"item_id": 1, "price": 2.0}], **inline) == ANSWER
    assert service.asked[-1] == RankRequest(user_id="u", candidates=[{"item_id": 1, "price": 2.0}], **inline)
    assert called(kind, url, "healthz") == {"status": "ok"}
    assert called(kind, url, "model")["model_version"] == "1"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_is_wrong_is_raised_with_the_endpoints_words(endpoint: tuple[Remembers, str], kind: str) -> None:
    _, url = endpoint
    with pytest.raises(CorankError, match=r"/v1/rank: 422: context.hour: is missing"):
        called(kind, url, "rank", "wrong", [1])
    with pytest.raises(CorankError, match=r"422: tasks: "):  # an empty list is sent as one
        called(kind, url, "rank", 7, [1], tasks=[])
    with pytest.raises(UnauthorizedError, match="may have been revoked"):
        called(kind, url, "model", token="x" * 20)
    with pytest.raises(NoEndpointError, match="corank serve"):
        called(kind, f"http://127.0.0.1:{free_port()}", "healthz")
    with pytest.raises(CorankError, match="Correct the address"):
        called(kind, "http://::1:8000", "healthz")


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    "request_parts",
    [("u", ["a"], {"x": math.nan}), ("u\ud800", ["a"]), (np.int64(3), ["a"]), ("u", ["a"], {"x": Decimal("1.5")})],
    ids=["NaN", "half a character", "a number of NumPy", "a decimal"],
)
def test_what_no_request_can_hold_is_said_so(
    endpoint: tuple[Remembers, str], kind: str, request_parts: tuple[Any, ...]
) -> None:
    with pytest.raises(CorankError, match="/v1/rank: the request cannot be written as JSON: "):
        called(kind, endpoint[1], "rank", *request_parts)
    with pytest.raises(CorankError, match="the token has letters"):
        called(kind, endpoint[1], "model", token="ö" * 16)


def test_both_clients_have_the_same_methods() -> None:
    def methods(client: type) -> dict[str, Any]:
        public = inspect.getmembers(client, inspect.isfunction)
        return {name: inspect.signature(method).parameters for name, method in public if not name.startswith("_")}

    assert methods(RankingClient) == methods(AsyncRankingClient)
