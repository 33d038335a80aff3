"""A long log of small partitions, as a shop has it: seconds to validate and to build it.

``python -m tests.benchmarks.longlog [--quick] [--data DIR]``: 304 days with 1.5 million impressions and as many events
in two buckets, counted features of every side, and the same rows in ten days beside it, in the same run: what it costs
that a log has many partitions. --data keeps the generated tables for the next run. --quick: 14 small days. What is
built together is compared, row by row, with what is built day by day.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from polars.testing import assert_frame_equal
from rich.console import Console
from rich.table import Table as PrintedTable

from features.builder.build import build_partitions
from features.builder.states import ITEM_AGGREGATES, SAMPLES, STATE, USER_AGGREGATES, BuildSettings
from features.schema import Aggregate, EventField, Feature, Sequence
from features.validation import PartitionValidation, ValidationRules, validate_partitions
from pipeline.progress import Progress
from pipeline.runtime import LEAST_OBJECT_STORE, RayConfig, ensure_ray, quiet, stop_ray
from pipeline.stages.samples import RUN_PARTITIONS
from tests.benchmarks.measure import at_most, print_results
from tests.benchmarks.worlds import PARTITIONED, SCHEMA, World, WrittenWorld, write_world

FULL = World(1_500_000, items=20_000, days=304, buckets=2, events_per_impression=1)
QUICK = World(6_000, items=500, days=14, buckets=2, events_per_impression=1)
FEW = 10
"""Days of the log beside it."""
CHECKED = 3
"""Newest partitions that are built one by one, too."""
OWNERS = {SAMPLES: "user_id", STATE: "user_id", USER_AGGREGATES: "user_id", ITEM_AGGREGATES: "item_id"}

SHOP = SCHEMA.model_copy(
    update={
        "features": (
            *SCHEMA.features,
            Feature(
                name="clicked", side="item", aggregate=Aggregate(function="rate", column="click", window=8, prior=0.1)
            ),
            Feature(name="shown", side="item", scale="log", aggregate=Aggregate()),
            Feature(name="seen", side="user", scale="log", aggregate=Aggregate(of="events", window=28)),
            Feature(name="seconds", side="user", aggregate=Aggregate(of="events", function="mean", column="seconds")),
            Feature(
                name="category_clicked",
                side="cross",
                aggregate=Aggregate(function="rate", column="click", key="category", window=30, prior=0.1),
            ),
            Feature(name="item_seen", side="cross", aggregate=Aggregate(of="events", key="item_id", window=60)),
        ),
        "sequences": (
            *SCHEMA.sequences,
            Sequence(
                name="long",
                events="events",
                where="seconds > 60",
                length=64,
                fields=(
                    EventField(name="item_id", buckets=100_000),
                    EventField(name="price", of="item", kind="number"),
                ),
            ),
        ),
    }
)
"""The benchmark's features with counts of every side, and a second sequence."""


def build(log: WrittenWorld, output: Path, runs: list[list[str]], progress: Progress, what: str) -> float:
    """Seconds to build these runs of partitions, one after the other; earlier ones are in ``output``."""
    settings, days = settings_of(log, output), log.world.partitions
    with progress.stage(what) as stage:
        started = time.perf_counter()
        for run in runs:
            said = f", partitions {run[0]} … {run[-1]}"
            build_partitions(
                settings,
                run,
                days[: days.index(run[0])],
                log.impressions,
                lambda unit, done, total, said=said: stage.say(f"{done}/{total} {unit}{said}"),
            )
        return time.perf_counter() - started


def settings_of(log: WrittenWorld, output: Path) -> BuildSettings:
    return replace(log.settings(output), schema=SHOP)


def validate(log: WrittenWorld, output: Path, progress: Progress) -> float:
    """Seconds to validate all partitions, the import of Great Expectations included.

    Raises:
        AssertionError: one did not pass.
    """
    tables = {role: replace(table, grain="day" if role in PARTITIONED else None) for role, table in log.tables.items()}
    with progress.stage("validate") as stage:
        started = time.perf_counter()

        def said(result: PartitionValidation) -> None:
            stage.say(result.partition)

        rules, root = ValidationRules(), str(output / "quarantine")
        results, _ = validate_partitions(
            tables, SHOP, log.world.partitions, "day", rules, output / "gx", root, 2**60, said
        )
        assert all(result.passed for result in results)
        return time.perf_counter() - started


def check_equal(log: WrittenWorld, output: Path, again: Path) -> None:
    """The newest partitions are what they are when each is built by itself.

    Raises:
        AssertionError: a row differs.
    """
    newest = log.world.partitions[-CHECKED:]
    for name, owner in OWNERS.items():
        ours, theirs = (
            settings_of(log, root).table(name).scan(newest).drop("bucket").collect().sort("dt", owner)
            for root in (output, again)
        )
        assert_frame_equal(ours, theirs, check_exact=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="14 small days: for correctness, not for speed")
    parser.add_argument("--data", type=Path, default=None, help="keep the generated tables here and use them again")
    options = parser.parse_args()
    quiet()
    progress, world = Progress(), QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as temporary:
        folder, scratch = options.data or Path(temporary), Path(temporary)
        with progress.stage("generate") as stage:
            long, few = (
                write_world(
                    one, folder / f"log-{one.days}", lambda unit, done, total: stage.say(f"{done}/{total} {unit}")
                )
                for one in (world, replace(world, days=FEW))
            )
        days = world.partitions
        runs = [days[first : first + RUN_PARTITIONS] for first in range(0, len(days), RUN_PARTITIONS)]
        validated = validate(long, scratch / "validated", progress)
        try:
            ensure_ray(RayConfig(num_cpus=os.cpu_count(), object_store_memory=LEAST_OBJECT_STORE))
            build(few, scratch / "warm-up", [few.world.partitions[:1]], progress, "warm-up")
            of_long = build(long, scratch / "long", runs, progress, f"build {len(days)} days")
            of_few = build(few, scratch / "few", [few.world.partitions], progress, f"build {FEW} days")
            shutil.copytree(scratch / "long", scratch / "again")
            build(long, scratch / "again", [[day] for day in days[-CHECKED:]], progress, "build day by day")
            check_equal(long, scratch / "long", scratch / "again")
        finally:
            stop_ray()
    rows = sum(long.impressions.values())
    table = PrintedTable("what", "value", "", title=f"{len(days)} days, {rows:,} impressions, {os.cpu_count()} cores")
    table.add_row("validate", f"{validated:.1f} s", f"{rows / validated:,.0f} impressions/s")
    table.add_row("build", f"{of_long:.1f} s", f"{rows / of_long:,.0f} impressions/s")
    table.add_row(
        f"… the same rows in {FEW} days", f"{of_few:.1f} s", f"many days take {of_long / of_few:.1f}× as long"
    )
    Console(width=150).print(table)
    results = {
        "validation_seconds": round(validated, 2),
        "build_seconds": round(of_long, 2),
        "few_days_seconds": round(of_few, 2),
        "long_over_few": round(of_long / of_few, 2),
    }
    measured = {} if options.quick else results
    goals = {
        "build_seconds": at_most(40, measured.get("build_seconds")),
        "validation_seconds": at_most(15, measured.get("validation_seconds")),
    }
    print_results("longlog", results, goals)


if __name__ == "__main__":
    main()
