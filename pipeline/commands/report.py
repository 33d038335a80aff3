"""``corank report``: the report on a model version, as one file. Heavy imports stay inside the command."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.common import ConfigOption, DebugOption, guarded, load, open_workspace


def report(
    config: ConfigOption,
    version: Annotated[int | None, typer.Argument(help="Number of the version. Default: the champion.")] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write the report on a version, one HTML file that needs no network, and print its path.

    Every run and retraining writes that of its challenger, and adds it to its run in MLflow. Written again, it says
    what has happened since: later versions, what is live.
    """
    with guarded(debug):
        from pipeline.report import report_of

        path = report_of(open_workspace(load(config)), version)
        typer.echo(str(path))
        if open_it:
            typer.launch(path.resolve().as_uri())
