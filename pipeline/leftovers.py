"""One command at a time works in a workspace, and clears what a killed one left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from features.builder.build import clear_copies
from features.builder.states import ITEM_AGGREGATES, SAMPLES, STATE, USER_AGGREGATES
from features.delta.maintenance import remove_uncommitted
from features.delta.table import Table
from pipeline.config import Config
from pipeline.runtime import clear_sessions
from pipeline.workspace import exclusive as alone
from pipeline.workspace.creation import remove

DERIVED = (*(f"tables/{name}" for name in (SAMPLES, STATE, USER_AGGREGATES, ITEM_AGGREGATES)), "quarantine")
"""Where corank's own tables lie; anything else beside them may be the user's."""

SCRATCH = ("records/*/*.json.tmp", "reports/*.tmp", "models/.*.tmp", "feast/.registry.db.*.tmp", "skew/*")
"""Patterns below the workspace of what is still being written, before it gets its final name."""


@contextmanager
def exclusive(config: Config) -> Iterator[None]:
    """Hold a workspace alone while the block lasts, cleared of what killed commands left.

    Raises:
        CorankError: another run is working in it.
    """
    with alone(config) as orderly:
        if not orderly:
            clear(config)
        yield


def clear(config: Config) -> None:
    """Remove what a killed command left: nothing that a record, a version of a table or another process refers to.

    Its checkpoints stay, as its training continues from them.
    """
    from pipeline.dag import close_killed_runs

    close_killed_runs(config)
    clear_copies(config.path("tables"))
    for folder in DERIVED:
        remove_uncommitted(Table(folder, config.path(folder)))
    for pattern in SCRATCH:
        for path in config.local_path().glob(pattern):
            if path.parent.name != "serving":  # `corank serve` writes there without holding the workspace alone
                remove(path)
    clear_sessions()
