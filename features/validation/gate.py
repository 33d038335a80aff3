"""Great Expectations judges every partition of the log before anything is built from it.

Polars computes one row of metrics per table and partition; GX judges that row, so that tables of any size
pass through the same small frame, and its Data Docs show every verdict.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs
import pyarrow as pa

from features.delta.table import Table, replace_partition, write_file
from features.errors import ConfigError, UnreadableError
from features.schema import SECOND, Grain, Schema, partition_bounds
from features.validation.layout import joins, layout_checks, roles
from features.validation.rules import (
    PROFILE_KEYS,
    Finding,
    Rule,
    ValidationRules,
    event_rules,
    first_broken,
    impression_rules,
    profile_rules,
)

QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("rule", "request_id", "user_id", "item_id", "row", "dt", "bucket")]
)
ROWS = "_rows"
"""Metric that every suite's row of metrics has: the number of rows it was computed over."""

JOINED_PARTITIONS = 8
"""Newest partitions of a log whose ids are looked for in another table."""

UNREADABLE = Rule("unreadable_files", pl.lit(0), "cannot be read")
"""Files that are missing, damaged or of another type than the table (:meth:`Table.check_files`)."""


@dataclass(frozen=True)
class PartitionValidation:
    """Verdicts on one partition. ``failures`` stop it; other findings were tolerated (quarantined)."""

    partition: str
    rows: dict[str, int]
    quarantined: int
    checks: int
    findings: tuple[Finding, ...]
    failures: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


class Gate:
    """A Great Expectations context in a folder, with one suite per table that every partition runs through."""

    def __init__(self, root: Path) -> None:
        os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read on import
        import great_expectations

        root.mkdir(parents=True, exist_ok=True)
        self.gx: Any = great_expectations
        self.context: Any = self.gx.get_context(mode="file", project_root_dir=str(root))
        self.context.variables.progress_bars = {"globally": False}
        self.source = self.context.data_sources.add_or_update_pandas("corank")
        self.definitions: dict[str, Any] = {}

    def judge(
        self, suite: str, run: str, moment: int, metrics: Mapping[str, float], rules: Sequence[Rule]
    ) -> list[tuple[Rule, float]]:
        """The rules whose expectation failed, with the observed value.

        Args:
            run, moment: name and time (microseconds UTC) of the result in the Data Docs. They are those of the
                data, not of the clock, so that judging again replaces the earlier result.
            metrics: one value per rule.
        """
        import pandas as pd

        if suite not in self.definitions:
            self.definitions[suite] = self._define(suite, rules)
        result = self.definitions[suite].run(
            batch_parameters={"dataframe": pd.DataFrame([metrics])},
            run_id=self.gx.RunIdentifier(run_name=run, run_time=datetime.fromtimestamp(moment / SECOND, UTC)),
        )
        failed = {one.expectation_config.kwargs["column"] for one in result.results if not one.success}
        return [(rule, metrics[rule.name]) for rule in rules if rule.name in failed]

    def _define(self, name: str, rules: Sequence[Rule]) -> Any:
        """The suite; the rules' names and limits are the same for all partitions of a table."""
        # of one row the maximum is the value; it costs GX a third of ExpectColumnValuesToBeBetween
        expectations = [
            self.gx.expectations.ExpectColumnMaxToBeBetween(
                column=rule.name,
                min_value=rule.lowest,
                max_value=rule.highest,
                severity="critical" if rule.gate else "warning",
            )
            for rule in rules
        ]
        suite = self.context.suites.add_or_update(self.gx.ExpectationSuite(name=name, expectations=expectations))
        batch = self.source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("metrics")
        return self.context.validation_definitions.add_or_update(
            self.gx.ValidationDefinition(name=name, data=batch, suite=suite)
        )

    def build_docs(self) -> Path:
        """Build the static Data Docs; returns their index page."""
        sites = self.context.build_data_docs()
        return Path(next(iter(sites.values())).removeprefix("file://"))


