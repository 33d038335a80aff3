"""What is wrong with a row, and with all rows of a table's partition. Two kinds of rules:

* *row rules* set single impressions aside (quarantine), up to ``max_quarantined`` of a partition;
* *gate rules* stop the partition: nothing is built or trained from it.

Some rules do neither: what they find is reported, and the values read as missing or unknown.

The sample builder applies the same row rules, so that impressions = candidates + quarantined.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

import polars as pl
import polars.selectors as cs
from pydantic import Field

from features.schema import OTHER_UNITS, SECOND, Declaration, Feature, FieldSpec, Grain, Schema, partition_bounds

PARTITION = "{partition}"

Share = Annotated[float, Field(ge=0, le=1)]

PROFILE_KEYS = {"users": "user_id", "items": "item_id"}
REWRITE = "correct the table and write these rows again"
EVENT_KEY = ("user_id", "event_id")
KEYS = ("request_id", "user_id", "item_id", "ts")
"""Columns that every impression needs."""

KEYS_AS_TEXT = {"request_id", "user_id", "item_id"}
"""Columns that the builder reads as text, also in conditions."""


class ValidationRules(Declaration):
    """Config section ``validation``."""

    max_quarantined: float = Field(0.0, ge=0, le=1, description="largest share of impressions that may be set aside")
    min_rows: int = Field(1, ge=1, description="fewest impressions of a partition")
    max_null_share: dict[str, Share] = Field({}, description="feature: largest share of rows without a value")
    max_outside_vocabulary: float = Field(
        0.05, ge=0, le=1, description="largest share of a category's values outside its vocabulary before it is said"
    )
    min_matched_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="smallest share of ids that two tables must have in common (a log and its profiles, impressions "
        "and events); 0: any",
    )
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
        text: completes ``subject``, which may name the metric as ``count`` or ``value`` and the partition's ``rows``;
            in it ``PARTITION`` stands for the partition's name.
        share: the metric is a share of the rows; it is reported as their number.
        gate: a failure stops the partition.
        sets_aside: the rows go into quarantine, and beyond its limit the failure stops the partition, too.
        example: a value that breaks the rule, shown to the user; null when there is none.
    """

    name: str
    metric: pl.Expr
    text: str
    highest: float | None = 0
    lowest: float | None = None
    gate: bool = True
    sets_aside: bool = False
    share: bool = False
    subject: str = "{count:,} of {rows:,} rows"
    example: pl.Expr | None = None

    def finding(self, table: str, partition: str, value: float, rows: int, example: object = None) -> Finding:
        """What a user reads when GX says that this rule failed."""
        count = round(value * rows) if self.share else int(value)
        where = f"table {table}, partition {partition}" if partition else f"table {table}"
        text = self.text.replace(PARTITION, partition)
        message = f"{where}: {self.subject.format(count=count, rows=rows, value=value)} {text}"
        if example is not None:
            message += f" (for example {example})"
        return Finding(table, partition, self.name, count, rows, message)


def bounds_of(partitions: Sequence[str], grain: Grain) -> tuple[pl.Expr, pl.Expr]:
    """Opening and close of a row's partition, microseconds UTC; of several partitions, a row's is named by ``dt``."""
    openings, closes = ([partition_bounds(partition, grain)[end] for partition in partitions] for end in (0, 1))
    if len(partitions) == 1:
        return pl.lit(openings[0]), pl.lit(closes[0])
    dt = pl.col("dt").cast(pl.String)
    opening, close = (dt.replace_strict(partitions, ends, return_dtype=pl.Int64) for ends in (openings, closes))
    return opening, close


def row_rules(schema: Schema, partitions: Sequence[str], grain: Grain, now: int) -> dict[str, tuple[pl.Expr, str]]:
    """Row rules of impressions in these partitions: name → (True on bad rows, text). ``now``: microseconds UTC."""
    start, close = bounds_of(partitions, grain)
    rules: dict[str, tuple[pl.Expr, str]] = {}
    for column in KEYS:
        rules[f"null_{column}"] = (pl.col(column).is_null(), f"have no {column}")
    for column in ("request_id", "user_id", "item_id"):
        rules[f"negative_{column}"] = (is_negative(column), f"have a negative {column}, which is no id")
    for task in schema.tasks:
        if task.attribution_window is not None:
            continue  # not a column of impressions
        label = pl.col(task.source).cast(pl.Int64)
        bad = ~label.is_in([0, 1])
        rules[f"label_{task.name}"] = (bad.fill_null(False), f"have a label {task.source} outside {{0, 1}}")
    rules |= _clock_rules(start, close, now)
    weight = cs.by_name("weight", require_all=False)
    unfit = pl.any_horizontal(~is_finite(weight) | (weight < 0)).fill_null(False)
    rules["negative_position"] = (is_negative("position"), "have a negative position; leave unknown ones null")
    rules["weight"] = (unfit, "have a weight that is negative or not finite")
    # per user, so that a bucket of users never depends on the rows of another
    within = [start.alias("partition")] if len(partitions) > 1 else []
    repeated = ~pl.struct("user_id", "request_id", "item_id", *within).is_first_distinct()
    rules["duplicate_candidate"] = (repeated, "repeat an item within its request")
    return rules


