"""One global step: a worker's share of its rows, the gradients of all workers, and the optimizers.

Losses are normalised by the weights of the whole step and draws are keyed by step and row, so that the number of
workers changes speed and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed
from torch import Tensor, nn

from features.batch import collate, compress
from features.sample_table import column_of, label_column
from features.schema import Schema
from models.blocks.draws import drawing, row_keys
from models.losses import task_losses
from models.optimizers import RMSProp, RowwiseAdagrad, WeightAverage, decayed, warm_up
from models.protocol import RankingModel
from pipeline.training.gradients import Gradients
from pipeline.training.job import TrainingJob
from pipeline.training.settings import TrainingConfig


@dataclass(frozen=True)
class Step:
    """What a step found.

    Attributes:
        losses: of every task, per unit of weight; of the whole step.
        finite: whether loss and gradients were; if not, no weight was changed.
    """

    losses: list[float]
    finite: bool


class Trainer:
    """A model, its optimizers and the average of its weights, on one of several workers.

    Args:
        model: begins as it is; on ``device``.
        rank, world: of this worker, among how many.
    """

    def __init__(self, job: TrainingJob, model: RankingModel, rank: int, world: int, device: torch.device) -> None:
        self.job, self.model, self.rank, self.world, self.device = job, model, rank, world, device
        options, tables = job.training, model.inputs.tables
        self.dense = model.dense_parameters()
        self.optimizers = [_dense_optimizer(options, self.dense), _table_optimizer(options, tables)]
        self._rates = (options.learning_rate, options.embedding_learning_rate)
        self.gradients = Gradients(self.dense, list(tables.parameters()), world, options.stale_gradients)
        named = dict(model.named_parameters())
        of_tables = {id(parameter) for parameter in tables.parameters()}
        self.average = (
            WeightAverage(
                {name: parameter for name, parameter in named.items() if id(parameter) not in of_tables},
                {name: parameter for name, parameter in named.items() if id(parameter) in of_tables},
                options.average,
            )
            if options.average
            else None
        )
        self.steps, self._done = 0, 0.0
        self._task_weights = torch.tensor([task.weight for task in job.schema.tasks], device=device)

    def step(self, rows: pa.Table, done: float = 0.0) -> Step:
        """Train on these rows, which all workers are given.

        Args:
            done: share of the training's candidates before them, by which the learning rates decay.
        """
        self.steps += 1
        self._done = done
        for parameter in self.model.parameters():
            parameter.grad = None
        losses = self._backward(rows)
        tables = self.model.inputs.tables.gradients()
        lost = ~torch.stack([losses.detach().sum(), *(gradient.sum() for gradient in tables)]).isfinite().all()
        told = torch.cat([lost[None].to(losses.dtype), losses.detach()])
        if self.world > 1:
            torch.distributed.all_reduce(told)
        has_dense = self.gradients.exchange()
        norm = self._clip() if has_dense else told.new_zeros(())
        finite = bool((told.isfinite().all() & norm.isfinite() & (told[0] == 0)).item())
        if finite:
            self._update(dense=has_dense)
        return Step(told[1:].tolist(), finite)

    def finish(self) -> bool:
        """After the last step: use the gradients that are still on their way, if they are stale.

        Returns:
            whether they were finite; if not, no weight was changed.
        """
        for parameter in self.model.parameters():
            parameter.grad = None
        if not self.gradients.flush():
            return True
        finite = bool(self._clip().isfinite().item())
        if finite:
            self._update(dense=True)
        return finite

    def published(self) -> dict[str, Tensor]:
        """What the model would be published with now: the average of its weights, where one is kept."""
        state = dict(self.model.state_dict())
        return state | self.average.averages() if self.average is not None and self.steps else state

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on with the next step, for any number of workers."""
        return {
            "step": self.steps,
            "model": self.model.state_dict(),
            "averaged": self.average.state_dict() if self.average is not None else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "pending": self.gradients.pending,
        }

    def warm_start(self, states: Sequence[dict[str, Any]]) -> bool:
        """Begin with what the optimizers of another training knew; their options stay those of this one.

        Returns:
            whether all are of the kinds of this one; one that is not begins anew.
        """
        fits = True
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            own = optimizer.state_dict()
            known: dict[str, Any] = next(iter(saved["state"].values()), {})
            if not _same_kind(optimizer, known):
                fits = False
                continue
            optimizer.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})
        return fits

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.average is not None and state["averaged"] is not None:
            self.average.load_state_dict(state["averaged"])
        self.gradients.pending = state["pending"]

    def _backward(self, rows: pa.Table) -> Tensor:
        """This worker's part of every task's loss, [K]; its gradients are in the parameters."""
        options = self.job.training
        share = share_of(rows, self.rank, self.world)
        empty = share.num_rows == 0
        batch = collate(rows.slice(0, 1) if empty else share, self.job.schema)
        batch = compress(batch).to(self.device)
        with (
            drawing(options.seed * 1_000_003 + self.steps, row_keys(batch)),
            torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"),
        ):
            logits = self.model(batch)
        # a worker with an empty share takes part without a loss
        mask = torch.zeros_like(batch.label_mask) if empty else batch.label_mask
        sums, _ = task_losses(logits, batch.labels, mask, batch.weight)
        losses = sums / step_weights(rows, self.job.schema).to(sums).clamp(min=1e-9)
        (losses * self._task_weights.to(losses)).sum().backward()
        return losses

    def _clip(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self.dense, self.job.training.clip_norm)

    def _update(self, dense: bool) -> None:
        pace, options = self.job.pace, self.job.training
        part = warm_up(self.steps, pace.warmup_steps) * decayed(self._done, options.decay)
        if self.average is not None:
            self.average.before_step()
        for optimizer, rate in zip(self.optimizers[0 if dense else 1 :], self._rates[0 if dense else 1 :], strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * part
            optimizer.step()
        if self.average is not None:
            self.average.after_step()


def _same_kind(optimizer: torch.optim.Optimizer, known: dict[str, Any]) -> bool:
    """Whether a parameter's state is of this kind of optimizer."""
    kinds: dict[type, set[str]] = {
        torch.optim.AdamW: {"exp_avg", "exp_avg_sq"},
        RMSProp: {"square_avg"},
        torch.optim.Adagrad: {"sum", "step"},
        RowwiseAdagrad: {"sum"},
    }
    wanted = kinds[type(optimizer)]
    of_rows = isinstance(optimizer, RowwiseAdagrad) == ("sum" in known and known["sum"].dim() == 1)
    return not known or (wanted <= set(known) and of_rows)


def share_of(rows: pa.Table, rank: int, world: int) -> pa.Table:
    """A worker's rows of a step."""
    return rows.take(pa.array(range(rank, rows.num_rows, world), pa.int64())) if world > 1 else rows


def step_weights(rows: pa.Table, schema: Schema) -> Tensor:
    """The weight of every task's known labels in a whole step, [K], float64; what :func:`task_losses` divides by."""
    candidates = column_of(rows, "requests").flatten().field("candidates").flatten()
    weight = candidates.field("weight").to_numpy(zero_copy_only=False).astype(np.float64)
    known = [candidates.field(label_column(task)).is_valid().to_numpy(zero_copy_only=False) for task in schema.tasks]
    return torch.tensor([weight[of_task].sum() for of_task in known], dtype=torch.float64)


def _dense_optimizer(options: TrainingConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if options.optimizer == "rmsprop":
        return RMSProp(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    return torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)


def _table_optimizer(options: TrainingConfig, tables: nn.Module) -> torch.optim.Optimizer:
    """Adagrad on the rows that a step touches."""
    if options.embedding_optimizer == "rowwise_adagrad":
        return RowwiseAdagrad(tables.parameters(), lr=options.embedding_learning_rate)
    return torch.optim.Adagrad(tables.parameters(), lr=options.embedding_learning_rate, eps=1e-8)


@torch.no_grad()
def explain(job: TrainingJob, model: RankingModel, rows: pa.Table, world: int, device: torch.device) -> str:
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
    for share in (share_of(rows, rank, world) for rank in range(world)):
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
