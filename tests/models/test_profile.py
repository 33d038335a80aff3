"""Presets match the papers' sizes, and counted FLOPs agree with the closed form."""

from __future__ import annotations

import pytest

from models.profile import (
    PAPER_RATIO,
    cost,
    decoupling_ratios,
    dense_parameters,
    industrial_schema,
    on_meta,
    sharing_for,
)
from models.registry import MODELS, find_preset, preset_names
from models.sizes import width_of


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("mixformer-small", 282),
        ("mixformer-medium", 1_226),
        ("ui-mixformer-small", 282),
        ("ui-mixformer-medium", 1_226),
        ("hyformer", 418),
    ],
)
def test_paper_presets_have_the_published_dense_parameters(preset: str, millions: int) -> None:
    name, size = find_preset(preset)
    schema = industrial_schema(sequences=3, tasks=1) if name == "hyformer" else industrial_schema()
    assert dense_parameters(on_meta(schema, name, size)) == pytest.approx(millions * 1e6, rel=0.05)


@pytest.mark.parametrize("name", ["mixformer", "ui-mixformer", "hyformer"])
def test_base_has_about_five_million(name: str) -> None:
    assert 4e6 < dense_parameters(on_meta(industrial_schema(), name, "base")) < 6e6


def closed_form(decoupled: bool, preset: str, candidates: int, length: int) -> tuple[int, int, int]:
    """FLOPs of encode_timelines, encode_users and score, from the equations alone."""
    sizes, schema = MODELS["mixformer"].presets[preset], industrial_schema()
    N, D, L = sizes["heads"], sizes["head_dim"], sizes["layers"]
    F, F_s = sizes.get("ffn", 2) * D, sizes.get("sequence_ffn", 2) * D
    H, K, T, C = sizes["tower"], len(schema.tasks), length, candidates
    N_U = N // 2 if decoupled else 0
    N_G = N - N_U
    aligned = 2 * (width_of(schema.sequences[0].fields) + 4) * N * D
    timelines = T * (aligned + L * (2 * 3 * N * D * F_s + N_G * 2 * 2 * D * D))  # align; eq. 5; eq. 7

    def heads(rows: int, count: int, width: int, extra: int) -> int:
        split = 2 * width * D
        block = 2 * 2 * 3 * D * F + 2 * 2 * T * D + extra  # eq. 4 and 9; eq. 8
        return rows * (split + count * L * block + count * 2 * D * K * H)

    user_width, item_width = width_of(schema.user_side), width_of(schema.item_side)
    if not decoupled:
        return timelines, 0, heads(C, N, user_width + item_width, 0)
    users = heads(1, N_U, user_width, 2 * 2 * D * D)  # q · W_k and the sum · W_v
    return timelines, users, heads(C, N_G, item_width, 0)


@pytest.mark.parametrize("preset", ["base", "medium"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("candidates", "length"), [(1, 512), (500, 512), (37, 100)])
def test_counted_flops_are_those_of_the_closed_form(preset: str, decoupled: bool, candidates: int, length: int) -> None:
    model = on_meta(industrial_schema(), "ui-mixformer" if decoupled else "mixformer", preset)
    counted = cost(model, candidates, length)
    assert (counted.timelines, counted.users, counted.items) == closed_form(decoupled, preset, candidates, length)


def test_the_decoupling_ratio_falls_towards_the_share_of_item_heads_and_meets_the_papers() -> None:
    schema = industrial_schema()
    decoupled, full = on_meta(schema, "ui-mixformer", "medium"), on_meta(schema, "mixformer", "medium")
    ratios = [one.batched for one in decoupling_ratios(decoupled, full, [1, 100, 2_000, 10**7], 512)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == pytest.approx(0.5, abs=1e-3)
    batched, unbatched = sharing_for(PAPER_RATIO, decoupled, full, 512)
    (at,) = decoupling_ratios(decoupled, full, [round(batched)], 512)
    assert at.batched == pytest.approx(PAPER_RATIO, abs=1e-3)
    assert 1 < unbatched < 2
    expected = sum(closed_form(True, "medium", 500, 512)) / sum(closed_form(False, "medium", 500, 512))
    (at,) = decoupling_ratios(decoupled, full, [500], 512)
    assert at.batched == pytest.approx(expected)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_can_be_found_by_its_name_and_counted(preset: str) -> None:
    name, size = find_preset(preset)
    model = on_meta(industrial_schema(sequences=2), name, size)
    counted = cost(model, 10, 20)
    assert counted.items > 0
    assert counted.timeline_bytes > 0
    assert all(parameter.is_meta for parameter in model.parameters())


def test_an_unknown_preset_lists_what_there_is() -> None:
    assert find_preset("tiny") == ("ui-mixformer", "tiny")
    with pytest.raises(ValueError, match=r"'mixformer-huge'.*mixformer-small.*hyformer"):
        find_preset("mixformer-huge")
