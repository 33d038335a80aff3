"""What a request costs: in process, over HTTP beside an application that does nothing, with many clients, remembered.

``python -m tests.benchmarks.serving [--quick]``: a store filled by the data stages from ``import synthetic``, histories
pushed to their full length, and a model with random weights (what it scores does not change what it costs). The
application that does nothing has the same two deployments and moves as many bytes; its clients are the same. Every
comparison alternates the two sides, and a ratio is the median over the rounds.

--quick: tiny, for correctness.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from ray import serve
from rich.console import Console
from rich.table import Table

from features.store.push import OnlineWriter
from features.store.reader import OnlineReader
from models.artifact import save_artifact
from models.registry import build_model
from pipeline.config import Config
from pipeline.dag import run_dag
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.runtime import ensure_ray, quiet, stop_ray
from pipeline.stages.feature_store import FEATURE_STORE, store_settings
from pipeline.stages.samples import SAMPLES
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace
from serving.deploy import start, stop
from serving.memo import MemoisedModel
from serving.ranker import Ranker
from serving.rows import build_row
from serving.settings import ServingConfig, ServingSettings
from tests.benchmarks.measure import at_least, at_most, print_results
from tests.pipeline.workspaces import load
from tests.servers import free_port

START = "2026-01-05"
HOST = "127.0.0.1"
CONTEXT = {"device": "mobile"}


@dataclass(frozen=True)
class Size:
    """Users and items of the log, length of a history, candidates of requests, clients at a time, requests a round."""

    users: int
    items: int
    length: int
    candidates: tuple[int, ...]
    clients: tuple[int, ...]
    requests: int
    rounds: int


FULL = Size(200, 4_000, 512, (1, 100, 500, 2_000), (1, 8, 32), requests=64, rounds=3)
QUICK = Size(20, 60, 16, (1, 20), (1, 4), requests=8, rounds=1)


@dataclass(frozen=True)
class World:
    """A filled store and a model that reads it."""

    settings: ServingSettings
    users: list[str]
    items: list[str]
    now: int
    counter: Iterator[int]

    def bodies(self, candidates: int, requests: int) -> list[bytes]:
        """So many more requests: each of the next user, for the next items."""
        return [self._body(next(self.counter), candidates) for _ in range(requests)]

    def _body(self, request: int, candidates: int) -> bytes:
        ids = [self.items[(request * 37 + place) % len(self.items)] for place in range(candidates)]
        document = {"user_id": self.users[request % len(self.users)], "candidates": ids, "context": CONTEXT}
        return json.dumps(document | {"ts": self.now + request}).encode()


def build(folder: Path, size: Size) -> World:
    """Log, store, pushed histories and model."""
    import_synthetic(folder / "data", 3, size.users, size.items, 3, START, 2, say=lambda _: None)
    content = load(folder, folder / "data").model_dump(include={"sequences"})
    sequences = [{**one, "length": size.length} for one in content["sequences"]]
    config: Config = load(folder, folder / "data", sequences=sequences, feast={"online": "sqlite"})
    workspace = Workspace(config, Progress())
    ensure_ray(config.ray)
    run_dag(workspace, [stage.name for stage in (VALIDATED, SAMPLES, FEATURE_STORE)])
    torch.manual_seed(0)
    model = build_model(config.schema_, "ui-mixformer", "tiny")
    save_artifact(folder / "model", model, {"selfcheck": {"rows": [], "scores": []}})
    settings = ServingSettings(str(folder / "model"), store_settings(workspace), log_delay=config.log_delay)
    users = pl.read_delta(str(folder / "data" / "users"))["user_id"].unique().sort().to_list()
    items = pl.read_delta(str(folder / "data" / "items"))["item_id"].unique().sort().to_list()
    now = time.time_ns() // 1_000
    _push(settings, users, items, size.length, now)
    return World(settings, users, items, now, itertools.count())


def _push(settings: ServingSettings, users: Sequence[str], items: Sequence[str], length: int, now: int) -> None:
    writer = OnlineWriter(settings.store, settings.log_delay)
    for user in users:
        rows = [
            {"event_id": f"{user} {place}", "user_id": user, "item_id": items[(place * 7) % len(items)]}
            | {"category": f"c{place % 20}", "duration": float(place % 300), "ts": now - 10**9 + place}
            for place in range(length)
        ]
        writer.push(pl.DataFrame(rows), "watches")


# --- in process ---------------------------------------------------------------------------------------


def in_process(world: World, candidates: int, size: Size) -> dict[str, float]:
    """Median milliseconds of reading a request's features, of the model, of the model whose user side is remembered,
    and of scoring alone."""
    ranker, reader = Ranker(replace(world.settings, ranker_threads=1)), OnlineReader(world.settings.store)
    (_, memoised), delay = ranker._model(world.settings.artifact), world.settings.log_delay
    seconds: dict[str, list[float]] = {"features": [], "model": [], "remembered": [], "scoring": []}
    for body in world.bodies(candidates, size.requests):
        asked = json.loads(body)
        begun = time.perf_counter()
        row = build_row(reader, delay, asked["user_id"], asked["candidates"], CONTEXT, asked["ts"]).rows
        seconds["features"].append(time.perf_counter() - begun)
        memoised.forget()
        for name in ("model", "remembered"):
            begun = time.perf_counter()
            (ranked,) = memoised.rank(row, candidates)
            seconds[name].append(time.perf_counter() - begun)
        seconds["scoring"].append(ranked.item_seconds)
    return {name: 1e3 * float(np.median(values[len(values) // 4 :])) for name, values in seconds.items()}


def hit_ratios(world: World, size: Size) -> dict[float, float]:
    """By share of the bytes that all users' states need: the share of requests whose user side was remembered, where
    users come by Zipf's law and a user pages through items at one time."""
    reader = OnlineReader(world.settings.store)
    ranker = Ranker(replace(world.settings, ranker_threads=1))
    (artifact, whole) = ranker._model(world.settings.artifact)
    rows = [
        build_row(reader, world.settings.log_delay, user, world.items[:1], CONTEXT, world.now).rows
        for user in world.users
    ]
    for row in rows:
        list(whole.rank(row, 1))
    needed, weights = whole.users.nbytes + whole.timelines.nbytes, 1 / np.arange(1, len(rows) + 1)
    drawn = np.random.default_rng(0).choice(len(rows), size.requests * 10, p=weights / weights.sum())
    ratios = {}
    for share in (0.05, 0.1, 0.25, 0.5, 1.0):
        memoised = MemoisedModel(artifact.model, round(needed * share) + 1)
        levels = [next(iter(memoised.rank(rows[user], 1))).remembered for user in drawn]
        ratios[share] = levels.count("user") / len(levels)
    return ratios


