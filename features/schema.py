"""The declaration that everything else is derived from: features, sequences and tasks.

Arrow schemas, Feast objects, Great Expectations rules, the model's input layer and the Serve request
are all read off one :class:`Schema`. Nothing here reads or writes data.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Side = Literal["user", "item", "context", "cross"]
Kind = Literal["id", "category", "number"]
Grain = Literal["hour", "day", "week"]

FEEDBACK = "feedback"
"""The table of labels that arrive later: request_id, item_id, label, value, ts."""

NAME = r"^[a-z][a-z0-9_]*$"
Name = Annotated[str, Field(pattern=NAME)]

SECOND = 1_000_000
"""Time is int64 microseconds UTC everywhere; this is one second of it."""

OTHER_UNITS = {"seconds": (10**8, 10**10), "milliseconds": (10**11, 10**13), "nanoseconds": (10**17, 2**63 - 1)}
"""Where times since 1973 lie in other units; read as microseconds they would be early in 1970, or far off."""

PARTITION_FORMATS: dict[Grain, str] = {"hour": "%Y-%m-%dT%H", "day": "%Y-%m-%d", "week": "%Y-%m-%d"}
GRAIN_LENGTH: dict[Grain, timedelta] = {
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(weeks=1),
}
EPOCH_MONDAY = datetime(1970, 1, 5, tzinfo=UTC)
"""Weeks begin on Monday; the first Monday of Unix time anchors them."""


TAKEN_NAMES = frozenset(("user_id", "event_id", "ts"))
"""What every event has besides the fields of its sequence."""

TIMELINE_NAMES = ("ts", "event_id")
"""What every timeline has columns of, besides the fields of its sequence."""


class Declaration(BaseModel):
    """Base of all declarations: unknown keys are mistakes, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FieldSpec(Declaration):
    """What turns one raw column into embedding rows or a number.

    * ``id``: open vocabulary. Coded as the xxh64 hash of its text; hashed into ``buckets`` rows.
    * ``category``: closed vocabulary, listed exactly; anything else reads row 0.
    * ``number``: standardised with the mean and deviation of the training rows, kept with the model.
    """

    name: Name
    kind: Kind = "id"
    column: str | None = Field(None, description="column of the source table; default: the name")
    table: str | None = Field(None, description="embedding table shared with others; default: the name")
    buckets: int = Field(65_536, ge=2, description="rows of an id's embedding table, row 0 included")
    vocabulary: tuple[str, ...] | None = Field(None, description="all values of a category")
    dim: int = Field(16, ge=1, description="embedding width of this feature")
    scale: Literal["linear", "log"] = Field("linear", description="log: a number x ≥ 0 enters as log(1 + x)")

    @model_validator(mode="before")
    @classmethod
    def _vocabulary_is_text(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("vocabulary"), list):
            if strange := [value for value in data["vocabulary"] if value is None or isinstance(value, list | dict)]:
                raise ValueError(f"vocabulary: {strange[0]!r} is no value of a column; a text that looks so is quoted")
            # a boolean is spelled as a table's boolean column is when it is cast to text
            texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in data["vocabulary"]]
            return {**data, "vocabulary": texts}
        return data

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> FieldSpec:
        if (self.kind == "category") != (self.vocabulary is not None):
            raise ValueError("a category lists its vocabulary, and nothing else does")
        repeated = [value for value in self.vocabulary or () if (self.vocabulary or ()).count(value) > 1]
        if repeated:
            raise ValueError(f"vocabulary: {repeated[0]!r} is listed {repeated.count(repeated[0])} times")
        if self.scale == "log" and self.kind != "number":
            raise ValueError("scale: log is for numbers (kind: number)")
        return self

    @property
    def source(self) -> str:
        """Column of the source table."""
        return self.column or self.name

    @property
    def embedding(self) -> str:
        """Name of the embedding table."""
        return self.table or self.name

    @property
    def rows(self) -> int:
        """Rows of the embedding table; row 0 is the unknown value."""
        return len(self.vocabulary) + 1 if self.vocabulary is not None else self.buckets


