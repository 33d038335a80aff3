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
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import polars.selectors as cs
import pyarrow as pa
from pydantic import Field

from features.errors import ConfigError
from features.lake import Table, replace_partition, write_file
from features.schema import SECOND, Declaration, Feature, FieldSpec, Grain, Schema, partition_bounds

Share = Annotated[float, Field(ge=0, le=1)]

PROFILE_KEYS = {"users": "user_id", "items": "item_id"}
QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("rule", "request_id", "user_id", "item_id", "row", "dt", "bucket")]
)
ROWS = "_rows"
"""Metric that every suite's row of metrics has: the number of rows it was computed over."""

REWRITE = "correct the table and write these rows again"
MICROSECONDS = "write {column} as microseconds UTC or as a timestamp"


class ValidationRules(Declaration):
    """Config section ``validation``."""

    max_quarantined: float = Field(0.0, ge=0, le=1, description="largest share of impressions that may be set aside")
    min_rows: int = Field(1, ge=1, description="fewest impressions of a partition")
    max_null_share: dict[str, Share] = Field({}, description="feature: largest share of rows without a value")
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
        text: completes ``subject``, which may name the metric as ``count`` and the partition's ``rows``.
        share: the metric is a share of the rows; it is reported as their number.
        gate: a failure stops the partition; else rows were set aside.
    """

    name: str
    metric: pl.Expr
    text: str
    highest: float | None = 0
    lowest: float | None = None
    gate: bool = True
    share: bool = False
    subject: str = "{count:,} of {rows:,} rows"

    def finding(self, table: str, partition: str, value: float, rows: int) -> Finding:
        """What a user reads when GX says that this rule failed."""
        count = round(value * rows) if self.share else int(value)
        where = f"table {table}, partition {partition}" if partition else f"table {table}"
        message = f"{where}: {self.subject.format(count=count, rows=rows)} {self.text}"
        return Finding(table, partition, self.name, count, rows, message)


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
    # with the user, so that a bucket of users never depends on the rows of another
    repeated = ~pl.struct("user_id", "request_id", "item_id").is_first_distinct()
    rules["duplicate_candidate"] = (repeated, "repeat an item within its request")
    return rules


def quarantine(
    impressions: pl.DataFrame, schema: Schema, partition: str, grain: Grain, now: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Good rows, and bad rows with the first ``rule`` that each broke.

    All rows of a user lie in one bucket, so buckets give the same result as the whole partition.
    """
    marked = impressions.with_columns(_first_broken(schema, partition, grain, now))
    return marked.filter(pl.col("rule").is_null()).drop("rule"), marked.filter(pl.col("rule").is_not_null())


def _first_broken(schema: Schema, partition: str, grain: Grain, now: int) -> pl.Expr:
    """Name of the first row rule that a row breaks, as ``rule``; null on good rows."""
    rules = row_rules(schema, partition, grain, now)
    return pl.coalesce(*[pl.when(bad).then(pl.lit(name)) for name, (bad, _) in rules.items()]).alias("rule")


def any_broken(schema: Schema, partition: str, grain: Grain, now: int) -> pl.Expr:
    """True on rows that break any row rule."""
    return pl.any_horizontal(*[bad for bad, _ in row_rules(schema, partition, grain, now).values()])