# --- over HTTP ----------------------------------------------------------------------------------------


def nothing_app(answer: bytes, row_bytes: int, options: ServingConfig) -> serve.Application:
    """Two deployments, as the real one has them, that move bodies, rows and answers of the same sizes."""

    @serve.deployment(max_ongoing_requests=1_000, ray_actor_options={"num_cpus": 0.5})
    class Second:
        @serve.batch(max_batch_size=options.max_batch_requests, batch_wait_timeout_s=options.batch_wait_ms / 1e3)
        async def rank(self, rows: list[bytes]) -> list[bytes]:
            return [answer for _ in rows]

    @serve.deployment(max_ongoing_requests=1_000, ray_actor_options={"num_cpus": 0.1})
    @serve.ingress()  # type: ignore[call-arg]
    class First:
        def __init__(self, second: Any) -> None:
            self._second, self._row = second, bytes(row_bytes)

        def __serve_build_asgi_app__(self) -> FastAPI:
            api = FastAPI()
            api.add_route("/v1/rank", self.rank, methods=["POST"])
            return api

        async def rank(self, request: Any) -> JSONResponse:
            json.loads(await request.body())
            return JSONResponse(json.loads(await self._second.rank.remote(self._row)))

    return First.bind(Second.bind())  # type: ignore[no-any-return,attr-defined]


