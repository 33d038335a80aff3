"""Metrics as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def number_text(value: float | None) -> str:
    """A metric, or a dash where it is not defined."""
    return "–" if value is None else f"{value:.4f}"


def gain_text(gain: Mapping[str, float] | None) -> str:
    """A difference of AUC, or a dash where there is none: a task that the gate does not judge by may have no labels."""
    return "–" if gain is None else f"{gain['difference']:+.4f}"


def classes_text(entry: Mapping[str, Any]) -> str:
    """The basis of a task's metrics: positives, and the shares of users and requests behind UAUC and so on."""
    if not entry["impressions"]:
        return "no label is known"
    return (
        f"{entry['impressions']:,} known labels, {entry['positives']:.1%} positive; {entry['user_share']:.1%} of users "
        f"and {entry['query_share']:.1%} of requests have both classes"
    )
