"""Training on Ray Train: a global step is a list of rows cut by a budget and dealt to the workers.

Every worker streams the same seeded order (Ray Data, order kept; a single one on the CPU reads by itself) and takes its
share of each step; losses are normalised by the global weight. So the number of workers changes speed, and the draw of
dropout, but neither the steps nor their rows. A killed run continues from its last epoch.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from features.batch import RequestBatch, collate, compress
from features.errors import CorankError
from features.reader import READ_CPUS, SampleSource
from features.schema import Schema
from models.losses import task_losses
from models.memory import keep_freed_memory
from models.metrics import auc, task_metrics
from models.protocol import RankingModel
from models.registry import build_model
from pipeline.config import ModelConfig, TrainingConfig


@dataclass(frozen=True)
class TrainingJob:
    """Everything a worker needs; picklable.

    Attributes:
        name: names the run and its checkpoints; the same job always has the same name.
        statistics: mean and deviation of every number's embedding.
        warm_start: weights to begin with, or None.
    """

    name: str
    schema: Schema
    model: ModelConfig
    training: TrainingConfig
    train: SampleSource
    validation: SampleSource
    statistics: Mapping[str, tuple[float, float]]
    gate_task: str
    warm_start: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class TrainingResult:
    """The best epoch's model and the metrics of every epoch."""

    model: RankingModel
    history: list[dict[str, float]]


def number_statistics(source: SampleSource) -> dict[str, tuple[float, float]]:
    """Mean and deviation of every number over the training rows, by embedding; one pass on Ray Data."""
    fields = {field.embedding for field in source.schema.all_fields() if field.kind == "number"}
    if not fields or not source.files():
        return dict.fromkeys(fields, (0.0, 1.0))
    sums = source.dataset().map_batches(_NumberSums(source.schema), batch_size=None, batch_format="pyarrow")
    total: dict[str, np.ndarray] = {name: np.zeros(3) for name in fields}
    for row in sums.iter_rows():
        total[row["field"]] += (row["count"], row["sum"], row["squares"])
    statistics = {}
    for name, (count, first, squares) in total.items():
        mean = first / max(count, 1)
        deviation = math.sqrt(max(squares / max(count, 1) - mean * mean, 0.0))
        statistics[name] = (float(mean), deviation or 1.0)
    return statistics


class _NumberSums:
    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def __call__(self, rows: pa.Table) -> pa.Table:
        columns: dict[str, list[Any]] = {"field": [], "count": [], "sum": [], "squares": []}
        if rows.num_rows:
            batch = collate(rows, self.schema)
            sources = [(feature, batch.users.fields) for feature in self.schema.user_side]
            sources += [(feature, batch.items.fields) for feature in self.schema.item_side]
            values = [(field.embedding, fields[field.name]) for field, fields in sources if field.kind == "number"]
            values += [
                (field.embedding, batch.timelines[sequence.name].fields[field.name])
                for sequence in self.schema.sequences
                for field in sequence.fields
                if field.kind == "number"
            ]
            for name, value in values:
                assert isinstance(value, Tensor)
                known = value[~value.isnan()].double()
                for key, entry in zip(
                    columns, (name, len(known), float(known.sum()), float((known * known).sum())), strict=True
                ):
                    columns[key].append(entry)
        types = pa.schema(
            [("field", pa.string()), ("count", pa.int64()), ("sum", pa.float64()), ("squares", pa.float64())]
        )
        return pa.table(columns, schema=types)


def initial_model(job: TrainingJob) -> RankingModel:
    """The model before the first step: seeded, with the number statistics, or the warm start's weights."""
    torch.manual_seed(job.training.seed)
    chosen = job.model
    try:
        model = build_model(job.schema, chosen.name, chosen.preset, chosen.overrides, job.training.id_dropout)
    except ValueError as error:
        raise CorankError(f"model: {error}") from None
    for name, (mean, deviation) in job.statistics.items():
        model.inputs.numbers[name].mean.fill_(mean)  # type: ignore[operator,union-attr]
        model.inputs.numbers[name].deviation.fill_(deviation)  # type: ignore[operator,union-attr]
    if job.warm_start is not None:
        model.load_state_dict(dict(job.warm_start))
    return model


