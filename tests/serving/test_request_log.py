"""The log of what was served: what is written, whose, and that nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from fastapi.testclient import TestClient

import serving.live
from features.delta.table import Table
from features.delta.write import append
from features.errors import CorankError
from features.schema import Feature, partition_of
from features.store.reader import OnlineReader
from serving.api import ModelDescription, RankRequest, build_api
from serving.memo import Ranked
from serving.ranker import Ranker
from serving.request_log import LogSettings, RequestLog, ServedRequest
from serving.rows import RequestRow, serving_schema
from serving.service import RankingService
from serving.settings import ServingSettings, share_of_users
from tests.serving.worlds import CONTEXT, NOW, SCHEMA, InProcess, body, name, new_events, published

DAY = partition_of(NOW, "day")


def served(folder: Path, table: str) -> pl.DataFrame:
    return Table(table, str(folder / table)).scan().collect()


@pytest.fixture
def service(settings: ServingSettings, tmp_path: Path) -> Iterator[RankingService]:
    events = tmp_path / "own_events"
    kinds = {"event_id": pl.String, "user_id": pl.Int64, "item_id": pl.Int32, "ts": pl.Int64, "dt": pl.String}
    write_deltalake(str(events), pl.DataFrame(schema=kinds).to_arrow(), partition_by=["dt"])
    store = replace(settings.store, events={"events": Table("events", str(events), grain="day")})
    log = LogSettings(str(tmp_path / "served"), "day", share=1.0, seconds=600.0)
    service = RankingService(replace(settings, store=store, log=log), InProcess(Ranker(settings)))  # type: ignore[arg-type]
    yield service
    assert service._log is not None
    service._log.close()


def test_answers_are_logged_as_impressions_with_the_features_as_they_were_read(
    service: RankingService, tmp_path: Path
) -> None:
    log = service._log
    assert log is not None
    with TestClient(build_api(service)) as client:
        first = client.post("/v1/rank", json=body(candidates=[1, 2, 3], top_k=2, request_id="mine")).json()
        second = client.post("/v1/rank", json=body(user_id=8, candidates=[{"item_id": 9, "price": 2.5}])).json()
        assert first["request_id"] == "mine"
        assert len(second["request_id"]) == 32
        assert client.post("/v1/rank", json=body(candidates=[])).status_code == 422  # answered nothing
        log.flush()
        text = client.get("/metrics").text
    shown = served(tmp_path / "served", "impressions").sort("request_id", "position", descending=[True, False])
    assert shown["request_id"].to_list() == ["mine", "mine", second["request_id"]]
    assert shown["item_id"].to_list() == [*map(str, first["ranking"]), "9"]
    assert shown["position"].to_list() == [0, 1, 0]
    assert shown["user_id"].to_list() == ["7", "7", "8"]
    assert set(shown["ts"]) == {NOW}
    assert set(shown["dt"]) == {DAY}
    assert set(shown["model_version"]) == {first["model_version"]}
    assert (shown["device"][0], shown["hour"][0], shown["modes"][0].to_list()) == ("ios", 3.0, ["dark", "7"])
    by_item = dict(zip([1, 2, 3], first["scores"]["click"], strict=True))
    assert shown["score__click"].to_list()[:2] == pytest.approx([by_item[item] for item in first["ranking"]])
    rows = served(tmp_path / "served", "requests").sort("user_id")
    assert rows["item_id"].to_list() == [["1", "2", "3"], ["9"]]  # all candidates, also those not answered
    assert rows["from_store"].to_list() == [True, False]
    assert rows["clicks__ts"].to_list() == [list(range(105, 110)), []]
    assert rows["_score__click"].to_list()[0] == pytest.approx(first["scores"]["click"])
    assert rows["features"].n_unique() == 1
    assert 'table="impressions"' in text
    assert 'outcome="written"' in text


def test_only_the_share_of_users_is_logged_and_of_those_every_request(tmp_path: Path) -> None:
    log = RequestLog(LogSettings(str(tmp_path), "day", share=0.25, seconds=600.0), lambda *_: None)
    users = [f"u{number}" for number in range(4_000)]
    logged = [user for user in users if log.wants(user)]
    assert 900 < len(logged) < 1_100
    assert all(share_of_users(user) < 0.25 for user in logged)
    log.close()


def test_feedback_and_pushed_events_are_logged_in_the_types_of_their_roles(
    service: RankingService, tmp_path: Path
) -> None:
    log = service._log
    assert log is not None
    with TestClient(build_api(service)) as client:
        label = {"request_id": "r", "item_id": 3, "label": "like"}
        assert client.post("/v1/feedback", json={"feedback": [label, label | {"ts": NOW, "value": 0}]}).json() == {
            "accepted": 2
        }
        wrong = client.post("/v1/feedback", json={"feedback": [label, label | {"label": "buy"}]})
        assert wrong.status_code == 422
        assert wrong.json()["error"]["field"] == "feedback.1.label"
        for changes in ({"value": 2}, {"ts": 1_700_000_000}, {"item_id": None}):
            assert client.post("/v1/feedback", json={"feedback": [label | changes]}).status_code == 422
        assert client.post("/v1/events", json=new_events({"event_id": "new"})).status_code == 200
        # what fits a sequence, but not the column of its log, is left out alone
        assert client.post("/v1/events", json=new_events({"event_id": "odd", "item_id": "B00X"})).status_code == 200
        assert client.post("/v1/events", json=new_events({"event_id": "big", "item_id": 2**40})).status_code == 200
        assert client.post("/v1/events", json=new_events({"ts": None})).status_code == 422
        log.flush()
        text = client.get("/metrics").text
    labels = served(tmp_path / "served", "feedback").sort("ts")
    assert labels.select("request_id", "item_id", "label", "value").rows() == [
        ("r", "3", "like", 0),
        ("r", "3", "like", 1),
    ]
    assert labels["dt"][0] == DAY
    events = served(tmp_path / "served", "events/events")
    assert events.select("event_id", "user_id", "item_id", "ts").rows() == [("new", 9, 1, NOW - 5)]
    assert events.schema["item_id"] == pl.Int32
    lost = [line for line in text.splitlines() if "_total" in line and 'outcome="lost"' in line]
    assert [line.split()[-1] for line in lost] == ["2.0"]


def test_without_a_log_feedback_is_refused_with_the_remedy(client: TestClient) -> None:
    label = {"request_id": "r", "item_id": 3, "label": "like"}
    answer = client.post("/v1/feedback", json={"feedback": [label]})
    assert answer.status_code == 422
    assert "serving.log_share" in answer.json()["error"]["message"]


def test_what_cannot_be_written_is_counted_and_nobody_waits_for_it(service: RankingService, tmp_path: Path) -> None:
    log = service._log
    assert log is not None
    (tmp_path / "served").write_text("a file where the tables should be")
    with TestClient(build_api(service)) as client:
        assert client.post("/v1/rank", json=body()).status_code == 200
        log.flush()
        assert client.post("/v1/rank", json=body()).status_code == 200
        lost = [
            line for line in client.get("/metrics").text.splitlines() if "log_rows_total" in line and "lost" in line
        ]
    assert {line.split()[-1] for line in lost} == {"2.0", "1.0"}


def served_request(erased: int = 0) -> ServedRequest:
    request = RankRequest(user_id="7", candidates=["1"], context=CONTEXT)
    rows = serving_schema(SCHEMA).empty_table()
    row, ranked = RequestRow("r", rows, True, [True]), Ranked(np.zeros((1, 2)), "none", 0.0, 0.0, 0)
    return ServedRequest.of(request, row, NOW, ranked, [0], ModelDescription("1", SCHEMA, {}), erased)


def test_what_is_too_much_is_left_out_and_what_is_forgotten_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[tuple[str, str]] = Counter()

    def counted(table: str, outcome: str, rows: int) -> None:
        counts[table, outcome] += rows

    monkeypatch.setattr(serving.request_log, "MOST_WAITING", 3 * 500)
    log = RequestLog(LogSettings(str(tmp_path / "served"), "day", seconds=600.0), counted)
    label = {"request_id": "r", "item_id": "3", "label": "like", "value": 1, "ts": NOW}
    assert [log.feedback([label] * count) for count in (2, 2, 1)] == [True, False, True]  # more than may wait
    log.forget(erased=5)
    assert log.feedback([label] * 3)
    log.request(served_request(erased=4))  # it was read before the users were forgotten
    log.close()
    assert counts == {
        ("feedback", "lost"): 5,
        ("feedback", "written"): 3,
        ("requests", "lost"): 1,
        ("impressions", "lost"): 1,
    }
    assert served(tmp_path / "served", "feedback").height == 3


def test_forgetting_waits_for_what_is_being_written_and_closing_writes_what_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on, append = threading.Event(), threading.Event(), serving.request_log.append

    def slow(*arguments: Any) -> None:
        writing.set()
        assert go_on.wait(20)
        append(*arguments)

    monkeypatch.setattr(serving.request_log, "append", slow)
    log = RequestLog(LogSettings(str(tmp_path / "served"), "day", seconds=600.0), lambda *_: None)
    label = {"request_id": "r", "item_id": "3", "label": "like", "value": 1, "ts": NOW}
    log.feedback([label])
    with ThreadPoolExecutor(3) as pool:
        flushed = pool.submit(log.flush)
        assert writing.wait(20)
        log.feedback([label])
        forgotten = pool.submit(log.forget, 1)
        time.sleep(0.05)
        assert not forgotten.done()
        go_on.set()
        flushed.result(20)
        forgotten.result(20)
        assert served(tmp_path / "served", "feedback").height == 1  # the second one was dropped
        go_on.clear()
        writing.clear()
        log.feedback([label])
        closed = pool.submit(log.close)
        assert writing.wait(20)
        log.feedback([label])
        go_on.set()
        closed.result(20)
    assert served(tmp_path / "served", "feedback").height == 3


def test_several_replicas_append_at_once_to_a_table_that_is_not_there_yet_and_gets_columns(tmp_path: Path) -> None:
    def write(replica: int) -> None:
        for number in range(5):
            columns = {"dt": [DAY], "replica": [replica], f"column_{replica}_{number // 2}": [1]}
            append(str(tmp_path / "table"), pl.DataFrame(columns).to_arrow(), {})

    with ThreadPoolExecutor(4) as pool:
        for written in [pool.submit(write, replica) for replica in range(4)]:
            written.result(60)
    assert served(tmp_path, "table")["replica"].value_counts()["count"].to_list() == [5] * 4


def test_a_table_takes_rows_below_a_folder_with_brackets(tmp_path: Path) -> None:
    folder = tmp_path / "my [v2] x^y|z ä"
    for number in range(2):
        append(str(folder / "table"), pl.DataFrame({"dt": ["2026-01-06T21"], "number": [number]}).to_arrow(), {})
    assert served(folder, "table").sort("number").rows() == [("2026-01-06T21", 0), ("2026-01-06T21", 1)]


def test_a_column_of_another_type_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    root = tmp_path / "table"
    append(str(root), pl.DataFrame({"dt": [DAY], "price": [1.5]}).to_arrow(), {})
    with pytest.raises(CorankError, match=r"its column price is double, and not string; move the table away"):
        append(str(root), pl.DataFrame({"dt": [DAY], "price": ["1.5"]}).to_arrow(), {})
    assert served(tmp_path, "table")["price"].to_list() == [1.5]
    assert len(list(root.rglob("*.parquet"))) == 1


def test_a_context_with_names_of_the_logs_own_columns_loses_nothing_of_either(tmp_path: Path) -> None:
    features = (Feature(name="theirs", column="model_version", side="context"), *SCHEMA.features[2:])
    schema = SCHEMA.model_copy(update={"features": (*features, Feature(name="at", column="position", side="context"))})
    context = CONTEXT | {"model_version": "v9", "position": "top"}
    served_row = replace(served_request(), model=ModelDescription("1", schema, {}), context=context)
    request = {"request_id": "r", "ts": NOW, "candidates": [{}]}
    rows = pa.Table.from_pylist([{"user_id": "7", "requests": [request]}], schema=serving_schema(schema))
    log = RequestLog(LogSettings(str(tmp_path), "day", seconds=600.0), lambda *_: None)
    log.request(replace(served_row, row=RequestRow("r", rows, True, [True])))
    log.close()
    shown, asked = served(tmp_path, "impressions"), served(tmp_path, "requests")
    assert (shown["model_version"].to_list(), shown["position"].to_list()) == (["1"], [0])
    assert (asked["model_version"].to_list(), asked["_context__model_version"].to_list()) == (["1"], ["v9"])
    assert asked["_context__position"].to_list() == ["top"]


def test_an_explained_request_was_shown_to_nobody_and_is_not_logged(service: RankingService, tmp_path: Path) -> None:
    with TestClient(build_api(service)) as client:
        assert client.post("/v1/explain", json=body()).status_code == 200
        assert service._log is not None
        service._log.flush()
    assert not (tmp_path / "served" / "impressions").exists()


def test_a_split_answers_its_share_of_users_and_a_shadow_answers_nobody(
    settings: ServingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.live, "FOLLOW_SECONDS", 0.05)
    used, request = dict[int, set[str]](), OnlineReader.request

    def noted(reader: OnlineReader, *arguments: Any) -> Any:
        used.setdefault(id(reader), set()).add(threading.current_thread().name)
        return request(reader, *arguments)

    monkeypatch.setattr(OnlineReader, "request", noted)
    (first, one), (second, two), (third, three) = (published(tmp_path, seed) for seed in (1, 2, 3))
    document, log = tmp_path / "current.json", LogSettings(str(tmp_path / "served"), "day", seconds=600.0)
    beside: dict[str, Any] = {"split": {"artifact": second, "share": 0.3}, "shadow": third}
    name(document, first, **beside)
    ranker = Ranker(replace(settings, artifact=first))
    followed = replace(settings, artifact=first, follow=str(document), log=log)
    service = RankingService(followed, InProcess(ranker))  # type: ignore[arg-type]
    users = [f"u{number}" for number in range(60)]
    with TestClient(build_api(service)) as client:
        answers = {user: client.post("/v1/rank", json=body(user_id=user)).json()["model_version"] for user in users}
        expected = {user: two if share_of_users(f"split {user}") < 0.3 else one for user in users}
        assert answers == expected
        assert set(answers.values()) == {one, two}
        told = client.get("/v1/model").json()
        assert told["split"] == {"model_version": two, "share": 0.3}
        assert told["shadow"] == {"model_version": three}
        for version in (one, two, three):  # each can be asked for
            assert client.post("/v1/rank", json=body(model_version=version)).json()["model_version"] == version
        assert sorted(len(threads) for threads in used.values()) == [1, 1, 1]  # a reader is not for several at once
        text = client.get("/metrics").text
        compared = [line for line in text.splitlines() if "shadow_score_difference_count" in line]
        assert sum(float(line.split()[-1]) for line in compared) > 60  # two tasks
        name(document, first, split={"artifact": str(tmp_path / "none"), "share": 0.3})
        while "unfit" not in client.get("/v1/model").json():
            pass
        assert client.post("/v1/rank", json=body(user_id=users[0])).json()["model_version"] == one
    assert service._log is not None
    service._log.close()
    shadow = served(tmp_path / "served", "shadow")
    assert set(shadow["model_version"]) == {three}
