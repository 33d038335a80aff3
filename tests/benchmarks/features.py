"""The sample builder, the reader and the offline store on synthetic Delta tables: speed, memory, bytes, right answers.

``python -m tests.benchmarks.features [--quick] [--events N] [--data DIR]``: 20 million events in ten daily partitions
unless told. Times of the builder are those of whole builds on Ray, from Delta to committed Delta, into a folder of
their own; --data keeps the generated tables for the next run. --quick: 60,000 events, for correctness: what one
Polars program makes of the same log must be equal row by row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from polars.testing import assert_frame_equal
from rich.console import Console
from rich.table import Table as PrintedTable

from features.batch import RequestBatch, collate, compress
from features.builder.build import build_partitions
from features.builder.states import SAMPLES, STATE
from features.delta.table import STAMP, Table
from features.samples.export import Unnested, flatten, history_column
from features.samples.source import SampleSource
from models.losses import task_losses
from models.registry import build_model
from pipeline.progress import Progress
from pipeline.runtime import LEAST_OBJECT_STORE, RayConfig, ensure_ray, quiet, stop_ray
from pipeline.training.settings import TrainingConfig
from tests.benchmarks.measure import at_least, at_most, print_results
from tests.benchmarks.worlds import SCHEMA, World, WrittenWorld, write_world

FULL, QUICK = 20_000_000, 60_000
PARTS = (8, 4, 2)
"""The growth is measured on an eighth, a quarter, half and all of the events, with as many fewer users."""
CHECKED_UP_TO = 1_000_000
"""Logs of at most so many events are built three times and compared row by row, larger ones are built once."""
FLATTENED_FILES = 60
"""Of a larger sample table so many files (slices of dt and bucket), evenly spread, are flattened."""
ENTITY_ROWS, HISTORICAL_REPEATS = 20_000, 3
TRAINED_BATCHES = 20
"""Steps of the model that the reader is compared with."""
MEBIBYTE = 1 << 20


class Usage:
    """What this process and its Ray workers use while the block runs, sampled four times a second.

    Attributes:
        peak: bytes, the largest sum of resident memory; a page that several processes map counts for each.
        idle: bytes, the same sum before the block.
        seconds: CPU seconds, which other load on the machine changes less than wall time.
    """

    def __enter__(self) -> Usage:
        self.peak, self.seconds = 0, 0.0
        running = _running()
        self.idle = sum(resident for resident, _ in running.values())
        self._before = {pid: seconds for pid, (_, seconds) in running.items()}
        self._latest: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.seconds = sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._latest.items())

    def _sample(self) -> None:
        ended = False
        while not ended:  # once more after the end
            ended = self._ended.wait(0.25)
            now = _running()
            self.peak = max(self.peak, sum(resident for resident, _ in now.values()))
            self._latest |= {pid: seconds for pid, (_, seconds) in now.items()}


def _running() -> dict[int, tuple[int, float]]:
    """Resident bytes and CPU seconds so far of this process and its Ray workers."""
    this, found = psutil.Process(), {}
    for process in [this, *this.children(recursive=True)]:
        with suppress(psutil.Error, IndexError):  # it has just ended
            if process == this or process.cmdline()[0].startswith("ray::"):
                times = process.cpu_times()
                found[process.pid] = process.memory_info().rss, times.user + times.system
    return found


@dataclass
class Bench:
    """What all measurements share."""

    folder: Path
    progress: Progress
    quick: bool
    results: dict[str, float]
    table: PrintedTable

    def repeats(self, world: World) -> int:
        return 3 if world.events <= CHECKED_UP_TO and not self.quick else 1

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A fresh output folder, gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self.folder) as path:
            yield Path(path)

    def build(self, log: WrittenWorld, output: Path, partitions: Sequence[str], what: str) -> float:
        """Seconds to build these partitions; earlier ones are in ``output``."""
        earlier = [one for one in log.world.partitions if one < partitions[0]]
        with self.progress.stage(what) as stage:
            started = time.perf_counter()
            build_partitions(
                log.settings(output),
                partitions,
                earlier,
                log.impressions,
                lambda unit, done, total: stage.say(f"{done}/{total} {unit}"),
            )
            return time.perf_counter() - started

    def write(self, world: World) -> WrittenWorld:
        with self.progress.stage("generate") as stage:
            root = self.folder / f"log-{world.events}"
            log = write_world(world, root, lambda unit, done, total: stage.say(f"{done}/{total} {unit}"))
            stage.say(f"{world.events:,} events, {world.users:,} users, {sum(log.impressions.values()):,} impressions")
            return log

    def report(self, what: str, value: str, remark: str = "", **results: float) -> None:
        self.table.add_row(what, value, remark)
        self.results |= {name: int(one) if one == int(one) else float(f"{one:.4g}") for name, one in results.items()}


def measure_builds(bench: Bench, log: WrittenWorld, output: Path) -> float:
    """The full build beside one Polars process, then single partitions; returns seconds of the full build.

    ``output`` holds the whole sample and state tables afterwards.
    """
    world, repeats = log.world, bench.repeats(log.world)
    ours, polars = [], []
    for repeat in range(repeats):
        shutil.rmtree(output, ignore_errors=True)
        with Usage() as usage:
            seconds = bench.build(log, output, world.partitions, f"full build {repeat + 1}/{repeats}")
        ours.append([seconds, usage.seconds, usage.peak / MEBIBYTE, usage.idle / MEBIBYTE])
        with bench.scratch() as folder:
            polars.append(_one_process(bench, log, folder / "polars"))
            if repeat == 0 and world.events <= CHECKED_UP_TO:
                check_equal(log, output, folder / "polars")
    full, cpu, memory, idle = np.median(ours, axis=0)
    other, other_cpu, other_memory = np.median(polars, axis=0)
    speed, speed_by_cpu = np.median(np.array(polars)[:, :2] / np.array(ours)[:, :2], axis=0)
    bench.report(
        "full build",
        f"{full:.1f} s, {cpu:.1f} CPU s",
        f"{world.events / full:,.0f} events/s",
        full_build_seconds=full,
        full_build_cpu_seconds=cpu,
        full_build_events_per_second=world.events / full,
    )
    bench.report(
        "… in one Polars process, in memory",
        f"{other:.1f} s, {other_cpu:.1f} CPU s",
        f"ours at {speed:.2f}× its speed ({speed_by_cpu:.2f}× by CPU seconds)",
        polars_seconds=other,
        polars_cpu_seconds=other_cpu,
        speed_of_polars=speed,
        speed_of_polars_by_cpu=speed_by_cpu,
    )
    bench.report(
        "peak memory of driver and workers",
        f"{memory:,.0f} MiB",
        f"{idle:,.0f} MiB before the build; one Polars process {other_memory:,.0f} MiB",
        peak_memory_mib=memory,
        idle_memory_mib=idle,
        polars_peak_memory_mib=other_memory,
    )
    total = 0.0
    for name in (SAMPLES, STATE):
        written = sum(file.stat().st_size for file in (output / name).rglob("*.parquet")) / MEBIBYTE
        total += written
        bench.report(f"table {name} on disk", f"{written:,.1f} MiB", **{f"{name}_file_mib": written})
    store = LEAST_OBJECT_STORE / MEBIBYTE
    bench.report(
        "both against Ray's object store",
        f"{total / store:.1f}×",
        f"of {store:.0f} MiB",
        written_of_store=total / store,
    )
    # a partition that is built again reads and writes what a new one does
    early, last = (
        float(np.median([bench.build(log, output, [day], f"partition {day}") for _ in range(1 if bench.quick else 3)]))
        for day in (world.partitions[1], world.partitions[-1])
    )
    bench.report(
        "one new partition, the last",
        f"{last:.1f} s",
        f"{last / full:.2f}× of the full build, {last / early:.2f}× of the second partition",
        new_partition_seconds=last,
        new_partition_of_full_build=last / full,
        last_partition_of_second=last / early,
    )
    return float(full)


def _one_process(bench: Bench, log: WrittenWorld, output: Path) -> list[float]:
    """Seconds (imports left out), CPU seconds and peak resident MiB of the same job in one Polars process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.one_process", str(log.root), str(output)]
    with bench.progress.stage("one Polars process") as stage:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            stage.say("")
            time.sleep(0.2)
        printed = process.communicate()[0].split()
    if process.returncode != 0:
        raise SystemExit(f"the Polars program on {log.root} ended with {process.returncode}; its message is above")
    seconds, cpu, peak = map(float, printed)
    return [seconds, cpu, peak / MEBIBYTE]


