"""Request rows, the HTTP interface and the scoring path, in one process with a real store and a real model."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import torch
from deltalake import write_deltalake
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import RayServeException
from starlette.responses import PlainTextResponse

import serving.service
from features.batch import collate
from features.delta.table import Table
from features.encoding import hash_id
from features.errors import CorankError, without_trace
from features.sample_table import concatenate, feature_column, sample_schema
from features.schema import EventField, Feature, Schema, Sequence, Task
from features.store.online import FeatureStoreSettings, apply, materialize, open_store, sole_writer
from features.store.reader import History, OnlineReader
from models.artifact import load_artifact, save_artifact
from models.registry import MODELS, build_model
from serving.api import RankRequest, build_api, weights_of
from serving.client import NoEndpointError, RankingClient
from serving.deploy import start
from serving.memo import MemoisedModel
from serving.ports import endpoint_url
from serving.proxy import ADMITTED, JsonErrors, middlewares
from serving.ranker import Ranker
from serving.rows import InvalidRequestError, build_row, encode_context, serving_schema, visible
from serving.service import RankingService
from serving.settings import ServingConfig, ServingSettings
from tests.servers import free_port, http_server

SCHEMA = Schema(
    features=(
        Feature(name="user_id", side="user"),
        Feature(name="tags", side="user", multi=True),
        Feature(name="device", side="context"),
        Feature(name="hour", side="context", kind="number"),
        Feature(name="modes", side="context", multi=True),
        Feature(name="item_id", side="item"),
        Feature(name="price", side="item", kind="number"),
    ),
    sequences=(
        Sequence(name="clicks", events="events", length=5, fields=(EventField(name="item", column="item_id"),)),
    ),
    tasks=(Task(name="click"), Task(name="like")),
)
CONTEXT = {"device": "ios", "hour": 3, "modes": ["dark", 7]}
NOW = 1_000


def without_cost(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without how it came about."""
    return {name: value for name, value in answer.items() if name not in ("memo", "milliseconds")}


class InProcess:
    """A deployment handle to an object in this process."""

    def __init__(self, target: Ranker) -> None:
        self.describe = Remote(target.describe)
        self.forget = Remote(target.forget)
        self.rank = Remote(lambda request: target.score([request])[0])


class Remote:
    def __init__(self, function: Any) -> None:
        self._function = function

    async def remote(self, *arguments: Any) -> Any:
        await asyncio.sleep(0)
        result = self._function(*arguments)
        return await result if asyncio.iscoroutine(result) else result


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServingSettings:
    root = tmp_path_factory.mktemp("serving")
    users = {"user_id": ["7", "8"], "tags": [["a", "b"], ["c"]], "updated_at": [0, 2 * NOW]}
    items = {"item_id": [1, 2, 3], "price": [1.0, None, 3.0], "updated_at": [0, 0, 2 * NOW]}
    events = list(range(100, 110))
    state = {"user_id": ["7"], "ts": [500], "clicks__ts": [events], "clicks__item": [[hash_id(one) for one in events]]}
    state["clicks__event_id"] = state["clicks__item"]
    for name, content in (("users", users), ("items", items), ("state", state)):
        write_deltalake(str(root / name), pl.DataFrame(content).to_arrow())
    store = FeatureStoreSettings(
        project="test",
        registry=str(root / "registry.db"),
        schema=SCHEMA,
        users=Table("users", str(root / "users")),
        items=Table("items", str(root / "items")),
        state_uri=str(root / "state"),
        sqlite_path=str(root / "online.db"),
    )
    apply(store)
    materialize(store, 0, 3 * NOW)
    torch.manual_seed(0)
    model = build_model(SCHEMA, "ui-mixformer", "tiny", id_dropout=0.0)
    save_artifact(root / "model", model, {"metrics": {"auc": float("nan")}, "lineage": {}, "selfcheck": {}})
    return ServingSettings(str(root / "model"), store, ServingConfig(max_candidates=4), log_delay=2, ranker_threads=1)


@pytest.fixture(scope="module")
def client(settings: ServingSettings) -> Iterator[TestClient]:
    service = RankingService(settings, InProcess(Ranker(settings)))  # type: ignore[arg-type]
    with TestClient(build_api(service), raise_server_exceptions=False) as client:
        yield client


def body(**changes: Any) -> dict[str, Any]:
    return {"user_id": "7", "candidates": [1, "2"], "context": CONTEXT, "ts": NOW} | changes


def test_an_event_of_a_table_without_event_ids_is_pushed_with_all_its_columns(
    settings: ServingSettings, tmp_path: Path
) -> None:
    rows = pl.DataFrame({"user_id": [9], "item_id": [1], "ts": [NOW], "shop": ["a"]})
    write_deltalake(str(tmp_path / "events"), rows.to_arrow())
    table = Table("events", str(tmp_path / "events"), grain="day", makes=("event_id",))
    plain = replace(settings, store=replace(settings.store, events={"events": table}))
    service = RankingService(plain, InProcess(Ranker(plain)))  # type: ignore[arg-type]
    event = {"user_id": "77", "item_id": 1, "ts": NOW - 5, "shop": None}
    with TestClient(build_api(service)) as client:
        for _ in range(2):
            added = client.post("/v1/events", json={"events": [event, event | {"shop": "b"}]}).json()
        assert added == {"added": {"clicks": 0}}
        answers = {
            "event_id": client.post("/v1/events", json={"events": [event | {"event_id": "e1"}]}),
            "shop": client.post("/v1/events", json={"events": [{k: v for k, v in event.items() if k != "shop"}]}),
            "item_id": client.post("/v1/events", json={"events": [event | {"item_id": "one"}]}),
        }
    for column, answer in answers.items():
        assert (answer.status_code, answer.json()["error"]["field"]) == (422, f"events.0.{column}"), answer.text
    assert "is Int64 in the table" in answers["item_id"].json()["error"]["message"]


