"""The DAG as Dagster assets: ``log_partition → … → deployment`` (DESIGN §7).

The first four have one partition per log partition, the others are one asset each. Every asset calls its
stage in :mod:`pipeline.stages`, which skips what is up to date. ``CORANK_CONFIG=my.yaml dagster dev -m
pipeline.definitions`` shows the same assets in Dagster's web UI.
"""

# no postponed annotations here: Dagster reads them

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
from alembic.util import CommandError
from sqlalchemy.exc import SQLAlchemyError

from features.errors import DataGateError
from features.schema import PARTITION_FORMATS, SECOND
from pipeline.config import Config
from pipeline.creation import locked, make_whole, remove, sqlalchemy_path
from pipeline.stages import Pipeline
from pipeline.workspace import SHOWN_FINDINGS

CRON = {"hour": "0 * * * *", "day": "0 0 * * *", "week": "0 0 * * 1"}
PARTITIONED = ("log_partition", "validated", "samples", "feature_store")
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"


def build_assets(pipeline: Pipeline) -> list[dg.AssetsDefinition]:
    """All assets of one pipeline."""
    config, partitions = pipeline.config, pipeline.partitions
    last_close = datetime.fromtimestamp(pipeline.log.bounds(partitions[-1])[1] / SECOND, UTC)
    definition = dg.TimeWindowPartitionsDefinition(
        start=partitions[0],
        end=last_close.strftime(PARTITION_FORMATS[config.grain]),
        fmt=PARTITION_FORMATS[config.grain],
        cron_schedule=CRON[config.grain],
    )
    one_run = dg.BackfillPolicy.single_run()

    def selected(context: dg.AssetExecutionContext, stale: Sequence[str]) -> list[str]:
        """Stale partitions up to the newest one asked for; what precedes it is never skipped."""
        newest = max(context.partition_keys)
        return [partition for partition in stale if partition <= newest]

    def present(context: dg.AssetExecutionContext) -> list[str]:
        known = set(partitions)
        return [partition for partition in context.partition_keys if partition in known]

    @dg.asset(partitions_def=definition, backfill_policy=one_run, kinds={"deltalake"})
    def log_partition(context: dg.AssetExecutionContext) -> None:
        """A closed partition of the user's log tables and its fingerprints."""
        for partition in present(context):
            context.add_asset_metadata(pipeline.log.fingerprint(partition), partition_key=partition)

    @dg.asset(
        partitions_def=definition,
        backfill_policy=one_run,
        deps=[log_partition],
        kinds={"greatexpectations"},
        check_specs=[dg.AssetCheckSpec("great_expectations", asset="validated", blocking=True)],
    )
    def validated(context: dg.AssetExecutionContext) -> Iterator[Any]:
        """The partition passed the Great Expectations gate."""
        stale = selected(context, pipeline.stale_validation())
        try:
            if stale:
                found = [finding["message"] for record in pipeline.validate(stale) for finding in record["findings"]]
                for message in list(dict.fromkeys(found))[:SHOWN_FINDINGS]:  # they stopped nothing
                    pipeline.progress.note(message)
        except DataGateError as error:
            yield dg.AssetCheckResult(check_name="great_expectations", passed=False, metadata={"findings": str(error)})
            raise
        records = {partition: pipeline.records.get("validated", partition) or {} for partition in present(context)}
        for partition, record in records.items():
            context.add_asset_metadata(_metadata(record), partition_key=partition)
        yield dg.AssetCheckResult(
            check_name="great_expectations",
            passed=all(record.get("passed") for record in records.values()),
            metadata={
                "partitions": len(records),
                "checks": sum(record.get("checks", 0) for record in records.values()),
            },
        )
        yield dg.MaterializeResult()

    @dg.asset(partitions_def=definition, backfill_policy=one_run, deps=[validated], kinds={"ray", "deltalake"})
    def samples(context: dg.AssetExecutionContext) -> None:
        """Request-level rows: timelines once, requests, candidates."""
        stale = selected(context, pipeline.stale_samples())
        if stale:
            pipeline.build_samples(stale)
        for partition in present(context):
            record = pipeline.records.get("samples", partition) or {}
            context.add_asset_metadata(_metadata(record), partition_key=partition)

    @dg.asset(partitions_def=definition, backfill_policy=one_run, deps=[samples], kinds={"feast"})
    def feature_store(context: dg.AssetExecutionContext) -> None:
        """Profiles and sequences online as of the partition's close."""
        stale = selected(context, pipeline.stale_store())
        if stale:
            pipeline.fill_store(stale)
        record = pipeline.records.get("feature_store", "online") or {}
        for partition in present(context):
            context.add_asset_metadata(
                {"inputs": record["partitions"][partition], "code": record["code"]}, partition_key=partition
            )

    @dg.asset(deps=[feature_store], kinds={"ray", "pytorch"})
    def candidate() -> dg.MaterializeResult[Any]:
        """A trained model, not yet judged."""
        key = pipeline.candidate_key
        if not pipeline.has_candidate(key):
            pipeline.train_candidate()
        return dg.MaterializeResult(metadata=_metadata(pipeline.records.get("candidate", key) or {}))

    @dg.asset(deps=[candidate], kinds={"ray"})
    def evaluation() -> dg.MaterializeResult[Any]:
        """The candidate's metrics on held-out requests, beside baseline and champion."""
        record = pipeline.records.get("evaluation", pipeline.evaluation_key) or pipeline.evaluate()
        return dg.MaterializeResult(metadata=_metadata(record))

    @dg.asset(deps=[evaluation], kinds={"mlflow"})
    def champion() -> dg.MaterializeResult[Any]:
        """The candidate in MLflow's registry; champion when it passed its gate."""
        record = pipeline.records.get("champion", pipeline.evaluation_key) or pipeline.promote()
        return dg.MaterializeResult(metadata=_metadata(record))

    @dg.asset(deps=[feature_store, champion], kinds={"ray"})
    def deployment() -> dg.MaterializeResult[Any]:
        """A version whose answers over HTTP were verified."""
        record = pipeline.deploy()
        # without the example request: Dagster keeps its history for ever, and `forget` does not reach it
        verified = {name: value for name, value in record["verified"].items() if name != "example"}
        return dg.MaterializeResult(metadata=_metadata({**record, "verified": verified}))

    return [log_partition, validated, samples, feature_store, candidate, evaluation, champion, deployment]


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

    Its history is for people to look at; nothing is decided by it. So one that cannot be opened is set aside.
    """
    if named := os.environ.get("DAGSTER_HOME"):
        return dg.DagsterInstance.from_config(named)
    home = config.local_path("dagster")
    with locked(config.local_path("dagster.lock")):
        if home.exists() and not _opens(home):
            aside = home.with_name("dagster.damaged")
            remove(aside)
            home.rename(aside)
        if not home.exists():
            make_whole(home, _make_home)
    return dg.DagsterInstance.from_config(str(sqlalchemy_path(home)))


def _make_home(home: Path) -> None:
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n", encoding="utf-8")
    _open_home(home)


def _open_home(home: Path) -> None:
    """Open an instance and all its databases, which makes their tables."""
    with dg.DagsterInstance.from_config(str(sqlalchemy_path(home))) as instance:
        instance.get_runs(limit=1)
        instance.all_asset_keys()
        instance.all_instigator_state()


def _opens(home: Path) -> bool:
    try:
        _open_home(home)
    except (SQLAlchemyError, CommandError, OSError):
        return False
    return (home / "dagster.yaml").is_file()


def run_dag(pipeline: Pipeline, pending: Sequence[str]) -> None:
    """Execute the pending stages as one Dagster run in this process.

    Raises:
        whatever the first failing stage raised.
    """
    partitioned = [name for name in pending if name in PARTITIONED]
    # Dagster orders what is selected only, and a stage that is up to date does nothing
    names = [*(PARTITIONED if partitioned else ()), *[name for name in pending if name not in PARTITIONED]]
    tags = {}
    if partitioned:
        stale = [*pipeline.stale_validation(), *pipeline.stale_samples(), *pipeline.stale_store()]
        tags = {RANGE_START: min(stale), RANGE_END: pipeline.partitions[-1]}
    with open_instance(pipeline.config) as instance:
        dg.materialize(
            build_assets(pipeline),
            selection=dg.AssetSelection.assets(*names),
            instance=instance,
            tags=tags,
            resources={},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
