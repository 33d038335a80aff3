"""The place where a pipeline works: its config, the user's log, the records and the model registry."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from features.errors import CorankError
from pipeline.config import Config
from pipeline.progress import Progress
from pipeline.records import Records
from pipeline.version import code_version
from pipeline.workspace.log import Log

if TYPE_CHECKING:
    from pipeline.workspace.registry import ModelRegistry

DATA_SECTIONS = ("tables", "features", "sequences", "tasks", "grain")
"""Config sections that decide what a partition's rows mean."""


class Workspace:
    """The workspace of one config.

    Args:
        until: use the log up to this partition; default: the newest closed one.
        warm_start: begin training with the champion, on what it has not trained on.
        from_scratch: train from scratch although a retraining of the same partitions is there.
        as_of: a record's lineage: the log is read as it was then, not as it is now.
    """

    def __init__(
        self,
        config: Config,
        progress: Progress,
        until: str | None = None,
        warm_start: bool = False,
        as_of: Mapping[str, Any] | None = None,
        from_scratch: bool = False,
    ) -> None:
        self.config, self.progress = config, progress
        self.until, self.warm_start, self.as_of = until, warm_start, as_of
        self.from_scratch = from_scratch
        self.records = Records(config.path("records"))

    @cached_property
    def log(self) -> Log:
        return Log(self.config, self.records, self.until, self.as_of)

    @cached_property
    def registry(self) -> ModelRegistry:
        from pipeline.workspace.registry import ModelRegistry

        return ModelRegistry(self.config)

    def close_registry(self) -> None:
        """Drop the open registry, whose database was removed; the next use opens a new one."""
        from pipeline.workspace.registry import forget_connections

        self.__dict__.pop("registry", None)
        forget_connections()

    @property
    def partitions(self) -> list[str]:
        """The log's partitions, oldest first."""
        return self.log.partitions

    def lineage(self) -> dict[str, Any]:
        """What every record of a whole log carries (:class:`pipeline.records.LogRecord`): the log, config and code."""
        return {
            "fingerprints": {partition: self.log.fingerprint(partition) for partition in self.partitions},
            "versions": self.log.versions,
            "now": self.log.now,
            "config": self.config.digest_of(*type(self.config).model_fields),
            "code": code_version(),
        }


@contextmanager
def exclusive(config: Config) -> Iterator[bool]:
    """One run per workspace at a time; a lock of a killed run is released by the operating system.

    Yields:
        whether the run before ended in good order; one that does not leaves the number of its process behind.

    Raises:
        CorankError: another run is working in this workspace.
    """
    path = config.local_path("run.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise CorankError(
                f"another corank run{_named(handle.read().strip())} is working in {path.parent}; wait for it or stop it"
            ) from None
        handle.seek(0)
        orderly = not handle.read()
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield orderly
        handle.truncate(0)


def _named(number: str) -> str:
    """Of the process that has the lock its number and command; nothing where it has not written them yet."""
    import psutil

    if not number.isdigit():
        return ""
    try:
        return f" (process {number}: {typed_command(psutil.Process(int(number)).cmdline())})"
    except psutil.Error:  # it ends just now, or is somebody else's
        return f" (process {number})"


def typed_command(words: Sequence[str]) -> str:
    """A command as a user typed it, however Python was called."""
    code = words.index("-c") if "-c" in words[:3] else None
    if code is not None:
        return " ".join(["corank", *words[code + 2 :]])
    called = next((index for index, word in enumerate(words) if word.endswith(("corank", "cli.py", "pipeline.cli"))), 0)
    return " ".join(["corank", *words[called + 1 :]])


def holder(config: Config) -> tuple[int, bool] | None:
    """The process that has the workspace, and whether it still runs: one that was killed left its number behind.

    None when nobody has it. The lock is not tried, as that could keep it from a command that begins at that moment.
    """
    import psutil

    path = config.local_path("run.lock")
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not text:
        return None
    try:
        runs = str(path.resolve()) in {file.path for file in psutil.Process(int(text)).open_files()}
    except psutil.NoSuchProcess:
        runs = False
    except psutil.AccessDenied:  # another user's process
        runs = True
    return int(text), runs
