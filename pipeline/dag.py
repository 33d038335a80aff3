"""The DAG as Dagster assets: ``log_partition`` and one for every stage of ``STAGES``.

The first ones have one partition per log partition, the others are one asset each. Every asset runs its stage on what
is stale. ``CORANK_CONFIG=my.yaml dagster dev -m pipeline.definitions`` shows the same assets in Dagster's web UI.
"""

# no postponed annotations here: Dagster reads them

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
from alembic.util import CommandError
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES
from dagster._core.storage.noop_compute_log_manager import NoOpComputeLogManager
from sqlalchemy.exc import SQLAlchemyError

from features.damage import problem_of_database
from features.errors import DataGateError, no_space, out_of_reach
from features.schema import PARTITION_FORMATS, SECOND
from pipeline.config import Config
from pipeline.cost import keep, measured
from pipeline.stages import STAGES
from pipeline.stages.stage import Stage
from pipeline.workspace import Workspace
from pipeline.workspace.creation import locked, make_whole, plain_path, remove, require_writable

CRON = {"hour": "0 * * * *", "day": "0 0 * * *", "week": "0 0 * * 1"}
LOG_PARTITION = "log_partition"
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
SHOWN_NOTES = 20
WORKSPACE = "corank/workspace"
"""Tag of the runs in the process of a command."""


def build_assets(workspace: Workspace) -> list[dg.AssetsDefinition]:
    """All assets of one workspace."""
    config, log = workspace.config, workspace.log
    last_close = datetime.fromtimestamp(log.bounds(log.partitions[-1])[1] / SECOND, UTC)
    definition = dg.TimeWindowPartitionsDefinition(
        start=log.partitions[0],
        end=last_close.strftime(PARTITION_FORMATS[config.grain]),
        fmt=PARTITION_FORMATS[config.grain],
        cron_schedule=CRON[config.grain],
    )

    @dg.asset(partitions_def=definition, backfill_policy=dg.BackfillPolicy.single_run(), kinds={"deltalake"})
    def log_partition(context: dg.AssetExecutionContext) -> None:
        """A closed partition of the user's log tables and its fingerprints."""
        for partition in _present(context, workspace):
            context.add_asset_metadata(log.fingerprint(partition), partition_key=partition)

    return [log_partition, *(_asset(workspace, stage, definition) for stage in STAGES)]


def _asset(workspace: Workspace, stage: Stage[Any], definition: dg.PartitionsDefinition[str]) -> dg.AssetsDefinition:
    @dg.asset(
        name=stage.name,
        description=stage.__doc__,
        deps=list(stage.depends) or [LOG_PARTITION],
        kinds=set(stage.kinds),
        check_specs=[dg.AssetCheckSpec(stage.check, asset=stage.name, blocking=True)] if stage.check else None,
        partitions_def=definition if stage.partitioned else None,
        backfill_policy=dg.BackfillPolicy.single_run() if stage.partitioned else None,
    )
    def asset(context: dg.AssetExecutionContext) -> Iterator[Any]:
        parts = stage.stale(workspace)
        if stage.partitioned:  # all stale ones up to the newest that is asked for: none before it is skipped
            newest = max(context.partition_keys)
            parts = [part for part in parts if part <= newest]
        elif stage.follows:
            parts = list(stage.inputs(workspace))
        try:
            records = _measured_run(workspace, stage, parts) if parts else {}
        except DataGateError as error:
            if stage.check:
                yield dg.AssetCheckResult(check_name=stage.check, passed=False, metadata={"findings": str(error)})
            raise
        notes = dict.fromkeys(note for record in records.values() for note in stage.notes(record))
        for note in list(notes)[:SHOWN_NOTES]:
            workspace.progress.note(note)
        if not stage.partitioned:
            (record,) = stage.shown(workspace, list(stage.inputs(workspace))).values()
            yield dg.MaterializeResult(metadata=_metadata(record))
            return
        shown = stage.shown(workspace, _present(context, workspace))
        for partition, record in shown.items():
            context.add_asset_metadata(_metadata(record), partition_key=partition)
        if stage.check:
            stale = set(stage.stale(workspace))
            yield dg.AssetCheckResult(
                check_name=stage.check,
                passed=stale.isdisjoint(shown),
                metadata={
                    "partitions": len(shown),
                    "checks": sum(record.get("checks", 0) for record in shown.values()),
                },
            )
        yield dg.MaterializeResult()

    return asset


def _measured_run(workspace: Workspace, stage: Stage[Any], parts: Sequence[str]) -> dict[str, Any]:
    """Run a stage, and keep what it cost."""
    with measured(len(parts)) as cost:
        records = stage.run(workspace, parts)
        rows = [stage.rows(record) for record in records.values()]
        cost.rows = sum(count or 0 for count in rows) if any(count is not None for count in rows) else None
    keep(workspace.records, workspace.partitions[-1], stage.name, cost)
    return records


