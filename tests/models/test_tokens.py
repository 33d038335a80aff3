"""Which features become which heads and tokens."""

from __future__ import annotations

import pytest

from models.hyformer.config import HyFormerConfig
from models.hyformer.tokens import query_tokens, token_groups
from models.mixformer.config import MixFormerConfig, decoupled_heads
from tests.models.batches import make_schema

SCHEMA = make_schema()  # widths: user_id 5, age 3; device 2 (context); item_id 6, tags 3


def grouped(tokens: int, **changes: object) -> list[tuple[list[str], int]]:
    config = HyFormerConfig(width=64, **changes)  # type: ignore[arg-type]
    return [([one.name for one in group.features], group.tokens) for group in token_groups(SCHEMA, config, tokens)]


def test_semantic_groups_are_the_sides_and_share_tokens_by_width() -> None:
    user, context, item = ["user_id", "age"], ["device"], ["item_id", "tags"]
    assert grouped(3) == [(user, 1), (context, 1), (item, 1)]
    assert grouped(4) == [(user, 1), (context, 1), (item, 2)]  # 9 wide is the widest per token
    assert grouped(6) == [(user, 2), (context, 1), (item, 3)]


def test_auto_split_is_one_group_of_everything_and_named_groups_put_the_users_first() -> None:
    assert grouped(5, tokenization="auto") == [(["user_id", "age", "device", "item_id", "tags"], 5)]
    named = {"film": ("item_id", "tags"), "who": ("device", "user_id", "age")}
    assert grouped(2, groups=named) == [(["device", "user_id", "age"], 1), (["item_id", "tags"], 1)]


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        (2, {}, "raise tokens to at least 9"),
        (5, {"groups": {"a": ("user_id",)}}, "must hold every feature once"),
        (
            5,
            {"groups": {"a": ("user_id", "item_id"), "b": ("age", "device", "tags")}, "query": "target_only"},
            "mixes user and item features",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(tokens: int, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped(tokens, **changes)


def test_queries_are_counted_per_stream() -> None:
    per_sequence = HyFormerConfig(width=64, queries={"seen": 3, "bought": 1})
    assert query_tokens(SCHEMA, per_sequence) == [3, 1]
    assert query_tokens(SCHEMA, per_sequence.model_copy(update={"sequences": "merged"})) == [4]
    assert query_tokens(SCHEMA, HyFormerConfig(width=64, queries=2)) == [2, 2]
    assert query_tokens(SCHEMA, HyFormerConfig(width=64, queries=2, sequences="merged")) == [2]


@pytest.mark.parametrize(("heads", "user_heads"), [(2, 1), (4, 3), (16, 9), (19, 10)])
def test_item_heads_are_the_floor_of_their_share(heads: int, user_heads: int) -> None:
    config = MixFormerConfig(heads=heads, head_dim=heads)  # D_ns^G = 9 of D_ns = 19
    assert decoupled_heads(SCHEMA, config) == user_heads


def test_both_sides_keep_a_head_however_unequal_their_widths() -> None:
    def with_item_width(width: int) -> int:
        features = [
            one.model_copy(update={"dim": width, "table": f"own_{one.name}"}) if one.side == "item" else one
            for one in SCHEMA.features
        ]
        wide = SCHEMA.model_copy(update={"features": tuple(features)})
        return decoupled_heads(wide, MixFormerConfig(heads=4, head_dim=8))

    assert with_item_width(10_000) == 1
    assert with_item_width(1) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": 0.001}, "leaves no hidden unit"),
        ({"ffn": float("inf")}, "finite"),
        ({"mixing": "self_attention", "mixing_heads": 3}, "divisible by mixing_heads 3"),
        ({"user_heads": 8}, "must lie in 0 … 7"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixFormerConfig(**changes)  # type: ignore[arg-type]
