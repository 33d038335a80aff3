"""``corank models …``: registered versions, and the sizes of any model. Heavy imports stay inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.common import ConfigOption, DebugOption, guarded, load, open_workspace

if TYPE_CHECKING:
    from pipeline.workspace import Workspace

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
    """Make a version the champion, whatever its gate said; that is recorded. A running service takes it over once it is
    verified."""
    with guarded(debug):
        _make_champion(open_workspace(load(config)), version)


@models_app.command("rollback")
def models_rollback(config: ConfigOption, debug: DebugOption = False) -> None:
    """Make the champion before this one the champion again. A running service takes it over once it is verified."""
    with guarded(debug):
        _make_champion(open_workspace(load(config)), None)


def _make_champion(workspace: Workspace, number: int | None) -> None:
    """A version, or the champion before this one; if the service that runs cannot take it over, nothing changes.

    Raises:
        CorankError: there is no such version, or it cannot be verified.
    """
    from features.errors import CorankError
    from pipeline.leftovers import exclusive
    from pipeline.stages.deployment import CURRENT, DEPLOYMENT, serves_already
    from pipeline.workspace.registry import REFUSED

    registry = workspace.registry
    with exclusive(workspace.config):
        before = registry.champion()
        version = registry.rollback() if number is None else registry.promote_by_hand(number)
        typer.echo(f"version {version.number} is champion" + (" again" if number is None else ""))
        for reason in version.tags.get(REFUSED, "").splitlines():
            typer.echo(f"  its gate had refused it: {reason}")
        if not serves_already(workspace):
            typer.echo("nothing is served at the moment; `corank serve` serves it")
            return
        try:
            DEPLOYMENT.run(workspace, [CURRENT])
        except CorankError:
            if before is not None and registry.champion() == registry.version(version.number):
                registry.promote(before.number)
                typer.echo(f"version {before.number} is champion again", err=True)
            raise


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
