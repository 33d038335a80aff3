"""``validated``: every partition passes the data-validation gate, or the run stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from features.digest import digest
from features.errors import DataGateError, writing
from pipeline.records import Record
from pipeline.stages.stage import Stage
from pipeline.version import code_version
from pipeline.workspace import DATA_SECTIONS, Workspace

SHOWN_FINDINGS = 20


@dataclass(frozen=True)
class ValidatedRecord(Record):
    """The verdict on a partition.

    Attributes:
        rows: number per table.
        quarantined: rows of impressions that are set aside.
        checks: number of checks made.
        findings: one per rule that rows broke, as :class:`features.validation.Finding` describes.
        data_docs: where Great Expectations' pages lie.
        fingerprint: of the partition, per table.
    """

    passed: bool = False
    rows: dict[str, int] = field(default_factory=dict)
    quarantined: int = 0
    checks: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)
    data_docs: str = "–"
    fingerprint: dict[str, str] = field(default_factory=dict)


class Validated(Stage[ValidatedRecord]):
    """The partition passed the Great Expectations gate."""

    name = "validated"
    record = ValidatedRecord
    partitioned = True
    check = "great_expectations"
    kinds = ("greatexpectations",)

    def inputs(self, workspace: Workspace) -> dict[str, str]:
        settings = workspace.config.digest_of(*DATA_SECTIONS, "validation", stored=True)
        log = workspace.log
        return {partition: digest([settings, log.fingerprint(partition)]) for partition in log.partitions}

    def stale(self, workspace: Workspace) -> list[str]:
        """As for any stage; also partitions that did not pass."""
        inputs = self.inputs(workspace)
        records = {part: workspace.records.read(self, part) for part in inputs}
        return [
            part for part, record in records.items() if not record or record.inputs != inputs[part] or not record.passed
        ]

    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, ValidatedRecord]:
        """Great Expectations gate. Every verdict is recorded.

        Raises:
            DataGateError: a partition did not pass; every finding is named.
        """
        from features.validation import validate_partitions

        config, log = workspace.config, workspace.log
        require_no_gaps(workspace)
        with workspace.progress.stage(self.name) as stage:
            done = 0

            def tell(result: Any) -> None:
                nonlocal done
                done += 1
                stage.say(f"{done}/{len(parts)} partitions, now {result.partition}")

            with writing(config.local_path("great_expectations")):
                results, docs = validate_partitions(
                    log.tables,
                    config.schema_,
                    list(parts),
                    config.grain,
                    config.validation,
                    config.local_path("great_expectations"),
                    config.path("quarantine"),
                    log.now,
                    tell,
                    set(log.partitions) - set(log.shown),
                )
            failed = [result for result in results if not result.passed]
            if not failed:  # before the records: if only these were written, a changed type would pass the next time
                log.keep_types(workspace.records)
            inputs, records = self.inputs(workspace), {}
            for result in results:
                record = ValidatedRecord(
                    inputs=inputs[result.partition],
                    passed=result.passed,
                    rows=result.rows,
                    quarantined=result.quarantined,
                    checks=result.checks,
                    findings=[asdict(finding) for finding in result.findings],
                    data_docs=str(docs),
                    fingerprint=log.fingerprint(result.partition),
                    code=code_version(),
                )
                workspace.records.write(self, result.partition, record)
                records[result.partition] = record
            rows = sum(result.rows.get("impressions", 0) for result in results)
            quarantined = sum(result.quarantined for result in results)
            stage.say(
                f"{len(results) - len(failed)} of {len(results)} partitions pass "
                f"{sum(result.checks for result in results):,} checks; "
                f"{rows:,} impressions, {quarantined:,} quarantined"
            )
            if failed:
                messages = list(dict.fromkeys(finding.message for result in failed for finding in result.failures))
                raise DataGateError(
                    listed(f"{len(failed)} of {len(results)} partitions failed validation", messages)
                    + f"\nData Docs: {docs}"
                )
        return records

    def counts(self, workspace: Workspace) -> tuple[str, str]:
        records = [workspace.records.read(self, part) or ValidatedRecord() for part in workspace.partitions]
        impressions = sum(record.rows.get("impressions", 0) for record in records)
        quarantined = sum(record.quarantined for record in records)
        return (
            f"{impressions:,} impressions",
            f"{impressions - quarantined:,} good, {quarantined:,} quarantined, "
            f"{sum(record.passed for record in records)} of {len(records)} partitions pass",
        )

    def rows(self, record: ValidatedRecord) -> int:
        return sum(record.rows.values())

    def notes(self, record: ValidatedRecord) -> list[str]:
        return [finding["message"] for finding in record.findings]


VALIDATED = Validated()


def require_no_gaps(workspace: Workspace) -> None:
    """
    Raises:
        DataGateError: a partition between the oldest and the newest has no impressions, and gaps are not allowed.
    """
    gaps = [] if workspace.config.validation.allow_gaps else workspace.log.gaps()
    if gaps:
        empty = [f"table impressions, partition {partition}: 0 rows" for partition in gaps]
        raise DataGateError(listed("the log has empty partitions (validation.allow_gaps accepts them)", empty))


def require_validated(workspace: Workspace) -> None:
    """
    Raises:
        DataGateError: a partition has no passing record.
    """
    require_no_gaps(workspace)
    refused = VALIDATED.stale(workspace)
    if refused:
        raise DataGateError(
            f"partitions without a passing validation record: {', '.join(refused[:SHOWN_FINDINGS])}. "
            "Run `corank validate` to see why."
        )


def listed(title: str, messages: Sequence[str]) -> str:
    """A title and the first messages below it."""
    shown = [f"  {message}" for message in messages[:SHOWN_FINDINGS]]
    if len(messages) > SHOWN_FINDINGS:
        shown.append(f"  … and {len(messages) - SHOWN_FINDINGS} more")
    return title + ":\n" + "\n".join(shown)
