"""Files of Delta tables that are lost or damaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from pyarrow import fs

from features.delta.columns import reads_as, type_name
from features.delta.files import READ_ERRORS
from features.delta.paths import file_system, table_store
from features.delta.write import is_as_written, is_written_for
from features.errors import UnreadableError, first_line, in_reach, out_of_reach

SHOWN_FILES = 5

MISPLACED = "was written for another partition than the Delta log says"

MENDED = "a table that corank derived is mended by `corank repair`"


class Files(Protocol):
    """The parts of a table (:class:`features.delta.table.Table`) that the checks need."""

    @property
    def name(self) -> str: ...
    @property
    def uri(self) -> str: ...
    @property
    def storage_options(self) -> Mapping[str, str]: ...
    def pinned(self) -> Files: ...
    def delta(self) -> DeltaTable: ...
    def data_files(self, partitions: Sequence[str] | None) -> list[tuple[str, int, str | None]]: ...


@dataclass(frozen=True)
class DamagedFile:
    """A damaged file of a table: path below the table and problem. ``partition``: None where it is cut from ``ts``."""

    path: str
    partition: str | None
    problem: str


def check_files(table: Files, partitions: Iterable[str] | None = None, whole: bool = False) -> None:
    """Look at every file's size and footer, which costs little and finds nearly all damage.

    Args:
        partitions: whose files; default: all.
        whole: read the files to the end, which also finds damaged pages.

    Raises:
        UnreadableError: names table, partition, file and problem.
        UnavailableError: the storage does not answer, or refuses this user; that is no damage.
    """
    broken = damaged_files(table, partitions, whole)
    if broken:
        named = [f"{_place(table, file.partition, file.path)} {file.problem}" for file in broken]
        more = [f"… and {len(named) - SHOWN_FILES:,} more files"] if len(named) > SHOWN_FILES else []
        remedy = f"restore the files, or write their partition again; {MENDED}"
        raise UnreadableError("\n".join([*named[:SHOWN_FILES], *more]) + f"; {remedy}")


def damaged_files(table: Files, partitions: Iterable[str] | None = None, whole: bool = False) -> list[DamagedFile]:
    """The files that :func:`check_files` raises for, ordered by partition and path."""
    table = table.pinned()  # its log is read once
    schema = pa.schema(table.delta().schema().to_arrow())
    types = {column.name: type_name(column.type) for column in schema}
    files = table.data_files(None if partitions is None else list(partitions))
    store = table_store(table.uri, table.storage_options)
    with ThreadPoolExecutor(16) as pool:
        problems = pool.map(partial(_problem_of_file, table, store, types, whole), files)
        broken = [DamagedFile(path, day, why) for (path, _, day), why in zip(files, problems, strict=True) if why]
    broken += [DamagedFile(path, day, MISPLACED) for path, _, day in files if day and not is_written_for(path, day)]
    return sorted(broken, key=lambda file: (file.partition or "", file.path))


def lost_files(table: Files) -> list[DamagedFile]:
    """The files that are gone, or of another size than the Delta log says; costs one listing of the table.

    Raises:
        UnreadableError: the Delta log cannot be read, or a commit in it is empty, which Delta takes for no change.
    """
    store, root = file_system(table.uri)  # it lists files several times faster than deltalake does
    entries = store.get_file_info(fs.FileSelector(root, recursive=True))
    sizes = {entry.path: entry.size for entry in entries if entry.type == fs.FileType.File}
    for path, size in sizes.items():
        if not size and path.startswith(f"{root}/_delta_log/") and path.endswith(".json"):
            raise UnreadableError(
                f"table {table.name}: the Delta log of {table.uri} is damaged: {path} is empty; {MENDED}"
            )
    problems = (
        (path, day, _problem_of_size(sizes.get(f"{root}/{path}"), size)) for path, size, day in table.data_files(None)
    )
    return [DamagedFile(path, day, problem) for path, day, problem in problems if problem]


def _problem_of_size(found: int | None, size: int) -> str | None:
    """
    Args:
        found: bytes of a file; None: it is gone.
    """
    if found is None:
        return "is missing"
    return None if found == size else f"has {found:,} bytes, but the Delta log says {size:,}"


def _problem_of_file(
    table: Files, store: fs.FileSystem, types: Mapping[str, str], whole: bool, file: tuple[str, int, str | None]
) -> str | None:
    """What is wrong with a Parquet file that has this size and these columns by the Delta log."""
    path, size, partition = file
    with in_reach(_place(table, partition, path)):
        try:
            info = store.get_file_info(path)
            if problem := _problem_of_size(None if info.type == fs.FileType.NotFound else info.size, size):
                return problem
            with store.open_input_file(path) as stream:
                if whole and not is_as_written(path, stream.readall()):
                    return "has other bytes than were written"
                content = pq.ParquetFile(stream)
                stored = {column.name: type_name(column.type) for column in content.schema_arrow}
                for group in range(content.num_row_groups if whole else 0):
                    content.read_row_group(group)
        except READ_ERRORS as error:
            if out_of_reach(error):
                raise
            return f"is no readable Parquet file ({first_line(error)})"
    differing = [
        f"stores column {column} as {kind}, but the table says {types[column]}"
        for column, kind in stored.items()
        if column in types and not reads_as(kind, types[column])
    ]
    return ", ".join(differing) or None


def _place(table: Files, partition: str | None, path: str) -> str:
    return f"table {table.name}{f', partition {partition}' if partition else ''}: file {table.uri}/{path}"
