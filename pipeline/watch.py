"""Retrainings that start by themselves: which new partitions are ready, and the Dagster job, sensor and schedule.

The key of a requested run is made of the fingerprints of all partitions that it would take. So the same run is
requested only once, however often the tables are read or compacted and the daemon restarts. Dagster's queue runs one
at a time.
"""

# no postponed annotations here: Dagster reads them

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import httpx

from features.digest import digest
from features.errors import CorankError
from features.schema import SECOND
from pipeline.config import Config
from pipeline.progress import Progress
from pipeline.trigger import MARKER
from pipeline.workspace import Workspace, close_text

PARTITION = "corank/partition"
TAIL_LINES = 20


@dataclass(frozen=True)
class Readiness:
    """A partition that no version covers; ``waits_for`` is empty when it is ready."""

    partition: str
    waits_for: str


@dataclass(frozen=True)
class Due:
    """What a retraining would take now.

    Attributes:
        partition: the newest one that is ready, as all before it are.
        key: digest of all that it would be made from.
    """

    partition: str
    key: str


def readiness(workspace: Workspace) -> list[Readiness]:
    """Every partition newer than what the versions cover, oldest first, and what it waits for."""
    log = workspace.log
    covered = max((version.tags["partition"] for version in workspace.registry.versions()), default="")
    rule, found = _Rule(workspace), []
    for partition in sorted(name for name in log.present if name > covered):
        found.append(Readiness(partition, rule.waits_for(partition)))
    return found


def due(workspace: Workspace) -> Due | None:
    """The retraining that new partitions, new labels or late rows ask for; None without a champion."""
    if workspace.registry.champion() is None:
        return None
    log = workspace.log
    states = {state.partition: state.waits_for for state in readiness(workspace)}
    taken = []
    for partition in log.shown:
        if states.get(partition):
            break
        taken.append(partition)
    if not taken:
        return None
    made_from = [[name, log.fingerprint(name), log.labels(name), log.is_attributed(name)] for name in taken]
    return Due(taken[-1], digest(made_from))


class _Rule:
    """When a partition is closed and complete, by the config's ``trigger.closed``."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.log, self.config = workspace, workspace.log, workspace.config.trigger
        logs = [role for role in self.log.config.schema_.logs if role in self.log.versions]
        chosen = self.config.wait_for
        awaited = logs if chosen is None else [role for role in logs if role in ("impressions", *chosen)]
        self.reaches = {role: max(self.log.tables[role].partitions(), default="") for role in awaited}
        # only these rules need the commits, and reading all of them takes long
        needed = {"marker": ["impressions"], "quiet": logs}.get(self.config.closed, [])
        self.histories = {role: self.log.tables[role].delta().history() for role in needed}
        commits = self.histories.get("impressions", [])
        self.marked = {name for commit in commits for name in re.split(r"[,\s]+", str(commit.get(MARKER, "")))}

    def waits_for(self, partition: str) -> str:
        close = self.log.bounds(partition)[1]
        if close > self.log.now:
            return f"its end, {close_text(close)}"
        if partition not in self.log.shown:
            return "impressions"
        behind = [role for role, newest in self.reaches.items() if newest < partition]
        if behind:
            return f"rows of {', '.join(behind)}"
        closed = self.config.closed
        if closed == "next" and self.reaches["impressions"] <= partition:
            return "impressions of a later partition"
        if closed == "marker" and partition not in self.marked:
            return f"a commit to impressions with the metadata {MARKER}: {partition}"
        if closed == "quiet":
            until = self._last_touched(partition) + round(self.config.quiet_minutes * 60 * SECOND)
            if until > self.log.now:
                return f"no more commits until {close_text(until)}"
        return ""

    def _last_touched(self, partition: str) -> int:
        """Time of the last commit to a partition, microseconds UTC; of the table's newest commit if in doubt."""
        last = 0
        for role, mark in self.log.fingerprint(partition).items():
            times = {commit["version"]: int(commit["timestamp"]) * 1_000 for commit in self.histories.get(role, [])}
            version = str(mark).rpartition("@")[2]
            newest = max(times.values(), default=0)
            last = max(last, times.get(int(version), newest) if version.isdecimal() else newest)
        return last


