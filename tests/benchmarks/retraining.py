"""What a retraining costs, what it is worth where tastes drift, and what a client of the endpoint notices of it.

``python -m tests.benchmarks.retraining [--quick] [--only cost|live|worth]`` on ``import synthetic`` with drift:

* cost: CPU seconds of ``corank retrain`` on one new day, against those of ``corank run`` on all days up to it;
* worth: AUC on every next day, before anything trains on it, of champions that are retrained daily from the one before,
  of models that are trained from scratch daily, and of the first one, frozen;
* live: 8 clients ask the endpoint while days are retrained one after the other: answers that failed, and answers that
  differ from another one of the same model to the same request.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from pipeline.config import Config
from pipeline.cost import costs
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.runtime import quiet, stop_ray
from pipeline.stages import pending
from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.progressive_validation import PROGRESSIVE_VALIDATION
from pipeline.stages.samples import FOREVER, sample_source
from pipeline.workspace import Workspace
from serving.client import RankingClient
from serving.ports import endpoint_url
from tests.benchmarks.measure import at_least, at_most, print_results
from tests.pipeline.workspaces import load, make

START = "2026-01-05"
CLIENTS = 8
PAUSE = 0.25
"""Seconds between two requests of a client: load, but not more than two cores can answer beside a training."""
Found = tuple[dict[str, float], dict[str, Any]]
"""Results and goals of a part."""

COMMAND = [sys.executable, "-c", "from pipeline.cli import main; main()"]


@dataclass(frozen=True)
class Size:
    """Of a benchmark: users and items of the first day, days of the first run and those that follow, days before the
    retraining whose cost is measured."""

    users: int
    items: int
    first: int
    days: int
    epochs: int
    before: int


FULL = Size(users=3_000, items=1_000, first=3, days=14, epochs=2, before=30)
QUICK = Size(users=60, items=40, first=3, days=2, epochs=1, before=5)


def config_of(folder: Path, size: Size, **changes: Any) -> Config:
    """The synthetic example, whose gate lets everything pass: what is judged here is the retraining."""
    training = {"epochs": size.epochs, "num_workers": 0}
    return load(folder, folder / "data", training=training, holdout={"test": 0.1, "validation": 0.1}, **changes)


def write_days(folder: Path, size: Size, days: int) -> None:
    import_synthetic(folder / "data", days, size.users, size.items, 3, START, 2, drift=2.0, say=lambda _: None)


# --- what it is worth ---------------------------------------------------------------------------------


def curves(folder: Path, size: Size) -> dict[str, list[float]]:
    """AUC of clicks on every next day: retrained daily, from scratch daily, frozen."""
    from pipeline.evaluation.scoring import score_source, scored_metrics

    found: dict[str, list[float]] = {"warm": [], "scratch": [], "frozen": []}
    config = config_of(folder, size)
    for day in range(size.first, size.first + size.days):
        write_days(folder, size, day + 1)
        newest = Workspace(config, Progress(), warm_start=True)
        if day == size.first:  # the first model, of the days before
            _run(Workspace(config, Progress(), until=newest.partitions[-2]))
            newest = Workspace(config, Progress(), warm_start=True)
        partition = newest.partitions[-1]
        # what the day before left to learn from, from scratch
        before = Workspace(config, Progress(), until=newest.partitions[-2], from_scratch=True)
        key = CHALLENGER.key(before)
        scratch = before.records.read(CHALLENGER, key) or make(CHALLENGER, before)
        _run(newest)
        record = newest.records.require(PROGRESSIVE_VALIDATION, partition)
        for name, number in (("warm", record.champion), ("frozen", record.frozen)):
            found[name].append(float(record.versions_scored[str(number)]["click"]["auc"] or np.nan))
        metrics = scored_metrics(
            config.schema_, score_source(scratch.artifact, sample_source(newest, 0, FOREVER, (partition,)))
        )
        found["scratch"].append(float(metrics["click"]["auc"] or np.nan))
    return found


def _run(workspace: Workspace) -> None:
    from pipeline.dag import run_dag

    run_dag(workspace, [one for one in pending(workspace) if one != "deployment"])


# --- what it costs ------------------------------------------------------------------------------------


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds of a command and all its processes, Ray's included, as last seen before they ended."""
    process = psutil.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    used: dict[tuple[int, float], float] = {}
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout), daemon=True)
    reader.start()
    while process.poll() is None:
        for one in [process, *process.children(recursive=True)]:
            try:
                times = one.cpu_times()
                used[one.pid, one.create_time()] = times.user + times.system
            except psutil.Error:
                continue
        time.sleep(0.2)
    reader.join(5)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{''.join(output[-30:])}")
    return sum(used.values())


def cost(folder: Path, size: Size) -> tuple[float, float]:
    """CPU seconds of a run on all days but the last, and of a retraining on the last; where they went is printed."""
    write_days(folder, size, size.before)
    config = config_of(folder, size)
    path = str(folder / "config.yaml")
    whole = cpu_seconds(["run", "--config", path])
    write_days(folder, size, size.before + 1)
    one_day = cpu_seconds(["retrain", "--config", path])
    workspace = Workspace(config, Progress())
    for partition in workspace.partitions[-2:]:
        for stage, entry in costs(workspace.records, partition).items():
            print(f"  {partition} {stage:<24} {entry['cpu_seconds']:>8.1f} CPU s {entry['seconds']:>8.1f} s")
    return whole, one_day


