"""Which files of a Delta table are read, and under which names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

READ_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, DeltaError, OSError)
"""Errors from reading a damaged file; Polars panics when a file is shorter than the Delta log says."""


class LocalPaths(DeltaTable):
    """A Delta table with the file system's names of its files; deltalake encodes the path above them."""

    def file_uris(self, *args: Any, **options: Any) -> list[str]:
        root = self.table_uri.removeprefix("file://")
        files = super().file_uris(*args, **options)
        return [unquote(root) + file.removeprefix(root) if file.startswith(root) else file for file in files]


class SomeFiles(LocalPaths):
    """A Delta table limited to some of its files, as far as :func:`polars.scan_delta` asks for them."""

    def __init__(self, table: DeltaTable, paths: Iterable[str]) -> None:
        """
        Args:
            paths: relative to the table, as the file system has them.
        """
        super().__init__(table.table_uri, version=table.version(), storage_options=table._storage_options)
        # looked up by path: another reader may list the files in another order, for instance after a checkpoint
        listed = pa.table(super().get_add_actions())["path"].to_pylist()
        order = {unquote(path): index for index, path in enumerate(listed)}
        self._positions = [order[path] for path in paths]

    def file_uris(self, *args: Any, **options: Any) -> list[str]:
        every = super().file_uris(*args, **options)
        return [every[index] for index in self._positions]

    def get_add_actions(self, flatten: bool = False) -> Any:
        return pa.table(super().get_add_actions(flatten)).take(pa.array(self._positions, pa.int64()))


def scan_files(delta: DeltaTable, paths: Sequence[str] | None = None) -> pl.LazyFrame:
    """Rows of a table, or of its files ``paths`` only, under the table's own names and types."""
    if paths is not None:
        delta = SomeFiles(delta, paths)
    values = delta.metadata().partition_columns
    above = delta.table_uri.removeprefix("file://")
    if not values or "=" not in unquote(above):
        return pl.scan_delta(delta)
    # Polars reads partition values from paths and would take a folder name=value above the table for one
    schema = pl.Schema(delta.schema())
    actions = pl.DataFrame(pa.table(delta.get_add_actions(flatten=True)))
    named = actions.select(pl.col(f"partition.{column}").alias(column) for column in values).with_columns(
        pl.Series("__file", delta.file_uris())
    )
    stored = pl.Schema({name: kind for name, kind in schema.items() if name not in values})
    parts = [
        pl.scan_parquet(
            rows["__file"].to_list(),
            schema=stored,
            glob=False,
            hive_partitioning=False,
            missing_columns="insert",
            extra_columns="ignore",
            storage_options=delta._storage_options,
        ).with_columns(pl.lit(value).cast(schema[name]).alias(name) for name, value in zip(values, key, strict=True))
        for key, rows in named.partition_by(values, as_dict=True).items()
    ]
    return pl.concat([part.select(schema.names()) for part in parts or [pl.LazyFrame(schema=schema)]])
