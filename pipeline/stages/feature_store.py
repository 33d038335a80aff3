"""``feature_store``: features are registered in Feast and put online, partition by partition."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.damage import problem_of_database, problem_of_sealed, remove_database
from features.digest import digest
from features.errors import ConfigError, CorankError
from pipeline.records import LogRecord
from pipeline.runtime import ensure_ray
from pipeline.stages.samples import SAMPLES, build_settings, state_inputs
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace, close_text

if TYPE_CHECKING:
    from features.schema import Schema
    from features.store.online import FeatureStoreSettings

STORE_LAYOUT = 2
"""Version of the views' names and columns; a store of another one is filled anew."""

UNFINISHED = "unfinished"
"""Stands for what a partition was made from while the online store is being filled with it."""

ONLINE = "online"
"""Key of the only record: an online store knows only the present."""


@dataclass(frozen=True)
class FeatureStoreRecord(LogRecord):
    """What the online store holds.

    Attributes:
        partitions: per partition what it was made from.
        close: time up to which it knows the log, microseconds UTC; None until it was filled once.
        logged_until: events after this time came by pushes, microseconds UTC.
        rows: written last, per view.
    """

    partitions: dict[str, str] = field(default_factory=dict)
    close: int | None = None
    logged_until: int | None = None
    rows: dict[str, int] = field(default_factory=dict)


