"""New events over HTTP: the next request sees them, and what is no event is named."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import write_deltalake
from fastapi.testclient import TestClient

from features.delta.table import Table
from features.encoding import hash_id
from features.schema import EventField, Sequence
from features.store.online import apply, open_store, sole_writer
from features.store.reader import OnlineReader
from serving.api import build_api
from serving.ranker import Ranker
from serving.rows import build_row
from serving.service import RankingService
from serving.settings import ServingConfig, ServingSettings
from tests.serving.worlds import CONTEXT, NOW, SCHEMA, InProcess, body, new_events, without_cost


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


def test_strange_columns_of_events_are_refused(client: TestClient) -> None:
    for name, value in (("\ud800", 1), ("other", float("nan")), ("other", float("inf"))):
        content = json.dumps(new_events({name: value}))
        response = client.post("/v1/events", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 422, response.text
        assert response.json()["error"]["field"].startswith("events.0.")


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
