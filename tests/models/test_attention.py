"""The grouped attention against the plain one over all events at once, forward and backward."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.blocks.attention import TIME_BUCKETS, Seen, attend, observed_weights, plan_attention
from models.blocks.attention.plan import age_bucket
from models.blocks.attention.reference import attend_reference


@settings(max_examples=40, deadline=None)
@given(data=st.data(), timelines=st.integers(1, 9), sequences=st.integers(1, 2), bias=st.booleans())
def test_grouped_attention_equals_the_plain_one(
    data: st.DataObject, timelines: int, sequences: int, bias: bool
) -> None:
    draw = data.draw
    lengths = torch.tensor(
        [[draw(st.sampled_from([0, 1, 3, 8, 20])) for _ in range(timelines)] for _ in range(sequences)]
    )
    stops = lengths.flatten().cumsum(0).view_as(lengths)
    timeline = torch.tensor(sorted(draw(st.lists(st.integers(0, timelines - 1), min_size=1, max_size=12))))
    ends = torch.stack([torch.tensor([draw(st.integers(0, int(row[u]))) for u in timeline]) for row in lengths])
    window = draw(st.integers(1, 9))
    start = (stops - lengths)[:, timeline]
    E, R = int(lengths.sum()), len(timeline)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    event_ts = torch.randint(0, 10**12, (E,), generator=generator)
    ts = torch.randint(0, 10**12, (R,), generator=generator)
    seen = Seen(timeline, ts, start + (ends - window).clamp(min=0), start + ends, event_ts, timelines)
    queries = None if draw(st.booleans()) else torch.tensor([draw(st.integers(0, 5)) for _ in range(R)])
    request = torch.repeat_interleave(torch.arange(R), queries if queries is not None else torch.ones_like(timeline))
    H, D = 2, 3
    q, k, v = (torch.randn(H, n, D, dtype=torch.double, generator=generator) for n in (len(request), E, E))
    table = torch.randn(H, TIME_BUCKETS, dtype=torch.double, generator=generator) if bias else None
    inputs = [one.requires_grad_() for one in (q, k, v, table) if one is not None]

    place = torch.arange(E)
    sees = ((place >= seen.first[..., None]) & (place < seen.last[..., None])).any(0)[request]
    age = age_bucket(ts[:, None] - event_ts)[request]
    expected = attend_reference(q, k, v, sees, None if table is None else table[:, age])
    plan = plan_attention(seen, queries, q.device)
    got = attend(q, k, v, plan, table)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # the fused kernel
        torch.testing.assert_close(attend(q, k, v, plan, table), expected, rtol=1e-10, atol=1e-10)
        with observed_weights() as calls:
            attend(q, k, v, plan, table)
        (weights_HBE,) = calls
        torch.testing.assert_close(torch.bmm(weights_HBE, v), expected, rtol=1e-10, atol=1e-10)
        assert not weights_HBE.masked_select(~sees).any()
        torch.testing.assert_close(weights_HBE.sum(-1), sees.any(-1).double().expand(H, -1))
    if plan is not None:
        weights = torch.randn(got.shape, dtype=torch.double, generator=generator)
        ours, theirs = (
            torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
            for out in (got, expected)
        )
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


def test_an_age_falls_into_the_bucket_of_its_logarithm() -> None:
    seconds = torch.tensor([-5, 0, 1, 2, 3, 7, 2**31])
    assert age_bucket(seconds * 1_000_000).tolist() == [0, 0, 1, 1, 2, 3, 31]