async def load_with(port: int, bodies: Iterable[bytes], clients: int) -> tuple[list[float], float, bytes]:
    """Seconds of every request as these clients share them, seconds in all, and the last answer."""
    left, seconds, last = iter(bodies), list[float](), b""

    async def client() -> None:
        nonlocal last
        reader, writer = await asyncio.open_connection(HOST, port)
        for body in left:
            head = f"POST /v1/rank HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
            begun = time.perf_counter()
            writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
            headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            last = await reader.readexactly(int(headers.split("content-length:")[1].split("\r\n")[0]))
            seconds.append(time.perf_counter() - begun)
            if " 200 " not in headers.splitlines()[0]:
                raise SystemExit(f"not answered: {headers.splitlines()[0]} {last[:300].decode()}")
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds, time.perf_counter() - begun, last


@contextmanager
def served(world: World, **changes: Any) -> Iterator[int]:
    """The port of an endpoint with these options."""
    port = free_port()
    start(replace(world.settings, options=ServingConfig(**changes)), HOST, port)
    try:
        asyncio.run(load_with(port, world.bodies(1, 5), 1))
        yield port
    finally:
        stop()


@contextmanager
def doing_nothing(world: World, answer: bytes, row_bytes: int) -> Iterator[int]:
    """The port of an application that answers this whatever it is asked."""
    port = free_port()
    serve.start(http_options={"host": HOST, "port": port})
    serve.run(nothing_app(answer, row_bytes, ServingConfig()), name="nothing", route_prefix="/")
    try:
        asyncio.run(load_with(port, world.bodies(1, 5), 1))
        yield port
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


def over_http(world: World, size: Size) -> dict[str, dict[str, float]]:
    """By what was asked of whom: milliseconds of a request at 50, 95 and 99 %, and requests a second.

    The two applications cannot have a port at the same time, so whole rounds alternate.
    """
    most = size.candidates[1]
    reader = OnlineReader(world.settings.store)
    rows = {
        count: build_row(reader, world.settings.log_delay, world.users[0], world.items[:count], CONTEXT, world.now).rows
        for count in size.candidates
    }
    found: dict[str, list[tuple[list[float], float]]] = {}

    def measure(port: int, who: str, count: int, clients: int) -> bytes:
        seconds, total, answer = asyncio.run(load_with(port, world.bodies(count, size.requests), clients))
        case = f"{who}, {count} candidates, {clients} clients"
        print(f"{case}: {len(seconds) / total:.1f} requests/s")
        found.setdefault(case, []).append((seconds, total))
        return answer

    cases = [(count, 1) for count in size.candidates] + [(most, clients) for clients in size.clients[1:]]
    answers: dict[int, bytes] = {}
    for _ in range(size.rounds):
        with served(world) as port:
            for count, clients in cases:
                answers[count] = measure(port, "corank", count, clients)
        for count in size.candidates:
            with doing_nothing(world, answers[count], rows[count].nbytes) as port:
                for _, clients in (case for case in cases if case[0] == count):
                    measure(port, "nothing", count, clients)
        for name, changes in (("unmerged", {"max_batch_requests": 1}), ("without memo", {"memo_megabytes": 0})):
            with served(world, **changes) as port:
                measure(port, name, most, size.clients[-1])
    return {name: _summary(rounds) for name, rounds in found.items()}


def _summary(rounds: Sequence[tuple[list[float], float]]) -> dict[str, float]:
    """The median round by each measure."""
    percentiles = np.array([np.percentile(seconds, [50, 95, 99]) * 1e3 for seconds, _ in rounds])
    p50, p95, p99 = np.median(percentiles, axis=0)
    return {
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "per_second": float(np.median([len(seconds) / total for seconds, total in rounds])),
    }


