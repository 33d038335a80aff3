"""What survives: damaged files of every kind, a disk that fills up in every stage, kills of every kind of process.

``python -m tests.benchmarks.crashwalk [--quick] [--only damage|disk|kill]``: a small world is run once undisturbed.
Then, for every case, the same world is disturbed by real means in real processes, and the next `corank run` (after
`corank repair`, where a file was damaged) must end as the undisturbed one did: equal rows, model, versions and store.
Disks need root, who may mount one. --quick: a case or two of each.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table as PrintedTable

from pipeline.config import Config
from pipeline.importers.synthetic import import_synthetic
from pipeline.runtime import quiet
from pipeline.stages import STAGES
from pipeline.workspace.registry import forget_connections
from tests.benchmarks.measure import at_least, print_results
from tests.damages import DAMAGES
from tests.disks import filled, small_disk
from tests.pipeline.test_resume import COMMAND, outcome
from tests.pipeline.workspaces import START, load

FILES = (
    "records/validated/*.json",
    "records/samples/*.json",
    "records/feature_store/*.json",
    "records/challenger/*.json",
    "records/evaluation/*.json",
    "records/refit/*.json",
    "records/champion/*.json",
    "records/deployment/*.json",
    "records/log/*.json",
    "records/types/*.json",
    "tables/samples/dt=*/*/*.parquet",
    "tables/state/dt=*/*/*.parquet",
    "tables/user_aggregates/dt=*/*/*.parquet",
    "tables/item_aggregates/dt=*/*/*.parquet",
    "tables/state/_delta_log/*.json",
    "models/*/model.safetensors",
    "models/*/model.yaml",
    "models/*/SHA256SUMS",
    "checkpoints/*/*/state.pt",
    "mlflow/mlflow.db",
    "mlflow/artifacts/*/*/model/model.safetensors",
    "feast/registry.db",
    "feast/online.db",
    "dagster/history/runs.db",
    "great_expectations/gx/great_expectations.yml",
    "great_expectations/gx/expectations/*.json",
)
"""A file of every kind, below the workspace."""

QUICK_CASES = (("tables/state/dt=*/*/*.parquet", "flipped"), ("feast/online.db", "lost"))
VICTIMS = {"driver": "", "worker": "ray::", "raylet": "raylet", "GCS": "gcs_server"}
"""Whom a kill meets → how the name of its process begins."""

DISK_MEGABYTES, LEFT_BYTES = 300, 50_000
SECONDS = 300.0
"""After so long a command that has not ended counts as hung."""


@dataclass(frozen=True)
class Case:
    """What was done, where, what the disturbed command said, and how the next run ended."""

    done: str
    where: str
    said: str
    ended: str

    @property
    def survived(self) -> bool:
        return self.ended == "as the undisturbed one"


class World:
    """A small log in a folder, its config, and what an undisturbed run makes of it."""

    def __init__(self, folder: Path, work: Path) -> None:
        data = folder / "data"
        if not data.exists():
            import_synthetic(data, days=2, users=60, items=60, seed=2, start=START, buckets=2, say=lambda _: None)
        self.folder, self.work = folder, work
        self.config: Config = load(folder, data, workspace=str(work))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        log = (self.folder / "command.log").open("w")
        command = [*COMMAND, *(arguments or ("run",)), "--config", str(self.folder / "config.yaml")]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def said(self) -> str:
        return (self.folder / "command.log").read_text()

    def command(self, *arguments: str) -> int:
        """Exit code of a command; -1 when it hung."""
        return self.wait(self.start(*arguments))

    def wait(self, process: subprocess.Popen[str]) -> int:
        try:
            return process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return -1

    def outcome(self) -> dict[str, Any]:
        forget_connections()
        return outcome(self.config)

    def ended(self, expected: dict[str, Any]) -> str:
        """How the next run ends."""
        code = self.command("run")
        if code:
            return "hung" if code < 0 else f"exit {code}: {_last_line(self.said())}"
        found = self.outcome()
        differing = [name for name, value in expected.items() if found.get(name) != value]
        return f"others: {', '.join(differing)}" if differing else "as the undisturbed one"


def damages(folder: Path, quick: bool) -> Iterator[Case]:
    """A damaged file of every kind, then `corank repair` and `corank run`."""
    world, kept = World(folder / "damage", folder / "damage" / "work"), folder / "damage" / "kept"
    _require(world.command("run") == 0, world)
    expected = world.outcome()
    shutil.copytree(world.work, kept)
    cases = QUICK_CASES if quick else [(pattern, how) for pattern in FILES for how in DAMAGES]
    for pattern, how in cases:
        shutil.rmtree(world.work)
        shutil.copytree(kept, world.work)
        path = sorted(world.work.glob(pattern))[-1]
        DAMAGES[how](path)
        world.command("repair")
        said = next((line for line in world.said().splitlines() if str(path.name) in line), "nothing of it")
        yield Case(how, pattern, said.replace(f"{world.work}/", ""), world.ended(expected))


def full_disks(folder: Path, quick: bool) -> Iterator[Case]:
    """The workspace's disk is filled when the stage before is done; then there is room again."""
    calm = World(folder / "calm", folder / "calm" / "work")
    _require(calm.command("run") == 0, calm)
    expected = calm.outcome()
    stages = [stage.name for stage in STAGES]
    for before, name in list(zip(["", *stages], stages, strict=False))[: 1 if quick else None]:
        with small_disk(folder / f"disk-{name}", DISK_MEGABYTES) as disk:
            world = World(folder / f"full-{name}", disk / "work")
            process = world.start()
            _when(process, lambda work=world.work, one=before: not one or any(work.glob(f"records/{one}/*.json")))
            with filled(disk, LEFT_BYTES):
                code = world.wait(process)
            said = world.said()
            told = code == 1 and "No space left on device" in said and "Traceback" not in said
            message = next((line for line in said.splitlines() if line.startswith("error")), _last_line(said))
            ended = world.ended(expected)
            yield Case("disk full", name, message, ended if told else f"exit {code}, not told; {ended}")


