"""The command ``corank``. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import locale
import os
import sys
from io import TextIOWrapper

import typer

from pipeline.commands import endpoint, run, watch
from pipeline.commands.features import features_app
from pipeline.commands.imports import import_app
from pipeline.commands.models import models_app

app = typer.Typer(
    help="From a recommender's logs in Delta tables to a deployed ranking model that keeps itself fresh.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 stopped by a data-validation gate.",
)
for command in (run.run, run.retrain, watch.watch, run.validate, endpoint.serve, endpoint.query, run.status):
    app.command()(command)
app.add_typer(import_app, name="import")
app.add_typer(models_app, name="models")
app.add_typer(features_app, name="features")


def main() -> None:
    """Entry point of the command ``corank``."""
    _in_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that has no ✓ shows ? instead of a stack trace
            stream.reconfigure(errors="replace")
    app()


def _in_utf8() -> None:
    """Under another locale start again in Python's UTF-8 mode: libraries write their files in the locale's encoding."""
    if sys.flags.utf8_mode or locale.getencoding().lower() in ("utf-8", "utf8"):
        return
    streams = {"PYTHONIOENCODING": f"{sys.stdout.encoding}:replace"}  # a terminal stays what it is
    os.execve(sys.executable, sys.orig_argv, streams | dict(os.environ) | {"PYTHONUTF8": "1"})


if __name__ == "__main__":
    main()
