"""The sample builder's plan on Ray Data: which bucket is folded where, and what becomes visible when.

    log laid out otherwise ──► a copy by (dt, bucket), for as long as the build takes
    log ──► deltas of items, by bucket of users ──(shuffle)──► fold of items ──► item_aggregates
    log + item_aggregates ──► fold of users, by bucket ──► samples, state, user_aggregates

Tasks write Parquet files; nothing is visible until the driver commits a partition, table by table, samples last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import polars as pl
import pyarrow as pa
from pyarrow import fs

from features.batch import sample_schema
from features.encoding import bucket_column
from features.errors import CorankError
from features.fold import fold_bucket, fold_items, item_deltas
from features.lake import DataFile, Table, replace_partition, write_file
from features.states import (
    ITEM_AGGREGATES,
    SAMPLES,
    STATE,
    USER_AGGREGATES,
    BuildSettings,
    item_aggregates_schema,
    partitioned,
    state_schema,
    user_aggregates_schema,
)

LAID_OUT = "laid_out"
"""Folder of the copies by (dt, bucket) of tables that their owner laid out otherwise."""

WHOLE = "all"
"""The one partition of a copied profile table."""

SPREAD_ROWS = 1_000_000
"""Rows that are copied at a time; bounds memory."""


@dataclass
class PartitionCounts:
    """What went in and out of one partition."""

    impressions: int = 0
    quarantined: int = 0
    candidates: int = 0
    requests: int = 0
    users: int = 0
    events: int = 0
    timeline_events: int = 0

    def __iadd__(self, other: Mapping[str, int]) -> PartitionCounts:
        for name, value in other.items():
            setattr(self, name, getattr(self, name) + value)
        return self


def build_partitions(
    settings: BuildSettings,
    partitions: Sequence[str],
    earlier: Sequence[str],
    impressions: Mapping[str, int],
    progress: Callable[[str, int, int], None],
) -> dict[str, PartitionCounts]:
    """Build and commit these partitions on Ray, each in one atomic commit per table.

    Args:
        partitions: consecutive, oldest first.
        earlier: partitions whose states precede them.
        impressions: rows that each partition is known to hold.
        progress: called with (what, done, total).

    Raises:
        CorankError: the rows of a partition do not close: impressions ≠ candidates + quarantined, or fewer were
            read than the partition holds. No samples are committed then.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    with _laid_out(settings, partitions, progress) as by_bucket:
        return _build(by_bucket, partitions, earlier, impressions, progress)


def _build(
    settings: BuildSettings,
    partitions: Sequence[str],
    earlier: Sequence[str],
    impressions: Mapping[str, int],
    progress: Callable[[str, int, int], None],
) -> dict[str, PartitionCounts]:
    import ray.data

    arguments = (settings, tuple(partitions), tuple(earlier))
    buckets = ray.data.from_items(
        [{"bucket": bucket} for bucket in range(settings.buckets)], override_num_blocks=settings.buckets
    )
    count_items: Any = _count_items  # Ray's type of a batch function does not know fn_args
    items: Any = _fold_items
    users: Any = _fold_users
    counted = buckets.map_batches(count_items, batch_size=1, batch_format="pyarrow", fn_args=arguments[:2])
    folded = counted.repartition(settings.buckets, keys=["bucket"]).map_batches(
        items, batch_size=None, batch_format="pyarrow", fn_args=arguments
    )
    files, _ = _written(folded, "buckets of items", partitions, settings.buckets, progress)
    _commit(settings, ITEM_AGGREGATES, item_aggregates_schema(settings.schema), partitions, files)

    folded = buckets.map_batches(users, batch_size=1, batch_format="pyarrow", fn_args=arguments)
    files, counts = _written(folded, "buckets of users", partitions, settings.buckets, progress)
    for partition in partitions:
        _check_counts(settings, partition, counts[partition], impressions[partition])
    # the samples last: a partition's record follows them
    _commit(settings, STATE, state_schema(settings.schema), partitions, files)
    _commit(settings, USER_AGGREGATES, user_aggregates_schema(settings.schema), partitions, files)
    _commit(settings, SAMPLES, sample_schema(settings.schema), partitions, files)
    return counts


