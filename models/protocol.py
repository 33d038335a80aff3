"""What every model is: three calls, in training as in serving (docs/design.md#models).

Shape suffixes: U timelines, E events, S sequences, R requests, C candidates, K tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Several
from typing import Any

import torch
from torch import Tensor, nn

from features.batch import Items, RequestBatch, Timeline, Users
from features.schema import Declaration, Schema, Sequence
from models.blocks.draws import current_draws, rows_are
from models.inputs import TIME_WIDTH, InputLayer
from models.sizes import width_of
from models.state import EncodedEvents, TimelineState, UserState, offsets_of


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
        streams: the sequences of each entry of a :class:`models.state.TimelineState`, in its order; of a model that
            does not say otherwise, all of them in one.
    """

    name: str
    config: Declaration
    streams: Several[tuple[Sequence, ...]]

    def __init__(self, schema: Schema, event_width: int, event_time: bool, id_dropout: float) -> None:
        super().__init__()
        self.schema, self.event_width, self.event_time = schema, event_width, event_time
        self.streams = [schema.sequences]
        self.inputs = InputLayer(schema, id_dropout)
        time = TIME_WIDTH if event_time else 0
        self.align = nn.ModuleDict(
            {sequence.name: nn.Linear(width_of(sequence.fields) + time, event_width) for sequence in schema.sequences}
        )

    def aligned_events(self, sequences: tuple[Sequence, ...], timelines: Mapping[str, Timeline]) -> EncodedEvents:
        """Aligned events S of these sequences, [E, event_width], one sequence after the other."""
        pairs = [(sequence, timelines[sequence.name]) for sequence in sequences]
        s = [
            self.align[sequence.name](self.inputs.events(sequence, timeline, self.event_time))
            for sequence, timeline in pairs
        ]
        ts = [timeline.ts for _, timeline in pairs]
        if not pairs:  # the model reads no sequences
            nothing = next(self.parameters()).new_zeros(0, self.event_width)
            return EncodedEvents([(nothing,)], torch.zeros(0, dtype=torch.long), torch.zeros(0, 1, dtype=torch.long))
        counts = torch.stack([timeline.offsets.diff() for _, timeline in pairs])
        return EncodedEvents([(torch.cat(s),)], torch.cat(ts), offsets_of(counts))

    def dense_parameters(self) -> list[nn.Parameter]:
        """All parameters but the embedding tables, of which a step touches only some rows."""
        tables = {id(table) for table in self.inputs.tables.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in tables]

    @abstractmethod
    def encode_timelines(self, timelines: Mapping[str, Timeline]) -> TimelineState:
        """Computed per event, from the event alone."""

    @abstractmethod
    def encode_users(self, users: Users, timeline_state: TimelineState) -> UserState:
        """Computed per request: all that no candidate can change."""

    @abstractmethod
    def score(self, user_state: UserState, items: Items) -> Tensor:
        """Logits of every candidate, [C, K]."""

    def forward(self, batch: RequestBatch) -> Tensor:
        """Logits of every candidate, [C, K]."""
        keys = draws.keys if (draws := current_draws()) is not None else None
        with self.inputs.each_row_once(batch) as shared:
            timeline_state = self.encode_timelines(shared.timelines)
            with rows_are(keys.requests if keys else None):
                user_state = self.encode_users(shared.users, timeline_state)
            with rows_are(keys.candidates if keys else None):
                return self.score(user_state, shared.items)

    def describe(self) -> dict[str, Any]:
        """Name and sizes: what ``models.registry.rebuild_model`` builds this model from, beside its schema."""
        return {"name": self.name} | self.config.model_dump()
