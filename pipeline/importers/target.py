"""Where an import writes: a folder of Delta tables, marked with what was imported into them."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
from deltalake import CommitProperties, DeltaTable, write_deltalake

from features.delta.paths import address, check_openable
from features.errors import ConfigError, CorankError

MARKER = "corank.import"
"""Key of the commit metadata that says what a commit imported."""

UNWRITABLE = re.compile(r"[\[\]^|]")
"""What ``write_deltalake`` refuses in a local path, although tables below it can be read."""


def table_path(target: str | Path, table: str) -> str:
    """Address of a table below the target; absolute where it is local, so that Ray workers find it too.

    Raises:
        ConfigError: no Delta table can be written below a folder of that name.
    """
    root = str(target)
    path = f"{root.rstrip('/')}/{table}" if "://" in root else str(Path(root).expanduser().resolve() / table)
    try:
        check_openable(path)
    except ValueError as error:
        raise ConfigError(f"--target: {path} {error}") from None
    if "://" not in path and (wrong := UNWRITABLE.search(path)):
        raise ConfigError(
            f"--target: {path} has {wrong[0]} in its name, below which no Delta table can be imported; "
            "choose another target folder"
        )
    return path


def imported(path: str) -> str | None:
    """The marker that the newest import left in the log of a table; None where there is no table.

    Raises:
        CorankError: there is a table, but no import wrote it.
    """
    if not DeltaTable.is_deltatable(address(path)):
        return None
    for commit in DeltaTable(address(path)).history():
        if MARKER in commit:
            return str(commit[MARKER])
    raise CorankError(
        f"{path} is a Delta table that no import wrote, and an import never overwrites such a table. "
        "Choose another target folder."
    )


def write_table(path: str, rows: pl.DataFrame, marker: str, append: bool = False) -> None:
    """Write the rows in one commit that carries the marker; partitioned by (dt, bucket) if it has them."""
    partition_by: list[str] = [column for column in ("dt", "bucket") if column in rows.columns]
    write_deltalake(
        address(path),
        rows.to_arrow(),
        mode="append" if append else "overwrite",
        schema_mode=None if append else "overwrite",
        partition_by=partition_by or None,
        commit_properties=CommitProperties(custom_metadata={MARKER: marker}),
    )