def train(
    job: TrainingJob, storage: str, progress: Callable[[Mapping[str, Any]], None], elastic: bool = False
) -> TrainingResult:
    """Train on Ray Train and return the best epoch's model.

    Args:
        storage: folder or s3:// prefix of the checkpoints.
        progress: called with every report of the first worker.
        elastic: the cluster grows on demand, so what is free now says nothing.
    """
    import ray.train
    import ray.train.torch
    from ray.util.queue import Queue

    model = initial_model(job)  # what cannot be built fails here, not in every worker
    options = job.training
    reports = Queue(actor_options={"num_cpus": 0})
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"job": job, "reports": reports},
        scaling_config=ray.train.ScalingConfig(
            num_workers=options.num_workers,
            use_gpu=options.use_gpu,
            resources_per_worker={"CPU": _reserved_cpus(options, elastic)} | ({"GPU": 1} if options.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=2),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    running = ray.remote(num_cpus=0, max_retries=0)(_fit).remote(trainer)
    try:
        while not ray.wait([running], timeout=0)[0]:
            try:
                progress(reports.get(timeout=0.5))
            except Empty:
                continue
    finally:
        reports.shutdown(force=True)
    checkpoint = ray.get(running)
    if checkpoint is None:
        raise CorankError(f"training {job.name} ended without a checkpoint in {storage}; run again to continue it")
    with checkpoint.as_directory() as directory:
        state = torch.load(Path(directory) / "state.pt", weights_only=True)
    model.load_state_dict(state["best"])
    return TrainingResult(model.eval(), state["history"])


def _fit(trainer: Any) -> Any:
    """Run the trainer in a Ray task, which ends with Ray.

    In the driver's main thread it would take over Ctrl-C and keep it; in another thread of the driver it may reach
    for Ray after an interrupt has stopped it, and Ray then starts anew and waits for ever. Here, too, it would keep it,
    and no later task of this process could be cancelled.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit().checkpoint
    finally:
        signal.signal(signal.SIGINT, before)


def _reserved_cpus(options: TrainingConfig, elastic: bool) -> float:
    """CPUs to set aside per worker, so that the tasks that feed it always find room: else both wait for ever."""
    import ray

    wanted = options.cpus_per_worker
    if elastic:
        return wanted
    free = ray.available_resources().get("CPU", 0.0)
    return max(min(wanted, (free - 2 * READ_CPUS) / options.num_workers), 0.01)


def _worker(config: dict[str, Any]) -> None:
    """Train on this worker's share of every global step; report and checkpoint every epoch."""
    import ray.train
    import ray.train.torch

    job: TrainingJob = config["job"]
    options = job.training
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    # the batches are the same; a plan of Ray Data takes seconds to start, twice an epoch
    in_process = world == 1 and device.type == "cpu"
    # Ray gives a worker as many threads as CPUs it reserves; the data tasks leave the others idle most of the time
    keep_freed_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    own = initial_model(job).to(device)
    model: nn.Module = ray.train.torch.prepare_model(own) if world > 1 else own
    dense, embeddings = split_parameters(own)
    optimizers = [
        torch.optim.AdamW(dense, lr=options.learning_rate, weight_decay=options.weight_decay),
        torch.optim.Adagrad(embeddings, lr=options.embedding_learning_rate, eps=1e-8),
    ]
    averaged = AveragedModel(own, multi_avg_fn=get_ema_multi_avg_fn(options.average)) if options.average else None
    weights = torch.tensor([task.weight for task in job.schema.tasks], device=device)
    state: dict[str, Any] = {"epoch": 0, "step": 0, "best": None, "best_auc": -math.inf, "history": []}
    resumed = ray.train.get_checkpoint()
    if resumed is not None:
        with resumed.as_directory() as directory:
            state = torch.load(Path(directory) / "state.pt", weights_only=True)
        own.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
    for epoch in range(state["epoch"], options.epochs):
        torch.manual_seed(options.seed * 1_000_003 + epoch * world + rank)
        own.train()
        seen, loss_sum, steps = 0, 0.0, 0
        seed = options.seed * 1_000_003 + epoch
        for rows in job.train.batches(options.batch_candidates, options.batch_events, seed, in_process=in_process):
            loss, count = _step(job, model, rows, rank, world, device, weights)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(dense, options.clip_norm)
            state["step"] += 1
            warm = min(1.0, state["step"] / max(options.warmup_steps, 1))
            for optimizer, rate in zip(
                optimizers, (options.learning_rate, options.embedding_learning_rate), strict=True
            ):
                for group in optimizer.param_groups:
                    group["lr"] = rate * warm
                optimizer.step()
            if averaged is not None:
                averaged.update_parameters(own)
            seen, loss_sum, steps = seen + count, loss_sum + float(loss.detach()), steps + 1
            if rank == 0 and steps % 10 == 0:
                config["reports"].put({"epoch": epoch + 1, "candidates": seen})
        published: RankingModel = averaged.module if averaged is not None else own
        metrics = _validate(job, published, device, in_process) if rank == 0 else {}
        metrics = {"epoch": epoch + 1, "loss": loss_sum / max(steps, 1), "candidates": seen, **metrics}
        state["history"].append(metrics)
        score = metrics.get(f"{job.gate_task}_auc", 0.0)
        if state["best"] is None or score > state["best_auc"]:
            state["best_auc"] = score
            state["best"] = {name: value.detach().cpu().clone() for name, value in published.state_dict().items()}
        state["epoch"] = epoch + 1
        state["model"] = own.state_dict()
        state["averaged"] = averaged.state_dict() if averaged is not None else None
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        if rank == 0:
            config["reports"].put(metrics)
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = None
            if rank == 0:
                torch.save(state, Path(directory) / "state.pt")
                checkpoint = ray.train.Checkpoint.from_directory(directory)
            ray.train.report(metrics, checkpoint=checkpoint)


def _step(
    job: TrainingJob, model: nn.Module, rows: pa.Table, rank: int, world: int, device: torch.device, weights: Tensor
) -> tuple[Tensor, int]:
    """This worker's part of the global loss (sum over its share ÷ global weight), and its candidates."""
    share = rows.take(pa.array(range(rank, rows.num_rows, world), pa.int64())) if world > 1 else rows
    empty = share.num_rows == 0
    batch = compress(collate(rows.slice(0, 1) if empty else share, job.schema)).to(device)
    loss, weight = task_losses(model(batch), batch.labels, batch.label_mask, batch.weight)
    if empty:  # takes part in the all-reduce with zero loss and weight
        loss, weight = loss * 0, weight * 0
    if world > 1:
        torch.distributed.all_reduce(weight)
        loss = loss * world  # data-parallel gradients are averaged over the workers
    return (weights * loss / weight.clamp(min=1e-9)).sum(), 0 if empty else batch.candidates


def split_parameters(model: RankingModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Dense parameters, and embedding tables (updated on touched rows only)."""
    return model.dense_parameters(), list(model.inputs.tables.parameters())


@torch.inference_mode()
def probabilities(model: RankingModel, batch: RequestBatch) -> np.ndarray:
    """Predicted probabilities, [C, K]."""
    return model(batch).float().sigmoid().cpu().numpy()  # type: ignore[no-any-return]


def _validate(job: TrainingJob, model: RankingModel, device: torch.device, in_process: bool) -> dict[str, float]:
    model.eval()
    labels, masks, scores, users, requests = [], [], [], [], []
    budget = 4 * job.training.batch_candidates, 4 * job.training.batch_events
    for rows in job.validation.batches(*budget, in_process=in_process):
        batch = collate(rows, job.schema)
        scores.append(probabilities(model, batch.to(device)))
        labels.append(batch.labels.numpy())
        masks.append(batch.label_mask.numpy())
        counts = batch.items.request.numpy()
        users.append(batch.user_id[counts])
        requests.append(batch.request_id[counts])
    if not scores:
        return {}
    label, mask, score = np.concatenate(labels), np.concatenate(masks), np.concatenate(scores)
    metrics = {}
    for index, task in enumerate(job.schema.tasks):
        known = mask[:, index]
        metrics[f"{task.name}_auc"] = auc(label[known, index], score[known, index])
        whole = task_metrics(
            label[known, index],
            score[known, index],
            np.concatenate(users)[known],
            np.concatenate(requests)[known],
        )
        metrics[f"{task.name}_uauc"] = whole.uauc
    return metrics
