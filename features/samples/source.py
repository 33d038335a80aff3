"""Reading the sample table (dt, bucket) file by file in a seeded order, on Ray Data or in process; cut by budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from features.delta.paths import address, cannot_read, patient, table_store
from features.history import history_columns, with_history
from features.sample_table import between, concatenate, cut, fewer_negatives, sample_schema, sampled_before
from features.schema import Schema

READ_CPUS = 0.25
"""CPUs that a reading task reserves: it mostly waits for storage."""

WINDOW_ROWS = 8_192
"""Rows shuffled together; bounds the reader's memory."""


@dataclass(frozen=True)
class Replay:
    """A sample of older requests that are read, too.

    Attributes:
        partitions: partitions that hold them.
        share: share of their requests that is read.
        seed: of the draw, which is by request.
    """

    partitions: tuple[str, ...]
    share: float
    seed: int


@dataclass(frozen=True)
class SampleSource:
    """The requests of ``low ≤ ts < high`` in some partitions of the sample table.

    Attributes:
        root: the Delta table.
        low, high: microseconds UTC; cuts are applied inside rows.
        replay: requests before ``low`` that are read, too.
        negatives: share of candidates without a positive label that is read, and the seed of the draw
            (:func:`features.sample_table.fewer_negatives`); None: all are.
    """

    root: str
    schema: Schema
    partitions: tuple[str, ...]
    low: int
    high: int
    storage_options: Mapping[str, str] = field(default_factory=dict)
    replay: Replay | None = None
    negatives: tuple[float, int] | None = None

    def files(self) -> list[str]:
        """Files of the partitions in a stable order, each with one bucket of one partition."""
        return [path for _, _, path, _ in self._files()]

    def size(self) -> int:
        """Bytes of the files."""
        return sum(size for *_, size in self._files())

    def _files(self) -> list[tuple[str, str, str, int]]:
        """dt, bucket, path and bytes."""
        table = DeltaTable(address(self.root), storage_options=patient(self.storage_options))
        actions = pa.table(table.get_add_actions(flatten=True))
        columns = (actions[name].to_pylist() for name in ("partition.dt", "partition.bucket", "path", "size_bytes"))
        wanted = {*self.partitions, *(self.replay.partitions if self.replay else ())}
        return sorted(row for row in zip(*columns, strict=True) if row[0] in wanted)

    def read(self, file: str, only: Sequence[str] | None = None) -> pa.Table:
        """Rows of one file within the cut.

        Args:
            only: columns to read, requests among them; default: all.

        Raises:
            CorankError: the file cannot be read; it is named.
        """
        store = table_store(self.root, self.storage_options)
        full = sample_schema(self.schema, stored=True)
        # of what is told of the history the timelines are needed
        needed = None if only is None else {*only, *history_columns(self.schema)}
        columns = [name for name in full.names if name not in ("dt", "bucket") and (needed is None or name in needed)]
        try:
            rows = pq.read_table(file, filesystem=store, columns=columns, partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise cannot_read("samples", self.root, file, error) from error
        rows = rows.cast(pa.schema([full.field(name) for name in columns]))
        if self.replay is None:
            rows = between(rows, self.low, self.high)
        else:
            rows = sampled_before(between(rows, 0, self.high), self.low, self.replay.share, self.replay.seed)
        if self.negatives is not None:
            rows = fewer_negatives(rows, self.schema.tasks, *self.negatives)
        rows = with_history(rows, self.schema)
        return rows if only is None else rows.select([name for name in rows.column_names if name in only])

    def dataset(self, seed: int | None = None) -> Any:
        """A Ray Data set of the rows, in a stable order of files, shuffled when a seed is given."""
        return _dataset(self, self._ordered_files(seed))

    def batches(
        self, candidates: int, events: int, seed: int | None = None, skip: int = 0, in_process: bool = False
    ) -> Iterator[pa.Table]:
        """Rows in batches within a budget of candidates and events; the same for the same seed.

        With a seed, files are permuted, then rows within windows of ``WINDOW_ROWS``. No row is dropped.

        Args:
            skip: batches already consumed; the rest is the same as if they had been read.
            in_process: read in this process, without Ray; the batches are the same.
        """
        return islice(self._cut_windows(candidates, events, seed, in_process), skip, None)

    def _ordered_files(self, seed: int | None) -> list[str]:
        files = self.files()
        if seed is None:
            return files
        return [files[index] for index in np.random.default_rng(seed).permutation(len(files))]

    def _cut_windows(self, candidates: int, events: int, seed: int | None, in_process: bool) -> Iterator[pa.Table]:
        rng = np.random.default_rng(seed)
        files = self._ordered_files(seed)
        if not files:
            return
        blocks: Iterable[pa.Table]
        if in_process:
            blocks = map(self.read, files)
        else:
            blocks = _dataset(self, files).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        for window in _windows(blocks):
            if seed is not None:
                window = window.take(pa.array(rng.permutation(window.num_rows)))
            yield from cut(window, candidates, events, self.schema.sequences)


def _windows(blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows in tables of ``WINDOW_ROWS`` (the last one: what is left), however they come in blocks.

    Ray Data decides where its blocks end; the order of batches must not depend on that.
    """
    pending: pa.Table | None = None
    for block in blocks:
        if not block.num_rows:
            continue
        pending = block if pending is None else pa.concat_tables([pending, block])
        while pending.num_rows >= WINDOW_ROWS:
            yield pending.slice(0, WINDOW_ROWS).combine_chunks()
            pending = pending.slice(WINDOW_ROWS)
    if pending is not None and pending.num_rows:
        yield pending.combine_chunks()


def _dataset(source: SampleSource, files: list[str]) -> Any:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    blocks = max(1, min(len(files), 64))
    listing = ray.data.from_items([{"file": file} for file in files], override_num_blocks=blocks)
    read: Any = _read_files  # Ray's type of a batch function does not know fn_args
    return listing.map_batches(read, fn_args=(source,), batch_size=None, batch_format="numpy", num_cpus=READ_CPUS)


def _read_files(batch: Any, source: SampleSource) -> Any:
    """Rows of the files that a batch of the listing names."""
    return concatenate([source.read(str(file)) for file in batch["file"]])
