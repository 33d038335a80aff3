"""Delta tables: reading partitions under canonical names, and their fingerprints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NoReturn
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, DeltaProtocolError

from features.delta.columns import partition_column, read, read_type, row_text, type_name
from features.delta.damage import MENDED, check_files
from features.delta.files import READ_ERRORS, LocalPaths, scan_files
from features.delta.fingerprints import WHOLE_TABLE, digest_of_commit, fingerprints
from features.delta.paths import address, patient, table_store
from features.encoding import bucket_column
from features.errors import (
    CorankError,
    DataGateError,
    UnavailableError,
    UnreadableError,
    first_line,
    in_reach,
    out_of_reach,
)
from features.schema import OTHER_UNITS, Grain, partition_bounds, partition_of

STAMP = pl.Datetime("us", "UTC")

MADE_OF = {
    "updated_at": "every profile is valid from the beginning",
    "event_id": "an event is identified by its row's content",
    "dt": "partitions are cut from ts",
}
"""Columns that a table may lack, and what stands in for them."""

READ_FEATURES = {"deletionVectors", "timestampNtz"}
"""Delta's table features that deltalake and Polars can read."""

UNSUPPORTED = re.compile("unsupported|not supported|catalog-managed", re.IGNORECASE)
"""Messages of deltalake on a feature or a protocol version that it does not know; the log itself is whole."""

MAPPING_VERSION = 2
"""Delta's reader version that brought column mapping."""


