"""The input layer: embedding tables, numbers, event times, and the concatenation of features (eq. 1 of MixFormer)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.batch import Ids, Jagged, RequestBatch, Timeline, Values
from features.schema import SECOND, FieldSpec, Schema, Sequence
from models.blocks.draws import current_draws, per_value, rows_are
from models.embeddings import EmbeddingTable, EmbeddingTables, share_rows

TIME_PERIODS = (86_400 * SECOND, 7 * 86_400 * SECOND)
"""Periods of the time encoding of events, microseconds: a day and a week."""

TIME_WIDTH = 2 * len(TIME_PERIODS)


def time_encoding(ts: Tensor) -> Tensor:
    """Sine and cosine of an event's phase in the day and in the week (UTC), [E, TIME_WIDTH].

    It depends on the event alone, so that keys and values stay shareable; the event's age enters
    by the attention's relative-time bias.
    """
    phases = torch.stack([(ts % period).double() / period for period in TIME_PERIODS], -1) * (2 * torch.pi)
    return torch.cat([phases.sin(), phases.cos()], -1)


class InputLayer(nn.Module):
    """Embedding tables shared by features and event fields, and standardised numbers.

    Row 0 of every table is the unknown value. ``id_dropout`` trains it: in training that share of the ids
    reads row 0 instead of its own.
    """

    def __init__(self, schema: Schema, id_dropout: float = 0.01) -> None:
        super().__init__()
        self.id_dropout = id_dropout
        self.schema = schema
        self.tables = EmbeddingTables()
        self.numbers = nn.ModuleDict()
        for field in schema.all_fields():
            if field.kind == "number":
                self.numbers[field.embedding] = NumberEmbedding(field.dim)
            elif field.embedding not in self.tables:
                self.tables[field.embedding] = EmbeddingTable(field.rows, field.dim)
        self._looked_up: dict[str, tuple[Tensor, Tensor]] = {}  # table → rows of it and their embeddings

    def set_statistics(self, statistics: Mapping[str, tuple[float, float]]) -> None:
        """Mean and deviation of the numbers, by embedding, by which they are standardised."""
        for name, (mean, deviation) in statistics.items():
            number = self.numbers[name]
            assert isinstance(number, NumberEmbedding)
            number.mean.fill_(mean)
            number.deviation.fill_(deviation)

    @contextmanager
    def each_row_once(self, batch: RequestBatch) -> Iterator[RequestBatch]:
        """The batch of :func:`share_rows`; within the block each row of a table is looked up once for all fields."""
        shared, rows = share_rows(batch, self.schema)
        self._looked_up = {
            name: (table_rows, self.tables.table(name).lookup(table_rows)) for name, table_rows in rows.items()
        }
        try:
            yield shared
        finally:
            self._looked_up = {}

    def concatenate(self, fields: Iterable[FieldSpec], values: Mapping[str, Values]) -> Tensor:
        """e = [e_1; …; e_M] of at least one field, [rows, Σ d_i]; a multi-valued field is mean-pooled."""
        return torch.cat([self.embed(field, values[field.name]) for field in fields], dim=-1)

    def events(self, sequence: Sequence, timeline: Timeline, event_time: bool) -> Tensor:
        """s_t: the fields of every event (section 3.2) and, with ``event_time``, its time encoding, [E, D_s]."""
        draws = current_draws()
        with rows_are(draws.keys.events[sequence.name] if draws is not None else None):
            s = self.concatenate(sequence.fields, timeline.fields)
        return torch.cat([s, time_encoding(timeline.ts).to(s)], dim=-1) if event_time else s

    def embed(self, field: FieldSpec, values: Values) -> Tensor:
        """Embedding of one field, [rows, dim]."""
        if field.kind == "number":
            assert isinstance(values, Tensor)
            embedded: Tensor = self.numbers[field.embedding](values)
            return embedded
        inner = values.values if isinstance(values, Jagged) else values
        compressed = isinstance(inner, Ids)
        if isinstance(inner, Ids):
            weight, rows = self._rows(field.embedding, inner.unique), inner.index
        else:
            weight, rows = self.tables.table(field.embedding).weight, inner
        rows = self._drop(field, rows, values)  # of a compressed field, too, 0 is the unknown value
        # by embedding and not by indexing, because its backward adds up in a fixed order
        if isinstance(values, Jagged):
            return functional.embedding_bag(rows, weight, values.offsets[:-1], mode="mean", sparse=not compressed)
        return functional.embedding(rows, weight, sparse=not compressed)

    def _rows(self, table: str, rows: Tensor) -> Tensor:
        known, embeddings = self._looked_up.get(table, (None, None))
        return embeddings if embeddings is not None and known is rows else self.tables.table(table).lookup(rows)

    def _drop(self, field: FieldSpec, rows: Tensor, values: Values) -> Tensor:
        if not self.training or not self.id_dropout or field.kind != "id":
            return rows
        if (draws := current_draws()) is None:
            return rows.masked_fill(torch.rand(rows.shape, device=rows.device) < self.id_dropout, 0)
        with rows_are(per_value(draws.rows, values) if isinstance(values, Jagged) else None):
            bits = draws.words(1)[:, 0]
        return rows.masked_fill((bits >> 11) & (2**53 - 1) < round(self.id_dropout * 2**53), 0)


class NumberEmbedding(nn.Module):
    """A number as (x − mean) / deviation times a learned direction, plus an offset; NaN reads the mean.

    Mean and deviation are those of the training rows and are saved with the model.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.offset = nn.Parameter(torch.zeros(dim))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        standard = ((x - self.mean) / self.deviation).nan_to_num(0.0).clamp(-10, 10).to(self.direction.dtype)
        return standard[..., None] * self.direction + self.offset
