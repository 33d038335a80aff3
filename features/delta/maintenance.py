"""Upkeep of the Delta tables that corank derived: compaction, vacuum, erasing users, dropping partitions.

All functions work alike: they write new files where no reader sees them, one commit exchanges them for the old ones,
and only :func:`vacuum` removes bytes. So a table stays readable if a call is killed, and the same call finishes the
work. They are for derived tables only, never for the user's own log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable, PostCommitHookProperties
from deltalake.transaction import AddAction, RemoveAction
from pyarrow import fs

from features.delta.damage import MENDED
from features.delta.paths import cannot_read, file_system, table_store
from features.delta.table import Table
from features.delta.write import DATA_FILE, DataFile, committing, write_file
from features.errors import CorankError, UnreadableError

KEEP_HOURS = 168
"""Default age in hours of unreferenced files before vacuum removes them: a week, as Delta has it."""

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


@dataclass(frozen=True)
class Size:
    """What a table occupies in storage, including files that no version of it needs any more."""

    files: int
    bytes: int


@dataclass(frozen=True)
class FoundUsers:
    """Where some users are in a table.

    Attributes:
        users: all that were looked for.
        rows: rows of every user found.
        files: files that hold at least one of those rows.
    """

    table: Table
    users: frozenset[str]
    rows: dict[str, int]
    files: list[DataFile]

    @property
    def partitions(self) -> list[str]:
        """The ``dt`` with rows of these users, oldest first."""
        return sorted({file.partition["dt"] for file in self.files})


def derived_tables(root: str) -> list[Table]:
    """Every Delta table directly below a folder (or ``s3://`` prefix), by name; none when there is no folder."""
    store, path = file_system(root)
    entries = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)
    return [table for table in (Table(name, f"{root}/{name}") for name in names) if table.exists()]


def size_in_storage(table: Table) -> Size:
    """Data files below the table's root, whether a version refers to them or not."""
    entries = _store(table).get_file_info(fs.FileSelector("", recursive=True))
    sizes = [entry.size for entry in entries if entry.path.endswith(".parquet") and "_delta_log" not in entry.path]
    return Size(len(sizes), sum(sizes))


def compact(table: Table, progress: Progress = lambda *_: None) -> int:
    """Make every slice (dt, bucket) one file, in one commit per ``dt`` that changes no data.

    Rows keep the order in which the reader sees them (by path within a slice), which Delta's own optimize does
    not promise. Memory is bounded by one slice.

    Returns:
        files that were replaced.
    """
    crowded = [
        slices
        for _, files in groupby(_files(table), key=lambda file: file.partition["dt"])
        if (slices := [group for group in _slices(files) if len(group) > 1])
    ]
    replaced = 0
    for done, slices in enumerate(crowded, start=1):
        old = [file for group in slices for file in group]
        new = [_write(table, [_read(table, file) for file in group], group[0].partition) for group in slices]
        _exchange(table, old, new, data_change=False)
        replaced += len(old)
        progress(done, len(crowded))
    return replaced


def vacuum(table: Table, keep_hours: int = KEEP_HOURS, written: bool = False) -> int:
    """Remove the files that the newest version does not refer to, also what killed runs left.

    Args:
        keep_hours: files that became unreferenced later than this many hours ago stay, for those who still read
            an older version. 0 keeps none: nobody may be writing the table meanwhile, unless ``written``.
        written: others may be writing: files that no version ever referred to stay.

    Returns:
        files removed.
    """
    removed = table.delta().vacuum(
        retention_hours=keep_hours, dry_run=False, enforce_retention_duration=False, full=not written
    )
    return len(removed)


def remove_uncommitted(table: Table) -> int:
    """Remove the data files below a derived table's root that no version ever showed: what killed writers left.

    The table itself may not have been made yet. What an older version shows stays, so readers miss nothing; but nobody
    may be writing meanwhile.

    Returns:
        files removed.
    """
    store, root = file_system(table.uri)
    files = store.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    written = [file for file in files if DATA_FILE.fullmatch(file.base_name)]
    shown = _ever_shown(table) if written else set()
    left = [file.path for file in written if file.base_name not in shown]
    for path in left:
        store.delete_file(path)
    return len(left)


def find_users(table: Table, users: Collection[str], progress: Progress = lambda *_: None) -> FoundUsers:
    """Where these users have rows; reads no column but ``user_id``. A table without that column has none of them.

    It trusts no layout: a table built with another number of buckets is searched as well.
    """
    wanted, rows, holding = frozenset(users), dict[str, int](), list[DataFile]()
    files = _files(table) if "user_id" in table.schema().names else []
    for done, file in enumerate(files, start=1):
        ids = _user_ids(_read(table, file, ["user_id"]))
        counts = pc.value_counts(ids.filter(pc.is_in(ids, pa.array(sorted(wanted), pa.string())))).to_pylist()
        for entry in counts:
            rows[entry["values"]] = rows.get(entry["values"], 0) + entry["counts"]
        if counts:
            holding.append(file)
        progress(done, len(files))
    return FoundUsers(table, wanted, rows, holding)


