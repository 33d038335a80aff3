"""Rankings over HTTP, in one process with a real store and a real model: answers, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from features.store.reader import OnlineReader
from serving.api import RankRequest, build_api, weights_of
from serving.ranker import Ranker
from serving.rows import build_row
from serving.service import RankingService
from serving.settings import ServingConfig, ServingSettings
from tests.serving.worlds import CONTEXT, NOW, InProcess, body, without_cost


def test_answer(client: TestClient, settings: ServingSettings) -> None:
    response = client.post("/v1/rank", json=body(candidates=[2, "1", 9, 2]))
    assert response.status_code == 200, response.text
    answer = response.json()
    scores = answer["scores"]
    assert answer["request_ts"] == NOW
    assert answer["tasks"] == ["click", "like"] == list(scores)
    assert answer["cold_start"] == {"user": False, "items": [9]}
    assert len(scores["click"]) == 4
    assert scores["click"][0] == pytest.approx(scores["click"][3], abs=1e-6)
    order = sorted(range(4), key=lambda index: -scores["click"][index])
    assert answer["ranking"] == [[2, "1", 9, 2][index] for index in order]
    assert client.post("/v1/rank", json=body(user_id="nobody")).json()["cold_start"]["user"]
    assert client.get("/healthz").json() == {"status": "ok"}
    model = client.get("/v1/model").json()
    assert model["model_version"] == answer["model_version"]
    assert model["metadata"] == {"metrics": {"auc": None}, "lineage": {}}
    assert [one["name"] for one in model["schema"]["features"]["context"]] == ["device", "hour", "modes"]


def test_a_batch_of_users_is_answered_as_each_request_alone_and_named_by_place_where_one_is_wrong(
    client: TestClient,
) -> None:
    requests = [body(candidates=[2, "1", 9]), body(user_id="8", candidates=[3]), body(tasks=["like"], top_k=1)]
    batch = client.post("/v1/rank:batch", json={"requests": requests})
    assert batch.status_code == 200, batch.text
    for answer, request in zip(batch.json()["answers"], requests, strict=True):
        alone = client.post("/v1/rank", json=request).json()
        assert {name: answer[name] for name in ("tasks", "ranking", "cold_start")} == {
            name: alone[name] for name in ("tasks", "ranking", "cold_start")
        }
        for task, scores in alone["scores"].items():
            np.testing.assert_allclose(answer["scores"][task], scores, atol=1e-5)
    wrong = client.post("/v1/rank:batch", json={"requests": [*requests, body(candidates=[1, 2, 3, 4, 5])]})
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "requests.3.candidates")
    wrong = client.post("/v1/rank:batch", json={"requests": [body(), body(tasks=["buy"])]})
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "requests.1.tasks.0")
    for bad, field in (([], "requests"), ([body()] * 65, "requests"), ([body(), {}], "requests.1.user_id")):
        refused = client.post("/v1/rank:batch", json={"requests": bad})
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, field)


def test_a_batch_is_admitted_as_a_whole(settings: ServingSettings) -> None:
    three = replace(settings, options=ServingConfig(max_ongoing_requests=2, max_queued_requests=1))
    service = RankingService(three, InProcess(Ranker(three)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        for size, status in ((3, 200), (4, 422), (3, 200)):
            answered = client.post("/v1/rank:batch", json={"requests": [body()] * size})
            assert answered.status_code == status, answered.text
        with service._admission("rank"):  # as while a request is worked on
            for size, status in ((2, 200), (3, 503)):
                answered = client.post("/v1/rank:batch", json={"requests": [body()] * size})
                assert answered.status_code == status, answered.text


def test_scores_of_the_tasks_asked_for_are_answered_alone(client: TestClient) -> None:
    answer, whole = (client.post("/v1/rank", json=body(**more)).json() for more in ({"tasks": ["like"]}, {}))
    assert answer["tasks"] == list(answer["scores"]) == ["like"]
    np.testing.assert_allclose(answer["scores"]["like"], whole["scores"]["like"], atol=1e-6)
    assert answer["ranking"] == whole["ranking"]


def test_merged_requests_score_alike(settings: ServingSettings) -> None:
    ranker, reader = Ranker(settings), OnlineReader(settings.store)
    rows = [
        build_row(reader, 0, user, items, CONTEXT, NOW).rows
        for user, items in (("7", ["1", "2"]), ("8", ["3"]), ("7", ["1", "9", "2", "3"]))
    ]
    merged = [one.scores for one in ranker.score([(settings.artifact, row) for row in rows])]
    assert [scores.shape for scores in merged] == [(2, 2), (1, 2), (4, 2)]
    for row, scores in zip(rows, merged, strict=True):
        np.testing.assert_allclose(ranker.score([(settings.artifact, row)])[0].scores, scores, atol=1e-5)


@pytest.mark.parametrize(
    ("request_body", "field"),
    [
        (body(candidates=[]), "candidates"),
        (body(candidates=[1, 2, 3, 4, 5]), "candidates"),
        (body(candidates=[1, 2.5]), "candidates.1"),
        (body(candidates=[True]), "candidates.0"),
        (body(candidates="1"), "candidates"),
        (body(user_id=None), "user_id"),
        ({"candidates": [1]}, "user_id"),
        (body(ts="now"), "ts"),
        (body(ts=-1), "ts"),
        (body(ts=1_767_571_200), "ts"),
        (body(more=1), "more"),
        (body(tasks=["click", "buy"]), "tasks.1"),
        (body(tasks=[]), "tasks"),
        (body(context={**CONTEXT, "x": 1}), "context.x"),
        (body(context={"device": "ios"}), "context.hour"),
    ],
)
def test_malformed_requests_name_the_field(client: TestClient, request_body: dict[str, Any], field: str) -> None:
    response = client.post("/v1/rank", json=request_body)
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["type"], error["field"]) == ("invalid_request", field)
    assert error["message"]


def test_context_that_is_missing_can_be_unknown(settings: ServingSettings) -> None:
    lenient = replace(settings, options=ServingConfig(max_candidates=4, missing_context="unknown"))
    service = RankingService(lenient, InProcess(Ranker(lenient)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        unknown = client.post("/v1/rank", json=body(context=dict.fromkeys(CONTEXT)))
        empty = client.post("/v1/rank", json=body(context={}))
        assert without_cost(empty.json()) == without_cost(unknown.json())
        assert client.post("/v1/rank", json=body(context={"other": 1})).status_code == 422


def test_other_errors_are_json_too(client: TestClient) -> None:
    broken = client.post("/v1/rank", content="{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["field"]) == (422, "body")
    assert client.get("/nope").json()["error"]["type"] == "not_found"
    assert client.get("/v1/rank").json()["error"]["type"] == "method_not_allowed"


DEEP = "[" * 100_000 + "]" * 100_000


STRANGE_BODIES = {
    "NaN": ('{"user_id": 7, "candidates": [1], "context": {"device": NaN}}', 422, "context.device"),
    "infinite": ('{"user_id": 7, "candidates": [1], "context": {"modes": ["a", 1e400]}}', 422, "context.modes.1"),
    "infinite id": ('{"user_id": 7, "candidates": [1, -Infinity]}', 422, "candidates.1"),
    "invalid UTF-8": (b'{"user_id": "\xff", "candidates": [1]}', 422, "body"),
    "UTF-16": ('{"user_id": 7, "candidates": [1]}'.encode("utf-16"), 422, "body"),
    "endless digits": (f'{{"user_id": {"9" * 100_000}, "candidates": [1]}}', 422, "body"),
    "deep": (f'{{"user_id": 7, "candidates": {DEEP}}}', 422, "body"),
    "surrogate in a key": ('{"user_id": 7, "candidates": [1], "context": {"\\ud800": "x"}}', 422, "context.\\ud800"),
    "surrogate in a value": ('{"user_id": 7, "candidates": ["a\\uDFFF"]}', 422, "candidates.0"),
    "large": (b'{"user_id": "' + b"x" * 2_000_000 + b'"}', 413, "body"),
    "no object": ("[1]", 422, "body"),
}


@pytest.mark.parametrize("path", ["/v1/rank", "/v1/rank:batch", "/v1/events"])
@pytest.mark.parametrize("strange", STRANGE_BODIES.values(), ids=STRANGE_BODIES)
def test_bodies_that_are_no_finite_unicode_json_of_some_length_are_refused_by_field(
    settings: ServingSettings, strange: tuple[str | bytes, int, str], path: str
) -> None:
    content, status, field = strange
    service = RankingService(settings, InProcess(Ranker(settings)))  # type: ignore[arg-type]
    with TestClient(build_api(service, max_body_bytes=1_000_000), raise_server_exceptions=False) as client:
        # in parts: no header says how long it is
        encoded = content if isinstance(content, bytes) else content.encode()
        response = client.post(path, content=iter([encoded]), headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert response.json()["error"]["field"] == field
    assert response.json()["error"]["type"] == ("too_large" if status == 413 else "invalid_request")


def test_whole_characters_beyond_the_first_plane_are_text(client: TestClient) -> None:
    content, header = json.dumps(body(user_id="\U0001f600")), {"content-type": "application/json"}
    assert client.post("/v1/rank", content=content, headers=header).status_code == 200
    assert "content-type" in client.post("/v1/rank", content=content).json()["error"]["message"]


def test_a_service_asks_for_the_tokens_that_its_config_names(settings: ServingSettings, tmp_path: Path) -> None:
    path, token = tmp_path / "tokens", "t" * 16
    path.touch(0o600)
    path.write_text(f"shop {token}")
    private = replace(settings, options=settings.options.model_copy(update={"tokens": str(path)}))
    service = RankingService(private, InProcess(Ranker(private)))  # type: ignore[arg-type]
    with TestClient(service.__serve_build_asgi_app__()) as client:
        assert client.post("/v1/rank", json=body()).status_code == 401
        answered = client.post("/v1/rank", json=body(), headers={"authorization": f"Bearer {token}"})
        assert answered.status_code == 200


def test_a_ranking_is_by_weights_of_the_request_or_the_config_and_as_long_as_asked_for(
    settings: ServingSettings,
) -> None:
    likes = replace(settings, options=ServingConfig(max_candidates=4, weights={"like": 1.0}))
    service = RankingService(likes, InProcess(Ranker(likes)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:

        def asked(**more: Any) -> dict[str, Any]:
            response = client.post("/v1/rank", json=body(**more))
            assert response.status_code == 200, response.text
            return dict(response.json())

        answer = asked()
        scores, items = answer["scores"], body()["candidates"]
        by = {task: [items[place] for place in np.argsort(-np.array(scores[task]), kind="stable")] for task in scores}
        assert answer["ranking"] == by["like"]
        assert asked(weights={"click": 1.0})["ranking"] == by["click"]
        assert asked(weights={"click": -1.0})["ranking"] == by["click"][::-1]
        assert asked(weights={"click": 1.0}, top_k=1)["ranking"] == by["click"][:1]
        assert asked(top_k=1)["scores"] == scores
        assert set(answer["milliseconds"]) == {"features", "user_side", "item_side", "between"}
        assert all(value >= 0 for value in answer["milliseconds"].values())
        # of another config than the model's: what the model has of it counts
        assert weights_of(RankRequest(**body()), ["click", "like"], {"buy": 2.0}).tolist() == [1.0, 0.0]
        assert weights_of(RankRequest(**body()), ["click", "like"], {"buy": 2.0, "like": 3.0}).tolist() == [0.0, 3.0]
        refused = client.post("/v1/rank", json=body(weights={"buy": 1.0}))
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, "weights.buy")
        for wrong in ({"top_k": 0}, {"weights": {"click": "x"}}):
            assert client.post("/v1/rank", json=body(**wrong)).status_code == 422
