"""Embedding tables behind one interface: look up rows, update those that were touched, export and import rows.

The cost of a training step depends on the rows that it touches, never on the size of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from features.batch import Ids, Jagged, RequestBatch, Values
from features.schema import FieldSpec, Schema


class EmbeddingTable(nn.Embedding):
    """One table, [rows, dim]; its gradient is sparse and holds only rows that were looked up."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__(rows, dim, sparse=True)
        nn.init.normal_(self.weight, std=0.01)

    def lookup(self, rows: Tensor) -> Tensor:
        """Embeddings of these rows, [len(rows), dim]. No row may occur twice: the gradient has one row for each."""
        found: Tensor = self(rows)
        return found

    @torch.no_grad()
    def export_rows(self, rows: Tensor) -> Tensor:
        """A copy of these rows, [len(rows), dim]."""
        return self.weight.index_select(0, rows)

    @torch.no_grad()
    def import_rows(self, rows: Tensor, values: Tensor) -> None:
        """Put values [len(rows), dim] in the place of these rows."""
        self.weight.index_copy_(0, rows, values)


class EmbeddingTables(nn.ModuleDict):
    """The tables of a model by name."""

    def table(self, name: str) -> EmbeddingTable:
        table = self[name]
        assert isinstance(table, EmbeddingTable)
        return table

    def gradients(self) -> list[Tensor]:
        """The gradients of the rows that were touched, table after table."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        return [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]  # type: ignore[no-untyped-call]


def share_rows(batch: RequestBatch, schema: Schema) -> tuple[RequestBatch, dict[str, Tensor]]:
    """The batch in which all compressed fields of a table index the same rows of it (HyFormer 3.8.1).

    An id that occurs in a sequence and in a candidate is then one row.

    Returns:
        the batch, and per table the rows that any of its compressed fields reads: row 0, then ascending.
    """
    parts: list[tuple[FieldSpec, Mapping[str, Values]]] = [
        *((feature, batch.users.fields) for feature in schema.user_side),
        *((feature, batch.items.fields) for feature in schema.item_side),
        *((field, batch.timelines[sequence.name].fields) for sequence in schema.sequences for field in sequence.fields),
    ]
    read: dict[str, list[Tensor]] = {}
    for field, fields in parts:
        ids = _ids(fields[field.name])
        if ids is not None:
            read.setdefault(field.embedding, []).append(ids.unique)
    rows = {name: some[0] if len(some) == 1 else torch.unique(torch.cat(some)) for name, some in read.items()}
    if not rows:  # nothing is compressed, as in serving
        return batch, rows

    def shared(specs: Iterable[FieldSpec], fields: Mapping[str, Values]) -> dict[str, Values]:
        return {spec.name: _over(fields[spec.name], rows.get(spec.embedding)) for spec in specs}

    timelines = {}
    for sequence in schema.sequences:
        timeline = batch.timelines[sequence.name]
        timelines[sequence.name] = replace(timeline, fields=shared(sequence.fields, timeline.fields))
    users = replace(batch.users, fields=shared(schema.user_side, batch.users.fields))
    items = replace(batch.items, fields=shared(schema.item_side, batch.items.fields))
    return replace(batch, timelines=timelines, users=users, items=items), rows


def _ids(values: Values) -> Ids | None:
    inner = values.values if isinstance(values, Jagged) else values
    return inner if isinstance(inner, Ids) else None


def _over(values: Values, rows: Tensor | None) -> Values:
    """A field as an index into these rows, which include all that it reads; as it is when it is not compressed."""
    ids = _ids(values)
    if ids is None or rows is None or ids.unique is rows:
        return values
    moved = Ids(rows, torch.searchsorted(rows, ids.unique)[ids.index])
    return Jagged(moved, values.offsets) if isinstance(values, Jagged) else moved