@dataclass(frozen=True)
class Table:
    """A Delta table and how its columns are called here.

    Attributes:
        name: what messages call it (its role or its name in the config).
        uri: local path or ``s3://`` address.
        columns: canonical name → the user's own column name; columns not named keep theirs. A mapped name always means
            the column that it is mapped to: one of the table's own columns with that name cannot be reached.
        storage_options: handed to deltalake (credentials, endpoint).
        version: the one that is read, whatever is written meanwhile; None: the newest.
        grain: of a user's log, which is read by partitions; None: of a profile table, and of the builder's own.
        partition: of a log, its partition column; ``ts``: partitions are cut from the rows' times. Default: ``dt``
            where the log is partitioned by it, else ``ts``.
        makes: columns that :meth:`scan` makes where the table has none: ``updated_at`` (0: from the beginning),
            ``event_id`` (the row's content).
        opened: see :meth:`pinned`.
    """

    name: str
    uri: str
    columns: Mapping[str, str] = field(default_factory=dict)
    storage_options: Mapping[str, str] = field(default_factory=dict)
    version: int | None = None
    grain: Grain | None = None
    partition: str | None = None
    makes: tuple[str, ...] = ()
    opened: DeltaTable | None = field(default=None, compare=False, repr=False)

    def pinned(self) -> Table:
        """The table at the version it has now, opened once; for a task that reads it many times. Not picklable."""
        return replace(self, opened=self.delta())

    def at(self, version: int | None) -> Table:
        """The table at a version; None: the newest whenever it is read."""
        return replace(self, version=version, opened=None)

    def exists(self) -> bool:
        """
        Raises:
            UnavailableError: its storage does not answer, or refuses this user.
        """
        if self.opened is not None:
            return True
        with in_reach(f"table {self.name} at {self.uri}"):
            return DeltaTable.is_deltatable(address(self.uri), patient(self.storage_options))

    def delta(self) -> DeltaTable:
        """The table at its version.

        Raises:
            CorankError: there is no Delta table at this address.
            UnreadableError: its log is damaged, its version is gone, or it uses a Delta feature that cannot be read.
            UnavailableError: its storage does not answer, or refuses this user.
        """
        if self.opened is not None:
            return self.opened
        if not self.exists():
            raise CorankError(
                f"table {self.name}: there is no Delta table at {self.uri}. "
                "Correct `tables` in the config, or write the table (`corank import --help`)."
            )
        try:
            with in_reach(f"table {self.name} at {self.uri}"):
                table = LocalPaths(
                    address(self.uri), version=self.version, storage_options=patient(self.storage_options)
                )
            unread = _unread_features(table)
        except DeltaProtocolError as error:
            unread = first_line(error)
        except (DeltaError, OSError) as error:
            unread = first_line(error)
            if not UNSUPPORTED.search(unread):
                at = "" if self.version is None else f" at version {self.version}"
                raise UnreadableError(
                    f"table {self.name}: the Delta log of {self.uri} cannot be read{at} ({unread}); "
                    f"restore its files in _delta_log; {MENDED}"
                ) from error
        if unread:
            raise UnreadableError(
                f"table {self.name} at {self.uri} uses a Delta feature that cannot be read: {unread}. Write a copy "
                "without it and name that in the config."
            )
        return table

    def schema(self) -> pa.Schema:
        """Arrow schema under the canonical names, with the table's own types and not those of :meth:`read_schema`."""
        delta = self.delta()
        stored = pa.schema(delta.schema().to_arrow())
        return pa.schema([stored.field(column).with_name(name) for name, column in self._names(delta).items()])

    def read_schema(self) -> pa.Schema:
        """Arrow schema of what :meth:`scan` gives."""
        fields = [pa.field(column.name, read_type(column.name, column.type)) for column in self.schema()]
        made = {"updated_at": pa.int64(), "event_id": pa.string(), "dt": pa.string()}
        missing = set(made) & self._made({column.name for column in fields})
        return pa.schema([*fields, *[pa.field(name, made[name]) for name in sorted(missing)]])

    def types(self) -> dict[str, str]:
        """Canonical name of every column → :func:`type_name` of its type."""
        return {column.name: type_name(column.type) for column in self.schema()}

    def made(self) -> dict[str, str]:
        """The columns that the table lacks and that are made → of what, for people to read."""
        missing = self._made(set(self._names(self.delta())))
        return {name: text for name, text in MADE_OF.items() if name in missing}

    def identifying(self) -> dict[str, Any]:
        """Of an event table without ``event_id``: the columns that identify an event, and their Polars types.

        Raises:
            CorankError, UnreadableError: as :meth:`delta`.
        """
        if "event_id" not in self.made():
            return {}
        kinds = _content(self.scan([]).collect_schema())
        return {name: kind for name, kind in kinds.items() if name != "event_id"}

    def partition_column(self) -> str | None:
        """The table's own column that it is partitioned by; None: partitions are cut from ``ts``, or there are none."""
        if self.partition == "ts":
            return None
        column = self.partition or "dt"
        return column if column in self.delta().metadata().partition_columns else None

    @property
    def is_cut(self) -> bool:
        """Whether partitions are cut from the rows' times."""
        return self.grain is not None and self.partition_column() is None

    def partitions(self) -> list[str]:
        """All values of ``dt`` with rows, oldest first; empty when the table is not partitioned by dt.

        Raises:
            DataGateError: partitions are cut from ``ts``, and one is beyond all calendars.
        """
        column = self.partition_column()
        if column is not None:
            return sorted({str(part[column]) for part in self.delta().partitions() if part[column] is not None})
        if self.grain is None:
            return []
        found: set[str] = set()
        unclear = []
        for path, extent in self._extents().items():
            try:
                names = {partition_of(moment, self.grain) for moment in extent or ()}
            except (ValueError, OverflowError):
                raise DataGateError(
                    f"table {self.name} at {self.uri}: a ts of file {path} is no time of the years 1 to 9999; correct "
                    "it, or cast it to microseconds UTC"
                ) from None
            if len(names) == 1:
                found |= names
            else:
                unclear.append(path)
        if unclear:
            rows = scan_files(self.delta(), unclear)
            source = self._names(self.delta())["ts"]
            ts = read("ts", pl.col(source), rows.collect_schema()[source]).alias("ts")
            cut = rows.select(ts).select(partition_column(pl.col("ts"), self.grain).alias("dt").unique())
            found |= set(self.collect(cut)["dt"].drop_nulls())
        return sorted(found)

    def unpartitioned_rows(self) -> bool:
        """Whether rows belong to no partition: without ``dt``, or, where it is cut from ``ts``, without that."""
        column = self.partition_column()
        if column is not None:
            return any(part[column] is None for part in self.delta().partitions())
        source = self._names(self.delta()).get("ts")
        if self.grain is None or source is None:
            return False
        actions = pl.DataFrame(pa.table(self.delta().get_add_actions(flatten=True)))
        nulls = actions[f"null_count.{source}"] if f"null_count.{source}" in actions.columns else None
        if nulls is not None and not nulls.null_count() and not nulls.sum():
            return False  # the log's statistics show it
        return bool(self.collect(scan_files(self.delta()).select(pl.col(source).is_null().any())).item())

    def is_bucketed(self) -> bool:
        """Whether the table is laid out by (dt, bucket), bucket = user hash mod the number of buckets."""
        return self.exists() and "bucket" in self.delta().metadata().partition_columns and not self.is_cut

    def scan(self, partitions: Iterable[str] | None = None) -> pl.LazyFrame:
        """Rows under canonical names and types (:mod:`features.delta.columns`), ``ts`` and ``updated_at`` as int64
        microseconds UTC, with the columns that the table lacks and :attr:`makes`."""
        delta, wanted = self.delta(), None if partitions is None else list(partitions)
        names, column = self._names(delta), self.partition_column()
        if wanted is not None and self.is_cut:
            spans = _spans(wanted, self.grain or "day")
            frame = scan_files(delta, [path for path, extent in self._extents().items() if _meets(extent, spans)])
            clock = pl.col(names["ts"])
            kind = frame.collect_schema()[names["ts"]]
            # filters the stored column, so that parts of files are skipped
            inside = [clock.is_between(_moment(low, kind), _moment(high, kind), closed="left") for low, high in spans]
            frame = frame.filter(pl.any_horizontal(pl.lit(False), *inside))
        else:
            frame = scan_files(delta)
            if wanted is not None:
                frame = frame.filter(pl.col(column or "dt").cast(pl.String).is_in(wanted))
        kinds = frame.collect_schema()
        frame = frame.select(read(name, pl.col(source), kinds[source]).alias(name) for name, source in names.items())
        made = self._made(set(names))
        if "event_id" in made:
            frame = frame.with_columns(row_text(_content(frame.collect_schema())).alias("event_id"))
        if "updated_at" in made:
            frame = frame.with_columns(pl.lit(0, pl.Int64).alias("updated_at"))
        if "dt" in made and self.grain is not None:
            frame = frame.with_columns(partition_column(pl.col("ts"), self.grain).alias("dt"))
        return frame

    def collect(self, frame: pl.LazyFrame, partitions: Iterable[str] | None = None) -> pl.DataFrame:
        """The result of a query on this table's :meth:`scan`.

        Args:
            partitions: those that the query reads; default: all.

        Raises:
            UnreadableError: a file cannot be read; it is named.
            UnavailableError: the storage does not answer, or refuses this user.
        """
        try:
            return frame.collect()
        except READ_ERRORS as error:
            self._explain(error, partitions)

    def portions(
        self, frame: pl.LazyFrame, rows: int, partitions: Iterable[str] | None = None
    ) -> Iterator[pl.DataFrame]:
        """The result of a query on this table's :meth:`scan`, some rows at a time; raises like :meth:`collect`."""
        try:
            yield from frame.collect_batches(chunk_size=rows)
        except READ_ERRORS as error:
            self._explain(error, partitions)

    def _explain(self, error: Exception, partitions: Iterable[str] | None) -> NoReturn:
        """Raise what stopped a query as :meth:`collect` does, or else as it was raised."""
        reason = out_of_reach(error)
        check_files(self, partitions, whole=reason is None)
        # every file can be read now, so either the query is wrong, or a file was out of reach for a moment
        if reason is not None:
            raise UnavailableError(f"table {self.name} at {self.uri}: {reason}") from error
        if isinstance(error, OSError):
            raise UnreadableError(f"table {self.name} at {self.uri}: {error}; run again") from error
        raise error

    def size(self) -> int:
        """Bytes of the version's files."""
        return int(pc.sum(pa.table(self.delta().get_add_actions(flatten=True))["size_bytes"]).as_py() or 0)

    def sizes(self, partitions: Sequence[str]) -> dict[str, int]:
        """Bytes of these partitions in the version's files; of a file with rows of several, each has an equal share."""
        sizes = dict.fromkeys(partitions, 0)
        extents = self._extents() if self.is_cut else {}
        for path, size, file_partition in self.data_files(None):
            within = (
                self._within(partitions, extents[path])
                if self.is_cut
                else [file_partition]
                if file_partition in sizes
                else []
            )
            for partition in within:
                sizes[partition] += size // len(within)
        return sizes

    def require_buckets(self, buckets: int) -> None:
        """Check the buckets of a table laid out by bucket: rows beyond these buckets, or in none, would not be read.

        Raises:
            CorankError: the table is laid out with another number of buckets.
        """
        there = {str(row["bucket"]) for row in self.delta().partitions()}
        if not all(bucket.isdigit() and int(bucket) < buckets for bucket in there):
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
        rows = self.collect(self.scan(partitions).filter(self.in_bucket(bucket, buckets)), partitions)
        if self.is_bucketed():
            rows = rows.drop("bucket")
            users = rows.select(pl.col("user_id").unique())
            if not users.select((bucket_column(pl.col("user_id"), buckets) == bucket).all()).item():
                raise self._other_buckets(buckets)
        return rows

    def in_bucket(self, bucket: int, buckets: int) -> pl.Expr:
        """True on the rows of one bucket of :meth:`scan`."""
        if self.is_bucketed():
            return pl.col("bucket").cast(pl.Int32) == bucket
        return bucket_column(pl.col("user_id"), buckets) == bucket

    def identity(self) -> str:
        """Names the table's version, and tells it from another one of its number after the log was restored."""
        delta = self.delta()
        commit = digest_of_commit(table_store(self.uri, self.storage_options), delta.version())
        return f"{delta.metadata().id}@{delta.version()} {commit}"

    def fingerprints(self, cache: dict[str, Any] | None = None) -> dict[str, str]:
        """The fingerprint of every partition (:mod:`features.delta.fingerprints`).

        Args:
            cache: what an earlier call left there; only later commits are read then.
        """
        delta, store = self.delta(), table_store(self.uri, self.storage_options)
        present = self.partitions() or [WHOLE_TABLE]
        files: dict[str, list[str]] = {partition: [] for partition in present}
        if self.is_cut and "ts" in self._names(delta):
            clock = self._names(delta)["ts"]
            for path, extent in self._extents().items():
                for partition in self._within(present, extent):
                    files[partition].append(path)

            def touched(action: Mapping[str, Any]) -> Iterable[str] | None:
                extent = _logged_extent(action, clock)
                return None if extent is None else self._within(present, extent)
        else:
            column = self.partition_column()
            for path, _, file_partition in self.data_files(None):
                files.setdefault(file_partition or WHOLE_TABLE, []).append(path)

            def touched(action: Mapping[str, Any]) -> Iterable[str] | None:
                if column is None:
                    return [WHOLE_TABLE]
                values = action.get("partitionValues")
                return None if not values else [str(values.get(column))]

        return fingerprints(delta, store, {name: files.get(name, []) for name in present}, touched, cache)

    def _names(self, delta: DeltaTable) -> dict[str, str]:
        """Canonical name of every column that can be reached → its own name, in the table's order."""
        sources = [column.name for column in delta.schema().fields]
        mapped = {name: column for name, column in self.columns.items() if column in sources}
        hidden = set(mapped.values()) | set(self.columns)
        if self.grain is not None:
            column = self.partition_column()
            hidden |= {"dt"} if column is None else {"dt", column}
            mapped |= {} if column is None else {"dt": column}
        names = mapped | {column: column for column in sources if column not in hidden}
        return dict(sorted(names.items(), key=lambda pair: sources.index(pair[1])))

    def _made(self, present: set[str]) -> set[str]:
        """The columns that the table lacks, and that are made."""
        return {column for column in self.makes if column not in present} | ({"dt"} if self.is_cut else set())

    def data_files(self, partitions: Sequence[str] | None) -> list[tuple[str, int, str | None]]:
        """Path, bytes and partition (None: cut from ``ts``) of the files that may hold rows of these partitions."""
        actions = pa.table(self.delta().get_add_actions(flatten=True))
        paths = [unquote(path) for path in actions["path"].to_pylist()]
        column = self.partition_column()
        if column is not None:
            days = [None if value is None else str(value) for value in actions[f"partition.{column}"].to_pylist()]
        else:
            days = [None] * len(actions)
        files = list(zip(paths, actions["size_bytes"].to_pylist(), days, strict=True))
        if partitions is None:
            return files
        if self.is_cut:
            spans, extents = _spans(partitions, self.grain or "day"), self._extents()
            return [file for file in files if _meets(extents[file[0]], spans)]
        wanted = set(partitions)
        return [file for file in files if file[2] in wanted]

    def _extents(self) -> dict[str, tuple[int, int] | None]:
        """Path of every file → least and largest ``ts`` in it, microseconds UTC; None where the log does not say."""
        delta = self.delta()
        source = self._names(delta).get("ts")
        actions = pl.DataFrame(pa.table(delta.get_add_actions(flatten=True)))
        paths = [unquote(path) for path in actions["path"]]
        if source is None or f"min.{source}" not in actions.columns or f"max.{source}" not in actions.columns:
            return dict.fromkeys(paths)
        kind = actions.schema[f"min.{source}"]
        ends = actions.select(read("ts", pl.col(f"{end}.{source}"), kind).alias(end) for end in ("min", "max"))
        # statistics of timestamps are cut off at milliseconds
        slack = 0 if kind.is_integer() else 999
        bounds = [None if None in row else (int(row[0]), int(row[1]) + slack) for row in ends.rows()]
        return dict(zip(paths, bounds, strict=True))

    def wrong_unit(self) -> tuple[str, int] | None:
        """Of a log whose partitions are cut from ``ts``: the unit other than microseconds that it seems to be written
        in, by the log's statistics, and an example; else its partitions would be early in 1970, or far off."""
        for extent in self._extents().values() if self.is_cut else ():
            for unit, (low, high) in OTHER_UNITS.items():
                if extent is not None and low <= extent[0] and extent[1] < high:
                    return unit, extent[0]
        return None

    def _within(self, partitions: Sequence[str], extent: tuple[int, int] | None) -> list[str]:
        """Those of some partitions that a file of this extent may hold rows of."""
        grain = self.grain or "day"
        return [partition for partition in partitions if _meets(extent, [partition_bounds(partition, grain)])]


