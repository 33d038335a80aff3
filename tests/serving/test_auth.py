"""Who may ask the endpoint: bearer tokens, given and revoked while it answers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from features.errors import CorankError
from features.schema import Feature, Schema, Task
from serving import auth
from serving.api import EventsRequest, FeedbackRequest, ModelDescription, RankBatchRequest, RankRequest, build_api
from serving.auth import Tokens, read_tokens
from serving.client import RankingClient
from serving.metrics import Metrics
from serving.rate import Rate
from serving.settings import ServingConfig

SHOP, REPORTS = "shop-7c1e0f2ab93d4c55", "reports-51d20c77aa10e4"
FEATURES = (Feature(name="user_id", side="user", kind="id"), Feature(name="item_id", side="item", kind="id"))
SCHEMA = Schema(features=FEATURES, sequences=(), tasks=(Task(name="click", column="click"),))


ANSWER = {
    "scores": {"click": [0.1, 0.2, 0.3]},
    "cold_start": {"user": True, "items": ["a", "b"]},
    "degraded": None,
    "memo": "timeline",
    "milliseconds": {"features": 1.0, "user_side": 2.0, "item_side": 3.0, "between": 4.0},
}


class Answers:
    """A service that answers everybody who gets to it."""

    refused = None
    served = "1"
    memo_bytes = 5

    def __init__(self) -> None:
        self.metrics, self.beside = Metrics("test"), dict[str, Any]()

    async def require_ready(self) -> None:
        pass

    async def rank(self, request: RankRequest) -> dict[str, Any]:
        return ANSWER

    async def rank_batch(self, batch: RankBatchRequest) -> list[dict[str, Any]]:
        return [ANSWER for _ in batch.requests]

    async def explain(self, request: RankRequest) -> dict[str, Any]:
        return ANSWER | {"history": {}}

    async def about(self) -> dict[str, Any]:
        return {"users": []}

    async def push(self, request: EventsRequest) -> dict[str, Any]:
        return {"added": {}}

    async def feedback(self, request: FeedbackRequest) -> dict[str, Any]:
        return {"accepted": len(request.feedback)}

    async def describe(self) -> ModelDescription:
        return ModelDescription("1", SCHEMA, {})


def write(path: Path, content: str) -> None:
    """As an editor does, at another moment than the file before."""
    path.write_text(content)
    path.chmod(0o600)
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(auth, "LOOK_SECONDS", 0.0)
    path = tmp_path / "tokens"
    write(path, f"# who asks\nshop {SHOP}\n\nreports {REPORTS}\n")
    return path


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_only_who_has_a_token_is_answered_and_health_is_told_to_all(tokens: Path) -> None:
    body = {"user_id": 1, "candidates": [1]}
    with TestClient(build_api(Answers(), tokens=Tokens(tokens))) as client:
        for token in (SHOP, REPORTS):
            assert client.post("/v1/rank", json=body, headers=bearer(token)).status_code == 200
            assert client.get("/v1/model", headers=bearer(token)).status_code == 200
        for headers in ({}, bearer("x" * 20), bearer(SHOP[:-1]), bearer(""), {"authorization": f"Basic {SHOP}"}):
            for method, path in (("POST", "/v1/rank"), ("POST", "/v1/events"), ("GET", "/v1/model")):
                answer = client.request(method, path, json=body, headers=headers)
                assert answer.status_code == 401, (headers, path)
                assert answer.json()["error"]["type"] == "unauthorized"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/healthz").status_code == 200
        assert client.get("/openapi.json").json()["components"]["securitySchemes"]


def test_a_stranger_is_refused_before_the_body_is_read(tokens: Path) -> None:
    with TestClient(build_api(Answers(), max_body_bytes=10, tokens=Tokens(tokens))) as client:
        assert client.post("/v1/rank", content=b"{" * 100).status_code == 401
        assert client.post("/v1/rank", content=b"{" * 100, headers=bearer(SHOP)).status_code == 413


def test_a_token_is_given_and_revoked_without_a_restart(tokens: Path) -> None:
    with TestClient(build_api(Answers(), tokens=Tokens(tokens))) as client:
        assert client.get("/v1/model", headers=bearer(SHOP)).status_code == 200
        write(tokens, f"other {'o' * 16}\nreports {REPORTS}\n")
        assert client.get("/v1/model", headers=bearer(SHOP)).status_code == 401
        assert client.get("/v1/model", headers=bearer("o" * 16)).status_code == 200
        tokens.unlink()  # nobody is let in
        gone = client.get("/v1/model", headers=bearer(REPORTS))
        assert gone.status_code == 503
        assert str(tokens) in gone.json()["error"]["message"]
        write(tokens, f"reports {REPORTS}\n")
        assert client.get("/v1/model", headers=bearer(REPORTS)).status_code == 200


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("shop short", 0o600, "line 1 is not a new name and a token of at least 16 letters"),
        (f"# none\n{SHOP}", 0o600, "line 2"),
        (f"shop {SHOP}\nshop {REPORTS}", 0o600, "line 2"),
        ("# nobody\n", 0o600, "names no token"),
        (f"shop {SHOP}", 0o644, "can be read by other users of this machine; chmod 600"),
    ],
)
def test_a_file_that_is_none_of_tokens_is_refused_by_name_without_showing_them(
    tmp_path: Path, content: str, mode: int, message: str
) -> None:
    path = tmp_path / "tokens"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(CorankError, match=message) as refused:
        read_tokens(path)
    assert str(path) in str(refused.value)
    assert SHOP not in str(refused.value)
    with pytest.raises(CorankError, match="cannot be read"):
        read_tokens(tmp_path / "none")
    with pytest.raises(CorankError, match=re.escape(str(path))):  # before a service starts
        Tokens(path)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "models.example"])
def test_an_endpoint_that_others_reach_needs_tokens(host: str, tokens: Path) -> None:
    with pytest.raises(ValueError, match="name a file of tokens in"):
        ServingConfig(host=host)
    assert ServingConfig(host=host, tokens=str(tokens)).own_token == SHOP


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"])
def test_an_endpoint_of_this_machine_alone_needs_none(host: str) -> None:
    assert ServingConfig(host=host).own_token is None


def test_the_client_sends_the_token_that_it_is_given_or_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CORANK_TOKEN", REPORTS)
    for token, sent in ((None, REPORTS), (SHOP, SHOP)):
        with RankingClient("http://127.0.0.1:1", token=token) as client:
            assert client._http.headers["authorization"] == f"Bearer {sent}"


def test_a_token_that_comes_too_often_is_told_so_and_others_are_answered(tokens: Path) -> None:
    allowed = Rate(0.3).allows  # three in ten seconds
    with TestClient(build_api(Answers(), tokens=Tokens(tokens, allowed))) as client:
        statuses = [client.get("/v1/model", headers=bearer(SHOP)).status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        answer = client.get("/v1/model", headers=bearer(SHOP))
        assert answer.json()["error"]["type"] == "too_often"
        assert "of shop" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
        assert client.get("/v1/model", headers=bearer(REPORTS)).status_code == 200
        assert client.get("/healthz").status_code == 200


def test_a_rate_of_less_than_one_in_ten_seconds_is_kept() -> None:
    rate = Rate(0.01)
    assert [rate.allows("a"), rate.allows("a"), rate.allows("b")] == [True, False, True]


def test_a_rate_without_tokens_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"requests_per_second: it is counted per token"):
        ServingConfig(requests_per_second=5)