def check_equal(log: WrittenWorld, output: Path, other: Path) -> None:
    """Every row of samples and state is what the Polars program wrote, which knows no snapshots of all states.

    Raises:
        AssertionError: some are not.
    """
    for name in (SAMPLES, STATE):
        for partition in log.world.partitions:
            wanted = pl.read_parquet(other / name / f"{partition}.parquet").sort("user_id")
            ours = Table(name, str(output / name)).scan([partition]).drop("dt", "bucket").sort("user_id").collect()
            assert_frame_equal(ours.join(wanted, on="user_id", how="semi", maintain_order="left"), wanted)


def measure_reader(bench: Bench, log: WrittenWorld, output: Path) -> None:
    """Candidates per second out of the sample table, shuffled and ready for a step, beside what ``tiny`` trains at."""
    torch.manual_seed(0)
    source = SampleSource(str(output / SAMPLES), SCHEMA, tuple(log.world.partitions), 0, 2**62)
    options = TrainingConfig()
    budget = options.pace(sys.maxsize).batch_candidates, options.batch_events
    rates: dict[str, float] = {}
    batches: list[RequestBatch] = []
    for name, in_process in (("ray", False), ("in_process", True)):
        with bench.progress.stage(f"read, {name}") as stage:
            read, started = 0, time.perf_counter()
            for rows in source.batches(*budget, seed=0, in_process=in_process):
                batch = compress(collate(rows, SCHEMA))
                read += batch.candidates
                stage.say(f"{read:,} candidates")
                if in_process and len(batches) < TRAINED_BATCHES:
                    batches.append(batch)
            rates[name] = read / (time.perf_counter() - started)
    model = build_model(SCHEMA, "ui-mixformer", "tiny", {}, options.id_dropout)
    optimizers = [
        torch.optim.AdamW(model.dense_parameters()),
        torch.optim.Adagrad(model.inputs.tables.parameters(), lr=0.01),
    ]
    seconds = []
    with bench.progress.stage("train tiny") as stage:
        for number, batch in enumerate(batches):
            started = time.perf_counter()
            loss, weight = task_losses(model(batch), batch.labels, batch.label_mask, batch.weight)
            for optimizer in optimizers:
                optimizer.zero_grad()
            (loss / weight.clamp(min=1)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            seconds.append(time.perf_counter() - started)
            stage.say(f"{number + 1}/{len(batches)} steps")
    trained = float(np.median([batch.candidates / taken for batch, taken in zip(batches, seconds, strict=True)]))
    slower = min(rates.values())
    bench.report(
        "reading samples on Ray, in one process",
        f"{rates['ray']:,.0f}, {rates['in_process']:,.0f} /s",
        f"candidates; a step of tiny takes {trained:,.0f} /s: reading is {slower / trained:.1f}× as fast",
        read_on_ray_candidates_per_second=rates["ray"],
        read_in_process_candidates_per_second=rates["in_process"],
        trained_candidates_per_second=trained,
        read_over_trained=slower / trained,
    )


def measure_growth(bench: Bench, world: World, full: float) -> None:
    """Exponent of seconds over events, least squares in log-log."""
    sizes, seconds = [world.events], [full]
    for part in PARTS[:1] if bench.quick else PARTS:
        log, times = bench.write(replace(world, events=world.events // part)), []
        for _ in range(bench.repeats(log.world)):
            with bench.scratch() as output:
                times.append(bench.build(log, output, world.partitions, f"1/{part} of the events"))
        sizes.append(log.world.events)
        seconds.append(float(np.median(times)))
    exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    pairs = sorted(zip(sizes, seconds, strict=True))
    bench.report(
        "time ∝ events^exponent",
        f"{exponent:.2f}",
        "; ".join(f"{size:,}: {value:.1f} s" for size, value in pairs),
        growth_exponent=exponent,
        **{f"seconds_of_{size}": value for size, value in pairs},
    )


def measure_bytes(bench: Bench, output: Path) -> None:
    """The sample table's files against one row per candidate that carries its visible history, in three orders."""
    sizes = {"samples": 0, "samples_zstd": 0, "flat": 0, "flat_zstd": 0, "log_order_zstd": 0, "shuffled_zstd": 0}
    random = np.random.default_rng(0)
    candidates = visible = 0
    files = sorted(Path(uri) for uri in Table(SAMPLES, str(output / SAMPLES)).delta().file_uris())
    files = files[:: -(-len(files) // FLATTENED_FILES)]
    with bench.progress.stage("flatten") as stage:
        for done, file in enumerate(files, start=1):
            rows = pq.read_table(file, partitioning=None)
            samples = Unnested.of(rows)
            export = flatten(samples, SCHEMA, 0, len(samples.candidates))
            sizes["samples"] += rows.nbytes
            sizes["samples_zstd"] += file.stat().st_size
            sizes["flat"] += export.nbytes
            sizes["flat_zstd"] += _zstd_bytes(export)
            sizes["log_order_zstd"] += _zstd_bytes(export.sort_by("ts"))
            sizes["shuffled_zstd"] += _zstd_bytes(export.take(pa.array(random.permutation(export.num_rows))))
            candidates += export.num_rows
            visible += sum(
                pc.sum(pc.list_value_length(export[history_column(one, None)])).as_py() for one in SCHEMA.sequences
            )
            stage.say(f"{done}/{len(files)} files")
    bench.report("visible events of a candidate", f"{visible / candidates:.0f}", visible_events=visible / candidates)
    for metric, what, small, large in (
        ("arrow", "in Arrow memory", "samples", "flat"),
        ("parquet", "as zstd Parquet, by user", "samples_zstd", "flat_zstd"),
        ("parquet_in_log_order", "as zstd Parquet, in the log's order of time", "samples_zstd", "log_order_zstd"),
        ("parquet_shuffled", "as zstd Parquet, shuffled", "samples_zstd", "shuffled_zstd"),
    ):
        bench.report(
            f"samples against one row per candidate, {what}",
            f"{sizes[small] / MEBIBYTE:,.1f} → {sizes[large] / MEBIBYTE:,.1f} MiB",
            f"{sizes[large] / sizes[small]:.1f}×",
            **{f"flattened_over_samples_{metric}": sizes[large] / sizes[small]},
        )


def _zstd_bytes(rows: pa.Table) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    return int(sink.tell())


def measure_historical_features(bench: Bench, log: WrittenWorld) -> None:
    """``get_historical_features`` of our store and of Feast's Dask store, judged by pandas ``merge_asof``."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64, String

    from features.store.delta import EVENT_TIMESTAMP, DeltaSource

    users = log.tables["users"].scan().collect()
    random = np.random.default_rng(0)
    start, days = int(users.select(pl.col("updated_at").min()).item()), log.world.days + 1
    hours = start + random.integers(0, days * 24, ENTITY_ROWS) * 3_600_000_000
    entities = pd.DataFrame(
        {
            # a tenth of the users in half of the rows, at whole hours: the same user and time comes again
            "user_id": "u" + pd.Series(_repeated(random, log.world.users)).astype(str),
            EVENT_TIMESTAMP: pd.to_datetime(hours, unit="us", utc=True).as_unit("us"),
            "row": np.arange(ENTITY_ROWS),
        }
    )
    stamped = users.with_columns(pl.col("updated_at").cast(STAMP).alias(EVENT_TIMESTAMP))
    right = pd.merge_asof(
        entities.sort_values(EVENT_TIMESTAMP, kind="stable"),
        stamped.drop("updated_at").sort(EVENT_TIMESTAMP).to_pandas(),
        on=EVENT_TIMESTAMP,
        by="user_id",
    ).set_index("row")[["age", "country"]]
    with bench.scratch() as folder:
        stamped.write_parquet(folder / "users.parquet")
        user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
        schema = [
            Field(name="user_id", dtype=String),
            Field(name="age", dtype=Float64),
            Field(name="country", dtype=String),
        ]
        sources = {
            "delta": (
                "features.store.delta.DeltaOfflineStore",
                DeltaSource(name="users", uri=str(log.root / "users"), clock="updated_at"),
            ),
            "dask": (
                "dask",
                FileSource(name="users", path=str(folder / "users.parquet"), timestamp_field=EVENT_TIMESTAMP),
            ),
        }
        stores: dict[str, FeatureStore] = {}
        for name, (offline, source) in sources.items():
            stores[name] = FeatureStore(
                config=RepoConfig(
                    project="bench",
                    provider="local",
                    registry=str(folder / f"{name}.db"),
                    offline_store={"type": offline},
                    online_store={"type": "sqlite", "path": str(folder / f"{name}-online.db")},
                    entity_key_serialization_version=3,
                )
            )
            stores[name].apply([user, FeatureView(name="user_features", entities=[user], schema=schema, source=source)])
        wanted = ["user_features:age", "user_features:country"]
        for name, store in stores.items():
            seconds: list[float] = []
            with bench.progress.stage(f"historical features, {name}") as stage:
                for repeat in range(HISTORICAL_REPEATS):
                    stage.say(f"{repeat}/{HISTORICAL_REPEATS}")
                    started = time.perf_counter()
                    found = store.get_historical_features(entities.copy(), wanted).to_df()
                    seconds.append(time.perf_counter() - started)
            correct, taken = _right_rows(found, right), float(np.median(seconds))
            bench.report(
                f"historical features, {'our Delta store' if name == 'delta' else 'Feast on Dask'}",
                f"{taken:.2f} s",
                f"{correct:,} of {ENTITY_ROWS:,} rows right, {len(found):,} returned",
                **{f"historical_{name}_seconds": taken, f"historical_{name}_rows_right": correct},
            )


def _repeated(random: np.random.Generator, users: int) -> np.ndarray:
    few = random.random(ENTITY_ROWS) < 0.5
    return np.where(few, random.integers(0, max(1, users // 10), ENTITY_ROWS), random.integers(0, users, ENTITY_ROWS))


def _right_rows(found: pd.DataFrame, right: pd.DataFrame) -> int:
    """Entity rows that came back exactly once and with the right values."""
    once = found.drop_duplicates("row", keep=False).set_index("row")
    expected = right.loc[once.index]
    same = [(once[name] == expected[name]) | (once[name].isna() & expected[name].isna()) for name in expected]
    return int(np.logical_and.reduce(same).sum())


def goals(results: dict[str, float]) -> dict[str, Any]:
    """The goals of the full run."""
    return {
        "speed_of_polars": at_least(0.5, results.get("speed_of_polars")),
        "growth_exponent": at_most(1.1, results.get("growth_exponent")),
        "written_of_store": at_least(3, results.get("written_of_store")),
        "read_over_trained": at_least(3, results.get("read_over_trained")),
        "flattened_over_samples_arrow": at_least(10, results.get("flattened_over_samples_arrow")),
        "flattened_over_samples_parquet": at_least(4, results.get("flattened_over_samples_parquet")),
        "historical_delta_rows_right": at_least(ENTITY_ROWS, results.get("historical_delta_rows_right")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} events: for correctness, not for speed")
    parser.add_argument("--events", type=int, default=None, help=f"events of the whole log (default {FULL:,})")
    parser.add_argument("--data", type=Path, default=None, help="keep the generated tables here and use them again")
    options = parser.parse_args()
    quiet()
    world = World(options.events or FULL)
    if options.quick:
        world = World(options.events or QUICK, items=5_000, days=4, buckets=4)
    table = PrintedTable("what", "value", "", title=f"{world.events:,} events, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, Progress(), options.quick, {}, table)
        try:
            log = bench.write(world)
            measure_historical_features(bench, log)
            ensure_ray(RayConfig(num_cpus=os.cpu_count(), object_store_memory=LEAST_OBJECT_STORE))
            with bench.scratch() as output:  # the workers' imports are paid once, before anything is measured
                bench.build(log, output, world.partitions[:1], "warm-up")
            with bench.scratch() as output:
                full = measure_builds(bench, log, output)
                measure_reader(bench, log, output)
                measure_bytes(bench, output)
            measure_growth(bench, world, full)
        finally:
            stop_ray()
            Console(width=150).print(table)  # what was measured before an interrupt is not lost
    print_results("features", bench.results, goals({} if options.quick else bench.results))


if __name__ == "__main__":
    main()
