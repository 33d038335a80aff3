"""The state of a pipeline: how far its partitions are, what works on it now, and what blocks it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.stages.deployment import CURRENT, DEPLOYMENT
from pipeline.stages.evaluation import EVALUATION
from pipeline.stages.samples import SAMPLES
from pipeline.stages.validated import VALIDATED
from pipeline.watch import Readiness, retraining_text, retrainings
from pipeline.workspace import Workspace, holder, typed_command

if TYPE_CHECKING:
    from pipeline.workspace.registry import ModelVersion


def reached(workspace: Workspace, waiting: Sequence[Readiness]) -> dict[str, list[str]]:
    """The partitions that are ready, validated, built, trained on by the champion, and by the version that is live.

    Args:
        waiting: the newest partitions (:func:`pipeline.watch.readiness`).
    """
    log, registry = workspace.log, workspace.registry
    waits = {state.partition for state in waiting if state.waits_for}
    invalid, unbuilt = set(VALIDATED.stale(workspace)), set(SAMPLES.stale(workspace))
    deployed = workspace.records.read(DEPLOYMENT, CURRENT)
    live = next((version for version in registry.versions() if deployed and version.number == deployed.number), None)
    return {
        "ready": [partition for partition in log.shown if partition not in waits],
        "validated": [partition for partition in log.partitions if partition not in invalid],
        "built": [partition for partition in log.partitions if partition not in unbuilt],
        "trained": _trained(workspace, registry.champion()),
        "live": _trained(workspace, live),
    }


def _trained(workspace: Workspace, version: ModelVersion | None) -> list[str]:
    newest = version.tags.get("trained", version.tags.get("partition", "")) if version else ""
    return [partition for partition in workspace.log.partitions if partition <= newest]


def runs_now(config: Config) -> list[str]:
    """The command that holds the workspace, its stage, and what Dagster runs or has in its queue."""
    import psutil
    from dagster import DagsterRunStatus, RunsFilter

    from pipeline.dag import WORKSPACE, has_history, open_instance

    lines, owner = [], holder(config)
    if owner is not None and owner[1]:
        line = f"process {owner[0]}"
        try:
            process = psutil.Process(owner[0])
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(process.create_time()))
            line += f" since {since}: {typed_command(process.cmdline())}"
        except psutil.Error:
            line += ", of which this user may not know more"
        lines.append(line)
    if not has_history(config):
        return lines
    going = RunsFilter(statuses=[DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING, DagsterRunStatus.STARTED])
    with open_instance(config) as instance:
        for run in instance.get_runs(going):
            if WORKSPACE not in run.tags:
                lines.append(retraining_text(instance, run))
            elif lines and run.tags[WORKSPACE] == str(config.local_path()):  # else its command was killed
                steps = instance.get_run_step_stats(run.run_id)
                lines += [
                    f"stage {step.step_key}" for step in steps if step.status and step.status.value == "IN_PROGRESS"
                ]
    return lines


def blocked(workspace: Workspace, waiting: Sequence[Readiness], served: Mapping[str, Any] | None) -> list[str]:
    """What blocks the pipeline, and why.

    Args:
        waiting: the newest partitions (:func:`pipeline.watch.readiness`).
        served: what the endpoint says of its model, if it is up.
    """
    from pipeline.dag import has_history, open_instance

    registry, records = workspace.registry, workspace.records
    lines = [f"partition {state.partition} waits for {state.waits_for}" for state in waiting if state.waits_for]
    lines += [f"partition {partition} has no impressions (validation.allow_gaps)" for partition in _gaps(workspace)]
    for partition in VALIDATED.stale(workspace):
        record = records.read(VALIDATED, partition)
        if record is not None and not record.passed:
            why = record.findings[0]["message"] if record.findings else f"see {record.data_docs}"
            lines.append(f"partition {partition} did not pass its validation: {why}")
    champion = registry.champion()
    for version in registry.versions():
        if champion is not None and version.number <= champion.number:
            break
        verdict = records.read(EVALUATION, version.tags.get("evaluation", ""))
        if why := version.tags.get("failed live"):
            lines.append(f"version {version.number} failed live: {why}")
        elif verdict is not None and verdict.reasons:
            lines.append(f"version {version.number} was refused: {'; '.join(verdict.reasons)}")
    if served and (refused := served.get("refused")):
        lines.append(f"the service refuses {refused['artifact']}: {refused['why']}")
    if has_history(workspace.config):
        with open_instance(workspace.config) as instance:
            newest = retrainings(instance, 1)
            lines += [retraining_text(instance, run) for run in newest if run.status.value == "FAILURE"]
    owner = holder(workspace.config)
    if owner is not None and not owner[1]:
        lines.append(f"the last command (process {owner[0]}) was killed; the same command goes on from where it was")
    return lines


def _gaps(workspace: Workspace) -> list[str]:
    return [] if workspace.config.validation.allow_gaps else workspace.log.gaps()
