"""What a stage is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Generic

from pipeline.records import R
from pipeline.workspace import Workspace


class Stage(ABC, Generic[R]):
    """A step of the DAG. It does its work in parts: those that are stale, or that a caller names.

    A stage that is done partition by partition has a part for every partition of the log; another has a single part,
    the key of its record. It writes the record of a part when the part is made, so that a killed run continues where it
    stopped and ends the same. The docstring of a stage is its description in Dagster.

    Attributes:
        name: of the stage, its asset and the folder of its records.
        depends: names of the stages that come before it.
        record: the frozen dataclass of its records.
        partitioned: whether its parts are the partitions of the log.
        trains: whether it trains or judges a model; it is left out when there is nothing new to train on.
        follows: whether it also has work whenever a stage that it depends on had.
        check: name of the asset check that fails when a data-validation gate stops the stage.
        kinds: labels that Dagster shows beside its name.
    """

    name: ClassVar[str]
    depends: ClassVar[tuple[str, ...]] = ()
    record: type[R]
    partitioned: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    follows: ClassVar[bool] = False
    check: ClassVar[str | None] = None
    kinds: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def inputs(self, workspace: Workspace) -> Mapping[str, str]:
        """By part, in order, the digest of what it would be made from now."""

    def stale(self, workspace: Workspace) -> list[str]:
        """The parts whose record is missing or was made from something else."""
        inputs = self.inputs(workspace)
        records = {part: workspace.records.read(self, part) for part in inputs}
        return [part for part, record in records.items() if record is None or record.inputs != inputs[part]]

    @abstractmethod
    def run(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, R]:
        """Make these parts, even if they are up to date; returns the records written, by key."""

    def counts(self, workspace: Workspace) -> tuple[str, str] | None:
        """What came in and went out, for the summary of a run; None without a record, or when other stages show it."""
        return None

    def rows(self, record: R) -> int | None:
        """Rows of the log or of samples that a record took, for its cost; None where none are counted."""
        return None

    def notes(self, record: R) -> list[str]:
        """What the user should know of a new record although it stopped nothing."""
        return []

    def shown(self, workspace: Workspace, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What Dagster shows of these parts. It keeps it for ever, out of reach of ``forget``: nothing personal."""
        records = {part: workspace.records.read(self, part) for part in parts}
        return {part: asdict(record) for part, record in records.items() if record is not None}