def quarantine(
    impressions: pl.DataFrame, schema: Schema, partitions: Sequence[str], grain: Grain, now: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Good rows, and bad rows with the first ``rule`` that each broke.

    All rows of a user lie in one bucket, so buckets give the same result as the whole partitions.
    """
    rule = impressions.select(first_broken(schema, partitions, grain, now)).to_series()
    return impressions.filter(rule.is_null()), impressions.with_columns(rule).filter(rule.is_not_null())


def first_broken(schema: Schema, partitions: Sequence[str], grain: Grain, now: int) -> pl.Expr:
    """Name of the first row rule that a row breaks, as ``rule``; null on good rows."""
    rules = row_rules(schema, partitions, grain, now)
    return pl.coalesce(*[pl.when(bad).then(pl.lit(name)) for name, (bad, _) in rules.items()]).alias("rule")


def any_broken(schema: Schema, partitions: Sequence[str], grain: Grain, now: int) -> pl.Expr:
    """True on rows that break any row rule."""
    return pl.any_horizontal(*[bad for bad, _ in row_rules(schema, partitions, grain, now).values()])


def is_negative(column: str) -> pl.Expr:
    """True on negative integers, which logs write for a missing id; false in a column of text, where "-1" is an id."""
    return pl.any_horizontal((cs.by_name(column, require_all=False) & cs.signed_integer()) < 0).fill_null(False)


def is_finite(column: pl.Expr) -> pl.Expr:
    """True on numbers that the model can read; null stays null. A 64-bit number may be too large for 32 bits."""
    return column.cast(pl.Float32).is_finite()


def value_rules(fields: Sequence[FieldSpec], rules: ValidationRules, summed: Collection[str] = ()) -> list[Rule]:
    """Rules that report values of a table which are read as missing or unknown; they stop nothing.

    Args:
        fields: features and side information whose column the table has.
        summed: further columns, which aggregates sum up.
    """
    numbers = dict.fromkeys([*[field.source for field in fields if field.kind == "number"], *summed])
    found = [
        Rule(
            f"not_finite_{column}",
            (~is_finite(pl.col(column))).sum(),
            f"hold no finite number in {column} (NaN, infinite or beyond 32 bits); it is read as missing",
            gate=False,
        )
        for column in numbers
    ]
    limit = rules.max_outside_vocabulary
    # a column may be a feature and side information of several sequences
    categories = {(field.source, field.vocabulary): field for field in fields if field.vocabulary is not None}
    for number, field in enumerate(categories.values()):
        values = pl.col(field.source)
        if isinstance(field, Feature) and field.multi:
            values = values.list.explode(keep_nulls=False, empty_as_null=False)
        text = values.cast(pl.String).drop_nulls()
        outside = ~text.is_in(list(field.vocabulary or ()))
        found.append(
            Rule(
                f"outside_vocabulary_{number}_{field.name}",
                outside.mean().fill_nan(0),
                f"of the values of {field.source} are outside the vocabulary of {field.name}, more than "
                f"validation.max_outside_vocabulary ({limit:.2%}) lets pass unsaid; they are read as unknown",
                limit,
                gate=False,
                subject="{value:.1%}",
                example=text.filter(outside).first(),
            )
        )
    return found


def _clock_rules(start: pl.Expr, close: pl.Expr, now: int) -> dict[str, tuple[pl.Expr, str]]:
    """Row rules on ``ts``; each row breaks at most one but ``ts_future``, the wrong unit before all others."""
    ts = pl.col("ts")
    inside = ts.is_between(start, close, closed="left")
    spans = {
        "seconds": (start // SECOND, close // SECOND),  # partitions begin at whole seconds
        "milliseconds": (start // 1_000, close // 1_000),
        "nanoseconds": (start * 1_000, close * 1_000),
    }
    # in a log that is cut from ts these rows lie inside a partition, early in 1970
    far = {unit: ts.is_between(*span, closed="left") for unit, span in OTHER_UNITS.items()}
    units = {
        unit: ((ts.is_between(*span, closed="left") & ~inside) | far[unit]).fill_null(False)
        for unit, span in spans.items()
    }
    right_unit = ~pl.any_horizontal(*units.values())
    outside = (~inside & right_unit).fill_null(False)
    future = ((ts > now) & right_unit).fill_null(False)
    return {
        **{f"ts_in_{unit}": (bad, _wrong_unit("ts", unit)) for unit, bad in units.items()},
        "ts_outside": (outside, f"have a ts outside of the partition {PARTITION}"),
        "ts_future": (future, "have a ts in the future"),
    }


def _wrong_unit(column: str, unit: str) -> str:
    return f"have a wrong unit: {column} looks like {unit}; cast to microseconds"


def _example(name: str, bad: pl.Expr) -> pl.Expr | None:
    """The first bad value, for rules on the values of one column, which is part of their name."""
    if not name.startswith(("ts_", "negative_", "updated_at_")):
        return None
    column = "ts" if name.startswith("ts_") else name.removeprefix("negative_").split("_in_")[0]
    return cs.by_name(column, require_all=False).filter(bad).first()


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
    """Rules of one partition of the impressions: the row rules, and what stops the partition."""
    of_rows = row_rules(schema, [partition], grain, now)
    # rows that are set aside do not count as a second user or time (a repeated candidate has those of the first)
    good = ~pl.any_horizontal(*[bad for name, (bad, _) in of_rows.items() if name != "duplicate_candidate"])
    owners = pl.max_horizontal(
        *[pl.when(good).then(name).drop_nulls().n_unique().over("request_id") for name in ("user_id", "ts")]
    )
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
        Rule(
            "duplicate_request_id",
            shared,
            "belong to more than one user or ts; give every request an id of its own",
            subject="{count:,} request ids ({rows:,} rows)",
        ),
        *[
            Rule(name, bad.sum(), f"{text}; {remedy}", gate=False, sets_aside=True, example=_example(name, bad))
            for name, (bad, text) in of_rows.items()
        ],
        Rule(
            "quarantined_share",
            any_broken(schema, [partition], grain, now).mean(),
            f"are to be set aside, more than validation.max_quarantined ({rules.max_quarantined:.2%}) allows; {remedy}",
            rules.max_quarantined,
            share=True,
        ),
        *_null_share_rules(schema.side("context"), rules),
        *_condition_rules("impressions", schema),
        *value_rules(schema.side("context"), rules, _summed("impressions", schema)),
    ]


def event_rules(
    role: str, schema: Schema, partition: str, grain: Grain, rules: ValidationRules, now: int
) -> list[Rule]:
    """Rules of one partition of a table of events. Exact repeats are tolerated: they count once."""
    read = sorted(columns_of_events(role, schema))
    keyed = _all_present(*EVENT_KEY)
    rows, versions, ids = (
        count.cast(pl.Int64)
        for count in (
            keyed.sum(),
            pl.struct(read).filter(keyed).n_unique(),
            pl.struct(EVENT_KEY).filter(keyed).n_unique(),
        )
    )
    return [
        *[
            Rule(f"null_{name}", pl.col(name).is_null().sum(), f"have no {name}; {REWRITE}")
            for name in ("event_id", "user_id", "ts")
        ],
        *[
            Rule(
                f"negative_{name}",
                is_negative(name).sum(),
                f"have a negative {name}, which is no id; {REWRITE}",
                example=_example(f"negative_{name}", is_negative(name)),
            )
            for name in ("event_id", "user_id", "item_id")
        ],
        Rule("repeated_event", rows - versions, "repeat an event of the same user; each counts once", gate=False),
        Rule(
            "conflicting_event_id",
            versions - ids,
            "repeat the event_id of another event of the same user, with other values; give every event an id of its "
            "own",
            example=_differing([name for name in read if name not in EVENT_KEY]),
        ),
        *[
            Rule(name, bad.sum(), f"{text}; {REWRITE}", example=_example(name, bad))
            for name, (bad, text) in _clock_rules(*bounds_of([partition], grain), now).items()
        ],
        *_condition_rules(role, schema),
        *value_rules(
            [field for sequence in schema.sequences if sequence.events == role for field in sequence.own],
            rules,
            _summed(role, schema),
        ),
    ]


def conditions_of(role: str, schema: Schema) -> list[tuple[str, str, str]]:
    """The SQL conditions on rows of a log: (sequence or feature, its name, condition)."""
    found = [("sequence", sequence.name, sequence.where) for sequence in schema.sequences if sequence.events == role]
    found += [
        ("feature", feature.name, feature.aggregate.where if feature.aggregate else None)
        for feature in schema.counts_of(role)
    ]
    return [(what, name, condition) for what, name, condition in found if condition is not None]


def _condition_rules(role: str, schema: Schema) -> list[Rule]:
    """Rules for conditions that fit their columns' types and yet may fail on values, as a CAST does."""
    return [
        Rule(
            f"condition_{what}_{name}",
            _fails(condition),
            f"hold a value on which the condition {condition!r} of {what} {name} fails (TRY_CAST gives null where CAST "
            f"fails); correct {what}s in the config",
            subject="its {rows:,} rows",
        )
        for what, name, condition in conditions_of(role, schema)
        if pl.sql_expr(condition).meta.root_names()
    ]


def _fails(condition: str) -> pl.Expr:
    """1 where a condition cannot be evaluated on all of these rows, else 0."""
    expression = pl.sql_expr(condition)

    def fails(rows: pl.Series) -> int:
        try:
            rows.struct.unnest().select(expression)
        except pl.exceptions.PolarsError:
            return 1
        return 0

    columns = list(dict.fromkeys(expression.meta.root_names()))
    read = [pl.col(column).cast(pl.String) if column in KEYS_AS_TEXT else pl.col(column) for column in columns]
    return pl.struct(read).map_batches(fails, return_dtype=pl.Int64, returns_scalar=True)


def _differing(columns: Sequence[str]) -> pl.Expr:
    """Names of the columns in which rows of one event differ."""
    names = [
        pl.when((pl.struct(name).n_unique().over(EVENT_KEY) > 1).any()).then(pl.lit(f"in {name}")) for name in columns
    ]
    return pl.concat_str(names, separator=", ", ignore_nulls=True).first()


def _summed(role: str, schema: Schema) -> list[str]:
    """Columns of a log that aggregates sum up."""
    columns = [feature.aggregate.column for feature in schema.counts_of(role) if feature.aggregate is not None]
    return [column for column in columns if column is not None]


def distinct_events(events: pl.DataFrame) -> pl.DataFrame:
    """Every event of a partition once, however often a log delivered it: the first by ts of each (user_id, event_id).

    All rows of a user lie in one bucket, so buckets give the same result as the whole partition.

    Args:
        events: rows of partitions (or some buckets of them) with dt, user_id, event_id and ts, in any order.
    """
    return events.sort("ts", maintain_order=True).unique(["dt", *EVENT_KEY], keep="first", maintain_order=True)


def columns_of_events(role: str, schema: Schema) -> set[str]:
    """Columns that sequences and aggregates read of a table of events."""
    read = {*EVENT_KEY, "ts"}
    for sequence in schema.sequences:
        if sequence.events == role:
            read |= {field.source for field in sequence.own}
            read |= {"item_id"} if sequence.joined else set()
            if sequence.where is not None:
                read |= set(pl.sql_expr(sequence.where).meta.root_names())
    return read | columns_counted(role, schema)


def columns_counted(role: str, schema: Schema) -> set[str]:
    """Columns that aggregates read of a log."""
    read: set[str] = set()
    for feature in schema.counts_of(role):
        assert feature.aggregate is not None
        read |= {feature.aggregate.column} if feature.aggregate.column is not None else set()
        read |= {"item_id"} if feature.side != "user" else set()
        if feature.aggregate.where is not None:
            read |= set(pl.sql_expr(feature.aggregate.where).meta.root_names())
    return read


def profile_rules(role: str, schema: Schema, rules: ValidationRules) -> list[Rule]:
    """Rules of all snapshots of ``users`` or ``items``; each stops every partition."""
    key = PROFILE_KEYS[role]
    return [
        Rule("rows", pl.len(), "there are no profiles; write the table", None, 1, subject="{rows:,} rows,"),
        Rule(f"null_{key}", pl.col(key).is_null().sum(), f"have no {key}; {REWRITE}"),
        Rule(
            f"negative_{key}",
            is_negative(key).sum(),
            f"have a negative {key}, which is no id; {REWRITE}",
            example=_example(f"negative_{key}", is_negative(key)),
        ),
        Rule("null_updated_at", pl.col("updated_at").is_null().sum(), f"have no updated_at; {REWRITE}"),
        Rule(
            "duplicate_snapshot",
            _repeats(key, "updated_at").sum(),
            f"repeat a snapshot of the same {key} and updated_at; {REWRITE}",
        ),
        *[
            Rule(
                f"updated_at_in_{unit}",
                pl.col("updated_at").is_between(*span, closed="left").sum(),
                _wrong_unit("updated_at", unit),
                example=_example(f"updated_at_in_{unit}", pl.col("updated_at").is_between(*span, closed="left")),
            )
            for unit, span in OTHER_UNITS.items()
        ],
        *_null_share_rules(side := schema.side("user" if role == "users" else "item"), rules),
        *value_rules(
            [*side, *(field for sequence in schema.sequences for field in sequence.joined if role == "items")], rules
        ),
    ]


def _repeats(*columns: str) -> pl.Expr:
    """True on rows after the first with their key; other rules report keys with a null."""
    return _all_present(*columns) & ~pl.struct(columns).is_first_distinct()


def _all_present(*columns: str) -> pl.Expr:
    return pl.all_horizontal(pl.col(columns).is_not_null())
