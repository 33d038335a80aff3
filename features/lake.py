"""Delta tables: reading partitions, their fingerprints, and replacing a partition in one commit."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
from deltalake.fs import DeltaStorageHandler
from deltalake.transaction import AddAction, RemoveAction
from pyarrow import fs

from features.encoding import bucket_column
from features.errors import CorankError

STAMP = pl.Datetime("us", "UTC")


@dataclass(frozen=True)
class Table:
    """A Delta table and how its columns are called here.

    Attributes:
        name: what messages call it (its role or its name in the config).
        uri: local path or ``s3://`` address.
        columns: canonical name → the user's own column name; columns not named keep theirs.
        storage_options: handed to deltalake (credentials, endpoint).
    """

    name: str
    uri: str
    columns: Mapping[str, str] = field(default_factory=dict)
    storage_options: Mapping[str, str] = field(default_factory=dict)

    def exists(self) -> bool:
        return DeltaTable.is_deltatable(self.uri, dict(self.storage_options))

    def delta(self) -> DeltaTable:
        """The table at its newest version.

        Raises:
            CorankError: there is no Delta table at this address.
        """
        if not self.exists():
            raise CorankError(
                f"table {self.name}: there is no Delta table at {self.uri}. "
                "Correct `tables` in the config, or write the table (`corank import --help`)."
            )
        return DeltaTable(self.uri, storage_options=dict(self.storage_options))

    def schema(self) -> pa.Schema:
        """Arrow schema under the canonical names."""
        names = self._canonical()
        schema = pa.schema(self.delta().schema().to_arrow())
        return pa.schema([column.with_name(names.get(column.name, column.name)) for column in schema])

    def partitions(self) -> list[str]:
        """All values of ``dt`` with rows, oldest first; empty when the table is not partitioned by dt."""
        delta = self.delta()
        if "dt" not in delta.metadata().partition_columns:
            return []
        return sorted({str(part["dt"]) for part in delta.partitions() if part["dt"] is not None})

    def is_bucketed(self) -> bool:
        """Whether the table is laid out by (dt, bucket), bucket = user hash mod the number of buckets."""
        return self.exists() and "bucket" in self.delta().metadata().partition_columns

    def scan(self, partitions: Iterable[str] | None = None) -> pl.LazyFrame:
        """Rows under canonical names, ``ts`` and ``updated_at`` as int64 microseconds UTC."""
        names = self._canonical()
        frame = pl.scan_delta(self.delta())
        if partitions is not None:
            frame = frame.filter(pl.col("dt").cast(pl.String).is_in(list(partitions)))
        schema = frame.collect_schema()
        frame = frame.rename({own: name for own, name in names.items() if own in schema})
        stamps = [
            pl.col(name).dt.cast_time_unit("us").dt.timestamp("us").alias(name)
            for name, kind in frame.collect_schema().items()
            if name in ("ts", "updated_at") and isinstance(kind, pl.Datetime)
        ]
        return frame.with_columns(stamps) if stamps else frame

    def slice(self, partitions: Iterable[str], bucket: int, buckets: int) -> pl.DataFrame:
        """The rows of one bucket in these partitions.

        Read directly where the table is laid out by (dt, bucket), by hashing the users where not.

        Raises:
            CorankError: the table is laid out with another number of buckets.
        """
        frame = self.scan(partitions)
        if self.is_bucketed():
            rows = frame.filter(pl.col("bucket").cast(pl.Int32) == bucket).drop("bucket").collect()
            users = rows.select(pl.col("user_id").unique())
            if not users.select((bucket_column(pl.col("user_id"), buckets) == bucket).all()).item():
                raise CorankError(
                    f"table {self.name} at {self.uri}: its column bucket is not the user hash modulo {buckets}. "
                    "Set `buckets` in the config to the number the table was laid out with."
                )
            return rows
        return frame.collect().filter(bucket_column(pl.col("user_id"), buckets) == bucket)

    def fingerprints(self, cache: dict[str, Any] | None = None) -> dict[str, str]:
        """Per partition the table's id and the last commit with data change that touched it.

        Compaction and other commits without data change do not count. ``cache`` is what an earlier
        call left there; only later commits are read then, so that log clean-up changes nothing.
        """
        delta = self.delta()
        identity, newest = str(delta.metadata().id)[:8], delta.version()
        cache = cache if cache is not None else {}
        if cache.get("table") != identity or cache.get("version", -1) > newest:
            cache.clear()
            cache.update({"table": identity, "version": -1, "partitions": {}})
        touched: dict[str, int] = cache["partitions"]
        log = fs.PyFileSystem(DeltaStorageHandler(self.uri, options=dict(self.storage_options)))
        for version in range(cache["version"] + 1, newest + 1):
            name = f"_delta_log/{version:020d}.json"
            if log.get_file_info(name).type == fs.FileType.NotFound:
                continue  # cleaned up behind a checkpoint; its partitions are filled in below
            for line in log.open_input_file(name).read().splitlines():
                entry = json.loads(line)
                action = entry.get("add") or entry.get("remove")
                if action and action.get("dataChange", True):
                    touched[str((action.get("partitionValues") or {}).get("dt"))] = version
        present = self.partitions() or ["None"]
        for partition in present:
            touched.setdefault(partition, 0)
        cache["version"] = newest
        return {partition: f"{identity}@{touched[partition]}" for partition in present}

    def _canonical(self) -> dict[str, str]:
        return {own: name for name, own in self.columns.items()}


@dataclass(frozen=True)
class DataFile:
    """A Parquet file that was written but is not visible until :func:`replace_partition` commits it."""

    path: str
    size: int
    rows: int
    partition: dict[str, str]


def write_file(root: str, rows: pa.Table, partition: Mapping[str, str], options: Mapping[str, str]) -> DataFile:
    """Write one Parquet file below a table's root, under a name nobody else uses.

    Args:
        rows: without the partition columns.
        partition: partition column → value, e.g. ``{"dt": "2026-01-05", "bucket": "3"}``.
    """
    directory = "/".join(f"{column}={value}" for column, value in partition.items())
    path = f"{directory}/part-{uuid.uuid4().hex}.parquet"
    if "://" not in root:
        (Path(root) / directory).mkdir(parents=True, exist_ok=True)
    store = fs.PyFileSystem(DeltaStorageHandler(root, options=dict(options)))
    with store.open_output_stream(path) as sink:
        pq.write_table(rows, sink, compression="zstd")
    return DataFile(path, store.get_file_info(path).size, rows.num_rows, dict(partition))


def replace_partition(
    root: str, partition: str, files: Iterable[DataFile], schema: pa.Schema, options: Mapping[str, str]
) -> int:
    """Make exactly these files the content of partition ``dt``, in one commit. Idempotent.

    Args:
        schema: of the whole table, partition columns (``dt``, ``bucket``) included.

    Returns:
        the version of the table that shows the new content.
    """
    options = dict(options)
    if DeltaTable.is_deltatable(root, options):
        table = DeltaTable(root, storage_options=options)
    else:
        if "://" not in root:
            Path(root).mkdir(parents=True, exist_ok=True)
        table = DeltaTable.create(
            root, Schema.from_arrow(schema), mode="ignore", partition_by=["dt", "bucket"], storage_options=options
        )
    actions: list[AddAction | RemoveAction] = [
        AddAction(file.path, file.size, file.partition, 0, True, json.dumps({"numRecords": file.rows}))
        for file in files
    ]
    table.create_write_transaction(
        actions,
        mode="overwrite",
        schema=Schema.from_arrow(schema),
        partition_by=["dt", "bucket"],
        partition_filters=[("dt", "=", partition)],
        commit_properties=CommitProperties(custom_metadata={"corank.partition": partition}),
        post_commithook_properties=PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False),
    )
    return DeltaTable(root, storage_options=options).version()
