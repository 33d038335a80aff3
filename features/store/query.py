"""Reading a Delta table by slices of its files, in Ray tasks or in this process.

    files of one version ──► slices ──► pieces by hash of the key ──► partitions: every row of a key in one

A slice is read like the whole table (deletes in the Delta log, partition values and canonical names are
honoured); its rows are dealt out by the hash of their key, and a partition's pieces keep the table's order. With
one partition there is nothing to deal out: the same functions run here, on the whole table.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable

from features.delta.files import SomeFiles
from features.delta.table import Table
from features.errors import CorankError
from features.tasks import arrow, each, ray_runs, task

T = TypeVar("T")

SLICE_BYTES = 32 << 20
"""Bytes of files that one task reads; a table below twice this is read in this process. Parquet grows in memory."""

MOST_PARTITIONS = 256
JOIN_KEYS = ("user_id", "item_id")
TIME = "__time"
"""When a row became true, int64 microseconds UTC."""


@dataclass(frozen=True)
class Slice(Table):
    """Some files of one version of a table, read as if the table had no others.

    Attributes:
        files: their paths, relative to the table.
    """

    files: tuple[str, ...] = ()

    def delta(self) -> DeltaTable:
        return SomeFiles(super().delta(), self.files)


def dated(table: Table, clock: str) -> pl.LazyFrame:
    """The table's rows with join keys as text and ``TIME``, made of the column ``clock`` (microseconds UTC).

    Raises:
        CorankError: there is no such table, or it lacks the column that dates its rows.
    """
    frame = table.scan()
    present = frame.collect_schema().names()
    if clock not in present:
        raise CorankError(
            f"table {table.name} at {table.uri} has no column {clock!r} (microseconds UTC); "
            f"it has {present}. Map it under `tables.{table.name}.columns`."
        )
    return frame.with_columns(
        *[pl.col(key).cast(pl.String) for key in JOIN_KEYS if key in present],
        pl.col(clock).cast(pl.Int64).alias(TIME),
    )


@dataclass(frozen=True)
class Query:
    """What is wanted of a table; it is sent to tasks.

    Attributes:
        clock: column that dates a row.
        keys, values: name in the result → column of the table. Rows without a key or a time are left out.
        start, end: microseconds UTC, both included; None: no bound.
        latest: only the newest row of every key is wanted; of rows with one time the last in the table's order.
    """

    table: Table
    clock: str
    keys: Mapping[str, str]
    values: Mapping[str, str]
    start: int | None = None
    end: int | None = None
    latest: bool = False

    def read(self, part: Table | None = None) -> pl.DataFrame:
        """Keys, values and ``TIME`` of a slice (default: of the whole table), in the table's order."""
        part = part or self.table
        clock = pl.col(self.clock)  # filters the stored column, so that files outside the window are skipped
        frame = dated(part, self.clock)
        present = frame.collect_schema().names()
        if missing := [column for column in (*self.keys.values(), *self.values.values()) if column not in present]:
            raise CorankError(
                f"table {part.name} at {part.uri} lacks the columns {missing}; it has {present}. Map them under "
                f"`tables.{part.name}.columns`, or build the table again if an earlier version of corank wrote it."
            )
        if self.start is not None:
            frame = frame.filter(clock >= self.start)
        if self.end is not None:
            frame = frame.filter(clock <= self.end)
        wanted = [pl.col(column).alias(name) for name, column in {**self.keys, **self.values}.items()]
        rows = part.collect(frame.select(*wanted, TIME).drop_nulls([*self.keys, TIME]))
        return latest(self, rows) if self.latest else rows

    def slices(self, slice_bytes: int) -> list[Slice]:
        """The table's newest version in slices of about ``slice_bytes`` of files that may hold wanted rows."""
        delta = self.table.delta()
        files = pl.DataFrame(pa.table(delta.get_add_actions(flatten=True)))
        column = self.table.columns.get(self.clock, self.clock)
        for bound, end in ((self.start, "max"), (self.end, "min")):
            name = f"{end}.{column}"
            # statistics of timestamps are rounded to milliseconds, so that only the reader filters these
            if bound is not None and name in files.columns and files.schema[name].is_integer():
                outside = pl.col(name) < bound if end == "max" else pl.col(name) > bound
                files = files.filter(outside.fill_null(False).not_())
        groups = (pl.col("size_bytes").cum_sum() - 1) // slice_bytes
        parts = files.group_by(groups.alias("slice"), maintain_order=True).agg("path")["path"].to_list()
        table = self.table.at(delta.version())
        of_table = {declared.name: getattr(table, declared.name) for declared in fields(Table)}
        return [Slice(**of_table, files=tuple(map(unquote, part))) for part in parts]


