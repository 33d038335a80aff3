"""Speed of training steps: how samples are fed, in what precision, by how many workers, over how large tables.

``python -m tests.benchmarks.training [--quick]`` on ``import synthetic``:

* feeding: steps of the same candidates as the sample table has them (timelines shared by requests, requests by
  candidates), and with every candidate as a row of its own, reading included;
* precision: float32 and bfloat16;
* workers: one process of two threads, and two processes of one thread over gloo, with the dense gradients of the step
  and with those of the step before;
* tables: a step at 1e5, 1e6 and 1e7 rows of the item table, with the weight average.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from rich.console import Console
from rich.table import Table

from features.batch import collate, compress
from features.sample_table import candidate_counts
from models.losses import task_losses
from models.memory import keep_freed_memory
from pipeline.importers.synthetic import import_synthetic
from pipeline.progress import Progress
from pipeline.runtime import quiet, stop_ray
from pipeline.stages.samples import FOREVER, SAMPLES, sample_source
from pipeline.stages.validated import VALIDATED
from pipeline.training.epochs import ahead
from pipeline.training.job import TrainingJob, initial_model
from pipeline.training.steps import Trainer
from pipeline.workspace import Workspace
from tests.benchmarks.measure import at_least, at_most, print_results
from tests.models.unshared import unshared
from tests.pipeline.workspaces import load

EXAMPLE_MODEL = {"name": "ui-mixformer", "preset": "tiny"}


@dataclass(frozen=True)
class Size:
    """Of the log, and steps that are timed; ``repeats`` of every comparison."""

    users: int
    items: int
    days: int
    steps: int
    repeats: int
    rows: tuple[int, ...]


FULL = Size(users=3_000, items=1_000, days=5, steps=25, repeats=3, rows=(10**5, 10**6, 10**7))
QUICK = Size(users=80, items=60, days=2, steps=2, repeats=1, rows=(10**3, 10**4))


def make_job(folder: Path, size: Size) -> TrainingJob:
    """The example's model on an imported log."""
    import_synthetic(folder / "data", size.days, size.users, size.items, 3, "2026-01-05", 2, say=lambda _: None)
    config = load(folder, folder / "data", model=EXAMPLE_MODEL, training={"num_workers": 0})
    workspace = Workspace(config, Progress())
    VALIDATED.run(workspace, workspace.partitions)
    SAMPLES.run(workspace, workspace.partitions)
    options = config.training
    return TrainingJob(
        name="benchmark",
        schema=config.schema_,
        model=config.model,
        training=options,
        pace=options.pace(10**6),
        train=sample_source(workspace, 0, FOREVER),
        validation=None,
        statistics={},
        gate_task=config.gate_task,
    )


def trainer_of(job: TrainingJob, rank: int = 0, world: int = 1) -> Trainer:
    return Trainer(job, initial_model(job).train(), rank, world, torch.device("cpu"))


def batches(job: TrainingJob, seed: int) -> Iterator[pa.Table]:
    while True:  # a small log is gone through again
        yield from job.train.batches(job.pace.batch_candidates, job.training.batch_events, seed, in_process=True)


def timed(job: TrainingJob, steps: int, seed: int, rank: int = 0, world: int = 1) -> tuple[float, float]:
    """Candidates per second of whole steps, reading included, and the share of time that they waited for rows."""
    trainer, reader = trainer_of(job, rank, world), ahead(batches(job, seed))
    trainer.step(next(reader))
    candidates, waited, started = 0, 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        rows = next(reader)
        waited += time.perf_counter() - asked
        trainer.step(rows)
        candidates += candidate_counts(rows)["candidates"]
    seconds = time.perf_counter() - started
    reader.close()  # type: ignore[attr-defined]
    return candidates / seconds, waited / seconds


def timed_apart(job: TrainingJob, steps: int, seed: int) -> float:
    """Candidates per second where each is a row of its own; some of a step's, as they are many times slower."""
    trainer, reader = trainer_of(job), batches(job, seed)
    candidates, seconds = 0, 0.0
    for number in range(steps + 1):
        started = time.perf_counter()
        batch = collate(next(reader), job.schema)
        some = unshared(batch, job.schema, torch.randperm(batch.candidates)[:150])
        for parameter in trainer.model.parameters():
            parameter.grad = None
        loss, _ = task_losses(trainer.model(compress(some)), some.labels, some.label_mask, some.weight)
        loss.sum().backward()
        trainer.gradients.exchange()
        trainer._update(dense=True)
        if number:
            seconds += time.perf_counter() - started
            candidates += some.candidates
    return candidates / seconds