# --- what a client notices ----------------------------------------------------------------------------


@dataclass
class Answers:
    """What clients got; several threads add to it."""

    failed: list[str] = field(default_factory=list)
    scores: dict[tuple[str, int], Any] = field(default_factory=dict)
    differing: int = 0
    models: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, request: int, answer: dict[str, Any]) -> None:
        model, scores = answer["model_version"], np.array(answer["scores"]["click"])
        with self.lock:
            self.models[model] += 1
            known = self.scores.setdefault((model, request), scores)
            # requests that wait together are merged, so that sums are taken in another order
            self.differing += not np.allclose(known, scores, atol=1e-5, rtol=0)


def live(folder: Path, size: Size, retrainings: int) -> tuple[Answers, float]:
    """Answers of an endpoint to 8 clients while days are retrained, and the longest wait in seconds.

    The requests are of users and items that nobody knows, as what is stored of others changes with every day: so one
    model has one answer to each.
    """
    write_days(folder, size, size.first)
    config = config_of(folder, size)
    path = str(folder / "config.yaml")
    _command("run", path)
    url, answers, ended = endpoint_url(config.serving.host, config.serving.port), Answers(), threading.Event()
    waits: list[float] = []
    service = subprocess.Popen([*COMMAND, "serve", "--config", path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _until_up(url, service)
        items, devices = [f"nothing {number}" for number in range(20)], ("desktop", "mobile", "tablet", "tv")

        def ask(client_number: int) -> None:
            with RankingClient(url, timeout=60.0) as client:
                number = client_number
                while not ended.is_set():
                    number += CLIENTS
                    started = time.perf_counter()
                    try:
                        context = {"device": devices[number % 4]}
                        answers.add(number % 40, client.rank(f"stranger {number % 40}", items, context, ts=number % 40))
                    except Exception as error:  # counted, and printed
                        with answers.lock:
                            answers.failed.append(f"{type(error).__name__}: {error}")
                    waits.append(time.perf_counter() - started)
                    ended.wait(PAUSE)

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for done in range(retrainings):
            write_days(folder, size, size.first + done + 1)
            _command("retrain", path)
        time.sleep(2.0)  # the last one answers a while, too
        ended.set()
        for client in clients:
            client.join()
    finally:
        ended.set()
        service.terminate()
        service.wait(60)
    return answers, max(waits)


def _command(name: str, path: str) -> None:
    done = subprocess.run([*COMMAND, name, "--config", path], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def _until_up(url: str, service: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 180
    with RankingClient(url, timeout=5.0) as client:
        while True:
            try:
                client.healthz()
                return
            except Exception as error:
                if service.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the service did not start: {error}") from error
                time.sleep(0.5)


def _cost(folder: Path, size: Size, quick: bool) -> Found:
    whole, one_day = cost(folder, size)
    share = one_day / whole
    print(f"cost: run on {size.before} days {whole:.1f} CPU s, retraining on one more {one_day:.1f}")
    results = {"run_cpu_seconds": whole, "retraining_cpu_seconds": one_day, "retraining_cpu_share_of_run": share}
    return results, {"retraining_cpu_share_of_run": at_most(0.10, None if quick else share)}


def _live(folder: Path, size: Size, quick: bool) -> Found:
    answers, longest = live(folder, size, 1 if quick else 3)
    total, wrong = sum(answers.models.values()), len(answers.failed) + answers.differing
    print(
        f"live: {total:,} answers by {len(answers.models)} models, {len(answers.failed)} failed, "
        f"{answers.differing} differ, longest wait {longest:.2f} s"
    )
    for failure, count in Counter(answers.failed).most_common(5):
        print(f"  {count} × {failure}")
    if wrong:
        raise SystemExit("answers failed or differ")
    results = {"answers": total, "models_that_answered": len(answers.models), "longest_wait_seconds": longest}
    return results, {"failed_or_differing": at_most(0, None if quick else wrong)}


def _worth(folder: Path, size: Size, quick: bool) -> Found:
    try:
        found = curves(folder, size)
    finally:
        stop_ray()
    table = Table("next day", *found, title="AUC of clicks on a day that no model has trained on")
    for index, values in enumerate(zip(*found.values(), strict=True)):
        table.add_row(str(size.first + index + 1), *(f"{value:.4f}" for value in values))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    table.add_row("mean", *(f"{value:.4f}" for value in means.values()))
    Console().print(table)
    print(json.dumps({"curves": found}))
    goals = {
        "warm_minus_scratch": at_least(-0.002, None if quick else means["warm"] - means["scratch"]),
        "warm_minus_frozen": at_least(0.002, None if quick else means["warm"] - means["frozen"]),
    }
    return {f"next_day_auc_{name}": value for name, value in means.items()}, goals


PARTS: dict[str, Callable[[Path, Size, bool], Found]] = {"cost": _cost, "live": _live, "worth": _worth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny: for correctness, not for speed or quality")
    parser.add_argument("--only", choices=list(PARTS), default=None, help="one of the three")
    options = parser.parse_args()
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    quiet()
    results, goals = dict[str, float](), dict[str, Any]()
    for name in [options.only] if options.only else PARTS:
        with tempfile.TemporaryDirectory() as folder:
            own, limits = PARTS[name](Path(folder), QUICK if options.quick else FULL, options.quick)
        results |= own
        goals |= limits
    print_results("retraining", results, goals)


if __name__ == "__main__":
    main()