def latest(query: Query, *pieces: pl.DataFrame | pa.Table) -> pl.DataFrame:
    """The newest row of every key; of rows with one time the last one counts."""
    newest_last = together(pieces).sort(TIME, maintain_order=True)
    return newest_last.unique(list(query.keys), keep="last", maintain_order=True)


def together(pieces: Iterable[pl.DataFrame | pa.Table]) -> pl.DataFrame:
    """Pieces of a partition, which come from tasks as Arrow tables, as one frame."""
    return pl.concat([_frame(piece) for piece in pieces])


class Partitions:
    """The rows of a query, so that each partition has every row of its keys; read when first used.

    Args:
        slice_bytes: bytes that one task reads; see ``SLICE_BYTES``.
        beside: bytes of what the rows will be joined with; they count like the table's own.

    Attributes:
        count: number of partitions. It is 1, and everything runs in this process, when Ray does not run or both
            sides are small.
    """

    def __init__(self, query: Query, slice_bytes: int = SLICE_BYTES, beside: int = 0) -> None:
        self.query = query
        self.slices: list[Slice] = []
        self.count = 1
        if ray_runs():
            self.slices = query.slices(slice_bytes)
            if self.slices:
                self.count = min(MOST_PARTITIONS, max(len(self.slices), math.ceil(beside / slice_bytes)))

    def rows(self) -> Iterator[pl.DataFrame]:
        """All rows in the table's order, portion by portion; there is at least one portion."""
        if self.count == 1:
            yield self.query.read()
        else:
            yield from (_frame(rows) for rows in each(self.query.read, [(part,) for part in self.slices], True))

    def map(self, function: Callable[..., T], others: Iterable[tuple[Any, ...]] | None = None) -> Iterator[T]:
        """``function(*other, *pieces)`` of every partition, in order of the partitions.

        Args:
            function: takes the pieces of one partition in the table's order (see :func:`together`).
            others: per partition the arguments before its pieces.
        """
        befores = others if others is not None else [() for _ in range(self.count)]
        if self.count == 1:
            pieces = deque([(self.query.read(),)])
        else:
            read = task(_read_and_deal, num_returns=self.count)
            pieces = deque(zip(*[read.remote(self.query, part, self.count) for part in self.slices], strict=True))
        # taken out one by one, so that a partition's pieces are freed when it is done
        calls = ((*before, *pieces.popleft()) for before in befores)
        yield from each(function, calls, self.count > 1)


def deal(frame: pl.DataFrame, keys: Iterable[str], count: int) -> list[pl.DataFrame]:
    """The rows of every partition, each in the frame's order; keys have one type on both sides of a join."""
    partition = frame.select((pl.struct(list(keys)).hash(seed=0) % count).alias("partition")).to_series()
    return [frame.filter(partition == index) for index in range(count)]


def _read_and_deal(query: Query, part: Slice, count: int) -> list[pa.Table]:
    return [arrow(piece) for piece in deal(query.read(part), query.keys, count)]


def _frame(rows: pl.DataFrame | pa.Table) -> pl.DataFrame:
    return rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(pl.from_arrow(rows))
