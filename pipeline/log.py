"""The user's log: which partitions are closed, and what they are made of (fingerprints)."""

from __future__ import annotations

import time
from typing import Any

import polars as pl

from features.errors import CorankError, DataGateError
from features.records import Records, digest
from features.schema import SECOND, partition_bounds, partition_of
from features.validation import check_tables
from pipeline.config import Config

PROFILES = ("users", "items")


def now_us() -> int:
    """Microseconds UTC."""
    return time.time_ns() // 1_000


class Log:
    """The user's tables as partitions with fingerprints, as of the moment this object was made."""

    def __init__(self, config: Config, records: Records, until: str | None = None) -> None:
        """
        Raises:
            DataGateError: a table or column is missing or mistyped; all of them are named.
            CorankError: no partition is closed.
        """
        problems = check_tables({role: config.table(role) for role in config.tables}, config.schema_)
        if problems:
            named = "\n".join(f"  {problem.message}" for problem in problems)
            raise DataGateError(f"the tables do not fit the config:\n{named}")
        self.config = config
        self.now = now_us()
        impressions = config.table("impressions")
        found = impressions.partitions()
        if not found:
            raise CorankError(
                f"table impressions at {impressions.uri}: no partitions. "
                "It must be partitioned by a column dt (see `tables` in the config) and hold rows."
            )
        for partition in found:
            try:
                partition_bounds(partition, config.grain)
            except ValueError as error:
                raise CorankError(f"table impressions at {impressions.uri}: {error}") from None
        self.partitions = [
            partition
            for partition in found
            if self.bounds(partition)[1] <= self.now
            and (config.start is None or partition >= config.start)
            and (until is None or partition <= until)
        ]
        if not self.partitions:
            span = f"{found[0]} … {found[-1]}"
            raise CorankError(f"table impressions: none of its partitions {span} is closed and selected")
        self._fingerprints = self._read_fingerprints(records)

    def gaps(self) -> list[str]:
        """Partitions without impressions between the oldest and the newest."""
        missing = []
        for earlier, later in zip(self.partitions, self.partitions[1:], strict=False):
            moment = self.bounds(earlier)[1]
            while moment < self.bounds(later)[0]:
                missing.append(partition_of(moment, self.config.grain))
                moment = self.bounds(missing[-1])[1]
        return missing

    def bounds(self, partition: str) -> tuple[int, int]:
        """Open and close, microseconds UTC."""
        return partition_bounds(partition, self.config.grain)

    def fingerprint(self, partition: str) -> dict[str, str]:
        """What this partition is made of: per table its last commit with data change."""
        return self._fingerprints[partition]

    def _read_fingerprints(self, records: Records) -> dict[str, dict[str, str]]:
        result: dict[str, dict[str, str]] = {partition: {} for partition in self.partitions}
        for role in self.config.tables:
            table = self.config.table(role)
            cache = records.get("log", role) or {}
            before = digest(cache)
            by_partition = self._profile_fingerprints(role, cache) if role in PROFILES else table.fingerprints(cache)
            cache.pop("recorded_at", None)
            if digest(cache) != before:
                records.put("log", role, cache)
            for partition in self.partitions:
                result[partition][role] = by_partition.get(partition, "no rows")
        return result

    def _profile_fingerprints(self, role: str, cache: dict[str, Any]) -> dict[str, str]:
        """Profiles have no partitions: what counts is the snapshots that a partition can see.

        A snapshot that becomes valid later changes no earlier partition; a late one does.
        """
        table = self.config.table(role)
        version = f"{table.delta().metadata().id}@{table.delta().version()}"
        wanted = [partition for partition in self.partitions if partition not in cache.get("partitions", {})]
        if cache.get("version") == version and not wanted:
            return dict(cache["partitions"])
        stamps = table.scan().select("updated_at").collect()["updated_at"]
        counted: dict[str, str] = {}
        for partition in self.partitions:
            seen = stamps.filter(stamps < self.bounds(partition)[1])
            counted[partition] = f"{seen.len()} snapshots, checksum {int(seen.hash(0).cast(pl.UInt64).sum() or 0):x}"
        cache.clear()
        cache.update({"version": version, "partitions": counted})
        return counted


def close_text(moment: int) -> str:
    """A moment in microseconds UTC as people read it."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(moment / SECOND, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
