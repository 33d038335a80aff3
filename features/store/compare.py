"""Compares the online store with the tables: a store may be readable and yet hold other bytes than were written."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from functools import partial
from typing import Any

from feast import FeatureView
from feast.protos.feast.types.Value_pb2 import Value

from features.store.definitions import SEQUENCE_VIEW, timeline_prefix
from features.store.feast_internals import read
from features.store.online import (
    LOCKED_ROWS,
    FeatureStoreSettings,
    entity_values,
    open_store,
    reachable,
    registered_view,
    view_query,
)
from features.store.query import Partitions, latest, together


def differing(settings: FeatureStoreSettings, end: int, close: int) -> dict[str, int]:
    """Per view the entities whose stored values are not those of the tables, which are read whole.

    Args:
        end: time up to which the store knows the log, microseconds UTC.
        close: close of the newest partition in the store, microseconds UTC; later events were pushed, and are skipped.

    Raises:
        CorankError: the views are not registered, or a table cannot be read.
        UnavailableError: the online store does not answer.
    """
    store, found = open_store(settings), dict[str, int]()
    for stored in settings.stored_views(store):
        name = str(stored.view.name)
        view, is_sequence = registered_view(store, name), name.startswith(SEQUENCE_VIEW)
        query = view_query(store, view, None, close if is_sequence else end, stored.given)
        for rows in Partitions(query, settings.slice_bytes).map(partial(latest, query)) if stored.given else ():
            for portion in together([rows]).iter_slices(LOCKED_ROWS):
                entries = entity_values(view, portion)
                with reachable(store):
                    online = read(store, view, [key for key, *_ in entries], list(stored.given))
                wrong = sum(
                    not _is_stored(view, values, before or {}, close if is_sequence else None)
                    for (_, values, _, _), (_, before) in zip(entries, online, strict=True)
                )
                if wrong:
                    found[name] = found.get(name, 0) + wrong
    return found


def _is_stored(view: FeatureView, values: Mapping[str, Any], stored: Mapping[str, Any], close: int | None) -> bool:
    """
    Args:
        close: of a sequence, whose later events were pushed; they may have taken the place of the oldest ones.
    """
    if close is None:
        return all(_bytes(stored.get(name, Value())) == _bytes(value) for name, value in values.items())
    times = stored.get(f"{timeline_prefix(view.name)}__ts", Value()).int64_list_val.val
    logged = bisect_left(times, close)
    for name, value in values.items():
        kind = value.WhichOneof("val")
        known, expected = (
            list(getattr(listed, str(kind)).val) if kind else [] for listed in (stored.get(name, Value()), value)
        )
        if logged == len(times) and len(known) != len(expected):
            return False
        if repr(known[:logged]) != repr(expected[len(expected) - logged :]):  # as text, where NaN equals itself
            return False
    return True


def _bytes(value: Any) -> bytes:
    return bytes(value.SerializeToString(deterministic=True))
