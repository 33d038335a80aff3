"""What the sizes of several models have in common; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

from features.schema import FieldSpec


def width_of(fields: Iterable[FieldSpec]) -> int:
    """Embedding width of some fields side by side."""
    return sum(field.dim for field in fields)


def require_hidden_units(width: int, **factors: float) -> None:
    for name, factor in factors.items():
        if round(factor * width) < 1:
            raise ValueError(f"{name} {factor} leaves no hidden unit at width {width}")
