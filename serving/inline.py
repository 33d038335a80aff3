"""Features that a request brings along, in place of those in the online store.

They are named by the columns that they come from, as in the log and the profile tables, and coded as those are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from features.encoding import as_text, encode_value
from features.errors import CorankError
from features.sample_table import feature_column
from features.schema import EventField, Feature, Schema
from features.schema import Sequence as BehaviourSequence
from features.store.items import Column
from features.store.reader import History, Known

MOST = float(np.finfo(np.float32).max)


class InvalidRequestError(CorankError):
    """The request does not fit the model; ``field`` names the part of it that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Inline:
    """What a request brings along.

    Attributes:
        user: profile columns and counts of the user, by column or name of the feature.
        history: per sequence all its events, each with ``ts`` in microseconds UTC and the columns that it reads.
        recent: per sequence events on top of those that it has.
        items: by place of the candidate: profile columns, counts and cross features.
    """

    user: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    recent: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    items: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.user or self.history or self.recent or self.items)


def with_inline(schema: Schema, known: Known, inline: Inline, user_id: str, item_ids: Sequence[str]) -> Known:
    """What is known of a request, with what it brings along in place of what is stored.

    A user or item of whom something is sent is known.

    Raises:
        InvalidRequestError: the model reads no such column or sequence, or a value is of the wrong kind.
    """
    user, codes = known.user, dict(known.codes)
    if inline.user:
        user = True
        features = (*schema.side("user"), *schema.aggregates("user"))
        codes |= _codes("user", features, inline.user, ("user_id", user_id))
    histories = dict(known.histories)
    sequences = {sequence.name: sequence for sequence in schema.sequences}
    for part, by_sequence in (("history", inline.history), ("recent", inline.recent)):
        for name, events in by_sequence.items():
            where = f"{part}.{name}"
            if name not in sequences:
                raise InvalidRequestError(where, f"is no sequence of the model; there are {list(sequences)}")
            sent = _history(sequences[name], events, where)
            histories[name] = sent if part == "history" else _together(histories[name], sent)
    return replace(known, user=user, codes=codes, histories=histories, items=_items(schema, known, inline, item_ids))


def _items(schema: Schema, known: Known, inline: Inline, item_ids: Sequence[str]) -> dict[str, Column]:
    items = dict(known.items)
    if not inline.items:
        return items
    coded = {
        place: _codes(f"candidates.{place}", schema.stored_item_side, sent, ("item_id", item_ids[place]))
        for place, sent in inline.items.items()
        if sent  # an object with the id alone is the id
    }
    if not coded:
        return items
    items["item_known"] = np.array(items["item_known"])
    items["item_known"][list(coded)] = True
    for name in dict.fromkeys(name for codes in coded.values() for name in codes):
        new = {place: codes[name] for place, codes in coded.items() if name in codes}
        items[name] = _replaced(items[name], new)
    return items


def _replaced(column: Column, new: Mapping[int, Any]) -> Column:
    if isinstance(column, np.ndarray):
        column = column.copy()
        column[list(new)] = [np.nan if value is None else value for value in new.values()]
        return column
    values = column.to_pylist()
    for place, value in new.items():
        values[place] = value
    return pa.array(values, column.type)


def _codes(where: str, features: Iterable[Feature], sent: Mapping[str, Any], key: tuple[str, str]) -> dict[str, Any]:
    """Codes by ``feature_column`` of the features whose columns were sent, and of those of the key.

    Args:
        key: the id's column and value, which cannot be sent.
    """
    by_source: dict[str, list[Feature]] = {}
    for feature in features:
        by_source.setdefault(feature.source, []).append(feature)
    codes = {}
    for column in sent:
        if column not in by_source or column == key[0]:
            readable = [name for name in by_source if name != key[0]]
            raise InvalidRequestError(f"{where}.{column}", f"the model reads no such column; it reads {readable}")
    for column, value in (key, *sent.items()):
        for feature in by_source.get(column, ()):
            codes[feature_column(feature)] = encode_value(feature, raw(feature, value, f"{where}.{column}"))
    return codes


def _together(stored: History, sent: History) -> History:
    """The events of both in order of time; of one time, those that are stored come first."""
    ts = np.concatenate([stored.ts, sent.ts])
    order = ts.argsort(kind="stable")
    fields = {name: np.concatenate([codes, sent.fields[name]])[order] for name, codes in stored.fields.items()}
    return History(ts[order], fields)


def _history(sequence: BehaviourSequence, sent: Sequence[Mapping[str, Any]], part: str) -> History:
    """Events in order of time; those of one time stay in their order."""
    sources = ["ts", *dict.fromkeys(event_field.source for event_field in sequence.fields)]
    for place, event in enumerate(sent):
        for column in event:
            if column not in sources:
                problem = f"the sequence reads no such column; it reads {sources}"
                raise InvalidRequestError(f"{part}.{place}.{column}", problem)
        for column in sources:
            if column not in event:
                raise InvalidRequestError(f"{part}.{place}.{column}", "is missing; send null if it is not known")
    order = sorted(range(len(sent)), key=lambda place: sent[place]["ts"])

    def codes(event_field: EventField) -> np.ndarray:
        source = event_field.source
        values = [raw(event_field, sent[place][source], f"{part}.{place}.{source}") for place in order]
        kind = np.float32 if event_field.kind == "number" else np.int64
        return np.array([_or_nan(encode_value(event_field, value)) for value in values], kind)

    ts = np.array([sent[place]["ts"] for place in order], np.int64)
    return History(ts, {event_field.name: codes(event_field) for event_field in sequence.fields})


def _or_nan(code: Any) -> Any:
    return np.nan if code is None else code


def raw(feature: Feature | EventField, value: Any, where: str) -> Any:
    """A value as it is coded: text, number, boolean, or (multi-valued) a list of them, without the nulls in it.

    Args:
        where: names the value in the request.

    Raises:
        InvalidRequestError: it is of another kind.
    """
    if value is None:
        return None
    if feature.kind == "number":
        if not isinstance(value, (int, float)) or not -MOST <= value <= MOST:  # a boolean is a number in tables, too
            raise InvalidRequestError(where, "must be a finite number or null")
        return float(value)
    if not getattr(feature, "multi", False):
        return _text(where, value)
    if not isinstance(value, list):
        raise InvalidRequestError(where, "must be a list or null")
    return [_text(f"{where}.{place}", element) for place, element in enumerate(value) if element is not None]


def _text(where: str, value: Any) -> str:
    """The text by which an id or a category is coded, as for a table's column."""
    if not isinstance(value, (str, int, float)):
        raise InvalidRequestError(where, "must be a text, a number or a boolean")
    return as_text(value)