def kills(folder: Path, quick: bool) -> Iterator[Case]:
    """SIGKILL of each kind of process at the boundary of every stage, and a random time after it."""
    calm = World(folder / "calm", folder / "calm" / "work")
    _require(calm.command("run") == 0, calm)
    expected, chance = calm.outcome(), random.Random(0)
    stages = [stage.name for stage in STAGES][:-1]
    cases = [(who, stage, later) for who in VICTIMS for stage in stages for later in (0.0, chance.uniform(0.2, 4.0))]
    for number, (who, stage, later) in enumerate(cases[:1] if quick else cases):
        world = World(folder / f"kill-{number}", folder / f"kill-{number}" / "work")
        process = world.start()
        _when(process, lambda work=world.work, one=stage: any(work.glob(f"records/{one}/*.json")))
        time.sleep(later)
        victim = _victim(process.pid, VICTIMS[who])
        if victim is not None:
            victim.kill()
        code = world.wait(process)
        said = f"exit {code}: {_last_line(world.said())}" if victim else "no such process at that time"
        yield Case(f"kill {who}", f"{later:.1f} s after {stage}", said, world.ended(expected))


def _when(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Wait until something happened, or the process ended."""
    while process.poll() is None and not happened():
        time.sleep(0.02)


def _victim(pid: int, name: str) -> psutil.Process | None:
    try:
        command = psutil.Process(pid)
        if not name:
            return command
        below = command.children(recursive=True)
        return next((one for one in below if " ".join(one.cmdline()).rpartition("/")[2].startswith(name)), None)
    except psutil.NoSuchProcess:
        return None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _require(holds: bool, world: World) -> None:
    if not holds:
        raise SystemExit(f"the undisturbed run failed:\n{world.said()}")


WALKS: dict[str, Callable[[Path, bool], Iterator[Case]]] = {"damage": damages, "disk": full_disks, "kill": kills}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a case or two of each walk")
    parser.add_argument("--only", choices=list(WALKS), default=None, help="one of the walks")
    options = parser.parse_args()
    quiet()
    console, cases = Console(width=180), dict[str, list[Case]]()
    for name in [options.only] if options.only else WALKS:
        cases[name] = []
        with tempfile.TemporaryDirectory() as folder:
            try:
                for case in WALKS[name](Path(folder), options.quick):
                    console.print(f"{'✓' if case.survived else '✗'} {case.done}, {case.where}", highlight=False)
                    cases[name].append(case)
            except PermissionError as error:  # no disk can be mounted here
                console.print(f"{name}: not walked, {error}")
    table = PrintedTable("done", "where", "said", "the next run ended", title="what survives")
    for case in (case for own in cases.values() for case in own):
        table.add_row(case.done, case.where, case.said, case.ended)
    console.print(table)
    walked = {name: own for name, own in cases.items() if own}
    results = {f"{name}_cases": len(own) for name, own in walked.items()}
    survived = {name: sum(case.survived for case in own) / len(own) for name, own in walked.items()}
    goals = {f"{name}_survived": at_least(1.0, None if options.quick else share) for name, share in survived.items()}
    print_results("crashwalk", results | {f"{name}_survived": share for name, share in survived.items()}, goals)


if __name__ == "__main__":
    main()
