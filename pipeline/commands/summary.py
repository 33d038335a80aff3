"""What the command line prints about a pipeline: the summary of a run, its status, its models, an answer."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pipeline.evaluation.criterion import COLUMNS, cells, counts_text
from pipeline.evaluation.texts import classes_text, gain_text, number_text
from pipeline.progress import plain_console
from pipeline.stages import STAGES, pending
from pipeline.stages.challenger import CHALLENGER
from pipeline.stages.champion import CHAMPION
from pipeline.stages.deployment import CURRENT, DEPLOYMENT
from pipeline.stages.evaluation import EVALUATION, EvaluationRecord, report_path
from pipeline.stages.validated import VALIDATED, ValidatedRecord
from pipeline.workspace import Workspace, close_text
from pipeline.workspace.registry import PROMOTED_BY_HAND, REFUSED, ModelVersion

SHOWN_ITEMS = 10
SHOWN_CRITERIA = 12
"""Most criteria of a verdict that are all shown; of a longer verdict only those that failed are."""
SHOWN_CHAMPIONS = 5
FEW_STEPS = 100
"""A training with fewer steps is too short: the user is told that the model has hardly begun to learn."""


def print_summary(workspace: Workspace, answer: dict[str, Any] | None) -> None:
    """Rows in and out, validation, metrics, model, endpoint, an answer, and where things lie."""
    console, config = plain_console(), workspace.config
    records, key = workspace.records, EVALUATION.key(workspace)
    evaluation = records.read(EVALUATION, key)
    table = Table(
        "stage",
        "in",
        Column("out", overflow="fold"),
        title=f"{config.name}: {len(workspace.partitions)} partitions",
    )
    for stage in STAGES:
        if counts := stage.counts(workspace):
            table.add_row(stage.name, *counts)
    console.print(table)
    for role, log_table in workspace.log.tables.items():
        for column, instead in log_table.made().items() if log_table.exists() else ():
            console.print(f"note        table {role} has no {column}: {instead}")
    if evaluation:
        console.print(_metrics_table(evaluation))
        for task, entry in evaluation.tasks.items():
            console.print(f"{task:<11} {classes_text(entry)}")
        if evaluation.criteria:  # a record of an earlier version has none
            print_gate(console, evaluation)
    challenger = records.read(CHALLENGER, CHALLENGER.key(workspace))
    if challenger and (warning := few_steps(challenger.history)):
        console.print(f"warning     {warning}")
    champion, deployment = records.read(CHAMPION, key), records.read(DEPLOYMENT, CURRENT)
    if champion:
        console.print(f"model       {config.name} {champion.model}: {champion.outcome}")
    if deployment:
        verified = deployment.verified
        where = "verified   " if deployment.beside else f"endpoint    {deployment.url},"
        console.print(
            f"{where} version {deployment.number}; {verified['requests']} requests over HTTP equal the offline "
            f"scores within {verified['largest_difference']:.1e}"
        )
        if deployment.beside:
            console.print(f"endpoint    {_endpoint(workspace, _served(workspace))}", soft_wrap=True)
    if answer:
        print_answer(answer["request"], answer["answer"])
    _print_places(console, workspace, evaluation)


def print_gate(console: Console, evaluation: EvaluationRecord) -> None:
    """The verdict: all its criteria when they are few, else those that failed, and how many there are."""
    criteria = evaluation.criteria
    shown = criteria if len(criteria) <= SHOWN_CRITERIA else [failed for failed in criteria if failed.passed is False]
    if shown:
        table = Table(*COLUMNS, title="gate")
        for criterion in shown:
            table.add_row(*cells(criterion))
        console.print(table)
    console.print(
        f"gate        {'passed' if evaluation.passed else 'failed'}: {counts_text(criteria)}; all of them in the report"
    )


def few_steps(history: Sequence[Mapping[str, Any]]) -> str:
    """A remark on a training that had too few steps to learn; empty for all others."""
    steps = sum(entry.get("steps", FEW_STEPS) for entry in history)
    if steps >= FEW_STEPS:
        return ""
    return (
        f"the training had {steps} steps only; more data, more `training.epochs` or a smaller "
        "`training.batch_candidates` give it more"
    )


def _metrics_table(evaluation: EvaluationRecord) -> Table:
    table = Table("task", "", "AUC", "UAUC", "GAUC", "logloss", title="held-out newest requests")
    for task, entry in evaluation.tasks.items():
        others = {
            "baseline": entry["baseline"],
            **entry.get("references", {}),
            f"champion {evaluation.champion}": entry["champion"],
        }
        for name, row in ({"model": entry} | {name: row for name, row in others.items() if row}).items():
            numbers = [number_text(row[metric]) for metric in ("auc", "uauc", "gauc", "logloss")]
            table.add_row(task if name == "model" else "", name, *numbers)
        gain = entry["auc_gain_over_baseline"]
        if gain:
            table.add_row(
                "", "gain", f"{gain['difference']:+.4f}", f"interval: {gain['low']:+.4f} … {gain['high']:+.4f}"
            )
    return table


def print_answer(request: dict[str, Any], answer: dict[str, Any]) -> None:
    """The first items of a ranking, with scores per task and what was unknown."""
    console = plain_console()
    known = "" if not answer["cold_start"]["user"] else " (unknown: cold start)"
    table = Table(
        "rank",
        "item",
        *answer["tasks"],
        title=f"user {request['user_id']}{known}, {close_text(answer['request_ts'])}, model {answer['model_version']}",
    )
    position = {str(item): index for index, item in enumerate(request["candidates"])}
    for rank, item in enumerate(answer["ranking"][:SHOWN_ITEMS], start=1):
        index = position[str(item)]
        scores = [f"{answer['scores'][task][index]:.4f}" for task in answer["tasks"]]
        unknown = " (unknown)" if item in answer["cold_start"]["items"] else ""
        table.add_row(str(rank), f"{item}{unknown}", *scores)
    console.print(table)
    if len(answer["ranking"]) > SHOWN_ITEMS:
        console.print(f"… and {len(answer['ranking']) - SHOWN_ITEMS} more")


def _print_places(console: Console, workspace: Workspace, evaluation: EvaluationRecord | None) -> None:
    config = workspace.config
    newest = workspace.records.read(VALIDATED, workspace.partitions[-1]) or ValidatedRecord()
    home = config.local_path("dagster")
    for what, where in (
        ("report", report_path(config, evaluation.model) if evaluation else "–"),
        ("Data Docs", newest.data_docs),
        ("MLflow", f"mlflow ui --backend-store-uri {shlex.quote(workspace.registry.uri)}"),
        ("Dagster", f"DAGSTER_HOME={shlex.quote(str(home))} CORANK_CONFIG=… dagster dev -m pipeline.definitions"),
        ("everything", config.path()),
    ):
        console.print(f"{what:<11} {where}", soft_wrap=True)


def print_status(workspace: Workspace) -> None:
    """How far the partitions are, what is left, champions, what is served, what runs now, and what is blocked."""
    from pipeline.report import history
    from pipeline.status import blocked, reached, runs_now
    from pipeline.watch import readiness

    console = plain_console()
    left, waiting, served = pending(workspace), readiness(workspace), _served(workspace)
    partitions = workspace.partitions
    console.print(f"log         {len(partitions)} closed partitions, {partitions[0]} … {partitions[-1]}")
    table = Table("partitions", "count", "newest")
    for what, reached_partitions in reached(workspace, waiting).items():
        table.add_row(what, f"{len(reached_partitions)}", reached_partitions[-1] if reached_partitions else "–")
    console.print(table)
    console.print("work left   " + (f"{', '.join(left)} (`corank run`)" if left else "none"))
    champion = workspace.registry.champion()
    if CHALLENGER.name in left and champion:
        console.print("            `corank retrain` trains on partitions and labels that are new, not on late rows")
    champions = [life for life in history(workspace, workspace.registry.versions()) if life.promoted][:SHOWN_CHAMPIONS]
    if champions:
        task = workspace.config.gate_task
        table = Table("champions", "alias", "model", "up to partition", f"{task} AUC", "gain over baseline")
        for life in champions:
            tags, metrics = life.version.tags, (number_text(life.auc), gain_text(life.gain))
            aliases = ", ".join(life.version.aliases)
            table.add_row(str(life.version.number), aliases, tags.get("content"), tags.get("partition"), *metrics)
        console.print(table)
    lines = {
        "champion": [f"version {champion.number}, model {champion.tags.get('content')}" if champion else "none yet"],
        "endpoint": [_endpoint(workspace, served)],
        "runs now": runs_now(workspace.config) or ["nothing"],
        "blocked": blocked(workspace, waiting, served) or ["nothing"],
    }
    for what, texts in lines.items():
        for index, line in enumerate(texts):
            console.print(f"{what if not index else '':<11} {line}", soft_wrap=True)
    _print_places(console, workspace, workspace.records.read(EVALUATION, EVALUATION.key(workspace)))


def _served(workspace: Workspace) -> dict[str, Any] | None:
    """What the endpoint at the config's address says of its model, if it is up."""
    from features.errors import CorankError
    from serving.client import NoEndpointError, RankingClient
    from serving.ports import endpoint_url

    options = workspace.config.serving
    try:
        url = endpoint_url(options.host, options.port)
        with RankingClient(url, timeout=2.0, token=options.own_token) as client:
            return client.model()
    except NoEndpointError:
        return None
    except CorankError as error:
        return {"error": str(error)}