def retraining_definitions(config: Config, path: Path) -> dg.Definitions:
    """The job ``retrain`` with what starts it: a sensor on the tables, or a schedule."""
    options = config.trigger

    @dg.failure_hook
    def alert(context: dg.HookContext) -> None:
        raise_alert(config, f"corank: {config.name}: a retraining failed: {context.op_exception}")

    @dg.op(
        name="corank_retrain",
        retry_policy=dg.RetryPolicy(
            max_retries=options.retries, delay=options.backoff_seconds, backoff=dg.Backoff.EXPONENTIAL
        ),
    )
    def retrain_op(context: dg.OpExecutionContext) -> None:
        partition = context.run.tags.get(PARTITION)
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", "retrain", "--config", str(path)]
        _run(command + (["--partition", partition] if partition else []), context.log.info)

    @dg.job(name="retrain", hooks={alert}, executor_def=dg.in_process_executor)
    def retrain_job() -> None:
        retrain_op()

    @dg.sensor(
        job=retrain_job,
        minimum_interval_seconds=options.interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    def new_partitions() -> Iterator[dg.RunRequest | dg.SkipReason]:
        """New partitions that are ready, labels that became known, rows that came late."""
        workspace = Workspace(config, Progress())
        waiting = [
            f"{state.partition} waits for {state.waits_for}" for state in readiness(workspace) if state.waits_for
        ]
        asked = due(workspace)
        if asked is None:
            yield dg.SkipReason("; ".join(waiting) or "there is no champion yet: `corank run` trains the first")
            return
        yield dg.RunRequest(run_key=asked.key, tags={PARTITION: asked.partition})

    if options.cron is None:
        return dg.Definitions(jobs=[retrain_job], sensors=[new_partitions])
    schedule = dg.ScheduleDefinition(
        name="retrain_on_schedule",
        job=retrain_job,
        cron_schedule=options.cron,
        default_status=dg.DefaultScheduleStatus.RUNNING,
    )
    return dg.Definitions(jobs=[retrain_job], schedules=[schedule])


def retrainings(instance: dg.DagsterInstance, count: int) -> list[dg.DagsterRun]:
    """The newest retrainings that the sensor or the schedule started, newest first."""
    return list(instance.get_runs(dg.RunsFilter(job_name="retrain"), limit=count))


def retraining_text(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """The state of a retraining, and why it failed."""
    line = f"retraining {run.run_id[:8]} on {run.tags.get(PARTITION, 'schedule')}: {run.status.value.lower()}"
    if run.status == dg.DagsterRunStatus.FAILURE:
        failures = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
        causes = [failure.dagster_event.step_failure_data.error for failure in failures if failure.dagster_event]
        while causes and causes[-1] is not None and causes[-1].cause is not None:
            causes.append(causes[-1].cause)
        if causes and causes[-1] is not None:
            line += f": {causes[-1].message.strip()}"
    return line


def _run(command: list[str], say: Any) -> None:
    """Run a command to its end; its lines are logged.

    Raises:
        CorankError: the command failed; with its last lines.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace"
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                lines = [*lines[-TAIL_LINES:], line.rstrip()]
                say(line.rstrip())
        code = process.wait()
    finally:
        if process.poll() is None:  # the run was stopped
            process.terminate()
            process.wait()
    if code:
        at = next((index for index, line in enumerate(lines) if line.startswith("error:")), max(len(lines) - 3, 0))
        raise CorankError("\n".join(lines[at:]) or f"it ended with {code}")


def raise_alert(config: Config, message: str) -> None:
    """Send a message by the config's command and webhook.

    Raises:
        CorankError: the command or the webhook failed.
    """
    options = config.trigger
    if options.alert_command:
        environment = {**os.environ, "CORANK_ALERT": message}
        done = subprocess.run(options.alert_command, shell=True, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise CorankError(f"trigger.alert_command ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    if options.alert_webhook:
        try:
            httpx.post(options.alert_webhook, json={"text": message}, timeout=10.0).raise_for_status()
        except httpx.HTTPError as error:
            raise CorankError(f"trigger.alert_webhook {options.alert_webhook}: {error}") from error
