"""What all commands share: their common options, opening a workspace, and how failures end them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from pipeline.interrupts import interruptible

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.workspace import Workspace

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        envvar="CORANK_CONFIG",
        help="The YAML file that describes tables, features, model and serving.",
    ),
]
UntilOption = Annotated[
    str | None, typer.Option(help="Use the log up to this partition only, e.g. 2026-01-05. Default: all closed ones.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the stack trace of a failure.")]
UrlOption = Annotated[str | None, typer.Option(help="Address of the endpoint. Default: the one the config names.")]


_loaded: list[Config] = []
"""The configs that this command has loaded; they name the places where a disk can be full."""


@contextmanager
def guarded(debug: bool) -> Iterator[None]:
    """Turn failures into one message and an exit code; leave no process behind, not even on Ctrl-C and SIGTERM."""
    from features.tasks import ray_runs
    from pipeline.runtime import quiet, stop_ray

    quiet()
    ran = ray_runs()  # then it is not this command's
    with interruptible() as interrupts:
        try:
            try:
                yield
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:
                if not interrupts.came:  # else the interrupt caused the error
                    _report(error, debug)
            finally:
                interrupts.hold()
                if not ran:
                    stop_ray()
        finally:
            if interrupts.came:
                sys.stdout.flush()
                interrupts.leave()


def _report(error: Exception, debug: bool) -> NoReturn:
    from features.errors import NoSpaceError, causes, known_cause, message_of, no_space

    notes = [note for cause in causes(error) for note in getattr(cause, "__notes__", ())]
    where = "".join(f"{note}: " for note in notes[:1])
    if full := no_space(error):
        problem = str(full) if isinstance(full, NoSpaceError) else message_of(full)
        _fail(f"{where}{problem}\n{_free_space()}\nThe same command goes on from here.", 1, debug)
    known = known_cause(error)
    if known is not None:
        _fail(str(known), known.exit_code, debug)
    _fail(f"{where}{message_of(error)}\nRun with --debug for the stack trace.", 1, debug)


def _free_space() -> str:
    """The free space of each place where this command writes."""
    import shutil
    import tempfile

    places = {tempfile.gettempdir(): "temporary files, and Ray's"}
    if _loaded:
        places[str(_loaded[-1].local_path())] = "the workspace's local files"
        places[_loaded[-1].path()] = "the workspace"
    free = {place: shutil.disk_usage(place).free for place in places if Path(place).exists()}
    return "Free: " + ", ".join(f"{free[place] / 1e6:,.1f} MB at {place} ({places[place]})" for place in free)


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        import traceback

        traceback.print_exc()
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(code) from None


def load(path: Path) -> Config:
    """The config, checked.

    Raises:
        ConfigError: names the file, each wrong key, its value and what is allowed.
    """
    from pipeline.config import load_config

    _loaded.append(load_config(path))
    return _loaded[-1]


def open_workspace(config: Config, until: str | None = None, as_of: Path | None = None) -> Workspace:
    """The workspace of a config; ``as_of``: a file with a record or lineage, to read the log as it was then."""
    from pipeline.progress import Progress
    from pipeline.workspace import Workspace, read_lineage

    return Workspace(config, Progress(), until, as_of=read_lineage(as_of) if as_of is not None else None)
