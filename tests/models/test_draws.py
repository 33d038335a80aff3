"""Dropout is decided per row: the same for any packing of a step and any number of workers."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from features.batch import RequestBatch, collate, compress
from models.blocks.draws import drawing, row_keys, rows_are
from models.blocks.dropout import Dropout
from models.losses import task_losses
from models.protocol import RankingModel
from tests.models.batches import make_rows, make_schema
from tests.models.unshared import unshared
from tests.models.variants import MODELS_UNDER_TEST, make_model

SCHEMA = make_schema()


def gradients(model: RankingModel, batches: list[RequestBatch], seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, summed over batches that are computed apart."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros(2, dtype=torch.double)
    for batch in batches:
        with drawing(seed, row_keys(batch)):
            loss, _ = task_losses(model(compress(batch)), batch.labels, batch.label_mask, batch.weight)
        loss.sum().backward()
        total += loss.detach()
    return total, {
        name: parameter.grad.to_dense() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def apart(rows: pa.Table, parts: int) -> list[RequestBatch]:
    return [collate(rows.take(pa.array(range(part, rows.num_rows, parts))), SCHEMA) for part in range(parts)]


@pytest.mark.parametrize("variant", MODELS_UNDER_TEST)
def test_loss_and_gradients_with_dropout_do_not_depend_on_packing_or_workers(variant: str) -> None:
    model = make_model(SCHEMA, variant).train()
    dropouts = [module for module in model.modules() if isinstance(module, Dropout) and module.rate]
    assert dropouts
    for dropout in dropouts:
        dropout.rate = 0.3
    model.inputs.id_dropout = 0.2
    rows = make_rows(SCHEMA, 3, timelines=7)
    together, expected = gradients(model, [collate(rows, SCHEMA)])
    packings = {
        "two workers": apart(rows, 2),
        "three workers": apart(rows, 3),
        "other order": [collate(rows.take(pa.array(range(rows.num_rows - 1, -1, -1))), SCHEMA)],
        "impressions": [unshared(collate(rows, SCHEMA), SCHEMA)],
    }
    for name, packing in packings.items():
        loss, found = gradients(model, packing)
        torch.testing.assert_close(loss, together, rtol=1e-9, atol=1e-9, msg=name)
        assert found.keys() == expected.keys()
        for parameter, gradient in found.items():
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-9, atol=1e-9, msg=f"{name}: {parameter}")
    other, _ = gradients(model, [collate(rows, SCHEMA)], seed=6)
    assert not torch.equal(other, together)


def test_the_share_that_is_dropped_is_the_rate_and_each_call_drops_others() -> None:
    batch = collate(make_rows(SCHEMA, 1, timelines=60), SCHEMA)
    keys, dropout = row_keys(batch), Dropout(0.2).train()
    assert len(keys.candidates.unique()) > 0.9 * batch.candidates  # an item may occur twice in a request
    assert len(keys.requests.unique()) == batch.requests
    x = torch.ones(3, batch.requests, 50, dtype=torch.double)
    with drawing(1, keys), rows_are(keys.requests):
        first, second = dropout(x), dropout(x)
    assert first.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (first == 0).double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert (first == 0).double().mean((0, 2)).std().item() < 0.06  # as of independent draws: .033
    assert ((first == 0) & (second == 0)).double().mean().item() == pytest.approx(0.04, abs=0.005)
    with drawing(1, keys), rows_are(keys.requests):
        assert torch.equal(dropout(x), first)
