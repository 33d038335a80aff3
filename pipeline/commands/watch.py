"""``corank watch``: retrainings that start by themselves, and Dagster's web UI, until Ctrl-C."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from features.errors import CorankError
from pipeline.commands.common import ConfigOption, DebugOption, guarded, load

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from pipeline.config import Config

STOP_SECONDS = 10.0
SHOWN_RUNS = 5
RUNS_SECONDS = 5.0
"""Between two looks at how the retrainings go."""


def watch(
    config: ConfigOption,
    host: Annotated[str, typer.Option(help="Where Dagster's web UI listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of Dagster's web UI.")] = 3000,
    debug: DebugOption = False,
) -> None:
    """Watch the log's tables and retrain on every new partition that is ready, until Ctrl-C.

    Shows what every new partition waits for (trigger.closed), and how the retrainings went. Runs Dagster's daemon and
    web UI on this machine; a retraining runs beside a service that `corank serve` keeps up.
    """
    with guarded(debug):
        from pipeline.dag import open_instance
        from serving.ports import require_free

        loaded = load(config)
        require_free(host, port)
        log = loaded.local_path("dagster.log")
        with open_instance(loaded) as instance, _dagster(loaded, Path(config).resolve(), host, port, log) as dagster:
            typer.echo(
                f"watching every {loaded.trigger.interval_seconds} s; web UI at http://{host}:{port}, log in {log}"
            )
            shown: list[str] = []
            waiting: list[str] = []
            looked = -math.inf
            while True:
                if time.monotonic() - looked >= loaded.trigger.interval_seconds:
                    waiting, looked = _waiting(loaded), time.monotonic()
                lines = [*waiting, *_runs(instance)]
                for line in lines:
                    if line not in shown:
                        typer.echo(f"{time.strftime('%H:%M:%S')}  {line}")
                shown = lines
                if dagster.poll() is not None:
                    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
                    raise CorankError(f"Dagster has ended, see {log}: " + "\n".join(last))
                time.sleep(min(loaded.trigger.interval_seconds, RUNS_SECONDS))


def _waiting(config: Config) -> list[str]:
    """What every new partition waits for, as the sensor sees it."""
    from pipeline.progress import Progress
    from pipeline.watch import readiness
    from pipeline.workspace import Workspace

    try:
        workspace = Workspace(config, Progress())
        states = readiness(workspace)
        if workspace.registry.champion() is None:
            return ["there is no champion yet; `corank run` trains the first"]
    except CorankError as error:  # it may be mended while this watches
        return [f"the log cannot be read: {error}"]
    lines = [
        f"partition {state.partition} " + (f"waits for {state.waits_for}" if state.waits_for else "is ready")
        for state in states
    ]
    return lines or [f"all partitions up to {workspace.log.shown[-1]} are covered by a version"]


def _runs(instance: DagsterInstance) -> list[str]:
    """The newest retrainings that were started, oldest first, and how they stand."""
    from pipeline.watch import retraining_text, retrainings

    return [retraining_text(instance, run) for run in reversed(retrainings(instance, SHOWN_RUNS))]


@contextmanager
def _dagster(config: Config, path: Path, host: str, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Dagster's daemon and web UI beside this process. They and their runs end with the block."""
    import psutil

    home = Path(os.environ.get("DAGSTER_HOME") or config.local_path("dagster"))
    command = [sys.executable, "-m", "dagster", "dev", "-m", "pipeline.definitions", "-h", host, "-p", str(port)]
    environment = {**os.environ, "DAGSTER_HOME": str(home), "CORANK_CONFIG": str(path)}
    with log.open("w") as stream:
        started = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        process = psutil.Process(started.pid)
        try:
            yield started
        finally:
            family = [process, *process.children(recursive=True)] if process.is_running() else []
            for member in family:
                member.terminate()
            for member in psutil.wait_procs(family, STOP_SECONDS)[1]:
                member.kill()
