"""Features that a request brings along, in place of those in the store."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from features.encoding import hash_id
from features.store.reader import OnlineReader
from serving.inline import Inline
from serving.rows import build_row
from serving.settings import ServingSettings
from tests.serving.worlds import CONTEXT, NOW, body

STORED = [{"ts": ts, "item_id": ts} for ts in range(100, 110)]


def test_what_is_sent_along_gives_the_row_of_the_same_values_in_the_store(settings: ServingSettings) -> None:
    """User 7 has tags a and b and ten clicks there, item 1 the price 1; nobody knows the others."""
    reader = OnlineReader(settings.store)

    def row(user: str, items: list[str], inline: Inline | None = None) -> dict[str, Any]:
        made = build_row(reader, 2, user, items, CONTEXT, NOW, inline=inline or Inline(), request_id="r").rows
        return dict(made.to_pylist()[0])

    stored, unknown = row("7", ["1", "2"]), row("9", ["8", "2"])
    inline = Inline({"tags": ["a", "b"]}, {"clicks": [*reversed(STORED)]}, items={0: {"price": 1.0}})
    sent = row("9", ["8", "2"], inline)
    assert {**sent, "user_id": "7"} != stored  # the ids are their own
    (of_stored,), (of_sent,), (of_unknown,) = stored["requests"], sent["requests"], unknown["requests"]
    for name in ("tags", "user_known", "clicks__end", "device", "hour"):
        found = [{**one, **{key.removeprefix("feature__"): one[key] for key in one}} for one in (of_stored, of_sent)]
        assert found[0].get(name) == found[1].get(name), name
    assert sent["clicks__ts"] == stored["clicks__ts"] == list(range(105, 110))
    assert sent["clicks__item"] == stored["clicks__item"]
    assert of_sent["candidates"][0]["item_known"]
    price = next(name for name in of_sent["candidates"][0] if "price" in name)
    assert [one[price] for one in of_sent["candidates"]] == [one[price] for one in of_stored["candidates"]]
    assert of_sent["candidates"][1] == of_unknown["candidates"][1]  # of which nothing was sent
    assert not of_unknown["user_known"]


def test_a_request_without_a_store_is_ranked_by_what_it_brings(client: TestClient) -> None:
    alone = body(user_id="7", candidates=[1, 2])
    brought = alone | {"user": {"tags": ["a", "b"]}, "history": {"clicks": STORED}}
    brought["candidates"] = [{"item_id": 1, "price": 1.0}, {"item_id": 2, "price": None}]
    answers = [client.post("/v1/rank", json=each).json() for each in (alone, brought)]
    assert answers[0]["scores"] == answers[1]["scores"]
    assert answers[1]["ranking"] in ([1, 2], [2, 1])
    other = client.post("/v1/rank", json=brought | {"history": {"clicks": STORED[:1]}}).json()
    assert other["scores"] != answers[0]["scores"]


def test_recent_events_are_seen_on_top_of_those_that_are_stored_by_this_request_alone(
    settings: ServingSettings, client: TestClient
) -> None:
    reader, recent = (
        OnlineReader(settings.store),
        {"clicks": [{"ts": NOW - 3, "item_id": "b"}, {"ts": 107, "item_id": "a"}]},
    )

    def seen(inline: Inline) -> list[tuple[int, int]]:
        row = build_row(reader, 2, "7", ["1"], CONTEXT, NOW, inline=inline).rows.to_pylist()[0]
        return list(zip(row["clicks__ts"], row["clicks__item"], strict=True))

    before, after = seen(Inline()), seen(Inline(recent=recent))
    assert [ts for ts, _ in after] == [107, 107, 108, 109, NOW - 3]
    assert [code for _, code in after] == [before[2][1], hash_id("a"), before[3][1], before[4][1], hash_id("b")]
    answers = [client.post("/v1/rank", json=body(**more)).json() for more in ({}, {"recent": recent}, {})]
    assert answers[0]["scores"] == answers[2]["scores"] != answers[1]["scores"]


def test_an_object_with_the_id_alone_is_the_id(client: TestClient) -> None:
    plain, wrapped = (
        client.post("/v1/rank", json=body(candidates=candidates)).json()
        for candidates in ([1, "never seen"], [{"item_id": 1}, {"item_id": "never seen"}])
    )
    assert wrapped["cold_start"] == plain["cold_start"] == {"user": False, "items": ["never seen"]}
    assert wrapped["scores"] == plain["scores"]


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"user": {"age": 3}}, "user.age", "reads no such column; it reads ['tags']"),
        ({"user": {"tags": "a"}}, "user.tags", "must be a list or null"),
        ({"user": {"tags": [{}]}}, "user.tags.0", "must be a text, a number or a boolean"),
        ({"candidates": [{"price": 1}]}, "candidates.0", "has no item_id"),
        ({"candidates": [{"item_id": None}]}, "candidates.0", "must be a text or an integer"),
        ({"candidates": [1, {"item_id": 2, "price": "x"}]}, "candidates.1.price", "must be a finite number or null"),
        ({"candidates": [{"item_id": 2, "color": "x"}]}, "candidates.0.color", "reads no such column"),
        ({"history": {"views": []}}, "history.views", "is no sequence of the model; there are ['clicks']"),
        ({"history": {"clicks": [{"ts": 1}]}}, "history.clicks.0.item_id", "is missing"),
        ({"history": {"clicks": [{"item_id": 1}]}}, "history.clicks.0.ts", "Field required"),
        ({"history": {"clicks": [{"ts": 1, "item_id": 1, "x": 1}]}}, "history.clicks.0.x", "reads no such column"),
        ({"history": {"clicks": [{"ts": 1, "item_id": [1]}]}}, "history.clicks.0.item_id", "must be a text, a number"),
        ({"history": {"clicks": [{"ts": 1_700_000_000, "item_id": 1}]}}, "history.clicks.0.ts", "looks like seconds"),
        ({"recent": {"clicks": [{"ts": 1, "item_id": {}}]}}, "recent.clicks.0.item_id", "must be a text, a number"),
        ({"recent": {"views": []}}, "recent.views", "is no sequence"),
        ({"user": {"user_id": "8"}}, "user.user_id", "reads no such column"),
        ({"user": {"item_id": "8"}}, "user.item_id", "reads no such column"),
        ({"candidates": [{"item_id": 1, "user_id": 8}]}, "candidates.0.user_id", "reads no such column"),
        ({"model_version": "nope"}, "model_version", "'nope' is not served; there are ["),
    ],
)
def test_what_cannot_be_sent_along_is_named(
    client: TestClient, changes: dict[str, Any], field: str, message: str
) -> None:
    answer = client.post("/v1/rank", json=body(**changes))
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["field"] == field
    assert message in error["message"]
