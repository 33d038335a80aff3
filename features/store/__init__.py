"""The feature store: Feast's registry and online store over Delta tables."""

from __future__ import annotations

from features.store import feast_internals  # first of all: it decides how Feast is imported

__all__ = ["feast_internals"]
