"""The models against a loop-by-loop reference, and the properties that serving relies on."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from features.batch import Items, Jagged, RequestBatch, collate, cut
from models.mixformer import MixFormer, MixFormerConfig
from tests.models.batches import make_rows, make_schema
from tests.models.reference import reference_logits

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def make_model(user_heads: int | None, heads: int = 4, layers: int = 2, tasks: int = 2, bias: bool = True) -> MixFormer:
    torch.manual_seed(0)
    config = MixFormerConfig(
        heads=heads, head_dim=2 * heads, layers=layers, tower=7, user_heads=user_heads, time_bias=bias
    )
    model = MixFormer(make_schema(tasks), config).double().eval()
    for parameter in model.parameters():  # no zero biases, no ones: every parameter must matter
        nn.init.normal_(parameter, std=0.4)
    return model


def pick(batch: RequestBatch, order: Tensor) -> Items:
    """Items of a batch with one request, in another order."""

    def take(values: Tensor | Jagged) -> Tensor | Jagged:
        if isinstance(values, Tensor):
            return values[order]
        parts = [values.values[values.offsets[i] : values.offsets[i + 1]] for i in order.tolist()]
        lengths = torch.tensor([0] + [len(part) for part in parts])
        return Jagged(torch.cat(parts), lengths.cumsum(0))

    fields = {name: take(values) for name, values in batch.items.fields.items()}
    return Items(fields, torch.tensor([0, len(order)]))


@pytest.mark.parametrize("user_heads", [0, None, 1, 3])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), tasks=st.integers(1, 3), bias=st.booleans())
def test_logits_and_gradients_equal_the_reference(user_heads: int | None, seed: int, tasks: int, bias: bool) -> None:
    model = make_model(user_heads, tasks=tasks, bias=bias)
    batch = collate(make_rows(model.schema, seed, timelines=3), model.schema)
    ours, theirs = model(batch), reference_logits(model, batch)
    torch.testing.assert_close(ours, theirs, **TIGHT)
    dense = [parameter for name, parameter in model.named_parameters() if "tables" not in name]
    weights = torch.randn(ours.shape, dtype=ours.dtype)
    gradients = torch.autograd.grad((ours * weights).sum(), dense, allow_unused=True)
    expected = torch.autograd.grad((theirs * weights).sum(), dense, allow_unused=True)
    for left, right in zip(gradients, expected, strict=True):
        # a parameter that this batch does not reach has no gradient in one of them and zeros in the other
        zero = torch.zeros(())
        torch.testing.assert_close(
            left if left is not None else zero.double().expand_as(right if right is not None else zero),
            right if right is not None else torch.zeros_like(left if left is not None else zero.double()),
            **TIGHT,
        )


def test_one_head_is_a_mixformer_too() -> None:
    model = make_model(0, heads=1)
    batch = collate(make_rows(model.schema, 3), model.schema)
    torch.testing.assert_close(model(batch), reference_logits(model, batch), **TIGHT)


@pytest.mark.parametrize("user_heads", [0, 2])
def test_a_request_scores_alone_as_in_any_batch(user_heads: int) -> None:
    model = make_model(user_heads)
    rows = make_rows(model.schema, 1, timelines=6)
    together = model(collate(rows, model.schema))
    alone = torch.cat([model(collate(part, model.schema)) for part in cut(rows, 1, 1)])
    torch.testing.assert_close(together, alone, **TIGHT)


@pytest.mark.parametrize("user_heads", [0, 2])
def test_permuting_candidates_permutes_scores_and_none_sees_another(user_heads: int) -> None:
    model = make_model(user_heads)
    rows = max(
        cut(make_rows(model.schema, 4, timelines=12), 1, 1), key=lambda part: collate(part, model.schema).candidates
    )
    batch = collate(rows, model.schema)
    assert batch.requests == 1
    assert batch.candidates == 6
    state = model.encode_users(batch.users, model.encode_timelines(batch.timelines))
    scores = model.score(state, batch.items)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(model.score(state, pick(batch, order)), scores[order], **TIGHT)
    torch.testing.assert_close(model.score(state, pick(batch, torch.tensor([2]))), scores[[2]], **TIGHT)


@pytest.mark.parametrize("user_heads", [0, 2])
def test_events_beyond_the_visible_window_change_nothing(user_heads: int) -> None:
    model = make_model(user_heads)
    batch = collate(make_rows(model.schema, 8, timelines=6), model.schema)
    before = model(batch)
    touched = 0
    for sequence in model.schema.sequences:
        packed = batch.timelines[sequence.name]
        seen = torch.zeros(len(packed.ts), dtype=torch.bool)
        for r in range(batch.requests):
            first, end = packed.offsets[batch.users.timeline[r]], batch.users.end[sequence.name][r]
            seen[first + max(0, int(end) - sequence.length) : first + end] = True
        packed.fields["item_id"][~seen] = 7
        packed.ts[~seen] += 10**9
        touched += int((~seen).sum())
    assert touched
    torch.testing.assert_close(model(batch), before, **TIGHT)


def test_user_side_state_does_not_move_with_candidates_but_moves_scores() -> None:
    model = make_model(2)
    batch = collate(make_rows(model.schema, 2), model.schema)
    state = model.encode_users(batch.users, model.encode_timelines(batch.timelines))
    before = model.score(state, batch.items)
    assert state.features.shape[1] == 0  # nothing of the user is left to compute per candidate
    state.mixed[0] = state.mixed[0] + 1.0
    assert not torch.allclose(before, model.score(state, batch.items))


def test_a_request_without_visible_events_has_z_equal_to_q() -> None:
    model = make_model(2)
    batch = collate(make_rows(model.schema, 5), model.schema)
    for end in batch.users.end.values():
        end.zero_()
    without = model(batch)
    for packed in batch.timelines.values():
        packed.fields["item_id"].zero_()
    torch.testing.assert_close(model(batch), without, **TIGHT)
    assert without.isfinite().all()


def test_cut_keeps_every_candidate_once_and_in_order() -> None:
    schema = make_schema()
    rows = make_rows(schema, 6, timelines=9)
    whole = collate(rows, schema)
    for budget in (1, 5, 17, 10_000):
        parts = [collate(part, schema) for part in cut(rows, budget, 20)]
        assert [item for part in parts for item in part.item_id] == list(whole.item_id)
        assert [one for part in parts for one in part.request_id] == list(whole.request_id)
        torch.testing.assert_close(torch.cat([part.labels for part in parts]), whole.labels)
    assert isinstance(rows, pa.Table)
