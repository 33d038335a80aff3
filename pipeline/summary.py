"""What the command line prints about a pipeline: the summary of a run, its status, its models, an answer."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pipeline.log import close_text
from pipeline.report import classes_text, number_text
from pipeline.stages import Pipeline

SHOWN_ITEMS = 10
FEW_STEPS = 100
"""Of a whole training; below, a user is told that the model has hardly begun to learn."""


def _console() -> Console:
    return Console(highlight=False)


def print_summary(pipeline: Pipeline, answer: dict[str, Any] | None) -> None:
    """Rows in and out, validation, metrics, model, endpoint, an answer, and where things lie."""
    console, config = _console(), pipeline.config
    records, key = pipeline.records, pipeline.evaluation_key
    evaluation = records.get("evaluation", key) or {}
    _print_rows(console, pipeline)
    for role, table in pipeline.log.tables.items():
        for column, instead in table.made().items() if table.exists() else ():
            console.print(f"note        table {role} has no {column}: {instead}")
    if evaluation:
        console.print(_metrics_table(evaluation))
        for task, entry in evaluation["tasks"].items():
            console.print(f"{task:<11} {classes_text(entry)}")
    candidate = records.get("candidate", pipeline.candidate_key) or {}
    steps = sum(entry.get("steps", FEW_STEPS) for entry in candidate.get("history", []))
    if candidate and steps < FEW_STEPS:
        console.print(
            f"warning     the training had {steps} steps only; more data, more `training.epochs` or a smaller "
            "`training.batch_candidates` give it more"
        )
    champion, deployment = records.get("champion", key), records.get("deployment", "current")
    if champion:
        console.print(f"model       {config.name} {champion['model']}: {champion['outcome']}")
    if deployment:
        verified, beside = deployment["verified"], deployment.get("beside", False)
        where = "verified   " if beside else f"endpoint    {deployment['url']},"
        console.print(
            f"{where} version {deployment['number']}; {verified['requests']} requests over HTTP equal the offline "
            f"scores within {verified['largest_difference']:.1e}"
        )
        if beside:
            console.print(f"endpoint    {_endpoint(pipeline)}", soft_wrap=True)
    if answer:
        print_answer(answer["request"], answer["answer"])
    _print_places(console, pipeline, evaluation)


def _print_rows(console: Console, pipeline: Pipeline) -> None:
    validated = [pipeline.records.get("validated", partition) or {} for partition in pipeline.partitions]
    samples = [pipeline.records.get("samples", partition) or {} for partition in pipeline.partitions]
    candidate = pipeline.records.get("candidate", pipeline.candidate_key) or {}
    evaluation = pipeline.records.get("evaluation", pipeline.evaluation_key) or {}
    store = pipeline.records.get("feature_store", "online") or {}

    def total(records: list[dict[str, Any]], name: str) -> int:
        return sum(record.get(name, 0) for record in records)

    impressions = sum(record.get("rows", {}).get("impressions", 0) for record in validated)
    table = Table(
        "stage",
        "in",
        Column("out", overflow="fold"),
        title=f"{pipeline.config.name}: {len(pipeline.partitions)} partitions",
    )
    table.add_row(
        "validated",
        f"{impressions:,} impressions",
        f"{impressions - total(validated, 'quarantined'):,} good, {total(validated, 'quarantined'):,} quarantined, "
        f"{sum(bool(record.get('passed')) for record in validated)} of {len(validated)} partitions pass",
    )
    table.add_row(
        "samples",
        f"{total(samples, 'impressions'):,} impressions, {total(samples, 'events'):,} events",
        f"{total(samples, 'candidates'):,} candidates + {total(samples, 'quarantined'):,} quarantined, "
        f"{total(samples, 'requests'):,} requests, {total(samples, 'users'):,} timelines",
    )
    rows = ", ".join(f"{count:,} {view}" for view, count in store.get("rows", {}).items())
    table.add_row("feature_store", "profiles and timelines", rows)
    if candidate:
        trained = candidate["history"][-1]["candidates"]
        table.add_row("candidate", f"{trained:,} candidates", f"{len(candidate['history'])} epochs")
    if evaluation:
        table.add_row("evaluation", f"{evaluation['impressions']:,} held-out candidates", "metrics below")
    console.print(table)


def _metrics_table(evaluation: dict[str, Any]) -> Table:
    table = Table("task", "", "AUC", "UAUC", "GAUC", "logloss", title="held-out newest requests")
    for task, entry in evaluation["tasks"].items():
        others = {"baseline": entry["baseline"], f"champion {evaluation['champion']}": entry["champion"]}
        for name, row in ({"model": entry} | {name: row for name, row in others.items() if row}).items():
            numbers = [number_text(row[metric]) for metric in ("auc", "uauc", "gauc", "logloss")]
            table.add_row(task if name == "model" else "", name, *numbers)
        gain = entry["auc_gain_over_baseline"]
        if gain:
            table.add_row("", "gain", f"{gain['difference']:+.4f}", f"95 %: {gain['low']:+.4f} … {gain['high']:+.4f}")
    return table


def print_answer(request: dict[str, Any], answer: dict[str, Any]) -> None:
    """The first items of a ranking, with scores per task and what was unknown."""
    console = _console()
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


def _print_places(console: Console, pipeline: Pipeline, evaluation: dict[str, Any]) -> None:
    config = pipeline.config
    newest = pipeline.records.get("validated", pipeline.partitions[-1]) or {}
    home = config.local_path("dagster")
    for what, where in (
        ("report", evaluation.get("report", "–")),
        ("Data Docs", newest.get("data_docs", "–")),
        ("MLflow", f"mlflow ui --backend-store-uri {pipeline.registry.uri}"),
        ("Dagster", f"DAGSTER_HOME={home} CORANK_CONFIG=… dagster dev -m pipeline.definitions"),
        ("everything", config.path()),
    ):
        console.print(f"{what:<11} {where}", soft_wrap=True)


def print_status(pipeline: Pipeline) -> None:
    """Partitions, stages with work left, champion and endpoint."""
    console = _console()
    pending = pipeline.pending()
    partitions = pipeline.partitions
    console.print(f"log         {len(partitions)} closed partitions, {partitions[0]} … {partitions[-1]}")
    console.print("work left   " + (f"{', '.join(pending)} (`corank run`)" if pending else "none"))
    if "candidate" in pending and pipeline.registry.champion():
        console.print("            `corank retrain` trains on partitions and labels that are new, not on late rows")
    stale, unbuilt = pipeline.stale_validation(), pipeline.stale_samples()
    if stale:
        console.print(
            f"  {len(stale)} partitions not validated: {', '.join(stale[:5])}{' …' if len(stale) > 5 else ''}"
        )
    if unbuilt:
        console.print(f"  {len(unbuilt)} partitions not built, from {unbuilt[0]}")
    champion = pipeline.registry.champion()
    if champion:
        console.print(f"champion    version {champion.number}, model {champion.tags.get('content')}")
    else:
        console.print("champion    none yet")
    console.print(f"endpoint    {_endpoint(pipeline)}")
    _print_places(console, pipeline, pipeline.records.get("evaluation", pipeline.evaluation_key) or {})


def _endpoint(pipeline: Pipeline) -> str:
    """What is served at the config's address, and how that comes to be the champion."""
    from features.errors import CorankError
    from serving.client import RankingClient
    from serving.ports import endpoint_url

    url = endpoint_url(pipeline.config.serving.host, pipeline.config.serving.port)
    try:
        with RankingClient(url, timeout=2.0) as client:
            model = client.model()["model_version"]
    except CorankError:
        return f"{url} is not up; `corank serve` starts it"
    served = [version for version in pipeline.registry.versions() if version.tags.get("content") == model]
    champion = pipeline.registry.champion()
    which = f"version {served[0].number}, " if served else ""
    says = f"{url} is up with {which}model {model}"
    if champion is None or champion in served:
        return says
    return f"{says}; champion is version {champion.number}: restart `corank serve` to serve it"


def print_models(pipeline: Pipeline) -> None:
    """Registered versions, newest first."""
    console, task = _console(), pipeline.config.gate_task
    table = Table("version", "alias", "model", "up to partition", f"{task} AUC", "gain over baseline", "gate")
    for version in pipeline.registry.versions():
        evaluation = pipeline.records.get("evaluation", version.tags.get("evaluation", "")) or {}
        entry = evaluation.get("tasks", {}).get(task)
        table.add_row(
            str(version.number),
            ", ".join(version.aliases),
            version.tags.get("content", ""),
            version.tags.get("partition", ""),
            number_text(entry and entry["auc"]),
            f"{entry['auc_gain_over_baseline']['difference']:+.4f}" if entry else "–",
            ("passed" if evaluation.get("passed") else "failed") if evaluation else "–",
        )
    console.print(table)
