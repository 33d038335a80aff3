"""How features and sequences become tokens (3.3.1 and 3.7 of HyFormer).

Needs no PyTorch: a config is checked against its schema before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from features.schema import Feature, Schema, Sequence
from models.hyformer.config import HyFormerConfig
from models.sizes import width_of


def check_tokens(schema: Schema, config: HyFormerConfig) -> None:
    """Whether there are tokens for all queries and groups.

    Raises:
        ValueError: says what does not fit and what would.
    """
    token_groups(schema, config, config.tokens - sum(query_tokens(schema, config)))


@dataclass(frozen=True)
class TokenGroup:
    """Features that become these tokens together (3.3.1)."""

    features: tuple[Feature, ...]
    tokens: int

    @property
    def width(self) -> int:
        return width_of(self.features)

    @property
    def user_side(self) -> bool:
        return all(feature.side in ("user", "context") for feature in self.features)


def sequence_streams(schema: Schema, config: HyFormerConfig) -> list[tuple[Sequence, ...]]:
    """What is encoded together: each sequence on its own, or all merged."""
    if config.sequences == "merged" and schema.sequences:
        return [schema.sequences]
    return [(sequence,) for sequence in schema.sequences]


def query_tokens(schema: Schema, config: HyFormerConfig) -> list[int]:
    """Query tokens of each stream: one number is for every stream; by sequence, a merged stream has their sum."""
    streams = sequence_streams(schema, config)
    if not streams:
        raise ValueError("hyformer decodes behaviour sequences, and the schema has none")
    if isinstance(config.queries, int):
        counts = [config.queries for _ in streams]
    else:
        names = [sequence.name for sequence in schema.sequences]
        if set(config.queries) != set(names):
            raise ValueError(f"queries: {sorted(config.queries)} must name exactly the sequences {names}")
        counts = [sum(config.queries[sequence.name] for sequence in stream) for stream in streams]
    if min(counts) < 1:
        raise ValueError("queries: every stream needs at least one")
    return counts


def token_groups(schema: Schema, config: HyFormerConfig, tokens: int) -> list[TokenGroup]:
    """Semantic groups, user-side ones first, sharing M tokens in proportion to their widths; each has at least one.

    Raises:
        ValueError: there are more groups than tokens, or the groups do not hold every feature once.
    """
    if config.tokenization == "auto":
        groups = [schema.features]
    elif config.groups is None:
        sides = dict.fromkeys(feature.side for feature in schema.features)
        groups = [tuple(feature for feature in schema.features if feature.side == side) for side in sides]
    else:
        by_name = {feature.name: feature for feature in schema.features}
        named = [name for group in config.groups.values() for name in group]
        if sorted(named) != sorted(by_name) or not all(config.groups.values()):
            raise ValueError(f"groups: {sorted(named)} must hold every feature once: {sorted(by_name)}")
        groups = [tuple(by_name[name] for name in group) for group in config.groups.values()]
    mixed = [group for group in groups if len({feature in schema.user_side for feature in group}) > 1]
    if config.query == "target_only" and mixed:
        names = [feature.name for feature in mixed[0]]
        raise ValueError(f"query: target_only needs groups of one side each, and {names} mixes user and item features")
    if len(groups) > tokens:
        raise ValueError(
            f"tokens {config.tokens} leave {tokens} for {len(groups)} groups of features; "
            f"raise tokens to at least {config.tokens - tokens + len(groups)}"
        )
    widths = [width_of(group) for group in groups]
    counts = [1] * len(groups)
    for _ in range(tokens - len(groups)):  # each further token goes where the features per token are widest
        widest = max(range(len(groups)), key=lambda i: widths[i] / counts[i])
        counts[widest] += 1
    both = [TokenGroup(group, count) for group, count in zip(groups, counts, strict=True)]
    return sorted(both, key=lambda group: not group.user_side)