def validate_partitions(
    tables: Mapping[str, Table],
    schema: Schema,
    partitions: Sequence[str],
    grain: Grain,
    rules: ValidationRules,
    gx_root: Path,
    quarantine_root: str,
    now: int,
    progress: Callable[[PartitionValidation], None],
    histories: Collection[str] = (),
) -> tuple[list[PartitionValidation], Path]:
    """Judge these partitions of every table, and write the rows to set aside.

    Args:
        histories: partitions without impressions, whose events are history.
        gx_root: local folder of the Great Expectations context and its Data Docs.
        quarantine_root: Delta table of the bad rows; one commit per partition.
        now: microseconds UTC.
        progress: called after every partition.

    Returns:
        one verdict per partition, and the index page of the Data Docs. Bad data is reported, never raised.

    Raises:
        ConfigError: ``max_null_share`` names no feature.
    """
    unknown = sorted(set(rules.max_null_share) - {feature.name for feature in schema.features})
    if unknown:
        known = ", ".join(feature.name for feature in schema.features)
        raise ConfigError(f"validation.max_null_share: {', '.join(unknown)} is no feature; there are: {known}")
    gate = Gate(gx_root)
    newest = max((partition_bounds(partition, grain)[0] for partition in partitions), default=now)
    readable, broken, checks = _judge_layouts(gate, tables, schema, newest)
    profile_rows: dict[str, int] = {}
    said = list(broken)
    for role in PROFILE_KEYS:
        if role in readable:
            own = profile_rules(role, schema, rules)
            rows, failed = _judge(gate, readable[role], "", newest, own)
            profile_rows[role] = rows
            said += [finding for _, finding in failed]
            broken += [finding for rule, finding in failed if rule.gate]
            checks += len(own)
    if not broken:
        strangers, count = _judge_joins(gate, readable, schema, partitions, rules, newest)
        said, broken, checks = said + strangers, broken + strangers, checks + count
    shared = PartitionValidation("", profile_rows, 0, checks, tuple(said), tuple(broken))
    results = []
    events = {role: table for role, table in readable.items() if role != "impressions"}
    for partition in partitions:
        own_tables = events if partition in histories else readable
        result = _validate_partition(gate, own_tables, schema, partition, grain, rules, quarantine_root, now, shared)
        progress(result)
        results.append(result)
    return results, gate.build_docs()


def _judge_layouts(
    gate: Gate, tables: Mapping[str, Table], schema: Schema, moment: int
) -> tuple[dict[str, Table], list[Finding], int]:
    """Tables whose rows can be judged, findings of the others, and the number of checks."""
    readable: dict[str, Table] = {}
    findings: list[Finding] = []
    checks = 0
    for role in roles(schema, tables):
        layout = layout_checks(role, tables.get(role), schema)
        rules = [Rule(name, pl.lit(broken), message) for name, (broken, message) in layout.items()]
        metrics = {name: float(broken) for name, (broken, _) in layout.items()}
        failed = gate.judge(f"{role} layout", f"{role} layout", moment, metrics, rules)
        findings += [Finding(role, "", rule.name, int(value), 0, rule.text) for rule, value in failed]
        checks += len(rules)
        if not failed:
            readable[role] = tables[role]
    return readable, findings, checks


def _judge_joins(
    gate: Gate,
    tables: Mapping[str, Table],
    schema: Schema,
    partitions: Sequence[str],
    rules: ValidationRules,
    moment: int,
) -> tuple[list[Finding], int]:
    """Findings of ids that never meet those of another table, such as 001 and 1, and the number of checks.

    The newest of these partitions tell: ids are written alike, or they are not.
    """
    checked: list[tuple[Rule, float, str]] = []
    for role, other, key in joins(schema):
        if role not in tables or other not in tables:
            continue
        try:
            here, there = (_some_ids(tables[one], key, partitions) for one in (role, other))
        except UnreadableError:
            continue  # the verdict on the partition itself names the file
        smaller = min(here.len(), there.len())
        if not smaller:
            continue
        met = int(here.is_in(there.implode()).sum())
        text = (
            f"has (almost) no {key} in common with table {other}: {met:,} of {smaller:,} are in both (for example "
            f"{here.sort()[0]!r} here, {there.sort()[0]!r} there); write them alike, or accept it by "
            "validation.min_matched_share: 0"
        )
        rule = Rule(f"{role}_{key}_in_{other}", pl.lit(0), text, None, rules.min_matched_share)
        checked.append((rule, met / smaller, role))
    if not checked:
        return [], 0
    metrics = {rule.name: share for rule, share, _ in checked}
    failed = gate.judge("joins", "joins", moment, metrics, [rule for rule, _, _ in checked])
    broken = {rule.name for rule, _ in failed}
    return [
        Finding(role, "", rule.name, 0, 0, f"table {role} {rule.text}")
        for rule, _, role in checked
        if rule.name in broken
    ], len(checked)


def _some_ids(table: Table, key: str, partitions: Sequence[str]) -> pl.Series:
    """Distinct ids of a profile table, or of a log's newest partitions, as text."""
    own = None if table.grain is None else [one for one in table.partitions() if one in partitions][-JOINED_PARTITIONS:]
    ids = table.scan(own).select(pl.col(key).cast(pl.String).drop_nulls().unique())
    return table.collect(ids, own).to_series()