def erase_users(found: FoundUsers) -> None:
    """Delete the rows that were found, in one commit. The bytes go with ``vacuum(table, keep_hours=0)``."""
    new = []
    for file in found.files:
        rest = _without(_read(found.table, file), found.users)
        if rest.num_rows:
            new.append(_write(found.table, [rest], file.partition))
    if found.files:
        _exchange(found.table, found.files, new, data_change=True)


def sample_counts(samples: Table, partition: str, without: Collection[str], timelines: Sequence[str]) -> dict[str, int]:
    """What a partition of the sample table holds but for some users; reads only the columns that are counted.

    Args:
        timelines: the ts column of every sequence.

    Returns:
        candidates, requests, users and timeline_events, as the sample builder counts them.
    """
    counts = dict.fromkeys(("candidates", "requests", "users", "timeline_events"), 0)
    columns = ["user_id", *timelines, "requests.list.element.candidates.list.element.item_id"]
    for file in _files(samples):
        if file.partition["dt"] != partition:
            continue
        rows = _without(_read(samples, file, columns), without)
        requests = rows["requests"].combine_chunks().flatten()
        counts["users"] += rows.num_rows
        counts["requests"] += len(requests)
        counts["candidates"] += len(requests.field("candidates").flatten())
        counts["timeline_events"] += sum(len(rows[name].combine_chunks().flatten()) for name in timelines)
    return counts


def drop_partitions(table: Table, partitions: Collection[str]) -> int:
    """Drop whole partitions in one commit; returns the number of files. The bytes go with a later vacuum."""
    old = [file for file in _files(table) if file.partition["dt"] in partitions]
    if old:
        _exchange(table, old, [], data_change=True)
    return len(old)


# --- files of a table -----------------------------------------------------------------------------------


def _files(table: Table) -> list[DataFile]:
    """Files of the newest version in the reader's order: by dt, bucket, path."""
    delta = table.delta()
    actions = pa.table(delta.get_add_actions(flatten=True))
    columns = delta.metadata().partition_columns
    if "dt" not in columns:
        raise CorankError(
            f"table {table.name} at {table.uri}: it is not partitioned by dt, so corank did not derive it"
        )
    files = [
        DataFile(row["path"], row["size_bytes"], 0, {name: str(row[f"partition.{name}"]) for name in columns})
        for row in actions.to_pylist()
    ]
    return sorted(files, key=lambda file: (file.partition["dt"], *file.partition.values(), file.path))


def _ever_shown(table: Table) -> set[str]:
    """Names of all data files that any commit names, except commits that were cleaned up from the log."""
    if not table.exists():
        return set()
    store, paths = _store(table), [file.path for file in _files(table)]
    for entry in store.get_file_info(fs.FileSelector("_delta_log")):
        if entry.path.endswith(".json"):
            with store.open_input_stream(entry.path) as stream:
                try:
                    actions = [json.loads(line) for line in stream.read().splitlines()]
                except ValueError as error:
                    raise UnreadableError(
                        f"table {table.name} at {table.uri}: the Delta log's {entry.path} is damaged; {MENDED}"
                    ) from error
            paths += [action[kind]["path"] for action in actions for kind in ("add", "remove") if kind in action]
    return {path.rpartition("/")[2] for path in paths}


def _slices(files: Iterable[DataFile]) -> list[list[DataFile]]:
    return [list(group) for _, group in groupby(files, key=lambda file: file.partition)]


def _read(table: Table, file: DataFile, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.ParquetFile(file.path, filesystem=_store(table)).read(columns=columns)  # takes nested columns, too
    except (OSError, pa.ArrowException) as error:
        raise cannot_read(table.name, table.uri, file.path, error) from error


def _write(table: Table, parts: list[pa.Table], partition: dict[str, str]) -> DataFile:
    rows = pa.concat_tables(parts, promote_options="default")
    return write_file(table.uri, rows, partition, table.storage_options)


def _without(rows: pa.Table, users: Collection[str]) -> pa.Table:
    """The rows of everyone else; a quarantined row may have no user at all and stays."""
    return rows.filter(pc.invert(pc.is_in(_user_ids(rows), pa.array(sorted(users), pa.string()))))


def _user_ids(rows: pa.Table) -> pa.ChunkedArray:
    return rows["user_id"].cast(pa.string())


def _exchange(table: Table, old: Iterable[DataFile], new: Iterable[DataFile], data_change: bool) -> None:
    """Exchange files for others in one commit."""
    delta: DeltaTable = table.delta()
    now = time.time_ns() // 1_000_000
    actions: list[AddAction | RemoveAction] = [
        AddAction(file.path, file.size, file.partition, now, data_change, file.statistics) for file in new
    ]
    actions += [RemoveAction(file.path, data_change, now, file.size, dict(file.partition)) for file in old]
    with committing(table.uri):
        delta.create_write_transaction(
            actions,
            mode="append",
            schema=delta.schema(),
            partition_by=delta.metadata().partition_columns,
            post_commithook_properties=PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False),
        )


def _store(table: Table) -> fs.FileSystem:
    return table_store(table.uri, table.storage_options)
