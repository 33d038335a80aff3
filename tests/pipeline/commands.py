"""Commands of corank in the process of the tests, where nothing is to be imported and Ray runs already."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from pipeline.commands.app import app


def corank(*arguments: str) -> Result:
    """What a command prints, and its exit code. An exception that a user would see as a trace is raised."""
    return CliRunner().invoke(app, arguments, catch_exceptions=False)
