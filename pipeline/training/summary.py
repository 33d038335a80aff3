"""Counts of samples that are made before they are trained on or judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from features.batch import collate
from features.samples.source import SampleSource
from features.schema import Schema
from pipeline.training.settings import TooFewError


@dataclass(frozen=True)
class SourceSummary:
    """Counts of some samples, made before they are trained on or judged by.

    Attributes:
        candidates: of all requests.
        labels: per task the known ones and the positive ones among them.
        numbers: mean and deviation of every number, by embedding.
    """

    candidates: int
    labels: dict[str, tuple[int, int]]
    numbers: dict[str, tuple[float, float]]


def summarize(source: SampleSource) -> SourceSummary:
    """One pass over the samples on Ray Data."""
    schema = source.schema
    total: dict[str, np.ndarray] = {}
    if source.files():
        sums = source.dataset().map_batches(_Sums(schema), batch_size=None, batch_format="pyarrow")
        for row in sums.iter_rows():
            total.setdefault(row["of"], np.zeros(3))
            total[row["of"]] += (row["count"], row["sum"], row["squares"])
    nothing = np.zeros(3)
    numbers = {}
    for name in {field.embedding for field in schema.all_fields() if field.kind == "number"}:
        count, first, squares = total.get(f"number {name}", nothing)
        mean = first / max(count, 1)
        deviation = math.sqrt(max(squares / max(count, 1) - mean * mean, 0.0))
        numbers[name] = (float(mean), deviation or 1.0)
    labels = {}
    for task in schema.tasks:
        known, positive, _ = total.get(f"label {task.name}", nothing)
        labels[task.name] = (int(known), int(positive))
    return SourceSummary(int(total.get("candidates", nothing)[0]), labels, numbers)


class _Sums:
    """Count, sum and sum of squares of a block's labels and numbers, and the count of its candidates."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def __call__(self, rows: pa.Table) -> pa.Table:
        columns: dict[str, list[Any]] = {"of": [], "count": [], "sum": [], "squares": []}
        if rows.num_rows:
            batch = collate(rows, self.schema)
            sources = [(feature, batch.users.fields) for feature in self.schema.user_side]
            sources += [(feature, batch.items.fields) for feature in self.schema.item_side]
            values: list[tuple[str, Any]] = [
                (f"number {field.embedding}", fields[field.name]) for field, fields in sources if field.kind == "number"
            ]
            values += [
                (f"number {field.embedding}", batch.timelines[sequence.name].fields[field.name])
                for sequence in self.schema.sequences
                for field in sequence.fields
                if field.kind == "number"
            ]
            values += [
                (f"label {task.name}", batch.labels[batch.label_mask[:, index], index])
                for index, task in enumerate(self.schema.tasks)
            ]
            values += [("candidates", torch.zeros(batch.candidates))]
            for name, value in values:
                assert isinstance(value, Tensor)
                known = value[value.isfinite()].double()
                for key, entry in zip(
                    columns, (name, len(known), float(known.sum()), float((known * known).sum())), strict=True
                ):
                    columns[key].append(entry)
        types = pa.schema(
            [("of", pa.string()), ("count", pa.int64()), ("sum", pa.float64()), ("squares", pa.float64())]
        )
        return pa.table(columns, schema=types)


def require_both_classes(task: str, where: str, summary: SourceSummary, remedy: str) -> None:
    """
    Raises:
        TooFewError: there is no AUC of this task in these samples.
    """
    known, positive = summary.labels[task]
    if not 0 < positive < known:
        raise TooFewError(
            f"task {task}, which the gate judges by: of {summary.candidates:,} candidates in the {where} set "
            f"{known:,} have a known label, {positive:,} of them positive. Without both classes there is no AUC. "
            f"{remedy}, take more partitions, or name another task in `evaluation.task`"
        )
