"""The sample builder on Ray: where each bucket is folded, and when its result becomes visible.

    log laid out otherwise ──► a copy by (dt, bucket), for as long as the build takes
    log ──► deltas of items, by bucket of users ──► files by bucket of items ──► fold of items ──► item_aggregates
    log + item_aggregates ──► fold of users, by bucket ──► samples, state, user_aggregates

Each arrow is a plan of Ray Data (:mod:`features.builder.plan`). Its tasks write Parquet files; nothing is visible until
the driver commits the partitions, table by table, samples last. Readers wait for the record that the stage writes then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
import pyarrow as pa
from pyarrow import fs

from features.builder.fold import fold_bucket, fold_items, item_deltas
from features.builder.states import (
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
from features.delta.paths import file_system
from features.delta.table import Table
from features.delta.write import DataFile, read_files, replace_partitions, write_file
from features.encoding import bucket_column
from features.errors import CorankError
from features.sample_table import sample_schema
from features.tasks import arrow

LAID_OUT = "laid_out"
"""Folder of a build's scratch tables: copies by (dt, bucket) of the user's tables that have another layout, and the
deltas of items by bucket of items."""

ITEM_DELTAS = f"{LAID_OUT}/item_deltas"

WHOLE = "all"
"""The only partition of scratch tables that are not cut in time: copied profile tables, and the deltas of items."""

SHARDS = 16
"""Largest number of tasks that fold items; each takes its share of the buckets."""

SPREAD_ROWS = 1_000_000
"""Rows that are copied at a time, to bound memory."""


@dataclass
class PartitionCounts:
    """Counts of what went in and out of one partition."""

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


@dataclass(frozen=True)
class Written:
    """What a task wrote of one table and partition: the file, None if there were no rows, and its counts."""

    table: str
    partition: str
    file: DataFile | None
    counts: dict[str, int]


Files = dict[tuple[str, str], list[DataFile]]
"""Written files by (table, partition)."""


def build_partitions(
    settings: BuildSettings,
    partitions: Sequence[str],
    earlier: Sequence[str],
    impressions: Mapping[str, int],
    progress: Callable[[str, int, int], None],
) -> dict[str, PartitionCounts]:
    """Build these partitions on Ray Data, and commit them: one commit per table.

    A task holds the states of one bucket, the rows of a group of small partitions or of one that is larger, and the
    profiles and counts of the items that its rows name; so memory is bounded by these times the tasks that run at once
    (``settings.at_once``).

    Args:
        partitions: consecutive, oldest first.
        earlier: partitions whose states precede them.
        impressions: rows that each partition is known to hold.
        progress: called with (what, done, total).

    Raises:
        CorankError: a table is laid out with another number of buckets; or the rows of a partition do not close:
            impressions ≠ candidates + quarantined, or fewer were read than the partition holds. Then only the
            counts of items are committed.
        UnreadableError: a file of a log cannot be read; it is named.
    """
    with _scratch(settings.root):
        by_bucket = _laid_out(settings, partitions, progress)
        files = _fold_all_items(by_bucket, partitions, earlier, progress)
        _commit(settings, ITEM_AGGREGATES, item_aggregates_schema(settings.schema), partitions, files)
        calls = [(by_bucket, bucket, partitions, earlier) for bucket in range(settings.buckets)]
        files, counts = _gathered(by_bucket, _fold_users, calls, "buckets of users", partitions, progress)
    for partition in partitions:
        _check_counts(settings, partition, counts[partition], impressions[partition])
    # the samples last: a partition's record follows them
    _commit(settings, STATE, state_schema(settings.schema), partitions, files)
    _commit(settings, USER_AGGREGATES, user_aggregates_schema(settings.schema), partitions, files)
    _commit(settings, SAMPLES, sample_schema(settings.schema, stored=True), partitions, files)
    return counts


def _fold_all_items(
    settings: BuildSettings,
    partitions: Sequence[str],
    earlier: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> Files:
    """Count every bucket of users' items, exchange the counts by bucket of items, and fold them."""
    shards = min(settings.buckets, SHARDS)
    buckets = [(settings, bucket, partitions, shards) for bucket in range(settings.buckets)]
    files, _ = _gathered(settings, _count_items, buckets, "buckets counted", [WHOLE], progress)
    deltas = files[ITEM_DELTAS, WHOLE]
    calls = [
        (
            settings,
            shard,
            shards,
            partitions,
            earlier,
            [file for file in deltas if file.partition["bucket"] == str(shard)],
        )
        for shard in range(shards)
    ]
    return _gathered(settings, _fold_items, calls, "shares of items", partitions, progress)[0]


@contextmanager
def _scratch(root: str) -> Iterator[None]:
    """Delete a build's scratch tables when it ends, and what a killed build left when the next one begins."""
    clear_copies(root)
    try:
        yield
    finally:
        clear_copies(root)


def _laid_out(
    settings: BuildSettings, partitions: Sequence[str], progress: Callable[[str, int, int], None]
) -> BuildSettings:
    """Settings whose tables are all laid out by (dt, bucket).

    A table of the user's own with another layout is read once, hashed by user, and written by bucket; otherwise every
    bucket would have to read all of it.
    """
    roles = []
    for role in (*settings.schema.logs, *(["users"] if "users" in settings.tables else [])):
        if settings.tables[role].is_bucketed():
            settings.tables[role].require_buckets(settings.buckets)
        else:
            roles.append(role)
    if not roles:
        return settings
    slices = {role: list(partitions) if role != "users" else [WHOLE] for role in roles}
    calls = [(settings, role, dt) for role in roles for dt in slices[role]]
    files, _ = _gathered(settings, _spread, calls, "slices of tables laid out by user", [*partitions, WHOLE], progress)
    tables = dict(settings.tables)
    for role in roles:
        root = f"{settings.root}/{LAID_OUT}/{role}"
        schema = partitioned(list(_layout(settings.tables[role])))
        copied = {dt: files.get((role, dt), []) for dt in slices[role]}
        replace_partitions(root, copied, schema, settings.storage_options)
        tables[role] = Table(role, root, {}, settings.storage_options)
    return replace(settings, tables=tables)


