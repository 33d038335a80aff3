"""Every model and switch against a loop-by-loop reference, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from features.batch import collate
from tests.models.batches import make_rows, make_schema
from tests.models.variants import MODELS_UNDER_TEST, VARIANTS, dense_parameters, make_model, reference_logits

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tasks=st.integers(1, 3),
    length=st.integers(1, 8),
    layers=st.integers(1, 3),
    slices=st.integers(1, 3),
)
def test_logits_and_gradients_equal_the_reference(
    variant: str, seed: int, tasks: int, length: int, layers: int, slices: int
) -> None:
    schema = make_schema(tasks, length)
    model = make_model(schema, variant, layers=layers, slices=slices)
    batch = collate(make_rows(schema, seed, timelines=2), schema)
    ours, theirs = model(batch), reference_logits(model, batch)
    torch.testing.assert_close(ours, theirs, **TIGHT)
    dense = list(dense_parameters(model).values())
    weights = torch.randn(ours.shape, dtype=ours.dtype)
    gradients = torch.autograd.grad((ours * weights).sum(), dense, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad((theirs * weights).sum(), dense, allow_unused=True, materialize_grads=True)
    for left, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10 * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("variant", MODELS_UNDER_TEST)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_paths_without_gradients_equal_the_reference(variant: str, seed: int) -> None:
    schema = make_schema()
    model = make_model(schema, variant)
    batch = collate(make_rows(schema, seed, timelines=5), schema)
    with torch.inference_mode():
        torch.testing.assert_close(model(batch), reference_logits(model, batch), **TIGHT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameter_is_dead(variant: str) -> None:
    schema = make_schema()
    model = make_model(schema, variant)
    model(collate(make_rows(schema, 7, timelines=12), schema)).square().sum().backward()
    dead = [name for name, one in dense_parameters(model).items() if one.grad is None or not one.grad.any()]
    assert dead == []


@pytest.mark.parametrize("variant", MODELS_UNDER_TEST)
def test_bf16_errs_at_most_twice_as_much_as_eager_bf16(variant: str) -> None:
    schema = make_schema()
    exact, low = make_model(schema, variant, std=0.2), make_model(schema, variant, double=False, std=0.2).bfloat16()
    exact.load_state_dict({name: value.double() for name, value in low.state_dict().items()})  # the same weights
    batch = collate(make_rows(schema, 11, timelines=8), schema)
    with torch.inference_mode():
        ours, eager = low(batch), reference_logits(low, batch)
        truth = exact(batch)
        errors = [float((one.double() - truth).square().mean().sqrt()) for one in (ours, eager)]
    assert errors[0] <= 2 * errors[1], errors
    assert errors[1] < 0.1 * float(truth.std())  # the comparison says something
