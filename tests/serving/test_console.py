"""The console: a page of its own, and what it asks the endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient

from serving.api import PAGE, build_api
from serving.ranker import Ranker
from serving.service import RankingService
from serving.settings import ServingConfig, ServingSettings
from tests.browser import opened
from tests.servers import served
from tests.serving.worlds import InProcess, body


@pytest.fixture(scope="module")
def service(settings: ServingSettings) -> RankingService:
    lenient = replace(settings, options=ServingConfig(missing_context="unknown"))
    return RankingService(lenient, InProcess(Ranker(lenient)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def address(service: RankingService) -> Iterator[str]:
    with served(build_api(service)) as address:
        yield address


def test_an_explained_request_is_the_answer_with_its_history_and_what_each_candidate_attends_to(
    service: RankingService,
) -> None:
    with TestClient(build_api(service)) as client:
        answer = client.post("/v1/rank", json=body()).json()
        explained = client.post("/v1/explain", json=body()).json()
        assert explained["scores"] == answer["scores"]
        assert explained["ranking"] == answer["ranking"]
        (history,) = explained["history"].values()
        assert history["ts"] == list(range(105, 110))
        # items that no table names are told by their codes
        assert all(re.fullmatch("#[0-9a-f]{16}", text) for text in history["fields"]["item"])
        assert [len(weights) for weights in history["attention"]] == [5, 5]
        assert [sum(weights) for weights in history["attention"]] == pytest.approx([1.0, 1.0])
        named = {"clicks": [{"ts": 111, "item_id": 3}]}
        with_event = client.post("/v1/explain", json=body(recent=named)).json()["history"]["clicks"]
        assert with_event["fields"]["item"][-1] == "3"
        assert with_event["items"][-1] == "3"
        nobody = client.post("/v1/explain", json=body(user_id="nobody")).json()["history"]["clicks"]
        assert nobody == {"ts": [], "fields": {"item": []}, "items": [], "attention": [[], []]}
        many = client.post("/v1/explain", json=body(candidates=list(range(201))))
        assert many.status_code == 422
        assert many.json()["error"]["field"] == "candidates"


def test_the_console_proposes_whom_and_what_to_ask(service: RankingService) -> None:
    with TestClient(build_api(service)) as client:
        about = client.get("/v1/console").json()
    assert about["users"] == ["7"]
    assert about["popular"] == ["1", "2", "3"]
    assert about["ts"] == 500  # of a log from long ago: its own time
    assert [column["name"] for column in about["context"]] == ["device", "hour", "modes"]
    assert about["sequences"] == [{"name": "clicks", "columns": [{"name": "item_id", "kind": "id", "values": None}]}]


def test_the_page_loads_nothing_from_anywhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", text)


@pytest.mark.slow
def test_the_page_ranks_and_shows_attention_in_a_browser_without_a_script_error(address: str, chromium: str) -> None:
    page, said = opened(chromium, f"{address}/console?rank")
    assert [line for line in said if "favicon" not in line] == []
    rows = re.search(r'<tbody id="rows">(.*?)</tbody>', page, re.DOTALL)
    assert rows is not None
    assert rows[1].count("<tr") == 3
    assert "clicks, 5 events, newest first" in page
    assert page.count('class="bar"') == 5
    assert re.search(r'id="served"[^>]*>model [0-9a-f]+ · tasks click, like<', page)
    assert re.search(r'id="problem"[^>]*></span>', page)