def test_row_has_the_layout_of_the_sample_table(settings: ServingSettings) -> None:
    row = build_row(OnlineReader(settings.store), 2, "7", ["2", "9", "1"], CONTEXT, NOW)
    assert row.rows.schema == serving_schema(SCHEMA)
    full = {field.name: field.type for field in sample_schema(SCHEMA)}
    assert full["clicks__ts"] == row.rows.schema.field("clicks__ts").type
    assert row.user_known
    assert row.item_known == [True, False, True]
    (values,) = row.rows.to_pylist()
    (request,) = values["requests"]
    assert values["clicks__ts"] == [105, 106, 107, 108, 109]
    assert request["end__clicks"] == 5
    assert values["clicks__item"] == [hash_id(one) for one in values["clicks__ts"]]
    assert (values["user_id"], request["ts"], request["user_known"]) == ("7", NOW, True)
    assert request["feature__user_id"] == hash_id(7)
    assert request["feature__tags"] == [hash_id("a"), hash_id("b")]
    assert request["feature__modes"] == [hash_id("dark"), hash_id(7)]
    assert request["feature__hour"] == 3.0
    assert request["candidates"] == [
        {"item_id": "2", "item_known": True, "feature__item_id": hash_id(2), "feature__price": None},
        {"item_id": "9", "item_known": False, "feature__item_id": 0, "feature__price": None},
        {"item_id": "1", "item_known": True, "feature__item_id": hash_id(1), "feature__price": 1.0},
    ]
    batch = collate(concatenate([row.rows, row.rows]), SCHEMA)
    assert (batch.requests, batch.candidates) == (2, 6)


def test_only_events_before_the_delay_are_visible() -> None:
    history = History(np.array([1, 2, 2, 3, 4]), {"item": np.arange(5)})
    assert visible(history, 3, 10).fields["item"].tolist() == [0, 1, 2]  # a tie is not visible
    assert visible(history, 9, 2).ts.tolist() == [3, 4]
    assert visible(history, 1, 2).ts.tolist() == []


def test_unknown_by_the_time_of_the_request_reads_as_unknown(settings: ServingSettings) -> None:
    row = build_row(OnlineReader(settings.store), 0, "8", ["3"], CONTEXT, 2 * NOW - 1)
    assert not row.user_known
    assert row.item_known == [False]
    (request,) = row.rows.to_pylist()[0]["requests"]
    assert request["feature__user_id"] == 0
    assert request["feature__tags"] == []
    assert build_row(OnlineReader(settings.store), 0, "8", ["3"], CONTEXT, 2 * NOW).item_known == [True]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"device": ["ios"]}, "context.device"),
        ({"hour": "3"}, "context.hour"),
        ({"hour": 1e300}, "context.hour"),
        ({"modes": "dark"}, "context.modes"),
        ({"modes": ["dark", {}]}, "context.modes.1"),
        ({"other": 1}, "context.other"),
    ],
)
def test_context_of_the_wrong_kind_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        encode_context(SCHEMA, CONTEXT | change)
    assert caught.value.field == field


def test_context_codes() -> None:
    codes = encode_context(SCHEMA, {"device": 42, "hour": None, "modes": None})
    names = [feature_column(feature) for feature in SCHEMA.side("context")]
    assert codes == dict(zip(names, [hash_id("42"), None, []], strict=True))
    as_columns = encode_context(SCHEMA, {"device": True, "hour": True, "modes": ["dark", None]})
    assert as_columns == dict(zip(names, [hash_id("true"), 1.0, [hash_id("dark")]], strict=True))


@pytest.mark.parametrize("order", [1, -1])
def test_a_context_column_may_be_of_several_kinds_at_once(order: int) -> None:
    features = (
        Feature(name="hour", side="context", kind="number"),
        Feature(name="hour_id", column="hour", side="context"),
        Feature(name="part", column="hour", side="context", kind="category", vocabulary=("3", "true")),
    )
    schema = SCHEMA.model_copy(update={"features": features[::order]})
    for value, codes in ((3, [3.0, hash_id("3"), 1]), (True, [1.0, hash_id("true"), 2])):
        found = encode_context(schema, {"hour": value})
        assert [found[feature_column(feature)] for feature in features] == codes


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


def new_events(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"events": [{"event_id": "e1", "user_id": 9, "item_id": 1, "ts": NOW - 5} | row for row in rows], **more}


