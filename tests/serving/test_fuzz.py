"""What is made up from the endpoint's own description, valid or not, is answered as the description says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from serving.api import build_api
from serving.ranker import Ranker
from serving.request_log import LogSettings
from serving.service import RankingService
from serving.settings import ServingSettings
from tests.serving.worlds import InProcess, body

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
TABLES = ("impressions", "requests", "feedback")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def mostly(valid: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 19).flatmap(lambda number: valid if number else JSON)


@pytest.fixture(scope="module")
def service(settings: ServingSettings, tmp_path_factory: pytest.TempPathFactory) -> RankingService:
    log = LogSettings(str(tmp_path_factory.mktemp("fuzz")), "day", seconds=600.0)
    return RankingService(replace(settings, log=log), InProcess(Ranker(settings)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def api(service: RankingService) -> FastAPI:
    return build_api(service)


def test_no_request_of_the_openapi_schema_is_a_server_error(api: FastAPI) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/rank", "/v1/rank:batch", "/v1/events", "/v1/feedback"}
    for operation in operations:

        @QUICK
        @given(case=operation.as_strategy())
        def answered(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=[not_a_server_error])

        answered()


@pytest.fixture(scope="module")
def client(api: FastAPI) -> Iterator[TestClient]:
    with TestClient(api, raise_server_exceptions=False) as client:
        yield client


IDS, NUMBERS = st.integers(-5, 12) | st.text(max_size=3), st.none() | st.floats(allow_nan=False, width=32)
TEXTS = st.lists(st.text(max_size=3), max_size=3)


@QUICK
@given(
    candidates=st.lists(
        mostly(IDS) | st.fixed_dictionaries({"item_id": mostly(IDS), "price": mostly(NUMBERS)}), min_size=1, max_size=4
    ),
    context=mostly(st.fixed_dictionaries({"device": IDS, "hour": NUMBERS, "modes": TEXTS})),
    user=mostly(st.fixed_dictionaries({}, optional={"tags": mostly(TEXTS)})),
    events=st.lists(st.fixed_dictionaries({"ts": st.integers(0, 10), "item_id": mostly(IDS)}), max_size=4),
    top_k=st.none() | st.integers(0, 9),
)
def test_an_answer_has_a_score_for_every_candidate_or_names_a_field(client: TestClient, **parts: Any) -> None:
    events = parts.pop("events")
    request = body(**parts, history={"clicks": events})
    answer = client.post("/v1/rank", content=json.dumps(request), headers={"content-type": "application/json"})
    assert answer.status_code in (200, 422), answer.text
    if answer.status_code == 422:
        assert answer.json()["error"]["field"]
        return
    content, count = answer.json(), len(request["candidates"])
    assert {len(scores) for scores in content["scores"].values()} == {count}
    assert len(content["ranking"]) == min(count, request["top_k"] or count)
    assert all(0 <= score <= 1 for scores in content["scores"].values() for score in scores)


def test_what_was_answered_can_be_logged(service: RankingService, client: TestClient) -> None:
    """Last of this file: all that came before."""
    label = {"request_id": "r", "item_id": 1, "label": "click"}
    assert client.post("/v1/feedback", json={"feedback": [label]}).status_code == 200
    assert service._log is not None
    service._log.close()
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("corank_log_rows_total")]
    assert all('outcome="written"' in line for line in lines)
    counts = {table: sum(float(line.split()[-1]) for line in lines if f'"{table}"' in line) for table in TABLES}
    assert min(counts.values()) > 0, counts
    assert counts["requests"] > 10