def _time_unit_rules(start: int, close: int) -> list[Rule]:
    """A ``ts`` in another unit: no row lies inside of the partition, but some would in that unit."""
    nowhere = ~pl.col("ts").is_between(start, close, closed="left").any()

    def rule(unit: str, first: int, end: int) -> Rule:
        metric = (pl.col("ts").is_between(first, end, closed="left") & nowhere).sum()
        return Rule(f"ts_in_{unit}", metric, f"have a ts in {unit}; {MICROSECONDS.format(column='ts')}")

    return [
        rule("seconds", -(-start // SECOND), -(-close // SECOND)),
        rule("milliseconds", -(-start // 1_000), -(-close // 1_000)),
        rule("nanoseconds", start * 1_000, close * 1_000),
    ]


def _null_share_rules(features: Sequence[Feature], rules: ValidationRules) -> list[Rule]:
    limits = [
        (feature, rules.max_null_share[feature.name]) for feature in features if feature.name in rules.max_null_share
    ]
    return [
        Rule(
            f"null_share_{feature.name}",
            pl.col(feature.source).is_null().mean(),
            f"have no {feature.source}, more than validation.max_null_share.{feature.name} ({limit:.2%}) allows; "
            "fill them or raise the limit",
            limit,
            share=True,
        )
        for feature, limit in limits
    ]


def _impression_rules(schema: Schema, partition: str, grain: Grain, rules: ValidationRules, now: int) -> list[Rule]:
    start, close = partition_bounds(partition, grain)
    # nulls are set aside row by row; they make no second user or time
    owners = pl.max_horizontal(*[pl.col(name).drop_nulls().n_unique().over("request_id") for name in ("user_id", "ts")])
    shared = pl.col("request_id").filter(owners > 1).drop_nulls().n_unique()
    remedy = "correct them, or set them aside by validation.max_quarantined"
    return [
        Rule(
            "rows",
            pl.len(),
            f"are fewer than validation.min_rows ({rules.min_rows:,}); "
            "write the partition whole, or choose other partitions by `start`",
            highest=None,
            lowest=rules.min_rows,
            subject="{rows:,} rows",
        ),
        *_time_unit_rules(start, close),
        Rule(
            "duplicate_request_id",
            shared,
            "belong to more than one user or ts; give every request an id of its own",
            subject="{count:,} request ids ({rows:,} rows)",
        ),
        *[
            Rule(name, bad.sum(), f"{text}; {remedy}", gate=False)
            for name, (bad, text) in row_rules(schema, partition, grain, now).items()
        ],
        Rule(
            "quarantined_share",
            any_broken(schema, partition, grain, now).mean(),
            f"are to be set aside, more than validation.max_quarantined ({rules.max_quarantined:.2%}) allows; {remedy}",
            rules.max_quarantined,
            share=True,
        ),
        *_null_share_rules(schema.side("context"), rules),
    ]


def _event_rules(partition: str, grain: Grain, now: int) -> list[Rule]:
    start, close = partition_bounds(partition, grain)
    outside = ~pl.col("ts").is_between(start, close, closed="left")
    return [
        *_time_unit_rules(start, close),
        *[
            Rule(f"null_{name}", pl.col(name).is_null().sum(), f"have no {name}; {REWRITE}")
            for name in ("event_id", "user_id", "ts")
        ],
        Rule("duplicate_event_id", _repeated("event_id"), f"repeat an event_id; {REWRITE}"),
        Rule("ts_outside", outside.sum(), f"have a ts outside of the partition {partition}; {REWRITE}"),
        Rule("ts_future", (pl.col("ts") > now).sum(), f"have a ts in the future; {REWRITE}"),
    ]


def _profile_rules(role: str, schema: Schema, rules: ValidationRules) -> list[Rule]:
    key = PROFILE_KEYS[role]
    # every snapshot since 1973, read as microseconds, would lie in the first weeks of 1970: valid since ever
    units = {"seconds": (10**8, 10**10), "milliseconds": (10**11, 10**13), "nanoseconds": (10**17, 2**63 - 1)}
    return [
        Rule("rows", pl.len(), "there are no profiles; write the table", None, 1, subject="{rows:,} rows,"),
        Rule(f"null_{key}", pl.col(key).is_null().sum(), f"have no {key}; {REWRITE}"),
        Rule("null_updated_at", pl.col("updated_at").is_null().sum(), f"have no updated_at; {REWRITE}"),
        Rule(
            "duplicate_snapshot",
            _repeated(key, "updated_at"),
            f"repeat a snapshot of the same {key} and updated_at; {REWRITE}",
        ),
        *[
            Rule(
                f"updated_at_in_{unit}",
                pl.col("updated_at").is_between(*span, closed="left").sum(),
                f"have an updated_at in {unit}; {MICROSECONDS.format(column='updated_at')}",
            )
            for unit, span in units.items()
        ],
        *_null_share_rules(schema.side("user" if role == "users" else "item"), rules),
    ]


def _repeated(*columns: str) -> pl.Expr:
    """Rows beyond the first of their key; keys with a null are named by rules of their own."""
    whole = pl.all_horizontal(pl.col(columns).is_not_null())
    return (whole & ~pl.struct(columns).is_first_distinct()).sum()


# --- tables and columns -------------------------------------------------------------------------------


def check_tables(tables: Mapping[str, Table], schema: Schema) -> list[Finding]:
    """Missing tables, missing columns and columns of the wrong type; reads no rows.

    Tables that the schema does not use are not looked at.
    """
    return [
        Finding(role, "", check, 1, 0, message)
        for role in _roles(schema)
        for check, (broken, message) in _layout_checks(role, tables.get(role), schema).items()
        if broken
    ]


def _roles(schema: Schema) -> list[str]:
    """The tables that a pipeline reads."""
    return ["impressions", *PROFILE_KEYS, *dict.fromkeys(sequence.events for sequence in schema.sequences)]


def _layout_checks(role: str, table: Table | None, schema: Schema) -> dict[str, tuple[bool, str]]:
    """Check of a table's layout → (broken?, message). A missing table has no columns to check."""
    if table is None:
        return {"missing_table": (True, f"table {role} is missing; add tables.{role} to the config")}
    missing = not table.exists()
    hint = f"correct tables.{role}.path, or write the table (`corank import --help`)"
    checks = {"missing_table": (missing, f"table {role}: there is no Delta table at {table.uri}; {hint}")}
    if missing:
        return checks
    layout = table.schema()
    for column, (accepts, wanted) in _required_columns(role, schema).items():
        own, index = table.columns.get(column, column), layout.get_field_index(column)
        where, mapped = f"table {role} at {table.uri}: column {own}", f"tables.{role}.columns"
        hint = f"map it under {mapped} or correct the config; there are: {', '.join(layout.names)}"
        checks[f"missing_column_{column}"] = (index < 0, f"{where} is missing; {hint}")
        if index >= 0:
            kind = layout.field(index).type
            hint = f"must be {wanted}; convert it, or map another column under {mapped}"
            checks[f"mistyped_column_{column}"] = (not accepts(kind), f"{where} has type {kind}, but {hint}")
    for sequence in schema.sequences:
        if sequence.events == role and sequence.where is not None:
            problem = _problem_of_condition(sequence.where, layout.names)
            where = f"table {role}: the condition {sequence.where!r} of sequence {sequence.name}"
            checks[f"condition_{sequence.name}"] = (
                bool(problem),
                f"{where} {problem}; correct sequences in the config",
            )
    return checks


def _problem_of_condition(condition: str, columns: Sequence[str]) -> str:
    """What is wrong with an SQL condition on these columns; empty if nothing is."""
    try:
        unknown = sorted(set(pl.sql_expr(condition).meta.root_names()) - set(columns))
    except pl.exceptions.PolarsError as error:
        return f"is not valid SQL ({error})"
    return f"reads {', '.join(unknown)}, but there are only {', '.join(columns)}" if unknown else ""


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
) -> tuple[list[PartitionValidation], Path]:
    """Judge these partitions of every table, and write the rows to set aside.

    Args:
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
    for role in PROFILE_KEYS:
        if role in readable:
            own = _profile_rules(role, schema, rules)
            metrics = _metrics(tables[role].scan(), own)
            profile_rows[role] = rows = int(metrics.pop(ROWS))
            failed = gate.judge(role, role, newest, metrics, own)
            broken += [rule.finding(role, "", value, rows) for rule, value in failed]
            checks += len(own)
    shared = PartitionValidation("", profile_rows, 0, checks, tuple(broken), tuple(broken))
    results = []
    for partition in partitions:
        result = _validate_partition(gate, readable, schema, partition, grain, rules, quarantine_root, now, shared)
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
    for role in _roles(schema):
        layout = _layout_checks(role, tables.get(role), schema)
        rules = [Rule(name, pl.lit(broken), message) for name, (broken, message) in layout.items()]
        metrics = {name: float(broken) for name, (broken, _) in layout.items()}
        failed = gate.judge(f"{role} layout", f"{role} layout", moment, metrics, rules)
        findings += [Finding(role, "", rule.name, int(value), 0, rule.text) for rule, value in failed]
        checks += len(rules)
        if not failed:
            readable[role] = tables[role]
    return readable, findings, checks


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
            _impression_rules(schema, partition, grain, rules, now)
            if impressions
            else _event_rules(partition, grain, now)
        )
        metrics = _metrics(table.scan([partition]), own)
        rows[role] = int(metrics.pop(ROWS))
        failed = gate.judge(role, f"{role} {partition}", partition_bounds(partition, grain)[0], metrics, own)
        named = [rule.finding(role, partition, value, rows[role]) for rule, value in failed]
        findings += named
        overfull = any(rule.name == "quarantined_share" for rule, _ in failed)
        # beyond the limit the single row rules say what is wrong
        failures += [one for one, (rule, _) in zip(named, failed, strict=True) if rule.gate or overfull]
        checks += len(own)
        if impressions:
            quarantined = round(metrics["quarantined_share"] * rows[role])
            _write_quarantine(table, schema, partition, grain, now, quarantine_root, quarantined)
    return PartitionValidation(partition, rows, quarantined, checks, tuple(findings), tuple(failures))


def _metrics(frame: pl.LazyFrame, rules: Sequence[Rule]) -> dict[str, float]:
    """Every rule's metric, and the number of rows under ``ROWS``; reads only the columns of the rules."""
    metrics = [rule.metric.fill_null(0).alias(rule.name) for rule in rules]
    row = frame.select(pl.len().alias(ROWS), *metrics).collect().row(0, named=True)
    return {name: float(value) for name, value in row.items()}


def _write_quarantine(
    impressions: Table, schema: Schema, partition: str, grain: Grain, now: int, root: str, count: int
) -> None:
    """Write the ``count`` bad rows of a partition, or clear those of an earlier validation, in one commit."""
    if not count:
        table = Table("quarantine", root)
        if table.exists() and partition in table.partitions():
            replace_partition(root, partition, [], QUARANTINE_SCHEMA, {})
        return
    scanned = impressions.scan([partition])
    whole_row = pl.struct(
        ~cs.by_name("rule", "dt", "bucket", require_all=False) - cs.binary(),
        cs.binary().bin.encode("base64"),  # JSON has no bytes
    )
    rejected = (
        scanned.with_columns(_first_broken(schema, partition, grain, now))
        .filter(pl.col("rule").is_not_null())
        .select(
            "rule",
            pl.col("request_id", "user_id", "item_id").cast(pl.String),
            whole_row.struct.json_encode().alias("row"),
        )
        .collect()
    )
    layout = pa.schema([column for column in QUARANTINE_SCHEMA if column.name not in ("dt", "bucket")])
    rows = rejected.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(layout)
    file = write_file(root, rows, {"dt": partition, "bucket": "0"}, {})
    replace_partition(root, partition, [file], QUARANTINE_SCHEMA, {})
