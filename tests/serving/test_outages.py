"""A ranker, a replica or a store that is gone, and more requests than are admitted."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import RayServeException
from starlette.responses import PlainTextResponse

from features.errors import CorankError, UnavailableError, without_trace
from serving.api import build_api
from serving.proxy import ADMITTED, JsonErrors, middlewares
from serving.ranker import Ranker
from serving.rankers import Rankers
from serving.service import RankingService
from serving.settings import ServingSettings
from serving.store_thread import StoreThread
from tests.servers import free_port
from tests.serving.worlds import InProcess, Remote, body, new_events


def store_thread(service: RankingService) -> StoreThread:
    served = service._models.served
    assert served is not None
    return served.thread


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


@pytest.mark.parametrize("deadline", [200.0, None])
def test_a_store_that_fails_or_is_slow_is_answered_without_or_503_as_configured(
    settings: ServingSettings, tmp_path: Path, deadline: float | None
) -> None:
    path = tmp_path / "online.db"
    shutil.copy(settings.store.sqlite_path, path)
    options = settings.options.model_copy(update={"store_deadline_ms": deadline})
    own = replace(settings, store=replace(settings.store, sqlite_path=str(path)), options=options)
    service = RankingService(own, InProcess(Ranker(own)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        known, unknown = (client.post("/v1/rank", json=body(user_id=user)).json() for user in ("7", "nobody"))
        assert known["degraded"] is None
        let_go = threading.Event()
        if deadline is not None:  # slow: what comes meanwhile does not wait for it
            reading = store_thread(service)
            held = reading._pool.submit(reading.timed, lambda: let_go.wait(20))
            started = time.monotonic()
            slow = client.post("/v1/rank", json=body(user_id="7")).json()
            assert time.monotonic() - started < 5
            assert "did not answer within 200 ms" in slow["degraded"]
            assert slow["cold_start"] == {"user": True, "items": [1, "2"]}
            let_go.set()
            held.result(20)
            assert client.post("/v1/rank", json=body(user_id="7")).json()["degraded"] is None
        path.write_bytes(b"no database" * 1_000)
        client.post("/v1/rank", json=body(candidates=[3]))  # until the connection notices
        answer = client.post("/v1/rank", json=body(user_id="nobody", candidates=[8, 9]))
        if deadline is None:
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable")
            return
        assert str(path) in answer.json()["degraded"]
        sent = body(candidates=[{"item_id": 8, "price": 1.0}], user={"tags": ["a"]}, history={"clicks": []})
        inline = client.post("/v1/rank", json=sent).json()
        assert inline["cold_start"] == {"user": False, "items": []}
        assert unknown["cold_start"]["user"]
        degraded = [line for line in client.get("/metrics").text.splitlines() if "rank_degraded_total{" in line]
        assert float(degraded[0].split()[-1]) >= 3


def test_a_long_queue_is_not_taken_for_a_slow_store(settings: ServingSettings) -> None:
    options = settings.options.model_copy(update={"store_deadline_ms": 100.0})
    own = replace(settings, options=options)
    service = RankingService(own, InProcess(Ranker(own)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        client.post("/v1/rank", json=body())
        busy = store_thread(service)._pool.submit(time.sleep, 0.5)  # work of this process, not of the store
        answer = client.post("/v1/rank", json=body()).json()
        assert busy.done()
        assert answer["degraded"] is None


def test_a_service_that_answers_without_its_store_stays_ready_and_says_so(
    settings: ServingSettings, tmp_path: Path
) -> None:
    path = tmp_path / "online.db"
    shutil.copy(settings.store.sqlite_path, path)
    own = replace(settings, store=replace(settings.store, sqlite_path=str(path)))
    service = RankingService(own, InProcess(Ranker(own)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        assert client.get("/readyz").json() == {"status": "ok"}
        path.write_bytes(b"no database" * 1_000)
        response = client.get("/readyz")
        assert (response.status_code, response.json()["status"]) == (200, "degraded")
        assert str(path) in response.json()["why"]


def test_a_model_beside_that_cannot_be_loaded_again_stops_no_other(settings: ServingSettings) -> None:
    """A ranker died with a request of a shadow, whose artifact is gone when the next ranker looks for it."""
    handle = InProcess(Ranker(settings))
    rank, describe = handle.rank, handle.describe

    def gone(artifact: str) -> Any:
        if artifact == "shadow":
            raise CorankError("shadow is not a model artifact")
        return describe._function(artifact)

    def die_once(request: Any) -> Any:
        handle.rank = rank
        raise ActorDiedError()

    handle.describe, handle.rank = Remote(gone), Remote(die_once)
    rankers = Rankers(handle, 1)  # type: ignore[arg-type]

    async def ask() -> Any:
        with pytest.raises(UnavailableError):
            await rankers.rank("u", "shadow", None, 0)
        await asyncio.sleep(0.05)
        return await rankers.describe(settings.artifact)

    assert asyncio.run(ask()).version


def test_a_request_whose_ranker_dies_is_answered_by_another(settings: ServingSettings) -> None:
    handle = InProcess(Ranker(settings))
    rank, died = handle.rank, []

    class OtherReplica(Remote):
        async def remote(self, *arguments: Any) -> Any:
            if not died:
                died.append(arguments)
                raise ActorDiedError()
            return await rank.remote(*arguments)

    handle.rank = OtherReplica(None)
    handle.options = lambda **_: handle  # type: ignore[attr-defined]
    options = settings.options.model_copy(update={"ranker_replicas": 2})
    service = RankingService(replace(settings, options=options), handle)  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        assert client.post("/v1/rank", json=body()).status_code == 200
    assert len(died) == 1


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
    options = settings.options.model_copy(update={"store_deadline_ms": None})
    own = replace(settings, store=replace(settings.store, sqlite_path=str(path)), options=options)
    service = RankingService(own, InProcess(Ranker(own)))  # type: ignore[arg-type]
    with TestClient(build_api(service)) as client:
        assert client.get("/readyz").status_code == 200
        path.write_bytes(b"no database" * 1_000)
        response = client.get("/readyz")
        assert (response.status_code, response.json()["error"]["type"]) == (503, "not_ready")
        assert str(path) in response.json()["error"]["message"]


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
