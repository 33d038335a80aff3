"""The config's section ``trigger``: when a new partition starts a retraining, and what happens when one fails."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from features.schema import Declaration

MARKER = "corank.closed"
"""Key of a Delta commit's own metadata: the partition, or several with commas between, that will get no more rows."""


class TriggerConfig(Declaration):
    """When `corank watch` takes a partition, and what it does when a retraining fails."""

    closed: Literal["time", "next", "marker", "quiet"] = Field(
        "next",
        description="a partition is closed when its time has passed and: nothing else (time); impressions of a later "
        f"one are there (next); a commit to impressions names it in its metadata, as {MARKER}: 2026-01-05 (marker); no "
        "table had a commit to it for quiet_minutes (quiet)",
    )
    wait_for: tuple[str, ...] | None = Field(
        None,
        description="logs that must reach a partition before it is taken, beside impressions; default: all that the "
        "features read. Leave out those in which a partition may have no row",
    )
    quiet_minutes: float = Field(30.0, ge=0, description="for closed: quiet")
    interval_seconds: int = Field(30, ge=1, description="how often the tables are looked at")
    cron: str | None = Field(
        None, description="retrain at these times instead, e.g. `0 4 * * *`, for logs that arrive irregularly (UTC)"
    )
    retries: int = Field(3, ge=0, description="times that a retraining that failed is tried again")
    backoff_seconds: float = Field(60.0, ge=0, description="before the first of them; doubled each time")
    alert_command: str | None = Field(
        None, description="shell command for a retraining that failed for good; the message is in $CORANK_ALERT"
    )
    alert_webhook: str | None = Field(None, description='address that is sent {"text": message} then')

    @field_validator("cron")
    @classmethod
    def _is_a_cron_expression(cls, cron: str | None) -> str | None:
        if cron is not None and len(cron.split()) != 5:
            raise ValueError("write minute, hour, day of month, month and day of week: `0 4 * * *`")
        return cron
