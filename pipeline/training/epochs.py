"""The loop over epochs and steps on one worker, its checkpoints and its reports."""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import Any, TypeVar

import torch

from features.errors import CorankError
from features.sample_table import candidate_counts
from models.memory import keep_freed_memory
from models.protocol import RankingModel
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.job import TrainingJob, initial_model
from pipeline.training.settings import TrainingConfig
from pipeline.training.steps import Trainer, explain
from pipeline.training.validation import validate

T = TypeVar("T")

REPORT_STEPS = 10
"""Steps between two reports within an epoch."""


@dataclass(frozen=True)
class Place:
    """Where a worker trains, among how many.

    Attributes:
        rank: of this worker.
        world: workers in all.
        local_world: workers on this machine.
        agree: gives all workers the first one's value.
        tell: sends a report of the first worker during an epoch.
        report: ends an epoch, on all workers together.
    """

    rank: int
    world: int
    local_world: int
    device: torch.device
    agree: Callable[[Any], Any]
    tell: Callable[[Mapping[str, Any]], None]
    report: Callable[[dict[str, Any]], None]


def alone(options: TrainingConfig, tell: Callable[[Mapping[str, Any]], None]) -> Place:
    """In this process."""
    device = torch.device("cuda" if options.use_gpu else "cpu")
    return Place(0, 1, 1, device, lambda value: value, tell, lambda _: None)


def run_epochs(job: TrainingJob, checkpoints: Checkpoints, place: Place) -> str | None:
    """Train on this worker's share of every global step; report and checkpoint every epoch.

    A checkpoint is written after every epoch and, beside the training, every ``checkpoint_steps`` steps; after a kill
    the training goes on behind the newest whole one, in the middle of an epoch if need be.

    Returns:
        why training cannot go on, on the first worker; all of them end then. None when it is done.
    """
    options, rank, world, device = job.training, place.rank, place.world, place.device
    # Ray gives a worker one thread per reserved CPU; the data tasks leave the other CPUs idle most of the time
    keep_freed_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world))
    model = initial_model(job).to(device)
    trainer = Trainer(job, model, rank, world, device)
    if job.optimizers is not None and not trainer.warm_start(job.optimizers) and rank == 0:
        place.tell({"note": "training.optimizer is another one than before: what it knows of the weights begins anew"})
    progress = Progress(checkpoints, place, job.gate_task)
    progress.resume(trainer)
    for epoch in range(progress.state["epoch"], options.epochs):
        model.train()
        seed = options.seed * 1_000_003 + epoch
        within = progress.state["within"]
        # on a GPU other processes read ahead; on a CPU a thread, as Ray Data's plans take seconds to start
        batches = job.train.batches(
            job.pace.batch_candidates, options.batch_events, seed, within["steps"], in_process=device.type == "cpu"
        )
        for rows in ahead(batches):
            done = (epoch + within["candidates"] / max(job.pace.candidates, 1)) / options.epochs
            step = trainer.step(rows, done)
            if not step.finite:
                where = f"training stopped in epoch {epoch + 1}, step {within['steps'] + 1}"
                return f"{where}: {explain(job, model, rows, world, device)}" if rank == 0 else None
            within["candidates"] += candidate_counts(rows)["candidates"]
            within["steps"] += 1
            within["loss"] += sum(loss * task.weight for loss, task in zip(step.losses, job.schema.tasks, strict=True))
            if rank == 0 and within["steps"] % REPORT_STEPS == 0:
                losses = {task.name: loss for task, loss in zip(job.schema.tasks, step.losses, strict=True)}
                place.tell(
                    {
                        "epoch": epoch + 1,
                        "candidates": within["candidates"],
                        "step": trainer.steps,
                        "losses": losses,
                    }
                )
            if options.checkpoint_steps and within["steps"] % options.checkpoint_steps == 0:
                progress.save_step(trainer)
        if epoch + 1 == options.epochs and not trainer.finish():
            return f"training stopped after epoch {epoch + 1}: the last gradients are not finite" if rank == 0 else None
        failure = progress.end_epoch(job, trainer)
        if failure:
            return failure
    return None