def clear_copies(root: str) -> None:
    """Delete the scratch tables of a build, also a killed one, below the builder's tables."""
    store, path = file_system(root)
    if store.get_file_info(f"{path}/{LAID_OUT}").type != fs.FileType.NotFound:
        store.delete_dir(f"{path}/{LAID_OUT}")


def _gathered(
    settings: BuildSettings,
    function: Callable[..., list[Written]],
    calls: Sequence[tuple[Any, ...]],
    what: str,
    partitions: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> tuple[Files, dict[str, PartitionCounts]]:
    """Run a plan; returns what its tasks wrote, by (table, partition) in the order of the calls, and their counts."""
    from features.builder.plan import planned  # Ray Data takes a second to import

    results: dict[int, list[Written]] = {}
    with closing(planned(what, function, calls, settings.at_once)) as tasks:
        for number, written in tasks:
            results[number] = written
            progress(what, len(results), len(calls))
    files: Files = {}
    counts = {partition: PartitionCounts() for partition in partitions}
    for written in (record for number in range(len(calls)) for record in results[number]):
        if written.file is not None:
            files.setdefault((written.table, written.partition), []).append(written.file)
        counts[written.partition] += written.counts
    return files, counts


def _commit(settings: BuildSettings, table: str, schema: pa.Schema, partitions: Sequence[str], files: Files) -> None:
    written = {
        partition: sorted(files.get((table, partition), []), key=lambda file: file.path) for partition in partitions
    }
    replace_partitions(settings.table_root(table), written, schema, settings.storage_options)


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
            "no samples of it were committed. Please report this as a defect of corank."
        )


# --- tasks --------------------------------------------------------------------------------------------


def _layout(table: Table) -> pa.Schema:
    """Columns of a table as :meth:`Table.scan` gives them, without the partition's."""
    empty = pl.DataFrame(schema=table.scan().collect_schema())
    layout: pa.Schema = empty.to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    return pa.schema([field for field in layout if field.name not in ("dt", "bucket")])


def _spread(settings: BuildSettings, role: str, dt: str) -> list[Written]:
    """Write one partition of a table by bucket of users, a portion of rows at a time."""
    table = settings.tables[role]
    names, written = _layout(table).names, []
    partitions = None if dt == WHOLE else [dt]
    for portion in table.portions(table.scan(partitions), SPREAD_ROWS, partitions):
        marked = portion.with_columns(bucket_column(pl.col("user_id"), settings.buckets).alias("bucket"))
        for (bucket,), part in marked.partition_by("bucket", as_dict=True).items():
            content = arrow(part.select(names))
            record = _write(settings, f"{LAID_OUT}/{role}", dt, int(bucket), content, {})
            written.append(replace(record, table=role))
    return written


def _count_items(settings: BuildSettings, bucket: int, partitions: Sequence[str], shards: int) -> list[Written]:
    """Write what a bucket of users adds to the counts of items, by share of the buckets of items."""
    parts = pl.concat(item_deltas(settings, bucket, partitions))
    shares = [parts.filter(pl.col("bucket") % shards == shard).drop("bucket") for shard in range(shards)]
    return [
        # also for a share without rows, which then has the layout of the others
        Written(ITEM_DELTAS, WHOLE, _file(settings, ITEM_DELTAS, WHOLE, shard, arrow(share)), {})
        for shard, share in enumerate(shares)
    ]


def _fold_items(
    settings: BuildSettings,
    shard: int,
    shards: int,
    partitions: Sequence[str],
    earlier: Sequence[str],
    deltas: Sequence[DataFile],
) -> list[Written]:
    """Fold a share of the buckets of items."""
    rows = pl.DataFrame(read_files(settings.table_root(ITEM_DELTAS), deltas, settings.storage_options))
    rows = rows.with_columns(bucket_column(pl.col("item_id"), settings.buckets).alias("bucket"))
    return [
        _write(settings, ITEM_AGGREGATES, partition, bucket, content, {})
        for bucket in range(shard, settings.buckets, shards)
        for partition, content in fold_items(
            settings, bucket, rows.filter(pl.col("bucket") == bucket), partitions, earlier
        )
    ]


def _fold_users(
    settings: BuildSettings, bucket: int, partitions: Sequence[str], earlier: Sequence[str]
) -> list[Written]:
    """Fold a bucket of users."""
    return [
        _write(settings, table, partition, bucket, content, counts)
        for table, partition, content, counts in fold_bucket(settings, bucket, partitions, earlier)
    ]


def _write(
    settings: BuildSettings, table: str, partition: str, bucket: int, content: pa.Table, counts: Mapping[str, int]
) -> Written:
    file = _file(settings, table, partition, bucket, content) if content.num_rows else None
    return Written(table, partition, file, dict(counts))


def _file(settings: BuildSettings, table: str, partition: str, bucket: int, content: pa.Table) -> DataFile:
    where = {"dt": partition, "bucket": str(bucket)}
    return write_file(settings.table_root(table), content, where, settings.storage_options)
