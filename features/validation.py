"""The data gate: Great Expectations judges every partition of the log before anything is built from it.

Polars computes one row of metrics per table and partition; GX judges that row, so that tables of any size
pass through the same small frame, and its Data Docs show every verdict. Two kinds of rules:

* *row rules* set single impressions aside (quarantine), up to ``max_quarantined`` of a partition;
* *gate rules* stop the partition: nothing is built or trained from it.

The sample builder applies the same row rules, so that impressions = candidates + quarantined.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from pydantic import Field

from features.lake import Table, replace_partition, write_file
from features.schema import Declaration, Feature, FieldSpec, Grain, Schema, partition_bounds

PROFILE_KEYS = {"users": "user_id", "items": "item_id"}
QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("rule", "request_id", "user_id", "item_id", "row", "dt", "bucket")]
)


class ValidationRules(Declaration):
    """Config section ``validation``."""

    max_quarantined: float = Field(0.0, ge=0, le=1, description="largest share of impressions that may be set aside")
    min_rows: int = Field(1, ge=1, description="fewest impressions of a partition")
    allow_gaps: bool = Field(False, description="accept missing partitions between the oldest and the newest")


@dataclass(frozen=True)
class Finding:
    """A rule that a table's partition broke; ``message`` is what a user reads."""

    table: str
    partition: str
    rule: str
    count: int
    rows: int
    message: str


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


@dataclass(frozen=True)
class Rule:
    """One metric and what is allowed of it.

    Attributes:
        metric: aggregate over the rows of the table's partition.
        text: completes "… of … rows".
        gate: a failure stops the partition; else rows were set aside.
    """

    name: str
    metric: pl.Expr
    text: str
    highest: float | None = 0
    lowest: float | None = None
    gate: bool = True


# --- rules --------------------------------------------------------------------------------------------


def row_rules(schema: Schema, partition: str, grain: Grain, now: int) -> dict[str, tuple[pl.Expr, str]]:
    """Row rules of impressions: name → (True on bad rows, text). ``now``: microseconds UTC."""
    start, close = partition_bounds(partition, grain)
    rules: dict[str, tuple[pl.Expr, str]] = {}
    for column in ("request_id", "user_id", "item_id", "ts"):
        rules[f"null_{column}"] = (pl.col(column).is_null(), f"have no {column}")
    for task in schema.tasks:
        label = pl.col(task.source).cast(pl.Int64)
        bad = ~label.is_in([0, 1])
        rules[f"label_{task.name}"] = (bad.fill_null(False), f"have a label {task.source} outside {{0, 1}}")
    outside = ~pl.col("ts").is_between(start, close, closed="left")
    rules["ts_outside"] = (outside.fill_null(False), f"have a ts outside of the partition {partition}")
    rules["ts_future"] = ((pl.col("ts") > now).fill_null(False), "have a ts in the future")
    repeated = ~pl.struct("request_id", "item_id").is_first_distinct()
    rules["duplicate_candidate"] = (repeated, "repeat an item within its request")
    return rules


