"""Great Expectations judges every partition of the log before anything is built from it.

Polars computes one row of metrics per table and partition; GX judges that row, so that tables of any size
pass through the same small frame, and its Data Docs show every verdict. A verdict costs GX as much as reading a few
hundred thousand rows does, so small partitions are read and judged together, and one by one where they do not pass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs
import pyarrow as pa
import yaml

from features.delta.damage import check_files
from features.delta.table import Table, together
from features.delta.write import replace_partition, replace_partitions, write_file
from features.errors import ConfigError, UnreadableError
from features.schema import FEEDBACK, SECOND, Grain, Schema, partition_bounds
from features.validation.layout import columns_read, joins, layout_checks, roles
from features.validation.rules import (
    EVENT_KEY,
    KEYS,
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
"""Metric of every suite: the number of rows that its metrics were computed from."""

TOGETHER_BYTES, TOGETHER_PARTITIONS = 16 << 20, 64
"""Bytes of the log's files, and partitions: up to these limits partitions are read and judged together."""

JOINED_PARTITIONS = 8
"""Newest partitions of a log whose ids are looked for in another table."""

UNREADABLE = Rule("unreadable_files", pl.lit(0), "cannot be read")
"""Files that are missing, damaged or of another type than the table (:func:`features.delta.damage.check_files`)."""


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
        for path in damaged_settings(root):
            path.unlink()
        self.gx: Any = great_expectations
        self.context: Any = self.gx.get_context(mode="file", project_root_dir=str(root))
        self.context.variables.progress_bars = {"globally": False}
        self.source = self.context.data_sources.add_or_update_pandas("corank")
        self.definitions: dict[str, Any] = {}

    def judge(
        self, suite: str, run: str, moment: int, metrics: Sequence[Mapping[str, float]], rules: Sequence[Rule]
    ) -> list[Rule]:
        """The rules whose expectation failed.

        Args:
            run, moment: name and time (microseconds UTC) of the result in the Data Docs. They are those of the
                data, not of the clock, so that judging again replaces the earlier result.
            metrics: one value per rule; of several partitions the worst one counts.
        """
        import pandas as pd

        if suite not in self.definitions:
            self.definitions[suite] = self._define(suite, rules)
        result = self.definitions[suite].run(
            batch_parameters={"dataframe": pd.DataFrame(metrics)},
            run_id=self.gx.RunIdentifier(run_name=run, run_time=datetime.fromtimestamp(moment / SECOND, UTC)),
        )
        failed = {outcome.expectation_config.kwargs["column"] for outcome in result.results if not outcome.success}
        return [rule for rule in rules if rule.name in failed]

    def _define(self, name: str, rules: Sequence[Rule]) -> Any:
        """The suite; the rules' names and limits are the same for all partitions of a table."""
        # these take GX a third of the time of ExpectColumnValuesToBeBetween
        most, least = self.gx.expectations.ExpectColumnMaxToBeBetween, self.gx.expectations.ExpectColumnMinToBeBetween
        expectations = [
            (most if rule.lowest is None else least)(
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


def damaged_settings(root: Path) -> dict[Path, str]:
    """Settings and suites of a context that Great Expectations cannot read, and why. All are written anew by a
    :class:`Gate` that finds none, as they are made from the config."""
    found: dict[Path, str] = {}
    results = root / "gx" / "uncommitted" / "validations"  # damaged results are left out of the pages
    for path in sorted([*root.rglob("*.yml"), *root.rglob("*.json")]):
        if results in path.parents:
            continue
        try:
            content = path.read_text(encoding="utf-8")
            read = yaml.safe_load(content) if path.suffix == ".yml" else json.loads(content)
            problem = None if isinstance(read, dict) else "holds no settings"
        except (ValueError, yaml.YAMLError) as error:
            problem = f"cannot be read ({' '.join(str(error).split())})"
        if problem:
            found[path] = problem
    return found


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
    findings = list(broken)
    for role in PROFILE_KEYS:
        if role in readable:
            role_rules = profile_rules(role, schema, rules)
            verdict = _judge(gate, readable[role], "", newest, role_rules)
            profile_rows[role] = verdict.rows
            findings += verdict.findings
            broken += verdict.failures
            checks += verdict.checks
    if not broken:
        joined = readable | ({FEEDBACK: tables[FEEDBACK]} if schema.delayed_tasks and FEEDBACK in tables else {})
        strangers, count = _judge_joins(gate, joined, schema, partitions, rules, newest)
        findings, broken, checks = findings + strangers, broken + strangers, checks + count
    shared = PartitionValidation("", profile_rows, 0, checks, tuple(findings), tuple(broken))
    logs = {role: table.pinned() for role, table in readable.items() if role not in PROFILE_KEYS}
    sizes = dict.fromkeys(partitions, 0)
    for table in logs.values():
        for partition, size in table.sizes(partitions).items():
            sizes[partition] += size
    results = []
    for group in together(sizes, TOGETHER_BYTES, TOGETHER_PARTITIONS):
        judged = {
            role: _judge_partitions(gate, table, schema, _rules_of(role, schema, shown, grain, rules, now), grain)
            for role, table in logs.items()
            if (shown := [partition for partition in group if role != "impressions" or partition not in histories])
        }
        for partition in group:
            verdicts = {role: of[partition] for role, of in judged.items() if partition in of}
            result = _validation_of(partition, verdicts, shared)
            if "impressions" in verdicts and verdicts["impressions"].sets_aside:
                result = _set_aside(result, logs["impressions"], schema, grain, now, quarantine_root)
            progress(result)
            results.append(result)
    _clear_quarantine([result.partition for result in results if not result.quarantined], quarantine_root)
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
        failed = gate.judge(f"{role} layout", f"{role} layout", moment, [metrics], rules)
        findings += [Finding(role, "", rule.name, 1, 0, rule.text) for rule in failed]
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

    The newest of these partitions are enough, as ids are either written alike or not. A few ids may be unknown there by
    chance, so all are compared before a finding is made.
    """
    checked: list[tuple[Rule, float, str]] = []
    for role, other, key in joins(schema):
        if role not in tables or other not in tables:
            continue
        try:
            here, there = (_some_ids(tables[side], key, partitions) for side in (role, other))
            smaller = min(here.len(), there.len())
            if not smaller:
                continue
            if _share_in(here, there) < rules.min_matched_share:
                here, there = (_some_ids(tables[side], key, None) for side in (role, other))
                smaller = min(here.len(), there.len())
        except UnreadableError:
            continue  # the verdict on the partition itself names the file
        share = _share_in(here, there)
        text = (
            f"has (almost) no {key} in common with table {other}: {round(share * smaller):,} of {smaller:,} are in "
            f"both (for example {here.sort()[0]!r} here, {there.sort()[0]!r} there); write them alike, or accept it by "
            "validation.min_matched_share: 0"
        )
        rule = Rule(f"{role}_{key}_in_{other}", pl.lit(0), text, None, rules.min_matched_share)
        checked.append((rule, share, role))
    if not checked:
        return [], 0
    metrics = {rule.name: share for rule, share, _ in checked}
    failed = gate.judge("joins", "joins", moment, [metrics], [rule for rule, _, _ in checked])
    broken = {rule.name for rule in failed}
    return [
        Finding(role, "", rule.name, 0, 0, f"table {role} {rule.text}")
        for rule, _, role in checked
        if rule.name in broken
    ], len(checked)


def _some_ids(table: Table, key: str, partitions: Sequence[str] | None) -> pl.Series:
    """Distinct ids as text: of a log those in the newest of some partitions; of a profile table, or for None, all."""
    chosen = None
    if table.grain is not None and partitions is not None:
        chosen = [partition for partition in table.partitions() if partition in partitions][-JOINED_PARTITIONS:]
    ids = table.scan(chosen).select(pl.col(key).cast(pl.String).drop_nulls().unique())
    return table.collect(ids, chosen).to_series()


def _share_in(here: pl.Series, there: pl.Series) -> float:
    """Of the ids on the side with fewer ids, the share that the other side has, too."""
    return float(here.is_in(there.implode()).sum()) / min(here.len(), there.len())


@dataclass(frozen=True)
class _Verdict:
    """Verdict on a table's partition: its rows, the number of rules checked, and findings of the rules it broke."""

    rows: int
    checks: int
    failed: tuple[tuple[Rule, Finding], ...] = ()

    @property
    def findings(self) -> list[Finding]:
        return [finding for _, finding in self.failed]

    @property
    def sets_aside(self) -> bool:
        return any(rule.sets_aside for rule, _ in self.failed)

    @property
    def failures(self) -> list[Finding]:
        """The findings that stop the partition."""
        broken = [rule for rule, _ in self.failed if rule.sets_aside]
        overfull = any(rule.name == "quarantined_share" for rule, _ in self.failed)
        # beyond the limit the row rules name what is wrong; if only one is broken, the share adds nothing
        return [
            finding
            for rule, finding in self.failed
            if (rule.gate and not (rule.name == "quarantined_share" and len(broken) == 1))
            or (rule.sets_aside and overfull)
        ]


def _rules_of(
    role: str, schema: Schema, partitions: Sequence[str], grain: Grain, rules: ValidationRules, now: int
) -> dict[str, list[Rule]]:
    """The rules of a log's partitions."""
    if role == "impressions":
        return {partition: impression_rules(schema, partition, grain, rules, now) for partition in partitions}
    return {partition: event_rules(role, schema, partition, grain, rules, now) for partition in partitions}


def _validation_of(
    partition: str, verdicts: Mapping[str, _Verdict], shared: PartitionValidation
) -> PartitionValidation:
    """The verdict on one partition of every log, with those on layouts and profiles that all partitions share."""
    return PartitionValidation(
        partition,
        shared.rows | {role: verdict.rows for role, verdict in verdicts.items()},
        0,
        shared.checks + sum(verdict.checks for verdict in verdicts.values()),
        (*shared.findings, *(finding for verdict in verdicts.values() for finding in verdict.findings)),
        (*shared.failures, *(finding for verdict in verdicts.values() for finding in verdict.failures)),
    )


def _judge_partitions(
    gate: Gate, table: Table, schema: Schema, rules_of: Mapping[str, Sequence[Rule]], grain: Grain
) -> dict[str, _Verdict]:
    """The verdicts on some partitions of a log: read together, and judged together where all pass."""
    moments = {partition: partition_bounds(partition, grain)[0] for partition in rules_of}
    metrics = _metrics_of(table, schema, rules_of) if len(rules_of) > 1 else None
    if metrics is not None:
        first, *_, last = rules_of
        run = f"{table.name} {first} … {last}"
        if not gate.judge(table.name, run, moments[first], list(metrics.values()), [UNREADABLE, *rules_of[first]]):
            return {
                partition: _Verdict(int(metric_row[ROWS]), len(rules_of[partition]))
                for partition, metric_row in metrics.items()
            }
    return {
        partition: _judge(gate, table, partition, moments[partition], rules) for partition, rules in rules_of.items()
    }


def _metrics_of(
    table: Table, schema: Schema, rules_of: Mapping[str, Sequence[Rule]]
) -> dict[str, dict[str, float]] | None:
    """The metrics of some partitions of a log, which are read together; None where one of their files is damaged."""
    frame = table.scan(rules_of)
    wanted = columns_read(table.name, schema) | {*KEYS, *EVENT_KEY, "dt"}
    try:
        check_files(table, rules_of)
        rows = table.collect(frame.select(column for column in frame.collect_schema() if column in wanted), rules_of)
    except UnreadableError:
        return None
    parts = rows.with_columns(pl.col("dt").cast(pl.String)).partition_by("dt", as_dict=True)
    return {
        partition: parts.get((partition,), rows.clear()).select(_metrics([UNREADABLE, *rules])).row(0, named=True)
        for partition, rules in rules_of.items()
    }


def _metrics(rules: Sequence[Rule]) -> list[pl.Expr]:
    return [pl.len().alias(ROWS), *[rule.metric.fill_null(0).cast(pl.Float64).alias(rule.name) for rule in rules]]


def _judge(gate: Gate, table: Table, partition: str, moment: int, rules: Sequence[Rule]) -> _Verdict:
    """The verdict on a table's partition (``""``: on the whole table).

    For a table that cannot be read this is the only finding.
    """
    partitions, run = ([partition], f"{table.name} {partition}") if partition else (None, table.name)
    checks, rules = len(rules), [UNREADABLE, *rules]
    frame = table.scan(partitions)
    try:
        check_files(table, partitions)
        # only the columns of the rules are read
        values = table.collect(frame.select(_metrics(rules)), partitions).row(0, named=True)
        failed = gate.judge(table.name, run, moment, [values], rules)
        shown = [rule.example.alias(rule.name) for rule in failed if rule.example is not None]
        examples = table.collect(frame.select(*shown), partitions).to_dicts()[0] if shown else {}
    except UnreadableError as error:
        unknown = {rule.name: float("nan") for rule in rules} | {UNREADABLE.name: 1.0}
        gate.judge(table.name, run, moment, [unknown], rules)
        return _Verdict(0, checks, ((UNREADABLE, _unreadable(table.name, partition, error)),))
    rows = int(values[ROWS])
    return _Verdict(
        rows,
        checks,
        tuple(
            (rule, rule.finding(table.name, partition, values[rule.name], rows, examples.get(rule.name)))
            for rule in failed
        ),
    )


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
        .with_columns(first_broken(schema, [partition], grain, now))
        .filter(pl.col("rule").is_not_null())
        .select(
            "rule",
            pl.col("request_id", "user_id", "item_id").cast(pl.String),
            whole_row.struct.json_encode().alias("row"),
        )
    )
    return impressions.collect(rejected, [partition])


def _set_aside(
    result: PartitionValidation, impressions: Table, schema: Schema, grain: Grain, now: int, root: str
) -> PartitionValidation:
    """Write the bad rows of a partition into the table ``quarantine``; returns the result with their number."""
    partition = result.partition
    try:
        rejected = _rejected(impressions, schema, partition, grain, now)
    except UnreadableError as error:  # a page is damaged in a column that no rule reads
        finding = _unreadable(impressions.name, partition, error)
        return replace(result, findings=(*result.findings, finding), failures=(*result.failures, finding))
    layout = pa.schema([column for column in QUARANTINE_SCHEMA if column.name not in ("dt", "bucket")])
    rows = rejected.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(layout)
    file = write_file(root, rows, {"dt": partition, "bucket": "0"}, {})
    replace_partition(root, partition, [file], QUARANTINE_SCHEMA, {})
    return replace(result, quarantined=rejected.height)


def _clear_quarantine(partitions: Sequence[str], root: str) -> None:
    """Empty these partitions, whose rows an earlier validation set aside, in one commit."""
    table = Table("quarantine", root)
    stored = set(table.partitions()) if table.exists() else set()
    emptied = [partition for partition in partitions if partition in stored]
    if emptied:
        replace_partitions(root, dict.fromkeys(emptied, ()), QUARANTINE_SCHEMA, {})