class Aggregate(Declaration):
    """What to count in the log, over how many partitions.

    A feature of side ``user`` or ``item`` counts the rows of its user or item; one of side ``cross`` the rows of
    its user and a ``key`` of the item, such as its genre. A request reads the counts as of the close of the newest
    partition before it (and ``aggregates_delay_seconds`` after that), so nothing of its own partition leaks in.
    """

    of: str = Field("impressions", description="table whose rows are counted: impressions or an event table")
    function: Literal["count", "sum", "mean", "rate"] = "count"
    column: Name | None = Field(None, description="what to sum; for a rate a column of 0 and 1. Null is not counted")
    where: str | None = Field(None, description="SQL condition that selects the rows")
    window: int | None = Field(None, ge=1, description="newest partitions of the calendar that count; default: all")
    key: Name | None = Field(None, description="side cross: a column of items (one value or a list), or item_id")
    prior: float | None = Field(None, description="a mean or rate starts here …")
    prior_weight: float = Field(1.0, gt=0, description="… as if it had been seen in so many rows")

    @model_validator(mode="after")
    def _function_has_what_it_needs(self) -> Aggregate:
        if (self.function == "count") != (self.column is None):
            raise ValueError(f"{self.function} {'needs a' if self.column is None else 'takes no'} column")
        if self.prior is not None and self.function not in ("mean", "rate"):
            raise ValueError("prior: only a mean or a rate has one")
        return self


class History(Declaration):
    """What to tell of the events that a request sees, when samples are read and when a request is asked.

    * ``count``: how many there are, or how many have one of ``values`` in ``field``.
    * ``rate``: the share of them that has one of ``values`` in ``field``.
    * ``mean``: the mean of ``field``, where it is known.
    * ``age``: seconds since the newest of them.

    A feature of side ``user`` tells of all events, one of side ``cross`` of those whose ``key`` the candidate has, too.
    """

    sequence: Name
    function: Literal["count", "rate", "mean", "age"] = "count"
    field: Name | None = Field(None, description="a field of the sequence: a number for a mean, else an id or category")
    values: tuple[str, ...] | None = Field(None, description="values of the field that are counted")
    key: Name | None = Field(None, description="side cross: a field of the sequence that a candidate has, too …")
    feature: Name | None = Field(None, description="… as this feature of side item; default: that of the same name")
    prior: float | None = Field(None, description="a mean or rate starts here …")
    prior_weight: float = Field(1.0, gt=0, description="… as if it had been seen in so many events")

    @model_validator(mode="before")
    @classmethod
    def _values_are_text(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("values"), list):
            if strange := [value for value in data["values"] if value is None or isinstance(value, list | dict)]:
                raise ValueError(
                    f"history.values: {strange[0]!r} is no value of a column; a text that looks so is quoted"
                )
            texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in data["values"]]
            return {**data, "values": texts}
        return data

    @model_validator(mode="after")
    def _function_has_what_it_needs(self) -> History:
        needs_field = self.function in ("mean", "rate") or self.values is not None
        if needs_field != (self.field is not None):
            raise ValueError(f"history: {self.function} {'needs a' if needs_field else 'takes no'} field")
        if (self.function == "rate" and not self.values) or (self.function in ("mean", "age") and self.values):
            raise ValueError("history.values: what a rate, or a count of a field, counts")
        if self.prior is not None and self.function not in ("mean", "rate"):
            raise ValueError("history.prior: only a mean or a rate has one")
        return self


class Feature(FieldSpec):
    """A non-sequential feature of the user, the item, the request's context, or user and item together.

    It is read from a column of the side's table, counted in the log (``aggregate``), or told of the events that the
    request sees (``history``).
    """

    side: Side
    multi: bool = Field(False, description="a list of values per row, mean-pooled")
    aggregate: Aggregate | None = Field(None, description="a windowed aggregate of the log instead of a column")
    history: History | None = Field(None, description="a number told of the visible history instead of a column")

    @model_validator(mode="before")
    @classmethod
    def _aggregates_are_numbers(cls, data: object) -> object:
        if isinstance(data, dict) and (data.get("aggregate") is not None or data.get("history") is not None):
            return {"kind": "number", **data}
        return data

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Feature:
        if self.multi and self.kind == "number":
            raise ValueError("a number has one value per row (multi: false)")
        if self.history is not None:
            if self.aggregate is not None or self.kind != "number" or self.column is not None:
                raise ValueError("history: it is a number of its own; leave kind, column and aggregate out")
            if self.side not in ("user", "cross"):
                raise ValueError("history: it has side user or cross")
            if (self.side == "cross") != (self.history.key is not None):
                raise ValueError(
                    "history.key names what candidates share with events; side cross needs it, user has none"
                )
            return self
        if self.aggregate is None:
            if self.side == "cross":
                raise ValueError("a feature of side cross is an aggregate, or one of the history")
            return self
        if self.kind != "number" or self.column is not None:
            raise ValueError("an aggregate is a number of its own; leave kind and column out")
        if self.side == "context":
            raise ValueError("an aggregate has side user, item or cross")
        if (self.side == "cross") != (self.aggregate.key is not None):
            raise ValueError("aggregate.key names what is crossed with the user; side cross needs it, others have none")
        return self


