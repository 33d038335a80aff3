"""Delta tables: reading partitions, their fingerprints, and replacing a partition in one commit."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.fs import DeltaStorageHandler
from deltalake.transaction import AddAction, RemoveAction
from pyarrow import fs

from features.encoding import bucket_column
from features.errors import CorankError, UnreadableError

STAMP = pl.Datetime("us", "UTC")

READ_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, DeltaError, OSError)
"""What reading a damaged file can raise; Polars panics when a file is shorter than the Delta log says."""

WIDER = (("int8", "int16", "int32", "int64"), ("float32", "float64"))
"""Types that read as any later one of their row, without a loss."""

SAME_TYPES = {
    "large_string": "string",
    "string_view": "string",
    "large_binary": "binary",
    "binary_view": "binary",
    "float": "float32",
    "double": "float64",
}
"""Arrow's other names of one Delta type."""

SHOWN_FILES = 5


@dataclass(frozen=True)
class Table:
    """A Delta table and how its columns are called here.

    Attributes:
        name: what messages call it (its role or its name in the config).
        uri: local path or ``s3://`` address.
        columns: canonical name → the user's own column name; columns not named keep theirs.
        storage_options: handed to deltalake (credentials, endpoint).
        opened: see :meth:`pinned`.
    """

    name: str
    uri: str
    columns: Mapping[str, str] = field(default_factory=dict)
    storage_options: Mapping[str, str] = field(default_factory=dict)
    opened: DeltaTable | None = field(default=None, compare=False, repr=False)

    def pinned(self) -> Table:
        """The table at the version it has now, opened once; for a task that reads it many times. Not picklable."""
        return replace(self, opened=self.delta())

    def exists(self) -> bool:
        return self.opened is not None or DeltaTable.is_deltatable(self.uri, dict(self.storage_options))

    def delta(self) -> DeltaTable:
        """The table at its newest version.

        Raises:
            CorankError: there is no Delta table at this address.
            UnreadableError: its log is damaged.
        """
        if self.opened is not None:
            return self.opened
        if not self.exists():
            raise CorankError(
                f"table {self.name}: there is no Delta table at {self.uri}. "
                "Correct `tables` in the config, or write the table (`corank import --help`)."
            )
        try:
            return DeltaTable(self.uri, storage_options=dict(self.storage_options))
        except (DeltaError, OSError) as error:
            raise UnreadableError(
                f"table {self.name}: the Delta log of {self.uri} cannot be read ({_first_line(error)}); "
                "restore its files in _delta_log"
            ) from error

    def schema(self) -> pa.Schema:
        """Arrow schema under the canonical names."""
        names = self._canonical()
        schema = pa.schema(self.delta().schema().to_arrow())
        return pa.schema([column.with_name(names.get(column.name, column.name)) for column in schema])

    def types(self) -> dict[str, str]:
        """Canonical name of every column → :func:`type_name` of its type."""
        return {column.name: type_name(column.type) for column in self.schema()}

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

    def collect(self, frame: pl.LazyFrame, partitions: Iterable[str] | None = None) -> pl.DataFrame:
        """The result of a query on this table's :meth:`scan`.

        Args:
            partitions: those that the query reads; default: all.

        Raises:
            UnreadableError: a file cannot be read; it is named.
        """
        try:
            return frame.collect()
        except READ_ERRORS as error:
            self.check_files(partitions, whole=True)
            # every file can be read, so either the query is wrong, or a file was away only meanwhile
            if isinstance(error, OSError):
                raise UnreadableError(f"table {self.name} at {self.uri}: {error}; run again") from error
            raise

    def portions(
        self, frame: pl.LazyFrame, rows: int, partitions: Iterable[str] | None = None
    ) -> Iterator[pl.DataFrame]:
        """The result of a query on this table's :meth:`scan`, some rows at a time; raises like :meth:`collect`."""
        try:
            yield from frame.collect_batches(chunk_size=rows)
        except READ_ERRORS:
            self.check_files(partitions, whole=True)
            raise

    def size(self) -> int:
        """Bytes of the newest version's files."""
        return int(pc.sum(pa.table(self.delta().get_add_actions(flatten=True))["size_bytes"]).as_py() or 0)

    def check_files(self, partitions: Iterable[str] | None = None, whole: bool = False) -> None:
        """Look at every file's size and footer, which costs little and finds nearly all damage.

        Args:
            partitions: whose files; default: all.
            whole: read the files to the end; finds damaged pages too.

        Raises:
            UnreadableError: names table, partition, file and problem.
        """
        delta = self.delta()
        wanted = None if partitions is None else set(partitions)
        schema = pa.schema(delta.schema().to_arrow())
        types = {column.name: type_name(column.type) for column in schema}
        actions = pa.table(delta.get_add_actions(flatten=True))
        days = actions["partition.dt"].to_pylist() if "partition.dt" in actions.column_names else [None] * len(actions)
        files = [
            (path, size, None if day is None else str(day))
            for path, size, day in zip(
                actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), days, strict=True
            )
            if wanted is None or str(day) in wanted
        ]
        store = fs.PyFileSystem(DeltaStorageHandler(self.uri, options=dict(self.storage_options)))
        with ThreadPoolExecutor(16) as pool:
            problems = pool.map(lambda file: _problem_of_file(store, file[0], file[1], types, whole), files)
            broken = [(path, day, problem) for (path, _, day), problem in zip(files, problems, strict=True) if problem]
        if broken:
            named = [
                f"table {self.name}{f', partition {day}' if day else ''}: file {self.uri}/{path} {problem}"
                for path, day, problem in sorted(broken, key=lambda one: (one[1] or "", one[0]))
            ]
            more = [f"… and {len(named) - SHOWN_FILES:,} more files"] if len(named) > SHOWN_FILES else []
            remedy = "restore the files, or write their partition again"
            raise UnreadableError("\n".join([*named[:SHOWN_FILES], *more]) + f"; {remedy}")

    def require_buckets(self, buckets: int) -> None:
        """Of a table laid out by bucket: nobody would read what lies in a bucket beyond these, or in none.

        Raises:
            CorankError: the table is laid out with another number of buckets.
        """
        there = {str(one["bucket"]) for one in self.delta().partitions()}
        if not all(one.isdigit() and int(one) < buckets for one in there):
            raise self._other_buckets(buckets)

    def _other_buckets(self, buckets: int) -> CorankError:
        return CorankError(
            f"table {self.name} at {self.uri}: its column bucket is not the user hash modulo {buckets}. "
            "Set `buckets` in the config to the number the table was laid out with."
        )

    def slice(self, partitions: Iterable[str] | None, bucket: int, buckets: int) -> pl.DataFrame:
        """The rows of one bucket in these partitions; None: of the whole table.

        Read directly where the table is laid out by (dt, bucket), by hashing the users where not.

        Raises:
            CorankError: the table is laid out with another number of buckets.
            UnreadableError: a file cannot be read; it is named.
        """
        partitions = None if partitions is None else list(partitions)
        frame = self.scan(partitions)
        if self.is_bucketed():
            rows = self.collect(frame.filter(pl.col("bucket").cast(pl.Int32) == bucket).drop("bucket"), partitions)
            users = rows.select(pl.col("user_id").unique())
            if not users.select((bucket_column(pl.col("user_id"), buckets) == bucket).all()).item():
                raise self._other_buckets(buckets)
            return rows
        return self.collect(frame, partitions).filter(bucket_column(pl.col("user_id"), buckets) == bucket)

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