@contextmanager
def _laid_out(
    settings: BuildSettings, partitions: Sequence[str], progress: Callable[[str, int, int], None]
) -> Iterator[BuildSettings]:
    """Settings whose tables are all laid out by (dt, bucket).

    A user's own table that is not is read once, hashed by user, and written by bucket; else every bucket would have
    to read it whole. The copies are deleted in the end; those of a killed build, when the next one begins.
    """
    import ray.data

    local = "://" not in settings.root
    store, path = (fs.LocalFileSystem(), settings.root) if local else fs.FileSystem.from_uri(settings.root)
    folder = f"{path}/{LAID_OUT}"
    if store.get_file_info(folder).type != fs.FileType.NotFound:
        store.delete_dir(folder)
    roles = [role for role in [*settings.schema.logs, "users"] if not settings.tables[role].is_bucketed()]
    if not roles:
        yield settings
        return
    slices = [{"role": role, "dt": dt} for role in roles for dt in (partitions if role != "users" else [WHOLE])]
    spread: Any = _spread  # Ray's type of a batch function does not know fn_args
    plan = ray.data.from_items(slices, override_num_blocks=len(slices)).map_batches(
        spread, batch_size=1, batch_format="pyarrow", fn_args=(settings,)
    )
    files: Files = {}
    try:
        blocks: Iterator[Any] = iter(plan.iter_batches(batch_size=None, batch_format="pyarrow"))
        for done, block in enumerate(blocks, start=1):
            for row in block.to_pylist():
                files.setdefault((row["table"], row["partition"]), []).append(DataFile(**json.loads(row["file"])))
            progress("slices of tables laid out by user", done, len(slices))
        tables = dict(settings.tables)
        for role in roles:
            root = f"{settings.root}/{LAID_OUT}/{role}"
            schema = partitioned(list(_layout(settings.tables[role])))
            for dt in partitions if role != "users" else [WHOLE]:
                replace_partition(root, dt, files.get((role, dt), []), schema, settings.storage_options)
            tables[role] = Table(role, root, {}, settings.storage_options)
        yield replace(settings, tables=tables)
    finally:
        if store.get_file_info(folder).type != fs.FileType.NotFound:
            store.delete_dir(folder)


Files = dict[tuple[str, str], list[DataFile]]


def _written(
    folded: Any, what: str, partitions: Sequence[str], buckets: int, progress: Callable[[str, int, int], None]
) -> tuple[Files, dict[str, PartitionCounts]]:
    """Run a plan whose tasks write files: the files by (table, partition), and what was counted."""
    files: Files = {}
    counts = {partition: PartitionCounts() for partition in partitions}
    done: set[int] = set()
    blocks: Iterator[Any] = iter(folded.iter_batches(batch_size=None, batch_format="pyarrow"))
    for block in blocks:
        for row in block.to_pylist():
            if row["file"] is not None:
                files.setdefault((row["table"], row["partition"]), []).append(DataFile(**json.loads(row["file"])))
            counts[row["partition"]] += json.loads(row["counts"])
            done.add(row["bucket"])
        progress(what, len(done), buckets)
    if len(done) != buckets:
        raise CorankError(f"only {len(done)} of {buckets} {what} came back; nothing was committed. Run again")
    return files, counts


def _commit(settings: BuildSettings, table: str, schema: pa.Schema, partitions: Sequence[str], files: Files) -> None:
    for partition in partitions:
        written = files.get((table, partition), [])
        replace_partition(settings.table_root(table), partition, written, schema, settings.storage_options)


def _check_counts(settings: BuildSettings, partition: str, count: PartitionCounts, impressions: int) -> None:
    if count.impressions != impressions:
        raise CorankError(
            f"samples, partition {partition}: {count.impressions:,} of {impressions:,} impressions were "
            f"read in {settings.buckets} buckets. Set `buckets` in the config to the number that the table was "
            "laid out with; if that is right, the log changed meanwhile: run again."
        )
    if count.impressions != count.candidates + count.quarantined:
        raise CorankError(
            f"samples, partition {partition}: {count.impressions:,} impressions came in, but "
            f"{count.candidates:,} candidates and {count.quarantined:,} quarantined rows came out; "
            "nothing of it was committed. Please report this as a defect of corank."
        )


