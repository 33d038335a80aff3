"""Upkeep of a workspace: compaction of its derived tables, forgetting users, retention of samples.

A record is changed before the commit to a table that makes it true. After a kill in between, a record names fewer
requests than there are, which harms no reader, and the same command finishes when it is called again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import polars as pl

from features.builder.build import clear_copies
from features.delta.maintenance import (
    FoundUsers,
    Size,
    compact,
    derived_tables,
    drop_partitions,
    erase_users,
    find_users,
    sample_counts,
    size_in_storage,
    vacuum,
)
from features.delta.table import Table
from features.encoding import hash_id
from features.sample_table import timeline_column
from pipeline.stages.deployment import CURRENT, DEPLOYMENT, SERVED, SERVED_LOG, tell_of_erasure
from pipeline.stages.feature_store import store_settings
from pipeline.stages.samples import SAMPLES, SamplesRecord
from pipeline.workspace import Workspace
from pipeline.workspace.registry import CHAMPION, PREVIOUS

if TYPE_CHECKING:
    from pipeline.progress import Line


def workspace_tables(workspace: Workspace) -> list[Table]:
    """All Delta tables that corank derived in this workspace, the quarantine included; never the user's own."""
    quarantine = Table("quarantine", workspace.config.path("quarantine"))
    return [*derived_tables(workspace.config.path("tables")), *([quarantine] if quarantine.exists() else [])]


def served_tables(workspace: Workspace) -> list[Table]:
    """The tables of the served log (:mod:`serving.request_log`), to which a running service may append."""
    from serving.request_log import EVENTS

    root = workspace.config.path(SERVED_LOG)
    found = [*derived_tables(root), *derived_tables(f"{root}/{EVENTS}")]
    return [replace(table, name=f"served {table.name}") for table in found]


# --- compaction -----------------------------------------------------------------------------------------


def compact_tables(workspace: Workspace, keep_hours: int) -> dict[str, tuple[Size, Size]]:
    """Compact and vacuum every derived table; per table its size in storage before and after.

    Args:
        keep_hours: age in hours of unreferenced files before they are removed.
    """
    sizes = {}
    with workspace.progress.stage("compact") as stage:
        served = served_tables(workspace)
        for table in [*workspace_tables(workspace), *served]:
            before = size_in_storage(table)
            stage.say(f"{table.name}: {before.files:,} files")

            def compacted(done: int, total: int, name: str = table.name) -> None:
                stage.say(f"{name}: {done}/{total} partitions")

            compact(table, compacted)
            vacuum(table, keep_hours, written=table in served)
            sizes[table.name] = (before, size_in_storage(table))
        stage.say(f"{len(sizes)} tables")
    return sizes


# --- forgetting -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forgotten:
    """What was erased about one user.

    Attributes:
        tables: rows erased per derived table.
        online: values (SQLite) or hashes (Redis) removed from the online store.
        selfchecks: self-check requests taken out of published models.
        remains: rows per table of the user's own, which corank does not touch.
    """

    user: str
    tables: dict[str, int]
    online: int
    selfchecks: int
    remains: dict[str, int]

    @property
    def found(self) -> bool:
        return bool(self.tables or self.online or self.selfchecks)


def forgotten_key(user: str) -> str:
    """Name of a user's record: the 64-bit id hash as 16 hex digits.

    It is a pseudonym: who has the id can find the record, and where ids can be guessed, records can be found, too.
    """
    return f"{hash_id(user) & (1 << 64) - 1:016x}"


def forget(workspace: Workspace, users: Sequence[str]) -> list[Forgotten]:
    """Erase users from the derived tables, the online store, self-checks, the deployment's example and a running
    service, which forgets all user sides that it remembers.

    What was erased is recorded under ``records/forgotten`` without the id. Model weights are not changed.

    Raises:
        CorankError: a table or the online store cannot be read or written.
    """
    from features.store.erase import erase_users as erase_online_users

    records, users = workspace.records, list(dict.fromkeys(users))
    with workspace.progress.stage("forget") as stage:
        clear_copies(workspace.config.path("tables"))
        found = []
        for table in workspace_tables(workspace):

            def looked(done: int, total: int, name: str = table.name) -> None:
                stage.say(f"looking in {name}: {done}/{total} files")

            found.append(find_users(table, users, looked))
        earlier = {user: records.get("forgotten", forgotten_key(user)) or {} for user in users}
        for user in users:  # if this run is killed, its records say that it did not finish
            if any(user in affected.rows for affected in found):
                records.put("forgotten", forgotten_key(user), {**earlier[user], "finished": False})
        stage.say("online store")
        online = erase_online_users(store_settings(workspace), users)
        tell_of_erasure(workspace)
        for affected in found:
            if affected.rows:
                stage.say(f"erasing from {affected.table.name}")
                if affected.table.name == SAMPLES.name:
                    update_sample_records(workspace, affected)
                erase_users(affected)
            stage.say(f"removing old files of {affected.table.name}")  # of versions before: rebuilt, retired, compacted
            vacuum(affected.table, keep_hours=0)
        found += _erase_served(workspace, users, stage)
        stage.say("self-checks of models")
        selfchecks = _erase_from_models(workspace, users)
        _erase_example(workspace, users)
        stage.say("looking in your own tables")
        remains = {user: _own_rows(workspace, user) for user in users}
        results = [
            Forgotten(
                user,
                {affected.table.name: affected.rows[user] for affected in found if user in affected.rows},
                online.get(user, 0),
                selfchecks.get(user, 0),
                remains[user],
            )
            for user in users
        ]
        for result in results:
            key = forgotten_key(result.user)
            if result.found or earlier[result.user].get("finished") is False:
                erased = {"tables": result.tables, "online": result.online, "selfchecks": result.selfchecks}
                records.put("forgotten", key, {**erased, "remains": result.remains, "finished": True})
        stage.say(f"{sum(result.found for result in results)} of {len(results)} users found")
    return results


