"""The user's log: which partitions are closed, and what they are made of (fingerprints)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl

from features.builder.log_rows import feedback_partitions
from features.delta.columns import reads_as
from features.delta.damage import check_files
from features.delta.fingerprints import WHOLE_TABLE
from features.delta.table import Table
from features.digest import digest
from features.errors import ConfigError, CorankError, DataGateError
from features.schema import FEEDBACK, SECOND, partition_bounds, partition_of
from features.validation import PROFILE_KEYS, check_tables, columns_read
from pipeline.config import PROFILES, Config
from pipeline.records import Records


def now_us() -> int:
    """Microseconds UTC."""
    return time.time_ns() // 1_000


class Log:
    """The user's tables as partitions with fingerprints, as of the moment this object was made.

    Every stage reads these versions; what is written to the tables later belongs to a later log.

    Attributes:
        tables: each at one version.
        versions: those of the tables that exist.
        now: microseconds UTC; later partitions are not closed yet, later times lie in the future.
        shown: the closed and selected partitions of impressions, oldest first.
        present: partitions of any log from ``start`` on, closed or not, also after ``until``.
        partitions: those of ``present`` up to the newest of ``shown``; some hold only events, as history.
    """

    def __init__(
        self, config: Config, records: Records, until: str | None = None, as_of: Mapping[str, Any] | None = None
    ) -> None:
        """
        Args:
            as_of: ``versions`` and ``now`` of an earlier log, from a record's lineage, to read that log again.

        Raises:
            ConfigError: ``start`` or ``until`` is no partition of this grain.
            DataGateError: a table or column is missing, mistyped or of another type than when its table was
                validated (all of them are named), or lies in the future; a partition's name is none of the grain.
            UnreadableError: a file of a profile table or a Delta log is damaged.
            CorankError: no partition is closed.
        """
        self.config = config
        self.now = now_us() if as_of is None else int(as_of["now"])
        self.versions: dict[str, int] = {}
        self.tables: dict[str, Table] = {}
        for role in config.tables:
            table = config.table(role)
            if as_of is not None:
                if role not in as_of["versions"]:
                    raise ConfigError(f"--as-of: the record names no version of the table {role}")
                self.versions[role] = int(as_of["versions"][role])
            elif table.exists():
                self.versions[role] = table.delta().version()
            self.tables[role] = table.at(self.versions.get(role))
        problems = check_tables(self.tables, config.schema_)
        if problems:
            named = "\n".join(f"  {problem.message}" for problem in problems)
            raise DataGateError(f"the tables do not fit the config:\n{named}")
        self._refuse_changed_types(records)
        for key, partition in (("start", config.start), ("--until", until)):
            if partition is not None:
                try:
                    partition_bounds(partition, config.grain)
                except ValueError as error:
                    raise ConfigError(f"{key}: {error}") from None
        impressions = self.tables["impressions"]
        found = self._partitions_of("impressions")
        if not found:
            raise DataGateError(f"table impressions at {impressions.uri}: no partition holds any row")
        future = [partition for partition in found if self.bounds(partition)[0] > self.now]
        if future:
            count = impressions.collect(impressions.scan(future).select(pl.len()), future).item()
            raise DataGateError(
                f"table impressions, partition {future[0]}: {count:,} rows lie in the future (partitions "
                f"{', '.join(future[:5])}); correct ts and dt"
            )
        # names have exactly the grain's format (partition_bounds), so that they sort by time
        self.shown = [
            partition
            for partition in found
            if self.bounds(partition)[1] <= self.now
            and (config.start is None or partition >= config.start)
            and (until is None or partition <= until)
        ]
        if not self.shown:
            raise CorankError(
                f"table impressions: none of its partitions {found[0]} … {found[-1]} is closed and selected"
            )
        events = [self._partitions_of(role) for role in config.schema_.logs[1:]]  # the first is impressions
        if FEEDBACK in config.tables:
            self._partitions_of(FEEDBACK)
        self.present = {name for name in {*found, *chain(*events)} if name >= (config.start or "")}
        self.partitions = sorted(name for name in self.present if name <= self.shown[-1])
        self._fingerprints = self._read_fingerprints(records, cached=as_of is None)
        self._chains: dict[str, dict[str, str]] = {}

    def _partitions_of(self, role: str) -> list[str]:
        """Partitions of a log, oldest first.

        Raises:
            DataGateError: a partition's name has not the grain's format.
        """
        table = self.tables[role]
        known = table.partitions()
        try:
            for partition in known:
                self.bounds(partition)
        except ValueError as error:
            raise DataGateError(
                f"table {role} at {table.uri}: {error}. Write it so, or set tables.{role}.partition.column to ts: "
                "partitions are then cut from the rows' times"
            ) from None
        return known

    def gaps(self) -> list[str]:
        """Partitions without impressions between the oldest and the newest that have some."""
        missing = []
        for earlier, later in zip(self.shown, self.shown[1:], strict=False):
            moment = self.bounds(earlier)[1]
            while moment < self.bounds(later)[0]:
                missing.append(partition_of(moment, self.config.grain))
                moment = self.bounds(missing[-1])[1]
        return missing

    def bounds(self, partition: str) -> tuple[int, int]:
        """Open and close, microseconds UTC."""
        return partition_bounds(partition, self.config.grain)

    def fingerprint(self, partition: str) -> dict[str, str]:
        """What this partition is made of: per table the last commit that changed its data."""
        return self._fingerprints[partition]

    def chain(self, *made_with: Any) -> dict[str, str]:
        """Per partition the digest of what made it: what it is made with, its own fingerprint and all before it."""
        key = digest(made_with)
        if key not in self._chains:
            chain: dict[str, str] = {}
            previous = ""
            for partition in self.partitions:
                previous = digest([*made_with, self.fingerprint(partition), previous])
                chain[partition] = previous
            self._chains[key] = chain
        return dict(self._chains[key])

    def keep_types(self, records: Records) -> None:
        """Record the types of every table's columns after validation; later types are compared with them."""
        for role, table in self.tables.items():
            if table.exists():
                records.put("types", role, table.types())

    def _refuse_changed_types(self, records: Records) -> None:
        """Raise when a column that is read has another type than validated; new columns and wider types are fine."""
        changed = []
        for role, table in self.tables.items():
            known = records.get("types", role)
            types = table.types() if known and table.exists() else {}
            for column in sorted(columns_read(role, self.config.schema_) & set(types) & set(known or {})):
                old, new = (known or {})[column], types[column]
                if not reads_as(old, new):
                    source = table.columns.get(column, column)
                    changed.append(f"  table {role} at {table.uri}: column {source} was {old}, now it is {new}")
        if changed:
            raise DataGateError(
                "columns changed their type since they were validated:\n"
                + "\n".join(changed)
                + "\nWrite them with the "
                f"old type. If the change is meant, remove the table's record in {self.config.path('records', 'types')}"
            )

    def is_attributed(self, partition: str) -> bool:
        """Whether all labels of the partition are known: its attribution window has passed."""
        return self.bounds(partition)[1] + self.config.schema_.attribution_window <= self.now

    def labels(self, partition: str) -> str:
        """What the labels of this partition that came through feedback are made of; empty without such labels."""
        return self._labels.get(partition, "")

    def _read_labels(self, by_partition: dict[str, str]) -> dict[str, str]:
        schema, grain = self.config.schema_, self.config.grain
        labels = {}
        for partition in self.partitions:
            opening, close = self.bounds(partition)
            known = [task.name for task in schema.delayed_tasks if close + (task.attribution_window or 0) <= self.now]
            made_of = feedback_partitions(by_partition, opening, close + schema.attribution_window, grain)
            fingerprints = {name: by_partition[name] for name in made_of}
            labels[partition] = digest([known, fingerprints if known else {}])
        return labels

    def _read_fingerprints(self, records: Records, cached: bool) -> dict[str, dict[str, str]]:
        result: dict[str, dict[str, str]] = {partition: {} for partition in self.partitions}
        self._labels: dict[str, str] = {}
        for role, table in self.tables.items():
            cache = (records.get("log", role) or {}) if cached else {}
            cache.pop("recorded_at", None)
            before = digest(cache)
            by_partition = self._profile_fingerprints(role, cache) if role in PROFILES else table.fingerprints(cache)
            if cached and digest(cache) != before:
                records.put("log", role, cache)
            if role == FEEDBACK and self.config.schema_.delayed_tasks:
                by_partition.pop(WHOLE_TABLE, None)  # a table without any row
                self._labels = self._read_labels(by_partition)
            for partition in self.partitions if role != FEEDBACK else ():
                result[partition][role] = by_partition.get(partition, "no rows")
        return result

    def _profile_fingerprints(self, role: Any, cache: dict[str, Any]) -> dict[str, str]:
        """Per partition a checksum of the profile snapshots that it can see, as profile tables have no partitions.

        A snapshot that becomes valid later changes no earlier partition; a late or corrected one does.
        """
        table = self.tables[role]
        columns = sorted({*self.config.schema_.profile_columns(role), PROFILE_KEYS[role], "updated_at"})
        version = f"{table.identity()} {columns}"
        if cache.get("version") == version and set(self.partitions) <= set(cache["partitions"]):
            return dict(cache["partitions"])
        check_files(table)
        rows = table.collect(table.scan().select(columns).drop_nulls("updated_at").sort("updated_at"))
        closes = pl.Series([self.bounds(partition)[1] for partition in self.partitions])
        seen = rows["updated_at"].search_sorted(closes, side="left").to_list()
        # sums wrap around: a checksum that does not depend on order
        sums = rows.hash_rows(seed=0).to_numpy().cumsum(dtype="uint64")
        cache.clear()
        cache["version"] = version
        cache["partitions"] = {
            partition: f"{count} snapshots, checksum {int(sums[count - 1]) if count else 0:x}"
            for partition, count in zip(self.partitions, seen, strict=True)
        }
        return dict(cache["partitions"])


def read_lineage(path: Path) -> dict[str, Any]:
    """``versions`` and ``now`` of a log as a record or a model's lineage has them.

    Raises:
        ConfigError: the file cannot be read, or does not name them.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"versions": dict(record["versions"]), "now": int(record["now"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--as-of {path}: it names no versions of the tables ({type(error).__name__}: {error}); give a record of "
            "feature_store, challenger, evaluation, champion or deployment, or the lineage.json of a model"
        ) from None


def close_text(moment: int) -> str:
    """A moment in microseconds UTC as people read it."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(moment / SECOND, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