# --- tasks --------------------------------------------------------------------------------------------

WRITTEN = pa.schema(
    [
        pa.field("bucket", pa.int64()),
        *[pa.field(name, pa.string()) for name in ("table", "partition", "file", "counts")],
    ]
)
"""What a folding task gives back per table and partition: the file it wrote, if any, and counts, as JSON."""


def _layout(table: Table) -> pa.Schema:
    """Columns of a table as :meth:`Table.scan` gives them, without the partition's."""
    empty = pl.DataFrame(schema=table.scan().collect_schema())
    layout: pa.Schema = empty.to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    return pa.schema([one for one in layout if one.name not in ("dt", "bucket")])


def _spread(batch: pa.Table, settings: BuildSettings) -> pa.Table:
    """Write one partition of a table by bucket of users, a portion of rows at a time."""
    written = []
    for role, dt in zip(batch["role"].to_pylist(), batch["dt"].to_pylist(), strict=True):
        table = settings.tables[role]
        names = _layout(table).names
        for portion in table.scan(None if dt == WHOLE else [dt]).collect_batches(chunk_size=SPREAD_ROWS):
            marked = portion.with_columns(bucket_column(pl.col("user_id"), settings.buckets).alias("bucket"))
            for (bucket,), part in marked.partition_by("bucket", as_dict=True).items():
                content = part.select(names).to_arrow(compat_level=pl.CompatLevel.oldest())
                written.append(_write(settings, f"{LAID_OUT}/{role}", dt, int(bucket), content, {}) | {"table": role})
    return pa.Table.from_pylist(written, schema=WRITTEN)


def _count_items(batch: pa.Table, settings: BuildSettings, partitions: Sequence[str]) -> pa.Table:
    """What a bucket of users adds to the counts of items; a row without item per bucket, so that none is missed."""
    parts = [one for bucket in batch["bucket"].to_pylist() for one in item_deltas(settings, bucket, partitions)]
    every = pl.DataFrame({"bucket": range(settings.buckets)}, schema={"bucket": pl.Int32})
    return pl.concat([*parts, every], how="diagonal").to_arrow(compat_level=pl.CompatLevel.oldest())


def _fold_items(
    batch: pa.Table, settings: BuildSettings, partitions: Sequence[str], earlier: Sequence[str]
) -> pa.Table:
    """Fold the buckets of items in a block; it holds each of its buckets whole."""
    rows: list[dict[str, Any]] = []
    parts: pl.DataFrame = pl.DataFrame(pl.from_arrow(batch)) if batch.num_rows else pl.DataFrame()
    for (bucket,), part in parts.partition_by("bucket", as_dict=True).items() if batch.num_rows else ():
        for partition, content in fold_items(settings, int(bucket), part, partitions, earlier):
            rows.append(_write(settings, ITEM_AGGREGATES, partition, int(bucket), content, {}))
    return pa.Table.from_pylist(rows, schema=WRITTEN)


def _fold_users(
    batch: pa.Table, settings: BuildSettings, partitions: Sequence[str], earlier: Sequence[str]
) -> pa.Table:
    """Fold buckets of users."""
    rows = [
        _write(settings, table, partition, bucket, content, counts)
        for bucket in batch["bucket"].to_pylist()
        for table, partition, content, counts in fold_bucket(settings, bucket, partitions, earlier)
    ]
    return pa.Table.from_pylist(rows, schema=WRITTEN)


def _write(
    settings: BuildSettings, table: str, partition: str, bucket: int, content: pa.Table, counts: Mapping[str, int]
) -> dict[str, Any]:
    written = None
    if content.num_rows:
        where = {"dt": partition, "bucket": str(bucket)}
        written = write_file(settings.table_root(table), content, where, settings.storage_options)
    return {
        "bucket": bucket,
        "table": table,
        "partition": partition,
        "file": json.dumps(asdict(written)) if written else None,
        "counts": json.dumps(counts),
    }
