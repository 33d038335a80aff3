"""``corank features skew``: whether a model reads online what it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.common import ConfigOption, DebugOption, guarded, load, open_workspace

if TYPE_CHECKING:
    from pipeline.deployment.skew import SkewReport
    from pipeline.progress import Line
    from pipeline.workspace import Workspace


def register(app: typer.Typer) -> None:
    """Add the command to ``corank features``."""
    app.command("skew")(features_skew)


def features_skew(
    config: ConfigOption,
    partition: Annotated[
        str | None, typer.Option("--partition", "-p", help="Default: the newest that can be compared.")
    ] = None,
    requests: Annotated[int, typer.Option(min=0, help="Requests to compare, spread over the partition; 0: all.")] = 300,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of differing values that is still a success.")
    ] = 0.0,
    served: Annotated[
        bool,
        typer.Option("--served", help="Compare what the endpoint served and logged (serving.log_share) with the log."),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Replay a partition against a scratch online store and compare every value with its samples.

    With --served: compare the logged features of served requests with those that the log gives for them now.
    Exit code 1 when a larger share than --threshold differs.
    """
    with guarded(debug):
        from rich.table import Table

        from features.errors import CorankError
        from pipeline.leftovers import exclusive
        from pipeline.progress import plain_console

        workspace = open_workspace(load(config))
        with exclusive(workspace.config), workspace.progress.stage("skew") as stage:

            def done(count: int, total: int) -> None:
                stage.say(f"{count:,} of {total:,} requests")

            report = (_served_skew if served else _replayed_skew)(workspace, partition, requests, stage, done)
            others = f", {report.left_out:,} cannot be compared" if report.left_out else ""
            stage.say(
                f"{report.requests:,} requests of partition {report.partition}{others}, {report.rate:.4%} of all "
                "values differ"
            )
        table = Table(title=f"partition {report.partition}")
        table.add_column("feature", no_wrap=True)
        for column in ("values", "differ", *(("missing", "extra") if served else ()), "share", "first difference"):
            table.add_column(column)
        for name, skew in report.features.items():
            counts = (skew.compared, skew.differ, *((skew.missing, skew.extra) if served else ()))
            table.add_row(name, *(f"{count:,}" for count in counts), f"{skew.rate:.2%}", skew.example)
        plain_console().print(table)
        if not report.rate <= threshold:
            remedy = (
                "Late events, profiles that changed late and events that nobody pushed are the usual causes"
                if served
                else "Materialise from the samples' own tables (`corank features materialize --all`) or rebuild the "
                "partition"
            )
            raise CorankError(
                f"skew, partition {report.partition}: {report.rate:.4%} of the values differ, more than --threshold "
                f"{threshold:.4%}. The table names each feature's first difference. {remedy}"
            )


def _replayed_skew(
    workspace: Workspace, partition: str | None, requests: int, stage: Line, done: Callable[[int, int], None]
) -> SkewReport:
    from features.errors import CorankError
    from pipeline.deployment.skew import replay
    from pipeline.stages.feature_store import store_settings
    from pipeline.stages.samples import FOREVER, SAMPLES, build_settings, kept, sample_source

    stale = set(SAMPLES.stale(workspace))
    built = [kept_partition for kept_partition in kept(workspace) if kept_partition not in stale]
    chosen = partition or (built[-1] if built else None)
    if chosen is None or chosen not in built:
        raise CorankError(
            f"partition {chosen or '(none)'} has no samples of the present log and config; there are "
            f"{', '.join(built[-3:]) or 'none'}. Run `corank run` first"
        )
    stage.say("filling a scratch store")
    return replay(
        build_settings(workspace),
        store_settings(workspace),
        sample_source(workspace, 0, FOREVER, (chosen,)),
        chosen,
        requests,
        workspace.config.local_path("skew"),
        done,
    )


def _served_skew(
    workspace: Workspace, partition: str | None, requests: int, stage: Line, done: Callable[[int, int], None]
) -> SkewReport:
    from features.delta.table import Table
    from features.errors import CorankError
    from pipeline.deployment.skew import served_skew
    from pipeline.stages.deployment import SERVED_LOG
    from pipeline.stages.samples import SAMPLES, build_settings
    from serving.request_log import REQUESTS

    folder = workspace.config.path(SERVED_LOG)
    table = Table("served requests", f"{folder}/{REQUESTS}")
    logged = table.partitions() if table.exists() else []
    closed = workspace.partitions
    both = [name for name in closed if name in logged]
    chosen = partition or (both[-1] if both else None)
    if chosen is None or chosen not in both:
        raise CorankError(
            f"partition {chosen or '(none)'} is not closed in your log, or no request of it was logged; logged are "
            f"{', '.join(logged[-3:]) or 'none'}, closed are {', '.join(closed[-3:]) or 'none'}"
        )
    earlier = [name for name in closed if name < chosen]
    stale = set(SAMPLES.stale(workspace))
    if not earlier or stale.intersection(earlier):
        raise CorankError(f"partition {chosen}: the samples before it are not built; `corank run` builds them")
    stage.say("reading your log")
    return served_skew(build_settings(workspace), folder, chosen, earlier, requests, done)
