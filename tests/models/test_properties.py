"""What serving and training rely on, for every model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import is_dataclass

import pytest
import torch
from torch import Tensor

from features.batch import Items, Jagged, RequestBatch, Timeline, Values, collate, nbytes
from features.sample_table import cut
from models.losses import task_losses
from models.mixformer.model import MixFormer
from models.protocol import RankingModel
from models.registry import MODELS
from models.state import EncodedEvents, TimelineState, UserState
from tests.models.batches import make_rows, make_schema
from tests.models.unshared import take, unshared
from tests.models.variants import MODELS_UNDER_TEST, VARIANTS, dense_parameters, make_model

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
SCHEMA = make_schema()

every_model = pytest.mark.parametrize("variant", MODELS_UNDER_TEST)


def batch_of(seed: int, timelines: int = 6) -> RequestBatch:
    return collate(make_rows(SCHEMA, seed, timelines), SCHEMA)


def one_request() -> RequestBatch:
    """A single request with history and six candidates."""
    parts = cut(make_rows(SCHEMA, 4, timelines=12), 1, 1)
    batches = [batch for batch in (collate(part, SCHEMA) for part in parts) if batch.users.end["seen"].any()]
    batch = max(batches, key=lambda one: one.candidates)
    assert batch.requests == 1
    assert batch.candidates == 6
    return batch


def pick(batch: RequestBatch, order: list[int]) -> Items:
    """These candidates of the one request, in this order."""
    fields = {name: take(values, torch.tensor(order)) for name, values in batch.items.fields.items()}
    return Items(fields, torch.tensor([0, len(order)]))


def user_state(model: RankingModel, batch: RequestBatch) -> UserState:
    return model.encode_users(batch.users, model.encode_timelines(batch.timelines))


@every_model
def test_permuting_candidates_permutes_scores(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), one_request()
    state = user_state(model, batch)
    order = [3, 1, 5, 0, 2, 4]
    scores = model.score(state, batch.items)
    torch.testing.assert_close(model.score(state, pick(batch, order)), scores[order], **TIGHT)


@every_model
def test_changing_one_candidate_changes_no_other_score(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), one_request()
    before = model(batch)
    item = batch.items.fields["item_id"]
    assert isinstance(item, Tensor)
    item[2] = (item[2] + 1) % 50
    after = model(batch)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(after[others], before[others], **TIGHT)
    assert not torch.allclose(after[2], before[2])


@every_model
def test_events_outside_of_the_visible_window_change_nothing(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), batch_of(8)
    before, touched = model(batch), 0
    for sequence in SCHEMA.sequences:
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


@every_model
def test_a_visible_event_matters(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), one_request()
    before = model(batch)
    batch.timelines["seen"].fields["item_id"][int(batch.users.end["seen"][0]) - 1] += 1
    assert not torch.allclose(model(batch), before)


POISONED = 49
"""An embedding row that only what is to be poisoned reads."""


def sees(batch: RequestBatch, sequence: str, event: int) -> Tensor:
    """Which requests see this event, [R]."""
    packed, end = batch.timelines[sequence], batch.users.end[sequence]
    place = event - packed.offsets[batch.users.timeline]
    length = next(one.length for one in SCHEMA.sequences if one.name == sequence)
    return (place >= 0) & (place < end) & (place >= end - length)


def poisoned(seed: int) -> Iterator[tuple[str, RequestBatch, Tensor]]:
    """Batches in which one request, or one event, alone reads POISONED; its table, and the requests it reaches."""
    batch = batch_of(seed)
    batch.users.fields["user_id"] = torch.arange(batch.requests) + 1
    batch.users.fields["user_id"][1] = POISONED
    yield "user_id", batch, torch.arange(batch.requests) == 1
    for sequence in SCHEMA.sequences:
        kinds = set()
        for event in range(len(batch_of(seed).timelines[sequence.name].ts)):
            batch = batch_of(seed)
            for fields in (*(one.fields for one in batch.timelines.values()), batch.items.fields):
                fields["item_id"] = fields["item_id"] % POISONED
            batch.timelines[sequence.name].fields["item_id"][event] = POISONED
            reached = sees(batch, sequence.name, event)
            # an event that nobody sees, and one that some requests of its timeline see and others do not
            beside = batch.users.timeline == batch.users.timeline[reached][0] if reached.any() else reached
            kind = (bool(reached.any()), bool((beside & ~reached).any()))
            if kind in {(False, False), (True, True)} - kinds:
                kinds.add(kind)
                yield "item_id", batch, reached


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_request_does_not_see_cannot_touch_it_nan_included(variant: str, value: float) -> None:
    clean, model = (make_model(SCHEMA, variant, double=False) for _ in range(2))
    cases = list(poisoned(seed=1))
    assert {table for table, *_ in cases} == {"user_id", "item_id"}
    assert any(len(batch.users.end["seen"][~reached & (batch.users.end["seen"] == 0)]) for _, batch, reached in cases)
    for table, batch, reached in cases:
        touched = reached[batch.items.request]
        model.load_state_dict(clean.state_dict())
        model.inputs.tables[table].weight.data[POISONED] = value
        with torch.inference_mode():
            assert torch.equal(model(batch)[~touched], clean(batch)[~touched])
        gradients = []
        for one in (clean, model):
            scores = one(batch)
            gradients += torch.autograd.grad(scores[~touched].sum(), one.inputs.tables[table].weight)
        assert not scores[touched].isfinite().any()
        others = torch.arange(len(gradients[0])) != POISONED  # rows that only requests which it does not reach read
        for request in torch.nonzero(reached).flatten():
            if table == "user_id":
                others[batch.users.fields["user_id"][request]] = False
                continue
            others[batch.items.fields["item_id"][batch.items.request == request]] = False
            for name, packed in batch.timelines.items():
                seen = [event for event in range(len(packed.ts)) if sees(batch, name, event)[request]]
                others[packed.fields["item_id"][seen]] = False
        left, right = (one.to_dense()[others] for one in gradients)
        assert torch.equal(left, right)


def test_a_candidate_without_label_or_weight_takes_no_part_in_the_loss_whatever_its_score_is() -> None:
    logits = torch.tensor([[0.5], [torch.nan], [torch.inf]], requires_grad=True)
    labels, mask = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[True], [False], [True]])
    loss, weight = task_losses(logits, labels, mask, torch.tensor([2.0, torch.nan, 0.0]))
    loss.sum().backward()
    assert weight.tolist() == [2.0]
    assert loss.item() == pytest.approx(2 * math.log1p(math.exp(-0.5)))
    assert logits.grad is not None
    assert logits.grad[0] == pytest.approx(-2 / (1 + math.exp(0.5)))


@every_model
def test_a_request_scores_alone_as_in_any_batch(variant: str) -> None:
    model, rows = make_model(SCHEMA, variant), make_rows(SCHEMA, 1, timelines=6)
    alone = torch.cat([model(collate(part, SCHEMA)) for part in cut(rows, 1, 1)])
    torch.testing.assert_close(model(collate(rows, SCHEMA)), alone, **TIGHT)


@every_model
def test_shared_timelines_score_as_unshared_ones(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), batch_of(3, timelines=8)
    alone = unshared(batch, SCHEMA)
    assert len(alone.timelines["seen"].offsets) - 1 == batch.candidates > len(batch.timelines["seen"].offsets) - 1
    torch.testing.assert_close(model(alone), model(batch), **TIGHT)


@every_model
def test_the_three_calls_are_the_forward_pass(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), batch_of(5)
    scores = model.score(user_state(model, batch), batch.items)
    assert torch.equal(scores, model(batch))


@every_model
def test_a_batch_without_any_visible_event_has_finite_scores_that_no_event_moves(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), batch_of(5)
    for end in batch.users.end.values():
        end.zero_()
    without = model(batch)
    without.sum().backward()
    # data-parallel training waits for the gradient of every parameter, also where a worker's share has no event
    assert [name for name, one in dense_parameters(model).items() if one.grad is None] == []
    for packed in batch.timelines.values():
        packed.fields["item_id"].zero_()
    assert torch.equal(model(batch), without)
    assert without.isfinite().all()


@every_model
def test_appending_events_to_a_timeline_state_equals_computing_it_whole(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), batch_of(9)
    early, late = {}, {}
    for name, packed in batch.timelines.items():
        lengths = packed.offsets.diff()
        kept = lengths // 2
        place = torch.arange(len(packed.ts)) - torch.repeat_interleave(packed.offsets[:-1], lengths)
        first = place < torch.repeat_interleave(kept, lengths)
        for part, chosen, counts in ((early, first, kept), (late, ~first, lengths - kept)):
            rows = torch.nonzero(chosen).flatten()
            fields = {field: take(values, rows) for field, values in packed.fields.items()}
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            part[name] = Timeline(fields, packed.ts[rows], offsets)
    whole = model.encode_timelines(batch.timelines)
    appended = model.encode_timelines(early).append(model.encode_timelines(late))
    assert_alike(appended, whole)
    skipped = [
        torch.stack([early[sequence.name].offsets.diff() for sequence in stream])
        if stream
        else torch.zeros(0, whole.events[0].timelines, dtype=torch.long)
        for stream in model.streams
    ]
    assert_alike(whole.since(skipped), model.encode_timelines(late))
    assert appended.nbytes == whole.since([torch.zeros_like(counts) for counts in skipped]).nbytes
    scores = model.score(model.encode_users(batch.users, appended), batch.items)
    torch.testing.assert_close(scores, model(batch), **TIGHT)


def assert_alike(state: TimelineState, other: TimelineState) -> None:
    for left, right in zip(state.events, other.events, strict=True):
        assert isinstance(left, EncodedEvents)
        assert torch.equal(left.offsets, right.offsets)
        assert torch.equal(left.ts, right.ts)
        for ours, theirs in zip(left.layers, right.layers, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, **TIGHT)


def test_every_registered_model_is_held_to_this() -> None:
    assert {changes["name"] for changes in MODELS_UNDER_TEST.values()} == set(MODELS)


def assert_equal(left: object, right: object) -> None:
    """Of two states: every tensor the same, bit for bit."""
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        assert torch.equal(left, right)
    elif is_dataclass(left):
        assert type(left) is type(right)
        assert_equal(vars(left), vars(right))
    elif isinstance(left, dict):
        assert isinstance(right, dict)
        assert left.keys() == right.keys()
        assert_equal(list(left.values()), list(right.values()))
    elif isinstance(left, (list, tuple)):
        assert isinstance(right, (list, tuple))
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


def rows_from(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count)


@every_model
def test_what_is_taken_out_of_a_concatenation_is_what_went_in(variant: str) -> None:
    model, batches = make_model(SCHEMA, variant), [batch_of(seed) for seed in (3, 5, 8)]
    timelines = [model.encode_timelines(batch.timelines) for batch in batches]
    users = [user_state(model, batch) for batch in batches]
    together, merged, first = TimelineState.concat(timelines), type(users[0]).concat(users), 0
    for index, (batch, timeline, user) in enumerate(zip(batches, timelines, users, strict=True)):
        count = len(batch.timelines["seen"].offsets) - 1
        assert_equal(together.take(rows_from(6 * index, count)), timeline)
        assert_equal(merged.take(rows_from(first, batch.requests)), user)
        first += batch.requests


@every_model
def test_scores_from_a_concatenation_are_the_scores_apart(variant: str) -> None:
    model, batches = make_model(SCHEMA, variant), [batch_of(seed) for seed in (3, 5, 8)]
    items = [batch.items for batch in batches]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat([one.offsets.diff() for one in items]).cumsum(0)])
    tags = [one.fields["tags"] for one in items]
    assert all(isinstance(one, Jagged) for one in tags)
    lengths = torch.cat([one.offsets.diff() for one in tags])
    fields: dict[str, Values] = {
        "item_id": torch.cat([one.fields["item_id"] for one in items]),
        "tags": Jagged(torch.cat([one.values for one in tags]), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])),
    }
    apart = torch.cat([model(batch) for batch in batches])
    states = [user_state(model, batch) for batch in batches]
    state = type(states[0]).concat(states)
    torch.testing.assert_close(model.score(state, Items(fields, offsets)), apart, rtol=1e-12, atol=1e-12)


@every_model
def test_requests_are_taken_in_any_order_and_number(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), batch_of(8)
    scores = model(batch).split(batch.items.offsets.diff().tolist())
    order = [*reversed(range(batch.requests)), 0, 2, 0]
    candidates = torch.cat([rows_from(int(batch.items.offsets[r]), len(scores[r])) for r in order])
    fields = {name: take(values, candidates) for name, values in batch.items.fields.items()}
    counts = torch.tensor([len(scores[r]) for r in order])
    items = Items(fields, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    taken = user_state(model, batch).take(torch.tensor(order))
    expected = torch.cat([scores[r] for r in order])
    torch.testing.assert_close(model.score(taken, items), expected, rtol=1e-12, atol=1e-12)


@every_model
def test_users_are_encoded_from_timelines_that_were_taken(variant: str) -> None:
    """The memo's way: timelines of several batches, one of them alone, in another order."""
    model, batch = make_model(SCHEMA, variant), batch_of(8)
    timelines = model.encode_timelines(batch.timelines)
    backwards = timelines.take(torch.arange(6).flip(0)).take(torch.arange(6).flip(0))
    assert_equal(backwards, timelines)
    parts = TimelineState.concat([timelines.take(rows_from(index, 1)) for index in range(6)])
    torch.testing.assert_close(
        model.score(model.encode_users(batch.users, parts), batch.items), model(batch), rtol=1e-12, atol=1e-12
    )


