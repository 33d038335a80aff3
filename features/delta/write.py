"""Writing the tables that corank derives: files that no reader sees yet, and the commit that shows them."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from features.delta.paths import address, patient, table_store
from features.errors import CorankError, first_line, writing

DATA_FILE = re.compile(r"part-[0-9a-f]{32}(?:-([0-9a-f]{32}))?\.parquet")
"""Names of the files that :func:`write_file` writes: unique, and with the digest of all their bytes."""


APPENDS = 12
"""How often an append is tried that meets those of others."""


@dataclass(frozen=True)
class DataFile:
    """A Parquet file that was written but is not visible until :func:`replace_partitions` commits it.

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
        """Statistics in the form of the Delta log."""
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
    if "://" not in root:
        (Path(root) / directory).mkdir(parents=True, exist_ok=True)
    store = table_store(root, options)
    leaves = _leaves(rows.schema)
    times = [
        path
        for name, path, kind in leaves
        if (name == "ts" or name.endswith("__ts")) and pa.types.is_signed_integer(kind)
    ]
    # no value occurs twice, so that a dictionary would save nothing
    plain = [path for name, path, _ in leaves if name.endswith("__event_id")]
    content = pa.BufferOutputStream()
    pq.write_table(
        rows,
        content,
        compression="zstd",
        use_dictionary=[path for _, path, _ in leaves if path not in (*times, *plain)],
        column_encoding=dict.fromkeys(times, "DELTA_BINARY_PACKED"),
    )
    written = content.getvalue().to_pybytes()
    path = f"{directory}/part-{uuid.uuid4().hex}-{_digest(written)}.parquet"
    # through Arrow's buffer, as deltalake's stream takes nothing but plain bytes
    with (
        writing(f"{root}/{path}", len(written)),
        store.open_output_stream(path, buffer_size=len(written) + 1) as sink,
    ):
        sink.write(written)
    return DataFile(path, len(written), rows.num_rows, dict(partition), _times(rows))


def is_as_written(path: str, content: bytes) -> bool:
    """Whether a file of :func:`write_file` has its bytes unchanged; other writers' names have no digest to check."""
    named = DATA_FILE.search(path)
    return named is None or named[1] in (None, _digest(content))


def is_written_for(path: str, partition: str) -> bool:
    """Whether a file that :func:`write_file` wrote lies where rows of this ``dt`` do."""
    named = DATA_FILE.search(path)
    return named is None or named[1] is None or path.startswith(f"dt={partition}/")  # without a digest: another's


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_files(root: str, files: Iterable[DataFile], options: Mapping[str, str]) -> pa.Table:
    """The rows of files that :func:`write_file` wrote below a table's root, visible or not, in the order given."""
    store = table_store(root, options)
    return pa.concat_tables(pq.read_table(file.path, filesystem=store, partitioning=None) for file in files)


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
    """Make exactly these files the content of partition ``dt``, in one commit (:func:`replace_partitions`)."""
    return replace_partitions(root, {partition: files}, schema, options)


def replace_partitions(
    root: str, files: Mapping[str, Iterable[DataFile]], schema: pa.Schema, options: Mapping[str, str]
) -> int:
    """Make exactly these files the content of their partitions ``dt``, all in one commit. Idempotent.

    Args:
        files: by partition; one without any is emptied.
        schema: of the whole table, partition columns (``dt``, ``bucket``) included.

    Returns:
        the version of the table that shows the new content.

    Raises:
        CorankError: another writer came first; nothing is replaced.
    """
    options, uri = patient(options), address(root)
    if DeltaTable.is_deltatable(uri, options):
        table = DeltaTable(uri, storage_options=options)
    else:
        if "://" not in root:
            Path(root).mkdir(parents=True, exist_ok=True)
        table = DeltaTable.create(
            uri, Schema.from_arrow(schema), mode="ignore", partition_by=["dt", "bucket"], storage_options=options
        )
    actions: list[AddAction | RemoveAction] = [
        AddAction(file.path, file.size, file.partition, 0, True, file.statistics)
        for of_partition in files.values()
        for file in of_partition
    ]
    with committing(root):
        table.create_write_transaction(
            actions,
            mode="overwrite",
            schema=Schema.from_arrow(schema),
            partition_by=["dt", "bucket"],
            partition_filters=[("dt", "in", list(files))],
            commit_properties=CommitProperties(custom_metadata={"corank.partitions": ",".join(files)}),
            post_commithook_properties=PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False),
        )
    return DeltaTable(uri, storage_options=options).version()


def append(root: str, rows: pa.Table, options: Mapping[str, str]) -> None:
    """Add rows to a table that is partitioned by ``dt``, in one commit; it is made, or gets new columns, where needed.

    Several processes may append at a time: what meets the commit of another is tried again.

    Args:
        rows: the column ``dt`` included.

    Raises:
        CorankError: a column has another type than in the table, others came first again and again, or the storage is
            full. Nothing is added.
    """
    options, partitions = patient(options), rows["dt"].unique().to_pylist()
    of_dt = {dt: rows.filter(pc.equal(rows["dt"], dt)).drop_columns(["dt"]) for dt in partitions}
    files = [write_file(root, part, {"dt": dt}, options) for dt, part in of_dt.items()]
    retried = Retrying(
        retry=retry_if_exception(_met_another),
        stop=stop_after_attempt(APPENDS),
        wait=wait_random_exponential(multiplier=0.05, max=2),
        reraise=True,
    )
    try:
        with committing(root):
            retried(_commit_appended, root, files, Schema.from_arrow(rows.schema), options)
    except CorankError:  # of any other error, the commit may have come through
        store = table_store(root, options)
        for file in files:
            store.delete_file(file.path)
        raise


def _commit_appended(root: str, files: Iterable[DataFile], schema: Schema, options: Mapping[str, str]) -> None:
    """One try to make a table show these files, too."""
    uri = address(root)
    if not DeltaTable.is_deltatable(uri, dict(options)):
        DeltaTable.create(uri, schema, mode="ignore", partition_by=["dt"], storage_options=dict(options))
    table = DeltaTable(uri, storage_options=dict(options))
    there = {field.name: field for field in table.schema().fields}
    for field in schema.fields:
        if field.name in there and field.type != there[field.name].type:
            raise CorankError(
                f"table at {root}: nothing was added to it: its column {field.name} is "
                f"{_named(there[field.name].type)}, and not {_named(field.type)}; "
                "move the table away, and it is made anew"
            )
    if new := [field for field in schema.fields if field.name not in there]:
        table.alter.add_columns(new)
        table = DeltaTable(uri, storage_options=dict(options))
    table.create_write_transaction(
        [AddAction(file.path, file.size, file.partition, 0, True, file.statistics) for file in files],
        mode="append",
        schema=table.schema(),
        partition_by=["dt"],
    )


def _named(kind: Any) -> str:
    return str(getattr(kind, "type", kind))


def _met_another(error: BaseException) -> bool:
    """Whether a commit failed because another one came first, or made the table first."""
    return isinstance(error, CommitFailedError) or (isinstance(error, DeltaError) and "already exists" in str(error))


@contextmanager
def committing(root: str) -> Iterator[None]:
    """A commit to a table that others may write to.

    Raises:
        CorankError: another writer changed the same files meanwhile, and came first.
        NoSpaceError
    """
    try:
        with writing(f"{root}/_delta_log"):
            yield
    except CommitFailedError as error:
        raise CorankError(
            f"table at {root}: another writer changed it meanwhile, so nothing was committed ({first_line(error)}). "
            "Run again when the other one has ended."
        ) from error
