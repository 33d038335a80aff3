"""The commands of ``corank``. Heavy imports stay inside them, so that --help answers at once."""

from __future__ import annotations

import sys
from io import TextIOWrapper

import typer

from pipeline.commands import doctor, endpoint, report, run, upkeep, watch
from pipeline.commands.features import features_app
from pipeline.commands.imports import import_app
from pipeline.commands.models import models_app

app = typer.Typer(
    help="From a recommender's logs in Delta tables to a deployed ranking model that keeps itself fresh.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 stopped by a data-validation gate, "
    "130 stopped by Ctrl-C, 143 by SIGTERM.",
)
for command in (
    run.run,
    run.retrain,
    watch.watch,
    run.validate,
    endpoint.serve,
    endpoint.query,
    run.status,
    report.report,
    upkeep.repair,
    doctor.doctor,
):
    app.command()(command)
app.add_typer(import_app, name="import")
app.add_typer(models_app, name="models")
app.add_typer(features_app, name="features")


def main() -> None:
    """Do what the arguments of this process say."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that has no ✓ shows ? instead of a stack trace
            stream.reconfigure(errors="replace")
    app()
