"""One line of a verdict. It imports little, so that records and texts need neither numpy nor a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Criterion:
    """What was measured, and what it must be.

    Attributes:
        measured: in words.
        value: None where it is not defined.
        interval: of the value over resampled users.
        limit: what the value is compared with; None where it is only told.
        limit_text: the limit in words.
        passed: None where the value is told and not judged.
        note: what the value was made of, or why it was not judged.
    """

    measured: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    limit: float | None = None
    limit_text: str = ""
    passed: bool | None = None
    note: str = ""

    @property
    def value_text(self) -> str:
        return "–" if self.value is None else f"{self.value:.4f}"

    @property
    def interval_text(self) -> str:
        return "" if self.interval is None else f"{self.interval[0]:.4f} … {self.interval[1]:.4f}"

    @property
    def verdict(self) -> str:
        return {True: "passed", False: "failed", None: "told"}[self.passed]

    @property
    def reason(self) -> str:
        """Why it fails."""
        interval = f" ({self.interval_text})" if self.interval else ""
        return f"{self.measured}: {self.value_text}{interval}, must be {self.limit_text}"


COLUMNS = ("criterion", "value", "interval", "limit", "verdict", "note")


def cells(criterion: Criterion) -> tuple[str, ...]:
    """A row of the table of criteria, in order of :data:`COLUMNS`."""
    return (
        criterion.measured,
        criterion.value_text,
        criterion.interval_text,
        criterion.limit_text,
        criterion.verdict,
        criterion.note,
    )


def reasons(criteria: Sequence[Criterion]) -> list[str]:
    """Why a challenger does not pass; empty when it does."""
    return [criterion.reason for criterion in criteria if criterion.passed is False]


def counts_text(criteria: Sequence[Criterion]) -> str:
    """How many passed, failed, and were only told."""
    passed, failed, told = (
        sum(criterion.passed is verdict for criterion in criteria) for verdict in (True, False, None)
    )
    return f"{passed} passed, {failed} failed, {told} told but not judged"