def _erase_served(workspace: Workspace, users: Sequence[str], stage: Line) -> list[FoundUsers]:
    """Erase users from the served log. Of feedback, which names no user, the requests that it belongs to are erased."""
    from serving.live import FOLLOW_SECONDS

    tables = served_tables(workspace)
    if tables and workspace.records.get(*SERVED) is not None:
        stage.say("waiting until a running service has dropped what it would still log")
        time.sleep(2 * FOLLOW_SECONDS)
    found = [find_users(table, users) for table in tables]
    for affected in found:
        stage.say(f"erasing from {affected.table.name}")
        erase_users(affected)
        vacuum(affected.table, keep_hours=0, written=True)
    return found


def update_sample_records(workspace: Workspace, found: FoundUsers) -> None:
    """Set the counts, by which the split is cut, to what they are without the users.

    ``impressions`` stays what came in, and ``forgotten`` closes the count: candidates + quarantined + forgotten.
    """
    timelines = [timeline_column(sequence, None) for sequence in workspace.config.schema_.sequences]
    for partition in found.partitions:
        record = workspace.records.read(SAMPLES, partition)
        if record is None:
            continue
        counts: dict[str, Any] = sample_counts(found.table, partition, found.users, timelines)
        forgotten = record.impressions - record.quarantined - counts["candidates"]
        workspace.records.write(SAMPLES, partition, replace(record, forgotten=forgotten, **counts))


def _erase_from_models(workspace: Workspace, users: Sequence[str]) -> dict[str, int]:
    """Per user the rows taken out of the self-checks of all local artifacts, MLflow's copies included."""
    from pipeline.deployment.selfcheck import erase_from_selfcheck

    removed: dict[str, int] = {}
    for folder in ("models", "mlflow"):
        for path in sorted(workspace.config.local_path(folder).rglob("selfcheck.json")):
            for user in users:
                if rows := erase_from_selfcheck(path.parent, [user]):
                    removed[user] = removed.get(user, 0) + rows
    return removed


def _erase_example(workspace: Workspace, users: Sequence[str]) -> None:
    """The deployment's record holds an example request; without it `corank query` asks for a user."""
    record = workspace.records.read(DEPLOYMENT, CURRENT)
    if record and record.verified.get("example", {}).get("user_id") in users:
        forgotten = replace(record, verified={**record.verified, "example": {}})
        workspace.records.write(DEPLOYMENT, CURRENT, forgotten)


def _own_rows(workspace: Workspace, user: str) -> dict[str, int]:
    """Rows per table of the user's own that name this user."""
    rows = {}
    for role in sorted(workspace.config.tables):
        table = workspace.config.table(role)
        if not table.exists() or "user_id" not in table.schema().names:
            continue
        count = table.collect(table.scan().filter(pl.col("user_id").cast(pl.String) == user).select(pl.len())).item()
        if count:
            rows[role] = int(count)
    return rows


# --- retention ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retention:
    """What retention does to the sample table.

    Attributes:
        retired: partitions that are dropped.
        live: older partitions that stay, and the live version whose lineage names them.
    """

    retired: list[str]
    live: dict[str, int]


def plan_retention(workspace: Workspace) -> Retention:
    """Partitions of the sample table that are older than the newest ``retention.partitions``.

    Those that the lineage of the champion, or of the version that a rollback returns to, names stay.

    Raises:
        CorankError: the lineage of a live version cannot be read.
    """
    keep, samples = workspace.config.retention.partitions, samples_table(workspace)
    if keep is None or not samples.exists():
        return Retention([], {})
    named: dict[str, int] = {}
    for alias in (PREVIOUS, CHAMPION):  # champion last: its name replaces the other's where both need a partition
        version = workspace.registry.champion(alias)
        if version is not None:
            named |= dict.fromkeys(version.lineage()["partitions"], version.number)
    built = [partition for partition in samples.partitions() if workspace.records.read(SAMPLES, partition)]
    old = built[:-keep]
    return Retention(
        [partition for partition in old if partition not in named],
        {partition: named[partition] for partition in old if partition in named},
    )


def retain(workspace: Workspace) -> Retention:
    """Drop the samples that :func:`plan_retention` names. State stays: the next partition is folded into it.

    Their records are marked ``retired``: they count as built, but training and its split leave them out. Late
    rows or another config still rebuild them, as the timelines of later partitions depend on them.
    """
    plan = plan_retention(workspace)
    if plan.retired:
        with workspace.progress.stage("retention") as stage:
            samples = samples_table(workspace)
            for partition in plan.retired:
                record = workspace.records.read(SAMPLES, partition) or SamplesRecord()
                workspace.records.write(SAMPLES, partition, replace(record, retired=True))
            drop_partitions(samples, plan.retired)
            vacuum(samples)
            stage.say(f"samples of {len(plan.retired)} partitions dropped, up to {plan.retired[-1]}")
    return plan


def samples_table(workspace: Workspace) -> Table:
    """The sample table of this workspace."""
    return Table(SAMPLES.name, workspace.config.path("tables", SAMPLES.name))