def worker(rank: int, world: int, folder: str, job: TrainingJob, steps: int, seed: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    rate, _ = timed(job, steps, seed, rank, world)
    if rank == 0:
        Path(folder, "rate").write_text(str(rate))
    dist.destroy_process_group()


def by_two(job: TrainingJob, steps: int, seed: int) -> float:
    """Candidates per second of two processes together."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(worker, (2, folder, job, steps, seed), nprocs=2)
        return float(Path(folder, "rate").read_text())


def step_seconds(job: TrainingJob, rows: int, steps: int) -> float:
    """Median seconds of a step where the item table has so many rows."""
    fields = [
        feature.model_copy(update={"buckets": rows}) if feature.embedding == "item_id" else feature
        for feature in job.schema.features
    ]
    sequences = [
        sequence.model_copy(
            update={
                "fields": tuple(
                    field.model_copy(update={"buckets": rows}) if field.embedding == "item_id" else field
                    for field in sequence.fields
                )
            }
        )
        for sequence in job.schema.sequences
    ]
    schema = job.schema.model_copy(update={"features": tuple(fields), "sequences": tuple(sequences)})
    large = replace(job, schema=schema, train=replace(job.train, schema=schema))
    trainer, reader, seconds = trainer_of(large), batches(large, 1), []
    for number in range(steps + 2):
        part = next(reader)
        started = time.perf_counter()
        trainer.step(part)
        if number > 1:
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small log: for correctness, not for speed")
    quick = parser.parse_args().quick
    size = QUICK if quick else FULL
    quiet()
    keep_freed_memory()
    torch.set_num_threads(os.cpu_count() or 1)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            job = make_job(Path(folder), size)
        finally:
            stop_ray()
        low = replace(job, training=job.training.model_copy(update={"precision": "bfloat16"}))
        stale = replace(job, training=job.training.model_copy(update={"stale_gradients": True}))
        measured: dict[str, Callable[[int], Any]] = {
            "shared": lambda seed: timed(job, size.steps, seed),
            "impressions": lambda seed: timed_apart(job, max(size.steps // 5, 1), seed),
            "bfloat16": lambda seed: timed(low, size.steps, seed)[0],
            "two_workers": lambda seed: by_two(job, size.steps, seed),
            "two_workers_stale": lambda seed: by_two(stale, size.steps, seed),
        }
        for repeat in range(size.repeats):
            for name, measure in measured.items():
                value = measure(repeat)
                if isinstance(value, tuple):
                    found.setdefault("waiting", []).append(value[1])
                    value = value[0]
                found.setdefault(name, []).append(value)
        seconds = {rows: step_seconds(job, rows, size.steps) for rows in size.rows}
    rates = {name: np.array(values) for name, values in found.items()}

    def times(name: str, base: str) -> float:
        return float(np.median(rates[name] / rates[base]))

    smallest, largest = size.rows[0], size.rows[-1]
    results = {f"{name}_candidates_per_second": round(float(np.median(rates[name])), 1) for name in measured}
    results["waiting_share"] = round(float(np.median(rates["waiting"])), 4)
    results |= {f"step_ms_at_{rows}_rows": round(1e3 * value, 2) for rows, value in seconds.items()}
    ratios = {
        "shared_over_impressions": at_least(12.0, None if quick else round(times("shared", "impressions"), 2)),
        "waiting_share": at_most(0.05, None if quick else results["waiting_share"]),
        "two_workers_over_one": at_least(0.9, None if quick else round(times("two_workers", "shared"), 3)),
        "largest_table_over_smallest": at_most(1.1, None if quick else round(seconds[largest] / seconds[smallest], 3)),
        "shared_candidates_per_second": at_least(12_900.0, None if quick else results["shared_candidates_per_second"]),
    }
    table = Table("what", "value", title="training")
    for name, value in results.items():
        table.add_row(name, f"{value:,}")
    for name, goal in ratios.items():
        table.add_row(name, f"{goal['value']} ({goal['goal']})")
    Console().print(table)
    print_results("training", results, ratios)


if __name__ == "__main__":
    main()
