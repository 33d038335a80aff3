"""What the endpoint says of itself to Prometheus."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from features.errors import UnavailableError
from serving.api import RankRequest, build_api
from serving.auth import Tokens
from serving.proxy import Admission, JsonErrors
from tests.serving.test_auth import ANSWER, SHOP, Answers, bearer, write


class Ranks(Answers):
    def __init__(self) -> None:
        super().__init__()
        self.fails = False

    async def rank(self, request: RankRequest) -> dict[str, Any]:
        if self.fails:
            raise UnavailableError("the store does not answer")
        return ANSWER

    async def require_ready(self) -> None:
        if self.fails:
            raise UnavailableError("the store does not answer")


def samples(client: TestClient) -> dict[tuple[Any, ...], float]:
    """Name and labels but the process, of what is told."""
    text = client.get("/metrics").text
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "process")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_parts_memo_and_what_is_served_are_counted() -> None:
    service, body = Ranks(), {"user_id": 1, "candidates": [1, 2, 3]}
    with TestClient(build_api(service), raise_server_exceptions=False) as client:
        for _ in range(2):
            assert client.post("/v1/rank", json=body).status_code == 200
        assert client.post("/v1/rank", json={}).status_code == 422
        for path in ("/somewhere", "/elsewhere"):
            client.get(path)
        told = samples(client)
        assert told["corank_http_requests_total", "/v1/rank", "200"] == 2
        assert told["corank_http_requests_total", "/v1/rank", "422"] == 1
        assert told["corank_http_requests_total", "other", "404"] == 2
        assert told["corank_http_request_seconds_count", "/v1/rank"] == 3
        assert told["corank_http_requests_ongoing",] == 1  # that for the metrics
        assert told["corank_rank_part_seconds_sum", "item_side"] == 0.006
        assert told["corank_rank_candidates_sum",] == 6
        assert told["corank_rank_cold_total", "user"] == 2
        assert told["corank_rank_cold_total", "item"] == 4
        assert told["corank_memo_total", "timeline"] == 2
        assert told["corank_model_served", "1"] == 1
        assert told["corank_memo_bytes",] == 5
        service.fails, service.served = True, "2"
        assert client.post("/v1/rank", json=body).status_code == 503
        assert client.get("/readyz").status_code == 503
        told = samples(client)
        assert told["corank_http_requests_total", "/v1/rank", "503"] == 1
        assert told["corank_http_requests_total", "/readyz", "503"] == 1
        assert told["corank_model_served", "2"] == 1
        assert ("corank_model_served", "1") not in told


def test_a_request_whose_client_leaves_is_counted_as_such_and_no_longer_as_ongoing() -> None:
    class Waits(Answers):
        async def rank(self, request: RankRequest) -> dict[str, Any]:
            arrived.set()
            await asyncio.sleep(60)
            raise AssertionError("it was not cancelled")

    async def leave() -> None:
        headers = [(b"content-type", b"application/json")]
        message = {"type": "http.request", "body": b'{"user_id": 1, "candidates": [1]}', "more_body": False}
        scope = {"type": "http", "method": "POST", "path": "/v1/rank", "query_string": b"", "headers": headers}
        task = asyncio.create_task(api(scope, AsyncMock(return_value=message), AsyncMock()))
        async with asyncio.timeout(10):
            await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    arrived, api = asyncio.Event(), build_api(Waits())
    asyncio.run(leave())
    told = samples(TestClient(api))
    assert told["corank_http_requests_total", "/v1/rank", "499"] == 1
    assert told["corank_http_requests_ongoing",] == 1  # that for the metrics


def test_every_path_is_answered_through_the_proxy_before_and_after_it_knows_the_limits() -> None:
    api = build_api(Answers())
    body: dict[str, Any] = {"user_id": 1, "candidates": [1]}
    bodies: dict[str, Any] = {
        "/v1/rank": body,
        "/v1/rank:batch": {"requests": [body]},
        "/v1/events": {"events": [{"user_id": 1, "ts": 1_767_571_200_000_000}]},
        "/v1/explain": body,
        "/v1/feedback": {"feedback": [{"request_id": "r", "item_id": 1, "label": "click"}]},
    }
    paths = [route.path for route in api.routes if isinstance(route, APIRoute)]
    assert set(bodies) | {"/healthz", "/readyz", "/metrics", "/v1/model", "/v1/console", "/console"} == set(paths)
    for first in paths:
        with TestClient(Admission(JsonErrors(api))) as client:  # as Ray's proxy has them
            for path in (first, *paths):
                method = "POST" if path in bodies else "GET"
                assert client.request(method, path, json=bodies.get(path)).status_code == 200, (first, path)


def test_metrics_need_a_token_where_requests_do(tmp_path: Path) -> None:
    write(tmp_path / "tokens", f"prometheus {SHOP}")
    with TestClient(build_api(Answers(), tokens=Tokens(tmp_path / "tokens"))) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers=bearer(SHOP)).status_code == 200
        assert client.get("/readyz").status_code == 200
