"""``samples``: partitions are folded into timelines, and their requests written as rows of the sample table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from features.delta.damage import lost_files
from features.delta.table import Table
from features.digest import digest
from pipeline.records import Record
from pipeline.runtime import ensure_ray
from pipeline.stages.stage import Stage
from pipeline.stages.validated import VALIDATED, require_validated
from pipeline.version import code_version
from pipeline.workspace import DATA_SECTIONS, Workspace

if TYPE_CHECKING:
    from features.builder.states import BuildSettings
    from features.samples.source import SampleSource

RUN_PARTITIONS = 32
"""Most partitions that are built together, which bounds the memory of a bucket and of the counts of items."""

FOREVER = 2**62


@dataclass(frozen=True)
class SamplesRecord(Record):
    """What went in and out of a partition.

    Attributes:
        impressions: number that came in; candidates + quarantined + forgotten.
        users: rows of the sample table, each a user's timelines.
        fingerprint: of the partition, per table.
        versions: of the tables.
        forgotten: candidates of users who were erased.
        retired: retention dropped the samples; the partition counts as built all the same.
    """

    impressions: int = 0
    quarantined: int = 0
    candidates: int = 0
    requests: int = 0
    users: int = 0
    events: int = 0
    timeline_events: int = 0
    fingerprint: dict[str, str] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    forgotten: int = 0
    retired: bool = False


class Samples(Stage[SamplesRecord]):
    """Request-level rows: timelines once, requests, candidates."""

    name = "samples"
    depends = ("validated",)
    record = SamplesRecord
    partitioned = True
    kinds = ("ray", "deltalake")

    def inputs(self, workspace: Workspace) -> dict[str, str]:
        """A partition's samples are made from its states and from labels that came later."""
        return {
            partition: digest([inputs, workspace.log.labels(partition)])
            for partition, inputs in state_inputs(workspace).items()
        }

    def stale(self, workspace: Workspace) -> list[str]:
        """As for any stage; also partitions that have lost files in any of the builder's tables."""
        stale = {*super().stale(workspace), *(partition for _, partition, _ in lost_built_files(workspace))}
        return [partition for partition in workspace.partitions if partition in stale]

    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, SamplesRecord]:
        """Fold partitions into timelines and write their rows.

        Raises:
            CorankError: a partition has no passing validation record.
        """
        from features.builder.build import build_partitions

        require_validated(workspace)
        config, log = workspace.config, workspace.log
        with workspace.progress.stage(self.name) as stage:
            stage.say("starting Ray")
            ensure_ray(config.ray)
            for table, partition, problem in lost_built_files(workspace):
                workspace.progress.note(f"table {table}, partition {partition}: {problem}; it is built again")
            settings, inputs = build_settings(workspace), self.inputs(workspace)
            stage.say(f"{len(parts)} partitions, {config.buckets} buckets")
            rows = {partition: workspace.records.require(VALIDATED, partition).rows for partition in parts}
            shown = {partition: counts_of_tables.get("impressions", 0) for partition, counts_of_tables in rows.items()}
            records: dict[str, SamplesRecord] = {}
            for consecutive in _runs(workspace.partitions, parts):
                earlier, which = workspace.partitions[: workspace.partitions.index(consecutive[0])], ""
                if len(consecutive) < len(parts):
                    which = f", partitions {consecutive[0]} … {consecutive[-1]}"

                def tell(what: str, done: int, total: int, which: str = which) -> None:
                    stage.say(f"{done}/{total} {what}{which}")

                counts = build_partitions(settings, consecutive, earlier, shown, tell)
                for partition in consecutive:
                    records[partition] = SamplesRecord(
                        inputs=inputs[partition],
                        fingerprint=log.fingerprint(partition),
                        versions=log.versions,
                        code=code_version(),
                        **asdict(counts[partition]),
                    )
                    workspace.records.write(self, partition, records[partition])
            made = _total(records.values())
            stage.say(
                f"{len(parts)} partitions: {made['impressions']:,} impressions in = "
                f"{made['candidates']:,} candidates + {made['quarantined']:,} quarantined; "
                f"{made['requests']:,} requests, {made['users']:,} timelines"
            )
        return records

    def rows(self, record: SamplesRecord) -> int:
        return record.impressions + record.events

    def counts(self, workspace: Workspace) -> tuple[str, str]:
        records = [workspace.records.read(self, part) or SamplesRecord() for part in workspace.partitions]
        made = _total(records)
        return (
            f"{made['impressions']:,} impressions, {made['events']:,} events",
            f"{made['candidates']:,} candidates + {made['quarantined']:,} quarantined, "
            f"{made['requests']:,} requests, {made['users']:,} timelines",
        )