class EventField(FieldSpec):
    """Side information of an event: a column of its row, or of its item's profile as of the event's time."""

    of: Literal["event", "item"] = Field(
        "event", description="whose column it is; item: of the newest profile with updated_at ≤ the event's ts"
    )


class Sequence(Declaration):
    """A behaviour sequence: one log of events, its side information and its visible length L."""

    name: Name
    events: str = Field(description="table of the config that holds the events")
    where: str | None = Field(None, description="SQL condition that selects the events, e.g. action = 'buy'")
    length: int = Field(100, ge=1, le=10_000, description="L: visible events of one request")
    fields: tuple[EventField, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fields_have_names_of_their_own(self) -> Sequence:
        names = [field.name for field in self.fields]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"field {name!r} is declared {names.count(name)} times")
            if name in TAKEN_NAMES:
                raise ValueError(f"a field cannot be called {name!r}: choose another name, with `column: {name}`")
        return self

    def field(self, name: str) -> EventField:
        """The field of this name, which there is."""
        return next(field for field in self.fields if field.name == name)

    @property
    def own(self) -> tuple[EventField, ...]:
        """The fields that are columns of the event's row."""
        return tuple(field for field in self.fields if field.of == "event")

    @property
    def joined(self) -> tuple[EventField, ...]:
        """The fields that come from the item's profile."""
        return tuple(field for field in self.fields if field.of == "item")


class Task(Declaration):
    """A binary label of an impression: a column of its row, or what ``feedback`` says within a time after it."""

    name: Name
    column: str | None = Field(None, description="label column of impressions; default: the name")
    weight: float = Field(1.0, gt=0, description="weight of the task in the loss")
    attribution_window_seconds: float | None = Field(
        None,
        gt=0,
        description="the label arrives later: the newest row of table feedback (label: the task's name, value: 0 or 1) "
        "within so many seconds of the impression, 0 without one, and not known until then",
    )

    @model_validator(mode="after")
    def _label_has_one_source(self) -> Task:
        if self.attribution_window_seconds is not None and self.column is not None:
            raise ValueError("a label with an attribution window comes from feedback and has no column")
        return self

    @property
    def source(self) -> str:
        return self.column or self.name

    @property
    def attribution_window(self) -> int | None:
        """Microseconds; None when the label comes in the impression's row."""
        return None if self.attribution_window_seconds is None else round(self.attribution_window_seconds * SECOND)