def test_the_next_request_sees_pushed_events(client: TestClient, settings: ServingSettings) -> None:
    def seen() -> list[int]:
        (row,) = build_row(OnlineReader(settings.store), 2, "9", ["1"], CONTEXT, NOW).rows.to_pylist()
        return list(row["clicks__ts"])

    request = body(user_id=9)
    before = client.post("/v1/rank", json=request).json()
    assert seen() == []
    pushed = new_events({}, {"event_id": 2, "item_id": "2", "ts": NOW - 4}, {"event_id": 3, "ts": NOW - 2})
    assert client.post("/v1/events", json=pushed).json() == {"added": {"clicks": 3}}
    assert seen() == [NOW - 5, NOW - 4]  # the third is within the delay
    after = client.post("/v1/rank", json=request).json()
    assert after["scores"] != before["scores"]
    assert client.post("/v1/events", json=pushed).json() == {"added": {"clicks": 0}}
    assert without_cost(client.post("/v1/rank", json=request).json()) == without_cost(after)


def test_ids_of_several_kinds_in_one_body_are_coded_one_by_one(client: TestClient, settings: ServingSettings) -> None:
    rows = [{"event_id": f"m{index}", "user_id": "many", "item_id": item} for index, item in enumerate((2, True))]
    pushed = new_events(*[row | {"ts": NOW - 9 + index} for index, row in enumerate(rows)])
    assert client.post("/v1/events", json=pushed).json() == {"added": {"clicks": 2}}
    (row,) = build_row(OnlineReader(settings.store), 2, "many", ["1"], CONTEXT, NOW).rows.to_pylist()
    assert row["clicks__item"] == [hash_id("2"), hash_id("true")]


@pytest.mark.parametrize(
    ("request_body", "field"),
    [
        ({"events": []}, "events"),
        ({}, "events"),
        (new_events({"user_id": None}), "events.0.user_id"),
        (new_events({}, {"ts": "now"}), "events.1.ts"),
        (new_events({"ts": 1_767_571_200}), "events.0.ts"),
        (new_events({"item_id": [1]}), "events.0.item_id"),
        (new_events({}, {}, {}, {"item_id": 2.5}, {}), "events.3.item_id"),
        (new_events({}, {"user_id": -1}), "events.1.user_id"),
        (new_events({}, {}, {"ts": NOW + 2**55}), "events.2.ts"),
        (new_events({"user_id": "\ud800"}), "events.0.user_id"),
        (new_events({"ts": 2**61}), "events.0.ts"),
        (new_events({"item_id": 2**70}), "events.0.item_id"),
        (new_events({}, table="views"), "table"),
        ({"events": [*new_events({})["events"], {"event_id": 1, "user_id": 9, "ts": NOW}]}, "events.1.item_id"),
    ],
)
def test_malformed_events_name_the_field(client: TestClient, request_body: dict[str, Any], field: str) -> None:
    # json.dumps spells what UTF-8 cannot hold as \u escapes
    response = client.post("/v1/events", content=json.dumps(request_body), headers={"content-type": "application/json"})
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert (error["type"], error["field"]) == ("invalid_request", field)
    assert error["message"]


TWO_TABLES = SCHEMA.model_copy(
    update={
        "sequences": (
            *SCHEMA.sequences,
            Sequence(
                name="views",
                events="views",
                where="action = 'view' AND seconds > 1",
                fields=(EventField(name="seconds", kind="number"),),
            ),
        )
    }
)


