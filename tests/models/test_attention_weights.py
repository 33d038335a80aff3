"""Which events a request's candidates attend to."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from features.batch import collate
from models.attention import attention_weights
from models.blocks.attention import observed_weights
from tests.models.batches import make_rows, make_schema
from tests.models.variants import MODELS_UNDER_TEST, make_model

SCHEMA = make_schema()


def rows_as_served(seen: int, bought: int) -> pa.Table:
    """A request of three candidates, its timelines cut to what it sees."""
    (row,) = make_rows(SCHEMA, 0, timelines=1).to_pylist()
    request = row["requests"][0]
    for name, count in (("seen", seen), ("bought", bought)):
        row[f"{name}__ts"], row[f"{name}__item_id"] = list(range(1, count + 1)), [number**5 for number in range(count)]
        request[f"end__{name}"] = count
    request["candidates"] = [{**request["candidates"][0], "feature__item_id": item} for item in (1, 10**6, 10**8)]
    row["requests"] = [request]
    return pa.Table.from_pylist([row], schema=make_rows(SCHEMA, 0).schema)


@pytest.mark.parametrize("variant", MODELS_UNDER_TEST)
@pytest.mark.parametrize(("seen", "bought"), [(4, 2), (3, 0), (0, 0)])
def test_every_candidate_spreads_a_weight_of_one_over_the_events_of_a_softmax(
    variant: str, seen: int, bought: int
) -> None:
    model, batch = make_model(SCHEMA, variant), collate(rows_as_served(seen, bought), SCHEMA)
    scores = model(batch)
    weights = attention_weights(model, batch)
    assert {name: tuple(each.shape) for name, each in weights.items()} == {"seen": (3, seen), "bought": (3, bought)}
    assert all((each >= 0).all() for each in weights.values())
    for sequences in model.streams:
        total = sum(weights[sequence.name].sum(1) for sequence in sequences)
        events = sum({"seen": seen, "bought": bought}[sequence.name] for sequence in sequences)
        torch.testing.assert_close(total, torch.full((3,), float(events > 0), dtype=scores.dtype))
    if seen:
        assert not torch.equal(weights["seen"][0], weights["seen"][1])  # candidates attend each in its own way
    assert torch.equal(model(batch), scores)  # looking changes nothing


def test_nobody_is_observed_outside_of_the_block() -> None:
    model, batch = make_model(SCHEMA, "ui-mixformer"), collate(rows_as_served(2, 1), SCHEMA)
    with observed_weights() as calls:
        model(batch)
    count = len(calls)
    model(batch)
    assert len(calls) == count > 0
