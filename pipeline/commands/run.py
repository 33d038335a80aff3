"""``corank run | retrain | validate | status``: the DAG. Heavy imports stay inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from features.errors import CorankError
from features.schema import Grain, partition_bounds
from pipeline.commands.common import ConfigOption, DebugOption, UntilOption, guarded, load, open_workspace
from pipeline.commands.endpoint import keep_serving

if TYPE_CHECKING:
    from pipeline.workspace import Workspace


def run(
    config: ConfigOption,
    until: UntilOption = None,
    as_of: Annotated[
        Path | None,
        typer.Option(
            help="A record, or a model's lineage.json: read your tables at the versions that it names (Delta's time "
            "travel), so that the same rows are built again. Best in a workspace of its own (CORANK_WORKSPACE=…)."
        ),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Keep the endpoint up until Ctrl-C.")] = False,
    debug: DebugOption = False,
) -> None:
    """Run the whole DAG: validate, build samples, fill the store, train, evaluate, promote, deploy, query.

    Work that was done before from the same data and config is not done again; a run that was killed continues.
    With --serve the verified endpoint stays up.
    """
    with guarded(debug):
        _execute(open_workspace(load(config), until, as_of), serve)


def retrain(
    config: ConfigOption,
    partition: Annotated[
        str | None, typer.Option(help="Take new partitions up to this one, e.g. 2026-01-05. Default: all closed ones.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Take all new partitions at once. Default: one after the other.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Train from scratch, on all partitions or the config's training.window.")
    ] = False,
    backfill: Annotated[
        str | None,
        typer.Option(metavar="A..B", help="Take the new partitions from A to B, one after the other, and no others."),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Keep the endpoint up until Ctrl-C.")] = False,
    debug: DebugOption = False,
) -> None:
    """Take new closed partitions through the same DAG, starting from the champion's weights and optimizer.

    Each is first scored by the champion, then trained on but for its newest requests (retraining.holdout), by which
    challenger and champion are judged; the next retraining trains on these first. Rows that came late to partitions
    that were trained on rebuild samples and features; with retraining.late_rows they train from scratch.
    """
    with guarded(debug):
        from pipeline.leftovers import exclusive
        from pipeline.retraining import next_retraining
        from pipeline.stages import pending
        from pipeline.training.settings import TooFewError

        loaded = load(config)
        first, last = _backfilled(backfill, partition, loaded.grain)
        announced, passed_over, deployed = "", None, False
        with exclusive(loaded):  # what is next depends on what another one makes
            while step := next_retraining(loaded, last, together, full, passed_over):
                taken = step
                newest = step.workspace.partitions[-1]
                if first is not None and step.training and newest < first:
                    raise CorankError(
                        f"--backfill {backfill}: partition {newest} comes before, and was not trained on yet; a "
                        "retraining leaves none out"
                    )
                if step.says == announced:  # others have added work meanwhile; the next call does it
                    break
                announced = step.says
                typer.echo(announced)
                left = pending(step.workspace, step.training)
                try:
                    if left:
                        deployed |= _work(step.workspace, serve, step.training)
                except TooFewError as error:
                    if full or not step.workspace.warm_start:
                        raise
                    typer.echo(f"partition {newest} is passed over, the next one takes its requests along: {error}")
                    passed_over = newest
                else:
                    passed_over = None
                if full or not left:
                    break
        if serve:
            keep_serving(taken.workspace, running=deployed)


def _backfilled(backfill: str | None, partition: str | None, grain: Grain) -> tuple[str | None, str | None]:
    """The first and the last partition to take.

    Raises:
        CorankError: the range is not written as A..B, or they are no partitions of the grain.
    """
    if backfill is None:
        return None, partition
    first, dots, last = backfill.partition("..")
    try:
        for name in filter(None, (first, last)):
            partition_bounds(name, grain)
    except ValueError as error:
        raise CorankError(f"--backfill {backfill}: {error}") from None
    if not (first and dots and last and first <= last) or partition is not None:
        raise CorankError(
            f"--backfill {backfill}: write the first and the last partition, e.g. 2026-01-05..2026-01-09, and leave "
            "--partition out"
        )
    return first, last


def _execute(workspace: Workspace, serve: bool, training: bool = True) -> None:
    from pipeline.leftovers import exclusive

    with exclusive(workspace.config):
        deployed = _work(workspace, serve, training)
    if serve:
        keep_serving(workspace, running=deployed)


def _work(workspace: Workspace, serve: bool, training: bool) -> bool:
    """Do what is left; whether a version was deployed. The caller has the workspace alone."""
    from features.tasks import ray_runs
    from pipeline.commands.summary import print_summary
    from pipeline.maintenance import retain
    from pipeline.stages import pending
    from pipeline.stages.deployment import DEPLOYMENT, serves_already
    from serving.auth import read_tokens
    from serving.deploy import runs
    from serving.ports import require_free

    left, options = pending(workspace, training), workspace.config.serving
    deploying = DEPLOYMENT.name in left
    answer = None
    # what is wrong with the endpoint is better said now than after the training
    if options.tokens is not None and (serve or deploying):
        read_tokens(Path(options.tokens))
    if serve and not (ray_runs() and runs()):  # else this process has deployed a version before
        require_free(options.host, options.port)
    elif not serve and deploying:
        serves_already(workspace)
    if left:
        from pipeline.dag import run_dag

        try:
            run_dag(workspace, left)
        except CorankError:
            _write_report(workspace)  # a refused challenger has one, too
            raise
    else:
        typer.echo("Nothing to do: every stage is up to date with the log and the config.")
    _write_report(workspace, only_missing=not left)
    if deploying:
        answer = _example_query(workspace)
    retain(workspace)
    print_summary(workspace, answer)
    return deploying


def _write_report(workspace: Workspace, only_missing: bool = False) -> None:
    """The report on the challenger of this run, if it was judged."""
    from pipeline.report import write_report
    from pipeline.stages.evaluation import EVALUATION, report_path

    key = EVALUATION.key(workspace)
    verdict = workspace.records.read(EVALUATION, key)
    if verdict is None or (only_missing and report_path(workspace.config, verdict.model).exists()):
        return
    with workspace.progress.stage("report") as line:
        line.say(str(write_report(workspace, key)))


def _example_query(workspace: Workspace) -> dict[str, Any] | None:
    """An answer of the deployed endpoint; None where another process serves, perhaps another version."""
    from pipeline.stages.deployment import CURRENT, DEPLOYMENT
    from pipeline.stages.feature_store import online_record
    from serving.client import RankingClient

    record = workspace.records.require(DEPLOYMENT, CURRENT)
    if record.beside:
        return None
    example = record.verified["example"]
    with RankingClient(record.url, token=workspace.config.serving.own_token) as client:
        answer = client.rank(
            example["user_id"], example["candidates"], example["context"], online_record(workspace).close
        )
    return {"request": example, "answer": answer}


def validate(
    config: ConfigOption,
    partition: Annotated[str | None, typer.Option(help="One partition. Default: all closed ones.")] = None,
    debug: DebugOption = False,
) -> None:
    """Run the Great Expectations gate alone and print what it found. Exit code 3 when it does not pass."""
    with guarded(debug):
        from features.errors import DataGateError
        from pipeline.leftovers import exclusive
        from pipeline.stages.validated import VALIDATED

        workspace = open_workspace(load(config))
        if partition is not None and partition not in workspace.partitions:
            known = workspace.partitions
            raise DataGateError(
                f"table impressions, partition {partition}: it has no rows or is not closed; "
                f"there are {len(known)} from {known[0]} to {known[-1]}"
            )
        with exclusive(workspace.config):
            records = VALIDATED.run(workspace, [partition] if partition else workspace.partitions).values()
        for record in records:
            for note in VALIDATED.notes(record):
                typer.echo(f"  {note}")
        typer.echo(f"Data Docs: {next(iter(records)).data_docs}")


def status(config: ConfigOption, debug: DebugOption = False) -> None:
    """Show partitions, stages with work left, champion, endpoint, and where everything lies."""
    with guarded(debug):
        from pipeline.commands.summary import print_status

        print_status(open_workspace(load(config)))