def _unread_features(delta: DeltaTable) -> str:
    """Delta features of a table that neither deltalake nor Polars can read; empty when there are none."""
    protocol = delta.protocol()
    mode = delta.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mode != "none" or protocol.min_reader_version == MAPPING_VERSION:
        return "column mapping (delta.columnMapping.mode)"
    unread = sorted(set(protocol.reader_features or ()) - READ_FEATURES)
    return ", ".join(unread)


def _spans(partitions: Iterable[str], grain: Grain) -> list[tuple[int, int]]:
    """Opening and close of partitions, microseconds UTC, in order; consecutive partitions are joined into one span."""
    spans: list[tuple[int, int]] = []
    for opening, close in sorted(partition_bounds(partition, grain) for partition in set(partitions)):
        if spans and spans[-1][1] == opening:
            spans[-1] = (spans[-1][0], close)
        else:
            spans.append((opening, close))
    return spans


def _moment(ts: int, kind: Any) -> pl.Expr:
    """Microseconds UTC as a column of times stores them; a narrower integer is compared as the wider one."""
    moment = pl.lit(ts, pl.Int64)
    if kind == pl.Date:
        return moment.cast(pl.Datetime("us")).cast(pl.Date)
    return moment.cast(kind) if isinstance(kind, pl.Datetime) else moment