class FeatureStore(Stage[FeatureStoreRecord]):
    """Profiles and sequences online as of the partition's close."""

    name = "feature_store"
    depends = ("samples",)
    record = FeatureStoreRecord
    partitioned = True
    kinds = ("feast",)

    def inputs(self, workspace: Workspace) -> dict[str, str]:
        settings = [STORE_LAYOUT, workspace.config.digest_of("feast", "features", "sequences", stored=True)]
        return {partition: digest([inputs, settings]) for partition, inputs in state_inputs(workspace).items()}

    def stale(self, workspace: Workspace) -> list[str]:
        """The partitions to materialise: from the first that changed on; all when the online store is lost; the newest
        when the registry is lost, to register anew, or when the log has lost partitions that the store holds."""
        record, wanted = online_record(workspace), self.inputs(workspace)
        if store_problem(workspace, pages=False) and record.partitions:
            return workspace.partitions
        for index, partition in enumerate(workspace.partitions):
            if record.partitions.get(partition) != wanted[partition]:
                return workspace.partitions[index:]
        newest = workspace.partitions[-1]
        if registry_problem(workspace):
            return [newest]
        if lost_partitions(workspace, record.partitions):
            return [newest]  # the store has to drop what it holds of those partitions
        # counts that were not known yet when it was filled are known now
        known = workspace.log.bounds(newest)[1] + workspace.config.aggregates_delay
        return [newest] if record.close is None or record.close < known <= workspace.log.now else []

    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, FeatureStoreRecord]:
        """Feast apply and materialise these partitions into the online store.

        When anything it was filled from has changed or is gone from the log, it is filled anew: what was written must
        go, and the newest row that is left of a user can be as old as the log.

        Raises:
            ConfigError: the store holds later partitions, which are still in the log: it does not go back.
        """
        from features.store.erase import erase_absent
        from features.store.online import apply, materialize

        config, log, filled = workspace.config, workspace.log, online_record(workspace)
        stored, inputs = filled.partitions, self.inputs(workspace)
        lost = lost_partitions(workspace, stored)
        # later partitions that a killed fill began with do not count: this fills anew, which drops them
        finished = [partition for partition, made_from in stored.items() if made_from != UNFINISHED]
        later = [partition for partition in finished if partition > parts[-1] and partition not in lost]
        if later:
            raise ConfigError(
                f"the online store already holds partitions up to {max(later)} and cannot go back to {parts[-1]}; "
                f"fill it up to {max(later)} or later"
            )
        changed = any(inputs.get(partition) != made_from for partition, made_from in stored.items())
        index = workspace.partitions.index(parts[0])
        anew = changed or index == 0
        # from the close of the partition before, as days without any may lie between the two
        start = 0 if anew else log.bounds(workspace.partitions[index - 1])[1]
        close = log.bounds(parts[-1])[1]
        # counts become known some time after the close, by then or by now
        end = max(close, min(close + config.aggregates_delay, log.now))
        # events of partitions that have gone were logged, too, and must not be taken for pushed ones
        before = filled.close or 0 if filled.logged_until is None else filled.logged_until
        logged_until = max(close, before)
        with workspace.progress.stage(self.name) as stage:
            stage.say("registering features")
            _drop_gone_states(workspace)
            settings = registered_settings(workspace)
            if filled.partitions and (problem := store_problem(workspace, pages=False)):
                workspace.progress.note(
                    f"online store {settings.sqlite_path} {problem}: it is filled anew; events that were pushed and "
                    "are in no log are lost"
                )
                remove_database(Path(settings.sqlite_path))
            apply(settings)
            # a table larger than a slice is read slice by slice in Ray tasks
            if config.ray.address or any(table.size() > settings.slice_bytes for table in settings.tables):
                stage.say("starting Ray")
                ensure_ray(config.ray)
            # after a kill from here on nobody knows what was written: the store is filled anew
            begun = stored | dict.fromkeys(parts, UNFINISHED)
            workspace.records.write(self, ONLINE, replace(filled, partitions=begun, logged_until=logged_until))
            rows = materialize(
                settings, start, end, lambda view, done: stage.say(f"{view}: {done:,} rows"), close, logged_until
            )
            erased = erase_absent(settings, end, close, logged_until) if anew else {}
            record = FeatureStoreRecord(
                partitions={partition: made_from for partition, made_from in inputs.items() if partition <= parts[-1]},
                close=end,
                logged_until=close,
                rows=rows,
                **workspace.lineage(),
            )
            workspace.records.write(self, ONLINE, record)
            written = ", ".join(f"{count:,} {view}" for view, count in rows.items())
            removed = ", ".join(f"{count:,} {view}" for view, count in erased.items() if count)
            stage.say(
                f"{written} up to {close_text(end)}"
                + (f"; removed, as the log has them no more: {removed}" if removed else "")
            )
        return {ONLINE: record}

    def rows(self, record: FeatureStoreRecord) -> int:
        return sum(record.rows.values())

    def counts(self, workspace: Workspace) -> tuple[str, str]:
        return "profiles and timelines", ", ".join(
            f"{count:,} {view}" for view, count in online_record(workspace).rows.items()
        )

    def shown(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        record = online_record(workspace)
        return {part: {"inputs": record.partitions.get(part, ""), "code": record.code} for part in parts}


FEATURE_STORE = FeatureStore()


def online_record(workspace: Workspace) -> FeatureStoreRecord:
    """What the online store holds; an empty record before it was filled."""
    return workspace.records.read(FEATURE_STORE, ONLINE) or FeatureStoreRecord()


def store_problem(workspace: Workspace, pages: bool) -> str | None:
    """What is wrong with the file of an online store on SQLite (:func:`features.damage.problem_of_database`)."""
    settings = store_settings(workspace)
    return problem_of_database(Path(settings.sqlite_path), pages) if settings.online == "sqlite" else None


def registry_problem(workspace: Workspace) -> str | None:
    """What is wrong with the file of Feast's registry."""
    return problem_of_sealed(Path(store_settings(workspace).registry))


def require_store(workspace: Workspace) -> None:
    """
    Raises:
        CorankError: the online store or the registry, which a service reads, is damaged; the file is named.
    """
    settings = store_settings(workspace)
    found = {settings.registry: registry_problem(workspace), settings.sqlite_path: store_problem(workspace, pages=True)}
    damaged = [f"{path} {problem}" for path, problem in found.items() if problem]
    if damaged:
        raise CorankError(
            f"the feature store is damaged: {'; '.join(damaged)}. `corank repair`, then `corank run`, fill it again "
            "from the tables."
        )


def lost_partitions(workspace: Workspace, partitions: Iterable[str]) -> list[str]:
    """The given partitions that the log has lost or the config's ``start`` leaves out, as far as ``until`` shows."""
    others = [partition for partition in partitions if partition not in workspace.partitions]
    if workspace.until is None:
        return others
    return [
        partition for partition in others if partition <= workspace.until and partition not in workspace.log.present
    ]


def _drop_gone_states(workspace: Workspace) -> None:
    """Drop the states of partitions that the log, or the config's ``start``, has no more: the online store is
    filled from these tables. Should they come back, they are built again."""
    from features.builder.states import ITEM_AGGREGATES, STATE, USER_AGGREGATES
    from features.delta.maintenance import drop_partitions

    tables = [build_settings(workspace).table(name) for name in (STATE, USER_AGGREGATES, ITEM_AGGREGATES)]
    lost = [lost_partitions(workspace, table.partitions()) for table in tables]
    for partition in set().union(*lost):
        if record := workspace.records.read(SAMPLES, partition):
            workspace.records.write(SAMPLES, partition, replace(record, inputs=""))
    for table, partitions in zip(tables, lost, strict=True):
        if partitions:
            drop_partitions(table, partitions)


def store_settings(workspace: Workspace) -> FeatureStoreSettings:
    """The store of the features that the config declares."""
    from features.delta.table import Table
    from features.store.online import FeatureStoreSettings

    config, log = workspace.config, workspace.log
    return FeatureStoreSettings(
        project=config.name,
        registry=str(config.local_path("feast", "registry.db")),
        schema=config.schema_,
        users=log.tables.get("users"),
        items=log.tables.get("items"),
        events={sequence.events: log.tables[sequence.events] for sequence in config.schema_.sequences},
        state_uri=config.path("tables", "state"),
        user_aggregates=Table("user_aggregates", config.path("tables", "user_aggregates")),
        item_aggregates=Table("item_aggregates", config.path("tables", "item_aggregates")),
        online=config.feast.online,
        sqlite_path=str(config.local_path("feast", "online.db")),
        redis=config.feast.redis,
    )


def registered_settings(workspace: Workspace) -> FeatureStoreSettings:
    """The store with all that is registered: the config's features, and those that live models read."""
    declared = workspace.config.schema_
    live = tuple(schema for schema in live_schemas(workspace) if schema != declared)
    return replace(store_settings(workspace), live=live)


def live_schemas(workspace: Workspace) -> list[Schema]:
    """Schemas of the models that are or may soon be served: the champion, the one before it, and those that were last
    deployed and last served."""
    from pipeline.workspace.registry import PREVIOUS, published_schema

    versions = [workspace.registry.champion(), workspace.registry.champion(PREVIOUS)]
    recorded = [workspace.records.get(folder, "current") for folder in ("deployment", "serving")]
    artifacts = [version.artifact for version in versions if version is not None]
    artifacts += [record["artifact"] for record in recorded if record is not None]
    schemas = [published_schema(artifact) for artifact in dict.fromkeys(artifacts)]
    return [schema for schema in schemas if schema is not None]