def _endpoint(workspace: Workspace, answer: dict[str, Any] | None) -> str:
    """The model served at the config's address, by the answer of :func:`_served`, and how to serve the champion."""
    from serving.ports import endpoint_url

    url = endpoint_url(workspace.config.serving.host, workspace.config.serving.port)
    if answer is None:
        return f"{url} is not up; `corank serve` starts it"
    if "error" in answer:
        return f"{url} does not say what it serves: {answer['error']}"
    model = answer["model_version"]
    served = [version for version in workspace.registry.versions() if version.tags.get("content") == model]
    champion = workspace.registry.champion()
    which = f"version {served[0].number}, " if served else ""
    says = f"{url} is up with {which}model {model}"
    if champion is None or champion in served:
        return says
    return f"{says}; champion is version {champion.number}: restart `corank serve` to serve it"


def gate_text(version: ModelVersion, evaluation: EvaluationRecord | None) -> str:
    """What the gate said of a version, and whether it was promoted by hand all the same."""
    refused = version.tags.get(REFUSED, "").splitlines()
    verdict = "–"
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        verdict = f"failed: {refused[0]}{more}"
    elif evaluation:
        verdict = "passed" if evaluation.passed else "failed"
    forced = version.tags.get(PROMOTED_BY_HAND, "").splitlines()
    return f"{verdict}; promoted by hand {forced[-1]}" if forced else verdict


def print_models(workspace: Workspace) -> None:
    """Registered versions, newest first."""
    console, task = plain_console(), workspace.config.gate_task
    table = Table("version", "alias", "model", "up to partition", f"{task} AUC", "gain over baseline", "gate")
    for version in workspace.registry.versions():
        evaluation = workspace.records.read(EVALUATION, version.tags.get("evaluation", ""))
        entry = evaluation.tasks.get(task) if evaluation else None
        table.add_row(
            str(version.number),
            ", ".join(version.aliases),
            version.tags.get("content", ""),
            version.tags.get("partition", ""),
            number_text(entry and entry["auc"]),
            gain_text(entry and entry["auc_gain_over_baseline"]),
            gate_text(version, evaluation),
        )
    console.print(table)