class Schema(Declaration):
    """Features, sequences and tasks of one model, in the order in which the model reads them."""

    features: tuple[Feature, ...]
    sequences: tuple[Sequence, ...]
    tasks: tuple[Task, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_and_tables_agree(self) -> Schema:
        for what, names in (
            ("feature", [feature.name for feature in self.features]),
            ("sequence", [sequence.name for sequence in self.sequences]),
            ("task", [task.name for task in self.tasks]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{what} {name!r} is declared {names.count(name)} times")
        self._check_timeline_columns()
        delayed = {task.source for task in self.delayed_tasks}
        for feature in self.features:
            if (
                feature.aggregate is not None
                and feature.aggregate.of == "impressions"
                and feature.aggregate.column in delayed
            ):
                raise ValueError(
                    f"feature {feature.name!r} counts the label {feature.aggregate.column!r}, which arrives later "
                    "through feedback; count the rows of an event table instead"
                )
        if not any(feature.side == "item" for feature in self.features):
            raise ValueError("a ranking model needs at least one feature with side: item")
        if not any(feature.side in ("user", "context") for feature in self.features):
            raise ValueError("a ranking model needs at least one feature with side: user or context")
        for feature in self.of_history:
            self._check_history(feature)
        tables: dict[str, FieldSpec] = {}
        for field in self.all_fields():
            first = tables.setdefault(field.embedding, field)
            if (field.kind, field.rows, field.dim) != (first.kind, first.rows, first.dim):
                raise ValueError(
                    f"{field.name!r} and {first.name!r} share the embedding table {field.embedding!r} "
                    "but differ in kind, buckets, vocabulary or dim"
                )
        return self

    def _check_history(self, feature: Feature) -> None:
        """Require that what a feature of the history names is there, and of a kind that fits."""
        history, where = feature.history, f"feature {feature.name!r}: history."
        assert history is not None
        by_name = {sequence.name: sequence for sequence in self.sequences}
        if history.sequence not in by_name:
            raise ValueError(f"{where}sequence: there is no {history.sequence!r}; there are {list(by_name)}")
        fields = {field.name: field for field in by_name[history.sequence].fields}
        for part, name in (("field", history.field), ("key", history.key)):
            if name is not None and name not in fields:
                raise ValueError(f"{where}{part}: the sequence has no field {name!r}; it has {list(fields)}")
        if history.field is not None:
            field = fields[history.field]
            if (history.function == "mean") != (field.kind == "number"):
                raise ValueError(
                    f"{where}field: {field.name!r} is a {field.kind}, of which there is no {history.function}"
                )
            if strange := [
                value for value in history.values or () if field.vocabulary and value not in field.vocabulary
            ]:
                raise ValueError(f"{where}values: {strange[0]!r} is not in the vocabulary of {field.name!r}")
        if history.key is not None:
            items = {item.name: item for item in self.side("item")}
            name = history.feature or history.key
            if name not in items:
                raise ValueError(f"{where}feature: there is no feature {name!r} of side item; there are {list(items)}")
            key, item = fields[history.key], items[name]
            if key.kind == "number" or (key.kind, key.vocabulary) != (item.kind, item.vocabulary):
                raise ValueError(
                    f"{where}key: {history.key!r} of the sequence and feature {name!r} differ in kind or vocabulary"
                )

    def _check_timeline_columns(self) -> None:
        """Require one meaning for every column ``sequence__field``, and no name that ends as times or event ids do."""
        columns: dict[str, str] = {}
        for sequence in self.sequences:
            for name in (*TIMELINE_NAMES, *(field.name for field in sequence.fields)):
                if name.endswith(tuple(f"__{ending}" for ending in TIMELINE_NAMES)):
                    raise ValueError(
                        f"field {name!r} of sequence {sequence.name!r}: the end of its name is taken; "
                        f"choose another name, with `column: {name}`"
                    )
                here = f"field {name!r} of sequence {sequence.name!r}"
                other = columns.setdefault(f"{sequence.name}__{name}", here)
                if other != here:
                    raise ValueError(
                        f"{here} and {other} would have the same column {sequence.name}__{name}: rename one of them"
                    )

    def side(self, *sides: Side) -> tuple[Feature, ...]:
        """The features that are read from columns of these sides' tables, in order of declaration."""
        return tuple(
            feature
            for feature in self.features
            if feature.side in sides and feature.aggregate is None and feature.history is None
        )

    def aggregates(self, *sides: Side) -> tuple[Feature, ...]:
        """The features of these sides that are counted in the log, in order of declaration."""
        return tuple(feature for feature in self.features if feature.side in sides and feature.aggregate is not None)

    @property
    def delayed_tasks(self) -> tuple[Task, ...]:
        """Tasks whose labels come from feedback."""
        return tuple(task for task in self.tasks if task.attribution_window is not None)

    @property
    def attribution_window(self) -> int:
        """Microseconds after its close until all labels of a partition are known."""
        return max((task.attribution_window or 0 for task in self.tasks), default=0)

    def counts_of(self, table: str) -> tuple[Feature, ...]:
        """The aggregates that count the rows of a table."""
        every = self.aggregates("user", "item", "cross")
        return tuple(feature for feature in every if feature.aggregate is not None and feature.aggregate.of == table)

    @property
    def logs(self) -> tuple[str, ...]:
        """The partitioned tables that are read: impressions, and what sequences and aggregates name."""
        counted_logs = [
            feature.aggregate.of
            for feature in self.aggregates("user", "item", "cross")
            if feature.aggregate is not None
        ]
        return tuple(dict.fromkeys(["impressions", *(sequence.events for sequence in self.sequences), *counted_logs]))

    @property
    def cross_keys(self) -> tuple[str, ...]:
        """Columns of items that features cross with the user, item_id left out."""
        keys = [feature.aggregate.key for feature in self.aggregates("cross") if feature.aggregate is not None]
        return tuple(dict.fromkeys(key for key in keys if key is not None and key != "item_id"))

    @property
    def user_side(self) -> tuple[Feature, ...]:
        """Features that no candidate can change: those of the user and of the request's context."""
        return tuple(feature for feature in self.features if feature.side in ("user", "context"))

    @property
    def item_side(self) -> tuple[Feature, ...]:
        """All other features."""
        return tuple(feature for feature in self.features if feature.side not in ("user", "context"))

    @property
    def of_history(self) -> tuple[Feature, ...]:
        """Features that are computed when samples are read (:mod:`features.history`)."""
        return tuple(feature for feature in self.features if feature.history is not None)

    @property
    def stored_user_side(self) -> tuple[Feature, ...]:
        """Those of :attr:`user_side` that the sample table stores."""
        return tuple(feature for feature in self.user_side if feature.history is None)

    @property
    def stored_item_side(self) -> tuple[Feature, ...]:
        """Those of :attr:`item_side` that the sample table stores."""
        return tuple(feature for feature in self.item_side if feature.history is None)

    def keyed_by(self, history: History) -> Feature:
        """The feature of candidates that must equal the history's key."""
        name = history.feature or history.key
        return next(feature for feature in self.side("item") if feature.name == name)

    def profile_columns(self, role: Literal["users", "items"]) -> tuple[str, ...]:
        """Columns of a profile table whose values are read, its key left out. Without any the table is optional."""
        key, side = ("user_id", self.side("user")) if role == "users" else ("item_id", self.side("item"))
        read = [feature.source for feature in side]
        if role == "items":
            read += [*self.cross_keys, *self.joined_columns]
        return tuple(dict.fromkeys(column for column in read if column != key))

    @property
    def joined_columns(self) -> tuple[str, ...]:
        """Columns of items that events carry as side information."""
        joined = [field.source for sequence in self.sequences for field in sequence.joined]
        return tuple(dict.fromkeys(joined))

    def all_fields(self) -> Iterator[FieldSpec]:
        """Every feature, then every field of every sequence."""
        yield from self.features
        for sequence in self.sequences:
            yield from sequence.fields


def partition_number(partition: str, grain: Grain) -> int:
    """How many partitions lie between the epoch and this one: consecutive partitions have consecutive numbers."""
    anchor = EPOCH_MONDAY if grain == "week" else datetime(1970, 1, 1, tzinfo=UTC)
    return int(
        (partition_bounds(partition, grain)[0] - anchor.timestamp() * SECOND)
        // (GRAIN_LENGTH[grain] // timedelta(microseconds=1))
    )


def partition_of(ts: int, grain: Grain) -> str:
    """The partition d (its name) with d ≤ ts < d+1; ts in microseconds UTC."""
    moment = datetime.fromtimestamp(ts // SECOND, UTC)
    anchor = EPOCH_MONDAY if grain == "week" else datetime(1970, 1, 1, tzinfo=UTC)
    start = anchor + (moment - anchor) // GRAIN_LENGTH[grain] * GRAIN_LENGTH[grain]
    return start.strftime(PARTITION_FORMATS[grain])


def partition_bounds(partition: str, grain: Grain) -> tuple[int, int]:
    """Open and close of a partition in microseconds UTC.

    A name is exactly what the grain's format writes, so names in the order of text are in the order of time.

    Raises:
        ValueError: the name is not one of this grain (weeks begin on Monday).
    """
    example = EPOCH_MONDAY.strftime(PARTITION_FORMATS[grain])
    try:
        start = datetime.strptime(partition, PARTITION_FORMATS[grain]).replace(tzinfo=UTC)
        exact = start.strftime(PARTITION_FORMATS[grain]) == partition  # strptime takes 2026-1-5, too
    except ValueError:
        exact = False
    if not exact:
        article = "an" if grain == "hour" else "a"
        raise ValueError(f"partition {partition!r} is not {article} {grain}: it is written like {example}")
    if grain == "week" and start.weekday() != 0:
        raise ValueError(f"partition {partition!r} is not a Monday; weeks begin on Monday, like {example}")
    opening = int(start.timestamp()) * SECOND
    return opening, opening + GRAIN_LENGTH[grain] // timedelta(microseconds=1)  # of 9999-12-31, too
