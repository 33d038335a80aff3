"""From Delta tables to a batch and to an online feature row. The public names are loaded when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from features.batch import RequestBatch, collate
    from features.delta.table import Table
    from features.samples.source import SampleSource
    from features.schema import Aggregate, EventField, Feature, Schema, Sequence, Task

__all__ = [
    "Aggregate",
    "EventField",
    "Feature",
    "RequestBatch",
    "SampleSource",
    "Schema",
    "Sequence",
    "Table",
    "Task",
    "collate",
]

_HOMES = {
    "batch": ("RequestBatch", "collate"),
    "delta.table": ("Table",),
    "samples.source": ("SampleSource",),
    "schema": ("Aggregate", "EventField", "Feature", "Schema", "Sequence", "Task"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"features.{module}"), name)
    raise AttributeError(f"module 'features' has no attribute {name!r}")
