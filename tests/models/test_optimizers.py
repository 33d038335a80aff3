"""Optimizers of tables and the average of weights: what they change, and that only touched rows cost anything."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.optimizers import RMSProp, RowwiseAdagrad, WeightAverage, decayed, warm_up


def touch(table: nn.Embedding, rows: torch.Tensor) -> None:
    table.weight.grad = None
    (table(rows) * torch.randn(len(rows), table.embedding_dim, dtype=table.weight.dtype)).sum().backward()


def test_the_average_is_that_of_all_weights_in_every_step() -> None:
    torch.manual_seed(0)
    table, dense = nn.Embedding(30, 4, sparse=True, dtype=torch.double), nn.Linear(3, 2, dtype=torch.double)
    both = nn.ModuleDict({"table": table, "dense": dense})
    expected = AveragedModel(both, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    named = dict(both.named_parameters())
    average = WeightAverage({k: v for k, v in named.items() if "dense" in k}, {"table.weight": table.weight}, 0.9)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.1)
    for step in range(25):
        touch(table, torch.randint(0, 30, (3,)))
        average.before_step()
        optimizer.step()
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter += torch.randn_like(parameter)
        average.after_step()
        expected.update_parameters(both)
        if step == 12:  # a checkpoint in between
            saved = average.state_dict()
            average = WeightAverage(
                {k: v for k, v in named.items() if "dense" in k}, {"table.weight": table.weight}, 0.9
            )
            average.load_state_dict(saved)
    for name, values in average.averages().items():
        torch.testing.assert_close(values, expected.module.get_parameter(name).detach(), rtol=1e-12, atol=1e-12)


def test_rowwise_adagrad_divides_by_the_root_of_the_rows_mean_squares() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(6, 4, sparse=True, dtype=torch.double)
    optimizer = RowwiseAdagrad(table.parameters(), lr=0.5)
    expected, sums = table.weight.detach().clone(), torch.zeros(6, dtype=torch.double)
    for rows in ([1, 1, 3], [3, 5]):
        touch(table, torch.tensor(rows))
        assert table.weight.grad is not None
        gradient = table.weight.grad.to_dense()
        optimizer.step()
        for row in set(rows):
            sums[row] += gradient[row].square().mean()
            expected[row] -= 0.5 * gradient[row] / (sums[row].sqrt() + 1e-8)
    torch.testing.assert_close(table.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert optimizer.state_dict()["state"][0]["sum"].shape == (6,)


@pytest.mark.parametrize(
    ("kind", "expected"), [("none", [1.0, 1.0, 1.0]), ("linear", [1.0, 0.5, 0.0]), ("cosine", [1.0, 0.5, 0.0])]
)
def test_rates_rise_over_steps_and_fall_with_what_is_done(kind: str, expected: list[float]) -> None:
    assert [warm_up(step, 4) for step in (1, 3, 4, 8)] == [0.25, 0.75, 1.0, 1.0]
    assert warm_up(1, 0) == 1.0
    assert [decayed(done, kind) for done in (0.0, 0.5, 1.0)] == pytest.approx(expected)
    assert decayed(1.5, kind) in (0.0, 1.0)  # more rows than were counted


def test_rmsprops_weight_decay_is_a_share_of_the_weights_whatever_their_gradients() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.double))
    optimizer = RMSProp([weight], lr=0.01, weight_decay=0.1)
    for _ in range(10):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.999**10, dtype=torch.double))
