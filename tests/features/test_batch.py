"""Batches: what cutting keeps, what trimming hides, and that compressed ids change only the number of look-ups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from features.batch import Ids, Jagged, RequestBatch, collate, compress
from features.sample_table import between, candidate_counts, cut, fewer_negatives
from features.schema import SECOND, Schema
from models.protocol import RankingModel
from tests.models.batches import make_rows, make_schema
from tests.models.variants import make_model

SCHEMA = make_schema()
ROWS = make_rows(SCHEMA, 3, timelines=12)

budgets = st.integers(min_value=1, max_value=60)


def visible(batch: RequestBatch) -> list[tuple[Any, ...]]:
    """Per request its id, its candidates and everything that it sees of every sequence."""
    seen = []
    for r in range(batch.requests):
        first, last = batch.items.offsets[r : r + 2].tolist()
        parts: list[Any] = [batch.request_id[r], batch.item_id[first:last].tolist()]
        for sequence in SCHEMA.sequences:
            packed, end = batch.timelines[sequence.name], int(batch.users.end[sequence.name][r])
            start = int(packed.offsets[batch.users.timeline[r]])
            window = slice(start + max(0, end - sequence.length), start + end)
            item_id = packed.fields["item_id"]
            assert isinstance(item_id, torch.Tensor)
            parts += [packed.ts[window].tolist(), item_id[window].tolist()]
        seen.append(tuple(parts))
    return seen


@given(candidates=budgets, events=budgets, seed=st.integers(0, 50), trimmed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_cutting_loses_and_repeats_nothing_and_changes_nothing_that_a_request_sees(
    candidates: int, events: int, seed: int, trimmed: bool
) -> None:
    rows = ROWS.take(pa.array(np.random.default_rng(seed).permutation(ROWS.num_rows)))
    parts = list(cut(rows, candidates, events, SCHEMA.sequences if trimmed else ()))
    assert [one for part in parts for one in visible(collate(part, SCHEMA))] == visible(collate(rows, SCHEMA))


@given(candidates=budgets, events=budgets)
@settings(max_examples=60, deadline=None)
def test_a_batch_is_above_the_budget_only_where_it_cannot_be_cut(candidates: int, events: int) -> None:
    for part in cut(ROWS, candidates, events):
        counts = candidate_counts(part)
        assert counts["candidates"] <= candidates or counts["requests"] == 1
        assert counts["events"] <= events or counts["rows"] == 1


@given(candidates=budgets, events=budgets)
@settings(max_examples=30, deadline=None)
def test_a_batch_takes_as_many_rows_as_fit(candidates: int, events: int) -> None:
    counts = [candidate_counts(part) for part in cut(ROWS, candidates, events)]
    sizes = [candidate_counts(part) for part in cut(ROWS, candidates, 0)]  # one row a batch
    firsts = np.cumsum([0, *[one["rows"] for one in counts]])[1:-1]
    for batch, first in zip(counts, firsts, strict=False):
        following = sizes[first]
        more = batch["candidates"] + following["candidates"], batch["events"] + following["events"]
        assert more[0] > candidates or more[1] > events


def test_a_row_above_the_budget_is_split_by_request_and_its_copies_keep_only_the_events_they_show() -> None:
    row = ROWS.filter(pa.array([len(one) == 3 for one in ROWS["requests"].to_pylist()])).slice(0, 1)
    parts = [collate(part, SCHEMA) for part in cut(row, 1, 10**6, SCHEMA.sequences)]
    assert [part.requests for part in parts] == [1, 1, 1]
    assert [one for part in parts for one in visible(part)] == visible(collate(row, SCHEMA))
    for part in parts:
        for sequence in SCHEMA.sequences:
            assert len(part.timelines[sequence.name].ts) == min(int(part.users.end[sequence.name]), sequence.length)
    assert sum(len(one.timelines["seen"].ts) for one in parts) > 0


def test_a_slice_of_a_table_is_a_batch_like_its_copy() -> None:
    whole = visible(collate(ROWS, SCHEMA))
    owners = collate(ROWS, SCHEMA).users.timeline
    piece = visible(collate(ROWS.slice(4, 5), SCHEMA))
    assert piece == [one for one, owner in zip(whole, owners.tolist(), strict=True) if 4 <= owner < 9]


def test_a_cut_in_time_keeps_exactly_the_requests_within_it() -> None:
    times = collate(ROWS, SCHEMA).users.ts
    low, high = 1501 * SECOND, 2001 * SECOND
    kept = collate(between(ROWS, low, high), SCHEMA)
    inside = [one for one, ts in zip(visible(collate(ROWS, SCHEMA)), times.tolist(), strict=True) if low <= ts < high]
    assert visible(kept) == inside
    assert 0 < len(inside) < len(times)


def id_fields(batch: RequestBatch) -> dict[str, Any]:
    """Every field by a name of its own."""
    fields = {f"{name}.{key}": one for name, part in batch.timelines.items() for key, one in part.fields.items()}
    return fields | batch.users.fields | {f"item.{key}": one for key, one in batch.items.fields.items()}


def test_compressed_fields_hold_the_same_rows_each_once_in_order_after_row_0() -> None:
    plain = collate(ROWS, SCHEMA)
    short, compared = compress(plain), 0
    for name, field in id_fields(short).items():
        before = id_fields(plain)[name]
        if isinstance(field, Jagged):
            assert torch.equal(field.offsets, before.offsets)
            field, before = field.values, before.values
        if not isinstance(field, Ids):
            assert field is before  # a number
            continue
        assert torch.equal(field.unique[field.index], before)
        assert field.unique.tolist() == sorted({0, *before.tolist()})
        compared += 1
    assert compared == 6
    assert id_fields(compress(short)) == id_fields(short)  # the same objects: compressing twice changes nothing


def gradients(model: RankingModel, batch: RequestBatch) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    model(batch).square().sum().backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("variant", ["mixformer", "ui-mixformer", "hyformer, SwiGLU encoding"])
@pytest.mark.parametrize("training", [False, True])
def test_compressed_ids_give_the_same_scores_and_gradients(variant: str, training: bool) -> None:
    """In training, too: the same occurrences are dropped to row 0."""
    model, batch = make_model(SCHEMA, variant).train(training), collate(ROWS, SCHEMA)
    model.inputs.id_dropout = 0.3
    scores = []
    for one in (batch, compress(batch)):
        torch.manual_seed(0)
        scores.append(model(one))
    assert torch.equal(scores[0], scores[1])
    plain, short = gradients(model, batch), gradients(model, compress(batch))
    assert plain.keys() == short.keys()
    for name, one in plain.items():
        torch.testing.assert_close(short[name].to_dense(), one.to_dense(), rtol=1e-9, atol=1e-9)


def test_compressed_ids_give_one_gradient_row_per_distinct_id_of_a_field() -> None:
    model, batch = make_model(SCHEMA, "mixformer"), compress(collate(ROWS, SCHEMA))
    gradient = gradients(model, batch)["inputs.tables.user_id.weight"]
    user_id = batch.users.fields["user_id"]
    assert isinstance(user_id, Ids)
    assert gradient._nnz() == len(user_id.unique) < batch.requests


def test_each_part_of_a_compressed_batch_is_complete_for_the_call_that_takes_it() -> None:
    model, batch = make_model(SCHEMA, "ui-mixformer").eval(), collate(ROWS, SCHEMA)
    short = compress(batch)
    mixed = replace(batch, items=short.items)
    state = model.encode_users(batch.users, model.encode_timelines(short.timelines))
    assert torch.equal(model.score(state, short.items), model(batch))
    assert torch.equal(model(mixed), model(batch))
    assert torch.equal(model(compress(mixed)), model(batch))


def test_no_sum_of_a_step_on_compressed_ids_depends_on_the_order_of_threads() -> None:
    model, batch = make_model(SCHEMA, "ui-mixformer").train(), compress(collate(ROWS, SCHEMA))
    pending, names, known = [model(batch).grad_fn], set(), set()
    while pending:
        node = pending.pop()
        if node is not None and node not in known:
            known.add(node)
            names.add(type(node).__name__)
            pending += [one for one, _ in node.next_functions]
    assert {"EmbeddingBackward0", "EmbeddingBagBackward0"} <= names
    assert "IndexBackward0" not in names


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ({"a": "b__c", "a__b": "c"}, "same column a__b__c"),
        ({"a": "x__ts"}, "choose another name, with `column: x__ts`"),
        ({"a": "x__event_id"}, "choose another name, with `column: x__event_id`"),
    ],
)
def test_names_that_would_give_two_meanings_to_a_column_are_refused(sequences: dict[str, str], message: str) -> None:
    declared = SCHEMA.model_dump()
    fields = [{"name": name, "events": "events", "fields": [{"name": field}]} for name, field in sequences.items()]
    with pytest.raises(ValueError, match=message):
        Schema.model_validate({**declared, "sequences": fields})


def test_names_with_two_underscores_stay_allowed_where_columns_differ() -> None:
    fields = [{"name": name, "events": "events", "fields": [{"name": "c__d"}]} for name in ("a", "a__b")]
    assert len(Schema.model_validate({**SCHEMA.model_dump(), "sequences": fields}).sequences) == 2


def test_fewer_negatives_keep_every_other_candidate_and_weigh_as_much_in_all() -> None:
    rows = make_rows(SCHEMA, 5, timelines=400)

    def candidates(table: Any) -> dict[tuple[str, str, int], tuple[list[Any], float]]:
        """By request, item and place among equal ones: labels and weight."""
        found: dict[tuple[str, str, int], tuple[list[Any], float]] = {}
        for row in table.to_pylist():
            for request in row["requests"]:
                assert request["candidates"]
                for one in request["candidates"]:
                    labels = [one[f"label__{task.name}"] for task in SCHEMA.tasks]
                    place = sum(key[:2] == (request["request_id"], one["item_id"]) for key in found)
                    found[request["request_id"], one["item_id"], place] = labels, one["weight"]
        return found

    def is_negative(labels: list[Any]) -> bool:
        return 0 in labels and 1 not in labels

    before, left = candidates(rows), candidates(fewer_negatives(rows, SCHEMA.tasks, 0.25, 1))
    negatives = [key for key, (labels, _) in before.items() if is_negative(labels)]
    kept = [key for key, (labels, _) in left.items() if is_negative(labels)]
    assert 0.2 < len(kept) / len(negatives) < 0.3
    assert {weight for labels, weight in left.values() if is_negative(labels)} == {4.0}
    others = [value for value in before.values() if not is_negative(value[0])]
    assert [value for value in left.values() if not is_negative(value[0])] == others
    assert fewer_negatives(rows, SCHEMA.tasks, 0.25, 1).equals(fewer_negatives(rows, SCHEMA.tasks, 0.25, 1))
    assert not fewer_negatives(rows, SCHEMA.tasks, 0.25, 1).equals(fewer_negatives(rows, SCHEMA.tasks, 0.25, 2))
    apart = [fewer_negatives(rows.slice(place, 1), SCHEMA.tasks, 0.25, 1) for place in range(20)]
    assert sum(part.num_rows for part in apart) == fewer_negatives(rows.slice(0, 20), SCHEMA.tasks, 0.25, 1).num_rows
    assert fewer_negatives(rows, SCHEMA.tasks, 1.0, 1) is rows
    assert fewer_negatives(between(rows, 0, 1), SCHEMA.tasks, 0.5, 1).num_rows == 0
    assert collate(fewer_negatives(rows, SCHEMA.tasks, 0.25, 1), SCHEMA).candidates == len(left)