def _present(context: dg.AssetExecutionContext, workspace: Workspace) -> list[str]:
    """The partitions asked for that the log has."""
    known = set(workspace.partitions)
    return [partition for partition in context.partition_keys if partition in known]


def _metadata(record: dict[str, Any]) -> dict[str, Any]:
    """A record as Dagster metadata; long parts stay in the record."""
    plain = {key: value for key, value in record.items() if isinstance(value, (str, int, float, bool))}
    nested = {
        key: dg.MetadataValue.json(value)
        for key, value in record.items()
        if isinstance(value, (dict, list)) and len(str(value)) < 5_000
    }
    return {**plain, **nested}


def open_instance(config: Config) -> dg.DagsterInstance:
    """The Dagster instance in the local folder (SQLite), or the one that DAGSTER_HOME names.

    Nothing depends on its history, which is only shown, so that an instance that cannot be opened is set aside.
    """
    if named := os.environ.get("DAGSTER_HOME"):
        return _instance(named)
    home = config.local_path("dagster")
    with locked(config.local_path("dagster.lock")):
        if home.exists() and not _opens(home):
            aside = home.with_name("dagster.damaged")
            remove(aside)
            home.rename(aside)
        if not home.exists():
            make_whole(home, _make_home)
        _configure(home)
    return _instance(str(plain_path(home)))


def _instance(home: str) -> dg.DagsterInstance:
    """An instance that does not keep what stages print. To keep it Dagster would replace stdout and stderr by files and
    start processes in the command's group, which answer the command's signals with stack traces."""
    nowhere = {"module": NoOpComputeLogManager.__module__, "class": NoOpComputeLogManager.__name__}
    return dg.DagsterInstance.from_ref(InstanceRef.from_dir(home, overrides={"compute_logs": nowhere}))


def _make_home(home: Path) -> None:
    home.mkdir()
    _configure(home)
    _open_home(home)


FORMER_SETTINGS = "telemetry:\n  enabled: false\n"
"""What an earlier version wrote to dagster.yaml."""

SETTINGS = f"{FORMER_SETTINGS}concurrency:\n  runs:\n    max_concurrent_runs: 1\n"
"""The queue starts one run at a time: of two retrainings one would fail at the workspace's lock."""


def _configure(home: Path) -> None:
    """Write Dagster's settings; what a user has written there stays."""
    path = home / "dagster.yaml"
    if not path.is_file() or path.read_text(encoding="utf-8") == FORMER_SETTINGS:
        path.write_text(SETTINGS, encoding="utf-8")


def _open_home(home: Path) -> None:
    """Open an instance and all its databases, which makes their tables."""
    with dg.DagsterInstance.from_config(str(plain_path(home))) as instance:
        instance.get_runs(limit=1)
        instance.all_asset_keys()
        instance.all_instigator_state()


def _opens(home: Path) -> bool:
    for path in home.rglob("*.db"):
        require_writable(path)
    if not home.is_dir() or any(problem_of_database(path) for path in home.rglob("*.db")):
        return False
    try:
        _open_home(home)
    except (SQLAlchemyError, CommandError, OSError) as error:
        if no_space(error) or out_of_reach(error):
            raise
        return False
    return (home / "dagster.yaml").is_file()


def run_dag(workspace: Workspace, names: Sequence[str]) -> None:
    """Execute the stages of these names as one Dagster run in this process.

    Raises:
        whatever the first failing stage raised.
    """
    chosen = set(names)
    partitioned = [stage for stage in STAGES if stage.partitioned]
    tags = {WORKSPACE: str(workspace.config.local_path())}
    if any(stage.name in chosen for stage in partitioned):
        # Dagster orders what is selected only, and a stage that is up to date does nothing
        chosen |= {LOG_PARTITION, *(stage.name for stage in partitioned)}
        stale = [part for stage in partitioned for part in stage.stale(workspace)]
        tags |= {RANGE_START: min(stale), RANGE_END: workspace.partitions[-1]}
    with open_instance(workspace.config) as instance:
        dg.materialize(
            build_assets(workspace),
            selection=dg.AssetSelection.assets(*sorted(chosen)),
            instance=instance,
            tags=tags,
            resources={},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )


def has_history(config: Config) -> bool:
    """Whether there is a Dagster instance, so that opening it makes none."""
    return bool(os.environ.get("DAGSTER_HOME")) or config.local_path("dagster").exists()


def close_killed_runs(config: Config) -> int:
    """Tell Dagster of the runs whose command was killed that they have ended; returns how many there were.

    Only for who has this workspace alone. What Dagster's own processes run is left to them.
    """
    if not has_history(config):
        return 0
    with open_instance(config) as instance:
        ours = dg.RunsFilter(statuses=IN_PROGRESS_RUN_STATUSES, tags={WORKSPACE: str(config.local_path())})
        runs = instance.get_runs(ours)
        for run in runs:
            instance.report_run_failed(run, "The command was killed; what it had recorded is not done again.")
    return len(runs)