def type_name(kind: pa.DataType) -> str:
    """Name of a type as Delta tells types apart: encodings, list layouts and time units do not count."""
    if pa.types.is_dictionary(kind):
        return type_name(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind):
        return f"list<{type_name(kind.value_type)}>"
    if pa.types.is_nested(kind):
        return "map" if pa.types.is_map(kind) else "struct"
    if pa.types.is_timestamp(kind):
        return "timestamp"
    name = str(kind)
    return SAME_TYPES.get(name, name)


def reads_as(stored: str, wanted: str) -> bool:
    """Whether values of one type (:func:`type_name`) read as another without a loss."""
    if stored in (wanted, "null"):
        return True
    if stored.startswith("list<") and wanted.startswith("list<"):
        return reads_as(stored[5:-1], wanted[5:-1])
    return any(stored in row and wanted in row[row.index(stored) :] for row in WIDER)


def _problem_of_file(store: fs.FileSystem, path: str, size: int, types: Mapping[str, str], whole: bool) -> str | None:
    """What is wrong with a Parquet file that the Delta log says to have this size and these columns."""
    try:
        info = store.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            return "is missing"
        if info.size != size:
            return f"has {info.size:,} bytes, but the Delta log says {size:,}"
        with store.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            stored = {column.name: type_name(column.type) for column in file.schema_arrow}
            if whole:
                for group in range(file.num_row_groups):
                    file.read_row_group(group)
    except READ_ERRORS as error:
        return f"is no readable Parquet file ({_first_line(error)})"
    differing = [
        f"stores column {column} as {kind}, but the table says {types[column]}"
        for column, kind in stored.items()
        if column in types and not reads_as(kind, types[column])
    ]
    return ", ".join(differing) or None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class DataFile:
    """A Parquet file that was written but is not visible until :func:`replace_partition` commits it.

    Attributes:
        times: least and largest ``ts``, where the rows have one of their own; readers of a window skip other files.
    """

    path: str
    size: int
    rows: int
    partition: dict[str, str]
    times: tuple[int, int] | None = None

    @property
    def statistics(self) -> str:
        """As the Delta log has them."""
        statistics: dict[str, Any] = {"numRecords": self.rows}
        if self.times is not None:
            low, high = self.times
            statistics |= {"minValues": {"ts": low}, "maxValues": {"ts": high}, "nullCount": {"ts": 0}}
        return json.dumps(statistics)


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
    leaves = _leaves(rows.schema)
    times = [
        path
        for name, path, kind in leaves
        if (name == "ts" or name.endswith("__ts")) and pa.types.is_signed_integer(kind)
    ]
    # no value comes twice, so a dictionary of them is only work
    plain = [path for name, path, _ in leaves if name.endswith("__event_id")]
    with store.open_output_stream(path) as sink:
        pq.write_table(
            rows,
            sink,
            compression="zstd",
            use_dictionary=[path for _, path, _ in leaves if path not in (*times, *plain)],
            column_encoding=dict.fromkeys(times, "DELTA_BINARY_PACKED"),
        )
    return DataFile(path, store.get_file_info(path).size, rows.num_rows, dict(partition), _times(rows))


