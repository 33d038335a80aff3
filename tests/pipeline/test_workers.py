"""Steps of several workers, real processes over gloo: the same weights as of one, and nothing sparse on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn

from features.batch import collate, compress
from features.sample_table import candidate_counts
from models.blocks.draws import drawing, row_keys
from models.config import ModelConfig
from models.losses import task_losses
from pipeline.training import epochs
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.epochs import ahead, alone, run_epochs
from pipeline.training.job import TrainingJob, initial_model
from pipeline.training.steps import Trainer, step_weights
from tests.models.batches import make_rows
from tests.pipeline.test_training import SCHEMA, job_of, source_of, with_candidates

STEPS = 5


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """Steps of few rows, so that a worker's share may be empty; weights and masked labels differ."""

    def weighted(request_id: str, candidate: dict[str, Any]) -> None:
        candidate["weight"] = 1.0 + len(request_id) % 3

    folder = tmp_path_factory.mktemp("workers")
    rows = with_candidates(make_rows(SCHEMA, 1, timelines=40), weighted)
    return job_of(source_of(folder / "samples", rows), epochs=2, batch_candidates=12, id_dropout=0.1)


def changed(job: TrainingJob, **options: Any) -> TrainingJob:
    return replace(job, training=job.training.model_copy(update=options))


def trained(job: TrainingJob, rank: int, world: int) -> dict[str, Tensor]:
    """Weights after some steps in double precision."""
    trainer = Trainer(job, initial_model(job).double().train(), rank, world, torch.device("cpu"))
    for number, rows in enumerate(job.train.batches(job.pace.batch_candidates, 1_000, 3, in_process=True)):
        if number == STEPS:
            break
        assert trainer.step(rows).finite
    trainer.finish()
    return dict(trainer.published())


def work(rank: int, world: int, folder: str, jobs: Mapping[str, TrainingJob]) -> None:
    """One worker's process."""
    torch.set_num_threads(1)
    for name in ("all_reduce", "all_gather"):
        refuse_sparse(name)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for name, job in jobs.items():
        state = trained(job, rank, world)
        if rank == world - 1:
            torch.save(state, f"{folder}/{name}.pt")
    dist.destroy_process_group()


def refuse_sparse(name: str) -> None:
    """As process groups of NCCL do."""
    function = getattr(dist, name)

    def strict(*tensors: Any, **options: Any) -> Any:
        flat = [one for given in tensors for one in (given if isinstance(given, list) else [given])]
        assert not any(one.is_sparse for one in flat if isinstance(one, Tensor))
        return function(*tensors, **options)

    setattr(dist, name, strict)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_workers_trains_to_the_same_weights(job: TrainingJob, tmp_path: Path, world: int) -> None:
    jobs = {
        "plain": job,
        "stale": changed(job, stale_gradients=True),
        "other optimizers": changed(
            job, optimizer="rmsprop", embedding_optimizer="rowwise_adagrad", decay="cosine", average=0.0
        ),
    }
    processes.spawn(work, (world, str(tmp_path), jobs), nprocs=world)
    for name, each in jobs.items():
        alone_weights, found = trained(each, 0, 1), torch.load(tmp_path / f"{name}.pt")
        assert found.keys() == alone_weights.keys()
        for parameter, values in alone_weights.items():
            torch.testing.assert_close(found[parameter], values, rtol=1e-9, atol=1e-9, msg=f"{name}: {parameter}")
        begun = initial_model(each).double().state_dict()
        assert any(not torch.equal(values, begun[parameter]) for parameter, values in found.items())


def test_stale_gradients_are_those_of_the_step_before(job: TrainingJob) -> None:
    """W_k = W_(k−1) + g_(k−1), computed by hand; tables are not stale."""
    stale = changed(job, stale_gradients=True, average=0.0, id_dropout=0.0)
    found, options = trained(stale, 0, 1), stale.training
    model = initial_model(stale).double().train()
    dense = model.dense_parameters()
    optimizers = (
        torch.optim.AdamW(dense, lr=options.learning_rate, weight_decay=options.weight_decay),
        torch.optim.Adagrad(model.inputs.tables.parameters(), lr=options.embedding_learning_rate, eps=1e-8),
    )
    before: list[Tensor] | None = None

    def use(gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(dense, gradients, strict=True):
            parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_(dense, options.clip_norm)
        optimizers[0].step()

    for number, rows in enumerate(stale.train.batches(stale.pace.batch_candidates, 1_000, 3, in_process=True), 1):
        if number > STEPS:
            break
        for optimizer, rate in zip(optimizers, (options.learning_rate, options.embedding_learning_rate), strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, number / stale.pace.warmup_steps)
            optimizer.zero_grad()
        batch = collate(rows, SCHEMA)
        with drawing(number, row_keys(batch)):
            loss, weight = task_losses(model(compress(batch)), batch.labels, batch.label_mask, batch.weight)
        (loss / weight).sum().backward()
        own = [parameter.grad.clone() for parameter in dense if parameter.grad is not None]
        optimizers[1].step()
        if before is not None:
            use(before)
        before = own
    rate = options.learning_rate * min(1.0, STEPS / stale.pace.warmup_steps)
    optimizers[0].param_groups[0]["lr"] = rate
    assert before is not None
    use(before)
    for name, values in model.state_dict().items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-9, msg=name)


