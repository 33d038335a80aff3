"""A step reads, updates and moves rows of a table, never the whole of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from features.batch import Ids, collate, compress
from models.embeddings import EmbeddingTable, share_rows
from tests.models.batches import make_rows, make_schema
from tests.models.variants import MODELS_UNDER_TEST, make_model

SCHEMA = make_schema()
BATCH = collate(make_rows(SCHEMA, 3, timelines=8), SCHEMA)


def item_ids() -> Tensor:
    """Every row of the items' table that a sequence or a candidate reads, and row 0."""
    read = [BATCH.timelines[one].fields["item_id"] for one in ("seen", "bought")] + [BATCH.items.fields["item_id"]]
    return torch.cat([torch.zeros(1, dtype=torch.long), *read]).unique()


@pytest.mark.parametrize("variant", MODELS_UNDER_TEST)
def test_an_id_that_sequences_share_with_candidates_is_looked_up_once(variant: str) -> None:
    model, read = make_model(SCHEMA, variant), list[Tensor]()
    table = model.inputs.tables.table("item_id")
    table.register_forward_pre_hook(lambda _, rows: read.extend(rows))
    model(compress(BATCH)).sum().backward()
    assert len(read) == 1
    assert torch.equal(read[0], item_ids())
    assert table.weight.grad is not None
    assert torch.equal(table.weight.grad._indices()[0], item_ids())


def test_fields_over_the_same_rows_hold_the_same_ids() -> None:
    shared, rows = share_rows(compress(BATCH), SCHEMA)
    assert torch.equal(rows["item_id"], item_ids())
    own = {name: BATCH.timelines[name].fields["item_id"] for name in ("seen", "bought")}
    fields = {name: shared.timelines[name].fields["item_id"] for name in own}
    for name, field in (fields | {"item": shared.items.fields["item_id"]}).items():
        assert isinstance(field, Ids)
        assert field.unique is rows["item_id"]
        assert torch.equal(field.unique[field.index], (own | {"item": BATCH.items.fields["item_id"]})[name])
    plain, none = share_rows(BATCH, SCHEMA)
    assert none == {}
    assert plain.items.fields["item_id"] is BATCH.items.fields["item_id"]


def test_an_update_moves_touched_rows_alone() -> None:
    model = make_model(SCHEMA, "ui-mixformer")
    table = model.inputs.tables.table("item_id")
    before, optimizer = table.weight.detach().clone(), torch.optim.Adagrad(model.inputs.tables.parameters(), lr=0.1)
    model(compress(BATCH)).square().sum().backward()
    optimizer.step()
    moved = torch.nonzero((table.weight != before).any(1)).flatten()
    assert set(moved.tolist()) <= set(item_ids().tolist())
    assert len(moved) > 5


def test_rows_that_are_imported_are_those_that_were_exported() -> None:
    torch.manual_seed(0)
    one, other, rows = EmbeddingTable(20, 3), EmbeddingTable(20, 3), torch.tensor([7, 0, 19])
    before = other.weight.detach().clone()
    other.import_rows(rows, one.export_rows(rows))
    assert torch.equal(other.export_rows(rows), one.weight[rows])
    kept = [row for row in range(20) if row not in rows.tolist()]
    assert torch.equal(other.weight[kept], before[kept])


def test_numbers_are_standardised_by_the_statistics_that_were_set() -> None:
    model = make_model(SCHEMA, "ui-mixformer", double=False)
    age = BATCH.users.fields["age"]
    assert isinstance(age, Tensor)
    (field,) = [one for one in SCHEMA.features if one.name == "age"]
    before = model.inputs.embed(field, (age - 30) / 4)
    model.inputs.set_statistics({"age": (30.0, 4.0)})
    torch.testing.assert_close(model.inputs.embed(field, age), before)
