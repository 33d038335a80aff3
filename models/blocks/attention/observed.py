"""Sees the weights by which queries attend to events, which the kernels themselves never hold as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_WEIGHTS: ContextVar[list[Tensor] | None] = ContextVar("weights", default=None)


@contextmanager
def observed_weights() -> Iterator[list[Tensor]]:
    """The weights of every call of ``attend`` in the block, in order, [H, B, E] each; zero for what is not seen."""
    weights: list[Tensor] = []
    token = _WEIGHTS.set(weights)
    try:
        yield weights
    finally:
        _WEIGHTS.reset(token)


@contextmanager
def unobserved() -> Iterator[list[Tensor] | None]:
    """Whoever observes, if anybody does; calls in the block are not observed."""
    weights = _WEIGHTS.get()
    token = _WEIGHTS.set(None)
    try:
        yield weights
    finally:
        _WEIGHTS.reset(token)