def test_the_weight_of_a_step_is_what_the_losses_are_summed_with(job: TrainingJob) -> None:
    for rows in job.train.batches(40, 1_000, in_process=True):
        batch = collate(rows, SCHEMA)
        _, weight = task_losses(torch.zeros_like(batch.labels), batch.labels, batch.label_mask, batch.weight)
        torch.testing.assert_close(step_weights(rows, SCHEMA).float(), weight)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stale_gradients": True},
        {"optimizer": "rmsprop", "embedding_optimizer": "rowwise_adagrad", "decay": "linear", "average": 0.0},
    ],
    ids=["plain", "stale", "other optimizers"],
)
def test_a_training_killed_within_an_epoch_goes_on_at_its_step_to_the_same_bits(
    job: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(epochs, "REPORT_STEPS", 1)
    each = changed(job, checkpoint_steps=3, **options)

    def run(folder: Path, killed_at: float = math.inf) -> list[int]:
        """The steps that were made."""
        made: list[int] = []

        def tell(report: Mapping[str, Any]) -> None:
            if "losses" in report:  # within an epoch
                made.append(report["step"])
                if report["step"] >= killed_at:
                    raise KeyboardInterrupt

        run_epochs(each, Checkpoints(str(folder)), alone(each.training, tell))
        return made

    undisturbed = run(tmp_path / "a")
    half = len(undisturbed) // 2
    assert half > 8
    for killed_at in (5, half + 5):  # in both epochs, two steps after a checkpoint
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b", killed_at)
    again = run(tmp_path / "b")
    assert half + 2 <= again[0] <= half + 5
    assert again[-1] == len(undisturbed)
    whole, continued = (Checkpoints(str(tmp_path / name)).load(2) for name in "ab")
    assert continued["history"] == whole["history"]
    for part in ("model", "best"):
        for name, values in whole[part].items():
            assert torch.equal(continued[part][name], values), name
    assert Checkpoints(str(tmp_path / "b")).of_steps().newest(lambda _: None) == 0  # the epoch's takes their place


@pytest.mark.parametrize("model", ["mixformer", "ui-mixformer", "hyformer"])
def test_steps_in_bfloat16_are_finite_and_near_those_in_float32(job: TrainingJob, model: str) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        chosen = ModelConfig(name=model, preset="tiny")  # type: ignore[call-arg]
        each = replace(changed(job, precision=precision), model=chosen)
        trainer = Trainer(each, initial_model(each).train(), 0, 1, torch.device("cpu"))
        steps = [trainer.step(rows) for rows in each.train.batches(40, 1_000, 3, in_process=True)]
        assert all(step.finite for step in steps)
        losses.append([step.losses for step in steps])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0.05, atol=0.05)


def test_a_warm_start_under_other_optimizers_begins_their_states_anew_and_keeps_its_own_options(
    job: TrainingJob,
) -> None:
    kinds = [
        {"optimizer": optimizer, "embedding_optimizer": tables, "weight_decay": decay}
        for optimizer, tables, decay in (("adamw", "adagrad", 0.1), ("rmsprop", "rowwise_adagrad", 0.0))
    ]
    rows = next(job.train.batches(40, 1_000, 3, in_process=True))
    states = []
    for kind in kinds:
        trainer = Trainer(changed(job, **kind), initial_model(job).train(), 0, 1, torch.device("cpu"))
        trainer.step(rows)
        states.append(trainer.state_dict()["optimizers"])
    for kind in kinds:
        for other, state in zip(kinds, states, strict=True):
            trainer = Trainer(changed(job, **kind), initial_model(job).train(), 0, 1, torch.device("cpu"))
            assert trainer.warm_start(state) == (kind == other)
            assert trainer.step(rows).finite
    changed_decay = Trainer(changed(job, weight_decay=0.7), initial_model(job).train(), 0, 1, torch.device("cpu"))
    assert changed_decay.warm_start(states[0])
    assert changed_decay.optimizers[0].param_groups[0]["weight_decay"] == 0.7


def test_rates_decay_to_zero_at_the_end_and_not_before(job: TrainingJob, tmp_path: Path) -> None:
    """However many steps there are: they are cut by events here, too."""
    each, parts = changed(job, decay="linear", batch_events=30), []
    candidates = sum(candidate_counts(rows)["candidates"] for rows in job.train.batches(10**6, 10**6, in_process=True))
    each = replace(each, pace=replace(each.pace, candidates=candidates, warmup_steps=0))
    step = Trainer.step

    def seen(trainer: Trainer, rows: Any, done: float) -> Any:
        parts.append(done)
        return step(trainer, rows, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", seen)
        run_epochs(each, Checkpoints(str(tmp_path)), alone(each.training, lambda _: None))
    assert parts[0] == 0.0
    assert 0.9 < parts[-1] < 1.0
    assert parts == sorted(parts)


def test_stale_gradients_that_are_not_finite_stop_the_training_at_its_end_too(job: TrainingJob) -> None:
    trainer = Trainer(changed(job, stale_gradients=True), initial_model(job).train(), 0, 1, torch.device("cpu"))
    trainer.step(next(job.train.batches(40, 1_000, 3, in_process=True)))
    pending = trainer.gradients.pending
    assert pending is not None
    trainer.gradients.pending = pending * torch.nan
    assert not trainer.finish()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_any_seed_can_be_drawn_from(job: TrainingJob) -> None:
    each = changed(job, seed=20_240_101)
    trainer = Trainer(each, initial_model(each).train(), 0, 1, torch.device("cpu"))
    assert trainer.step(next(job.train.batches(40, 1_000, 3, in_process=True))).finite


def test_what_is_read_ahead_raises_where_it_is_used_and_ends_with_its_reader() -> None:
    def failing() -> Any:
        yield 1
        raise ValueError("in the middle")

    taken = []
    with pytest.raises(ValueError, match="in the middle"):
        taken.extend(ahead(failing()))
    assert list(ahead(range(100))) == list(range(100))
    endless = ahead(iter(int, 1))
    assert next(endless) == 0
    endless.close()  # type: ignore[attr-defined]