class Progress:
    """How far a training is, and its checkpoints; those of an epoch's steps are written in a thread.

    Attributes:
        state: what a checkpoint holds beside the trainer's own: ``epoch`` (ended ones), ``within`` (steps, candidates
            and loss of the epoch that has begun), ``best`` weights so far and their ``best_auc``, ``history``.
    """

    def __init__(self, checkpoints: Checkpoints, place: Place, gate_task: str) -> None:
        self._checkpoints, self._place, self._gate_task = checkpoints, place, gate_task
        self._steps = checkpoints.of_steps()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._written: Future[None] | None = None
        self.state: dict[str, Any] = {
            "epoch": 0,
            "within": _nothing(),
            "best": None,
            "best_auc": -math.inf,
            "history": [],
        }

    def resume(self, trainer: Trainer) -> None:
        """Go on behind the newest whole checkpoint, if there is one."""
        tell = self._place.tell
        # not looked up by the driver: after the loss of a worker this begins again, from a newer checkpoint
        found = (0, 0)
        if self._place.rank == 0:
            step = self._steps.newest(lambda text: tell({"note": text}), anew=False)
            found = self._checkpoints.newest(lambda text: tell({"note": text}), anew=not step), step
        epoch, step = self._place.agree(found)
        state = self._checkpoints.load(epoch) if epoch else None
        if step and (state is None or step > state["step"]):
            state = self._steps.load(step)
        if state is not None:
            trainer.load_state_dict(state)
            self.state = {name: state[name] for name in self.state}

    def save_step(self, trainer: Trainer) -> None:
        """Write where the training is, while it goes on."""
        if self._place.rank:
            return
        self._wait()
        state = _on_host({**self.state, **trainer.state_dict()})  # a copy: the training goes on changing it
        self._written = self._writer.submit(self._steps.save, trainer.steps, state)

    def end_epoch(self, job: TrainingJob, trainer: Trainer) -> str | None:
        """Validate, report and write the checkpoint of an epoch, on all workers together.

        Returns:
            why training cannot go on, on all workers.
        """
        place, state, epoch = self._place, self.state, self.state["epoch"] + 1
        metrics: dict[str, float | None] = {}
        failure = None
        published = trainer.published() if place.rank == 0 else {}
        if place.rank == 0 and job.validation is not None:
            try:
                metrics = validate(job, job.validation, _with(trainer, published), place.device)
            except CorankError as error:
                failure = f"training stopped after epoch {epoch}, validation: {error}"
        if place.agree(failure is not None):
            return failure or "another worker stopped"
        if place.rank == 0:
            within = state["within"]
            metrics = {
                "epoch": epoch,
                "step": trainer.steps,
                "loss": within["loss"] / max(within["steps"], 1),
                "candidates": within["candidates"],
                "steps": within["steps"],
                **metrics,
            }
            state["history"].append(metrics)
            score = metrics.get(f"{self._gate_task}_auc")
            if score is None or score > state["best_auc"]:
                state["best_auc"] = score if score is not None else state["best_auc"]
                state["best"] = {name: value.detach().cpu().clone() for name, value in published.items()}
            place.tell(metrics)
        state["epoch"], state["within"] = epoch, _nothing()
        if place.rank == 0:
            self._wait()
            self._checkpoints.save(epoch, {**state, **trainer.state_dict()})
            self._steps.clear()
        place.report(metrics)
        return None

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()


def _on_host(state: Any) -> Any:
    """A copy in main memory, which a GPU does not hold beside its own."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _on_host(part) for name, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_on_host(part) for part in state)
    return copy.deepcopy(state)


def _nothing() -> dict[str, Any]:
    return {"steps": 0, "candidates": 0, "loss": 0.0}


def _with(trainer: Trainer, weights: Mapping[str, torch.Tensor]) -> RankingModel:
    """The model with these weights; itself where they are its own."""
    if trainer.average is None:
        return trainer.model
    model = copy.deepcopy(trainer.model)
    model.load_state_dict(dict(weights))
    return model


def ahead(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """The items, read by another thread while those before are worked on; its exception is raised here."""
    waiting: Queue[Any] = Queue(count)
    stopped, end = threading.Event(), object()

    def read() -> None:
        try:
            for item in items:
                waiting.put(item)
                if stopped.is_set():
                    return
            waiting.put(end)
        except BaseException as error:
            waiting.put(error)

    thread = threading.Thread(target=read, name="reads-ahead", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        while thread.is_alive():
            while not waiting.empty():
                waiting.get_nowait()
            thread.join(0.05)