def quarantine(
    impressions: pl.DataFrame, schema: Schema, partition: str, grain: Grain, now: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Good rows, and bad rows with the first ``rule`` that each broke.

    All rows of a request lie in one bucket of users, so buckets give the same result as the whole partition.
    """
    rules = row_rules(schema, partition, grain, now)
    broken = pl.coalesce(*[pl.when(bad).then(pl.lit(name)) for name, (bad, _) in rules.items()])
    marked = impressions.with_columns(broken.alias("rule"))
    return marked.filter(pl.col("rule").is_null()).drop("rule"), marked.filter(pl.col("rule").is_not_null())


def _time_unit_rules(start: int, close: int) -> list[Rule]:
    def inside(factor: int) -> pl.Expr:
        in_unit = pl.col("ts").is_between(-(-start // factor), close // factor, closed="left")
        return (in_unit & ~pl.col("ts").is_between(start, close, closed="left")).sum()

    advice = "; corank reads integers as microseconds UTC"
    return [
        Rule("ts_in_seconds", inside(1_000_000), f"have a ts that looks like seconds{advice}"),
        Rule("ts_in_milliseconds", inside(1_000), f"have a ts that looks like milliseconds{advice}"),
    ]


def _impression_rules(schema: Schema, partition: str, grain: Grain, rules: ValidationRules, now: int) -> list[Rule]:
    start, close = partition_bounds(partition, grain)
    rows = row_rules(schema, partition, grain, now)
    anything = any_broken(schema, partition, grain, now)
    per_request = pl.struct("user_id", "ts").n_unique().over("request_id")
    shared = pl.col("request_id").filter((per_request > 1) & pl.col("request_id").is_not_null()).n_unique()
    return [
        Rule("rows", pl.len(), f"are fewer than validation.min_rows ({rules.min_rows})", None, rules.min_rows),
        *_time_unit_rules(start, close),
        Rule("duplicate_request_id", shared, "share a request_id with another user or time (distinct request ids)"),
        *[Rule(name, bad.sum(), text, gate=False) for name, (bad, text) in rows.items()],
        Rule(
            "quarantined_share",
            pl.when(pl.len() > 0).then(anything.sum() / pl.len()).otherwise(0.0),
            f"are to be set aside, more than validation.max_quarantined ({rules.max_quarantined:.2%}) allows",
            rules.max_quarantined,
        ),
    ]


def _event_rules(partition: str, grain: Grain, now: int) -> list[Rule]:
    start, close = partition_bounds(partition, grain)
    outside = ~pl.col("ts").is_between(start, close, closed="left")
    return [
        *_time_unit_rules(start, close),
        *[
            Rule(f"null_{name}", pl.col(name).is_null().sum(), f"have no {name}")
            for name in ("event_id", "user_id", "ts")
        ],
        Rule("duplicate_event_id", pl.len() - pl.col("event_id").n_unique(), "repeat an event_id"),
        Rule("ts_outside", outside.sum(), f"have a ts outside of the partition {partition}"),
        Rule("ts_future", (pl.col("ts") > now).sum(), "have a ts in the future"),
    ]


def _profile_rules(key: str) -> list[Rule]:
    return [
        Rule("rows", pl.len(), "are no profile at all", None, 1),
        Rule(f"null_{key}", pl.col(key).is_null().sum(), f"have no {key}"),
        Rule("null_updated_at", pl.col("updated_at").is_null().sum(), "have no updated_at"),
        Rule(
            "duplicate_snapshot",
            pl.len() - pl.struct(key, "updated_at").n_unique(),
            f"repeat a snapshot of the same {key} and updated_at",
        ),
    ]


# --- tables and columns -------------------------------------------------------------------------------


def check_tables(tables: Mapping[str, Table], schema: Schema) -> list[Finding]:
    """Missing tables, missing columns and columns of the wrong type; reads no rows."""
    findings = []
    for role, table in tables.items():
        if not table.exists():
            text = f"table {role}: there is no Delta table at {table.uri}"
            findings.append(Finding(role, "", "missing_table", 0, 0, f"{text}; correct tables.{role}.path"))
            continue
        layout = table.schema()
        for column, (accepts, wanted) in _required_columns(role, schema).items():
            index = layout.get_field_index(column)
            own = table.columns.get(column, column)
            where = f"table {role} at {table.uri}: column {own}"
            if index < 0:
                hint = f"map it under tables.{role}.columns or correct the config; there are: {', '.join(layout.names)}"
                findings.append(Finding(role, "", "missing_column", 0, 0, f"{where} is missing; {hint}"))
            elif not accepts(layout.field(index).type):
                kind = layout.field(index).type
                findings.append(
                    Finding(role, "", "mistyped_column", 0, 0, f"{where} has type {kind}, but must be {wanted}")
                )
    return findings


Accepts = Callable[[pa.DataType], bool]


def _required_columns(role: str, schema: Schema) -> dict[str, tuple[Accepts, str]]:
    identifier, moment = (_is_identifier, "a text or an integer"), (_is_moment, "an integer or a timestamp")
    partition = (_is_identifier, "a text (the partition)")
    if role in PROFILE_KEYS:
        side = schema.side("user" if role == "users" else "item")
        own = {PROFILE_KEYS[role]: identifier, "updated_at": moment}
        return {feature.source: _accepts(feature) for feature in side} | own
    if role == "impressions":
        labels = {task.source: (_is_label, "an integer or a boolean") for task in schema.tasks}
        own = {"request_id": identifier, "user_id": identifier, "item_id": identifier, "ts": moment, "dt": partition}
        return {feature.source: _accepts(feature) for feature in schema.side("context")} | labels | own
    fields = [field for sequence in schema.sequences if sequence.events == role for field in sequence.fields]
    own = {"event_id": identifier, "user_id": identifier, "ts": moment, "dt": partition}
    return {field.source: _accepts(field) for field in fields} | own


def _accepts(field: FieldSpec) -> tuple[Accepts, str]:
    if field.kind == "number":
        return _is_number, "a number"
    if isinstance(field, Feature) and field.multi:
        return _is_list, "a list of texts or integers (multi: true)"
    return _is_identifier, "a text or an integer"


def _is_identifier(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_identifier(kind.value_type)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(text or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_date(kind))


def _is_moment(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_timestamp(kind))


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_number(kind: pa.DataType) -> bool:
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return bool(numeric or pa.types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind)
    return bool(nested and _is_identifier(kind.value_type))


# --- the gate -----------------------------------------------------------------------------------------


class Gate:
    """A Great Expectations context in a folder, with one suite per table that every partition runs through."""

    def __init__(self, root: Path) -> None:
        os.environ["GX_ANALYTICS_ENABLED"] = "false"
        import great_expectations as gx

        root.mkdir(parents=True, exist_ok=True)
        self.gx = gx
        self.context = gx.get_context(mode="file", project_root_dir=str(root))
        self.context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
        self.source = self.context.data_sources.add_or_update_pandas("corank")
        self.definitions: dict[str, Any] = {}

    def judge(self, table: str, partition: str, metrics: pl.DataFrame, rules: Sequence[Rule]) -> list[Finding]:
        """Findings of one row of metrics [1, rules]: exactly the expectations that GX says failed."""
        if table not in self.definitions:
            self.definitions[table] = self._define(table, rules)
        definition = self.definitions[table]
        result = definition.run(
            batch_parameters={"dataframe": metrics.to_pandas()},
            run_id=self.gx.RunIdentifier(run_name=f"{table} {partition}".strip()),
        )
        failed = {one.expectation_config.kwargs["column"] for one in result.results if not one.success}
        values = metrics.row(0, named=True)
        rows = int(values["_rows"])
        return [_finding(table, partition, rule, values[rule.name], rows) for rule in rules if rule.name in failed]

    def _define(self, table: str, rules: Sequence[Rule]) -> Any:
        """The table's suite; the rules' names and limits are the same for all its partitions."""
        expectations = [
            self.gx.expectations.ExpectColumnValuesToBeBetween(
                column=rule.name,
                min_value=rule.lowest,
                max_value=rule.highest,
                severity="critical" if rule.gate else "warning",
            )
            for rule in rules
        ]
        suite = self.context.suites.add_or_update(self.gx.ExpectationSuite(name=table, expectations=expectations))
        batch = self.source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("metrics")
        return self.context.validation_definitions.add_or_update(
            self.gx.ValidationDefinition(name=table, data=batch, suite=suite)
        )

    def build_docs(self) -> Path:
        """Build the static Data Docs; returns their index page."""
        sites = self.context.build_data_docs()
        return Path(next(iter(sites.values())).removeprefix("file://"))


def _finding(table: str, partition: str, rule: Rule, value: float, rows: int) -> Finding:
    where = f"table {table}, partition {partition}" if partition else f"table {table}"
    count = round(value * rows) if rule.name == "quarantined_share" else int(value)
    return Finding(table, partition, rule.name, count, rows, f"{where}: {count:,} of {rows:,} rows {rule.text}")


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
) -> tuple[list[PartitionValidation], Path]:
    """Judge these partitions of every table, and write the rows to set aside.

    Args:
        gx_root: local folder of the Great Expectations context and its Data Docs.
        quarantine_root: Delta table of the bad rows; one commit per partition.
        now: microseconds UTC.
        progress: called after every partition.

    Returns:
        one verdict per partition, and the index page of the Data Docs. Bad data is reported, never raised.
    """
    gate = Gate(gx_root)
    shared: list[Finding] = []
    checks = 0
    profile_rows = {}
    for role, key in PROFILE_KEYS.items():
        profile_rules = _profile_rules(key)
        metrics = _metrics(tables[role].scan(), profile_rules)
        profile_rows[role] = int(metrics["_rows"][0])
        shared += gate.judge(role, "", metrics, profile_rules)
        checks += len(profile_rules)
    results = []
    for partition in partitions:
        findings, rows, partition_checks = list(shared), dict(profile_rows), checks
        gating = {finding.rule: True for finding in shared}
        for role, table in tables.items():
            if role in PROFILE_KEYS:
                continue
            own = (
                _impression_rules(schema, partition, grain, rules, now)
                if role == "impressions"
                else _event_rules(partition, grain, now)
            )
            metrics = _metrics(table.scan([partition]), own)
            rows[role] = int(metrics["_rows"][0])
            findings += gate.judge(role, partition, metrics, own)
            partition_checks += len(own)
            gating |= {rule.name: rule.gate for rule in own}
        quarantined = _write_quarantine(tables["impressions"], schema, partition, grain, now, quarantine_root)
        failures = tuple(finding for finding in findings if gating[finding.rule])
        if any(finding.rule == "quarantined_share" for finding in failures):
            failures = tuple(findings)  # the single rules say what is wrong with the rows
        result = PartitionValidation(partition, rows, quarantined, partition_checks, tuple(findings), failures)
        progress(result)
        results.append(result)
    return results, gate.build_docs()


def _metrics(rows: pl.LazyFrame, rules: Sequence[Rule]) -> pl.DataFrame:
    """One row: every rule's metric and ``_rows``."""
    return rows.select(
        pl.len().alias("_rows"), *[rule.metric.fill_null(0).alias(rule.name) for rule in rules]
    ).collect()


def _write_quarantine(
    impressions: Table, schema: Schema, partition: str, grain: Grain, now: int, root: str
) -> int:
    """Write the bad rows of a partition, or clear those of an earlier validation; returns their number."""
    needed = ["request_id", "user_id", "item_id", "ts", *(task.source for task in schema.tasks)]
    scanned = impressions.scan([partition])
    bad = any_broken(schema, partition, grain, now)
    count = int(scanned.select(needed).select(bad.sum()).collect().item() or 0)
    table = Table("quarantine", root)
    if not count and not (table.exists() and partition in table.partitions()):
        return 0
    _, rejected = quarantine(scanned.collect(), schema, partition, grain, now)
    everything = pl.struct(pl.exclude("rule", "dt", "bucket")).struct.json_encode()
    rows = rejected.select(
        "rule", pl.col("request_id", "user_id", "item_id").cast(pl.String), everything.alias("row")
    ).to_arrow(compat_level=pl.CompatLevel.oldest())
    layout = pa.schema([column for column in QUARANTINE_SCHEMA if column.name not in ("dt", "bucket")])
    files = [write_file(root, rows.cast(layout), {"dt": partition, "bucket": "0"}, {})] if rejected.height else []
    replace_partition(root, partition, files, QUARANTINE_SCHEMA, {})
    return int(rejected.height)


def any_broken(schema: Schema, partition: str, grain: Grain, now: int) -> pl.Expr:
    """True on rows that break any row rule."""
    return pl.any_horizontal(*[bad for bad, _ in row_rules(schema, partition, grain, now).values()])