def _meets(extent: tuple[int, int] | None, spans: Iterable[tuple[int, int]]) -> bool:
    """Whether a file of this extent (both ends included) may hold rows of one of the spans (the close excluded)."""
    return extent is None or any(extent[0] < close and opening <= extent[1] for opening, close in spans)


def _logged_extent(action: Mapping[str, Any], clock: str) -> tuple[int, int] | None:
    """Least and largest time in a file, microseconds UTC, as an action of the log has them; None where it does not."""
    try:
        statistics = json.loads(action["stats"])
        ends = [statistics[end][clock] for end in ("minValues", "maxValues")]
    except (KeyError, TypeError, ValueError):
        return None
    if all(isinstance(end, int) for end in ends):
        return ends[0], ends[1]
    low, high = (datetime.fromisoformat(str(end)) for end in ends)
    low, high = (moment if moment.tzinfo else moment.replace(tzinfo=UTC) for moment in (low, high))
    # cut off at milliseconds
    return round(low.timestamp() * 1e6), round(high.timestamp() * 1e6) + 999


def _content(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that describe it, without those that only say where it lies."""
    return {name: kind for name, kind in kinds.items() if name not in ("dt", "bucket")}


def together(sizes: Mapping[str, int], limit: int, most: int) -> list[list[str]]:
    """Consecutive partitions in groups of at most so many and this size altogether, or of one that is larger."""
    groups: list[list[str]] = []
    room = 0
    for partition, size in sizes.items():
        if not groups or size > room or len(groups[-1]) == most:
            groups.append([])
            room = limit
        groups[-1].append(partition)
        room -= size
    return groups
