"""``corank models …``: registered versions, and the sizes of any model. Heavy imports stay inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.common import ConfigOption, DebugOption, guarded, load, open_workspace

models_app = typer.Typer(help="List, promote and roll back registered models; profile any.", no_args_is_help=True)


@models_app.command("list")
def models_list(config: ConfigOption, debug: DebugOption = False) -> None:
    """List registered versions, newest first, with their aliases and test metrics."""
    with guarded(debug):
        from pipeline.commands.summary import print_models

        print_models(open_workspace(load(config)))


@models_app.command("promote")
def models_promote(
    version: Annotated[int, typer.Argument(help="Number of the version.")],
    config: ConfigOption,
    debug: DebugOption = False,
) -> None:
    """Make a version the champion, whatever its gate said; that is recorded. `corank serve` verifies and serves it."""
    with guarded(debug):
        from pipeline.workspace.registry import REFUSED

        promoted = open_workspace(load(config)).registry.promote_by_hand(version)
        for reason in promoted.tags.get(REFUSED, "").splitlines():
            typer.echo(f"its gate had refused it: {reason}")
        typer.echo(f"version {promoted.number} is champion; restart `corank serve` to serve it")


@models_app.command("rollback")
def models_rollback(config: ConfigOption, debug: DebugOption = False) -> None:
    """Make the champion before this one the champion again."""
    with guarded(debug):
        back = open_workspace(load(config)).registry.rollback()
        typer.echo(f"version {back.number} is champion again; restart `corank serve` to serve it")


@models_app.command("profile")
def models_profile(
    preset: Annotated[
        str, typer.Argument(help="E.g. mixformer-medium, ui-mixformer-base, hyformer, or tiny for ui-mixformer-tiny.")
    ],
    candidates: Annotated[int, typer.Option(min=1, help="Candidates of one request.")] = 500,
    length: Annotated[int, typer.Option(min=1, help="Visible events of every sequence.")] = 512,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="Take features, sequences and tasks from here. Default: of the papers' kind."
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Print a model's parameters, FLOPs per request on the user and the item side, and the bytes of its states."""
    with guarded(debug):
        from pipeline.commands.profiling import print_profile

        print_profile(preset, candidates, length, load(config).schema_ if config is not None else None)
