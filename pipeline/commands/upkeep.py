"""``corank repair`` and ``corank features compact | forget | retain``: upkeep. Heavy imports stay inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.common import ConfigOption, DebugOption, guarded, load, open_workspace

if TYPE_CHECKING:
    from features.delta.maintenance import Size
    from pipeline.maintenance import Forgotten
    from pipeline.repair import Damage


def register(app: typer.Typer) -> None:
    """Add the commands to a group."""
    app.command("compact")(compact)
    app.command("forget")(forget)
    app.command("retain")(retain)


def repair(
    config: ConfigOption,
    check: Annotated[bool, typer.Option("--check", help="Only report; exit code 1 when something is damaged.")] = False,
    debug: DebugOption = False,
) -> None:
    """Check every file of the workspace and mend what can be made again from your tables; say what cannot.

    All files are read. Your own tables are checked, too, and never changed.
    """
    with guarded(debug):
        from pipeline import repair as repairs
        from pipeline.leftovers import clear
        from pipeline.workspace import exclusive

        workspace = open_workspace(load(config))
        with exclusive(workspace.config) as orderly:
            found = repairs.repair(workspace, only_check=check)
            _print_damages(found, check)
            if not (orderly or check):
                clear(workspace.config)  # what a killed command left; it is told by tables and databases that are whole
            if found and (check or any(damage.mend is None for damage in found)):
                raise typer.Exit(1)
            if check and not orderly:
                raise typer.Exit(0)  # in here, so that the next command still clears it


def _print_damages(found: list[Damage], check: bool) -> None:
    if not found:
        typer.echo("Nothing is damaged.")
        return
    for damage in found:
        typer.secho(f"{damage.file} {damage.problem}", bold=True)
        typer.echo(f"  holds     {damage.holds}\n  lost      {damage.lost}")
        done = "do this" if damage.mend is None else "would be" if check else "mended"
        typer.echo(f"  {done:<8}  {damage.remedy}")
    rest = [damage for damage in found if damage.mend is None]
    if check:
        typer.echo(f"{len(found)} pieces are damaged; `corank repair` mends {len(found) - len(rest)} of them.")
    else:
        typer.echo(
            f"{len(found) - len(rest)} pieces are mended; what is to be made again, `corank run` makes."
            + (f" {len(rest)} remain: mend them as said above." if rest else "")
        )


def compact(
    config: ConfigOption,
    keep_hours: Annotated[
        int, typer.Option(min=0, help="Keep unreferenced files for so many hours, for readers of older versions.")
    ] = 168,
    yes: Annotated[
        bool, typer.Option("--remove-all-unreferenced", help="Needed beside --keep-hours 0: nothing is kept.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Make every (dt, bucket) of the derived tables one file and remove files that nothing refers to.

    No row and no order changes, and nothing is rebuilt or trained again because of it.
    """
    with guarded(debug):
        from features.errors import ConfigError
        from pipeline.leftovers import exclusive
        from pipeline.maintenance import compact_tables

        if keep_hours == 0 and not yes:
            raise ConfigError(
                "--keep-hours 0 also removes files that a running reader of an older version may need; "
                "add --remove-all-unreferenced if that is meant"
            )
        workspace = open_workspace(load(config))
        with exclusive(workspace.config):
            sizes = compact_tables(workspace, keep_hours)
        if not sizes:
            typer.echo("There are no derived tables yet; `corank run` builds them.")
        for name, (before, after) in sizes.items():
            typer.echo(f"{name:<16} {_size(before)} → {_size(after)}")
        if sizes:
            typer.echo(f"In storage, with what nothing refers to any more, which is kept for {keep_hours} hours.")


def forget(
    users: Annotated[list[str], typer.Argument(metavar="USER…", help="Ids of the users.")],
    config: ConfigOption,
    debug: DebugOption = False,
) -> None:
    """Erase users from everything that corank derived: tables, quarantine, online store, stored requests.

    Your own tables are never changed: remove the users there too, or the next rebuild brings them back.
    """
    with guarded(debug):
        from pipeline import maintenance
        from pipeline.leftovers import exclusive

        workspace = open_workspace(load(config))
        with exclusive(workspace.config):
            results = maintenance.forget(workspace, users)
        for result in results:
            _print_forgotten(result, workspace.config.path("records", "forgotten"))
        if any(result.found for result in results):
            typer.echo("Not changed: the weights of models trained before, until a training from scratch.")


def _print_forgotten(result: Forgotten, folder: str) -> None:
    from pipeline.maintenance import forgotten_key

    if result.found:
        parts = [f"{rows:,} rows of {table}" for table, rows in result.tables.items()]
        parts += [f"{result.online:,} entries of the online store"] if result.online else []
        parts += [f"{result.selfchecks:,} self-check requests of models"] if result.selfchecks else []
        typer.echo(
            f"user {result.user}: erased {', '.join(parts)}; recorded in {folder}/{forgotten_key(result.user)}.json"
        )
    else:
        typer.echo(f"user {result.user}: nothing was found in what corank derived")
    if result.remains:
        rows = ", ".join(f"{table} ({count:,} rows)" for table, count in result.remains.items())
        typer.secho(
            f"  your own tables still hold this user: {rows}. Remove the user there, or the next rebuild or "
            "partition brings the user back.",
            fg="yellow",
        )


def retain(
    config: ConfigOption,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be dropped, drop nothing.")] = False,
    debug: DebugOption = False,
) -> None:
    """Drop the samples of old partitions as `retention.partitions` says; also done after every run.

    What the champion, or the version that a rollback returns to, was made from stays.
    """
    with guarded(debug):
        from pipeline import maintenance
        from pipeline.leftovers import exclusive

        workspace = open_workspace(load(config))
        keep = workspace.config.retention.partitions
        if keep is None:
            typer.echo("All samples are kept: the config has no `retention: {partitions: N}`.")
            return
        with exclusive(workspace.config):
            plan = maintenance.plan_retention(workspace) if dry_run else maintenance.retain(workspace)
        for partition, version in plan.live.items():
            typer.echo(f"{partition}  kept: model version {version} was made from it")
        for partition in plan.retired:
            typer.echo(f"{partition}  {'would be dropped' if dry_run else 'dropped'}")
        if not plan.retired:
            typer.echo(f"Nothing to drop beyond the newest {keep} partitions.")


def _size(size: Size) -> str:
    return f"{size.files:,} files, {size.bytes / 1e6:,.1f} MB"
