"""Training on Ray Train: a global step is a list of rows cut by a budget and dealt to the workers.

Every worker streams the same seeded order (Ray Data, order kept; a single one on the CPU reads by itself) and takes its
share of each step; losses are normalised by the global weight. So the number of workers changes speed, and the draw of
dropout, but neither the steps nor their rows. A killed run continues from its last epoch; a loss or gradient that is
not finite stops all workers at the same step, before it reaches the weights.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from features.batch import collate, compress
from features.errors import CorankError
from features.sample_table import candidate_counts
from features.samples.source import READ_CPUS, SampleSource
from features.schema import Schema
from models.config import ModelConfig
from models.losses import task_losses
from models.memory import keep_freed_memory
from models.metrics import task_metrics
from models.protocol import RankingModel
from models.registry import build_model
from models.scoring import probabilities
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.settings import Pace, TooFewError, TrainingConfig


@dataclass(frozen=True)
class TrainingJob:
    """Everything a worker needs; picklable.

    Attributes:
        name: names the run and its checkpoints; the same job always has the same name.
        pace: the values that the section ``training`` leaves to be chosen from the data.
        statistics: mean and deviation of every number's embedding.
        validation: samples by which the best epoch is chosen; None: the last epoch is taken.
        warm_start: weights to begin with, or None.
        optimizers: states of the optimizers to begin with, or None.
    """

    name: str
    schema: Schema
    model: ModelConfig
    training: TrainingConfig
    pace: Pace
    train: SampleSource
    validation: SampleSource | None
    statistics: Mapping[str, tuple[float, float]]
    gate_task: str
    warm_start: Mapping[str, Tensor] | None = None
    optimizers: Sequence[dict[str, Any]] | None = None


@dataclass(frozen=True)
class TrainingResult:
    """The best epoch's model and the metrics of every epoch."""

    model: RankingModel
    history: list[dict[str, float | None]]


@dataclass(frozen=True)
class SourceSummary:
    """Counts of some samples, made before they are trained on or judged by.

    Attributes:
        candidates: of all requests.
        labels: per task the known ones and the positive ones among them.
        numbers: mean and deviation of every number, by embedding.
    """

    candidates: int
    labels: dict[str, tuple[int, int]]
    numbers: dict[str, tuple[float, float]]


def summarize(source: SampleSource) -> SourceSummary:
    """One pass over the samples on Ray Data."""
    schema = source.schema
    total: dict[str, np.ndarray] = {}
    if source.files():
        sums = source.dataset().map_batches(_Sums(schema), batch_size=None, batch_format="pyarrow")
        for row in sums.iter_rows():
            total.setdefault(row["of"], np.zeros(3))
            total[row["of"]] += (row["count"], row["sum"], row["squares"])
    nothing = np.zeros(3)
    numbers = {}
    for name in {field.embedding for field in schema.all_fields() if field.kind == "number"}:
        count, first, squares = total.get(f"number {name}", nothing)
        mean = first / max(count, 1)
        deviation = math.sqrt(max(squares / max(count, 1) - mean * mean, 0.0))
        numbers[name] = (float(mean), deviation or 1.0)
    labels = {}
    for task in schema.tasks:
        known, positive, _ = total.get(f"label {task.name}", nothing)
        labels[task.name] = (int(known), int(positive))
    return SourceSummary(int(total.get("candidates", nothing)[0]), labels, numbers)


