"""Training on Ray Train, or in this process: a global step is a list of rows cut by a budget and dealt to the workers.

Every worker streams the same seeded order and takes its share of each step (:mod:`pipeline.training.steps`). A killed
run continues from its newest checkpoint; a loss or gradient that is not finite stops all workers at the same step,
before it reaches the weights.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from queue import Empty
from typing import Any

from features.errors import CorankError
from features.samples.source import READ_CPUS
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.epochs import Place, alone, run_epochs
from pipeline.training.job import TrainingJob, TrainingResult, initial_model
from pipeline.training.settings import TrainingConfig


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
            failure = run_epochs(job, checkpoints, alone(options, progress))
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


def _worker(config: dict[Any, Any]) -> str | None:
    """What Ray Train runs in every worker."""
    import ray.train
    import ray.train.collective
    import ray.train.torch

    context = ray.train.get_context()
    place = Place(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_world_size(),
        ray.train.torch.get_device(),
        ray.train.collective.broadcast_from_rank_zero,
        config["reports"].put,
        ray.train.report,
    )
    return run_epochs(config["job"], Checkpoints(config["checkpoints"]), place)
