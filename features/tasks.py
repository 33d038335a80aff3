"""Work on many files or slices: in Ray tasks where Ray runs, else one by one here. Nothing starts Ray."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from features.errors import known_cause

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

T = TypeVar("T")

IN_FLIGHT = 2
"""Tasks per processor that run or whose results wait to be taken, which bounds memory."""

LAST_SECONDS = 60.0
"""Seconds for which, after a failure, the tasks in flight are waited for."""

HEEDING_SECONDS = 0.5
"""Longest seconds that a single wait lasts, as Ray handles no signal meanwhile."""


def ray_runs() -> bool:
    """Whether this process is connected to Ray."""
    ray: Any = sys.modules.get("ray")
    return hasattr(ray, "is_initialized") and bool(ray.is_initialized())  # an import may have been interrupted


def each(function: Callable[..., T], calls: Iterable[tuple[Any, ...]], on_ray: bool) -> Generator[T]:
    """``function(*call)`` of every call, in order: in Ray tasks, a few at a time, or one by one in this process."""
    if not on_ray:
        yield from (function(*call) for call in calls)
        return
    import ray

    remote, running = task(function), deque[Any]()
    cluster: Any = ray  # its functions are not typed
    most = IN_FLIGHT * max(1, int(cluster.cluster_resources().get("CPU", 1)))
    try:
        for call in calls:
            if len(running) == most:
                yield _oldest(running)
            running.append(remote.remote(*call))
        while running:
            yield _oldest(running)
    finally:
        wait_for_end(running)


def wait_for_end(running: Collection[Any]) -> None:
    """Wait until no task runs any more, for at most ``LAST_SECONDS``: after a failure none may go on to read or write.

    Tasks are not cancelled: Ray aborts the process that cancels a task in the moment in which it ends
    (``NormalTaskSubmitter::CancelTask`` of 2.60 fails it, and its reply then finds no pending task).
    """
    import ray

    cluster: Any = ray  # its functions are not typed
    left, last = list(running), time.monotonic() + LAST_SECONDS
    while left and ray_runs() and time.monotonic() < last:  # while Ray waits it heeds no signal
        _, left = cluster.wait(left, num_returns=len(left), timeout=HEEDING_SECONDS, fetch_local=False)


def task(function: Callable[..., Any], **options: Any) -> Any:
    """A Ray task that gives back data frames as Arrow tables, which lie in shared memory without a copy."""
    import ray

    def run(*call: Any) -> Any:
        import polars as pl

        result = function(*call)
        return arrow(result) if isinstance(result, pl.DataFrame) else result

    return ray.remote(run).options(num_cpus=1, **options)


def arrow(frame: pl.DataFrame) -> pa.Table:
    import polars as pl

    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())


def result_of(reference: Any) -> Any:
    """What a task returned, or the error as it was raised there, when it is one that says what to do."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as failure:
        known = known_cause(failure)
        if known is None:
            raise
        raise known from None


def _oldest(running: deque[Any]) -> Any:
    """The result of the first task, which goes once it has ended."""
    result = result_of(running[0])
    running.popleft()
    return result