def beside_a_large_one(world: World, size: Size) -> tuple[float, float]:
    """Milliseconds at 99 % of small requests alone, and beside a client with the most candidates that are allowed."""
    most = min(5_000, len(world.items))
    small = world.bodies(size.candidates[1], 2 * size.requests)
    with served(world) as port:
        alone, _, _ = asyncio.run(load_with(port, small[: size.requests], 1))

        async def both() -> list[float]:
            large = asyncio.create_task(load_with(port, itertools.cycle(world.bodies(most, 10)), 1))
            seconds, _, _ = await load_with(port, small[size.requests :], 1)
            large.cancel()
            return seconds

        beside = asyncio.run(both())
    return float(np.percentile(alone, 99) * 1e3), float(np.percentile(beside, 99) * 1e3)


def _print(
    size: Size, parts: dict[int, dict[str, float]], ratios: dict[float, float], http: dict[str, dict[str, float]]
) -> None:
    console = Console(width=120)
    table = Table("candidates", *parts[size.candidates[0]], title="in process, one thread, milliseconds")
    for count, values in parts.items():
        table.add_row(f"{count:,}", *(f"{value:.2f}" for value in values.values()))
    console.print(table)
    table = Table("", "p50 ms", "p95 ms", "p99 ms", "requests/s", title="over HTTP")
    for name, values in http.items():
        table.add_row(name, *(f"{value:.1f}" for value in values.values()))
    console.print(table)
    told = ", ".join(f"{share:.0%}: {ratio:.2f}" for share, ratio in ratios.items())
    console.print(f"requests whose user side was remembered, by share of the bytes that all would need: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny: for correctness, not for speed")
    quick = parser.parse_args().quick
    size = QUICK if quick else FULL
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        try:
            world = build(Path(folder), size)
            parts = {count: in_process(world, count, size) for count in size.candidates}
            ratios = hit_ratios(world, size)
            http = over_http(world, size)
            alone, beside = beside_a_large_one(world, size)
        finally:
            stop_ray()
    _print(size, parts, ratios, http)
    most, many = size.candidates[1], size.clients[-1]
    own, nothing = (http[f"{name}, {most} candidates, 1 clients"]["p50"] for name in ("corank", "nothing"))
    fast, fastest = (http[f"{name}, {most} candidates, {many} clients"]["per_second"] for name in ("corank", "nothing"))
    results = {
        "features_milliseconds": parts[most]["features"],
        "model_milliseconds": parts[most]["model"],
        "hit_over_scoring": parts[most]["remembered"] / parts[most]["scoring"],
        "overhead_over_nothing": own / (nothing + parts[most]["features"] + parts[most]["model"]),
        "p50_over_goal": own / (nothing + 1.15 * (parts[most]["features"] + parts[most]["model"])),
        "throughput_of_nothing": fast / fastest,
        "merging_gain": fast / http[f"unmerged, {most} candidates, {many} clients"]["per_second"],
        "memo_gain": fast / http[f"without memo, {most} candidates, {many} clients"]["per_second"],
        "small_p99_beside_large": beside / alone,
    }
    results = {name: float(value) for name, value in results.items()}
    goals = {
        "features_milliseconds": at_most(1.0, None if quick else results["features_milliseconds"]),
        "hit_over_scoring": at_most(1.05, None if quick else results["hit_over_scoring"]),
        "p50_over_goal": at_most(1.0, None if quick else results["p50_over_goal"]),
        "throughput_of_nothing": at_least(0.6, None if quick else results["throughput_of_nothing"]),
        "small_p99_beside_large": at_most(1.5, None if quick else results["small_p99_beside_large"]),
    }
    print_results("serving", results, goals)


if __name__ == "__main__":
    main()