class _Sums:
    """Count, sum and sum of squares of a block's labels and numbers, and the count of its candidates."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def __call__(self, rows: pa.Table) -> pa.Table:
        columns: dict[str, list[Any]] = {"of": [], "count": [], "sum": [], "squares": []}
        if rows.num_rows:
            batch = collate(rows, self.schema)
            sources = [(feature, batch.users.fields) for feature in self.schema.user_side]
            sources += [(feature, batch.items.fields) for feature in self.schema.item_side]
            values: list[tuple[str, Any]] = [
                (f"number {field.embedding}", fields[field.name]) for field, fields in sources if field.kind == "number"
            ]
            values += [
                (f"number {field.embedding}", batch.timelines[sequence.name].fields[field.name])
                for sequence in self.schema.sequences
                for field in sequence.fields
                if field.kind == "number"
            ]
            values += [
                (f"label {task.name}", batch.labels[batch.label_mask[:, index], index])
                for index, task in enumerate(self.schema.tasks)
            ]
            values += [("candidates", torch.zeros(batch.candidates))]
            for name, value in values:
                assert isinstance(value, Tensor)
                known = value[value.isfinite()].double()
                for key, entry in zip(
                    columns, (name, len(known), float(known.sum()), float((known * known).sum())), strict=True
                ):
                    columns[key].append(entry)
        types = pa.schema(
            [("of", pa.string()), ("count", pa.int64()), ("sum", pa.float64()), ("squares", pa.float64())]
        )
        return pa.table(columns, schema=types)


def require_both_classes(task: str, where: str, summary: SourceSummary, remedy: str) -> None:
    """
    Raises:
        TooFewError: there is no AUC of this task in these samples.
    """
    known, positive = summary.labels[task]
    if not 0 < positive < known:
        raise TooFewError(
            f"task {task}, which the gate judges by: of {summary.candidates:,} candidates in the {where} set "
            f"{known:,} have a known label, {positive:,} of them positive. Without both classes there is no AUC. "
            f"{remedy}, take more partitions, or name another task in `evaluation.task`"
        )


def initial_model(job: TrainingJob) -> RankingModel:
    """The model before the first step: seeded, with the number statistics, or the warm start's weights."""
    torch.manual_seed(job.training.seed)
    chosen = job.model
    try:
        model = build_model(job.schema, chosen.name, chosen.preset, chosen.overrides, job.training.id_dropout)
    except ValueError as error:
        raise CorankError(f"model: {error}") from None
    model.inputs.set_statistics(job.statistics)
    if job.warm_start is not None:
        model.load_state_dict(dict(job.warm_start))
    return model


def train(
    job: TrainingJob, storage: str, progress: Callable[[Mapping[str, Any]], None], elastic: bool = False
) -> TrainingResult:
    """Train, on Ray Train or in this process, and return the best epoch's model.

    Args:
        storage: folder or s3:// prefix of the checkpoints.
        progress: called with every report of the first worker; one with ``note`` is for the user to keep.
        elastic: whether the cluster grows on demand, so that the CPUs free now are no limit.

    Raises:
        CorankError: the model cannot be built, or something in training or validation is not finite.
    """
    model = initial_model(job)  # a model that cannot be built fails here and not in every worker
    options = job.training
    checkpoints = Checkpoints(f"{storage}/{job.name}")

    def note(text: str) -> None:
        progress({"note": text})

    if checkpoints.newest(note) < options.epochs:
        if options.num_workers:
            failure = _on_ray(job, storage, progress, elastic)
        else:
            failure = _epochs(job, checkpoints, _alone(options, progress))
        if failure:
            raise CorankError(failure)
        if checkpoints.newest(note) < options.epochs:
            raise CorankError(
                f"training {job.name} ended without its last checkpoint in {storage}; run again to continue it"
            )
    state = checkpoints.load(options.epochs)
    model.load_state_dict(state["best"])
    return TrainingResult(model.eval(), state["history"])


