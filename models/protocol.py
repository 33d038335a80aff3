"""What every model is: three calls, in training as in serving (DESIGN §4).

Shape suffixes: U timelines, E events, S sequences, R requests, C candidates, K tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from features.batch import STRUCTURE, Items, RequestBatch, Timeline, Users
from features.schema import Schema, Sequence
from models.attention import Seen
from models.inputs import InputLayer


@dataclass
class EncodedEvents:
    """What a model keeps of the events of some sequences, one sequence after the other.

    Attributes:
        layers: per layer the tensors kept, [..., E, width] each.
        ts: microseconds UTC, [E].
        offsets: where each sequence's timelines begin and end among the events, [S, U + 1].
    """

    layers: list[tuple[Tensor, ...]]
    ts: Tensor = field(metadata=STRUCTURE)
    offsets: Tensor = field(metadata=STRUCTURE)

    def append(self, later: EncodedEvents) -> EncodedEvents:
        """The state of the timelines with later events at their ends; equals computing it whole."""
        counts = torch.stack([self.offsets.diff(), later.offsets.diff()])  # [2, S, U]
        timeline = torch.arange(counts[0].numel())
        of_event = torch.cat([torch.repeat_interleave(timeline, one.flatten()) for one in counts])
        order = of_event.argsort(stable=True)
        layers = [
            tuple(torch.cat(pair, -2).index_select(-2, order.to(pair[0].device)) for pair in zip(*both, strict=True))
            for both in zip(self.layers, later.layers, strict=True)
        ]
        return EncodedEvents(layers, torch.cat([self.ts, later.ts])[order], _absolute(counts.sum(0)))

    def seen(self, sequences: Iterable[Sequence], users: Users) -> Seen:
        """What each request sees of these events: ``timeline[max(0, end − L):end]`` of every sequence."""
        sequences = list(sequences)
        if not sequences:
            nothing = users.ts.new_zeros(0, len(users.ts))
            return Seen(users.timeline, users.ts, nothing, nothing, self.ts, self.offsets.shape[1] - 1)
        end = torch.stack([users.end[sequence.name] for sequence in sequences])
        length = torch.tensor([[sequence.length] for sequence in sequences])
        start = self.offsets[:, users.timeline]
        first = (end - length).clamp(min=0)
        return Seen(users.timeline, users.ts, start + first, start + end, self.ts, self.offsets.shape[1] - 1)


@dataclass
class TimelineState:
    """What depends on nothing but the events, shared by all requests of a timeline.

    Attributes:
        events: one entry for every group of sequences that is encoded together.
    """

    events: list[EncodedEvents]

    def append(self, later: TimelineState) -> TimelineState:
        """The state with later events, encoded on their own, at the ends of the same timelines."""
        return TimelineState([old.append(new) for old, new in zip(self.events, later.events, strict=True)])


def gather_events(
    names: list[str], timelines: Mapping[str, Timeline], embedded: Mapping[str, Tensor], like: Tensor
) -> EncodedEvents:
    """Embedded events [E, width] of these sequences, one sequence after the other.

    Args:
        like: a tensor of this width on the model's device; what there is when there is no sequence.
    """
    counts = torch.stack([timelines[name].offsets.diff() for name in names] or [torch.zeros(0, dtype=torch.long)])
    ts = torch.cat([timelines[name].ts for name in names] or [torch.zeros(0, dtype=torch.long)])
    values = torch.cat([embedded[name] for name in names] or [like.new_zeros(0, like.shape[-1])])
    return EncodedEvents([(values,)], ts, _absolute(counts))


def _absolute(counts_SU: Tensor) -> Tensor:
    """Offsets [S, U + 1] among all events from the number of events per timeline."""
    ends = counts_SU.flatten().cumsum(0).view_as(counts_SU)
    return torch.cat([ends[:, :1] - counts_SU[:, :1], ends], dim=1)


class RankingModel(nn.Module, ABC):
    """Scores candidates of requests in three calls; ``forward`` is the three in a row, nothing else.

    Args:
        schema: features in the order of concatenation, sequences and tasks.
        id_dropout: see :class:`models.inputs.InputLayer`.
    """

    def __init__(self, schema: Schema, id_dropout: float) -> None:
        super().__init__()
        self.schema = schema
        self.inputs = InputLayer(schema, id_dropout)

    @abstractmethod
    def encode_timelines(self, timelines: Mapping[str, Timeline]) -> TimelineState:
        """Per event: nothing but the event decides it."""

    @abstractmethod
    def encode_users(self, users: Users, timeline_state: TimelineState) -> Any:
        """Per request: all that no candidate can change; a dataclass of tensors."""

    @abstractmethod
    def score(self, user_state: Any, items: Items) -> Tensor:
        """Logits of every candidate, [C, K]."""

    def forward(self, batch: RequestBatch) -> Tensor:
        """Logits of every candidate, [C, K]."""
        timeline_state = self.encode_timelines(batch.timelines)
        return self.score(self.encode_users(batch.users, timeline_state), batch.items)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and sizes: what ``models.registry.build_model`` rebuilds this model from, beside its schema."""
