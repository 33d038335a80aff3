"""What is wrong with a row, and with all rows of a table's partition. Two kinds of rules:

* *row rules* set single impressions aside (quarantine), up to ``max_quarantined`` of a partition;
* *gate rules* stop the partition: nothing is built or trained from it.

The sample builder applies the same row rules, so that impressions = candidates + quarantined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import polars as pl
from pydantic import Field

from features.schema import SECOND, Declaration, Feature, Grain, Schema, partition_bounds

Share = Annotated[float, Field(ge=0, le=1)]

PROFILE_KEYS = {"users": "user_id", "items": "item_id"}
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
    marked = impressions.with_columns(first_broken(schema, partition, grain, now))
    return marked.filter(pl.col("rule").is_null()).drop("rule"), marked.filter(pl.col("rule").is_not_null())


def first_broken(schema: Schema, partition: str, grain: Grain, now: int) -> pl.Expr:
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


def impression_rules(schema: Schema, partition: str, grain: Grain, rules: ValidationRules, now: int) -> list[Rule]:
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


def event_rules(partition: str, grain: Grain, now: int) -> list[Rule]:
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


def profile_rules(role: str, schema: Schema, rules: ValidationRules) -> list[Rule]:
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