def test_of_several_event_tables_one_is_named_and_wrong_types_are_told_by_place(
    settings: ServingSettings, tmp_path: Path
) -> None:
    store = replace(
        settings.store, schema=TWO_TABLES, registry=str(tmp_path / "r.db"), sqlite_path=str(tmp_path / "o.db")
    )
    apply(store)
    service = RankingService(replace(settings, store=store), InProcess(Ranker(settings)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:

        def told(table: str | None, *changes: dict[str, Any]) -> tuple[str, str]:
            rows = [{"action": "view", "seconds": 2, **change} for change in changes]
            response = client.post("/v1/events", json=new_events(*rows, table=table))
            assert response.status_code == 422, response.text
            return response.json()["error"]["field"], response.json()["error"]["message"]

        assert told(None, {}) == (
            "table",
            "push: name the table that the events belong to; tables of sequences are ['events', 'views']",
        )
        assert told("views", {}, {"seconds": "long"}) == (
            "events.1.seconds",
            "push to views: seconds is a number, but has type String",
        )
        assert told("views", {}, {}, {"seconds": 1e300})[0] == "events.2.seconds"
        field, message = told("views", {"action": 7}, {"action": 8})
        assert field == "events.0.action"
        assert message == (
            "push to views: sequence views selects events by action, seconds: the events have the types action Int64, "
            "seconds Int64; send them as the log has them"
        )
        pushed = client.post("/v1/events", json=new_events({"action": "view", "seconds": None}, table="views"))
        assert pushed.json() == {"added": {"views": 0}}


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


@pytest.mark.parametrize("path", ["/v1/rank", "/v1/events"])
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


def test_strange_columns_of_events_are_refused(client: TestClient) -> None:
    for name, value in (("\ud800", 1), ("other", float("nan")), ("other", float("inf"))):
        content = json.dumps(new_events({name: value}))
        response = client.post("/v1/events", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 422, response.text
        assert response.json()["error"]["field"].startswith("events.0.")


def in_a_task(cause: Exception) -> RayTaskError:
    return RayTaskError("rank", f"Traceback\n{cause!r}", cause, "ray::Ranker", 1, "127.0.0.1").as_instanceof_cause()


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (ActorDiedError(), 503, "the model does not answer"),
        (ActorUnavailableError("10.0.0.1", b"1" * 16), 503, "the model does not answer"),
        (RayServeException("10.0.0.1"), 503, "the model does not answer"),
        (in_a_task(ActorDiedError()), 503, "the model does not answer"),
        (
            in_a_task(CorankError("model x: weights are damaged\ntrain again")),
            503,
            "model x: weights are damaged\ntrain",
        ),
        (in_a_task(ValueError("one\ntwo")), 500, "ValueError: one\ntwo"),
    ],
    ids=["dead", "unavailable", "serve", "dead in a task", "says what to do", "unforeseen"],
)
def test_a_ranker_that_fails_is_told_without_words_of_ray(
    settings: ServingSettings, failure: Exception, status: int, message: str
) -> None:
    def fail(_: Any) -> Any:
        raise failure

    handle = InProcess(Ranker(settings))
    handle.rank = Remote(fail)
    service = RankingService(settings, handle)  # type: ignore[arg-type]
    with TestClient(build_api(service), raise_server_exceptions=False) as client:
        response = client.post("/v1/rank", json=body())
    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(message)
    assert not any(word in response.text for word in ("ray::", "Traceback", "10.0.0.1", "actor"))


def test_while_no_ranker_is_there_nobody_waits_for_one(settings: ServingSettings) -> None:
    """Ray lets requests wait for the next replica."""
    handle = InProcess(Ranker(settings))
    describe, rank, there = handle.describe, handle.rank, threading.Event()

    class Waiting:
        async def remote(self, artifact: str) -> Any:
            while not there.is_set():
                await asyncio.sleep(0.01)
            return await describe.remote(artifact)

    def die(_: Any) -> Any:
        handle.describe = Waiting()  # type: ignore[assignment]
        handle.rank = rank
        raise ActorDiedError()

    service = RankingService(settings, handle)  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        assert client.post("/v1/rank", json=body()).status_code == 200
        handle.rank = Remote(die)
        for _ in range(3):
            assert client.post("/v1/rank", json=body()).status_code == 503
        assert client.get("/healthz").status_code == 503
        there.set()
        until = time.monotonic() + 5
        while client.post("/v1/rank", json=body()).status_code != 200:
            assert time.monotonic() < until


@pytest.mark.parametrize("answer", ["none", "text"])
def test_the_proxy_answers_in_json_for_a_replica_that_is_gone(answer: str) -> None:
    async def proxied(scope: Any, receive: Any, send: Any) -> None:
        if answer == "text":
            await PlainTextResponse("Deployment(name='RankingService') is unavailable", 503)(scope, receive, send)

    response = TestClient(JsonErrors(proxied)).get("/")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["type"] == "unavailable"
    assert "Deployment" not in response.text


def test_the_proxy_turns_away_what_the_service_would_not_admit_at_once_and_by_path(settings: ServingSettings) -> None:
    """Without asking the service, which may be busy; what is asked seldom is never turned away."""
    options = settings.options.model_copy(
        update={"max_ongoing_requests": 2, "max_queued_requests": 1, "service_replicas": 2}
    )
    service = RankingService(replace(settings, options=options), InProcess(Ranker(settings)))  # type: ignore[arg-type]
    healthz = service.__serve_build_asgi_app__()

    async def burst() -> dict[str, list[httpx.Response]]:
        go_on, reached = asyncio.Event(), Counter[str]()

        async def application(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"].endswith("/healthz"):
                await healthz({**scope, "path": "/healthz"}, receive, send)
                return
            reached[scope["path"]] += 1
            await go_on.wait()
            await PlainTextResponse("ok")(scope, receive, send)

        proxy = httpx.ASGITransport(application)
        for middleware in middlewares():
            proxy.app = middleware.cls(proxy.app)
        answers = {}
        async with httpx.AsyncClient(transport=proxy, base_url="http://proxy") as client:
            assert (await client.get("/beside/healthz")).status_code == 200
            for path in ("/beside/v1/rank", "/beside/v1/events", "/beside/v1/model", "/v1/rank"):
                asked = [asyncio.ensure_future(client.post(path)) for _ in range(10)]
                await asyncio.wait(asked, timeout=0.3)
                early = [one.result() for one in asked if one.done()]
                assert len(early) + reached[path] == 10
                go_on.set()
                late = await asyncio.gather(*(one for one in asked if not one.done()))
                again = await client.post(path)  # there is room again
                assert {one.status_code for one in [again, *late]} == {200}
                go_on.clear()
                answers[path] = early
        return answers

    turned_away = asyncio.run(burst())
    assert [len(early) for early in turned_away.values()] == [4, 4, 0, 0]
    for response in turned_away["/beside/v1/rank"]:
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["type"] == "overloaded"


def test_while_no_replica_is_there_one_request_alone_waits_for_one() -> None:
    async def kill() -> None:
        there, died = asyncio.Event(), False

        async def application(scope: Any, receive: Any, send: Any) -> None:
            nonlocal died
            if died:
                await there.wait()
            if scope["path"] == "/v1/events" or died:
                await PlainTextResponse("ok", headers={ADMITTED: "10"})(scope, receive, send)
            died = died or scope["path"] == "/v1/rank"  # without an answer

        proxy = httpx.ASGITransport(application)
        for middleware in middlewares():
            proxy.app = middleware.cls(proxy.app)
        async with httpx.AsyncClient(transport=proxy, base_url="http://proxy") as client:
            await client.post("/v1/events")  # tells the proxy how many are admitted
            assert (await client.post("/v1/rank")).status_code == 503
            waiting = asyncio.ensure_future(client.post("/v1/rank"))
            await asyncio.sleep(0.1)
            turned_away = await client.post("/v1/rank")
            assert (turned_away.status_code, turned_away.json()["error"]["type"]) == (503, "unavailable")
            there.set()
            assert (await waiting).status_code == 200
            assert {one.status_code for one in await asyncio.gather(*(client.post("/v1/rank") for _ in range(5)))} == {
                200
            }

    asyncio.run(kill())


def test_the_error_in_a_text_with_traces_is_its_last_one_with_all_its_lines() -> None:
    def load() -> None:
        try:
            raise KeyError("schema_version")
        except KeyError:
            raise CorankError("model x: model.yaml is damaged\nmodel y: too") from None

    with pytest.raises(CorankError) as caught:
        load()
    trace = "".join(traceback.format_exception(caught.value))
    assert without_trace(f"The deployment failed.\n\x1b[36mray::Replica\x1b[39m\n{trace}") == str(caught.value)
    assert without_trace("ValueError: a\nb") == "ValueError: a\nb"


def test_overload_is_answered_at_once(settings: ServingSettings) -> None:
    none = {"max_ongoing_requests": 0, "max_queued_requests": 0}  # a config has at least one
    full = replace(settings, options=settings.options.model_copy(update=none))
    service = RankingService(full, InProcess(Ranker(full)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        response = client.post("/v1/rank", json=body())
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "overloaded"


def test_a_store_that_does_not_answer_is_named_and_may_be_asked_again(settings: ServingSettings) -> None:
    gone = replace(settings, store=replace(settings.store, online="redis", redis=f"127.0.0.1:{free_port()}"))
    service = RankingService(gone, InProcess(Ranker(gone)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        for path, request in (("/v1/rank", body()), ("/v1/events", new_events({}))):
            response = client.post(path, json=request)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert response.json()["error"]["type"] == "unavailable"
            assert gone.store.redis in response.json()["error"]["message"]


def test_a_service_whose_online_store_is_lost_is_not_healthy(settings: ServingSettings, tmp_path: Path) -> None:
    lost = replace(settings, store=replace(settings.store, sqlite_path=str(tmp_path / "online.db")))
    service = RankingService(lost, InProcess(Ranker(lost)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        response = client.get("/healthz")
    assert response.status_code == 503
    assert lost.store.sqlite_path in response.json()["error"]["message"]


def test_a_service_whose_online_store_is_lost_while_it_answers_is_not_ready(
    settings: ServingSettings, tmp_path: Path
) -> None:
    path = tmp_path / "online.db"
    shutil.copy(settings.store.sqlite_path, path)
    own = replace(settings, store=replace(settings.store, sqlite_path=str(path)))
    service = RankingService(own, InProcess(Ranker(own)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        assert client.get("/readyz").status_code == 200
        path.write_bytes(b"no database" * 1_000)
        response = client.get("/readyz")
        assert (response.status_code, response.json()["error"]["type"]) == (503, "not_ready")
        assert str(path) in response.json()["error"]["message"]


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


def test_a_push_that_waits_for_another_writer_holds_up_no_ranking(settings: ServingSettings) -> None:
    one_each = replace(settings, options=ServingConfig(max_ongoing_requests=1, max_queued_requests=0))
    service = RankingService(one_each, InProcess(Ranker(one_each)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client, ThreadPoolExecutor(2) as pool:
        with sole_writer(open_store(settings.store), pl.Series(["waiting"])):
            pushed = pool.submit(client.post, "/v1/events", json=new_events({"user_id": "waiting"}))
            with pytest.raises(TimeoutError):
                pushed.result(timeout=0.5)
            ranked = pool.submit(client.post, "/v1/rank", json=body())
            assert ranked.result(timeout=10).status_code == 200
            assert client.post("/v1/events", json=new_events({})).json()["error"]["type"] == "overloaded"
            assert not pushed.done()
        assert pushed.result(timeout=10).json() == {"added": {"clicks": 1}}


def test_a_model_that_does_not_answer_is_not_ready(settings: ServingSettings, tmp_path: Path) -> None:
    empty = replace(settings, store=replace(settings.store, registry=str(tmp_path / "registry.db")))
    service = RankingService(empty, InProcess(Ranker(empty)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        response, ranked = client.get("/healthz"), client.post("/v1/rank", json=body())
    assert (response.status_code, ranked.status_code) == (503, 503)
    assert response.json()["error"]["type"] == "not_ready"
    assert ranked.json()["error"]["type"] == "unavailable"
    assert "Run the pipeline first" in response.json()["error"]["message"]
    assert "Run the pipeline first" in ranked.json()["error"]["message"]


def test_client_and_start_explain_themselves(settings: ServingSettings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with RankingClient(f"http://127.0.0.1:{port}") as client, pytest.raises(CorankError, match="corank serve"):
            client.healthz()
        taken.listen()
        with pytest.raises(CorankError, match=f"cannot listen on 127.0.0.1:{port}"):
            start(settings, port=port)


def own_address() -> str:
    """This machine's address of the network, as others reach it; on a machine without any, loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


OWN_ADDRESS = own_address()


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:{}"),
        ("0.0.0.0", "http://127.0.0.1:{}"),
        ("::1", "http://[::1]:{}"),
        ("::", "http://[::1]:{}"),
        ("localhost", "http://localhost:{}"),
        (OWN_ADDRESS, f"http://{OWN_ADDRESS}:{{}}"),
    ],
)
def test_this_machines_own_endpoint_is_asked_without_a_proxy(proxies: None, host: str, url: str) -> None:
    with http_server(host, '{"status": "ok"}') as (asked, port):
        assert endpoint_url(host, port) == url.format(port)
        with RankingClient(endpoint_url(host, port)) as client:
            assert client.healthz() == {"status": "ok"}
    assert asked == ["/healthz"]


def test_an_address_of_ipv6_may_be_written_as_in_a_url() -> None:
    assert ServingConfig(host="[::1]").host == "::1"


def test_other_machines_are_asked_through_the_proxy(monkeypatch: pytest.MonkeyPatch, proxies: None) -> None:
    with pytest.raises(CorankError, match="variables that name a proxy"):
        RankingClient("http://models.example:8000")  # of socks5, a package that is not installed
    for name in ("all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name)
    with http_server("127.0.0.1", '{"status": "ok"}') as (asked, port):
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        with RankingClient("http://models.example:8000") as client:
            assert client.healthz() == {"status": "ok"}
    assert asked == ["http://models.example:8000/healthz"]


@pytest.mark.parametrize("answer", ["<html>", "[1]", '{"error": "of another kind"}'])
def test_what_is_no_endpoint_of_corank_is_said_so(answer: str) -> None:
    with (
        http_server("127.0.0.1", answer) as (_, port),
        RankingClient(f"http://127.0.0.1:{port}") as client,
        pytest.raises(NoEndpointError, match="this is no endpoint of corank"),
    ):
        client.model()


def test_an_address_that_is_none_is_said_so() -> None:
    with pytest.raises(CorankError, match="Correct the address"):
        RankingClient("http://::1:8000")
    with RankingClient("localhost:8000") as client, pytest.raises(CorankError, match="unsupported protocol"):
        client.healthz()


def published(root: Path, seed: int) -> tuple[str, str]:
    """Another model of the same features: its artifact and version."""
    torch.manual_seed(seed)
    artifact = root / f"model-{seed}"
    model = build_model(SCHEMA, "ui-mixformer", "tiny", id_dropout=0.0)
    return str(artifact), save_artifact(artifact, model, {"selfcheck": {"rows": [], "scores": []}})


def name(document: Path, artifact: str, **more: int) -> None:
    scratch = document.with_suffix(".tmp")
    scratch.write_text(json.dumps({"artifact": artifact, **more}))
    scratch.replace(document)


def test_a_model_that_is_named_while_requests_come_takes_over_without_a_lost_or_mixed_answer(
    settings: ServingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.service, "FOLLOW_SECONDS", 0.05)
    (first, one), (second, two) = published(tmp_path, 1), published(tmp_path, 2)
    document = tmp_path / "current.json"
    name(document, first)
    handle = InProcess(Ranker(replace(settings, artifact=first)))
    service = RankingService(replace(settings, artifact=first, follow=str(document)), handle)  # type: ignore[arg-type]
    answers = []
    with TestClient(build_api(service)) as client:
        expected = {}
        for artifact, version in ((first, one), (second, two), (first, one)):
            name(document, artifact)
            until = time.monotonic() + 20
            while not answers or answers[-1]["model_version"] != version:
                assert time.monotonic() < until
                response = client.post("/v1/rank", json=body())
                assert response.status_code == 200
                answers.append(response.json())
            expected[version] = answers[-1]["scores"]
        assert expected[one] != expected[two]
        for each in answers:
            assert each["scores"] == expected[each["model_version"]]
        # what is no model, or gives other scores than it was published with, stays out, and says so
        damaged = tmp_path / "damaged"
        shutil.copytree(second, damaged)
        (damaged / "model.safetensors").write_bytes(b"")
        for artifact, why in ((str(damaged), "is damaged"), (str(tmp_path / "none"), "not a model artifact")):
            name(document, artifact)
            until = time.monotonic() + 20
            while (client.get("/v1/model").json()["refused"] or {}).get("artifact") != artifact:
                assert time.monotonic() < until
                time.sleep(0.02)
            served = client.get("/v1/model").json()
            assert served["model_version"] == one
            assert why in served["refused"]["why"]
            assert client.post("/v1/rank", json=body()).json()["scores"] == expected[one]
        document.write_text("{half")
        name(document, second)
        until = time.monotonic() + 20
        while client.get("/v1/model").json()["model_version"] != two:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert client.get("/v1/model").json()["refused"] is None


def test_after_a_user_is_forgotten_nothing_that_was_read_before_is_remembered(
    settings: ServingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.service, "FOLLOW_SECONDS", 0.05)
    document = tmp_path / "current.json"
    name(document, settings.artifact)
    ranker = Ranker(settings)
    (_, memoised) = ranker._model(settings.artifact)
    service = RankingService(replace(settings, follow=str(document)), InProcess(ranker))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        assert [client.post("/v1/rank", json=body()).json()["memo"] for _ in range(2)] == ["none", "user"]
        name(document, settings.artifact, erased=1)
        until = time.monotonic() + 20
        while len(memoised.users) + len(memoised.timelines):  # without a further request
            assert time.monotonic() < until
            time.sleep(0.02)
        assert memoised.users.nbytes == memoised.timelines.nbytes == 0
        assert [client.post("/v1/rank", json=body()).json()["memo"] for _ in range(2)] == ["none", "user"]
    # a request that was read before, and comes late, leaves nothing behind
    row = build_row(OnlineReader(settings.store), 0, "7", ["1"], CONTEXT, NOW).rows
    ranker.score([(settings.artifact, row, 1)])
    assert len(memoised.users) == 1
    ranker.score([(settings.artifact, row, 0)])
    assert len(memoised.users) == 0
    ranker.score([(settings.artifact, row, 2)])
    assert len(memoised.users) == 1


def test_a_model_that_scores_its_self_check_otherwise_is_refused(settings: ServingSettings, tmp_path: Path) -> None:
    ranker, reader = Ranker(settings), OnlineReader(settings.store)
    row = build_row(reader, 0, "7", ["1", "2"], CONTEXT, NOW).rows
    model = load_artifact(settings.artifact).model
    document = {"rows": row.to_pylist(), "scores": ranker.score([(settings.artifact, row)])[0].scores.tolist()}
    columns = set(sample_schema(SCHEMA).names)
    document["rows"] = [{name: value for name, value in one.items() if name in columns} for one in document["rows"]]
    right = tmp_path / "right"
    save_artifact(right, model, {"selfcheck": document})
    assert len(ranker.score([(str(right), row)])[0].scores) == 2
    wrong = tmp_path / "wrong"
    document["scores"][0][0] += 1e-3
    save_artifact(wrong, model, {"selfcheck": document})
    with pytest.raises(CorankError, match=r"wrong: its self-check requests differ by 1\.00e-03"):
        ranker.score([(str(wrong), row)])


def rows_of(settings: ServingSettings, *requests: tuple[str, list[str], int]) -> list[Any]:
    """Rows of requests: user, candidates, ts."""
    reader = OnlineReader(settings.store)
    return [build_row(reader, 0, user, items, CONTEXT, ts).rows for user, items, ts in requests]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_is_remembered_gives_the_scores_of_what_is_computed(settings: ServingSettings, name: str) -> None:
    torch.manual_seed(0)
    model = build_model(SCHEMA, name, "tiny", id_dropout=0.0).eval()
    never, memo = MemoisedModel(model, 0), MemoisedModel(model, 10**9)

    def levels(rows: list[Any], exact: bool = False) -> list[str]:
        ranked = list(memo.rank(concatenate(rows), 100))
        plain = list(never.rank(concatenate(rows), 100))
        for one, other in zip(ranked, plain, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=0 if exact else 1e-6)
            assert other.remembered == "none"
        return [one.remembered for one in ranked]

    first, page, later, cold = rows_of(
        settings, ("7", ["1", "2"], NOW), ("7", ["3"], NOW), ("7", ["1"], NOW + 1), ("8", ["2", "1"], NOW)
    )
    assert levels([first]) == ["none"]
    assert levels([first], exact=True) == ["user"]  # a retry
    assert levels([page]) == ["user"]  # other candidates of the same request
    assert levels([later]) == ["timeline"]  # the same events at another time
    # what is remembered, in part remembered and new in one batch, and one of them twice
    latest, other = rows_of(settings, ("7", ["2", "3"], NOW + 2), ("8", ["3"], NOW + 2))
    assert levels([cold, latest, first, latest, other]) == ["none", "timeline", "user", "timeline", "none"]
    assert levels([other, cold, latest]) == ["user", "user", "user"]


def test_a_long_request_is_scored_in_parts_that_take_turns_and_its_user_side_once(settings: ServingSettings) -> None:
    whole = replace(settings, options=ServingConfig(max_candidates=10, memo_megabytes=16))
    parts = replace(settings, options=whole.options.model_copy(update={"chunk_candidates": 3}))
    unremembered = replace(settings, options=parts.options.model_copy(update={"memo_megabytes": 0}))
    request = body(candidates=[3, 1, 2, 9, "1", 2, 3, 1])
    answers, asked = [], []
    for each in (whole, parts, unremembered):
        ranker = Ranker(each)
        handle = InProcess(ranker)
        sizes: list[int] = []

        def counted(bound: Any, ranker: Ranker = ranker, sizes: list[int] = sizes) -> Any:
            sizes.append(len(bound[1]["requests"][0].as_py()[0]["candidates"]))
            return ranker.score([bound])[0]

        handle.rank = Remote(counted)
        service = RankingService(each, handle)  # type: ignore[arg-type]
        with TestClient(build_api(service)) as client:
            answers.append(client.post("/v1/rank", json=request).json())
        asked.append(sizes)
        _, memoised = ranker._model(each.artifact)
        assert len(memoised.users) == (1 if each is not unremembered else 0)
        assert service.memo_bytes == memoised.users.nbytes + memoised.timelines.nbytes
    assert asked == [[8], [3, 3, 2], [8]]
    for answer in answers:
        assert answer["ranking"] == answers[0]["ranking"]
        assert answer["memo"] == "none"
        for task, scores in answers[0]["scores"].items():
            np.testing.assert_allclose(answer["scores"][task], scores, atol=1e-6)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_of_a_timeline_that_has_moved_on_the_new_events_alone_are_encoded(
    settings: ServingSettings, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = build_model(SCHEMA, name, "tiny", id_dropout=0.0).eval()
    never, memo = MemoisedModel(model, 0), MemoisedModel(model, 10**9)
    encode, encoded = model.encode_timelines, list[int]()

    def counted(timelines: Any) -> Any:
        encoded.append(len(timelines["clicks"].ts))
        return encode(timelines)

    def levels(*requests: tuple[str, int]) -> tuple[list[str], int]:
        rows = concatenate(rows_of(settings, *((user, ["1", "2"], ts) for user, ts in requests)))
        plain = list(never.rank(rows, 100))
        encoded.clear()
        monkeypatch.setattr(model, "encode_timelines", counted)
        ranked = list(memo.rank(rows, 100))
        monkeypatch.setattr(model, "encode_timelines", encode)
        for one, other in zip(ranked, plain, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
        return [one.remembered for one in ranked], sum(encoded)

    # the user's events have the times 100 … 109, of which a request sees the last five
    assert levels(("7", 103)) == (["none"], 3)
    assert levels(("7", 105)) == (["events"], 2)
    assert levels(("7", 107)) == (["events"], 2)  # two new ones, and the two oldest are gone
    assert levels(("7", 107), ("8", 107), ("7", 110)) == (["user", "none", "events"], 3)
    assert levels(("7", 200)) == (["timeline"], 0)
    assert levels(("7", 102)) == (["none"], 2)  # none of the last timeline's first events
    assert levels(("7", 111), ("7", 105)) == (["timeline", "user"], 0)
    memo.forget()
    assert levels(("7", 106)) == (["none"], 5)


def test_what_is_remembered_stays_within_its_bytes_and_the_longest_unused_goes(settings: ServingSettings) -> None:
    torch.manual_seed(0)
    model = build_model(SCHEMA, "ui-mixformer", "tiny", id_dropout=0.0).eval()
    rows = rows_of(settings, *(("7", ["1"], NOW + step) for step in range(6)))
    roomy = MemoisedModel(model, 10**9)
    for row in rows:
        list(roomy.rank(row, 100))
    assert (len(roomy.users), len(roomy.timelines)) == (6, 1)
    size = roomy.users.nbytes // 6
    small = MemoisedModel(model, 2 * round(3.5 * size))
    for row in rows[:3]:
        list(small.rank(row, 100))
    assert next(small.rank(rows[0], 100)).remembered == "user"  # used last now
    list(small.rank(rows[3], 100))
    assert small.users.nbytes <= small.users.most_bytes
    found = [next(small.rank(row, 100)).remembered for row in (rows[0], rows[2], rows[3], rows[1])]
    assert found == ["user", "user", "user", "timeline"]


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


def test_requests_of_two_models_that_meet_in_one_batch_are_scored_each_by_its_own(
    settings: ServingSettings, tmp_path: Path
) -> None:
    (first, _), (second, _) = published(tmp_path, 1), published(tmp_path, 2)
    ranker, reader = Ranker(replace(settings, artifact=first)), OnlineReader(settings.store)
    sizes = (("7", 3), ("8", 1), ("7", 2))
    rows = [build_row(reader, 0, user, ["1", "2", "3"][:size], CONTEXT, NOW).rows for user, size in sizes]
    mixed = [one.scores for one in ranker.score(list(zip((first, second, first), rows, strict=True)))]
    alone = [
        ranker.score([(artifact, row)])[0].scores for artifact, row in zip((first, second, first), rows, strict=True)
    ]
    for one, other in zip(mixed, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    third, _ = published(tmp_path, 3)
    ranker.score([(third, rows[0])])
    assert list(ranker._models) == [first, third]  # the one longest not asked for went


def test_requests_to_a_loaded_model_do_not_wait_for_another_to_load(settings: ServingSettings, tmp_path: Path) -> None:
    (first, _), (second, _) = published(tmp_path, 1), published(tmp_path, 2)
    ranker = Ranker(replace(settings, artifact=first))
    (row,) = rows_of(settings, ("7", ["1"], NOW))
    with ThreadPoolExecutor(2) as pool, ranker._loading:  # as while another is loaded
        waiting = pool.submit(ranker.score, [(second, row)])
        assert pool.submit(ranker.score, [(first, row)]).result(20)[0].scores.shape == (1, 2)
        assert not waiting.done()
    assert waiting.result(20)[0].scores.shape == (1, 2)


def test_where_the_named_model_is_unfit_a_service_begins_with_the_one_it_was_started_with(
    settings: ServingSettings, tmp_path: Path
) -> None:
    first, one = published(tmp_path, 1)
    document = tmp_path / "current.json"
    name(document, str(tmp_path / "nothing"))
    service = RankingService(
        replace(settings, artifact=first, follow=str(document)),
        InProcess(Ranker(replace(settings, artifact=first))),  # type: ignore[arg-type]
    )
    with TestClient(build_api(service)) as client:
        assert client.post("/v1/rank", json=body()).json()["model_version"] == one
        assert "not a model artifact" in client.get("/v1/model").json()["refused"]["why"]