SAMPLES = Samples()


def _total(records: Iterable[SamplesRecord]) -> dict[str, int]:
    totals = dict.fromkeys(("impressions", "quarantined", "candidates", "requests", "users", "events"), 0)
    for record in records:
        for name in totals:
            totals[name] += getattr(record, name)
    return totals


def _runs(known: Sequence[str], partitions: Sequence[str]) -> list[list[str]]:
    """The partitions, split into runs of consecutive ones, which are committed together."""
    runs: list[list[str]] = []
    for partition in partitions:
        index = known.index(partition)
        if runs and len(runs[-1]) < RUN_PARTITIONS and known[index - 1] == runs[-1][-1]:
            runs[-1].append(partition)
        else:
            runs.append([partition])
    return runs


def state_inputs(workspace: Workspace) -> dict[str, str]:
    """Per partition the digest of all that its states are made from, the partition before included."""
    from features.builder.states import LAYOUT

    settings = workspace.config.digest_of(
        *DATA_SECTIONS, "buckets", "log_delay_seconds", "aggregates_delay_seconds", "start", stored=True
    )
    return workspace.log.chain(LAYOUT, settings)


def build_settings(workspace: Workspace, versions: dict[str, int] | None = None) -> BuildSettings:
    """
    Args:
        versions: from a record, to read the user's tables as they were when it was made. Default: the log's.
    """
    from features.builder.states import BuildSettings

    config, log = workspace.config, workspace.log
    known = log.versions | (versions or {})
    return BuildSettings(
        tables={role: table.at(known.get(role)) for role, table in log.tables.items()},
        schema=config.schema_,
        grain=config.grain,
        buckets=config.buckets,
        log_delay=config.log_delay,
        root=config.path("tables"),
        now=log.now,
        aggregates_delay=config.aggregates_delay,
        at_once=config.ray.concurrent_buckets,
    )


def lost_built_files(workspace: Workspace) -> list[tuple[str, str, str]]:
    """Table, partition and problem of files of built partitions that are gone or have another size than when written.

    It costs one listing per table. `corank repair` finds all other damage (:mod:`pipeline.repair`).
    """
    from features.builder.states import ITEM_AGGREGATES, STATE, USER_AGGREGATES

    records = {partition: workspace.records.read(SAMPLES, partition) for partition in workspace.partitions}
    built = [partition for partition, record in records.items() if record is not None]
    lost: list[tuple[str, str, str]] = []
    for name in (SAMPLES.name, STATE, USER_AGGREGATES, ITEM_AGGREGATES):
        table = Table(name, workspace.config.path("tables", name))
        if not table.exists():
            lost += [(name, partition, f"there is no table at {table.uri}") for partition in built]
            continue
        files = lost_files(table)
        if name == SAMPLES.name:
            known = set(table.partitions())
            lost += [
                (name, partition, "the Delta log names no file of it")
                for partition in built
                if (record := records[partition]) and record.users and not record.retired and partition not in known
            ]
        lost += [(name, file.partition or "", f"file {table.uri}/{file.path} {file.problem}") for file in files]
    return [entry for entry in lost if entry[1] in built]


def kept(workspace: Workspace) -> list[str]:
    """The partitions except those whose samples retention dropped (pipeline/maintenance.py).

    A retired partition keeps its record, so that it counts as built and nothing rebuilds it.
    """
    records = {partition: workspace.records.read(SAMPLES, partition) for partition in workspace.partitions}
    return [partition for partition, record in records.items() if record is None or not record.retired]


def trainable(workspace: Workspace) -> list[str]:
    """The kept partitions whose labels are all known."""
    return [partition for partition in kept(workspace) if workspace.log.is_attributed(partition)]


def sample_source(workspace: Workspace, low: int, high: int, partitions: tuple[str, ...] | None = None) -> SampleSource:
    """Samples of requests with low ≤ ts < high, from the partitions that can hold them."""
    from features.samples.source import SampleSource

    log = workspace.log
    chosen = partitions or tuple(
        partition
        for partition in trainable(workspace)
        if log.bounds(partition)[1] > low and log.bounds(partition)[0] < high
    )
    return SampleSource(workspace.config.path("tables", "samples"), workspace.config.schema_, chosen, low, high)
