"""Optimizers and the average of weights; a step costs what the rows that it touches cost, however large a table is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one sum per row: the mean of the row's squared gradient. Takes sparse gradients alone.

    A table's state is then 1 / dim of its size.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, eps: float = 1e-8) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"sum": parameter.new_zeros(parameter.shape[0])}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the rows that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                sums = self.state[parameter]["sum"]
                total = sums.index_select(0, rows) + values.square().mean(1)
                sums.index_copy_(0, rows, total)
                parameter.index_add_(0, rows, values / (total.sqrt() + group["eps"])[:, None], alpha=-group["lr"])


class RMSProp(torch.optim.RMSprop):
    """RMSProp whose weight decay is that of AdamW: a share of the weights, which no statistic divides."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr)
        self._decay = weight_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * self._decay)
        super().step()


class WeightAverage:
    """Exponential average over the steps of all weights (decay per step); the first step's weights begin it.

    What a row of a table that no step touched adds is made up for when a step touches it, or when the average is asked
    for: the result is that of averaging every row in every step.

    Args:
        dense: parameters by name.
        tables: embedding tables by name, whose gradients are sparse.
    """

    def __init__(self, dense: Mapping[str, nn.Parameter], tables: Mapping[str, nn.Parameter], decay: float) -> None:
        self._dense, self._tables, self._decay = dict(dense), dict(tables), decay
        self._steps = 0
        self._averages: dict[str, Tensor] = {}
        self._settled = {
            name: torch.zeros(len(table), dtype=torch.long, device=table.device) for name, table in tables.items()
        }
        """The step up to which each row's average is."""

    @torch.no_grad()
    def before_step(self) -> None:
        """Call before the optimizers change the weights: the rows that they will touch are brought up to date."""
        if self._steps:
            for name, rows in self._touched().items():
                self._settle(name, rows)

    @torch.no_grad()
    def after_step(self) -> None:
        """Take in the weights of a step."""
        self._steps += 1
        if self._steps == 1:
            every = {**self._dense, **self._tables}
            self._averages = {name: parameter.detach().clone() for name, parameter in every.items()}
            for settled in self._settled.values():
                settled.fill_(1)
            return
        torch._foreach_lerp_(
            [self._averages[name] for name in self._dense], list(self._dense.values()), 1 - self._decay
        )
        for name, rows in self._touched().items():
            average, weights = self._averages[name], self._tables[name].detach()
            average.index_copy_(0, rows, average[rows].lerp_(weights[rows], 1 - self._decay))
            self._settled[name][rows] = self._steps

    @torch.no_grad()
    def averages(self) -> dict[str, Tensor]:
        """The averages now, by name."""
        for name in self._tables if self._steps else ():
            self._settle(name, slice(None))
        return self._averages

    def _touched(self) -> dict[str, Tensor]:
        return {
            name: table.grad._indices()[0]  # type: ignore[no-untyped-call]
            for name, table in self._tables.items()
            if table.grad is not None
        }

    def _settle(self, name: str, rows: Any) -> None:
        """Bring rows up to the last step: their weights have been what they are since the step they are settled to."""
        average, weights, settled = self._averages[name], self._tables[name].detach(), self._settled[name]
        left = (self._decay ** (self._steps - settled[rows]).to(weights.dtype))[:, None]
        average[rows] = weights[rows] + (average[rows] - weights[rows]) * left
        settled[rows] = self._steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "averages": dict(self.averages())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = int(state["steps"])
        for name, average in state["averages"].items():
            parameter = self._dense.get(name, self._tables.get(name))
            assert parameter is not None
            self._averages[name] = average.to(parameter.device)
        for settled in self._settled.values():
            settled.fill_(self._steps)


def warm_up(step: int, steps: int) -> float:
    """Share of the learning rate in a step, from 1 on: it rises linearly over so many steps."""
    return min(1.0, step / steps) if steps else 1.0


def decayed(done: float, kind: str) -> float:
    """Share of the learning rate that is left when so much of a training is done, 0 … 1.

    Args:
        kind: ``none``, ``cosine`` or ``linear``: to 0 at the end.
    """
    left = max(1.0 - done, 0.0)
    return {"none": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(left * math.pi)}[kind]
