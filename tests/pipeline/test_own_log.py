"""A file of the user's own log is damaged while samples are built from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from features.builder.build import build_partitions
from features.delta.table import Table
from features.errors import UnreadableError
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.stages.samples import SAMPLES, build_settings
from pipeline.stages.validated import VALIDATED
from pipeline.workspace import Workspace
from tests.damages import halve, lose
from tests.pipeline.workspaces import START, load

DAYS = [START, "2026-01-06"]


def garble(path: Path) -> None:
    """Other bytes in the first columns; size and footer stay, so that the file opens."""
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(len(content) // 2 - 4) + content[len(content) // 2 :])


class BeforeUsersAreFolded:
    """The progress of a build, in whose middle something is done: items are counted then."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do, self.done = do, False

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == "shares of items" and done == total:
            self.do()
            self.done = True


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_file_of_the_log_damaged_in_the_middle_of_a_build_is_named_and_the_build_goes_on_when_it_is_back(
    tmp_path: Path, local_ray: None
) -> None:
    import_synthetic(tmp_path / "data", days=2, users=20, items=20, seed=1, start=START, buckets=2, say=lambda _: None)

    def built(name: str) -> tuple[Workspace, Table]:
        """A workspace in which both days are validated and the first one is built, and its samples."""
        config = load(tmp_path / name, tmp_path / "data")
        workspace = Workspace(config, Progress())
        VALIDATED.run(workspace, DAYS)
        SAMPLES.run(workspace, DAYS[:1])
        return workspace, Table("samples", config.path("tables", "samples"))

    def rows(table: Table) -> pl.DataFrame:
        return table.scan().collect().sort("dt", "user_id")

    undisturbed, expected = built("a")
    SAMPLES.run(undisturbed, DAYS[1:])
    workspace, samples = built("b")
    before, shown = rows(samples), VALIDATED.shown(workspace, DAYS[1:])[DAYS[1]]["rows"]["impressions"]
    for role, damage in (("impressions", lose), ("watches", halve), ("impressions", garble)):
        file = sorted(Path(workspace.config.table(role).uri).glob(f"dt={DAYS[1]}/*/*.parquet"))[-1]
        content, damaging = file.read_bytes(), BeforeUsersAreFolded(partial(damage, file))
        place = rf"table {role}, partition {DAYS[1]}: file {re.escape(str(file))} .*; restore the files"
        with pytest.raises(UnreadableError, match=place):
            build_partitions(build_settings(workspace), DAYS[1:], DAYS[:1], {DAYS[1]: shown}, damaging)
        assert damaging.done
        assert rows(samples).equals(before)
        assert SAMPLES.stale(workspace) == DAYS[1:]
        file.write_bytes(content)
    SAMPLES.run(workspace, DAYS[1:])
    assert rows(samples).equals(rows(expected))