def _on_ray(job: TrainingJob, storage: str, progress: Callable[[Mapping[str, Any]], None], elastic: bool) -> str | None:
    """Train on Ray Train's workers; returns why it stopped, or None when it is done."""
    import ray.train
    import ray.train.torch
    from ray.util.queue import Queue

    options = job.training
    reports = Queue(actor_options={"num_cpus": 0})
    trainer = ray.train.torch.TorchTrainer(
        _worker,  # type: ignore[arg-type]  # what it returns is the result of the training
        train_loop_config={"job": job, "reports": reports, "checkpoints": f"{storage}/{job.name}"},
        scaling_config=ray.train.ScalingConfig(
            num_workers=options.num_workers,
            use_gpu=options.use_gpu,
            resources_per_worker={"CPU": _reserved_cpus(options, elastic)} | ({"GPU": 1} if options.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=f"{storage}/{job.name}",
            failure_config=ray.train.FailureConfig(max_failures=2),
        ),
    )
    running = ray.remote(num_cpus=0, max_retries=0)(_fit).remote(trainer)
    try:
        ended = False
        while not ended:
            # asked before the queue is read, so that reports from before the end are still passed on
            ended = bool(ray.wait([running], timeout=0)[0])
            try:
                while True:
                    progress(reports.get(timeout=0.5 if not ended else 0.01))
            except Empty:
                continue
    finally:
        reports.shutdown(force=True)
    failure: str | None = ray.get(running)
    return failure


def _fit(trainer: Any) -> Any:
    """Run the trainer in a Ray task, which ends with Ray; returns why it stopped, or None when it is done.

    In the driver's main thread it would replace the handler of Ctrl-C for good. In another thread of the driver it may
    call Ray after an interrupt has stopped Ray, which then starts anew and waits for ever. In the task it would replace
    the handler, too, and no later task of this process could be cancelled; so the handler is set back.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit().return_value
    except Exception as error:
        failures = getattr(error, "worker_failures", {}).values()  # Ray Train keeps them out of the chain of causes
        for failure in (getattr(wrapped, "_base_exc", wrapped) for wrapped in failures):
            if isinstance(failure, CorankError):
                return str(failure)
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _reserved_cpus(options: TrainingConfig, elastic: bool) -> float:
    """CPUs to set aside per worker, so that the tasks that feed it always find room: else both wait for ever."""
    import ray

    wanted = options.cpus_per_worker
    if elastic:
        return wanted
    free = float(ray.available_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]
    return max(min(wanted, (free - 2 * READ_CPUS) / options.num_workers), 0.01)


@dataclass(frozen=True)
class _Place:
    """Where a worker trains, among how many.

    Attributes:
        rank: of this worker.
        world: workers in all.
        local_world: workers on this machine.
        prepare: makes a model average its gradients over the workers.
        agree: gives all workers the first one's value.
        tell: sends a report of the first worker during an epoch.
        report: ends an epoch, on all workers together.
    """

    rank: int
    world: int
    local_world: int
    device: torch.device
    prepare: Callable[[nn.Module], nn.Module]
    agree: Callable[[Any], Any]
    tell: Callable[[Mapping[str, Any]], None]
    report: Callable[[dict[str, Any]], None]


def _alone(options: TrainingConfig, tell: Callable[[Mapping[str, Any]], None]) -> _Place:
    device = torch.device("cuda" if options.use_gpu else "cpu")
    return _Place(0, 1, 1, device, lambda model: model, lambda value: value, tell, lambda _: None)


def _worker(config: dict[Any, Any]) -> str | None:
    """What Ray Train runs in every worker."""
    import ray.train
    import ray.train.collective
    import ray.train.torch

    context = ray.train.get_context()
    place = _Place(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_world_size(),
        ray.train.torch.get_device(),
        ray.train.torch.prepare_model,
        ray.train.collective.broadcast_from_rank_zero,
        config["reports"].put,
        ray.train.report,
    )
    return _epochs(config["job"], Checkpoints(config["checkpoints"]), place)


def _epochs(job: TrainingJob, checkpoints: Checkpoints, place: _Place) -> str | None:
    """Train on this worker's share of every global step; report and checkpoint every epoch.

    Returns:
        why training cannot go on, on the first worker; all of them end then. None when it is done.
    """
    options = job.training
    rank, world, device = place.rank, place.world, place.device
    # the same batches without Ray Data, whose plans take seconds to start, twice per epoch
    in_process = world == 1 and device.type == "cpu"
    # Ray gives a worker one thread per reserved CPU; the data tasks leave the other CPUs idle most of the time
    keep_freed_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world))
    unwrapped = initial_model(job).to(device)
    model: nn.Module = place.prepare(unwrapped) if world > 1 else unwrapped
    dense, tables = unwrapped.dense_parameters(), unwrapped.inputs.tables
    optimizers = [
        torch.optim.AdamW(dense, lr=options.learning_rate, weight_decay=options.weight_decay),
        tables.optimizer(options.embedding_learning_rate),
    ]
    averaged = AveragedModel(unwrapped, multi_avg_fn=get_ema_multi_avg_fn(options.average)) if options.average else None
    weights = torch.tensor([task.weight for task in job.schema.tasks], device=device)
    state: dict[str, Any] = {"epoch": 0, "step": 0, "best": None, "best_auc": -math.inf, "history": []}
    # not looked up by the driver: after the loss of a worker this begins again, from a newer checkpoint
    resumed = place.agree(checkpoints.newest(lambda text: place.tell({"note": text})) if rank == 0 else 0)
    if resumed:
        state = checkpoints.load(resumed)
        unwrapped.load_state_dict(state["model"])
    if saved_states := state["optimizers"] if resumed else job.optimizers:
        for optimizer, saved in zip(optimizers, saved_states, strict=True):
            optimizer.load_state_dict(saved)
    if resumed and averaged is not None:
        averaged.load_state_dict(state["averaged"])
    for epoch in range(state["epoch"], options.epochs):
        torch.manual_seed(options.seed * 1_000_003 + epoch * world + rank)
        unwrapped.train()
        seen, loss_sum, steps = 0, 0.0, 0
        seed = options.seed * 1_000_003 + epoch
        budget = job.pace.batch_candidates, options.batch_events
        for rows in job.train.batches(*budget, seed, in_process=in_process):
            loss = _loss(job, model, rows, rank, world, device, weights)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(dense, options.clip_norm)
            state["step"] += 1
            lost = _not_finite(loss, norm, tables.gradients())
            if world > 1:
                torch.distributed.all_reduce(lost)
            if lost:
                where = f"training stopped in epoch {epoch + 1}, step {steps + 1}"
                return f"{where}: {_explain(job, unwrapped, rows, world, device)}" if rank == 0 else None
            warm = min(1.0, state["step"] / max(job.pace.warmup_steps, 1))
            for optimizer, rate in zip(
                optimizers, (options.learning_rate, options.embedding_learning_rate), strict=True
            ):
                for group in optimizer.param_groups:
                    group["lr"] = rate * warm
                optimizer.step()
            if averaged is not None:
                averaged.update_parameters(unwrapped)
            seen += candidate_counts(rows)["candidates"]
            loss_sum, steps = loss_sum + float(loss.detach()), steps + 1
            if rank == 0 and steps % 10 == 0:
                place.tell({"epoch": epoch + 1, "candidates": seen})
        published: Any = averaged.module if averaged is not None else unwrapped
        metrics: dict[str, float | None] = {}
        failure = None
        if rank == 0 and job.validation is not None:
            try:
                metrics = _validate(job, job.validation, published, device, in_process)
            except CorankError as error:
                failure = f"training stopped after epoch {epoch + 1}, validation: {error}"
        if place.agree(failure is not None):
            return failure
        if rank == 0:
            metrics = {
                "epoch": epoch + 1,
                "loss": loss_sum / max(steps, 1),
                "candidates": seen,
                "steps": steps,
                **metrics,
            }
            state["history"].append(metrics)
            score = metrics.get(f"{job.gate_task}_auc")
            if score is None or score > state["best_auc"]:
                state["best_auc"] = score if score is not None else state["best_auc"]
                state["best"] = {name: value.detach().cpu().clone() for name, value in published.state_dict().items()}
            state["epoch"] = epoch + 1
            state["model"] = unwrapped.state_dict()
            state["averaged"] = averaged.state_dict() if averaged is not None else None
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            place.tell(metrics)
            checkpoints.save(epoch + 1, state)
        place.report(metrics)
    return None


def _loss(
    job: TrainingJob, model: nn.Module, rows: pa.Table, rank: int, world: int, device: torch.device, weights: Tensor
) -> Tensor:
    """This worker's part of the global loss: the sum over its share ÷ the global weight."""
    share = _share(rows, rank, world)
    empty = share.num_rows == 0
    batch = compress(collate(rows.slice(0, 1) if empty else share, job.schema)).to(device)
    # a worker with an empty share joins the all-reduce with zero loss and weight
    mask = torch.zeros_like(batch.label_mask) if empty else batch.label_mask
    loss, weight = task_losses(model(batch), batch.labels, mask, batch.weight)
    if world > 1:
        torch.distributed.all_reduce(weight)
        loss = loss * world  # data-parallel gradients are averaged over the workers
    return (weights * loss / weight.clamp(min=1e-9)).sum()


def _share(rows: pa.Table, rank: int, world: int) -> pa.Table:
    return rows.take(pa.array(range(rank, rows.num_rows, world), pa.int64())) if world > 1 else rows


def _not_finite(loss: Tensor, norm: Tensor, of_tables: list[Tensor]) -> Tensor:
    """1.0 when the loss or a gradient is not finite, else 0.0."""
    return (
        (~torch.stack([loss.detach(), norm.detach(), *(gradient.sum() for gradient in of_tables)]).isfinite())
        .any()
        .float()
    )


@torch.no_grad()
def _explain(job: TrainingJob, model: RankingModel, rows: pa.Table, world: int, device: torch.device) -> str:
    """Where a step is not finite: in the weights before it, in a column, or in the scores of some candidates."""
    lost = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if lost:
        remedy = "train from scratch with `corank run`" if job.warm_start else "lower training.learning_rate"
        return f"the weights are not finite ({lost[0]} and {len(lost) - 1} more); {remedy}"
    model.eval()
    remedies = {
        "values of the column weight": "correct them in the table impressions",
        "labels": "correct them",
        "scores": "lower training.learning_rate or look at the numbers among the features",
    }
    found: dict[str, list[str]] = {what: [] for what in remedies}
    for share in (_share(rows, rank, world) for rank in range(world)):
        batch = collate(share, job.schema)
        logits = model(batch.to(device)).cpu()
        for places, values in zip(found.values(), (batch.weight[:, None], batch.labels, logits), strict=True):
            for index in torch.nonzero(~values.isfinite().all(1)).flatten().tolist():
                row = int(batch.items.request[index])
                places.append(
                    f"item {batch.item_id[index]} in request {batch.request_id[row]} of user {batch.user_id[row]}"
                )
    for what, places in found.items():  # in order: the first is the cause of the others
        if places:
            return f"{len(places):,} {what} are not finite, the first of {places[0]}; {remedies[what]} and run again"
    return "the loss or its gradient is not finite, though weights and scores are; lower training.learning_rate"


def _validate(
    job: TrainingJob, source: SampleSource, model: RankingModel, device: torch.device, in_process: bool
) -> dict[str, float | None]:
    """AUC and UAUC of every task on the validation set; None where they are not defined.

    Raises:
        CorankError: a score is not finite, or of the gate's task there is no AUC.
    """
    model.eval()
    labels, masks, scores, users, requests = [], [], [], [], []
    budget = 4 * job.pace.batch_candidates, 4 * job.training.batch_events
    for rows in source.batches(*budget, in_process=in_process):
        batch = collate(rows, job.schema)
        scores.append(probabilities(model, batch.to(device)))
        labels.append(batch.labels.numpy())
        masks.append(batch.label_mask.numpy())
        counts = batch.items.request.numpy()
        users.append(batch.user_id[counts])
        requests.append(batch.request_id[counts])
    metrics: dict[str, float | None] = {}
    for index, task in enumerate(job.schema.tasks if scores else ()):
        known = np.concatenate(masks)[:, index]
        label, score, user, request = (np.concatenate(parts)[known] for parts in (labels, scores, users, requests))
        found = task_metrics(label[:, index], score[:, index], user, request)
        metrics |= {f"{task.name}_auc": found.auc, f"{task.name}_uauc": found.uauc}
    if metrics.get(f"{job.gate_task}_auc") is None:
        raise CorankError(f"task {job.gate_task} has not both classes, so that no epoch can be chosen by its AUC")
    return metrics
