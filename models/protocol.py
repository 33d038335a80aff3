"""What every model is: three calls, in training as in serving (DESIGN §4).

Shape suffixes: U timelines, E events, S sequences, R requests, C candidates, K tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.batch import STRUCTURE, Items, RequestBatch, Timeline, Users
from features.schema import Declaration, Schema, Sequence
from models.blocks.attention import Seen
from models.inputs import TIME_WIDTH, InputLayer
from models.sizes import width_of


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

    def seen(self, sequences: tuple[Sequence, ...], users: Users) -> Seen:
        """What each request sees of these events: ``timeline[max(0, end − L):end]`` of every sequence."""
        ends = [users.end[sequence.name] for sequence in sequences]
        end = torch.stack(ends) if ends else users.ts.new_zeros(0, len(users.ts))
        length = torch.tensor([sequence.length for sequence in sequences], dtype=torch.long)
        start = self.offsets[:, users.timeline] if ends else end
        first = (end - length[:, None]).clamp(min=0)
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


def _absolute(counts_SU: Tensor) -> Tensor:
    """Offsets [S, U + 1] among all events from the number of events per timeline."""
    S, U = counts_SU.shape
    ends = functional.pad(counts_SU.flatten().cumsum(0), (1, 0))
    return ends[torch.arange(S)[:, None] * U + torch.arange(U + 1)]


class RankingModel(nn.Module, ABC):
    """Scores candidates of requests in three calls; ``forward`` is the three in a row, nothing else.

    Args:
        schema: features in the order of concatenation, sequences and tasks.
        event_width: width to which a linear map of each sequence aligns its events.
        event_time: whether events carry their time encoding.
        id_dropout: see :class:`models.inputs.InputLayer`.

    Attributes:
        name: by which the registry built it.
        config: all sizes and switches, those that the schema decides included.
    """

    name: str
    config: Declaration

    def __init__(self, schema: Schema, event_width: int, event_time: bool, id_dropout: float) -> None:
        super().__init__()
        self.schema, self.event_width, self.event_time = schema, event_width, event_time
        self.inputs = InputLayer(schema, id_dropout)
        time = TIME_WIDTH if event_time else 0
        self.align = nn.ModuleDict(
            {one.name: nn.Linear(width_of(one.fields) + time, event_width) for one in schema.sequences}
        )

    def aligned_events(self, sequences: tuple[Sequence, ...], timelines: Mapping[str, Timeline]) -> EncodedEvents:
        """Aligned events S of these sequences, [E, event_width], one sequence after the other."""
        own = [(sequence, timelines[sequence.name]) for sequence in sequences]
        s = [self.align[one.name](self.inputs.events(one, timeline, self.event_time)) for one, timeline in own]
        ts = [timeline.ts for _, timeline in own]
        if not own:  # a model of the request alone
            nothing = next(self.parameters()).new_zeros(0, self.event_width)
            return EncodedEvents([(nothing,)], torch.zeros(0, dtype=torch.long), torch.zeros(0, 1, dtype=torch.long))
        counts = torch.stack([timeline.offsets.diff() for _, timeline in own])
        return EncodedEvents([(torch.cat(s),)], torch.cat(ts), _absolute(counts))

    def dense_parameters(self) -> list[nn.Parameter]:
        """All parameters but the embedding tables, of which a step touches only some rows."""
        tables = {id(table) for table in self.inputs.tables.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in tables]

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

    def describe(self) -> dict[str, Any]:
        """Name and sizes: what ``models.registry.rebuild_model`` builds this model from, beside its schema."""
        return {"name": self.name} | self.config.model_dump()
