"""What a model costs: parameters, FLOPs of the user and of the item side, and the bytes of its states.

Nothing is computed: the model and the values lie on PyTorch's meta device, and torch's FLOP counter follows the same
three calls that train and serve. A FLOP is one multiplication or one addition of a matrix product; embeddings,
norms, activations and softmax are not counted, as in the papers.

Shape suffixes: C candidates, T events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from features.batch import Items, Jagged, Timeline, Users, Values, nbytes
from features.schema import EventField, Feature, FieldSpec, Schema, Sequence, Side, Task
from models.blocks.heads import HeadSplit
from models.protocol import RankingModel
from models.registry import build_model

T = TypeVar("T")

PAPER_RATIO = 0.64
"""FLOPs of UI-MixFormer ÷ MixFormer in table 1: 2,242 / 3,503 GFLOPs per batch."""

DAY = 86_400_000_000


@dataclass(frozen=True)
class Cost:
    """FLOPs of one request with C candidates, and bytes of what it leaves behind.

    Attributes:
        timelines, users, items: FLOPs of ``encode_timelines``, ``encode_users`` and ``score``.
        timeline_bytes, user_bytes: of ``TimelineState``, and of what ``UserState`` adds to it.
    """

    timelines: int
    users: int
    items: int
    timeline_bytes: int
    user_bytes: int

    @property
    def total(self) -> int:
        return self.timelines + self.users + self.items

    @property
    def user_side(self) -> int:
        return self.timelines + self.users


def industrial_schema(sequences: int = 1, length: int = 512, tasks: int = 2) -> Schema:
    """A schema of the papers' kind: over 300 non-sequential features, half of them item-side, and side information.

    The sequences' embeddings are 64 wide, from 4 fields; the papers give no more than that (table 3 of HyFormer).
    """

    def features(side: Side, count: int) -> list[Feature]:
        return [Feature(name=f"{side}_{i}", side=side, buckets=1_000, dim=16) for i in range(count)]

    fields = tuple(EventField(name=name, buckets=1_000, dim=16) for name in ("item", "author", "tag", "action"))
    return Schema(
        features=tuple(features("user", 120) + features("context", 30) + features("item", 150)),
        sequences=tuple(
            Sequence(name=f"sequence_{i}", events="events", length=length, fields=fields) for i in range(sequences)
        ),
        tasks=tuple(Task(name=name) for name in ("finish", "skip", "like", "comment")[:tasks]),
    )


def on_meta(schema: Schema, name: str, preset: str, **overrides: object) -> RankingModel:
    """A model on the meta device, which takes no memory, for :func:`cost`."""
    with torch.device("meta"):
        return build_model(schema, name, preset, overrides).eval()


def dense_parameters(model: RankingModel) -> int:
    """Parameters except the embedding tables, as the papers count them."""
    return sum(parameter.numel() for parameter in model.dense_parameters())


def paddings(model: RankingModel) -> dict[str, int]:
    """Zeros that even splits into heads or tokens add to the concatenated features, by module."""
    return {name: part.padding for name, part in model.named_modules() if isinstance(part, HeadSplit)}


def cost(model: RankingModel, candidates: int, length: int | None = None) -> Cost:
    """Count one request.

    Args:
        model: from :func:`on_meta`.
        candidates: C.
        length: visible events of every sequence, at most its L; default: all L.
    """
    timelines, users, items = one_request(model.schema, candidates, length)
    with torch.no_grad():
        per_timeline, timeline_state = _count(lambda: model.encode_timelines(timelines))
        per_request, user_state = _count(lambda: model.encode_users(users, timeline_state))
        per_candidates, _ = _count(lambda: model.score(user_state, items))
    kept = nbytes(timeline_state)
    return Cost(per_timeline, per_request, per_candidates, kept, nbytes((timeline_state, user_state)) - kept)


def _count(call: Callable[[], T]) -> tuple[int, T]:
    # The FLOP counter knows plain matrix products, but not the fused kernels of a CPU.
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


def one_request(schema: Schema, candidates: int, length: int | None = None) -> tuple[dict[str, Timeline], Users, Items]:
    """One request on the meta device: its structure is real, its values have no memory."""
    counts = {
        sequence.name: min(length, sequence.length) if length is not None else sequence.length
        for sequence in schema.sequences
    }
    timelines = {
        sequence.name: Timeline(
            fields={field.name: _values(field, counts[sequence.name]) for field in sequence.fields},
            ts=torch.arange(counts[sequence.name]) * DAY,
            offsets=torch.tensor([0, counts[sequence.name]]),
        )
        for sequence in schema.sequences
    }
    users = Users(
        fields={feature.name: _values(feature, 1) for feature in schema.user_side},
        timeline=torch.tensor([0]),
        end={name: torch.tensor([count]) for name, count in counts.items()},
        ts=torch.tensor([max(counts.values(), default=0) * DAY]),
    )
    items = Items(
        {feature.name: _values(feature, candidates) for feature in schema.item_side}, torch.tensor([0, candidates])
    )
    return timelines, users, items


def _values(field: FieldSpec, rows: int) -> Values:
    if field.kind == "number":
        return torch.zeros(rows, device="meta")
    values = torch.zeros(rows, dtype=torch.long, device="meta")
    if isinstance(field, Feature) and field.multi:
        return Jagged(values, torch.zeros(rows + 1, dtype=torch.long, device="meta"))
    return values


@dataclass(frozen=True)
class Sharing:
    """UI-MixFormer against MixFormer of the same size at C candidates per request.

    Attributes:
        batched: FLOP ratio, both with request-level batching.
        unbatched: the ratio with MixFormer encoding request and sequence for every candidate anew.
    """

    candidates: int
    batched: float
    unbatched: float


def decoupling_ratios(decoupled: RankingModel, full: RankingModel, candidates: list[int], length: int) -> list[Sharing]:
    """FLOPs of a UI-MixFormer ÷ those of the MixFormer of its size."""
    alone = cost(full, 1, length).total
    rows = []
    for count in candidates:
        ours = cost(decoupled, count, length).total
        rows.append(Sharing(count, ours / cost(full, count, length).total, ours / (alone * count)))
    return rows


def sharing_for(
    ratio: float, decoupled: RankingModel, full: RankingModel, length: int
) -> tuple[float | None, float | None]:
    """Candidates per request at which ``batched`` and ``unbatched`` come down to a ratio; None: they never do.

    FLOPs are linear in C: a fixed part per request and one per candidate, which two counts determine.
    """
    (fixed, each), (full_fixed, full_each) = (_linear(model, length) for model in (decoupled, full))
    batched, unbatched = ratio * full_each - each, ratio * (full_fixed + full_each) - each
    return (
        (fixed - ratio * full_fixed) / batched if batched > 0 else None,
        fixed / unbatched if unbatched > 0 else None,
    )


def _linear(model: RankingModel, length: int) -> tuple[int, int]:
    of_one, of_two = cost(model, 1, length).total, cost(model, 2, length).total
    return 2 * of_one - of_two, of_two - of_one