@every_model
def test_a_state_that_was_taken_keeps_nothing_of_the_others_alive(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), batch_of(8)
    with torch.no_grad():
        timelines, users = model.encode_timelines(batch.timelines), user_state(model, batch)
    assert max(timelines.take(rows_from(index, 1)).nbytes for index in range(6)) < timelines.nbytes / 2
    assert users.take(rows_from(0, 1)).nbytes < users.nbytes / 2


def tensors_of(state: object) -> list[Tensor]:
    """Every tensor of a state or a batch."""
    if isinstance(state, Tensor):
        return [state]
    parts = vars(state) if is_dataclass(state) else state
    parts = parts.values() if isinstance(parts, dict) else parts if isinstance(parts, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_keeps_no_memory_alive_that_it_does_not_use(variant: str) -> None:
    model, batch = make_model(SCHEMA, variant), batch_of(8)
    of_batch = {one.untyped_storage().data_ptr() for one in tensors_of(batch)}
    with torch.no_grad():
        timelines = model.encode_timelines(batch.timelines)
        states = timelines, model.encode_users(batch.users, timelines)
    for state in states:
        unused: dict[int, int] = {}
        for one in tensors_of(state):
            storage = one.untyped_storage()
            unused.setdefault(storage.data_ptr(), storage.nbytes())
            unused[storage.data_ptr()] -= one.nbytes
        assert [size for memory, size in unused.items() if size > 0 and memory not in of_batch] == []


@every_model
def test_no_sum_of_a_training_step_depends_on_the_order_of_threads(variant: str) -> None:
    """Indexing with a tensor adds its gradients up by atomics, in whatever order the threads come."""
    model, batch = make_model(SCHEMA, variant).train(), batch_of(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(batch).sum().backward()
    names = {event.key.removeprefix("autograd::engine::evaluate_function: ") for event in profile.key_averages()}
    assert "IndexSelectBackward0" in names
    assert "IndexBackward0" not in names


@every_model
def test_an_empty_batch_has_no_scores(variant: str) -> None:
    batch = collate(make_rows(SCHEMA, 1).slice(0, 0), SCHEMA)
    assert make_model(SCHEMA, variant)(batch).shape == (0, 2)


@pytest.mark.parametrize("variant", ["mixformer", "ui-mixformer"])
def test_a_schema_without_sequences_is_scored(variant: str) -> None:
    schema = SCHEMA.model_copy(update={"sequences": ()})
    batch = collate(make_rows(schema, 1), schema)
    model = make_model(schema, variant)
    scores = model(batch)
    assert scores.isfinite().all()
    state = user_state(model, batch)
    first, rest = state.take(torch.arange(1)), state.take(torch.arange(1, batch.requests))
    assert torch.equal(model.score(type(state).concat([first, rest]), batch.items), scores)


def test_user_heads_hang_on_nothing_of_the_item_side_and_move_every_layers_item_heads() -> None:
    model, batch = make_model(SCHEMA, "ui-mixformer"), one_request()
    assert isinstance(model, MixFormer)
    state = user_state(model, batch)
    assert state.features is None  # nothing of the user is left to compute per candidate
    of_items = [model.item_split.project.weight, model.inputs.tables["tags"].weight]
    of_users = [model.user_split.project.weight, model.inputs.tables["user_id"].weight]
    total = sum(one.sum() for one in state.received) + state.tower.sum()
    gradients = torch.autograd.grad(total, [*of_items, *of_users], allow_unused=True, retain_graph=True)
    assert [one is None for one in gradients] == [True, True, False, False]
    before = model.score(state, batch.items)
    for layer in range(model.config.layers):
        state.received[layer] = state.received[layer] + 1.0
        assert not torch.allclose(before, model.score(state, batch.items))
        state.received[layer] = state.received[layer] - 1.0


def test_the_number_of_item_heads_follows_the_embedding_widths() -> None:
    model = make_model(SCHEMA, "ui-mixformer")  # D_ns^G = 9 of D_ns = 19, N = 4: N_G = ⌊36 / 19⌋
    assert isinstance(model, MixFormer)
    assert model.user_heads == 3


def test_training_mode_is_seeded_and_keeps_the_expectation_of_dropout() -> None:
    from models.blocks.dropout import Dropout

    x = torch.ones(1_000_003)
    dropout = Dropout(0.2)
    torch.manual_seed(5)
    once = dropout(x)
    torch.manual_seed(5)
    assert torch.equal(once, dropout(x))
    assert float((once == 0).float().mean()) == pytest.approx(0.2, abs=0.005)
    assert float(once.mean()) == pytest.approx(1.0, abs=0.005)
    assert torch.equal(dropout.eval()(x), x)


def test_bytes_of_a_state_count_shared_memory_once_and_all_that_a_view_keeps_alive() -> None:
    x = torch.zeros(10, 4)
    assert nbytes([x, x[:2], {"again": x}]) == 160
    assert nbytes(x[:2]) == 160


def test_cut_keeps_every_candidate_once_and_in_order() -> None:
    rows = make_rows(SCHEMA, 6, timelines=9)
    whole = collate(rows, SCHEMA)
    for budget in (1, 5, 17, 10_000):
        parts = [collate(part, SCHEMA) for part in cut(rows, budget, 20)]
        assert [item for part in parts for item in part.item_id] == list(whole.item_id)
        assert [one for part in parts for one in part.request_id] == list(whole.request_id)
        torch.testing.assert_close(torch.cat([part.labels for part in parts]), whole.labels)
