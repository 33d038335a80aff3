"""Statistics of the samples: coverage, lengths of histories, distinct ids, and what sharing saves.

Every file of the sample table is counted by itself; the counts of files add up to those of the table.

Legend: U rows of the sample table (timelines), R requests, C candidates, E events.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.sample_table import feature_column
from features.samples.export import CHUNK_BYTES, Unnested, chunk_bounds, flatten, flattened_bytes, parquet_bytes
from features.samples.source import SampleSource
from features.schema import Feature, FieldSpec, Schema
from features.tasks import each, ray_runs

SKETCH = 65_536
"""Ids kept to count the distinct ones: exact below, within about 1 % (three deviations of 1/√SKETCH) above."""

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class ValueCounts:
    """Counts of one feature or of one field of a sequence's events.

    Attributes:
        rows: values, or lists of a multi-valued feature.
        covered: how many of them hold something: a known code, a number.
        ids: known codes; 0 for a number.
        smallest: the smallest distinct codes as unsigned numbers, ascending, at most ``SKETCH`` of an id and all of
            a category. Ids are uniform hashes, so the SKETCH smallest of them tell how many there are, and
            two such lists merge into one.
    """

    rows: int = 0
    covered: int = 0
    ids: int = 0
    smallest: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @classmethod
    def of(cls, spec: FieldSpec, values: Any) -> ValueCounts:
        """Counts of an Arrow array of codes, numbers or lists of codes."""
        if spec.kind == "number":
            missing = int(pc.sum(pc.is_null(values, nan_is_null=True)).as_py() or 0)
            return cls(len(values), len(values) - missing)
        multi = isinstance(spec, Feature) and spec.multi
        codes = np.asarray(values.flatten() if multi else values, dtype=np.int64)
        known = codes != 0
        covered = known
        if multi:
            ends = np.cumsum(np.asarray(pc.list_value_length(values), dtype=np.int64))
            up_to = np.concatenate([[0], np.cumsum(known)])[np.concatenate([[0], ends])]
            covered = np.diff(up_to) > 0
        smallest = _smallest(spec, codes[known].view(np.uint64))
        return cls(len(values), int(covered.sum()), int(known.sum()), smallest)

    def merge(self, spec: FieldSpec, other: ValueCounts) -> ValueCounts:
        """Counts of both together."""
        smallest = _smallest(spec, np.concatenate([self.smallest, other.smallest]))
        return ValueCounts(self.rows + other.rows, self.covered + other.covered, self.ids + other.ids, smallest)

    def distinct(self, spec: FieldSpec) -> int:
        """Distinct known codes; estimated when an id has ``SKETCH`` or more."""
        if spec.kind != "id" or len(self.smallest) < SKETCH:
            return len(self.smallest)
        return round((SKETCH - 1) / (float(self.smallest[-1]) / 2.0**64))


def _smallest(spec: FieldSpec, codes: np.ndarray) -> np.ndarray:
    distinct = np.unique(codes)
    return distinct[:SKETCH] if spec.kind == "id" else distinct


@dataclass
class SampleStatistics:
    """Counts of some rows of the sample table; those of disjoint rows merge.

    Attributes:
        totals: timelines, requests, candidates; bytes of the sample table and of the flattened export.
        features: by name; a user or context feature counts once per request, others once per candidate.
        fields: by (sequence, field); every event of a timeline counts once.
        lengths: by sequence, how many requests see n events, for n = 0 … L.
    """

    totals: dict[str, int]
    features: dict[str, ValueCounts]
    fields: dict[tuple[str, str], ValueCounts]
    lengths: dict[str, np.ndarray]

    @classmethod
    def empty(cls, schema: Schema) -> SampleStatistics:
        return cls(
            {},
            {feature.name: ValueCounts() for feature in schema.features},
            {
                (sequence.name, event_field.name): ValueCounts()
                for sequence in schema.sequences
                for event_field in sequence.fields
            },
            {sequence.name: np.zeros(sequence.length + 1, np.int64) for sequence in schema.sequences},
        )

    @classmethod
    def of(cls, rows: pa.Table, schema: Schema) -> SampleStatistics:
        """Counts of rows in the layout of :func:`features.sample_table.sample_schema`; bytes on disk unknown."""
        if not rows.num_rows:
            return cls.empty(schema)
        samples = Unnested.of(rows)
        sizes = flattened_bytes(samples, schema)
        columns = {feature.name: samples.requests.field(feature_column(feature)) for feature in schema.user_side}
        columns |= {feature.name: samples.candidates.field(feature_column(feature)) for feature in schema.item_side}
        return cls(
            totals={
                "timelines": rows.num_rows,
                "requests": len(samples.requests),
                "candidates": len(samples.candidates),
                "sample_arrow_bytes": rows.nbytes,
                "flattened_arrow_bytes": int(sizes.sum()),
            },
            features={feature.name: ValueCounts.of(feature, columns[feature.name]) for feature in schema.features},
            fields={
                (sequence.name, event_field.name): ValueCounts.of(event_field, samples.events(sequence, event_field))
                for sequence in schema.sequences
                for event_field in sequence.fields
            },
            lengths={
                sequence.name: np.bincount(samples.window(sequence)[1], minlength=sequence.length + 1)
                for sequence in schema.sequences
            },
        )

    def merge(self, schema: Schema, other: SampleStatistics) -> SampleStatistics:
        """Counts of both together."""
        return SampleStatistics(
            totals={
                name: self.totals.get(name, 0) + other.totals.get(name, 0) for name in {**self.totals, **other.totals}
            },
            features={
                feature.name: self.features[feature.name].merge(feature, other.features[feature.name])
                for feature in schema.features
            },
            fields={
                (sequence.name, event_field.name): self.fields[sequence.name, event_field.name].merge(
                    event_field, other.fields[sequence.name, event_field.name]
                )
                for sequence in schema.sequences
                for event_field in sequence.fields
            },
            lengths={name: counts + other.lengths[name] for name, counts in self.lengths.items()},
        )

    def describe(self, schema: Schema) -> dict[str, Any]:
        """The figures people ask for, as a JSON-like dict; a share of nothing is null."""
        totals = {name: self.totals.get(name, 0) for name in ("timelines", "requests", "candidates")}
        return {
            **totals,
            "candidates_per_request": _ratio(totals["candidates"], totals["requests"]),
            "requests_per_timeline": _ratio(totals["requests"], totals["timelines"]),
            "bytes": self._bytes(),
            "features": {
                feature.name: {"side": feature.side} | _values(feature, self.features[feature.name])
                for feature in schema.features
            },
            "sequences": {
                sequence.name: {
                    "length": sequence.length,
                    **_lengths(self.lengths[sequence.name]),
                    "fields": {
                        event_field.name: _values(event_field, self.fields[sequence.name, event_field.name])
                        for event_field in sequence.fields
                    },
                }
                for sequence in schema.sequences
            },
        }

    def _bytes(self) -> dict[str, Any]:
        totals = self.totals
        sampled = totals.get("sampled_candidates", 0)
        per_candidate = _ratio(totals.get("sampled_parquet_bytes", 0), sampled)
        parquet = None if per_candidate is None else round(per_candidate * totals.get("candidates", 0))
        return {
            "sample_arrow": totals.get("sample_arrow_bytes", 0),
            "sample_parquet": totals.get("sample_parquet_bytes", 0),
            "flattened_arrow_computed": totals.get("flattened_arrow_bytes", 0),
            "flattened_parquet_estimated": parquet,
            "estimated_from_candidates": sampled,
        }


def _values(spec: FieldSpec, counts: ValueCounts) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "kind": spec.kind,
        "values": counts.rows,
        "coverage": _ratio(counts.covered, counts.rows),
    }
    if spec.kind != "number":
        distinct = counts.distinct(spec)
        figures |= {"ids": counts.ids, "distinct": distinct, "unique_ratio": _ratio(distinct, counts.ids)}
    return figures


def _lengths(histogram: np.ndarray) -> dict[str, Any]:
    """Share of requests that see any event, and quantiles of how many they see."""
    up_to = np.cumsum(histogram)
    requests = int(up_to[-1])
    if not requests:
        return {"coverage": None, "visible_events": dict.fromkeys(QUANTILES)}
    quantiles = {name: int(np.searchsorted(up_to, share * requests)) for name, share in QUANTILES.items()}
    return {"coverage": _ratio(requests - int(histogram[0]), requests), "visible_events": quantiles}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def sample_statistics(
    source: SampleSource, progress: Callable[[int, int], None] = lambda done, total: None
) -> SampleStatistics:
    """Statistics of the samples of a source, counted file by file, on Ray where it runs.

    Args:
        progress: called with (files done, files in all).

    Raises:
        CorankError: a file cannot be read; it is named.
    """
    files = source.files()
    total = SampleStatistics.empty(source.schema)
    with closing(each(_count_file, ((file, source) for file in files), ray_runs())) as counts:
        for done, of_file in enumerate(counts, start=1):
            total = total.merge(source.schema, of_file)
            progress(done, len(files))
    return total


def _count_file(file: str, source: SampleSource) -> SampleStatistics:
    rows = source.read(file)
    statistics = SampleStatistics.of(rows, source.schema)
    statistics.totals["sample_parquet_bytes"] = parquet_bytes(source, file)
    if rows.num_rows:  # write one row group of the export to memory, to estimate its whole size on disk
        samples = Unnested.of(rows)
        start, stop = next(chunk_bounds(flattened_bytes(samples, source.schema), CHUNK_BYTES))
        sink = pa.BufferOutputStream()
        pq.write_table(flatten(samples, source.schema, start, stop), sink, compression="zstd")
        statistics.totals |= {"sampled_candidates": stop - start, "sampled_parquet_bytes": sink.tell()}
    return statistics