def _validate_partition(
    gate: Gate,
    tables: Mapping[str, Table],
    schema: Schema,
    partition: str,
    grain: Grain,
    rules: ValidationRules,
    quarantine_root: str,
    now: int,
    shared: PartitionValidation,
) -> PartitionValidation:
    """Judge one partition, on top of the verdicts on layouts and profiles that all partitions share."""
    findings, failures = list(shared.findings), list(shared.failures)
    rows, checks, quarantined = dict(shared.rows), shared.checks, 0
    for role, table in tables.items():
        if role in PROFILE_KEYS:
            continue
        impressions = role == "impressions"
        own = (
            impression_rules(schema, partition, grain, rules, now)
            if impressions
            else event_rules(role, schema, partition, grain, rules, now)
        )
        moment = partition_bounds(partition, grain)[0]
        rows[role], failed = _judge(gate, table, partition, moment, own)
        findings += [finding for _, finding in failed]
        broken = [rule for rule, _ in failed if rule.sets_aside]
        overfull = any(rule.name == "quarantined_share" for rule, _ in failed)
        # beyond the limit the single row rules say what is wrong; of one alone the share says nothing more
        failures += [
            finding
            for rule, finding in failed
            if (rule.gate and not (rule.name == "quarantined_share" and len(broken) == 1))
            or (rule.sets_aside and overfull)
        ]
        checks += len(own)
        if impressions and UNREADABLE not in [rule for rule, _ in failed]:
            try:
                rejected = _rejected(table, schema, partition, grain, now) if broken else None
            except UnreadableError as error:  # a damaged page of a column that no rule reads
                failures.append(_unreadable(role, partition, error))
                findings.append(failures[-1])
            else:
                quarantined = _write_quarantine(rejected, partition, quarantine_root)
    return PartitionValidation(partition, rows, quarantined, checks, tuple(findings), tuple(failures))


def _judge(
    gate: Gate, table: Table, partition: str, moment: int, rules: Sequence[Rule]
) -> tuple[int, list[tuple[Rule, Finding]]]:
    """The number of rows, and the rules that a table's partition broke (``""``: the whole table's).

    Of a table that cannot be read nothing else is known.
    """
    partitions, run = ([partition], f"{table.name} {partition}") if partition else (None, table.name)
    rules = [UNREADABLE, *rules]
    frame = table.scan(partitions)
    try:
        table.check_files(partitions)
        # only the columns of the rules are read
        metrics = [rule.metric.fill_null(0).cast(pl.Float64).alias(rule.name) for rule in rules]
        values = table.collect(frame.select(pl.len().alias(ROWS), *metrics), partitions).row(0, named=True)
        rows = int(values.pop(ROWS))
        failed = gate.judge(table.name, run, moment, values, rules)
        shown = [rule.example.alias(rule.name) for rule, _ in failed if rule.example is not None]
        examples = table.collect(frame.select(*shown), partitions).to_dicts()[0] if shown else {}
    except UnreadableError as error:
        values = {rule.name: float("nan") for rule in rules} | {UNREADABLE.name: 1.0}
        gate.judge(table.name, run, moment, values, rules)
        return 0, [(UNREADABLE, _unreadable(table.name, partition, error))]
    return rows, [
        (rule, rule.finding(table.name, partition, value, rows, examples.get(rule.name))) for rule, value in failed
    ]


def _unreadable(table: str, partition: str, error: UnreadableError) -> Finding:
    return Finding(table, partition, UNREADABLE.name, 1, 0, str(error))


def _rejected(impressions: Table, schema: Schema, partition: str, grain: Grain, now: int) -> pl.DataFrame:
    """The bad rows of a partition, whole, each with the first rule that it broke."""
    whole_row = pl.struct(
        ~cs.by_name("rule", "dt", "bucket", require_all=False) - cs.binary(),
        cs.binary().bin.encode("base64"),  # JSON has no bytes
    )
    rejected = (
        impressions.scan([partition])
        .with_columns(first_broken(schema, partition, grain, now))
        .filter(pl.col("rule").is_not_null())
        .select(
            "rule",
            pl.col("request_id", "user_id", "item_id").cast(pl.String),
            whole_row.struct.json_encode().alias("row"),
        )
    )
    return impressions.collect(rejected, [partition])


def _write_quarantine(rejected: pl.DataFrame | None, partition: str, root: str) -> int:
    """Write the bad rows of a partition, or clear an earlier validation's, in one commit; returns their number."""
    if rejected is None:
        table = Table("quarantine", root)
        if table.exists() and partition in table.partitions():
            replace_partition(root, partition, [], QUARANTINE_SCHEMA, {})
        return 0
    layout = pa.schema([column for column in QUARANTINE_SCHEMA if column.name not in ("dt", "bucket")])
    rows = rejected.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(layout)
    file = write_file(root, rows, {"dt": partition, "bucket": "0"}, {})
    replace_partition(root, partition, [file], QUARANTINE_SCHEMA, {})
    return rejected.height