def _times(rows: pa.Table) -> tuple[int, int] | None:
    """Least and largest ``ts``, where all rows have one."""
    ts = rows["ts"] if "ts" in rows.column_names else pa.chunked_array([], pa.int64())
    if not len(ts) or ts.null_count or not pa.types.is_integer(ts.type):
        return None
    return pc.min(ts).as_py(), pc.max(ts).as_py()


def _leaves(schema: pa.Schema) -> list[tuple[str, str, pa.DataType]]:
    """Name, path and type of every column that Parquet stores; parts of a list or struct have paths of their own."""

    def below(path: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            yield from below(f"{path}.list.element", kind.value_type)
        elif pa.types.is_struct(kind):
            for part in kind:
                yield from below(f"{path}.{part.name}", part.type)
        else:
            yield path, kind

    return [(column.name, *leaf) for column in schema for leaf in below(column.name, column.type)]


def replace_partition(
    root: str, partition: str, files: Iterable[DataFile], schema: pa.Schema, options: Mapping[str, str]
) -> int:
    """Make exactly these files the content of partition ``dt``, in one commit. Idempotent.

    Args:
        schema: of the whole table, partition columns (``dt``, ``bucket``) included.

    Returns:
        the version of the table that shows the new content.

    Raises:
        CorankError: another writer came first; nothing is replaced.
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
        AddAction(file.path, file.size, file.partition, 0, True, file.statistics) for file in files
    ]
    with committing(root):
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


@contextmanager
def committing(root: str) -> Iterator[None]:
    """A commit to a table that others may write to.

    Raises:
        CorankError: another writer changed the same files meanwhile, and came first.
    """
    try:
        yield
    except CommitFailedError as error:
        raise CorankError(
            f"table at {root}: another writer changed it meanwhile, so nothing was committed ({_first_line(error)}). "
            "Run again when the other one has ended."
        ) from error
