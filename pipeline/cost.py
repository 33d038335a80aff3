"""What the stages of a run cost: a plain document per newest partition, folder ``cost``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.records import Records

FOLDER = "cost"


@dataclass
class Cost:
    """What a stage took the last time that it had work.

    Attributes:
        parts: how many it made.
        rows: of the log or of samples that it went through; None where none are counted.
        seconds: of wall time.
        cpu_seconds: of this command's processes, Ray's of this machine with them; what other machines of a cluster
            did is not in it.
    """

    parts: int
    rows: int | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextmanager
def measured(parts: int) -> Iterator[Cost]:
    """A cost whose times are set when the block ends."""
    cost, started, cpu = Cost(parts), time.monotonic(), _cpu_seconds()
    yield cost
    cost.seconds, cost.cpu_seconds = time.monotonic() - started, max(_cpu_seconds() - cpu, 0.0)


def keep(records: Records, partition: str, stage: str, cost: Cost) -> None:
    """Keep the cost of a stage beside those of the other stages up to this partition; it replaces an earlier run's."""
    records.put(FOLDER, partition, costs(records, partition) | {stage: asdict(cost)})


def costs(records: Records, partition: str) -> dict[str, dict[str, Any]]:
    """The newest cost of each stage in runs up to this partition."""
    document = records.get(FOLDER, partition) or {}
    return {stage: cost for stage, cost in document.items() if isinstance(cost, dict)}


def _cpu_seconds() -> float:
    """CPU seconds of this process and all that it started: those that run, and those that ended and were waited for."""
    import psutil

    command, total = psutil.Process(), 0.0
    for process in (command, *command.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += sum(getattr(times, name, 0.0) for name in ("user", "system", "children_user", "children_system"))
    return total
